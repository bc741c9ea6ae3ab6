//! From bytes to an IPv4 packet's facts.

use mesh_common::be::{Be16, Be32};
use mesh_common::hash::Tuple;
use mesh_common::map::{PROTO_TCP, PROTO_UDP};

use crate::header::{ETHERTYPE_IPV4, Ethernet, IP_FRAGMENT_MASK, IP_OFFSET, IP_OFFSET_MASK, Ipv4, Ports};
use crate::packet::Packet;

/// An IPv4 packet's facts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parsed {
    /// Source.
    pub src: Be32,
    /// Destination.
    pub dst: Be32,
    /// IP protocol.
    pub protocol: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Offset of the layer 4 header, bytes.
    pub l4_offset: usize,
    /// Layer 4's ports; `None` where the protocol has none, or in a fragment after the first.
    pub ports: Option<(Be16, Be16)>,
    /// A TCP segment that opens a connection: SYN without ACK.
    pub opens: bool,
    /// Which part of a packet this is.
    pub fragment: Fragment,
}

/// Which part of an IPv4 packet a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// Its beginning, with the layer 4 header.
    First,
    /// A later part.
    Later,
}

/// Why a packet has no [`Parsed`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unparsed {
    /// Another EtherType than IPv4.
    NotIpv4(Be16),
    /// Truncated, or lying about its lengths.
    Malformed,
}

/// TCP's SYN among the flags.
const TCP_SYN: u8 = 0x02;
/// TCP's ACK among the flags.
const TCP_ACK: u8 = 0x10;
/// Offset of TCP's flags.
const TCP_FLAGS_OFFSET: usize = 13;

impl Parsed {
    /// The flow that the packet belongs to; `None` without ports.
    #[inline(always)]
    pub fn tuple(&self) -> Option<Tuple> {
        let (src_port, dst_port) = self.ports?;
        Some(Tuple { src: self.src, dst: self.dst, src_port, dst_port, protocol: self.protocol })
    }
}

/// Reads the Ethernet header.
#[inline(always)]
pub fn parse_ethernet(packet: &impl Packet) -> Result<Ethernet, Unparsed> {
    packet.load(0).ok_or(Unparsed::Malformed)
}

/// Reads the headers of an IPv4 packet over Ethernet.
#[inline(always)]
pub fn parse(packet: &impl Packet) -> Result<Parsed, Unparsed> {
    let ethernet = parse_ethernet(packet)?;
    if ethernet.ethertype != ETHERTYPE_IPV4 {
        return Err(Unparsed::NotIpv4(ethernet.ethertype));
    }
    parse_ipv4(packet)
}

/// Reads an IPv4 packet's headers behind an Ethernet header known to announce IPv4.
#[inline(always)]
pub fn parse_ipv4(packet: &impl Packet) -> Result<Parsed, Unparsed> {
    let ip: Ipv4 = packet.load(IP_OFFSET).ok_or(Unparsed::Malformed)?;
    let header_len = usize::from(ip.version_ihl & 0x0f) * 4;
    let total_len = u32::from(ip.total_len.get());
    if ip.version_ihl >> 4 != 4
        || header_len < Ipv4::LEN
        || total_len < header_len as u32
        // A GSO packet may be longer than its header can say, never shorter.
        || IP_OFFSET as u32 + total_len > packet.len()
    {
        return Err(Unparsed::Malformed);
    }
    let fragment = match ip.fragment.get() {
        bits if bits & IP_FRAGMENT_MASK == 0 => Fragment::Whole,
        bits if bits & IP_OFFSET_MASK == 0 => Fragment::First,
        _ => Fragment::Later,
    };
    let l4_offset = IP_OFFSET + header_len;
    let mut parsed = Parsed {
        src: ip.src,
        dst: ip.dst,
        protocol: ip.protocol,
        tos: ip.tos,
        l4_offset,
        ports: None,
        opens: false,
        fragment,
    };
    if fragment == Fragment::Later {
        return Ok(parsed);
    }
    match ip.protocol {
        PROTO_TCP => {
            let flags: u8 = packet.load(l4_offset + TCP_FLAGS_OFFSET).ok_or(Unparsed::Malformed)?;
            let ports: Ports = packet.load(l4_offset).ok_or(Unparsed::Malformed)?;
            parsed.opens = flags & (TCP_SYN | TCP_ACK) == TCP_SYN;
            parsed.ports = Some((ports.src, ports.dst));
        }
        PROTO_UDP => {
            let ports: Ports = packet.load(l4_offset).ok_or(Unparsed::Malformed)?;
            parsed.ports = Some((ports.src, ports.dst));
        }
        _ => {}
    }
    Ok(parsed)
}
