//! The packets that are explained: how they are built.

use std::net::SocketAddr;

use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{PROTO_TCP, PROTO_UDP};
use mesh_datapath::checksum::{self, Sum, pseudo_header};
use mesh_datapath::header::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, IP_DF, Ipv4, Ipv6, TCP_ACK, TCP_SYN, Tcp, Udp,
};
use zerocopy::IntoBytes as _;

/// Hop limit of packets that are explained.
const HOP_LIMIT: u8 = 64;
/// TCP's window.
const WINDOW: u16 = 64_240;
/// A TCP header without options, as its data offset says it.
const TCP_DATA_OFFSET: u8 = 5 << 4;
/// What a datagram carries.
const PAYLOAD: [u8; 4] = *b"fish";

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment {
    /// TCP: the first segment of a connection.
    Syn,
    /// TCP: one amid a connection.
    Ack,
    /// UDP.
    Datagram,
}

impl Segment {
    /// Its IP protocol.
    pub(super) const fn protocol(self) -> u8 {
        match self {
            Self::Syn | Self::Ack => PROTO_TCP,
            Self::Datagram => PROTO_UDP,
        }
    }
}

/// A frame from one end to the other; `None` if they are of different families.
pub(super) fn build(
    from: SocketAddr,
    to: SocketAddr,
    segment: Segment,
    src: [u8; 6],
    dst: [u8; 6],
) -> Option<Vec<u8>> {
    let ports = (Be16::new(from.port()), Be16::new(to.port()));
    let protocol = segment.protocol();
    Some(match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => {
            let (from, to) = (Be32::from(*from.ip()), Be32::from(*to.ip()));
            let layer4 = layer4(ports, segment, |len| pseudo_header(from, to, protocol, len));
            let mut ip = Ipv4 {
                version_ihl: 0x45,
                tos: 0,
                total_len: Be16::new((Ipv4::LEN + layer4.len()) as u16),
                id: Be16::new(0),
                fragment: IP_DF,
                ttl: HOP_LIMIT,
                protocol,
                checksum: Be16::new(0),
                src: from,
                dst: to,
            };
            ip.checksum = checksum::ipv4(&ip);
            let ethernet = Ethernet { dst, src, ethertype: ETHERTYPE_IPV4 };
            [ethernet.as_bytes(), ip.as_bytes(), &layer4].concat()
        }
        (SocketAddr::V6(from), SocketAddr::V6(to)) => {
            let (from, to) = (Ip6::from(*from.ip()), Ip6::from(*to.ip()));
            let layer4 = layer4(ports, segment, |len| pseudo_header(from, to, protocol, len));
            let ip = Ipv6 {
                version_class_flow: Be32::new(6 << 28),
                payload_len: Be16::new(layer4.len() as u16),
                next_header: protocol,
                hop_limit: HOP_LIMIT,
                src: from,
                dst: to,
            };
            let ethernet = Ethernet { dst, src, ethertype: ETHERTYPE_IPV6 };
            [ethernet.as_bytes(), ip.as_bytes(), &layer4].concat()
        }
        _ => return None,
    })
}

/// The layer 4 header and payload, with the checksum over them and the pseudo-header of their length.
fn layer4((src, dst): (Be16, Be16), segment: Segment, pseudo: impl Fn(u16) -> Sum) -> Vec<u8> {
    let (flags, acknowledgement) = match segment {
        Segment::Syn => (TCP_SYN, 0),
        Segment::Ack => (TCP_ACK, 1),
        Segment::Datagram => return datagram(src, dst, pseudo),
    };
    let mut tcp = Tcp {
        src,
        dst,
        sequence: Be32::new(1),
        acknowledgement: Be32::new(acknowledgement),
        data_offset: TCP_DATA_OFFSET,
        flags,
        window: Be16::new(WINDOW),
        checksum: Be16::new(0),
        urgent: Be16::new(0),
    };
    let words: [u32; 5] = zerocopy::transmute!(tcp);
    tcp.checksum = pseudo(Tcp::LEN as u16).and(Sum::of(words)).checksum();
    tcp.as_bytes().to_vec()
}

fn datagram(src: Be16, dst: Be16, pseudo: impl Fn(u16) -> Sum) -> Vec<u8> {
    let len = (Udp::LEN + PAYLOAD.len()) as u16;
    let mut udp = Udp { src, dst, len: Be16::new(len), checksum: Be16::new(0) };
    let words: [u32; 2] = zerocopy::transmute!(udp);
    udp.checksum = pseudo(len).and(Sum::of(words)).and(u32::from_ne_bytes(PAYLOAD)).checksum();
    [udp.as_bytes(), &PAYLOAD].concat()
}

#[cfg(test)]
mod tests {
    use mesh_datapath::bytes::Bytes;
    use mesh_datapath::family::Family;

    use super::*;

    #[test]
    fn packets_of_every_kind_are_read_as_they_were_meant() {
        for (from, to) in [("192.0.2.9:4000", "192.0.2.1:80"), ("[2001:db8::9]:4000", "[2001:db8::1]:80")] {
            for segment in [Segment::Syn, Segment::Ack, Segment::Datagram] {
                let bytes =
                    build(from.parse().unwrap(), to.parse().unwrap(), segment, [2; 6], [4; 6]).unwrap();
                let packet = Bytes::new(bytes.clone());
                let (protocol, opens, midstream, ports) = if from.starts_with('[') {
                    let parsed = Ip6::parse(&packet).unwrap();
                    (parsed.protocol, parsed.opens(), parsed.is_midstream(), parsed.ports())
                } else {
                    let parsed = Be32::parse(&packet).unwrap();
                    (parsed.protocol, parsed.opens(), parsed.is_midstream(), parsed.ports())
                };
                assert_eq!(protocol, segment.protocol());
                assert_eq!((opens, midstream), (segment == Segment::Syn, segment == Segment::Ack));
                assert_eq!(ports, Some((Be16::new(4000), Be16::new(80))));
                assert_eq!(sum_of_layer4(&bytes), 0xffff, "{from} {segment:?}");
            }
        }
    }

    /// The sum over the pseudo-header and all behind the IP header: all ones if the checksum is right.
    fn sum_of_layer4(bytes: &[u8]) -> u32 {
        let (addresses, l4) = if bytes[12] == 8 { (26..34, 34) } else { (22..54, 54) };
        let protocol = if bytes[12] == 8 { bytes[23] } else { bytes[20] };
        let len = bytes.len() - l4;
        let words = |bytes: &[u8]| {
            bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum::<u32>()
        };
        let sum = words(&bytes[addresses]) + words(&bytes[l4..]) + u32::from(protocol) + len as u32;
        (sum & 0xffff) + (sum >> 16)
    }

    #[test]
    fn ends_of_two_families_make_no_packet() {
        let (from, to) = ("192.0.2.9:1".parse().unwrap(), "[2001:db8::1]:80".parse().unwrap());
        assert_eq!(build(from, to, Segment::Syn, [2; 6], [4; 6]), None);
    }
}
