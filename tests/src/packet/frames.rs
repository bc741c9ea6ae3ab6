//! Building packets, by another library than the one under test: its checksums are summed, not patched.

use std::net::{IpAddr, Ipv4Addr};

use etherparse::{
    ArpEthIpv4Packet, ArpOperation, ArpPacket, EtherType, IpDscp, IpEcn, IpFragOffset, Ipv4Header,
    Ipv4Options, Ipv6FlowLabel, Ipv6Header, TcpHeader, UdpHeader,
};
use mesh_common::addr::{Ip6, mac_of};
use mesh_common::map::{PROTO_TCP, PROTO_UDP};

use super::family::{Family, Socket};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// An endpoint's Ethernet address.
pub fn mac(addr: Ipv4Addr) -> Mac {
    mac_of(mesh_common::be::Be32::from(addr))
}

/// Sequence number of a client's SYN.
pub const CLIENT_SEQUENCE: u32 = 0x1000_0000;
/// Sequence number of a backend's SYN.
pub const TASK_SEQUENCE: u32 = 0x7000_0000;

/// A TCP segment's control fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Flags as on the wire.
    pub flags: u8,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
}

const FIN_FLAG: u8 = 0x01;
const SYN_FLAG: u8 = 0x02;
const RST_FLAG: u8 = 0x04;
const ACK_FLAG: u8 = 0x10;

/// A client opens a connection.
pub const SYN: Segment = Segment { flags: SYN_FLAG, sequence: CLIENT_SEQUENCE, acknowledgement: 0 };
/// A client acknowledges the backend's SYN, and may go on.
pub const ACK: Segment =
    Segment { flags: ACK_FLAG, sequence: CLIENT_SEQUENCE + 1, acknowledgement: TASK_SEQUENCE + 1 };
/// A client closes its side.
pub const FIN: Segment = Segment { flags: FIN_FLAG | ACK_FLAG, ..ACK };
/// A client resets.
pub const RST: Segment = Segment { flags: RST_FLAG, sequence: CLIENT_SEQUENCE + 1, acknowledgement: 0 };
/// A backend accepts.
pub const SYN_ACK: Segment =
    Segment { flags: SYN_FLAG | ACK_FLAG, sequence: TASK_SEQUENCE, acknowledgement: CLIENT_SEQUENCE + 1 };
/// A backend goes on.
pub const TASK_ACK: Segment =
    Segment { flags: ACK_FLAG, sequence: TASK_SEQUENCE + 1, acknowledgement: CLIENT_SEQUENCE + 1 };
/// A backend closes its side.
pub const TASK_FIN: Segment = Segment { flags: FIN_FLAG | ACK_FLAG, ..TASK_ACK };
/// A backend resets.
pub const TASK_RST: Segment = Segment { flags: RST_FLAG | ACK_FLAG, ..TASK_ACK };

impl Segment {
    /// The reset that answers this segment, with so many bytes of payload (RFC 9293, 3.10.7.1).
    #[must_use]
    pub fn reset(self, payload: u32) -> Self {
        if self.flags & ACK_FLAG != 0 {
            return Self { flags: RST_FLAG, sequence: self.acknowledgement, acknowledgement: 0 };
        }
        let controls = u32::from(self.flags & SYN_FLAG != 0) + u32::from(self.flags & FIN_FLAG != 0);
        let acknowledgement = self.sequence + payload + controls;
        Self { flags: RST_FLAG | ACK_FLAG, sequence: 0, acknowledgement }
    }
}

/// A frame with an IP packet, as it is described.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Ethernet destination.
    pub to: Mac,
    /// Ethernet source.
    pub from: Mac,
    /// IP source.
    pub src: IpAddr,
    /// IP destination.
    pub dst: IpAddr,
    /// IP protocol of layer 4.
    pub protocol: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Routers may not fragment it (IPv4).
    pub whole_only: bool,
    /// Identification of the fragments of one packet.
    pub id: u32,
    /// Offset, bytes, and whether more follow, in a fragment.
    pub fragment: Option<(u16, bool)>,
    /// IPv4 options.
    pub options: Vec<u8>,
    /// IPv6 extension headers: protocol of the first one, and all of them, the last one's "next header" zero.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Flow label (IPv6).
    pub flow_label: u32,
    /// Layer 4 with its payload.
    pub l4: Vec<u8>,
}

/// IPv6's fragment header, as a protocol.
const FRAGMENT_HEADER: u8 = 44;
/// TTL and hop limit of what is built, unless said otherwise.
const TTL: u8 = 63;

impl Family {
    /// A packet of any protocol between the endpoints' own Ethernet addresses.
    pub fn ip(self, src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, l4: Vec<u8>) -> Frame {
        Frame {
            to: mac(dst),
            from: mac(src),
            src: self.addr(src),
            dst: self.addr(dst),
            protocol,
            ttl: TTL,
            tos: 0,
            whole_only: true,
            id: 0,
            fragment: None,
            options: vec![],
            extensions: vec![],
            flow_label: 0,
            l4,
        }
    }

