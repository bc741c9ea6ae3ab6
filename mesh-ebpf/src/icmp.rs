//! ICMP that the mesh answers itself: echo to an address that is nobody's interface.

use mesh_common::be::Be16;
use mesh_common::counter::Counter;

use crate::header::{IP_DST_OFFSET, IP_SRC_OFFSET, IcmpEcho};
use crate::nat::address_frame_to;
use crate::packet::{Fault, Field, Rewrite};
use crate::parse::{Fragment, Parsed};
use crate::verdict::{Action, Verdict};

/// Type of an echo request.
const ECHO_REQUEST: u8 = 8;
/// Type of an echo reply.
const ECHO_REPLY: u8 = 0;
/// Offset of ICMP's checksum in its header.
const CHECKSUM_OFFSET: usize = 2;

/// Turns an ICMP echo request into its reply; `None`, and the packet untouched, if it is none.
#[inline(always)]
pub fn answer_echo<P: Rewrite>(packet: &mut P, parsed: &Parsed) -> Option<Verdict> {
    // A fragment's checksum covers bytes that are not here.
    if parsed.fragment != Fragment::Whole {
        return None;
    }
    let echo = packet.load::<IcmpEcho>(parsed.l4_offset)?;
    if echo.kind != ECHO_REQUEST || echo.code != 0 {
        return None;
    }
    Some(match reply(packet, parsed) {
        Ok(()) => Verdict { action: Action::Reflect, counter: Counter::EchoAnswered },
        Err(fault) => fault.into(),
    })
}

#[inline(always)]
fn reply<P: Rewrite>(packet: &mut P, parsed: &Parsed) -> Result<(), Fault> {
    let (from, to) = (Be16::from_bytes([ECHO_REQUEST, 0]), Be16::from_bytes([ECHO_REPLY, 0]));
    let checksum = parsed.l4_offset + CHECKSUM_OFFSET;
    packet.patch_l4_checksum(checksum, u32::from(from.raw()), u32::from(to.raw()), Field::Port, false)?;
    packet.store(parsed.l4_offset, &ECHO_REPLY)?;
    // Exchanging the addresses leaves the IPv4 header's sum as it was.
    packet.store(IP_SRC_OFFSET, &parsed.dst)?;
    packet.store(IP_DST_OFFSET, &parsed.src)?;
    address_frame_to(packet, parsed.dst, parsed.src)
}
