//! How a packet ends, and the one counter that it ends under.

use mesh_common::be::Be32;
use mesh_common::counter::Counter;

use crate::packet::Fault;

/// What the caller is to do with a packet, after the packet logic has rewritten it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// What to do.
    pub action: Action,
    /// What to count.
    pub counter: Counter,
}

/// Where a packet goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// On to the host's stack, untouched.
    Pass,
    /// Nowhere.
    Drop,
    /// Into the task behind the veth with this host side.
    Deliver {
        /// Host side of the task's veth.
        ifindex: u32,
    },
    /// To another node, in VXLAN.
    Tunnel {
        /// The VNI.
        vni: u32,
        /// The node's VTEP.
        vtep: Be32,
        /// The packet's own DSCP and ECN, for the outer header.
        tos: u8,
    },
    /// Onto the wire by the host's routes.
    Route {
        /// Source of the packet.
        src: Be32,
        /// Destination of the packet.
        dst: Be32,
    },
    /// Back out of the interface that it came in by.
    Reflect,
    /// Into the host's stack, as received on `shoal0`.
    Host,
}

impl Verdict {
    /// Not the mesh's.
    pub const PASS: Self = Self { action: Action::Pass, counter: Counter::Passed };

    /// Dropped and counted.
    #[inline(always)]
    pub const fn drop(counter: Counter) -> Self {
        Self { action: Action::Drop, counter }
    }

    /// Delivered to a local task and counted.
    #[inline(always)]
    pub const fn deliver(ifindex: u32, counter: Counter) -> Self {
        Self { action: Action::Deliver { ifindex }, counter }
    }
}

impl From<Fault> for Verdict {
    #[inline(always)]
    fn from(Fault: Fault) -> Self {
        Self::drop(Counter::DropRewriteFailed)
    }
}
