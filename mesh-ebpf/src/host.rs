//! What the host's stack sends to its tasks: answers of the gateway, and replies from the outside.
//!
//! The host knows each endpoint by a node-local alias, so that two networks may use the same addresses. The
//! translation is one to one and keeps no state: [`to_host`] and [`from_host`] are inverses.

use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::mac_of;
use mesh_common::map::{Config, Iface};

use crate::arp;
use crate::header::{ETHERTYPE_ARP, ETHERTYPE_IPV4, Ethernet};
use crate::nat::{self, End};
use crate::packet::{Fault, Rewrite};
use crate::parse::{Parsed, Unparsed, parse};
use crate::tables::Tables;
use crate::verdict::{Action, Verdict};

/// Decides on, and rewrites, a packet that the host sent to `shoal0`.
#[inline(always)]
pub fn from_host<P: Rewrite>(packet: &mut P, tables: &impl Tables) -> Verdict {
    let Some(config) = tables.config() else {
        return Verdict::drop(Counter::DropNotReady);
    };
    let parsed = match parse(packet) {
        Ok(parsed) => parsed,
        Err(Unparsed::NotIpv4(ETHERTYPE_ARP)) => {
            return arp::answer(packet, |addr| tables.alias(addr).is_some());
        }
        Err(Unparsed::NotIpv4(_)) => return Verdict::drop(Counter::DropProtocol),
        Err(Unparsed::Malformed) => return Verdict::drop(Counter::DropMalformed),
    };
    let Some(alias) = tables.alias(parsed.dst) else {
        return Verdict::drop(Counter::DropUnknownAlias);
    };
    match translate_from_host(packet, config, parsed, alias.addr, alias.gateway) {
        Ok(()) => Verdict::deliver(alias.ifindex, Counter::HostDelivered),
        Err(fault) => fault.into(),
    }
}

#[inline(always)]
fn translate_from_host<P: Rewrite>(
    packet: &mut P,
    config: &Config,
    mut parsed: Parsed,
    addr: Be32,
    gateway: Be32,
) -> Result<(), Fault> {
    nat::rewrite(packet, &mut parsed, End::Dst, addr, None)?;
    if parsed.src == config.host_addr {
        nat::rewrite(packet, &mut parsed, End::Src, gateway, None)?;
    }
    nat::address_frame_to(packet, gateway, addr)
}

/// Hands a task's packet to the host's stack: the gateway's address becomes `shoal0`'s, the task's its alias.
#[inline(always)]
pub fn to_host<P: Rewrite>(packet: &mut P, config: &Config, iface: &Iface, parsed: Parsed) -> Verdict {
    match translate_to_host(packet, config, iface, parsed) {
        Ok(()) => Verdict { action: Action::Host, counter: Counter::HostEntered },
        Err(fault) => fault.into(),
    }
}

#[inline(always)]
fn translate_to_host<P: Rewrite>(
    packet: &mut P,
    config: &Config,
    iface: &Iface,
    mut parsed: Parsed,
) -> Result<(), Fault> {
    nat::rewrite(packet, &mut parsed, End::Src, iface.alias, None)?;
    if parsed.dst == iface.gateway {
        nat::rewrite(packet, &mut parsed, End::Dst, config.host_addr, None)?;
    }
    let frame = Ethernet {
        // The stack takes only what is addressed to the interface that it comes in by.
        dst: mac_of(config.host_addr),
        src: mac_of(iface.alias),
        ethertype: ETHERTYPE_IPV4,
    };
    packet.store(0, &frame)
}