    /// A TCP segment.
    pub fn tcp(self, src: Socket, dst: Socket, segment: Segment, payload: &[u8]) -> Frame {
        self.tcp_window(src, dst, segment, 64_000, payload)
    }

    /// A TCP segment with a window.
    pub fn tcp_window(
        self,
        src: Socket,
        dst: Socket,
        segment: Segment,
        window: u16,
        payload: &[u8],
    ) -> Frame {
        let Segment { flags, sequence, acknowledgement } = segment;
        let mut header = TcpHeader::new(src.1, dst.1, sequence, window);
        header.acknowledgment_number = acknowledgement;
        header.fin = flags & FIN_FLAG != 0;
        header.syn = flags & SYN_FLAG != 0;
        header.rst = flags & RST_FLAG != 0;
        header.ack = flags & ACK_FLAG != 0;
        let checksum = match (self.addr(src.0), self.addr(dst.0)) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                header.calc_checksum_ipv4_raw(src.octets(), dst.octets(), payload)
            }
            (src, dst) => header.calc_checksum_ipv6_raw(octets6(src), octets6(dst), payload),
        };
        header.checksum = fitting(checksum);
        self.ip(src.0, dst.0, PROTO_TCP, [&header.to_bytes()[..], payload].concat())
    }

    /// A UDP datagram.
    pub fn udp(self, src: Socket, dst: Socket, payload: &[u8]) -> Frame {
        let mut header = fitting(UdpHeader::without_ipv4_checksum(src.1, dst.1, payload.len()));
        let checksum = match (self.addr(src.0), self.addr(dst.0)) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                header.calc_checksum_ipv4_raw(src.octets(), dst.octets(), payload)
            }
            (src, dst) => header.calc_checksum_ipv6_raw(octets6(src), octets6(dst), payload),
        };
        header.checksum = fitting(checksum);
        self.ip(src.0, dst.0, PROTO_UDP, [&header.to_bytes()[..], payload].concat())
    }
}

impl Frame {
    /// Between other Ethernet addresses.
    #[must_use]
    pub fn between(self, from: Mac, to: Mac) -> Self {
        Self { to, from, ..self }
    }

    /// From another Ethernet address.
    #[must_use]
    pub fn from_mac(self, from: Mac) -> Self {
        Self { from, ..self }
    }

    /// Between the Ethernet addresses of the endpoints at other addresses.
    #[must_use]
    pub fn via(self, src: Ipv4Addr, dst: Ipv4Addr) -> Self {
        self.between(mac(src), mac(dst))
    }

    /// With another hop limit.
    #[must_use]
    pub fn ttl(self, ttl: u8) -> Self {
        Self { ttl, ..self }
    }

    /// With DSCP and ECN.
    #[must_use]
    pub fn tos(self, tos: u8) -> Self {
        Self { tos, ..self }
    }

    /// Not to be kept whole (IPv4).
    #[must_use]
    pub fn may_be_cut(self) -> Self {
        Self { whole_only: false, ..self }
    }

    /// With IPv4 options.
    #[must_use]
    pub fn options(self, options: &[u8]) -> Self {
        Self { options: options.to_vec(), ..self }
    }

    /// With IPv6 extension headers: each one's protocol, and its bytes from the length on.
    #[must_use]
    pub fn extensions(self, extensions: &[(u8, &[u8])]) -> Self {
        let extensions = extensions.iter().map(|(protocol, bytes)| (*protocol, bytes.to_vec())).collect();
        Self { extensions, ..self }
    }

    /// The fragment with the bytes of layer 4 from `from` to `to`.
    #[must_use]
    pub fn fragment(self, from: usize, to: usize) -> Self {
        let fragment = Some((from as u16, to < self.l4.len()));
        Self { fragment, whole_only: false, id: FRAGMENT_ID, l4: self.l4[from..to].to_vec(), ..self }
    }

    /// With a UDP checksum of zero: none.
    #[must_use]
    pub fn without_checksum(mut self) -> Self {
        self.l4[6..8].fill(0);
        self
    }

    /// With the bytes at `offset` of layer 4 as they are there in `other`.
    #[must_use]
    pub fn l4_from(mut self, other: &Self, offset: usize, len: usize) -> Self {
        self.l4[offset..offset + len].copy_from_slice(&other.l4[offset..offset + len]);
        self
    }

