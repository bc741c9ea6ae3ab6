//! What a packet's headers say, for people and for JSON: of the programs' examples, and of what a run left.

use std::fmt;
use std::net::IpAddr;

use mesh_common::addr::backend_of;
use mesh_common::map::{PROTO_ICMP, PROTO_ICMP6, PROTO_TCP, PROTO_UDP};
use mesh_datapath::header::{
    Arp, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Extension, Fragment6, IP_OFFSET_MASK,
    IcmpError, Ipv4, Ipv6, Ports, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, Tcp, Udp, VXLAN_FLAGS, Vxlan,
};
use mesh_datapath::mesh::Errand;
use serde::Serialize;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::protocol_name;

/// Most IPv6 extension headers that are read.
const EXTENSIONS_MAX: usize = 4;
/// The offset in IPv6's fragment header.
const FRAGMENT6_OFFSET: u16 = 0xfff8;
/// How many packets inside one another are read.
const DEPTH_MAX: usize = 2;

/// What a frame's headers say; empty where they are cut off.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Decoded {
    /// Length from the Ethernet header on, bytes.
    pub len: u32,
    /// Ethernet source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ethernet_src: Option<String>,
    /// Ethernet destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ethernet_dst: Option<String>,
    /// `tcp`, `udp`, `icmp`, `icmp6`, `arp`, or a number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// Source address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub src: Option<IpAddr>,
    /// Destination address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dst: Option<IpAddr>,
    /// Source port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub src_port: Option<u16>,
    /// Destination port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dst_port: Option<u16>,
    /// TCP's flags, such as `SYN,ACK`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp_flags: Option<String>,
    /// Type and code of ICMP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icmp: Option<(u8, u8)>,
    /// TTL or hop limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hop_limit: Option<u8>,
    /// Whether it is a part of a fragmented packet.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub fragment: bool,
    /// What the Ethernet header of a mesh request says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Request>,
    /// VXLAN's identifier, if it is VXLAN.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
    /// The frame in VXLAN.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inner: Option<Box<Self>>,
}

/// What the Ethernet header of a mesh request says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Request {
    /// Incarnation of the chosen backend.
    pub incarnation: u32,
    /// How many nodes have been asked for the packet's flow before.
    pub asked: u8,
}

/// The beginning of a frame.
struct Head<'b> {
    bytes: &'b [u8],
    /// UDP port of VXLAN.
    vxlan_port: u16,
}

impl Head<'_> {
    fn load<T: FromBytes + Immutable + KnownLayout>(&self, offset: usize) -> Option<T> {
        T::read_from_prefix(self.bytes.get(offset..)?).ok().map(|(value, _)| value)
    }
}

impl Decoded {
    /// Reads the first `bytes` of a frame of `len` bytes, on a node whose VXLAN has this UDP port.
    pub fn read(bytes: &[u8], len: u32, vxlan_port: u16) -> Self {
        Self::read_within(&Head { bytes, vxlan_port }, len, DEPTH_MAX)
    }

    fn read_within(head: &Head<'_>, len: u32, depth: usize) -> Self {
        let mut decoded = Self { len, ..Self::default() };
        let Some(ethernet) = head.load::<Ethernet>(0) else { return decoded };
        decoded.ethernet_src = Some(colons(ethernet.src));
        decoded.ethernet_dst = Some(colons(ethernet.dst));
        decoded.request = backend_of(ethernet.dst)
            .and_then(|_| Errand::read(&ethernet))
            .map(|Errand { incarnation, asked, .. }| Request { incarnation, asked });
        let ethertype = ethernet.ethertype;
        match ethertype {
            ETHERTYPE_IPV4 => decoded.ipv4(head, depth),
            ETHERTYPE_IPV6 => decoded.ipv6(head, depth),
            ETHERTYPE_ARP => decoded.arp(head),
            other => decoded.protocol = Some(format!("ethertype {:#06x}", other.get())),
        }
        decoded
    }

    fn arp(&mut self, head: &Head<'_>) {
        self.protocol = Some("arp".to_owned());
        let Some(arp) = head.load::<Arp>(Ethernet::LEN) else { return };
        self.src = Some(IpAddr::V4({ arp.sender }.into()));
        self.dst = Some(IpAddr::V4({ arp.target }.into()));
    }

    fn ipv4(&mut self, head: &Head<'_>, depth: usize) {
        let Some(ip) = head.load::<Ipv4>(Ethernet::LEN) else { return };
        self.src = Some(IpAddr::V4({ ip.src }.into()));
        self.dst = Some(IpAddr::V4({ ip.dst }.into()));
        self.hop_limit = Some(ip.ttl);
        let fragment = { ip.fragment }.get();
        self.fragment = fragment & 0x3fff != 0;
        let l4_offset = Ethernet::LEN + usize::from(ip.version_ihl & 0x0f) * 4;
        self.layer4(head, ip.protocol, (fragment & IP_OFFSET_MASK == 0).then_some(l4_offset), depth);
    }

