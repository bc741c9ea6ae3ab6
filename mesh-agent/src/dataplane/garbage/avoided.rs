//! UDP flows to tasks that get nothing new, because their nodes don't answer: without an entry, the next datagram goes
//! where new flows go. Connections keep theirs: a node may be back before they give up.

use std::collections::HashSet;
use std::path::Path;

use aya::Pod;
use mesh_common::addr::{Address, Ip6};
use mesh_common::be::Be32;
use mesh_common::map::{Flow, FlowKey, FlowKind, PROTO_UDP, Sent};

use super::super::error::DataplaneError;
use super::super::layout::Avoided;
use super::super::map::PinnedMap;

/// The maps that have entries of flows to other nodes' tasks.
#[derive(Debug)]
pub(super) struct Datagrams {
    v4: FamilyMaps,
    v6: FamilyMaps,
}

/// Those of one family.
#[derive(Debug)]
struct FamilyMaps {
    /// Of published ports.
    sent: PinnedMap,
    /// Of VIPs, at either stage.
    flows: [PinnedMap; 2],
}

impl Datagrams {
    /// Opens the maps that are pinned in `folder`.
    pub(super) fn open(folder: &Path) -> Result<Self, DataplaneError> {
        Ok(Self {
            v4: FamilyMaps::open::<Be32>(folder, ["shoal_sent4", "shoal_opening4", "shoal_flows4"])?,
            v6: FamilyMaps::open::<Ip6>(folder, ["shoal_sent6", "shoal_opening6", "shoal_flows6"])?,
        })
    }

    /// Removes the entries that lead to `avoided` backends, and says how many those were.
    pub(super) fn forget(&self, avoided: &HashSet<Avoided>) -> Result<usize, DataplaneError> {
        Ok(self.v4.forget::<Be32>(avoided)? + self.v6.forget::<Ip6>(avoided)?)
    }
}

impl FamilyMaps {
    fn open<A: Address + Pod>(folder: &Path, names: [&'static str; 3]) -> Result<Self, DataplaneError> {
        let [sent, opening, established] = names;
        let flows = |name| PinnedMap::open::<FlowKey<A>, Flow<A>>(folder, name);
        Ok(Self {
            sent: PinnedMap::open::<FlowKey<A>, Sent>(folder, sent)?,
            flows: [flows(opening)?, flows(established)?],
        })
    }

    fn forget<A: Address + Pod>(&self, avoided: &HashSet<Avoided>) -> Result<usize, DataplaneError> {
        let of_sent =
            |sent: &Sent| avoided.contains(&Avoided { slot: sent.backend, incarnation: sent.incarnation });
        let of_flow = |flow: &Flow<A>| {
            flow.kind == FlowKind::TO_BACKEND
                && avoided.contains(&Avoided { slot: flow.backend, incarnation: flow.incarnation })
        };
        let mut removed = remove::<A, Sent>(&self.sent, of_sent)?;
        for flows in &self.flows {
            removed += remove::<A, Flow<A>>(flows, of_flow)?;
        }
        Ok(removed)
    }
}

/// Removes a map's UDP entries whose values are such ones.
fn remove<A: Address + Pod, V: Pod + Default>(
    map: &PinnedMap,
    is_such: impl Fn(&V) -> bool,
) -> Result<usize, DataplaneError> {
    let mut keys = Vec::new();
    map.read(|key: FlowKey<A>, value: V| {
        if key.protocol() == PROTO_UDP && is_such(&value) {
            keys.push(key);
        }
    })?;
    let mut removed = 0;
    for key in keys {
        // It may be another flow's by now.
        removed += usize::from(map.remove_if(&key, &is_such)?);
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use aya::maps::{HashMap, MapData};
    use mesh_common::be::Be16;
    use mesh_common::map::PROTO_TCP;

    use super::super::super::tables::tests::on_bpffs;
    use super::*;

    fn make<A: Address + Pod>(folder: &Path, names: [&str; 3]) {
        let [sent, opening, established] = names;
        HashMap::<MapData, FlowKey<A>, Sent>::create(64, 0).unwrap().pin(folder.join(sent)).unwrap();
        for name in [opening, established] {
            HashMap::<MapData, FlowKey<A>, Flow<A>>::create(64, 0).unwrap().pin(folder.join(name)).unwrap();
        }
    }

    #[test]
    fn only_datagrams_to_avoided_backends_choose_anew() {
        on_bpffs(|folder| {
            make::<Be32>(folder, ["shoal_sent4", "shoal_opening4", "shoal_flows4"]);
            make::<Ip6>(folder, ["shoal_sent6", "shoal_opening6", "shoal_flows6"]);
            let datagrams = Datagrams::open(folder).unwrap();
            let key = |client: u16, protocol: u8| FlowKey::<Ip6> {
                src_port: Be16::new(client),
                scope: 1 << 8 | u32::from(protocol),
                ..FlowKey::default()
            };
            // Avoided; another in the same slot, later; one that is not avoided.
            let backends = [(7, 70), (7, 71), (8, 80)];
            let avoided = HashSet::from([Avoided { slot: 7, incarnation: 70 }]);
            let mut client = 0;
            for ((backend, incarnation), protocol) in
                backends.into_iter().flat_map(|backend| [(backend, PROTO_UDP), (backend, PROTO_TCP)])
            {
                client += 1;
                let sent = Sent { backend, incarnation, stamp: 5 };
                datagrams.v6.sent.write(&[(key(client, protocol), sent)]).unwrap();
                let flow =
                    Flow::<Ip6> { backend, incarnation, kind: FlowKind::TO_BACKEND, ..Flow::default() };
                // The way back names the same task, by its slot 0.
                let reply = Flow { backend: 0, kind: FlowKind::VIP_REPLY, ..flow };
                for flows in &datagrams.v6.flows {
                    flows
                        .write(&[(key(client, protocol), flow), (key(client + 100, protocol), reply)])
                        .unwrap();
                }
            }
            assert_eq!(datagrams.forget(&avoided).unwrap(), 3);
            assert_eq!(datagrams.forget(&avoided).unwrap(), 0);
            let mut sent = Vec::new();
            datagrams.v6.sent.read(|key: FlowKey<Ip6>, _: Sent| sent.push(key.src_port.get())).unwrap();
            sent.sort_unstable();
            assert_eq!(sent, [2, 3, 4, 5, 6]);
            for flows in &datagrams.v6.flows {
                let mut left = Vec::new();
                flows.read(|key: FlowKey<Ip6>, _: Flow<Ip6>| left.push(key.src_port.get())).unwrap();
                left.sort_unstable();
                assert_eq!(left, [2, 3, 4, 5, 6, 101, 102, 103, 104, 105, 106]);
            }
        });
    }
}
