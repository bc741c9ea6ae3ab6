//! ICMP errors belong to the flow of the packet that they quote.

use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{PROTO_TCP, PROTO_UDP};

use crate::family::Family;
use crate::header::{Fragment6, IP_OFFSET, IP_OFFSET_MASK, IcmpError, Ipv4, Ipv6, Ports};
use crate::nat::{End, ICMP_CHECKSUM_OFFSET};
use crate::packet::{Fault, Field, Packet, Rewrite};
use crate::parse::{Fragment, Parsed, QuotedAt};

/// A packet that an ICMP error quotes, from its point of view: `src` sent it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quoted<A> {
    /// Source.
    pub src: A,
    /// Destination.
    pub dst: A,
    /// IP protocol.
    pub protocol: u8,
    /// TCP's or UDP's ports; `None` for other protocols, or in a fragment after the first.
    pub ports: Option<(Be16, Be16)>,
    /// Offset of its IP header, bytes.
    ip_offset: usize,
    /// Offset of its layer 4 header, bytes.
    l4_offset: usize,
}

/// What quoting does differently in each family.
pub trait Quote: Family {
    /// Where the packet at `IP_OFFSET` ends by its own account, bytes.
    fn end(packet: &impl Packet) -> Option<usize>;

    /// Whether ICMP of this type quotes a packet whose sender is to know.
    fn quotes(kind: u8) -> bool;

    /// The packet whose IP header is at `ip_offset`, its ports not yet read; and whether it begins with a layer 4
    /// header.
    fn read(packet: &impl Packet, ip_offset: usize) -> Option<(Quoted<Self>, bool)>;

    /// Adjusts the checksums of an ICMP error, whose own is at `checksum`, for an address that changed in the IP header
    /// that it quotes at `ip_offset`.
    fn patch_quoted<P: Rewrite>(
        packet: &mut P,
        checksum: usize,
        ip_offset: usize,
        from: Self,
        to: Self,
    ) -> Result<(), Fault>;
}

/// ICMP: destination unreachable, source quench, time exceeded, parameter problem.
const ERRORS4: [u8; 4] = [3, 4, 11, 12];
/// ICMPv6: destination unreachable to parameter problem, packet too big and time exceeded between.
const ERRORS6: core::ops::RangeInclusive<u8> = 1..=4;
/// IPv6's fragment header, as a protocol.
const FRAGMENT6: u8 = 44;
/// IPv6 fragment header: the offset.
const FRAGMENT6_OFFSET: u16 = 0xfff8;
/// How much of layer 4 an error must quote, bytes (RFC 792).
const L4_QUOTED_MIN: usize = 8;

/// The packet that an ICMP error quotes; `None` if `packet` is no such error, or is a fragment, or quotes too little.
#[inline(always)]
pub fn quoted<A: Quote>(packet: &impl Packet, parsed: &Parsed<A>) -> Option<Quoted<A>> {
    if parsed.protocol != A::ICMP || parsed.fragment != Fragment::Whole {
        return None;
    }
    let error: IcmpError = packet.load(parsed.l4_offset)?;
    if !A::quotes(error.kind) {
        return None;
    }
    let (mut quoted, begins) = A::read(packet, parsed.l4_offset + IcmpError::LEN)?;
    if quoted.l4_offset + L4_QUOTED_MIN > A::end(packet)? {
        return None;
    }
    if begins && matches!(quoted.protocol, PROTO_TCP | PROTO_UDP) {
        let ports: Ports = packet.load(quoted.l4_offset)?;
        quoted.ports = Some((ports.src, ports.dst));
    }
    Some(quoted)
}

/// Makes `parsed` speak of the flow that an ICMP error is about, in the direction that the error takes: what sent the quoted
/// packet is the destination. Leaves any other packet as it is.
#[inline(always)]
pub fn follow<A: Quote>(packet: &impl Packet, parsed: &mut Parsed<A>) {
    if parsed.protocol != A::ICMP {
        return;
    }
    if let Some(quoted) = quoted(packet, parsed) {
        let Quoted { src, dst, protocol, ports, ip_offset, l4_offset } = quoted;
        let ports = ports.map(|(src, dst)| (dst, src));
        parsed.be_about(dst, src, protocol, ports, QuotedAt { ip_offset, l4_offset });
    }
}

