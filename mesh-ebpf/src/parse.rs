//! From bytes to a packet's facts.

use mesh_common::addr::{Address, Ip6};
use mesh_common::be::{Be16, Be32};
use mesh_common::hash::Tuple;
use mesh_common::map::{PROTO_ICMP, PROTO_ICMP6, PROTO_TCP, PROTO_UDP};

use crate::header::{
    Ethernet, Extension, Fragment6, IP_DF, IP_FRAGMENT_MASK, IP_OFFSET_MASK, IcmpError, Ipv4, Ipv6, Ports,
    TCP_ACK, TCP_RST, TCP_SYN, Tcp, Udp,
};
use crate::packet::Packet;

/// A packet's facts.
///
/// What may be missing has a value nevertheless: in the kernel these facts are kept in a map, and the verifier refuses to
/// write there what was never set, as an `Option`'s unused half is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parsed<A> {
    /// Source.
    pub src: A,
    /// Destination.
    pub dst: A,
    /// IP protocol.
    pub protocol: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Offset of the layer 4 header, bytes.
    pub l4_offset: usize,
    /// Layer 4's ports, if [`Parsed::has_ports`].
    ports: (Be16, Be16),
    /// Whether there are ports.
    has_ports: bool,
    /// TCP's flags.
    pub tcp_flags: u8,
    /// Which part of a packet this is.
    pub fragment: Fragment,
    /// What the fragments of one packet have in common, in network order as it lies in the packet.
    pub fragment_id: u32,
    /// The sender forbids routers to fragment it, as IPv6 always does.
    pub whole_only: bool,
    /// Where the packet quotes another one, if it is an ICMP error: ends, protocol and ports are then those of the flow that
    /// it is about, in the direction that the error takes. See [`related::follow`](crate::related::follow).
    quoted: QuotedAt,
}

/// Where an ICMP error quotes a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct QuotedAt {
    /// Offset of its IP header, bytes; 0: there is none.
    pub ip_offset: usize,
    /// Offset of its layer 4 header, bytes.
    pub l4_offset: usize,
}

/// Which part of an IP packet a packet is.
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
    /// Truncated, or lying about its lengths.
    Malformed,
}

/// Offset of TCP's flags.
const TCP_FLAGS_OFFSET: usize = 13;
/// Most IPv6 extension headers that are walked.
const EXTENSIONS_MAX: usize = 4;
/// IPv6 extension headers: hop-by-hop options, routing, fragment, destination options.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
/// IPv6 fragment header: "more fragments", and the offset.
const FRAGMENT6_MORE: u16 = 1;
const FRAGMENT6_OFFSET: u16 = 0xfff8;

impl<A: Address> Parsed<A> {
    /// The flow that the packet belongs to; `None` without ports.
    #[inline(always)]
    pub fn tuple(&self) -> Option<Tuple<A>> {
        let (src_port, dst_port) = self.ports()?;
        Some(Tuple { src: self.src, dst: self.dst, src_port, dst_port, protocol: self.protocol })
    }

    /// Layer 4's ports; `None` where the protocol has none, or in a fragment after the first.
    #[inline(always)]
    pub fn ports(&self) -> Option<(Be16, Be16)> {
        self.has_ports.then_some(self.ports)
    }

    /// The facts of the same packet with these ports.
    #[inline(always)]
    pub fn set_ports(&mut self, ports: Option<(Be16, Be16)>) {
        self.has_ports = ports.is_some();
        self.ports = ports.unwrap_or_default();
    }

    /// Where the packet quotes another one, if it is an ICMP error about a flow.
    #[inline(always)]
    pub fn quoted(&self) -> Option<QuotedAt> {
        self.is_error().then_some(self.quoted)
    }

    /// Whether it is an ICMP error about a flow.
    #[inline(always)]
    pub fn is_error(&self) -> bool {
        self.quoted.ip_offset != 0
    }

    /// The facts of the packet itself, not those of the flow that it is about: ICMP between `src` and `dst`.
    #[inline(always)]
    #[must_use]
    pub fn as_icmp(&self, src: A, dst: A, icmp: u8) -> Self {
        let quoted = QuotedAt::default();
        Self { src, dst, protocol: icmp, ports: Default::default(), has_ports: false, quoted, ..*self }
    }

    /// Makes the facts those of the flow that the ICMP error is about: a packet from `src` to `dst`, which is quoted.
    #[inline(always)]
    pub fn be_about(&mut self, src: A, dst: A, protocol: u8, ports: Option<(Be16, Be16)>, quoted: QuotedAt) {
        self.src = src;
        self.dst = dst;
        self.protocol = protocol;
        self.set_ports(ports);
        self.quoted = quoted;
    }

    /// Whether it is a TCP segment that opens a connection: SYN without ACK.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// Whether it is a TCP segment amid a connection, which is lost on a task that doesn't know it.
    #[inline(always)]
    pub fn is_midstream(&self) -> bool {
        self.protocol == PROTO_TCP && !self.is_error() && self.tcp_flags & (TCP_SYN | TCP_RST) == 0
    }
}

/// Reads the Ethernet header.
#[inline(always)]
pub fn parse_ethernet(packet: &impl Packet) -> Result<Ethernet, Unparsed> {
    packet.load(0).ok_or(Unparsed::Malformed)
}

