//! What must hold all the time, whoever looks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use mesh_api::id::{NetworkId, NodeId};
use mesh_api::table::{PublishMode, Table};
use openraft::CommittedLeaderId;

use crate::model::State;
use crate::raft::{LogId, RaftId, Replica};
use crate::session::view;
use crate::testing::World;

/// Who has an address: a task, or a service as its VIP.
type Holders = BTreeMap<(NetworkId, Ipv4Addr), String>;

/// What a node's dataplane sends by.
#[derive(Debug, Default)]
struct Dataplane {
    index: u64,
    holders: Holders,
}

#[derive(Debug, Default)]
struct Seen {
    /// The leader whose entry is applied at an index: its term, and which of the members it is.
    entries: BTreeMap<u64, CommittedLeaderId<RaftId>>,
    /// The state at an index.
    states: BTreeMap<u64, State>,
    /// The last index at which a node was given up.
    down: BTreeMap<NodeId, u64>,
    /// The index of the last table that a node took.
    tables: BTreeMap<NodeId, u64>,
    dataplanes: BTreeMap<NodeId, Dataplane>,
    /// Tables that were compared with the state of their index.
    compared: u64,
    /// What looks at states.
    world: Option<World>,
    wrong: Vec<String>,
}

/// Watches all members.
#[derive(Debug, Clone, Default)]
pub(super) struct Observer {
    seen: Arc<Mutex<Seen>>,
}

impl Observer {
    /// Watches a member as long as it runs.
    pub(super) fn watch(&self, replica: &Replica) {
        let (id, seen) = (replica.id(), Arc::clone(&self.seen));
        let mut metrics = replica.inner.metrics.clone();
        tokio::spawn(async move {
            loop {
                let now = metrics.borrow_and_update().clone();
                if let Some(last) = now.last_applied {
                    seen.lock().unwrap().entry(id, last);
                }
                if metrics.changed().await.is_err() {
                    return;
                }
            }
        });
        let (mut states, seen) = (replica.state(), Arc::clone(&self.seen));
        tokio::spawn(async move {
            let mut last = 0;
            loop {
                let state = states.borrow_and_update().clone();
                seen.lock().unwrap().state(id, last, &state);
                last = state.index;
                if states.changed().await.is_err() {
                    return;
                }
            }
        });
        let (mut applied, seen) = (replica.inner.applied.clone(), Arc::clone(&self.seen));
        tokio::spawn(async move {
            let mut last = None;
            loop {
                let now = *applied.borrow_and_update();
                if now < last {
                    seen.lock().unwrap().wrong.push(format!("{id} went back from {last:?} to {now:?}"));
                }
                last = now;
                if applied.changed().await.is_err() {
                    return;
                }
            }
        });
    }

    /// A node has taken a table.
    pub(super) fn took(&self, node: &NodeId, table: &Table) {
        self.seen.lock().unwrap().took(node, table);
    }

    /// A node sends by a table from here on.
    pub(super) fn applied(&self, node: &NodeId, table: &Table) {
        let dataplane = Dataplane { index: table.index, holders: in_table(table) };
        let mut seen = self.seen.lock().unwrap();
        let former = seen.dataplanes.insert(node.clone(), dataplane);
        if let Some(former) = former.filter(|former| former.index > table.index) {
            seen.wrong.push(format!("{node} went back from {} to {}", former.index, table.index));
        }
    }

    /// Whether a node has ever had a table.
    pub(super) fn has_table(&self, node: &NodeId) -> bool {
        self.seen.lock().unwrap().tables.contains_key(node)
    }

    /// Tables that were compared with the state of their index.
    pub(super) fn compared(&self) -> u64 {
        self.seen.lock().unwrap().compared
    }

    /// Notes that something is wrong.
    pub(super) fn wrong(&self, what: String) {
        self.seen.lock().unwrap().wrong.push(what);
    }

    /// Fails where anything was wrong.
    #[track_caller]
    pub(super) fn check(&self) {
        let seen = self.seen.lock().unwrap();
        assert!(seen.wrong.is_empty(), "{:#?}", seen.wrong);
    }
}

impl Seen {
    /// openraft orders leaders by term and member, and a term may have several, one after the other: what must not be is
    /// that two of them decide on one entry, or that an earlier leader's comes after a later one's.
    fn entry(&mut self, id: RaftId, applied: LogId) {
        let LogId { leader_id, index } = applied;
        let decided = *self.entries.entry(index).or_insert(leader_id);
        if decided != leader_id {
            self.wrong.push(format!("entry {index} is {decided}'s and, on {id}, {leader_id}'s"));
        }
        let before = self.entries.range(..index).next_back().filter(|(_, before)| **before > leader_id);
        let after = self.entries.range(index + 1..).next().filter(|(_, after)| **after < leader_id);
        if let Some((other, leader)) = before.or(after) {
            self.wrong.push(format!("entry {index} on {id} is {leader_id}'s, and entry {other} {leader}'s"));
        }
    }

