//! Answering a packet that is dropped, so that its sender needn't wait: with a TCP reset, or an ICMP error; or so that the
//! node that sent it learns from it.

use mesh_common::counter::Counter;
use mesh_common::map::{BUDGET_ERRORS, PROTO_TCP, PROTO_UDP};
use mesh_common::vxlan::VNI_MESH_REPLY;

use crate::family::address_frame;
use crate::header::TCP_RST;
use crate::nack;
use crate::packet::Reuse;
use crate::parse::{Fragment, Parsed};
use crate::refuse::{self, Error};
use crate::tables::AddrTables;
use crate::verdict::{Action, Verdict};

/// What the sender of a packet is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// That nobody is there: a reset for TCP, "port unreachable" for UDP.
    Nobody {
        /// Which way the answer takes.
        back: Back,
    },
    /// That the packet is too big for its way, and what is not: bytes of an IP packet.
    TooBig {
        /// The way's MTU, bytes.
        mtu: u16,
    },
    /// The same of a reply for a client, as a router would say it that is the first on the way there.
    TooBigBeyond {
        /// The way's MTU, bytes.
        mtu: u16,
        /// The interface that the way begins with.
        ifindex: u32,
    },
    /// To the node that sent it: that the task that it names is not here.
    NotHere {
        /// The network.
        vni: u32,
        /// The node's peer slot.
        peer: u32,
    },
}

/// Which way an answer takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Back {
    /// Out of the interface that the packet came in by.
    Reflect,
    /// To a client of a published port, by the ingress node with this peer slot; 0: from here.
    Client {
        /// The slot.
        peer: u32,
    },
}

/// Turns a packet, still as it came in, into the answer to itself, and says where that goes. What can't be answered is
/// dropped.
#[inline(always)]
pub fn make<A: refuse::Answer, P: Reuse>(
    packet: &mut P,
    tables: &impl AddrTables<A>,
    reason: Counter,
    answer: Answer,
) -> Verdict {
    let Ok(parsed) = A::parse(packet) else {
        return Verdict::drop(reason);
    };
    if !is_answerable(&parsed, answer) || !tables.spend(BUDGET_ERRORS) {
        return Verdict::drop(reason);
    }
    // As the one whom the packet was for.
    let from = parsed.dst;
    let (made, counter) = match answer {
        Answer::Nobody { .. } if parsed.protocol == PROTO_TCP => {
            (refuse::reset(packet, &parsed), Counter::ResetSent)
        }
        Answer::Nobody { .. } => {
            (refuse::error(packet, &parsed, from, Error::PortUnreachable), Counter::UnreachableSent)
        }
        Answer::TooBig { mtu } | Answer::TooBigBeyond { mtu, .. } => {
            (refuse::error(packet, &parsed, from, Error::TooBig { mtu }), Counter::TooBigSent)
        }
        Answer::NotHere { .. } => (nack::make(packet, &parsed), Counter::NackSent),
    };
    // Those of the mesh request, exchanged, would teach the ingress node the backend that doesn't know the flow.
    let addressed = match answer {
        Answer::Nobody { back: Back::Client { .. } } if made == Ok(true) => {
            address_frame(packet, parsed.dst, parsed.src)
        }
        Answer::Nobody { .. }
        | Answer::TooBig { .. }
        | Answer::TooBigBeyond { .. }
        | Answer::NotHere { .. } => Ok(()),
    };
    match (made, addressed) {
        (Ok(true), Ok(())) => Verdict::new(towards(answer), reason).making(counter),
        (Ok(_) | Err(_), _) => Verdict::drop(reason),
    }
}

#[inline(always)]
fn is_answerable<A: refuse::Answer>(parsed: &Parsed<A>, answer: Answer) -> bool {
    match (answer, parsed.protocol) {
        (Answer::TooBig { .. } | Answer::TooBigBeyond { .. } | Answer::NotHere { .. }, _) => true,
        (Answer::Nobody { .. }, PROTO_TCP) => {
            parsed.tcp_flags & TCP_RST == 0 && parsed.fragment == Fragment::Whole
        }
        (Answer::Nobody { .. }, PROTO_UDP) => parsed.fragment != Fragment::Later,
        (Answer::Nobody { .. }, _) => false,
    }
}

#[inline(always)]
fn towards(answer: Answer) -> Action {
    match answer {
        // Under the address that the client dialled.
        Answer::Nobody { back: Back::Client { peer: 0 } } => Action::Route,
        Answer::Nobody { back: Back::Client { peer } } => {
            Action::Tunnel { vni: VNI_MESH_REPLY, peer, tos: 0 }
        }
        Answer::Nobody { back: Back::Reflect } | Answer::TooBig { .. } => Action::Reflect,
        Answer::TooBigBeyond { ifindex, .. } => Action::Arrive { ifindex },
        Answer::NotHere { vni, peer } => Action::Tunnel { vni, peer, tos: 0 },
    }
}
