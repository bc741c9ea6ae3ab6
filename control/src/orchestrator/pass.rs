//! One pass of the orchestrator: a draft of the state, and the steps taken on it so far.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_api::id::{NodeId, ServiceId, TaskId};
use mesh_api::table::TaskState;

use super::Plan;
use crate::apply::Draft;
use crate::command::Step;
use crate::model::{Service, SlotKey, State, Task};

/// Steps in one command: what is left is for the next pass.
const STEPS_MAX: usize = 1000;

pub(super) struct Pass<'a> {
    before: State,
    pub(super) draft: Draft,
    pub(super) now_ns: u64,
    /// The services to look at: those of its scope, and those of tasks that it has changed.
    pub(super) services: BTreeSet<ServiceId>,
    open: BTreeSet<TaskId>,
    steps: Vec<Step>,
    wake_at_ns: Option<u64>,
    ids: &'a mut dyn FnMut() -> TaskId,
}

impl<'a> Pass<'a> {
    pub(super) fn new(
        state: &State,
        now_ns: u64,
        services: BTreeSet<ServiceId>,
        open: BTreeSet<TaskId>,
        ids: &'a mut dyn FnMut() -> TaskId,
    ) -> Self {
        let draft = Draft::new(state.clone(), state.index + 1, now_ns);
        let before = state.clone();
        Self { before, draft, now_ns, services, open, steps: Vec::new(), wake_at_ns: None, ids }
    }

    pub(super) fn take(&mut self, step: Step) {
        if let Step::CreateTask { id, .. } = &step {
            self.open.insert(id.clone());
        }
        if let Some(task) = step.task().and_then(|id| self.draft.state.tasks.get(id)) {
            self.services.insert(task.service.clone());
        }
        self.draft.step(&step);
        self.steps.push(step);
    }

    /// The tasks that wait for something else than their service, in order of their ids.
    pub(super) fn open_tasks(&self) -> Vec<Arc<Task>> {
        self.open.iter().filter_map(|id| self.draft.state.tasks.get(id)).cloned().collect()
    }

    pub(super) fn set_desired(&mut self, task: &Task, desired: TaskState) {
        if task.desired < desired {
            self.take(Step::SetDesired { task: task.id.clone(), desired });
        }
    }

    /// Makes a task for a place in a service, held back as `hold` says.
    pub(super) fn create_task(
        &mut self,
        service: &Service,
        key: &SlotKey,
        hold: Hold,
        restarts_ns: Vec<u64>,
    ) {
        let Hold { until_ns, after } = hold;
        let (slot, node): (u64, Option<NodeId>) = match key {
            SlotKey::Replica(slot) => (*slot, None),
            SlotKey::Node(node) => (0, Some(node.clone())),
        };
        let waits = until_ns > self.now_ns || after.is_some();
        let id = (self.ids)();
        self.take(Step::CreateTask {
            id,
            service: service.id.clone(),
            spec_version: service.spec_version,
            slot,
            node,
            desired: if waits { TaskState::Ready } else { TaskState::Running },
            start_at_ns: until_ns,
            start_after: after,
            restarts_ns,
        });
    }

    /// Asks for another pass at `at_ns`.
    pub(super) fn wake(&mut self, at_ns: u64) {
        self.wake_at_ns = Some(self.wake_at_ns.map_or(at_ns, |earlier| earlier.min(at_ns)));
    }

    /// When `look` asks for another pass; the pass itself does not wake for it.
    pub(super) fn waking(&mut self, look: impl FnOnce(&mut Self)) -> Option<u64> {
        let others = self.wake_at_ns.take();
        look(self);
        std::mem::replace(&mut self.wake_at_ns, others)
    }

    /// Enough for one command.
    pub(super) fn is_full(&self) -> bool {
        self.steps.len() >= STEPS_MAX
    }

    /// The node exists, and the managers have not given up on it.
    pub(super) fn is_node_up(&self, node: &NodeId) -> bool {
        self.draft.state.nodes.get(node).is_some_and(|node| !node.is_down())
    }

    pub(super) fn into_plan(self) -> Plan {
        let Self { before, draft, steps, wake_at_ns, .. } = self;
        // Steps without any effect would be found again at once, for ever.
        let idle = before.tasks.ptr_eq(&draft.state.tasks) && before.services.ptr_eq(&draft.state.services);
        Plan { steps: if idle { Vec::new() } else { steps }, wake_at_ns }
    }
}

/// What a new task waits for.
#[derive(Debug, Clone, Default)]
pub(super) struct Hold {
    /// A time, ns since the epoch.
    pub(super) until_ns: u64,
    /// The end of another task.
    pub(super) after: Option<TaskId>,
}
