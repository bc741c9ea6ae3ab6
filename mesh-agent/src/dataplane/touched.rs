//! What changes of the table touch of the dataplane: what is to be planned again.

use std::collections::{BTreeMap, BTreeSet};

use mesh_api::id::{ServiceId, TaskId};
use mesh_api::table::{Change, Table, TaskRecord};

/// Which parts of a table changed since it was looked at last.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Touched {
    /// Whether what services and tasks refer to changed (nodes, networks, the cluster), or the whole table.
    pub all: bool,
    /// The services that changed themselves.
    pub services: BTreeSet<ServiceId>,
    /// The tasks that changed, came or went, with their incarnations, by their service.
    pub tasks: BTreeMap<ServiceId, BTreeMap<TaskId, u32>>,
}

impl Touched {
    /// Everything.
    pub fn all() -> Self {
        Self { all: true, ..Self::default() }
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        let Self { all, services, tasks } = self;
        !all && services.is_empty() && tasks.is_empty()
    }

    /// Notes a change that `table` is about to get.
    pub fn note(&mut self, table: &Table, change: &Change) {
        if self.all {
            return;
        }
        match change {
            Change::Cluster(_)
            | Change::Node(_)
            | Change::NodeRemoved(_)
            | Change::Network(_)
            | Change::NetworkRemoved(_) => *self = Self::all(),
            Change::Service(record) => drop(self.services.insert(record.id.clone())),
            Change::ServiceRemoved(id) => drop(self.services.insert(id.clone())),
            Change::Task(record) => {
                self.note_task(record);
                // An id is one task's for good. Should it not be, the former one is looked for everywhere.
                let former = table.tasks.get(&record.id);
                let is_another = |former: &TaskRecord| {
                    former.incarnation != record.incarnation || former.service != record.service
                };
                if former.is_some_and(is_another) {
                    *self = Self::all();
                }
            }
            Change::TaskRemoved(id) => {
                if let Some(record) = table.tasks.get(id) {
                    self.note_task(record);
                }
            }
        }
    }

    /// Notes that a task is to be looked at.
    pub fn note_task(&mut self, task: &TaskRecord) {
        if !self.all {
            let tasks = self.tasks.entry(task.service.clone()).or_default();
            tasks.insert(task.id.clone(), task.incarnation);
        }
    }

    /// Adds what came later.
    pub fn merge(&mut self, later: Self) {
        if self.all || later.all {
            *self = Self::all();
            return;
        }
        let Self { all: _, services, tasks } = later;
        self.services.extend(services);
        for (service, tasks) in tasks {
            self.tasks.entry(service).or_default().extend(tasks);
        }
    }

    /// The services of which anything is to be planned again.
    pub fn service_ids(&self) -> BTreeSet<&ServiceId> {
        self.services.iter().chain(self.tasks.keys()).collect()
    }
}