    /// The IP packet.
    pub fn packet(&self) -> Vec<u8> {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let (offset, more_fragments) = self.fragment.unwrap_or_default();
                let mut header = Ipv4Header {
                    dscp: fitting(IpDscp::try_new(self.tos >> 2)),
                    ecn: fitting(IpEcn::try_new(self.tos & 3)),
                    total_len: (20 + self.options.len() + self.l4.len()) as u16,
                    identification: self.id as u16,
                    dont_fragment: self.whole_only,
                    more_fragments,
                    fragment_offset: fitting(IpFragOffset::try_new(offset / 8)),
                    time_to_live: self.ttl,
                    protocol: self.protocol.into(),
                    header_checksum: 0,
                    source: src.octets(),
                    destination: dst.octets(),
                    options: fitting(Ipv4Options::try_from(&self.options[..])),
                };
                header.header_checksum = header.calc_header_checksum();
                [&header.to_bytes()[..], &self.l4].concat()
            }
            (src, dst) => {
                let (first, extensions) = self.extension_headers();
                let header = Ipv6Header {
                    traffic_class: self.tos,
                    flow_label: fitting(Ipv6FlowLabel::try_new(self.flow_label)),
                    payload_length: (extensions.len() + self.l4.len()) as u16,
                    next_header: first.into(),
                    hop_limit: self.ttl,
                    source: octets6(src),
                    destination: octets6(dst),
                };
                [&header.to_bytes()[..], &extensions, &self.l4].concat()
            }
        }
    }

    /// The protocol of the first extension header, and all of them.
    fn extension_headers(&self) -> (u8, Vec<u8>) {
        let mut headers = self.extensions.clone();
        if let Some((offset, more)) = self.fragment {
            let bytes =
                [&[0][..], &(offset | u16::from(more)).to_be_bytes(), &self.id.to_be_bytes()].concat();
            headers.push((FRAGMENT_HEADER, bytes));
        }
        let mut next = self.protocol;
        let mut all = vec![];
        for (protocol, bytes) in headers.iter().rev() {
            all = [&[next][..], bytes, &all].concat();
            next = *protocol;
        }
        (next, all)
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let ethertype = if self.src.is_ipv4() { EtherType::IPV4 } else { EtherType::IPV6 };
        [&self.to[..], &self.from, &ethertype.0.to_be_bytes(), &self.packet()].concat()
    }
}

/// Identification of the fragments that are built.
pub const FRAGMENT_ID: u32 = 0x4242;

impl From<Frame> for Vec<u8> {
    fn from(frame: Frame) -> Self {
        frame.bytes()
    }
}

impl From<&Frame> for Vec<u8> {
    fn from(frame: &Frame) -> Self {
        frame.bytes()
    }
}

/// An ARP request in a broadcast frame, or the reply to one.
pub fn arp(operation: ArpOperation, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let request = operation == ArpOperation::REQUEST;
    let packet = ArpEthIpv4Packet {
        operation,
        sender_mac: mac(sender),
        sender_ipv4: sender.octets(),
        target_mac: if request { [0; 6] } else { mac(target) },
        target_ipv4: target.octets(),
    };
    let to = if request { [0xff; 6] } else { mac(target) };
    let mut bytes = [&to[..], &mac(sender)[..], &EtherType::ARP.0.to_be_bytes()[..]].concat();
    bytes.extend(ArpPacket::from(packet).to_bytes());
    bytes
}

/// The headers around a frame in VXLAN.
#[derive(Debug, Clone, Copy)]
pub struct Outer {
    /// Family of the underlay.
    pub underlay: Family,
    /// Ethernet source and destination.
    pub macs: (Mac, Mac),
    /// Source VTEP.
    pub src: Ipv4Addr,
    /// Destination VTEP.
    pub dst: Ipv4Addr,
    /// What the UDP source port, and IPv6's flow label, are made of.
    pub entropy: u16,
    /// DSCP and ECN.
    pub tos: u8,
}

impl Outer {
    /// `inner` in VXLAN, as Shoal's XDP program writes it.
    pub fn around(&self, vni: u32, inner: &[u8]) -> Frame {
        let header = [&[0x08, 0, 0, 0][..], &(vni << 8).to_be_bytes(), inner].concat();
        let source_port = 0xc000 | (self.entropy & 0x3fff);
        // Shoal sends no outer UDP checksum.
        let frame = self.underlay.udp((self.src, source_port), (self.dst, 4789), &header).without_checksum();
        let frame = Frame { flow_label: u32::from(self.entropy), ..frame };
        frame.between(self.macs.0, self.macs.1).ttl(64).tos(self.tos)
    }
}

/// The bytes of an address as an IPv6 header has it.
pub fn octets6(addr: IpAddr) -> [u8; 16] {
    std::net::Ipv6Addr::from(Ip6::from(addr)).octets()
}

/// What is known to fit.
#[expect(clippy::expect_used, reason = "the fixtures' packets fit their headers")]
pub(super) fn fitting<T, E: std::fmt::Debug>(result: Result<T, E>) -> T {
    result.expect("a packet that fits its headers")
}