    fn ipv6(&mut self, head: &Head<'_>, depth: usize) {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const FRAGMENT: u8 = 44;
        const DESTINATION: u8 = 60;
        let Some(ip) = head.load::<Ipv6>(Ethernet::LEN) else { return };
        self.src = Some(IpAddr::V6({ ip.src }.into()));
        self.dst = Some(IpAddr::V6({ ip.dst }.into()));
        self.hop_limit = Some(ip.hop_limit);
        let (mut protocol, mut offset) = (ip.next_header, Some(Ethernet::LEN + Ipv6::LEN));
        for _ in 0..EXTENSIONS_MAX {
            let Some(at) = offset else { break };
            match protocol {
                HOP_BY_HOP | ROUTING | DESTINATION => {
                    let Some(header) = head.load::<Extension>(at) else { break };
                    protocol = header.next_header;
                    offset = Some(at + (usize::from(header.len) + 1) * 8);
                }
                FRAGMENT => {
                    let Some(header) = head.load::<Fragment6>(at) else { break };
                    protocol = header.next_header;
                    self.fragment = true;
                    let is_first = { header.offset }.get() & FRAGMENT6_OFFSET == 0;
                    offset = is_first.then_some(at + Fragment6::LEN);
                }
                _ => break,
            }
        }
        self.layer4(head, protocol, offset, depth);
    }

    /// Reads what is at `offset`, if the packet has it.
    fn layer4(&mut self, head: &Head<'_>, protocol: u8, offset: Option<usize>, depth: usize) {
        self.protocol = Some(protocol_name(protocol));
        let Some(offset) = offset else { return };
        match protocol {
            PROTO_TCP | PROTO_UDP => {
                let Some(ports) = head.load::<Ports>(offset) else { return };
                self.src_port = Some({ ports.src }.get());
                self.dst_port = Some({ ports.dst }.get());
                if protocol == PROTO_TCP {
                    self.tcp_flags = head.load::<Tcp>(offset).map(|tcp| flags(tcp.flags));
                } else if depth > 0 && self.dst_port == Some(head.vxlan_port) {
                    self.vxlan(head, offset + Udp::LEN, depth);
                }
            }
            PROTO_ICMP | PROTO_ICMP6 => {
                self.icmp = head.load::<IcmpError>(offset).map(|icmp| (icmp.kind, icmp.code));
            }
            _ => {}
        }
    }

    fn vxlan(&mut self, head: &Head<'_>, offset: usize, depth: usize) {
        let Some(vxlan) = head.load::<Vxlan>(offset) else { return };
        if { vxlan.flags } != VXLAN_FLAGS {
            return;
        }
        self.vni = Some({ vxlan.vni }.get() >> 8);
        let offset = offset + Vxlan::LEN;
        if let Some(bytes) = head.bytes.get(offset..) {
            let inner = Head { bytes, vxlan_port: head.vxlan_port };
            let len = self.len.saturating_sub(offset as u32);
            self.inner = Some(Box::new(Self::read_within(&inner, len, depth - 1)));
        }
    }
}

impl fmt::Display for Decoded {
    /// `tcp 198.51.100.7:40000 > 192.0.2.1:8080 SYN, 60 bytes`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.protocol.as_deref().unwrap_or("frame"))?;
        if let (Some(src), Some(dst)) = (self.src, self.dst) {
            write!(f, " {} > {}", end(src, self.src_port), end(dst, self.dst_port))?;
        }
        if let Some(flags) = &self.tcp_flags {
            write!(f, " {flags}")?;
        }
        if let Some((kind, code)) = self.icmp {
            write!(f, " type {kind} code {code}")?;
        }
        if self.fragment {
            f.write_str(" fragment")?;
        }
        write!(f, ", {} bytes", self.len)?;
        if let Some(Request { incarnation, asked }) = self.request {
            write!(f, ", for the task with incarnation {incarnation}")?;
            if asked > 0 {
                write!(f, ", {asked} nodes asked before")?;
            }
        }
        match (&self.inner, self.vni) {
            (Some(inner), Some(vni)) => write!(f, ", VXLAN {vni} of [{inner}]"),
            (None, Some(vni)) => write!(f, ", VXLAN {vni}"),
            _ => Ok(()),
        }
    }
}

fn end(addr: IpAddr, port: Option<u16>) -> String {
    match port {
        Some(port) => std::net::SocketAddr::new(addr, port).to_string(),
        None => addr.to_string(),
    }
}

