//! Answering IPv6 neighbour discovery: overlays carry no multicast.

use mesh_common::addr::{Address as _, Ip6, mac_of};
use mesh_common::be::{Be16, Be32};
use mesh_common::counter::Counter;
use mesh_common::map::PROTO_ICMP6;

use crate::checksum::{Sum, pseudo_header};
use crate::header::{ETHERTYPE_IPV6, Ethernet, IP_OFFSET, Ipv6, Neighbor};
use crate::packet::{Fault, Packet, Rewrite};
use crate::parse::Parsed;
use crate::verdict::{Action, Verdict};

/// Types of neighbour solicitation and advertisement.
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Types of all discovery (RFC 4861): router solicitation to redirect.
const DISCOVERY: core::ops::RangeInclusive<u8> = 133..=137;
/// The only hop limit that discovery has: no router has forwarded it.
const HOP_LIMIT: u8 = 255;
/// Options: the sender's link-layer address, the target's.
const SOURCE_ADDRESS: u8 = 1;
const TARGET_ADDRESS: u8 = 2;
/// Flags of an advertisement: from a router, solicited, to override what is known.
const ROUTER: u32 = 1 << 31;
const SOLICITED: u32 = 1 << 30;
const OVERRIDE: u32 = 1 << 29;

/// Where discovery is in a packet: it comes without extension headers.
const OFFSET: usize = IP_OFFSET + Ipv6::LEN;

/// Whether a packet is for [`answer`]: neighbour discovery, or anything to a multicast address.
#[inline(always)]
pub fn concerns(packet: &impl Packet, parsed: &Parsed<Ip6>) -> bool {
    parsed.dst.is_multicast()
        || parsed.protocol == PROTO_ICMP6
            && parsed.l4_offset == OFFSET
            && packet.load::<u8>(OFFSET).is_some_and(|kind| DISCOVERY.contains(&kind))
}

/// Turns a neighbour solicitation for an address that `exists`, or for the `gateway`, which does, into its
/// advertisement; drops everything else. The gateway is advertised as a router.
#[inline(always)]
pub fn answer<P: Rewrite>(
    packet: &mut P,
    parsed: &Parsed<Ip6>,
    gateway: Ip6,
    exists: impl Fn(&Ip6) -> bool,
) -> Verdict {
    if parsed.protocol != PROTO_ICMP6 || parsed.l4_offset != OFFSET {
        return Verdict::drop(Counter::DropMulticast);
    }
    let Some(kind) = packet.load::<u8>(OFFSET) else {
        return Verdict::drop(Counter::DropMalformed);
    };
    if kind != SOLICITATION {
        return Verdict::drop(Counter::DropMulticast);
    }
    // A probe for an address before it is taken (RFC 4862) comes from none, without an option. Silence lets it be taken.
    if parsed.src == Ip6::default() {
        return Verdict::drop(Counter::DropNoEndpoint);
    }
    let Some(request) = solicitation(packet, parsed) else {
        return Verdict::drop(Counter::DropMalformed);
    };
    let target = request.target;
    let router = target == gateway;
    if target == parsed.src || !(router || exists(&target)) {
        return Verdict::drop(Counter::DropNoEndpoint);
    }
    match advertise(packet, parsed.src, target, router) {
        Ok(()) => Verdict::new(Action::Reflect, Counter::NeighborAnswered),
        Err(fault) => fault.into(),
    }
}

/// A solicitation with its sender's link-layer address and nothing else, valid by RFC 4861, 7.1.1.
#[inline(always)]
fn solicitation(packet: &impl Packet, parsed: &Parsed<Ip6>) -> Option<Neighbor> {
    let ip: Ipv6 = packet.load(IP_OFFSET)?;
    if ip.hop_limit != HOP_LIMIT || usize::from(ip.payload_len.get()) != Neighbor::LEN {
        return None;
    }
    let request: Neighbor = packet.load(OFFSET)?;
    let sum = pseudo(parsed.src, parsed.dst).and(Sum::of::<8>(zerocopy::transmute!(request)));
    let valid = request.code == 0
        && request.option == SOURCE_ADDRESS
        && request.option_len == 1
        && !{ request.target }.is_multicast()
        && sum.folded() == Be16::new(0xffff);
    valid.then_some(request)
}