/// Rewrites one end of the packet that `packet`, an ICMP error, quotes at `at`: an address from `from.0` to `to.0`, and a
/// port likewise where there are ports. The error's own checksum stays right.
///
/// The checksum in the quoted layer 4 header is left as it is: it covers a payload that isn't quoted in full, so nobody
/// can verify it.
#[inline(always)]
pub fn rewrite_quoted<A: Quote, P: Rewrite>(
    packet: &mut P,
    icmp_offset: usize,
    at: QuotedAt,
    end: End,
    from: (A, Option<Be16>),
    to: (A, Be16),
) -> Result<(), Fault> {
    let checksum = icmp_offset + ICMP_CHECKSUM_OFFSET;
    let (addr_offset, port_offset) = match end {
        End::Src => (A::SRC_OFFSET, 0),
        End::Dst => (A::DST_OFFSET, 2),
    };
    if to.0 != from.0 {
        A::patch_quoted(packet, checksum, at.ip_offset, from.0, to.0)?;
        packet.store(at.ip_offset + addr_offset, &to.0)?;
    }
    if let Some(port) = from.1
        && port != to.1
    {
        let (from, to_raw) = (u32::from(port.raw()), u32::from(to.1.raw()));
        packet.patch_l4_checksum(checksum, from, to_raw, Field::Port, false)?;
        packet.store(at.l4_offset + port_offset, &to.1)?;
    }
    Ok(())
}

impl Quote for Be32 {
    #[inline(always)]
    fn end(packet: &impl Packet) -> Option<usize> {
        let total_len: Be16 = packet.load(IP_OFFSET + core::mem::offset_of!(Ipv4, total_len))?;
        Some(IP_OFFSET + usize::from(total_len.get()))
    }

    #[inline(always)]
    fn quotes(kind: u8) -> bool {
        ERRORS4.contains(&kind)
    }

    #[inline(always)]
    fn read(packet: &impl Packet, ip_offset: usize) -> Option<(Quoted<Self>, bool)> {
        let ip: Ipv4 = packet.load(ip_offset)?;
        let header_len = usize::from(ip.version_ihl & 0x0f) * 4;
        if ip.version_ihl >> 4 != 4 || header_len < Ipv4::LEN {
            return None;
        }
        let (src, dst, protocol) = (ip.src, ip.dst, ip.protocol);
        let quoted = Quoted { src, dst, protocol, ports: None, ip_offset, l4_offset: ip_offset + header_len };
        Some((quoted, ip.fragment.get() & IP_OFFSET_MASK == 0))
    }

    #[inline(always)]
    fn patch_quoted<P: Rewrite>(
        packet: &mut P,
        _checksum: usize,
        ip_offset: usize,
        from: Self,
        to: Self,
    ) -> Result<(), Fault> {
        // The ICMP checksum covers the address and the quoted header's checksum, whose changes cancel out.
        let offset = ip_offset + core::mem::offset_of!(Ipv4, checksum);
        packet.patch_ip_checksum(offset, from.raw(), to.raw())
    }
}

impl Quote for Ip6 {
    #[inline(always)]
    fn end(packet: &impl Packet) -> Option<usize> {
        let payload_len: Be16 = packet.load(IP_OFFSET + core::mem::offset_of!(Ipv6, payload_len))?;
        Some(IP_OFFSET + Ipv6::LEN + usize::from(payload_len.get()))
    }

    #[inline(always)]
    fn quotes(kind: u8) -> bool {
        ERRORS6.contains(&kind)
    }

    /// Of the extension headers, a fragment header may come before layer 4.
    #[inline(always)]
    fn read(packet: &impl Packet, ip_offset: usize) -> Option<(Quoted<Self>, bool)> {
        let ip: Ipv6 = packet.load(ip_offset)?;
        if ip.version_class_flow.get() >> 28 != 6 {
            return None;
        }
        let (src, dst, protocol) = (ip.src, ip.dst, ip.next_header);
        let l4_offset = ip_offset + Ipv6::LEN;
        let quoted = Quoted { src, dst, protocol, ports: None, ip_offset, l4_offset };
        if protocol != FRAGMENT6 {
            return Some((quoted, true));
        }
        let fragment: Fragment6 = packet.load(l4_offset)?;
        let quoted =
            Quoted { protocol: fragment.next_header, l4_offset: l4_offset + Fragment6::LEN, ..quoted };
        Some((quoted, fragment.offset.get() & FRAGMENT6_OFFSET == 0))
    }