/// An Ethernet address as people write it.
pub fn colons(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn flags(bits: u8) -> String {
    let names = [(TCP_SYN, "SYN"), (TCP_ACK, "ACK"), (TCP_FIN, "FIN"), (TCP_RST, "RST")];
    let set: Vec<&str> = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
    if set.is_empty() { "no flags".to_owned() } else { set.join(",") }
}

#[cfg(test)]
mod tests {
    use mesh_common::addr::backend_mac;
    use mesh_common::be::Be16;

    use super::super::packet::{self, Segment};
    use super::*;

    const VXLAN_PORT: u16 = 4789;

    fn frame(from: &str, to: &str, segment: Segment) -> Vec<u8> {
        packet::build(from.parse().unwrap(), to.parse().unwrap(), segment, [2; 6], [4; 6]).unwrap()
    }

    #[test]
    fn segments_of_both_families_are_told_in_a_line() {
        for (from, to) in
            [("198.51.100.7:40000", "192.0.2.1:8080"), ("[2001:db8::7]:40000", "[fd00::1]:8080")]
        {
            let bytes = frame(from, to, Segment::Syn);
            let decoded = Decoded::read(&bytes, bytes.len() as u32, VXLAN_PORT);
            assert_eq!(decoded.to_string(), format!("tcp {from} > {to} SYN, {} bytes", bytes.len()));
            assert_eq!(decoded.ethernet_src.as_deref(), Some("02:02:02:02:02:02"));
        }
    }

    #[test]
    fn a_frame_inside_vxlan_is_told_with_what_it_asks_for() {
        let mut inner = frame("198.51.100.7:40000", "192.0.2.1:8080", Segment::Ack);
        inner[..6].copy_from_slice(&backend_mac(702));
        inner[6..12].copy_from_slice(&[2, 1, 0, 0, 0, 0]);
        let mut bytes = frame("198.18.0.11:50000", "198.18.0.12:4789", Segment::Datagram);
        let headers = Ethernet::LEN + Ipv4::LEN + Udp::LEN;
        bytes.truncate(headers);
        bytes.extend([8, 0, 0, 0, 0, 0, 1, 0]);
        bytes.extend(&inner);
        let decoded = Decoded::read(&bytes, bytes.len() as u32, VXLAN_PORT);
        assert_eq!(decoded.vni, Some(1));
        let inside = decoded.inner.clone().unwrap();
        assert_eq!(inside.request, Some(Request { incarnation: 702, asked: 1 }));
        assert_eq!(inside.len as usize, inner.len());
        assert!(decoded.to_string().contains("VXLAN 1 of [tcp 198.51.100.7:40000 > 192.0.2.1:8080 ACK"));
    }

    #[test]
    fn what_is_cut_off_is_left_out() {
        let bytes = frame("198.51.100.7:40000", "192.0.2.1:8080", Segment::Syn);
        for len in 0..bytes.len() {
            let decoded = Decoded::read(&bytes[..len], bytes.len() as u32, VXLAN_PORT);
            assert_eq!(decoded.src.is_some(), len >= Ethernet::LEN + Ipv4::LEN, "{len}");
            assert_eq!(decoded.src_port.is_some(), len >= Ethernet::LEN + Ipv4::LEN + 4, "{len}");
            assert_eq!(decoded.tcp_flags.is_some(), len >= Ethernet::LEN + Ipv4::LEN + Tcp::LEN, "{len}");
        }
    }

    #[test]
    fn extension_headers_are_walked() {
        let (from, to) = ("[2001:db8::7]:40000", "[fd00::1]:8080");
        let mut bytes = frame(from, to, Segment::Syn);
        let l4 = Ethernet::LEN + Ipv6::LEN;
        // Hop-by-hop options, then a first fragment.
        bytes.splice(l4..l4, [44, 0, 1, 4, 0, 0, 0, 0, 6, 0, 0, 1, 0, 0, 0, 9]);
        bytes[Ethernet::LEN + 6] = 0;
        let len = bytes.len();
        let told = |bytes: &[u8]| Decoded::read(bytes, len as u32, VXLAN_PORT).to_string();
        assert_eq!(told(&bytes), format!("tcp {from} > {to} SYN fragment, {len} bytes"));
        bytes[l4 + 10..l4 + 12].copy_from_slice(&[0, 8]);
        assert_eq!(told(&bytes), format!("tcp 2001:db8::7 > fd00::1 fragment, {len} bytes"), "a later one");
    }

    #[test]
    fn another_protocol_is_told_by_its_number() {
        let mut bytes = vec![0; 60];
        bytes[12..14].copy_from_slice(&Be16::new(0x88cc).to_bytes());
        let decoded = Decoded::read(&bytes, 60, VXLAN_PORT);
        assert_eq!(decoded.to_string(), "ethertype 0x88cc, 60 bytes");
    }
}