    fn state(&mut self, id: RaftId, last: u64, state: &State) {
        if state.index < last {
            self.wrong.push(format!("the state of {id} went back from {last} to {}", state.index));
        }
        match self.states.get(&state.index) {
            Some(other) if other == state => {}
            Some(other) => {
                self.wrong.push(format!("two states at {}: {state:#?} on {id}, and {other:#?}", state.index));
            }
            None => {
                let is_latest = self.states.last_key_value().is_none_or(|(last, _)| *last < state.index);
                if is_latest {
                    self.given(state);
                }
                self.states.insert(state.index, state.clone());
                let world = self.world.get_or_insert_with(|| World::new(&[]));
                world.state = state.clone();
                // No address, port or VNI is given twice, among other things.
                if catch_unwind(AssertUnwindSafe(|| world.check_invariants())).is_err() {
                    self.wrong.push(format!("the state at {} on {id} is wrong in itself", state.index));
                }
            }
        }
    }

    /// What the state that follows the last one gives out must not be another's to any node that was not given up since it
    /// took the table that says so.
    fn given(&mut self, state: &State) {
        let before = self.states.last_key_value().map(|(_, before)| in_state(before)).unwrap_or_default();
        for node in state.nodes.values().filter(|node| node.is_down()) {
            self.down.insert(node.id.clone(), state.index);
        }
        for (key, holder) in in_state(state) {
            if before.get(&key) == Some(&holder) {
                continue;
            }
            for (node, Dataplane { index, holders }) in &self.dataplanes {
                let is_live = state.nodes.get(node).is_some_and(|node| !node.is_down());
                let was_given_up = self.down.get(node).is_some_and(|down| down >= index);
                if let Some(former) = holders.get(&key).filter(|former| **former != holder)
                    && is_live
                    && !was_given_up
                {
                    let (network, addr) = &key;
                    self.wrong.push(format!(
                        "{addr} in {network} is {holder}'s at {}, and {node} sends to {former} by it since {index}",
                        state.index
                    ));
                }
            }
        }
    }

    fn took(&mut self, node: &NodeId, table: &Table) {
        let last = self.tables.insert(node.clone(), table.index).unwrap_or(0);
        if table.index < last {
            self.wrong.push(format!("the table of {node} went back from {last} to {}", table.index));
        }
        if let Some(state) = self.states.get(&table.index) {
            self.compared += 1;
            if view::table(state, node).as_ref() != Some(table) {
                self.wrong
                    .push(format!("the table of {node} at {} is not what the managers have", table.index));
            }
        }
        let mut ports = BTreeSet::new();
        let published = table.services.values().flat_map(|service| &service.ports);
        for port in published.filter(|port| port.mode == PublishMode::Ingress) {
            if !ports.insert((port.protocol, port.published)) {
                self.wrong.push(format!("port {} is published twice in the table of {node}", port.published));
            }
        }
        let tasks = table.tasks.values().map(|task| task.endpoints.len());
        let vips = table
            .services
            .values()
            .map(|service| service.vips.iter().filter(|vip| vip.addr.is_some()).count());
        if in_table(table).len() != tasks.sum::<usize>() + vips.sum::<usize>() {
            self.wrong.push(format!("an address is given twice in the table of {node} at {}", table.index));
        }
    }
}

fn in_table(table: &Table) -> Holders {
    let tasks = table.tasks.values().flat_map(|task| {
        let endpoint = |endpoint: &mesh_api::table::EndpointRecord| (endpoint.network.clone(), endpoint.addr);
        task.endpoints.iter().map(endpoint).map(|key| (key, task.id.to_string()))
    });
    let vips = table.services.values().flat_map(|service| {
        let key = |vip: &mesh_api::table::VipRecord| Some((vip.network.clone(), vip.addr?));
        service.vips.iter().filter_map(key).map(|key| (key, service.id.to_string()))
    });
    tasks.chain(vips).collect()
}

fn in_state(state: &State) -> Holders {
    let tasks = state.tasks.values().filter(|task| !task.has_ended()).flat_map(|task| {
        let key = |endpoint: &crate::model::TaskEndpoint| Some((endpoint.network.clone(), endpoint.addr?));
        task.endpoints.iter().filter_map(key).map(|key| (key, task.id.to_string()))
    });
    let vips = state.services.values().flat_map(|service| {
        let key = |vip: &crate::model::Vip| Some((vip.network.clone(), vip.addr?));
        service.endpoint.vips.iter().filter_map(key).map(|key| (key, service.id.to_string()))
    });
    tasks.chain(vips).collect()
}
