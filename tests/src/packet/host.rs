//! A node on the host: the packet library at a hook, on tables that outlive the packet. What one packet leaves in them
//! meets the next.

use mesh_common::counter::Counter;
use mesh_common::map::Config;
use mesh_datapath::bytes::Bytes;
use mesh_datapath::hook::{self, XdpEnd};
use mesh_datapath::overlay::Arrival;
use mesh_datapath::tables::Tables as _;

use super::entries;
use super::tables::HostTables;
use super::world::{CLIENT_ROUTE, LOOPBACK, World};
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

    /// Runs the hook on a packet. The way to every client is that to `world::CLIENT`.
    pub fn run(&self, packet: &mut Bytes) -> Ended {
        let Some(tc) = self.tc else {
            let (end, counter) = match hook::run_xdp(packet, &self.tables, Some(&CLIENT_ROUTE)) {
                XdpEnd::Left => (End::XdpPass, None),
                XdpEnd::Dropped(reason) => (End::XdpDrop, Some(reason)),
                XdpEnd::Sent { ifindex: LOOPBACK, counter } => (End::XdpTx, Some(counter)),
                XdpEnd::Sent { counter, .. } => (End::XdpRedirect, Some(counter)),
            };
            return Ended { end, counter, made: None };
        };
        let verdict = hook::run(tc, packet, &self.tables, || {});
        Ended { end: End::Tc(verdict.action()), counter: Some(verdict.counter), made: verdict.made() }
    }
}

/// What the library makes of a world's first packet.
pub fn run(hook: Hook, world: &World, mut packet: Bytes) -> Outcome {
    let node = Node::new(world, hook);
    let Ended { end, counter, made } = node.run(&mut packet);
    let changes = entries::changes(&world.known, &node.tables.entries());
    Outcome { end, output: packet.bytes, counter, made, changes }
}
