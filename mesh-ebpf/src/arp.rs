//! Answering ARP: overlays carry none.

use mesh_common::addr::mac_of;
use mesh_common::be::{Be16, Be32};
use mesh_common::counter::Counter;

use crate::header::{Arp, ETHERTYPE_ARP, ETHERTYPE_IPV4, Ethernet};
use crate::packet::{Fault, Rewrite};
use crate::verdict::{Action, Verdict};

/// Hardware type of Ethernet.
const HARDWARE_ETHERNET: u16 = 1;
/// Operation of a request.
const REQUEST: u16 = 1;
/// Operation of a reply.
const REPLY: u16 = 2;

/// Turns an ARP request for an address that `exists` into its reply; drops everything else.
#[inline(always)]
pub fn answer<P: Rewrite>(packet: &mut P, exists: impl Fn(Be32) -> bool) -> Verdict {
    let Some(request) = packet.load::<Arp>(Ethernet::LEN) else {
        return Verdict::drop(Counter::DropMalformed);
    };
    if request.hardware.get() != HARDWARE_ETHERNET
        || request.protocol != ETHERTYPE_IPV4
        || request.hardware_len != 6
        || request.protocol_len != 4
        || request.operation.get() != REQUEST
    {
        return Verdict::drop(Counter::DropMalformed);
    }
    let target = request.target;
    // A probe for the sender's own address (RFC 5227) must stay unanswered, or it would give the address up.
    if target == { request.sender } || !exists(target) {
        return Verdict::drop(Counter::DropNoEndpoint);
    }
    match reply(packet, request) {
        Ok(()) => Verdict::new(Action::Reflect, Counter::ArpAnswered),
        Err(fault) => fault.into(),
    }
}

#[inline(always)]
fn reply<P: Rewrite>(packet: &mut P, request: Arp) -> Result<(), Fault> {
    let mac = mac_of(request.target);
    packet.store(0, &Ethernet { dst: request.sender_mac, src: mac, ethertype: ETHERTYPE_ARP })?;
    let reply = Arp {
        operation: Be16::new(REPLY),
        sender_mac: mac,
        sender: request.target,
        target_mac: request.sender_mac,
        target: request.sender,
        ..request
    };
    packet.store(Ethernet::LEN, &reply)
}
