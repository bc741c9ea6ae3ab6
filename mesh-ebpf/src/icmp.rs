//! ICMP and ICMPv6 that the mesh answers itself: echo to an address that is nobody's interface.

use mesh_common::be::Be16;
use mesh_common::counter::Counter;

use crate::family::{Family, address_frame};
use crate::header::{IP_OFFSET, IcmpEcho};
use crate::nat::ICMP_CHECKSUM_OFFSET;
use crate::packet::{Fault, Field, Rewrite};
use crate::parse::{Fragment, Parsed};
use crate::verdict::{Action, Verdict};

/// Types of ICMP's echo request and its reply.
const ECHO4: (u8, u8) = (8, 0);
/// The same of ICMPv6.
const ECHO6: (u8, u8) = (128, 129);

/// Turns an echo request into its reply; `None`, and the packet untouched, if it is none.
#[inline(always)]
pub fn answer_echo<A: Family, P: Rewrite>(packet: &mut P, parsed: &Parsed<A>) -> Option<Verdict> {
    // A fragment's checksum covers bytes that are not here.
    if parsed.protocol != A::ICMP || parsed.fragment != Fragment::Whole {
        return None;
    }
    let (request, reply) = if A::FAMILY == 4 { ECHO4 } else { ECHO6 };
    let echo = packet.load::<IcmpEcho>(parsed.l4_offset)?;
    if echo.kind != request || echo.code != 0 {
        return None;
    }
    Some(match turn(packet, parsed, request, reply) {
        Ok(()) => Verdict::new(Action::Reflect, Counter::EchoAnswered),
        Err(fault) => fault.into(),
    })
}

#[inline(always)]
fn turn<A: Family, P: Rewrite>(
    packet: &mut P,
    parsed: &Parsed<A>,
    request: u8,
    reply: u8,
) -> Result<(), Fault> {
    let (from, to) = (Be16::from_bytes([request, 0]), Be16::from_bytes([reply, 0]));
    let checksum = parsed.l4_offset + ICMP_CHECKSUM_OFFSET;
    packet.patch_l4_checksum(checksum, u32::from(from.raw()), u32::from(to.raw()), Field::Port, false)?;
    packet.store(parsed.l4_offset, &reply)?;
    // Exchanging the addresses leaves every sum over both as it was: IPv4's header, and ICMPv6's pseudo-header.
    packet.store(IP_OFFSET + A::SRC_OFFSET, &parsed.dst)?;
    packet.store(IP_OFFSET + A::DST_OFFSET, &parsed.src)?;
    address_frame(packet, parsed.dst, parsed.src)
}

#[cfg(test)]
mod tests {
    use mesh_common::addr::{Ip6, mac_of};
    use mesh_common::be::Be32;
    use proptest::prelude::*;
    use std::vec::Vec;

    use super::*;
    use crate::testing::{Bytes, Frame, assert_checksums, frame, split};

    fn replies<A: Frame>(src: A, dst: A, request: u8, reply: u8, rest: &[u8]) {
        let l4: Vec<u8> = [&[request, 0, 0, 0][..], rest].concat();
        let mut packet = Bytes::new(frame(src, dst, A::ICMP, Some(2), &l4));
        let parsed = packet.parsed::<A>();
        assert_eq!(
            answer_echo(&mut packet, &parsed),
            Some(Verdict::new(Action::Reflect, Counter::EchoAnswered))
        );
        assert_checksums(&packet.bytes);
        let (_, answer) = split(&packet.bytes);
        assert_eq!((answer[0], answer[1], &answer[4..]), (reply, 0, rest));
        assert_eq!((packet.parsed::<A>().src, packet.parsed::<A>().dst), (dst, src));
        assert_eq!(packet.bytes[..12], [mac_of(src), mac_of(dst)].concat());
    }

    fn leaves<A: Frame>(src: A, dst: A, kind: u8, code: u8) {
        let before = Bytes::new(frame(src, dst, A::ICMP, Some(2), &[kind, code, 0, 0, 1, 2, 3, 4]));
        let mut packet = before.clone();
        let parsed = packet.parsed::<A>();
        assert_eq!(answer_echo(&mut packet, &parsed), None);
        assert_eq!(packet, before);
    }

    proptest! {
        #[test]
        fn an_echo_request_is_replied_to(
            src: u32, dst: u32, src6: [u16; 8], dst6: [u16; 8],
            rest in proptest::collection::vec(any::<u8>(), 4..60),
        ) {
            replies(Be32::new(src), Be32::new(dst), 8, 0, &rest);
            replies(Ip6::from_groups(src6), Ip6::from_groups(dst6), 128, 129, &rest);
        }

        #[test]
        fn other_icmp_is_left_alone(src: u32, dst6: [u16; 8], kind: u8, code: u8) {
            if (kind, code) != (8, 0) {
                leaves(Be32::new(src), Be32::new(1), kind, code);
            }
            if (kind, code) != (128, 0) {
                leaves(Ip6::from_groups([1; 8]), Ip6::from_groups(dst6), kind, code);
            }
        }
    }
}
