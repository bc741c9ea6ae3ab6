//! What the host's stack sends to its tasks: answers of the gateway, replies from the outside, and what its processes send
//! to published ports.
//!
//! The host knows each endpoint by a node-local alias, so that two networks may use the same addresses. The
//! translation is one to one and keeps no state: [`to_host`] and [`from_host`] are inverses.

use mesh_common::addr::mac_of;
use mesh_common::be::Be16;
use mesh_common::counter::Counter;
use mesh_common::map::{Alias, Config, Iface};

use crate::header::Ethernet;
use crate::mesh;
use crate::packet::Packet;
use crate::related::Quote;
use crate::tables::AddrTables;
use crate::translation::{Frame, Parts, Plan, Work};
use crate::verdict::{Action, Verdict};

/// Decides on an IP packet that the host sent to `shoal0`, once it is read.
#[inline(always)]
pub fn from_host<A: Quote>(packet: &impl Packet, tables: &impl AddrTables<A>, work: &mut Work<A>) {
    let Parts { parsed, tuple, plan, .. } = work.parts();
    let Some(config) = tables.config() else {
        return plan.end(Verdict::drop(Counter::DropNotReady));
    };
    let host = A::host(config);
    if parsed.dst == host.mesh {
        return mesh::from_client(packet, tables, config, parsed, tuple, &host.client, plan);
    }
    let Some(alias) = tables.alias(&parsed.dst) else {
        return plan.end(Verdict::drop(Counter::DropUnknownAlias));
    };
    if plan.translation.src == host.addr {
        plan.translation.src = alias.gateway;
    }
    deliver(alias, plan, Counter::HostDelivered);
}

/// Delivers a packet to the endpoint behind an alias, from its gateway.
#[inline(always)]
fn deliver<A: Quote>(alias: &Alias<A>, plan: &mut Plan<A>, counter: Counter) {
    let header = Ethernet { dst: mac_of(alias.addr), src: mac_of(alias.gateway), ethertype: A::ETHERTYPE };
    plan.translation.dst = alias.addr;
    plan.go(Frame::given(header), Verdict::deliver(alias.ifindex, counter));
}

/// Hands a task's packet to the host's stack: the gateway's address becomes `shoal0`'s, the task's its alias.
#[inline(always)]
pub fn to_host<A: Quote>(config: &Config, iface: &Iface<A>, plan: &mut Plan<A>) {
    plan.translation.src = iface.alias;
    if plan.translation.dst == iface.gateway {
        plan.translation.dst = A::host(config).addr;
    }
    let frame = entering(config, mac_of(iface.alias), A::ETHERTYPE);
    plan.go(frame, Verdict::new(Action::Host, Counter::HostEntered));
}

/// Hands a reply to the process of this host that dialled a published port.
#[inline(always)]
pub fn to_process<A: Quote>(config: &Config, plan: &mut Plan<A>) {
    let host = A::host(config);
    plan.translation.dst = host.addr;
    let frame = entering(config, mac_of(host.mesh), A::ETHERTYPE);
    plan.go(frame, Verdict::new(Action::Host, Counter::MeshReplied));
}

/// Hands a reply to the task of this node that dialled a published port, and has the alias that the reply is for.
#[inline(always)]
pub fn to_alias<A: Quote>(tables: &impl AddrTables<A>, plan: &mut Plan<A>) {
    match tables.alias(&plan.translation.dst) {
        Some(alias) => deliver(alias, plan, Counter::MeshReplied),
        None => plan.end(Verdict::drop(Counter::DropUnknownAlias)),
    }
}

/// The stack takes only what is addressed to the interface that it comes in by.
#[inline(always)]
fn entering(config: &Config, src: [u8; 6], ethertype: Be16) -> Frame {
    Frame::given(Ethernet { dst: mac_of(config.host4.addr), src, ethertype })
}
