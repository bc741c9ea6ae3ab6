//! What the programs write: the tables of flows and fragments, of both families in one form.

use std::collections::BTreeMap;

use mesh_common::addr::Ip6;
use mesh_common::map::{Flow, FlowKey, FragmentKey, FragmentPorts, Sent};

use super::family::Side;

/// Now in fixtures, s of the monotonic clock. Stamps around it are times; others are what an acknowledgement says.
pub const NOW_S: u32 = 5_000_000;
/// How far from now a time may be, s.
const TIMES_S: u32 = 100_000;

/// Where an entry is: its table and its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// `shoal_sent4/6`.
    Sent(FlowKey<Ip6>),
    /// `shoal_opening4/6`.
    Opening(FlowKey<Ip6>),
    /// `shoal_flows4/6`.
    Established(FlowKey<Ip6>),
    /// `shoal_frags4/6`.
    Fragment(FragmentKey<Ip6>),
}

impl Place {
    /// The destination in the key.
    pub const fn dst(&self) -> Ip6 {
        match self {
            Self::Sent(key) | Self::Opening(key) | Self::Established(key) => key.dst,
            Self::Fragment(key) => key.dst,
        }
    }
}

/// What an entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// In `shoal_sent4/6`.
    Sent(Sent),
    /// In `shoal_opening4/6` and `shoal_flows4/6`.
    Flow(Flow<Ip6>),
    /// In `shoal_frags4/6`.
    Fragment(FragmentPorts),
}

/// What the tables hold.
pub type Entries = BTreeMap<Place, Held>;
/// What became of the tables: entries written, and entries removed (`None`).
pub type Changes = BTreeMap<Place, Option<Held>>;

impl Held {
    /// With the times in it counted from another moment: `NOW_S` becomes `now_s`.
    #[must_use]
    pub fn at(self, now_s: u32) -> Self {
        self.with_stamp(
            |stamp| if is_time(stamp) { stamp.wrapping_sub(NOW_S).wrapping_add(now_s) } else { stamp },
        )
    }

    /// The inverse of [`Held::at`].
    #[must_use]
    pub fn since(self, now_s: u32) -> Self {
        self.with_stamp(|stamp| {
            let ago_s = now_s.wrapping_sub(stamp);
            if stamp > 1 && ago_s < TIMES_S { NOW_S - ago_s } else { stamp }
        })
    }

    fn with_stamp(self, change: impl Fn(u32) -> u32) -> Self {
        match self {
            Self::Sent(sent) => Self::Sent(Sent { stamp: change(sent.stamp), ..sent }),
            Self::Flow(flow) => Self::Flow(Flow { stamp: change(flow.stamp), ..flow }),
            Self::Fragment(ports) => Self::Fragment(FragmentPorts { stamp: change(ports.stamp), ..ports }),
        }
    }
}

fn is_time(stamp: u32) -> bool {
    NOW_S.abs_diff(stamp) < TIMES_S
}

/// How `after` differs from `before`.
pub fn changes(before: &Entries, after: &Entries) -> Changes {
    let removed = before.keys().filter(|place| !after.contains_key(place)).map(|place| (*place, None));
    let written = after.iter().filter(|(place, held)| before.get(place) != Some(held));
    removed.chain(written.map(|(place, held)| (*place, Some(*held)))).collect()
}

/// A flow's key in the one form.
pub fn lift_key<A: Side>(key: &FlowKey<A>) -> FlowKey<Ip6> {
    let FlowKey { src, dst, src_port, dst_port, scope } = *key;
    FlowKey { src: src.to_ip6(), dst: dst.to_ip6(), src_port, dst_port, scope }
}

/// The inverse of [`lift_key`].
pub fn lower_key<A: Side>(key: &FlowKey<Ip6>) -> FlowKey<A> {
    let FlowKey { src, dst, src_port, dst_port, scope } = *key;
    FlowKey { src: A::lower(src), dst: A::lower(dst), src_port, dst_port, scope }
}

/// A flow in the one form.
pub fn lift_flow<A: Side>(flow: &Flow<A>) -> Flow<Ip6> {
    let Flow { backend, incarnation, peer, stamp, addr, port, client_port, kind, flags, reserved } = *flow;
    Flow { backend, incarnation, peer, stamp, addr: addr.lift(), port, client_port, kind, flags, reserved }
}

/// The inverse of [`lift_flow`].
pub fn lower_flow<A: Side>(flow: &Flow<Ip6>) -> Flow<A> {
    let Flow { backend, incarnation, peer, stamp, addr, port, client_port, kind, flags, reserved } = *flow;
    Flow { backend, incarnation, peer, stamp, addr: A::lower(addr), port, client_port, kind, flags, reserved }
}

/// A fragmented packet's key in the one form.
pub fn lift_fragment<A: Side>(key: &FragmentKey<A>) -> FragmentKey<Ip6> {
    let FragmentKey { src, dst, id, scope } = *key;
    FragmentKey { src: src.to_ip6(), dst: dst.to_ip6(), id, scope }
}

/// The inverse of [`lift_fragment`].
pub fn lower_fragment<A: Side>(key: &FragmentKey<Ip6>) -> FragmentKey<A> {
    let FragmentKey { src, dst, id, scope } = *key;
    FragmentKey { src: A::lower(src), dst: A::lower(dst), id, scope }
}
