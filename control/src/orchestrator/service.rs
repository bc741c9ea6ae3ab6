//! Each service gets the tasks it asks for: a number of replicas, or one on each node that fits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_api::id::NodeId;
use mesh_api::table::TaskState;

use super::pass::{Hold, Pass};
use super::restart::{node_keeps, restart};
use super::slot::{Slot, slots};
use crate::model::constraint::parse_all;
use crate::model::{Mode, Service, SlotKey, Task};

/// Tasks whose service is gone go too.
pub(super) fn drop_tasks_of_removed_services(pass: &mut Pass<'_>) {
    let state = pass.draft.state.clone();
    let removed: Vec<_> =
        pass.services.iter().filter(|id| !state.services.contains_key(*id)).cloned().collect();
    let tasks = removed.iter().flat_map(|id| state.tasks_of_service(id));
    for task in tasks.filter(|task| !task.is_attachment()) {
        pass.set_desired(task, TaskState::Remove);
    }
}

pub(super) fn reconcile(pass: &mut Pass<'_>, service: &Arc<Service>) {
    replace_lost_tasks(pass, service);
    match service.spec.mode {
        Mode::Replicated { replicas } => scale(pass, service, replicas),
        Mode::Global => cover_nodes(pass, service),
    }
}

/// Wanted tasks that have ended, or whose node can't keep them.
fn replace_lost_tasks(pass: &mut Pass<'_>, service: &Service) {
    let tasks: Vec<Arc<Task>> = pass
        .draft
        .state
        .tasks_of_service(&service.id)
        .filter(|task| task.is_wanted())
        .filter(|task| task.has_ended() || !node_keeps(&pass.draft.state, service, task))
        .cloned()
        .collect();
    for task in tasks {
        let stays = node_keeps(&pass.draft.state, service, &task);
        match task.slot_key() {
            // A global service has no task elsewhere instead.
            SlotKey::Node(_) if !stays => pass.set_desired(&task, TaskState::Shutdown),
            _ if has_successor(pass, service, &task) => pass.set_desired(&task, TaskState::Shutdown),
            _ => restart(pass, service, &task),
        }
    }
}

/// An update has put another task into the slot already.
fn has_successor(pass: &Pass<'_>, service: &Service, task: &Task) -> bool {
    let key = task.slot_key();
    let mut others = pass.draft.state.tasks_of_service(&service.id);
    others.any(|other| {
        other.incarnation > task.incarnation
            && other.is_wanted()
            && !other.has_ended()
            && other.slot_key() == key
    })
}

fn scale(pass: &mut Pass<'_>, service: &Service, replicas: u64) {
    let held: Vec<Slot> = slots(&pass.draft.state, &service.id)
        .into_iter()
        .filter(|slot| slot.is_live() || slot.is_spent(service))
        .collect();
    let count = held.len() as u64;
    if count < replicas {
        let used: BTreeSet<&SlotKey> = held.iter().map(|slot| &slot.key).collect();
        let free = (1..).map(SlotKey::Replica).filter(|key| !used.contains(key));
        for key in free.take((replicas - count) as usize) {
            if pass.is_full() {
                return;
            }
            pass.create_task(service, &key, Hold::default(), Vec::new());
        }
    } else if count > replicas {
        for slot in surplus(held, count - replicas) {
            for task in &slot.tasks {
                pass.set_desired(task, TaskState::Remove);
            }
        }
    }
}

/// The slots to give up: first those without a place, then those that don't run, then from the nodes that have most;
/// the youngest first.
fn surplus(held: Vec<Slot>, count: u64) -> Vec<Slot> {
    let youth = |slot: &Slot| (!slot.is_running(), slot.newest().map(|task| task.incarnation));
    let mut by_node: BTreeMap<Option<NodeId>, Vec<Slot>> = BTreeMap::new();
    for slot in held {
        let node = slot.wanted().last().and_then(|task| task.node.clone());
        by_node.entry(node).or_default().push(slot);
    }
    for slots in by_node.values_mut() {
        slots.sort_by_cached_key(youth);
    }
    let mut chosen = Vec::new();
    for _ in 0..count {
        let rank = |node: &Option<NodeId>, slots: &[Slot]| {
            let (idle, incarnation) = slots.last().map(youth)?;
            Some((node.is_none(), idle, if node.is_none() { 0 } else { slots.len() }, incarnation))
        };
        let next = by_node.iter_mut().max_by_key(|(node, slots)| rank(node, slots));
        let Some(slot) = next.and_then(|(_, slots)| slots.pop()) else { break };
        chosen.push(slot);
    }
    chosen
}

/// One task on each node that fits. Tasks on others have been dealt with.
fn cover_nodes(pass: &mut Pass<'_>, service: &Service) {
    let held: BTreeSet<SlotKey> = slots(&pass.draft.state, &service.id)
        .into_iter()
        .filter(|slot| slot.is_live() || slot.is_spent(service))
        .map(|slot| slot.key)
        .collect();
    let Ok(constraints) = parse_all(&service.spec.task.placement.constraints) else { return };
    let nodes = pass.draft.state.nodes.clone();
    for node in nodes.values() {
        let key = SlotKey::Node(node.id.clone());
        let fits = node.is_schedulable() && constraints.iter().all(|constraint| constraint.holds(node));
        if fits && !held.contains(&key) && !pass.is_full() {
            pass.create_task(service, &key, Hold::default(), Vec::new());
        }
    }
}
