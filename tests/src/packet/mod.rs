//! Packet fixtures: one packet in, its verdict, bytes, counters and table entries out; on the host library and in the
//! kernel, in IPv4 and in IPv6.

pub mod entries;
pub mod family;
pub mod fixtures;
pub mod frames;
pub mod host;
pub mod icmp;
pub mod kernel;
pub mod tables;
pub mod world;

use std::net::Ipv4Addr;

use mesh_common::counter::Counter;
use mesh_datapath::verdict::Action;

use self::entries::{Changes, Entries, Place};
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
    Overlay {
        /// The packet's VNI.
        vni: u32,
        /// The node that sent it.
        from: Ipv4Addr,
    },
    /// TC on `shoal0p`.
    Host,
}

/// One case.
#[derive(Debug)]
pub struct Fixture {
    /// A sentence, and the family.
    pub name: String,
    /// Where the packet comes in.
    pub hook: Hook,
    /// What the tables hold.
    pub world: World,
    /// The packet.
    pub input: Vec<u8>,
    /// Bytes of payload in each segment that the packet will be cut into; 0: it won't be.
    pub segment_len: u32,
    /// Whether a kernel can be given the packet: its test runs take none that ends within the IP header.
    pub in_kernel: bool,
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
    /// What counted the answer that it has become.
    pub made: Option<Counter>,
    /// What the programs' tables have gained, changed or lost.
    pub changes: Changes,
}

impl Outcome {
    /// The packet has become an answer.
    #[must_use]
    pub fn made(self, made: Counter) -> Self {
        Self { made: Some(made), ..self }
    }

    /// Entries were written.
    #[must_use]
    pub fn wrote(mut self, entries: Entries) -> Self {
        self.changes.extend(entries.into_iter().map(|(place, held)| (place, Some(held))));
        self
    }

    /// Entries were removed.
    #[must_use]
    pub fn removed(mut self, places: impl IntoIterator<Item = Place>) -> Self {
        self.changes.extend(places.into_iter().map(|place| (place, None)));
        self
    }

    /// What is counted.
    pub fn counters(&self) -> Vec<Counter> {
        let mut counters: Vec<_> = self.counter.into_iter().chain(self.made).collect();
        counters.sort_unstable();
        counters
    }
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
