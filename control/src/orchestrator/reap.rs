//! Tasks that have ended are forgotten: those to be removed at once, others when their slot has newer ones enough.
//! A slot's newest task stays, however short the history: it shows that the slot has had its last run.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::table::TaskState;

use super::pass::Pass;
use crate::command::Step;
use crate::model::{SlotKey, Task};

pub(super) fn reap(pass: &mut Pass<'_>) {
    let state = pass.draft.state.clone();
    let history = state.cluster.as_ref().map_or(0, |cluster| cluster.spec.task_history);
    for service in &pass.services.clone() {
        let mut slots: BTreeMap<SlotKey, Vec<&Arc<Task>>> = BTreeMap::new();
        for task in state.tasks_of_service(service) {
            if pass.is_full() {
                return;
            }
            let nowhere = |node| !state.nodes.contains_key(node);
            let superfluous = task.desired == TaskState::Remove
                || !state.services.contains_key(service)
                || (task.slot == 0 && task.node.as_ref().is_some_and(nowhere));
            if !superfluous {
                slots.entry(task.slot_key()).or_default().push(task);
            } else if task.has_ended() && !task.is_wanted() {
                pass.take(Step::DeleteTask { task: task.id.clone() });
            }
        }
        for mut tasks in slots.into_values().filter(|tasks| tasks.len() as u64 > history) {
            tasks.sort_by_key(|task| task.incarnation);
            let surplus = tasks.len() - history as usize;
            tasks.pop();
            let ended = tasks.into_iter().filter(|task| task.has_ended() && !task.is_wanted());
            for task in ended.take(surplus) {
                pass.take(Step::DeleteTask { task: task.id.clone() });
            }
        }
    }
}
