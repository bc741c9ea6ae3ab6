//! Packet fixtures: one packet in, its verdict, bytes, counters and flows out; on the host library and in the kernel.

pub mod fixtures;
pub mod frames;
pub mod host;
pub mod kernel;
pub mod world;

use mesh_common::counter::Counter;
use mesh_common::map::{Flow, FlowKey};
use mesh_datapath::overlay::Arrival;
use mesh_datapath::verdict::Action;

use self::world::World;

/// Where a packet comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// XDP on an uplink.
    UplinkXdp,
    /// TC on an uplink.
    Uplink,
    /// TC on the host side of a task's veth, by its index.
    Task(u32),
    /// TC on the VXLAN device.
    Overlay(Arrival),
    /// TC on `shoal0p`.
    Host,
}

/// One case.
#[derive(Debug)]
pub struct Fixture {
    /// A sentence.
    pub name: &'static str,
    /// Where the packet comes in.
    pub hook: Hook,
    /// What the tables hold.
    pub world: World,
    /// The packet.
    pub input: Vec<u8>,
    /// What must become of it.
    pub outcome: Outcome,
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Where it goes.
    pub end: End,
    /// Its bytes afterwards.
    pub output: Vec<u8>,
    /// What counted it; `None` for a packet that XDP leaves to TC.
    pub counter: Option<Counter>,
    /// Flows that the flow table has gained or changed, by key.
    pub flows: Vec<(FlowKey, Flow)>,
}

/// Where a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// What TC does with a verdict.
    Tc(Action),
    /// XDP leaves it to the stack, and so to TC.
    XdpPass,
    /// XDP drops it.
    XdpDrop,
    /// XDP sends it out of the interface that it came in by.
    XdpTx,
    /// XDP sends it out of another interface.
    XdpRedirect,
}

impl End {
    /// The program's return value in the kernel.
    pub fn code(self) -> u32 {
        const TC_UNSPEC: u32 = u32::MAX;
        const TC_SHOT: u32 = 2;
        const TC_REDIRECT: u32 = 7;
        match self {
            Self::Tc(Action::Pass) => TC_UNSPEC,
            Self::Tc(Action::Drop) => TC_SHOT,
            Self::Tc(_) => TC_REDIRECT,
            Self::XdpDrop => 1,
            Self::XdpPass => 2,
            Self::XdpTx => 3,
            Self::XdpRedirect => 4,
        }
    }
}
