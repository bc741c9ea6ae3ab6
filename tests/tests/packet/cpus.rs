//! Two packets of one flow at a time, each on its own CPU: whatever the second does between two steps of the first, both
//! go where they belong.

use std::collections::BTreeSet;

use mesh_common::map::{FLOW_CLOSED, PROTO_TCP};
use mesh_common::vxlan::VNI_MESH_REQUEST;
use mesh_datapath::verdict::Action;
use shoal_tests::packet::entries::{Entries, Held};
use shoal_tests::packet::family::Family;
use shoal_tests::packet::fixtures::{self, Mesh};
use shoal_tests::packet::frames::{self, Segment};
use shoal_tests::packet::host::{self, Ended};
use shoal_tests::packet::world::{N2, PEER_N2, WEB_IFINDEX, WEB_SLOT, World};
use shoal_tests::packet::{End, Hook};

/// A flow to a task of this node, by this node or another one.
struct Case {
    flow: Mesh,
    elsewhere: bool,
}

impl Case {
    fn request(&self, segment: Segment, payload: &[u8]) -> (Hook, Vec<u8>) {
        let request = self.flow.request(segment, payload);
        if !self.elsewhere {
            return (Hook::Uplink, request.bytes());
        }
        let (from, to) = fixtures::errand(WEB_SLOT, 0, World::default().tag(N2));
        (Hook::Overlay { vni: VNI_MESH_REQUEST, from: N2 }, request.between(from, to).bytes())
    }

    fn reply(&self, segment: Segment, payload: &[u8]) -> (Hook, Vec<u8>) {
        (Hook::Task(WEB_IFINDEX), self.flow.reply(segment, payload).bytes())
    }

    fn returned(&self) -> Action {
        if self.elsewhere { Action::Tunnel { vni: 2, peer: PEER_N2, tos: 0 } } else { Action::Route }
    }
}

/// Has `second` come at each step of `first`, and says what became of them each time.
fn each_step(
    known: Entries,
    first: &(Hook, Vec<u8>),
    second: &(Hook, Vec<u8>),
) -> Vec<([Ended; 2], Entries)> {
    let world = World::knowing(known);
    let steps =
        (0..).map_while(|uses| host::run_two(&world, (first.0, &first.1), (second.0, &second.1), uses));
    steps.collect()
}

const DELIVERED: Action = Action::Deliver { ifindex: WEB_IFINDEX };

fn cases() -> impl Iterator<Item = Case> {
    [Family::V4, Family::V6].into_iter().flat_map(|f| {
        [Mesh::tcp(f), Mesh::udp(f)].into_iter().flat_map(|flow| {
            [false, true].map(|elsewhere| Case {
                flow: if elsewhere { flow.by(PEER_N2, N2) } else { flow },
                elsewhere,
            })
        })
    })
}

#[test]
fn first_acknowledgement_and_data_at_once_are_delivered() {
    for case in cases() {
        let (ack, data) = (case.request(frames::ACK, b""), case.request(frames::ACK, b"GET"));
        let steps = each_step(case.flow.answered(), &ack, &data);
        assert!(steps.len() > 2, "{} steps", steps.len());
        for (step, (ended, known)) in steps.iter().enumerate() {
            assert_eq!(
                ended.map(|ended| ended.end),
                [End::Tc(DELIVERED); 2],
                "step {step} of {:?}",
                case.flow
            );
            let places: BTreeSet<_> = known.keys().copied().collect();
            assert_eq!(places, case.flow.established_places().into(), "step {step} of {:?}", case.flow);
        }
    }
}

#[test]
fn reply_while_its_flow_is_established_goes_to_the_client() {
    for case in cases() {
        let (reply, ack) = (case.reply(frames::ACK, b"200"), case.request(frames::ACK, b""));
        let steps = each_step(case.flow.answered(), &reply, &ack);
        assert!(!steps.is_empty());
        for (step, (ended, _)) in steps.iter().enumerate() {
            let ends = ended.map(|ended| ended.end);
            assert_eq!(
                ends,
                [End::Tc(case.returned()), End::Tc(DELIVERED)],
                "step {step} of {:?}",
                case.flow
            );
        }
    }
}

#[test]
fn request_while_its_connection_is_closed_is_delivered() {
    for case in cases().filter(|case| case.flow.protocol == PROTO_TCP) {
        let fin = Segment { flags: 0x11, ..frames::ACK };
        let (request, fin) = (case.request(frames::ACK, b"bye"), case.reply(fin, b""));
        for (step, (ended, known)) in each_step(case.flow.established(), &request, &fin).iter().enumerate() {
            let ends = ended.map(|ended| ended.end);
            assert_eq!(
                ends,
                [End::Tc(DELIVERED), End::Tc(case.returned())],
                "step {step} of {:?}",
                case.flow
            );
            let [_, reply] = case.flow.established_places();
            let closed = matches!(known.get(&reply), Some(Held::Flow(flow)) if flow.flags & FLOW_CLOSED != 0);
            assert!(closed, "step {step} of {:?}", case.flow);
        }
    }
}
