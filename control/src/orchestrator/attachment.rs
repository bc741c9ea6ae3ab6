//! Attachments end with what they are of, or with their node: nobody else can have what they were given.

use mesh_api::table::TaskState;

use super::pass::Pass;

/// Ends the attachments that have ended on their nodes, for them to be forgotten, and those on nodes that are down.
pub(super) fn end(pass: &mut Pass<'_>) {
    let state = pass.draft.state.clone();
    for task in state.attachments() {
        let is_lost = task.node.as_ref().is_none_or(|node| !pass.is_node_up(node));
        if task.has_ended() || is_lost {
            pass.set_desired(task, TaskState::Remove);
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::id::{NetworkId, TaskId};
    use mesh_api::table::NodeState;

    use super::*;
    use crate::command::Action;
    use crate::testing::{World, attach, attachment, service};

    fn world() -> World {
        let mut world = World::new(&["n1", "n2"]);
        world.create_attachable_network("front");
        world.must(attach("a1", "n1", "front", "db"));
        world.settle();
        world
    }

    fn state(world: &World) -> Option<TaskState> {
        world.state.tasks.get(&TaskId::from("a1")).map(|task| task.status.state)
    }

    #[test]
    fn an_attachment_runs_where_it_is_and_is_forgotten_once_it_has_ended() {
        let mut world = world();
        assert_eq!(state(&world), Some(TaskState::Running));
        let task = world.state.tasks[&TaskId::from("a1")].clone();
        for ended in [TaskState::Failed, TaskState::Complete, TaskState::Shutdown] {
            let mut world = world.clone();
            world.report(&task, ended);
            world.settle();
            assert!(world.state.tasks.is_empty(), "it is not started again after {ended:?}");
        }
        // No service's task takes its place, or gives it up.
        let mut web = service("web", 2);
        web.task.networks.push(attachment("net-front"));
        let id = world.create_service(web);
        world.settle();
        assert_eq!(world.running(&id).len(), 2);
        world.must(Action::RemoveService { id });
        world.settle();
        assert_eq!((state(&world), world.state.tasks.len()), (Some(TaskState::Running), 1));
        assert!(world.state.lookup.is_network_used(&NetworkId::from("net-front")));
    }

    #[test]
    fn an_attachment_goes_with_its_node() {
        let mut down = world();
        down.set_node_state("n1", NodeState::Unknown);
        down.settle();
        let task = |world: &World| world.state.tasks[&TaskId::from("a1")].clone();
        assert_eq!(task(&down).desired, TaskState::Running, "the managers may hear of it yet");
        down.set_node_state("n1", NodeState::Down);
        down.settle();
        assert_eq!((task(&down).desired, state(&down)), (TaskState::Remove, Some(TaskState::Running)));
        let held = down.state.lookup.addresses[&NetworkId::from("net-front")].len();
        assert_eq!(held, 1, "the node may still have it");
        // Its name is free for what takes its place elsewhere.
        down.must(attach("a2", "n2", "front", "db"));
        down.set_node_state("n1", NodeState::Ready);
        down.settle();
        assert_eq!(state(&down), None);
        assert_eq!(down.state.tasks.len(), 1);

        let mut removed = world();
        removed.must(Action::RemoveNode { id: "n1".into(), force: true });
        removed.settle();
        assert!(removed.state.tasks.is_empty());
        assert!(!removed.state.lookup.is_network_used(&NetworkId::from("net-front")));
    }
}
