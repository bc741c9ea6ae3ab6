//! Which of this node's tasks to start, drain, stop and forget: a pure function of the table and of what runs.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_api::id::{NodeId, TaskId};
use mesh_api::table::{Table, TaskState};
use tokio::time::Instant;

/// How long a task that is to stop is kept for the cluster's word that nobody sends it new flows.
pub(crate) const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a task is kept once nobody sends it new flows. What was dialled just before is still on its way then: a client
/// that is a round trip of this away has its request arrive that long after the packet that opened the flow. Few programs
/// answer what they have not read by their stop signal.
pub(crate) const DRAIN_MIN: Duration = Duration::from_millis(300);

/// How far a task is on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Its namespaces, links or program are being made.
    Starting,
    /// Its program runs.
    Running,
    /// It has been told to stop.
    Stopping,
    /// It has ended, and its end is reported.
    Ended,
}

/// A task that is to stop, waiting for the cluster to send it no new flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Drain {
    /// The table index that said so.
    pub(crate) index: u64,
    /// When this node saw it.
    pub(crate) since: Instant,
    /// When this node saw that nobody sends the task new flows any longer, itself included.
    pub(crate) settled: Option<Instant>,
}

/// A task on this node, as far as the plan goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TaskView {
    /// How far it is.
    pub(crate) phase: Phase,
    /// Whether it is draining.
    pub(crate) drain: Option<Drain>,
}

/// What to do about a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TaskAction {
    /// Start it.
    Start(TaskId),
    /// Report that it has shut down: it was to stop before it ever ran here.
    Decline(TaskId),
    /// Note that it is to stop.
    Drain(TaskId),
    /// Stop it.
    Stop(TaskId),
    /// Clear it away: the managers know of its end.
    Forget(TaskId),
}

/// What to do about the tasks of `node`, which in the table are `assigned`, given those that it has.
pub(crate) fn plan_tasks<'a>(
    table: &Table,
    node: &NodeId,
    assigned: impl IntoIterator<Item = &'a TaskId>,
    local: &BTreeMap<TaskId, TaskView>,
    now: Instant,
) -> Vec<TaskAction> {
    let mut actions = Vec::new();
    let missing = assigned.into_iter().filter(|id| !local.contains_key(*id));
    for task in missing.filter_map(|id| table.tasks.get(id)).filter(|task| task.node == *node) {
        if task.observed.is_terminal() {
            continue;
        }
        actions.push(match task.desired {
            TaskState::Running if task.spec.is_some() => TaskAction::Start(task.id.clone()),
            desired if desired.is_terminal() => TaskAction::Decline(task.id.clone()),
            // Not to be started yet; or the copy of another node's table, without the specification.
            _ => continue,
        });
    }
    for (id, view) in local {
        let desired = table.tasks.get(id).filter(|task| task.node == *node).map(|task| task.desired);
        match (view.phase, desired) {
            (Phase::Ended, None) => actions.push(TaskAction::Forget(id.clone())),
            (Phase::Ended | Phase::Stopping, _) => {}
            (Phase::Starting | Phase::Running, Some(desired)) if !desired.is_terminal() => {}
            (Phase::Starting | Phase::Running, _) => match view.drain {
                None => actions.push(TaskAction::Drain(id.clone())),
                Some(drain) if drain.is_over(now) => actions.push(TaskAction::Stop(id.clone())),
                Some(_) => {}
            },
        }
    }
    actions
}

impl Drain {
    /// Of a task that is to stop by the table with `index`.
    pub(crate) fn new(index: u64, since: Instant) -> Self {
        Self { index, since, settled: None }
    }

    /// Notes the index that this node and the others have `settled` on by `now`.
    pub(crate) fn note(&mut self, settled: u64, now: Instant) {
        if settled >= self.index {
            self.settled.get_or_insert(now);
        }
    }

    /// Whether what was sent to the task has had its time, or the cluster has been waited for long enough.
    fn is_over(&self, now: Instant) -> bool {
        now >= self.deadline()
    }

