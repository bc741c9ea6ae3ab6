//! Which flows are to go: a pure function of the entries, the time and the tasks that live.
//!
//! A flow has an entry for each direction, and both stay or go together. What a reply says names the entry of the way
//! there; the other way round it takes the backend's address, so pairs are put together from their replies.

use std::collections::HashSet;

use mesh_common::addr::Address;
use mesh_common::map::{FLOW_CLOSED, Flow, FlowKey, FlowKind, PROTO_UDP, TCP_CLOSED_S, UDP_IDLE_S};
use mesh_common::vxlan::VNI_MESH_REQUEST;

/// The incarnations of what lives.
#[derive(Debug)]
pub(super) struct Living {
    /// Tasks that take flows, or keep them.
    pub(super) backends: HashSet<u32>,
    /// Tasks with an address.
    pub(super) tasks: HashSet<u32>,
}

/// An entry that is to go, if it is still what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Doomed<A> {
    pub(super) key: FlowKey<A>,
    pub(super) flow: Flow<A>,
    /// The way there, which goes with it.
    pub(super) partner: Option<FlowKey<A>>,
}

/// What has been seen of the flows.
#[derive(Debug)]
pub(super) struct Judge<A> {
    now_s: u32,
    living: Living,
    doomed: Vec<Doomed<A>>,
    /// UDP entries that have been silent for too long, of either direction.
    silent: Vec<Doomed<A>>,
    /// The way there of UDP flows that are alive in one direction at least.
    alive: HashSet<FlowKey<A>>,
}

impl<A: Address> Judge<A> {
    pub(super) fn new(now_s: u32, living: Living) -> Self {
        Self { now_s, living, doomed: Vec::new(), silent: Vec::new(), alive: HashSet::new() }
    }

    /// Looks at an entry.
    pub(super) fn see(&mut self, key: FlowKey<A>, flow: Flow<A>) {
        let partner = way_there(&key, &flow);
        let entry = Doomed { key, flow, partner };
        let age_s = self.now_s.saturating_sub(flow.stamp);
        let living = if partner.is_some() { &self.living.tasks } else { &self.living.backends };
        if flow.incarnation != 0 && !living.contains(&flow.incarnation) {
            self.doomed.push(entry);
        } else if key.protocol() == PROTO_UDP {
            if age_s > UDP_IDLE_S {
                self.silent.push(entry);
            } else {
                self.alive.insert(partner.unwrap_or(key));
            }
        } else if partner.is_some() && flow.flags & FLOW_CLOSED != 0 && age_s > TCP_CLOSED_S {
            self.doomed.push(entry);
        }
    }

    /// What is to go of all that was seen.
    pub(super) fn doomed(self) -> Vec<Doomed<A>> {
        let Self { mut doomed, silent, alive, .. } = self;
        doomed.extend(silent.into_iter().filter(|one| !alive.contains(&one.partner.unwrap_or(one.key))));
        doomed
    }
}

/// The entry of the way there, if this is one of replies.
fn way_there<A: Address>(key: &FlowKey<A>, flow: &Flow<A>) -> Option<FlowKey<A>> {
    let FlowKey { src, dst, dst_port, .. } = *key;
    let (src, src_port, vni) = match flow.kind {
        FlowKind::MESH_REPLY => (dst, flow.client_port, VNI_MESH_REQUEST),
        FlowKind::VIP_REPLY => (dst, dst_port, key.vni()),
        // The task is its own client.
        FlowKind::SELF_REPLY => (src, dst_port, key.vni()),
        _ => return None,
    };
    let scope = vni << 8 | u32::from(key.protocol());
    Some(FlowKey { src, dst: flow.addr, src_port, dst_port: flow.port, scope })
}

#[cfg(test)]
mod tests {
    use mesh_common::be::{Be16, Be32};
    use mesh_common::map::PROTO_TCP;

    use super::*;

    const NOW_S: u32 = 10_000;
    const VNI: u32 = 4096;
    const CLIENT: Be32 = Be32::ipv4(203, 0, 113, 7);
    const NODE: Be32 = Be32::ipv4(198, 18, 0, 11);
    const TASK: Be32 = Be32::ipv4(10, 0, 0, 5);
    const VIP: Be32 = Be32::ipv4(10, 0, 1, 2);
    const GATEWAY: Be32 = Be32::ipv4(10, 0, 1, 1);
    /// Lives and takes flows; lives; is gone.
    const BACKEND: u32 = 1;
    /// See [`BACKEND`].
    const ENDING: u32 = 2;
    /// See [`BACKEND`].
    const GONE: u32 = 3;

    fn key(src: (Be32, u16), dst: (Be32, u16), vni: u32, protocol: u8) -> FlowKey<Be32> {
        let (src_port, dst_port) = (Be16::new(src.1), Be16::new(dst.1));
        FlowKey { src: src.0, dst: dst.0, src_port, dst_port, scope: vni << 8 | u32::from(protocol) }
    }

