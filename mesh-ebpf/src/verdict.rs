//! How a packet ends, and the counter that it ends under.

use mesh_common::counter::Counter;

use crate::answer::{Answer, Back};
use crate::packet::Fault;

/// What the caller is to do with a packet, after the packet logic has rewritten it.
///
/// An [`Action`] and its numbers side by side, each with a value: see [`Parsed`](crate::parse::Parsed).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    kind: Kind,
    /// DSCP and ECN, if it is a tunnel.
    tos: u8,
    /// An interface, a peer's slot, or an MTU.
    number: u32,
    /// A VNI, or the interface that goes with an MTU.
    vni: u32,
    /// What to count the packet that came in under.
    pub counter: Counter,
    /// What to count beside it: the packet has become an answer to itself, and this one was made. `Passed`: none.
    made: Counter,
}

/// Which [`Action`].
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Pass,
    Drop,
    Deliver,
    Tunnel,
    Route,
    Reflect,
    Host,
    Arrive,
    Echo,
    Dial,
    AnswerNobody,
    AnswerNobodyToClient,
    AnswerTooBig,
    AnswerTooBigBeyond,
    AnswerNotHere,
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
        /// The node: a peer's slot.
        peer: u32,
        /// The packet's own DSCP and ECN, for the outer header.
        tos: u8,
    },
    /// Onto the wire by the host's routes.
    Route,
    /// Back out of the interface that it came in by.
    Reflect,
    /// Into the host's stack, as received on `shoal0`.
    Host,
    /// To where a packet goes that comes in by this interface.
    Arrive {
        /// The interface.
        ifindex: u32,
    },
    /// Nowhere, but its sender is to be told: [`answer::make`](crate::answer::make) says where that goes.
    Answer(Answer),
    /// Back to its sender, as the reply to the ICMP echo request that it is; dropped if it is none.
    Echo,
    /// To a published port of this node, which a task of it dialled: [`mesh::dial`](crate::mesh::dial) says where.
    Dial,
}

impl Verdict {
    /// Not the mesh's.
    pub const PASS: Self = Self::new(Action::Pass, Counter::Passed);

    /// An action and its counter.
    #[inline(always)]
    pub const fn new(action: Action, counter: Counter) -> Self {
        let (kind, number, vni, tos) = match action {
            Action::Pass => (Kind::Pass, 0, 0, 0),
            Action::Drop => (Kind::Drop, 0, 0, 0),
            Action::Deliver { ifindex } => (Kind::Deliver, ifindex, 0, 0),
            Action::Tunnel { vni, peer, tos } => (Kind::Tunnel, peer, vni, tos),
            Action::Route => (Kind::Route, 0, 0, 0),
            Action::Reflect => (Kind::Reflect, 0, 0, 0),
            Action::Host => (Kind::Host, 0, 0, 0),
            Action::Arrive { ifindex } => (Kind::Arrive, ifindex, 0, 0),
            Action::Echo => (Kind::Echo, 0, 0, 0),
            Action::Dial => (Kind::Dial, 0, 0, 0),
            Action::Answer(Answer::Nobody { back: Back::Reflect }) => (Kind::AnswerNobody, 0, 0, 0),
            Action::Answer(Answer::Nobody { back: Back::Client { peer } }) => {
                (Kind::AnswerNobodyToClient, peer, 0, 0)
            }
            Action::Answer(Answer::TooBig { mtu }) => (Kind::AnswerTooBig, mtu as u32, 0, 0),
            Action::Answer(Answer::TooBigBeyond { mtu, ifindex }) => {
                (Kind::AnswerTooBigBeyond, mtu as u32, ifindex, 0)
            }
            Action::Answer(Answer::NotHere { vni, peer }) => (Kind::AnswerNotHere, peer, vni, 0),
        };
        Self { kind, tos, number, vni, counter, made: Counter::Passed }
    }

    /// What to do.
    #[inline(always)]
    pub const fn action(&self) -> Action {
        let Self { kind, tos, number, vni, .. } = *self;
        match kind {
            Kind::Pass => Action::Pass,
            Kind::Drop => Action::Drop,
            Kind::Deliver => Action::Deliver { ifindex: number },
            Kind::Tunnel => Action::Tunnel { vni, peer: number, tos },
            Kind::Route => Action::Route,
            Kind::Reflect => Action::Reflect,
            Kind::Host => Action::Host,
            Kind::Arrive => Action::Arrive { ifindex: number },
            Kind::Echo => Action::Echo,
            Kind::Dial => Action::Dial,
            Kind::AnswerNobody => Action::Answer(Answer::Nobody { back: Back::Reflect }),
            Kind::AnswerNobodyToClient => {
                Action::Answer(Answer::Nobody { back: Back::Client { peer: number } })
            }
            Kind::AnswerTooBig => Action::Answer(Answer::TooBig { mtu: number as u16 }),
            Kind::AnswerTooBigBeyond => {
                Action::Answer(Answer::TooBigBeyond { mtu: number as u16, ifindex: vni })
            }
            Kind::AnswerNotHere => Action::Answer(Answer::NotHere { vni, peer: number }),
        }
    }

    /// What to count beside the packet that came in: an answer was made of it.
    #[inline(always)]
    pub fn made(&self) -> Option<Counter> {
        (self.made != Counter::Passed).then_some(self.made)
    }

    /// The same, for an answer that was made.
    #[inline(always)]
    #[must_use]
    pub const fn making(self, made: Counter) -> Self {
        Self { made, ..self }
    }

    /// Dropped and counted.
    #[inline(always)]
    pub const fn drop(counter: Counter) -> Self {
        Self::new(Action::Drop, counter)
    }

    /// Dropped and counted, and answered.
    #[inline(always)]
    pub const fn answer(counter: Counter, answer: Answer) -> Self {
        Self::new(Action::Answer(answer), counter)
    }

    /// Delivered to a local task and counted.
    #[inline(always)]
    pub const fn deliver(ifindex: u32, counter: Counter) -> Self {
        Self::new(Action::Deliver { ifindex }, counter)
    }
}

impl From<Fault> for Verdict {
    #[inline(always)]
    fn from(Fault: Fault) -> Self {
        Self::drop(Counter::DropRewriteFailed)
    }
}

impl core::fmt::Debug for Verdict {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:?} as {:?}", self.action(), self.counter)?;
        self.made().map_or(Ok(()), |made| write!(f, " with {made:?}"))
    }
}