#[inline(always)]
fn advertise<P: Rewrite>(packet: &mut P, to: Ip6, target: Ip6, router: bool) -> Result<(), Fault> {
    let request: Ethernet = packet.load(0).ok_or(Fault)?;
    let mac = mac_of(target);
    packet.store(0, &Ethernet { dst: request.src, src: mac, ethertype: ETHERTYPE_IPV6 })?;
    packet.store(IP_OFFSET + core::mem::offset_of!(Ipv6, src), &target)?;
    packet.store(IP_OFFSET + core::mem::offset_of!(Ipv6, dst), &to)?;
    let mut reply = Neighbor {
        kind: ADVERTISEMENT,
        code: 0,
        checksum: Be16::new(0),
        flags: Be32::new(SOLICITED | OVERRIDE | if router { ROUTER } else { 0 }),
        target,
        option: TARGET_ADDRESS,
        option_len: 1,
        mac,
    };
    reply.checksum = pseudo(target, to).and(Sum::of::<8>(zerocopy::transmute!(reply))).checksum();
    packet.store(OFFSET, &reply)
}

#[inline(always)]
fn pseudo(src: Ip6, dst: Ip6) -> Sum {
    pseudo_header(src, dst, PROTO_ICMP6, Neighbor::LEN as u16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec::Vec;

    use super::*;
    use crate::testing::{Bytes, RECEIVER, SENDER, assert_checksums, frame, split};

    const GATEWAY: Ip6 = Ip6::from_groups([0xfd00, 0, 0, 0, 0, 0, 0x0a00, 1]);
    const TASK: Ip6 = Ip6::from_groups([0xfd00, 0, 0, 0, 0, 0, 0x0a00, 2]);
    const OTHER: Ip6 = Ip6::from_groups([0xfd00, 0, 0, 0, 0, 0, 0x0a00, 3]);
    const NOBODY: Ip6 = Ip6::from_groups([0xfd00, 0, 0, 0, 0, 0, 0x0a00, 4]);
    const ALL_ROUTERS: Ip6 = Ip6::from_groups([0xff02, 0, 0, 0, 0, 0, 0, 2]);

    /// The solicited-node multicast address.
    fn group(target: Ip6) -> Ip6 {
        let Ip6([.., low]) = target;
        Ip6::from_groups([0xff02, 0, 0, 0, 0, 1, 0xff00 | (low.get() >> 16) as u16 & 0xff, low.get() as u16])
    }

    fn message(kind: u8, target: Ip6, option: &[u8]) -> Vec<u8> {
        let target = core::net::Ipv6Addr::from(target).octets();
        [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target, option].concat()
    }

    fn packet(src: Ip6, dst: Ip6, message: &[u8]) -> Bytes {
        let mut bytes = frame(src, dst, 58, (message.len() >= 4).then_some(2), message);
        bytes[21] = 255;
        Bytes::new(bytes)
    }

    fn solicit(src: Ip6, dst: Ip6, target: Ip6) -> Bytes {
        packet(src, dst, &message(135, target, &[&[1, 1][..], &SENDER].concat()))
    }

    fn answered(packet: &mut Bytes) -> Verdict {
        let parsed = packet.parsed();
        assert!(concerns(packet, &parsed));
        answer(packet, &parsed, GATEWAY, |addr| [TASK, OTHER].contains(addr))
    }

    #[test]
    fn a_solicitation_for_an_endpoint_is_answered() {
        for dst in [group(OTHER), OTHER] {
            let mut packet = solicit(TASK, dst, OTHER);
            assert_eq!(answered(&mut packet), Verdict::new(Action::Reflect, Counter::NeighborAnswered));
            assert_checksums(&packet.bytes);
            let parsed = packet.parsed::<Ip6>();
            assert_eq!((parsed.src, parsed.dst, packet.bytes[21]), (OTHER, TASK, 255));
            assert_eq!(packet.bytes[..12], [SENDER, mac_of(OTHER)].concat());
            let (_, advertisement) = split(&packet.bytes);
            let mut expected = message(136, OTHER, &[&[2, 1][..], &mac_of(OTHER)].concat());
            expected[2..4].copy_from_slice(&advertisement[2..4]);
            expected[4] = 0x60;
            assert_eq!(advertisement, expected);
        }
    }

    #[test]
    fn the_gateway_is_advertised_as_a_router() {
        let mut packet = solicit(TASK, group(GATEWAY), GATEWAY);
        assert_eq!(answered(&mut packet).counter, Counter::NeighborAnswered);
        assert_checksums(&packet.bytes);
        assert_eq!(split(&packet.bytes).1[4], 0xe0);
    }

    #[test]
    fn what_is_not_owed_an_answer_is_dropped_untouched() {
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut packet = solicit(TASK, group(OTHER), OTHER);
            change(&mut packet.bytes);
            packet
        };
        let source = [&[1, 1][..], &RECEIVER].concat();
        let cases = [
            (solicit(TASK, group(NOBODY), NOBODY), Counter::DropNoEndpoint),
            (solicit(TASK, group(TASK), TASK), Counter::DropNoEndpoint),
            // Duplicate address detection.
            (packet(Ip6::default(), group(TASK), &message(135, TASK, &[])), Counter::DropNoEndpoint),
            (packet(TASK, group(OTHER), &message(135, OTHER, &[])), Counter::DropMalformed),
            (
                packet(TASK, group(OTHER), &message(135, OTHER, &[&source[..], &[14; 8]].concat())),
                Counter::DropMalformed,
            ),
            (
                packet(TASK, group(OTHER), &message(135, OTHER, &[2, 1, 2, 0, 0, 0, 0, 1])),
                Counter::DropMalformed,
            ),
            (solicit(TASK, group(OTHER), ALL_ROUTERS), Counter::DropMalformed),
            // Forwarded; a wrong checksum; a wrong code, which makes the checksum wrong as well.
            (with(&|bytes| bytes[21] = 254), Counter::DropMalformed),
            (with(&|bytes| bytes[56] ^= 1), Counter::DropMalformed),
            (with(&|bytes| bytes[55] = 1), Counter::DropMalformed),
            (packet(TASK, OTHER, &message(136, TASK, &source)), Counter::DropMulticast),
            // Router solicitation; report of group membership; something else to a group.
            (packet(TASK, ALL_ROUTERS, &[133, 0, 0, 0, 0, 0, 0, 0]), Counter::DropMulticast),
            (packet(TASK, ALL_ROUTERS, &[143, 0, 0, 0, 0, 0, 0, 0]), Counter::DropMulticast),
            (
                Bytes::new(frame(TASK, ALL_ROUTERS, 17, Some(6), &[0, 1, 0, 2, 0, 8, 0, 0])),
                Counter::DropMulticast,
            ),
        ];
        for (mut packet, counter) in cases {
            let before = packet.clone();
            assert_eq!(answered(&mut packet), Verdict::drop(counter), "{before:x?}");
            assert_eq!(packet, before);
        }
    }

    #[test]
    fn other_unicast_is_no_concern() {
        for kind in [1, 128, 129, 132, 138] {
            let packet = packet(TASK, OTHER, &[kind, 0, 0, 0, 0, 0, 0, 0]);
            assert!(!concerns(&packet, &packet.parsed()));
        }
        let packet = Bytes::new(frame(TASK, OTHER, 17, Some(6), &[135, 0, 0, 2, 0, 8, 0, 0]));
        assert!(!concerns(&packet, &packet.parsed()));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_answered_or_left_as_it_is(
            message in proptest::collection::vec(any::<u8>(), 8..48), solicits: bool, target: bool,
            hop_limit in prop_oneof![Just(255_u8), any::<u8>()],
        ) {
            let mut message = message;
            if let (true, Some(kind)) = (solicits, message.first_mut()) {
                *kind = SOLICITATION;
            }
            if let (true, Some(place)) = (target, message.get_mut(8..24)) {
                place.copy_from_slice(&core::net::Ipv6Addr::from(OTHER).octets());
            }
            let mut packet = packet(TASK, ALL_ROUTERS, &message);
            packet.bytes[21] = hop_limit;
            let before = packet.clone();
            if answered(&mut packet).action() == Action::Drop {
                prop_assert_eq!(packet, before);
            } else {
                assert_checksums(&packet.bytes);
            }
        }
    }
}
