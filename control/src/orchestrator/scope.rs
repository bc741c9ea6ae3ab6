//! What a pass has to look at: what may have changed since the one before.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use mesh_api::id::{ServiceId, TaskId};
use mesh_api::table::TaskState;

use crate::model::{State, Task, WARM};

/// What a pass has to look at.
#[derive(Debug, Clone)]
pub(super) struct Scope {
    /// Services, and those that are gone and have tasks yet.
    pub(super) services: BTreeSet<ServiceId>,
    /// All tasks that wait for something else than their service: a time, another task, an address, a node, warmth.
    pub(super) open: BTreeSet<TaskId>,
    /// When services are to be looked at again though nothing has changed, ns since the epoch.
    pub(super) due_ns: BTreeMap<ServiceId, u64>,
}

impl Scope {
    /// Everything.
    pub(super) fn whole(state: &State) -> Self {
        let services = state.services.keys().chain(state.lookup.tasks_by_service.keys());
        let open = state.tasks.values().filter(|task| is_open(task));
        Self {
            services: services.cloned().collect(),
            open: open.map(|task| task.id.clone()).collect(),
            due_ns: BTreeMap::new(),
        }
    }
}

/// Whether a task waits for something else than its service.
fn is_open(task: &Task) -> bool {
    let is_warming = task.status.state == TaskState::Running && task.warmth < WARM;
    task.desired == TaskState::Ready
        || (task.is_wanted() && (task.status.state < TaskState::Assigned || is_warming))
}

/// A pass that is over, and that looked at all there was to look at.
#[derive(Debug, Clone)]
pub(super) struct Last {
    /// What it saw.
    pub(super) state: State,
    /// When it was, ns since the epoch.
    pub(super) now_ns: u64,
    /// What of that may concern the next.
    pub(super) open: BTreeSet<TaskId>,
    pub(super) due_ns: BTreeMap<ServiceId, u64>,
}

impl Last {
    /// What the next pass has to look at: it may have been followed by any commands, its own or others.
    pub(super) fn scope(self, state: &State, now_ns: u64) -> Scope {
        let Self { state: before, now_ns: then_ns, mut open, due_ns } = self;
        let same_cluster = before.cluster.as_ref().zip(state.cluster.as_ref());
        let same_cluster = same_cluster.is_some_and(|(before, cluster)| Arc::ptr_eq(before, cluster));
        let same_ground =
            same_cluster && before.nodes.ptr_eq(&state.nodes) && before.networks.ptr_eq(&state.networks);
        if !same_ground || now_ns < then_ns {
            return Scope::whole(state);
        }
        let is_due = |(_, at_ns): &(&ServiceId, &u64)| **at_ns <= now_ns;
        let mut services: BTreeSet<_> = due_ns.iter().filter(is_due).map(|(id, _)| id.clone()).collect();
        services.extend(before.services.diff(&state.services).map(|item| match item {
            DiffItem::Add(id, _) | DiffItem::Update { new: (id, _), .. } | DiffItem::Remove(id, _) => {
                id.clone()
            }
        }));
        for item in before.tasks.diff(&state.tasks) {
            let (task, is_open) = match item {
                DiffItem::Add(_, task) | DiffItem::Update { new: (_, task), .. } => (task, is_open(task)),
                DiffItem::Remove(_, task) => (task, false),
            };
            services.insert(task.service.clone());
            if is_open {
                open.insert(task.id.clone());
            } else {
                open.remove(&task.id);
            }
        }
        Scope { services, open, due_ns }
    }
}
