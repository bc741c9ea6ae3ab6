//! Slow start: the share of new flows that a task of a service with `shoal.slow-start` gets grows step by step from the
//! moment at which it runs. The steps are part of the state, so that all nodes balance by the same weights.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::id::ServiceId;
use mesh_api::table::TaskState;

use super::pass::Pass;
use crate::command::Step;
use crate::model::{Task, WARM, labels};

/// Takes the steps that are due, and wakes for the next.
pub(super) fn warm_up(pass: &mut Pass<'_>) {
    let state = pass.draft.state.clone();
    let mut slow_starts: BTreeMap<&ServiceId, u64> = BTreeMap::new();
    let warming =
        |task: &&Arc<Task>| task.warmth < WARM && task.is_wanted() && task.status.state == TaskState::Running;
    let open = pass.open_tasks();
    for task in open.iter().filter(warming) {
        if pass.is_full() {
            return;
        }
        let slow_start_ns = *slow_starts.entry(&task.service).or_insert_with(|| {
            let service = state.services.get(&task.service);
            let options = service.and_then(|service| labels::service(&service.spec.labels).ok());
            options.map_or(0, |options| options.slow_start_ns)
        });
        // From here on the next pass sees what this one did.
        let warmth = warmth(task, slow_start_ns, pass.now_ns);
        if warmth > task.warmth {
            pass.take(Step::Warm { task: task.id.clone(), warmth });
        }
        if warmth < WARM {
            pass.wake(reached_at_ns(task, slow_start_ns, warmth + 1));
        }
    }
}

/// When a task reaches `warmth`, ns since the epoch.
fn reached_at_ns(task: &Task, slow_start_ns: u64, warmth: u8) -> u64 {
    let part = (u128::from(slow_start_ns) * u128::from(warmth)).div_ceil(u128::from(WARM));
    task.running_since_ns.saturating_add(u64::try_from(part).unwrap_or(u64::MAX))
}

/// How far a task's slow start is.
fn warmth(task: &Task, slow_start_ns: u64, now_ns: u64) -> u8 {
    if !task.has_begun(now_ns) {
        return WARM;
    }
    let reached = |warmth: &u8| reached_at_ns(task, slow_start_ns, *warmth) <= now_ns;
    (0..=WARM).rev().find(reached).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use mesh_api::id::ServiceId;
    use mesh_api::table::TaskRecord;

    use super::super::tests::SECOND;
    use crate::model::labels::SLOW_START;
    use crate::session::view;
    use crate::testing::{World, service};

    fn world(slow_start: &str) -> (World, ServiceId) {
        let mut world = World::new(&["n1"]);
        let mut web = service("web", 1);
        web.labels.insert(SLOW_START.to_owned(), slow_start.to_owned());
        let id = world.create_service(web);
        world.settle();
        (world, id)
    }

    fn weights(world: &World) -> Vec<u8> {
        let table = view::table(&world.state, &"n1".into()).unwrap();
        table.tasks.values().map(|task: &TaskRecord| task.weight).collect()
    }

    #[test]
    fn a_tasks_weight_grows_in_eight_steps() {
        let (mut world, _) = world("80s");
        let mut seen = vec![weights(&world)];
        let mut commands = world.log.len();
        for at in 1..=100 {
            world.run_for(SECOND);
            let now = weights(&world);
            let changed = seen.last() != Some(&now);
            assert_eq!(
                world.log.len() > commands,
                changed,
                "at {at} s: a command for each step, and no other"
            );
            commands = world.log.len();
            if changed {
                assert_eq!(at % 10, 0);
                seen.push(now);
            }
        }
        let expected = [1, 12, 25, 37, 50, 62, 75, 87, 100];
        assert_eq!(seen, expected.map(|weight| vec![weight]));
        assert_eq!(world.settle(), None, "nothing falls due any more");
    }

    #[test]
    fn a_manager_that_was_away_catches_up_in_one_step() {
        let (mut world, _) = world("80s");
        world.now_ns += 45 * SECOND;
        world.settle();
        assert_eq!(weights(&world), [50]);
        world.now_ns -= 20 * SECOND;
        world.settle();
        assert_eq!(weights(&world), [50], "and never goes back, whatever the clock does");
    }

    #[test]
    fn the_nodes_weight_counts_as_well_and_nothing_is_below_one() {
        let (mut world, _) = world("80s");
        world.label_node("n1", "shoal.weight", "4");
        assert_eq!(weights(&world), [1]);
        world.run_for(30 * SECOND);
        assert_eq!(weights(&world), [1]);
        world.run_for(50 * SECOND);
        assert_eq!(weights(&world), [4]);
    }

    #[test]
    fn without_slow_start_a_task_begins_with_all_of_its_weight() {
        let (mut world, id) = world("0s");
        assert_eq!(weights(&world), [100]);
        world.update_service(&id, |spec| drop(spec.labels.insert(SLOW_START.to_owned(), "80s".to_owned())));
        world.run_for(SECOND);
        assert_eq!(weights(&world), [100], "one that runs keeps its weight");
        world.update_service(&id, |spec| spec.task.force_update = 1);
        world.settle();
        assert_eq!(weights(&world), [1], "its successor begins slowly");
        world.update_service(&id, |spec| spec.labels.clear());
        world.settle();
        assert_eq!(weights(&world), [100], "a slow start that is taken away ends");
    }
}