    /// When the wait ends without news.
    pub(crate) fn deadline(&self) -> Instant {
        let without_word = self.since + DRAIN_TIMEOUT;
        self.settled.map_or(without_word, |settled| without_word.min(settled + DRAIN_MIN))
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::table::{ClusterRecord, ReturnPath, TaskRecord, TaskSpec, WEIGHT_MAX};

    use super::*;

    fn task(id: &str, node: &str, desired: TaskState, observed: TaskState) -> TaskRecord {
        let spec = TaskSpec {
            image: "shoal/whoami".to_owned(),
            command: vec![],
            args: vec![],
            env: vec![],
            dir: String::new(),
            user: String::new(),
            hostname: String::new(),
            stop_grace_ns: 0,
            stop_signal: String::new(),
            service_name: String::new(),
            egress: Vec::new(),
        };
        TaskRecord {
            id: id.into(),
            name: format!("s.1.{id}").into(),
            service: "s".into(),
            slot: 1,
            node: node.into(),
            incarnation: 1,
            desired,
            observed,
            weight: WEIGHT_MAX,
            endpoints: Box::default(),
            spec: (node == "here").then(|| Box::new(spec)),
        }
    }

    struct Case {
        record: Option<TaskRecord>,
        view: Option<(Phase, Option<Drain>)>,
        waited: Duration,
        expected: Option<fn(TaskId) -> TaskAction>,
    }

    #[test]
    fn every_task_gets_what_its_place_in_the_table_and_its_phase_call_for() {
        use Phase::{Ended, Running, Starting, Stopping};
        use TaskState as State;
        let start = Instant::now();
        let here = |desired, observed| Some(task("t", "here", desired, observed));
        let draining = |phase| Some((phase, Some(Drain::new(9, start))));
        let heard = |words: &[(u64, u64)]| {
            let mut drain = Drain::new(9, start);
            for (settled, ms) in words {
                drain.note(*settled, start + Duration::from_millis(*ms));
            }
            Some((Running, Some(drain)))
        };
        let case = |record, view, waited, expected: Option<fn(TaskId) -> TaskAction>| Case {
            record,
            view,
            waited: Duration::from_millis(waited),
            expected,
        };
        let running = here(State::Running, State::Running);
        let shutdown = here(State::Shutdown, State::Running);
        let cases = [
            case(here(State::Running, State::Assigned), None, 0, Some(TaskAction::Start)),
            case(here(State::Running, State::Failed), None, 0, None),
            case(here(State::Ready, State::Assigned), None, 0, None),
            case(Some(task("t", "there", State::Running, State::Assigned)), None, 0, None),
            case(here(State::Shutdown, State::Assigned), None, 0, Some(TaskAction::Decline)),
            case(here(State::Remove, State::Shutdown), None, 0, None),
            case(running.clone(), Some((Starting, None)), 0, None),
            case(running.clone(), Some((Running, None)), 0, None),
            case(running, Some((Ended, None)), 0, None),
            case(shutdown.clone(), Some((Starting, None)), 0, Some(TaskAction::Drain)),
            case(shutdown.clone(), Some((Running, None)), 0, Some(TaskAction::Drain)),
            case(shutdown.clone(), draining(Running), 4_999, None),
            case(shutdown.clone(), draining(Running), 5_000, Some(TaskAction::Stop)),
            case(shutdown.clone(), heard(&[(8, 0)]), 4_999, None),
            case(shutdown.clone(), heard(&[(9, 0)]), 299, None),
            case(shutdown.clone(), heard(&[(9, 0), (12, 200)]), 300, Some(TaskAction::Stop)),
            // The time begins with the word.
            case(shutdown.clone(), heard(&[(8, 0), (12, 1_000)]), 1_299, None),
            case(shutdown.clone(), heard(&[(8, 0), (12, 1_000)]), 1_300, Some(TaskAction::Stop)),
            case(shutdown.clone(), heard(&[(9, 4_900)]), 4_999, None),
            case(shutdown.clone(), heard(&[(9, 4_900)]), 5_000, Some(TaskAction::Stop)),
            case(shutdown.clone(), draining(Stopping), 5_000, None),
            case(shutdown, draining(Ended), 5_000, None),
            case(None, Some((Running, None)), 0, Some(TaskAction::Drain)),
            case(None, heard(&[(9, 0)]), 300, Some(TaskAction::Stop)),
            case(None, Some((Ended, None)), 0, Some(TaskAction::Forget)),
            // The same id on another node is not this node's task.
            case(
                Some(task("t", "there", State::Running, State::Running)),
                Some((Ended, None)),
                0,
                Some(TaskAction::Forget),
            ),
        ];
        for (number, case) in cases.into_iter().enumerate() {
            let mut table = Table::new(ClusterRecord {
                id: "c".into(),
                hash_seed: 0,
                data_path_port: 4789,
                return_path: ReturnPath::Tunnel,
                key_epoch: 0,
            });
            table.tasks.extend(case.record.map(|record| (record.id.clone(), record)));
            let local = case.view.map(|(phase, drain)| (TaskId::from("t"), TaskView { phase, drain }));
            let local = local.into_iter().collect();
            let (node, ids) = ("here".into(), table.tasks.keys());
            let actions = plan_tasks(&table, &node, ids, &local, start + case.waited);
            let expected: Vec<_> = case.expected.map(|action| action("t".into())).into_iter().collect();
            assert_eq!(actions, expected, "case {number}");
        }
    }
}