/// Reads the headers of the IPv4 packet at `offset`.
#[inline(always)]
pub fn parse_ipv4(packet: &impl Packet, offset: usize) -> Result<Parsed<Be32>, Unparsed> {
    let ip: Ipv4 = packet.load(offset).ok_or(Unparsed::Malformed)?;
    let header_len = usize::from(ip.version_ihl & 0x0f) * 4;
    let total_len = u32::from(ip.total_len.get());
    if ip.version_ihl >> 4 != 4
        || header_len < Ipv4::LEN
        || total_len < header_len as u32
        // A GSO packet may be longer than its header can say, never shorter.
        || offset as u32 + total_len > packet.len()
    {
        return Err(Unparsed::Malformed);
    }
    let fragment = match ip.fragment.get() {
        bits if bits & IP_FRAGMENT_MASK == 0 => Fragment::Whole,
        bits if bits & IP_OFFSET_MASK == 0 => Fragment::First,
        _ => Fragment::Later,
    };
    let parsed = Parsed {
        src: ip.src,
        dst: ip.dst,
        protocol: ip.protocol,
        tos: ip.tos,
        l4_offset: offset + header_len,
        ports: (Be16::new(0), Be16::new(0)),
        has_ports: false,
        tcp_flags: 0,
        fragment,
        fragment_id: u32::from(ip.id.raw()),
        whole_only: ip.fragment.raw() & IP_DF.raw() != 0,
        quoted: QuotedAt { ip_offset: 0, l4_offset: 0 },
    };
    with_l4(packet, parsed, offset + total_len as usize)
}

/// Reads the headers of the IPv6 packet at `offset`.
#[inline(always)]
pub fn parse_ipv6(packet: &impl Packet, offset: usize) -> Result<Parsed<Ip6>, Unparsed> {
    let ip: Ipv6 = packet.load(offset).ok_or(Unparsed::Malformed)?;
    let class = ip.version_class_flow.get();
    let end = (offset + Ipv6::LEN) as u32 + u32::from(ip.payload_len.get());
    if class >> 28 != 6 || end > packet.len() {
        return Err(Unparsed::Malformed);
    }
    let mut parsed = Parsed {
        src: ip.src,
        dst: ip.dst,
        protocol: ip.next_header,
        tos: (class >> 20) as u8,
        l4_offset: offset + Ipv6::LEN,
        ports: (Be16::new(0), Be16::new(0)),
        has_ports: false,
        tcp_flags: 0,
        fragment: Fragment::Whole,
        fragment_id: 0,
        whole_only: true,
        quoted: QuotedAt { ip_offset: 0, l4_offset: 0 },
    };
    for _ in 0..EXTENSIONS_MAX {
        match parsed.protocol {
            HOP_BY_HOP | ROUTING | DESTINATION => {
                let header: Extension = packet.load(parsed.l4_offset).ok_or(Unparsed::Malformed)?;
                parsed.protocol = header.next_header;
                parsed.l4_offset += (usize::from(header.len) + 1) * 8;
            }
            FRAGMENT => {
                let header: Fragment6 = packet.load(parsed.l4_offset).ok_or(Unparsed::Malformed)?;
                parsed.protocol = header.next_header;
                parsed.l4_offset += Fragment6::LEN;
                parsed.fragment_id = header.id.raw();
                parsed.fragment = match header.offset.get() {
                    bits if bits & (FRAGMENT6_OFFSET | FRAGMENT6_MORE) == 0 => Fragment::Whole,
                    bits if bits & FRAGMENT6_OFFSET == 0 => Fragment::First,
                    _ => Fragment::Later,
                };
                if parsed.fragment == Fragment::Later {
                    break;
                }
            }
            _ => break,
        }
    }
    // Past these come headers that no mesh needs: their protocol has no ports, and so no flow.
    if end < parsed.l4_offset as u32 {
        return Err(Unparsed::Malformed);
    }
    with_l4(packet, parsed, end as usize)
}

/// Bytes of a layer 4 header that is looked into, of a family's packets; 0: none is.
#[inline(always)]
const fn l4_len<A: Address>(protocol: u8) -> usize {
    match protocol {
        PROTO_TCP => Tcp::LEN,
        PROTO_UDP => Udp::LEN,
        PROTO_ICMP if A::FAMILY == 4 => IcmpError::LEN,
        PROTO_ICMP6 if A::FAMILY == 6 => IcmpError::LEN,
        _ => 0,
    }
}

/// Reads the layer 4 header of a packet that ends at `end`, by its own account: what is behind that is padding.
#[inline(always)]
fn with_l4<A: Address>(
    packet: &impl Packet,
    mut parsed: Parsed<A>,
    end: usize,
) -> Result<Parsed<A>, Unparsed> {
    if parsed.fragment == Fragment::Later {
        return Ok(parsed);
    }
    if parsed.l4_offset + l4_len::<A>(parsed.protocol) > end {
        return Err(Unparsed::Malformed);
    }
    match parsed.protocol {
        PROTO_TCP => {
            let flags: u8 = packet.load(parsed.l4_offset + TCP_FLAGS_OFFSET).ok_or(Unparsed::Malformed)?;
            let ports: Ports = packet.load(parsed.l4_offset).ok_or(Unparsed::Malformed)?;
            parsed.tcp_flags = flags;
            parsed.set_ports(Some((ports.src, ports.dst)));
        }
        PROTO_UDP => {
            let ports: Ports = packet.load(parsed.l4_offset).ok_or(Unparsed::Malformed)?;
            parsed.set_ports(Some((ports.src, ports.dst)));
        }
        _ => {}
    }
    Ok(parsed)
}
