//! Building ICMP and ICMPv6 packets: echoes, errors, neighbour discovery.

use std::net::{IpAddr, Ipv4Addr};

use etherparse::{Icmpv4Type, Icmpv6Type};
use mesh_common::map::{PROTO_ICMP, PROTO_ICMP6};

use super::family::Family;
use super::frames::{Frame, Mac, fitting, mac, octets6};

/// What an ICMP error says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Complaint {
    /// Nobody listens at the port.
    PortUnreachable,
    /// The packet is longer than a path of so many bytes carries.
    TooBig(u16),
    /// The hop limit was reached.
    TimeExceeded,
}

/// Neighbour discovery (RFC 4861) and multicast listener discovery (RFC 3810).
pub const ROUTER_SOLICITATION: u8 = 133;
/// See [`ROUTER_SOLICITATION`].
pub const SOLICITATION: u8 = 135;
/// See [`ROUTER_SOLICITATION`].
pub const ADVERTISEMENT: u8 = 136;
/// See [`ROUTER_SOLICITATION`].
pub const LISTENER_REPORT: u8 = 143;

impl Family {
    /// IP protocol number of ICMP.
    pub const fn icmp_protocol(self) -> u8 {
        match self {
            Self::V4 => PROTO_ICMP,
            Self::V6 => PROTO_ICMP6,
        }
    }

    /// An ICMP message: type and code, the four bytes behind the checksum, and the rest.
    pub fn icmp(self, src: Ipv4Addr, dst: Ipv4Addr, kind: (u8, u8), rest: [u8; 4], payload: &[u8]) -> Frame {
        icmp_between(self.addr(src), self.addr(dst), kind, rest, payload).via(src, dst)
    }

    /// An echo request or reply.
    pub fn echo(self, src: Ipv4Addr, dst: Ipv4Addr, request: bool, payload: &[u8]) -> Frame {
        let kind = match (self, request) {
            (Self::V4, true) => 8,
            (Self::V4, false) => 0,
            (Self::V6, true) => 128,
            (Self::V6, false) => 129,
        };
        self.icmp(src, dst, (kind, 0), [0, 7, 0, 1], payload)
    }

    /// An error about the IP packet `quoted`, or the beginning of one.
    pub fn error(self, src: Ipv4Addr, dst: Ipv4Addr, complaint: Complaint, quoted: &[u8]) -> Frame {
        let (kind, mtu) = match (self, complaint) {
            (Self::V4, Complaint::PortUnreachable) => ((3, 3), 0),
            (Self::V4, Complaint::TooBig(mtu)) => ((3, 4), mtu),
            (Self::V4, Complaint::TimeExceeded) => ((11, 0), 0),
            (Self::V6, Complaint::PortUnreachable) => ((1, 4), 0),
            (Self::V6, Complaint::TooBig(mtu)) => ((2, 0), mtu),
            (Self::V6, Complaint::TimeExceeded) => ((3, 0), 0),
        };
        self.icmp(src, dst, kind, u32::from(mtu).to_be_bytes(), quoted)
    }
}

/// An ICMP message between any addresses of one family; its Ethernet addresses are zero.
pub fn icmp_between(
    src: IpAddr,
    dst: IpAddr,
    (kind, code): (u8, u8),
    rest: [u8; 4],
    payload: &[u8],
) -> Frame {
    let (checksum, protocol) = if src.is_ipv4() {
        let header = Icmpv4Type::Unknown { type_u8: kind, code_u8: code, bytes5to8: rest };
        (header.calc_checksum(payload), PROTO_ICMP)
    } else {
        let header = Icmpv6Type::Unknown { type_u8: kind, code_u8: code, bytes5to8: rest };
        (fitting(header.calc_checksum(octets6(src), octets6(dst), payload)), PROTO_ICMP6)
    };
    let l4 = [&[kind, code][..], &checksum.to_be_bytes(), &rest, payload].concat();
    Frame { src, dst, ..Family::V4.ip(Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED, protocol, l4) }
        .between([0; 6], [0; 6])
}

/// A neighbour solicitation or advertisement about `target` with a link-layer address option.
pub fn neighbour(
    src: IpAddr,
    dst: IpAddr,
    kind: u8,
    flags: u8,
    target: Ipv4Addr,
    option: (u8, Mac),
) -> Frame {
    let target = octets6(Family::V6.addr(target));
    let payload = [&target[..], &[option.0, 1], &option.1].concat();
    icmp_between(src, dst, (kind, 0), [flags, 0, 0, 0], &payload).ttl(255)
}

/// The multicast address that is asked for `target`, and its Ethernet address.
pub fn solicited_node(target: Ipv4Addr) -> (IpAddr, Mac) {
    let [_, b, c, d] = target.octets();
    let group =
        std::net::Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(b), u16::from_be_bytes([c, d]));
    (group.into(), [0x33, 0x33, 0xff, b, c, d])
}

/// A solicitation for `target` from the endpoint at `src`.
pub fn solicitation(src: Ipv4Addr, target: Ipv4Addr) -> Frame {
    let (group, group_mac) = solicited_node(target);
    neighbour(Family::V6.addr(src), group, SOLICITATION, 0, target, (1, mac(src)))
        .between(mac(src), group_mac)
}

/// The answer to [`solicitation`].
pub fn advertisement(src: Ipv4Addr, target: Ipv4Addr, router: bool) -> Frame {
    let flags = 0x60 | if router { 0x80 } else { 0 };
    let (asked, asks) = (Family::V6.addr(target), Family::V6.addr(src));
    neighbour(asked, asks, ADVERTISEMENT, flags, target, (2, mac(target))).via(target, src)
}