    #[inline(always)]
    fn patch_quoted<P: Rewrite>(
        packet: &mut P,
        checksum: usize,
        _ip_offset: usize,
        from: Self,
        to: Self,
    ) -> Result<(), Fault> {
        packet.patch_l4_payload6(checksum, &from, &to)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec::Vec;

    use super::*;
    use crate::testing::{Bytes, Frame, assert_checksums, frame, with_options};

    const ROUTER: Be32 = Be32::ipv4(192, 0, 2, 1);
    const ROUTER6: Ip6 = Ip6::from_groups([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]);

    /// An error from a router to `src` about the packet in `about`, of which it quotes all.
    fn error<A: Frame>(router: A, src: A, kind: u8, about: &[u8]) -> Bytes {
        let l4: Vec<u8> = [&[kind, 1, 0, 0, 0, 0, 5, 0][..], &about[14..]].concat();
        Bytes::new(frame(router, src, A::ICMP, Some(2), &l4))
    }

    fn follows<A: Frame + Quote>(router: A, src: A, dst: A, other: A, protocol: u8, l4: &[u8], kind: u8) {
        for end in [End::Src, End::Dst] {
            for port in [None, Some(Be16::new(4242))] {
                let mut packet = error(router, src, kind, &frame(src, dst, protocol, None, l4));
                let before = packet.bytes.clone();
                let parsed = packet.parsed::<A>();
                let first = quoted(&packet, &parsed).unwrap();
                let port_at = |at: usize| Be16::from_bytes([l4[at], l4[at + 1]]);
                let ports = matches!(protocol, 6 | 17).then(|| (port_at(0), port_at(2)));
                assert_eq!((first.src, first.dst, first.protocol, first.ports), (src, dst, protocol, ports));
                let mut about = parsed;
                follow(&packet, &mut about);
                assert_eq!((about.src, about.dst, about.protocol), (dst, src, protocol));
                assert_eq!(about.ports(), ports.map(|(src, dst)| (dst, src)));

                let quoted_at = about.quoted().unwrap();
                let (old, old_port) = match end {
                    End::Src => (src, ports.map(|(src, _)| src)),
                    End::Dst => (dst, ports.map(|(_, dst)| dst)),
                };
                let new_port = port.or(old_port).unwrap_or_default();
                let icmp = parsed.l4_offset;
                rewrite_quoted(&mut packet, icmp, quoted_at, end, (old, old_port), (other, new_port))
                    .unwrap();
                assert_checksums(&packet.bytes);
                let mut l4 = l4.to_vec();
                let at = if end == End::Src { 0 } else { 2 };
                if let (Some(port), Some(_)) = (port, ports) {
                    l4[at..at + 2].copy_from_slice(&port.to_bytes());
                }
                let (new_src, new_dst) = if end == End::Src { (other, dst) } else { (src, other) };
                let mut expected =
                    error(router, src, kind, &frame(new_src, new_dst, protocol, None, &l4)).bytes;
                // Of the two forms of a zero sum, patching may give the other.
                let checksums = [parsed.l4_offset + 2, parsed.l4_offset + 18];
                for at in &checksums[..if A::FAMILY == 4 { 2 } else { 1 }] {
                    let word = |bytes: &[u8]| u16::from_be_bytes([bytes[*at], bytes[at + 1]]);
                    assert_eq!(word(&packet.bytes) % 0xffff, word(&expected) % 0xffff);
                    expected[*at..at + 2].copy_from_slice(&packet.bytes[*at..at + 2]);
                }
                assert_eq!(packet.bytes, expected);

                // And back again.
                let new = (other, old_port.map(|_| new_port));
                let old = (old, old_port.unwrap_or_default());
                rewrite_quoted(&mut packet, icmp, quoted_at, end, new, old).unwrap();
                assert_checksums(&packet.bytes);
                assert_eq!(packet.bytes[parsed.l4_offset + 28..], before[parsed.l4_offset + 28..]);
            }
        }
    }

    proptest! {
        #[test]
        fn an_end_of_the_quoted_packet_is_rewritten_and_the_error_stays_right(
            addrs: [u32; 3], addrs6: [[u16; 8]; 3], l4 in proptest::collection::vec(any::<u8>(), 8..40),
        ) {
            let [src, dst, other] = addrs.map(Be32::new);
            let [src6, dst6, other6] = addrs6.map(Ip6::from_groups);
            for protocol in [1, 6, 17, 58, 132] {
                for kind in [3, 4, 11, 12] {
                    follows(ROUTER, src, dst, other, protocol, &l4, kind);
                }
                for kind in 1..=4 {
                    follows(ROUTER6, src6, dst6, other6, protocol, &l4, kind);
                }
            }
        }

        #[test]
        fn whatever_is_quoted_is_read_within_the_packet(
            kind in prop_oneof![Just(1_u8), Just(2), Just(3), any::<u8>()],
            inner in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            for v6 in [false, true] {
                let mut inner = inner.clone();
                if let Some(first) = inner.first_mut() {
                    *first = if v6 { 0x60 } else { 0x40 | *first & 0xf };
                }
                let l4 = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &inner].concat();
                if v6 {
                    let packet = Bytes::new(frame(ROUTER6, ROUTER6, 58, Some(2), &l4));
                    let _ = quoted(&packet, &packet.parsed::<Ip6>());
                } else {
                    let packet = Bytes::new(frame(ROUTER, ROUTER, 1, Some(2), &l4));
                    let _ = quoted(&packet, &packet.parsed::<Be32>());
                }
            }
        }
    }

