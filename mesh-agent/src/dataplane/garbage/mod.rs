//! Removing flows that nobody needs any more, every few seconds, and those that lead where nobody answers.
//!
//! The tables of flows are of the kind that forgets what was used least recently, so nothing breaks without this; but a
//! flow that has ended would take the place of a live one, and a port used again would find it.

mod avoided;
mod judge;

use std::collections::HashSet;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use aya::Pod;
use mesh_common::addr::{Address, Ip6};
use mesh_common::be::Be32;
use mesh_common::map::{AddrKey, Endpoint, Flow, FlowKey, TaskKey, TaskSlots};

use self::avoided::Datagrams;
use self::judge::{Doomed, Judge, Living};
use super::error::DataplaneError;
use super::layout::Avoided;
use super::map::PinnedMap;
use crate::sys::clock::monotonic_s;

/// How often flows are looked at.
const PERIOD: Duration = Duration::from_secs(10);

/// What looks at the flows; it ends when dropped.
#[derive(Debug)]
pub(super) struct Collector {
    avoided: HashSet<Avoided>,
    /// The loop ends with it.
    news: Sender<HashSet<Avoided>>,
}

impl Collector {
    /// Starts to look at the flows in the maps that are pinned in `folder`.
    pub(super) fn start(folder: &Path) -> Result<Self, DataplaneError> {
        let v4 = FamilyFlows::open::<Be32>(folder, ["shoal_flows4", "shoal_tasks4", "shoal_endpts4"])?;
        let v6 = FamilyFlows::open::<Ip6>(folder, ["shoal_flows6", "shoal_tasks6", "shoal_endpts6"])?;
        let datagrams = Datagrams::open(folder)?;
        let (news, heard) = mpsc::channel();
        let run = move || {
            let (mut avoided, mut collect_at) = (HashSet::new(), Instant::now() + PERIOD);
            loop {
                match heard.recv_timeout(collect_at.saturating_duration_since(Instant::now())) {
                    Ok(backends) => avoided = backends,
                    Err(RecvTimeoutError::Timeout) => {
                        collect_at = Instant::now() + PERIOD;
                        tell(v4.collect::<Be32>(), "flows that have ended");
                        tell(v6.collect::<Ip6>(), "flows that have ended");
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                // Time and again: a packet that was on its way may have written its entry back.
                if !avoided.is_empty() {
                    tell(datagrams.forget(&avoided), "UDP flows to tasks whose nodes don't answer");
                }
            }
        };
        let spawned = thread::Builder::new().name("shoal-flows".to_owned()).spawn(run);
        spawned.map_err(|source| DataplaneError::Thread { source })?;
        Ok(Self { avoided: HashSet::new(), news })
    }

    /// Has UDP flows to these backends choose anew, from now on until it is told otherwise. The maps are to give them no
    /// new flows already.
    pub(super) fn avoid(&mut self, backends: HashSet<Avoided>) {
        if backends != self.avoided {
            self.avoided.clone_from(&backends);
            let _ = self.news.send(backends);
        }
    }
}

/// Says how a look at the flows ended: how many were removed, and what these were.
fn tell(removed: Result<usize, DataplaneError>, what: &str) {
    match removed {
        Ok(0) => {}
        Ok(removed) => tracing::debug!(removed, "{what}"),
        Err(error) => tracing::warn!(%error, "can't look after the flows"),
    }
}

/// The maps of one family that this takes.
#[derive(Debug)]
struct FamilyFlows {
    flows: PinnedMap,
    tasks: PinnedMap,
    endpoints: PinnedMap,
}

impl FamilyFlows {
    fn open<A: Address + Pod>(folder: &Path, names: [&'static str; 3]) -> Result<Self, DataplaneError> {
        let [flows, tasks, endpoints] = names;
        Ok(Self {
            flows: PinnedMap::open::<FlowKey<A>, Flow<A>>(folder, flows)?,
            tasks: PinnedMap::open::<TaskKey, TaskSlots>(folder, tasks)?,
            endpoints: PinnedMap::open::<AddrKey<A>, Endpoint>(folder, endpoints)?,
        })
    }

    /// Removes what is to go, and says how many entries that were.
    fn collect<A: Address + Pod>(&self) -> Result<usize, DataplaneError> {
        let mut flows = Vec::new();
        self.flows.read(|key: FlowKey<A>, flow: Flow<A>| flows.push((key, flow)))?;
        // After the flows: whoever has one and is not among the living is gone, and not just new.
        let mut living = Living { backends: HashSet::new(), tasks: HashSet::new() };
        self.tasks.read(|key: TaskKey, _: TaskSlots| {
            living.backends.insert(key.incarnation);
        })?;
        self.endpoints.read(|_: AddrKey<A>, value: Endpoint| {
            living.tasks.insert(value.incarnation);
        })?;
        let mut judge = Judge::new(monotonic_s(), living);
        for (key, flow) in flows {
            judge.see(key, flow);
        }
        let mut removed = 0;
        for Doomed { key, flow, partner } in judge.doomed() {
            // A packet may have come meanwhile, of the same connection or of another one from the same port.
            if !self.flows.remove_if(&key, |there: &Flow<A>| *there == flow)? {
                continue;
            }
            removed += 1;
            // The client's end of a former task's connection may have come again, and be with another task.
            if let Some(partner) = partner {
                let of_same_task = |there: &Flow<A>| there.incarnation == flow.incarnation;
                removed += usize::from(self.flows.remove_if(&partner, of_same_task)?);
            }
        }
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use aya::maps::{HashMap, MapData};
    use mesh_common::be::Be16;
    use mesh_common::map::{FLOW_CLOSED, FlowKind, PROTO_TCP};
    use mesh_common::vxlan::VNI_MESH_REQUEST;

    use super::super::tables::tests::on_bpffs;
    use super::*;

    #[test]
    fn an_ended_connection_goes_from_the_kernels_table_and_a_live_one_stays() {
        on_bpffs(|folder| {
            let flows = HashMap::<MapData, FlowKey<Be32>, Flow<Be32>>::create(1024, 0).unwrap();
            flows.pin(folder.join("shoal_flows4")).unwrap();
            let family =
                FamilyFlows::open::<Be32>(folder, ["shoal_flows4", "shoal_tasks4", "shoal_endpts4"]).unwrap();
            let endpoint = Endpoint { incarnation: 1, ..Endpoint::default() };
            family.endpoints.write(&[(AddrKey::<Be32>::default(), endpoint)]).unwrap();
            family.tasks.write(&[(TaskKey { incarnation: 1, vni: 9 }, TaskSlots::default())]).unwrap();
            let pair = |client: u16, flags| {
                let scope = |vni: u32| vni << 8 | u32::from(PROTO_TCP);
                let port = Be16::new(client);
                let there = FlowKey { src_port: port, scope: scope(VNI_MESH_REQUEST), ..FlowKey::default() };
                let back = FlowKey { dst_port: port, scope: scope(9), ..FlowKey::default() };
                let flow = Flow { incarnation: 1, client_port: port, flags, ..Flow::default() };
                [
                    (there, Flow { kind: FlowKind::TO_BACKEND, ..flow }),
                    (back, Flow { kind: FlowKind::MESH_REPLY, ..flow }),
                ]
            };
            let (ended, live) = (pair(1000, FLOW_CLOSED), pair(1001, 0));
            // What is left of a connection to a former task, by the same client's port to the same address.
            let (back, flow) = live[1];
            let former = (FlowKey { src: Be32::ipv4(10, 0, 0, 9), ..back }, Flow { incarnation: 2, ..flow });
            family.flows.write(&[ended, live].concat()).unwrap();
            family.flows.write(&[former]).unwrap();
            assert!(monotonic_s() > mesh_common::map::TCP_CLOSED_S, "the machine has just started");
            assert_eq!(family.collect::<Be32>().unwrap(), 3);
            let mut left = Vec::new();
            family.flows.read(|key: FlowKey<Be32>, flow: Flow<Be32>| left.push((key, flow))).unwrap();
            left.sort();
            let mut expected = live.to_vec();
            expected.sort();
            assert_eq!(left, expected);
        });
    }
}