    fn flow(kind: FlowKind, incarnation: u32, stamp: u32) -> Flow<Be32> {
        Flow { kind, incarnation, stamp, ..Flow::default() }
    }

    /// Both entries of a published port's flow, the client's port rewritten on its way.
    fn mesh(protocol: u8) -> [(FlowKey<Be32>, Flow<Be32>); 2] {
        let there = key((CLIENT, 5000), (NODE, 8080), VNI_MESH_REQUEST, protocol);
        let reply = key((TASK, 80), (CLIENT, 6000), VNI, protocol);
        let ports = |flow: Flow<Be32>, port, client_port| Flow {
            port: Be16::new(port),
            client_port: Be16::new(client_port),
            ..flow
        };
        let back = Flow { addr: NODE, ..ports(flow(FlowKind::MESH_REPLY, BACKEND, NOW_S), 8080, 5000) };
        [(there, ports(flow(FlowKind::TO_BACKEND, BACKEND, NOW_S), 80, 6000)), (reply, back)]
    }

    fn judge(entries: &[(FlowKey<Be32>, Flow<Be32>)]) -> Vec<FlowKey<Be32>> {
        let living = Living { backends: [BACKEND].into(), tasks: [BACKEND, ENDING].into() };
        let mut judge = Judge::new(NOW_S, living);
        for (key, flow) in entries {
            judge.see(*key, *flow);
        }
        let doomed = judge.doomed().into_iter();
        let mut keys: Vec<_> = doomed.flat_map(|one| [Some(one.key), one.partner]).flatten().collect();
        keys.sort();
        keys.dedup();
        keys
    }

    fn sorted<const N: usize>(mut keys: [FlowKey<Be32>; N]) -> Vec<FlowKey<Be32>> {
        keys.sort();
        keys.to_vec()
    }

    #[test]
    fn a_connection_stays_however_old_until_it_was_closed_long_ago() {
        let [there, (key, reply)] = mesh(PROTO_TCP);
        for (flags, stamp, goes) in [
            (0, 0, false),
            (FLOW_CLOSED, NOW_S - TCP_CLOSED_S, false),
            (FLOW_CLOSED, NOW_S - TCP_CLOSED_S - 1, true),
        ] {
            let expected = if goes { sorted([there.0, key]) } else { vec![] };
            assert_eq!(judge(&[there, (key, Flow { flags, stamp, ..reply })]), expected, "{flags} {stamp}");
        }
    }

    #[test]
    fn a_udp_flow_goes_once_neither_side_has_spoken_for_long() {
        let [(there_key, there), (reply_key, reply)] = mesh(PROTO_UDP);
        let [old, fresh] = [NOW_S - UDP_IDLE_S - 1, NOW_S - UDP_IDLE_S];
        for (asked, answered, goes) in
            [(fresh, fresh, false), (old, fresh, false), (fresh, old, false), (old, old, true)]
        {
            let entries =
                [(reply_key, Flow { stamp: answered, ..reply }), (there_key, Flow { stamp: asked, ..there })];
            let expected = if goes { sorted([there_key, reply_key]) } else { vec![] };
            assert_eq!(judge(&entries), expected, "{asked} {answered}");
        }
        assert_eq!(judge(&[(there_key, Flow { stamp: old, ..there })]), [there_key], "never answered");
    }

    #[test]
    fn what_is_gone_takes_its_flows_along() {
        let [(there_key, there), (reply_key, reply)] = mesh(PROTO_TCP);
        let gone = |flow| Flow { incarnation: GONE, ..flow };
        assert_eq!(judge(&[(there_key, gone(there))]), [there_key]);
        assert_eq!(judge(&[(reply_key, gone(reply))]), sorted([there_key, reply_key]));
        // A task that takes no flows any more has still to answer.
        let ending = |flow| Flow { incarnation: ENDING, ..flow };
        assert_eq!(judge(&[(there_key, ending(there))]), [there_key]);
        assert_eq!(judge(&[(reply_key, ending(reply))]), []);
    }

    #[test]
    fn replies_name_the_way_there() {
        let closed = |kind, port| Flow {
            addr: VIP,
            port: Be16::new(port),
            flags: FLOW_CLOSED,
            ..flow(kind, BACKEND, 0)
        };
        let client = Be32::ipv4(10, 0, 1, 9);
        let vip = key((TASK, 80), (client, 7000), VNI, PROTO_TCP);
        let there = key((client, 7000), (VIP, 8000), VNI, PROTO_TCP);
        assert_eq!(judge(&[(vip, closed(FlowKind::VIP_REPLY, 8000))]), sorted([vip, there]));
        let own = key((TASK, 80), (GATEWAY, 7000), VNI, PROTO_TCP);
        let there = key((TASK, 7000), (VIP, 8000), VNI, PROTO_TCP);
        assert_eq!(judge(&[(own, closed(FlowKind::SELF_REPLY, 8000))]), sorted([own, there]));
    }
}