    #[test]
    fn options_of_the_quoted_packet_are_skipped() {
        let about = frame(Be32::new(1), Be32::new(2), 17, None, &[0, 53, 0, 99, 0, 8, 0, 0]);
        for words in [1, 5, 10] {
            let packet = error(ROUTER, Be32::new(1), 3, &with_options(about.clone(), words));
            let quoted = quoted(&packet, &packet.parsed::<Be32>()).unwrap();
            assert_eq!(quoted.ports, Some((Be16::new(53), Be16::new(99))));
            assert_eq!(quoted.l4_offset, 14 + 28 + 20 + usize::from(words) * 4);
        }
    }

    #[test]
    fn a_quoted_fragment_has_ports_if_it_is_the_first() {
        let l4 = [0, 53, 0, 99, 0, 8, 0, 0];
        let ports = Some((Be16::new(53), Be16::new(99)));
        for (offset, ports) in [(0x2000_u16, ports), (0x2001, None), (0x0001, None)] {
            let mut about = frame(Be32::new(1), Be32::new(2), 17, None, &l4);
            about[20..22].copy_from_slice(&offset.to_be_bytes());
            let packet = error(ROUTER, Be32::new(1), 3, &about);
            assert_eq!(quoted(&packet, &packet.parsed::<Be32>()).unwrap().ports, ports);
        }
        for (offset, ports) in [(1_u16, ports), (9, None), (8, None)] {
            let [high, low] = offset.to_be_bytes();
            let l4 = [&[17, 0, high, low, 0, 0, 0, 1][..], &l4].concat();
            let packet = error(ROUTER6, ROUTER6, 2, &frame(ROUTER6, ROUTER6, 44, None, &l4));
            let quoted = quoted(&packet, &packet.parsed::<Ip6>()).unwrap();
            assert_eq!((quoted.protocol, quoted.ports), (17, ports));
        }
    }

    #[test]
    fn what_quotes_nothing_or_too_little_is_no_error() {
        let about = frame(Be32::new(1), Be32::new(2), 17, None, &[0, 53, 0, 99, 0, 8, 0, 0]);
        let about6 = frame(ROUTER6, ROUTER6, 17, None, &[0, 53, 0, 99, 0, 8, 0, 0]);
        let none = |packet: &Bytes| assert_eq!(quoted(packet, &packet.parsed::<Be32>()), None);
        let none6 = |packet: &Bytes| assert_eq!(quoted(packet, &packet.parsed::<Ip6>()), None);
        for kind in [0, 5, 8, 13, 128] {
            none(&error(ROUTER, Be32::new(1), kind, &about));
        }
        for kind in [0, 5, 128, 137] {
            none6(&error(ROUTER6, ROUTER6, kind, &about6));
        }
        none(&error(ROUTER, Be32::new(1), 3, &about[..about.len() - 1]));
        none6(&error(ROUTER6, ROUTER6, 1, &about6[..about6.len() - 1]));
        // What lies behind the packet's own end is not quoted.
        let mut padded = error(ROUTER, Be32::new(1), 3, &about[..about.len() - 1]);
        padded.bytes.extend([0; 8]);
        none(&padded);
        for version_ihl in [0x55, 0x44] {
            let mut about = about.clone();
            about[14] = version_ihl;
            none(&error(ROUTER, Be32::new(1), 3, &about));
        }
        let mut fragment = error(ROUTER, Be32::new(1), 3, &about);
        fragment.bytes[20] = 0x20;
        none(&fragment);
        // UDP whose ports look like an error.
        none(&Bytes::new(frame(ROUTER, Be32::new(1), 17, Some(6), &[3, 3, 0, 1, 0, 8, 0, 0])));
    }
}
