//! A node on the host: the packet library at a hook, on tables that outlive the packet. What one packet leaves in them
//! meets the next.

use std::cell::Cell;
use std::rc::Rc;

use mesh_common::addr::Ip6;
use mesh_common::counter::Counter;
use mesh_common::map::Config;
use mesh_datapath::bytes::Bytes;
use mesh_datapath::hook::{self, Way, XdpEnd};
use mesh_datapath::overlay::Arrival;
use mesh_datapath::tables::Tables as _;

use super::entries::{self, Entries};
use super::family::Family;
use super::tables::{HostTables, Meanwhile};
use super::world::{CLIENT, CLIENT_ROUTE, LOOPBACK, World};
use super::{End, Hook, Outcome};

/// A hook of a world, and the tables of its node.
#[derive(Debug)]
pub struct Node {
    /// Where packets come in, in TC; `None`: they come in by XDP.
    tc: Option<hook::Hook>,
    tables: HostTables,
}

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Where it goes.
    pub end: End,
    /// What counted it; `None` for a packet that XDP leaves to TC.
    pub counter: Option<Counter>,
    /// What counted the answer that it has become.
    pub made: Option<Counter>,
}

impl Node {
    /// The node of `world` before its first packet.
    pub fn new(world: &World, hook: Hook) -> Self {
        let tc = match hook {
            Hook::UplinkXdp => None,
            Hook::Uplink => Some(hook::Hook::Uplink),
            Hook::Task(ifindex) => Some(hook::Hook::Task(ifindex)),
            Hook::Overlay { vni, from } => Some(hook::Hook::Overlay(Arrival { vni, vtep: world.vtep(from) })),
            Hook::Host => Some(hook::Hook::Host),
        };
        Self { tc, tables: HostTables::new(world) }
    }

    /// The node's own facts.
    pub fn config(&self) -> Option<&Config> {
        self.tables.config()
    }

    /// Whether a peer has this slot.
    pub fn has_peer(&self, slot: u32) -> bool {
        self.tables.peer(slot).is_some()
    }

    /// Runs the hook on a packet. Of ways, that to `world::CLIENT` is known.
    pub fn run(&self, packet: &mut Bytes) -> Ended {
        run_at(self.tc, &self.tables, packet)
    }
}

/// The way to an address, as far as the kernel's namespace has it.
fn way(to: Ip6) -> Option<Way> {
    Family::BOTH.iter().any(|family| family.ip6(CLIENT) == to).then_some(CLIENT_ROUTE)
}

fn run_at(tc: Option<hook::Hook>, tables: &HostTables, packet: &mut Bytes) -> Ended {
    let Some(tc) = tc else {
        let (end, counter) = match hook::run_xdp(packet, tables, way) {
            XdpEnd::Left => (End::XdpPass, None),
            XdpEnd::Dropped(reason) => (End::XdpDrop, Some(reason)),
            XdpEnd::Sent { ifindex: LOOPBACK, counter } => (End::XdpTx, Some(counter)),
            XdpEnd::Sent { counter, .. } => (End::XdpRedirect, Some(counter)),
        };
        return Ended { end, counter, made: None };
    };
    let verdict = hook::run(tc, packet, tables, way, || {});
    Ended { end: End::Tc(verdict.action()), counter: Some(verdict.counter), made: verdict.made() }
}

/// Two packets of one node, the second on another CPU: it comes, and goes, when the first has used what the programs keep
/// `uses` times. `None` if the first does not use it so often; else what became of each, and what is kept then.
pub fn run_two(
    world: &World,
    (hook, packet): (Hook, &[u8]),
    (other_hook, other_packet): (Hook, &[u8]),
    uses: usize,
) -> Option<([Ended; 2], Entries)> {
    let node = Node::new(world, hook);
    let other = Node::new(world, other_hook).tc;
    let mut other_packet = Bytes::new(other_packet.to_vec());
    let other_ended = Rc::new(Cell::new(None));
    let tell = Rc::clone(&other_ended);
    let done = move |tables: &HostTables| tell.set(Some(run_at(other, tables, &mut other_packet)));
    node.tables.set_meanwhile(Meanwhile { uses, done: Box::new(done) });
    let ended = node.run(&mut Bytes::new(packet.to_vec()));
    Some(([ended, other_ended.get()?], node.tables.entries()))
}

/// What the library makes of a world's first packet.
pub fn run(hook: Hook, world: &World, mut packet: Bytes) -> Outcome {
    let node = Node::new(world, hook);
    let Ended { end, counter, made } = node.run(&mut packet);
    let changes = entries::changes(&world.known, &node.tables.entries());
    Outcome { end, output: packet.bytes, counter, made, changes }
}
