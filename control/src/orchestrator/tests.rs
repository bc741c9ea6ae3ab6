//! Services live through whole lives on fake nodes: created, failing, scaled, updated, drained, removed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_api::id::{ServiceId, TaskId};
use mesh_api::table::{NodeState, PublishMode, TaskState};

use super::reconcile;
use crate::command::Action;
use crate::model::labels::SLOW_START;
use crate::model::{
    Availability, FailureAction, Mode, RestartCondition, RestartPolicy, Task, UpdateOrder, UpdateState, WARM,
};
use crate::testing::{World, attachment, identity, ingress_port, network, service};

pub(super) const SECOND: u64 = 1_000_000_000;
/// Images that tell the fake nodes how a task behaves.
pub(super) const FAILS: &str = "fails";
pub(super) const COMPLETES: &str = "completes";

impl World {
    /// Does for the nodes what is to be done at this moment; whether anything was.
    pub(super) fn run_nodes(&mut self) -> bool {
        let tasks: Vec<Arc<Task>> = self.state.tasks.values().cloned().collect();
        let mut busy = false;
        for task in tasks {
            let up = task
                .node
                .as_ref()
                .and_then(|node| self.state.nodes.get(node))
                .is_some_and(|node| !node.is_down());
            if !up || task.has_ended() || task.status.state < TaskState::Assigned {
                continue;
            }
            let next = match (task.desired, task.status.state, task.template.container.image.as_str()) {
                (TaskState::Shutdown | TaskState::Remove, ..) => TaskState::Shutdown,
                (TaskState::Running, TaskState::Running, COMPLETES) => TaskState::Complete,
                (TaskState::Running, _, FAILS) => TaskState::Failed,
                (TaskState::Running, state, _) if state < TaskState::Running => TaskState::Running,
                _ => continue,
            };
            self.report(&task, next);
            busy = true;
        }
        self.acknowledge() || busy
    }

    /// Runs orchestrator and nodes until nothing is left to do at this moment; when something falls due.
    pub(super) fn settle(&mut self) -> Option<u64> {
        for _ in 0..1000 {
            let (orchestrated, wake_at_ns) = self.orchestrate();
            self.check_invariants();
            if !self.run_nodes() && !orchestrated {
                return wake_at_ns;
            }
        }
        panic!("the cluster does not settle: {:#?}", self.state.tasks);
    }

    /// Lets time pass.
    pub(super) fn run_for(&mut self, ns: u64) {
        let end_ns = self.now_ns + ns;
        while let Some(due_ns) = self.settle().filter(|due_ns| *due_ns <= end_ns) {
            assert!(due_ns > self.now_ns, "what was due was not done");
            self.now_ns = due_ns;
        }
        self.now_ns = end_ns;
        self.settle();
    }

    pub(super) fn running(&self, id: &ServiceId) -> Vec<Arc<Task>> {
        let runs = |task: &&Arc<Task>| task.status.state == TaskState::Running && task.is_wanted();
        self.state.tasks_of_service(id).filter(runs).cloned().collect()
    }

    pub(super) fn running_slots(&self, id: &ServiceId) -> Vec<u64> {
        let mut slots: Vec<u64> = self.running(id).iter().map(|task| task.slot).collect();
        slots.sort_unstable();
        slots
    }

    pub(super) fn per_node(&self, id: &ServiceId) -> Vec<usize> {
        let mut counts: BTreeMap<_, usize> = BTreeMap::new();
        for task in self.running(id) {
            *counts.entry(task.node.clone().unwrap()).or_default() += 1;
        }
        counts.into_values().collect()
    }

    pub(super) fn update_state(&self, id: &ServiceId) -> Option<UpdateState> {
        self.state.services[id].update_status.as_ref().map(|status| status.state)
    }

    pub(super) fn images(&self, id: &ServiceId) -> BTreeSet<String> {
        self.running(id).iter().map(|task| task.template.container.image.clone()).collect()
    }

    pub(super) fn set_availability(&mut self, id: &str, availability: Availability) {
        let node = self.node(id).clone();
        let mut spec = node.spec.clone();
        spec.availability = availability;
        self.must(Action::UpdateNode { id: id.into(), version: node.spec_version, spec });
    }
}

#[test]
fn a_service_lives_from_creation_to_nothing() {
    let mut world = World::new(&["n1", "n2", "n3"]);
    world.create_network("app");
    let mut web = service("web", 3);
    web.endpoint.ports.push(ingress_port(8080, 80));
    web.task.networks.push(attachment("net-app"));
    let id = world.create_service(web);
    world.settle();
    assert_eq!(world.running_slots(&id), [1, 2, 3]);
    assert_eq!(world.per_node(&id), [1, 1, 1]);
    assert_eq!(world.running(&id)[0].endpoints[0].network.as_str(), "ingress-id");
    assert_eq!(world.running(&id)[0].endpoints.len(), 2);

    let killed = world.running(&id)[0].clone();
    world.report(&killed, TaskState::Failed);
    world.settle();
    assert_eq!(world.running(&id).len(), 2, "the replacement waits for the restart delay");
    world.run_for(5 * SECOND);
    assert_eq!(world.running_slots(&id), [1, 2, 3]);
    assert_eq!(world.state.tasks[&killed.id].desired, TaskState::Shutdown, "kept for `docker service ps`");

    world.update_service(&id, |spec| spec.mode = Mode::Replicated { replicas: 6 });
    world.settle();
    assert_eq!(world.running(&id).len(), 6);
    assert_eq!(world.per_node(&id), [2, 2, 2]);
    assert_eq!(world.update_state(&id), None, "scaling is not an update");
    world.update_service(&id, |spec| spec.mode = Mode::Replicated { replicas: 2 });
    world.settle();
    assert_eq!(world.per_node(&id), [1, 1], "the spread is kept");

    world.must(Action::RemoveService { id });
    world.settle();
    assert!(world.state.tasks.is_empty() && world.state.services.is_empty());
    assert!(world.state.lookup.addresses.is_empty());
    world.must(Action::RemoveNetwork { id: "net-app".into() });
}

#[test]
fn a_lost_nodes_tasks_are_replaced_at_once_and_stopped_when_it_is_back() {
    let mut world = World::new(&["n1", "n2"]);
    let id = world.create_service(service("web", 4));
    world.settle();
    world.set_node_state("n1", NodeState::Down);
    world.settle();
    assert_eq!(world.running_slots(&id), [1, 2, 3, 4]);
    assert!(world.running(&id).iter().all(|task| task.node.as_ref().unwrap().as_str() == "n2"));
    let lost = |world: &World| {
        world.state.tasks.values().filter(|task| !task.has_ended() && !task.is_wanted()).count()
    };
    assert_eq!(lost(&world), 2);
    world.set_node_state("n1", NodeState::Ready);
    world.settle();
    assert_eq!(lost(&world), 0);
    assert_eq!(world.per_node(&id), [4], "a node that is back gets no tasks until there is a reason");
}

#[test]
fn tasks_of_a_node_that_stays_away_are_orphaned_after_a_day_and_of_a_removed_node_at_once() {
    let mut world = World::new(&["n1", "n2"]);
    let id = world.create_service(service("web", 2));
    world.settle();
    world.set_node_state("n1", NodeState::Down);
    world.must(Action::RemoveService { id });
    world.run_for(23 * 3600 * SECOND);
    assert_eq!(world.state.tasks.len(), 1, "its address may still be in use");
    world.run_for(2 * 3600 * SECOND);
    assert!(world.state.tasks.is_empty());

    world.create_service(service("again", 1));
    world.settle();
    world.set_node_state("n2", NodeState::Down);
    world.must(Action::RemoveNode { id: "n2".into(), force: false });
    let orphans = world.state.tasks.values().filter(|task| task.status.state == TaskState::Orphaned).count();
    assert_eq!(orphans, 1);
}

#[test]
fn a_drained_nodes_tasks_move_once_they_have_stopped() {
    let mut world = World::new(&["n1", "n2"]);
    let id = world.create_service(service("web", 2));
    world.settle();
    world.set_availability("n1", Availability::Drain);
    world.orchestrate();
    let held: Vec<_> = world.state.tasks.values().filter(|task| task.desired == TaskState::Ready).collect();
    assert_eq!(held.len(), 1);
    assert!(held[0].start_after.is_some());
    world.settle();
    assert_eq!(world.per_node(&id), [2]);
    world.set_availability("n1", Availability::Pause);
    world.update_service(&id, |spec| spec.mode = Mode::Replicated { replicas: 4 });
    world.settle();
    assert_eq!(world.per_node(&id), [4], "a paused node gets no tasks");
}

#[test]
fn a_global_service_covers_the_nodes_that_fit() {
    let mut world = World::new(&["n1", "n2", "n3"]);
    let mut agent = service("agent", 0);
    agent.mode = Mode::Global;
    agent.task.placement.constraints.push("node.hostname!=n3".into());
    let id = world.create_service(agent);
    world.settle();
    assert_eq!(world.running(&id).len(), 2);
    assert!(world.running(&id)[0].name().starts_with("agent.n1."));
    world.add_node("n4");
    world.settle();
    assert_eq!(world.running(&id).len(), 3);
    world.set_availability("n1", Availability::Drain);
    world.set_node_state("n2", NodeState::Down);
    world.settle();
    assert_eq!(world.running(&id).len(), 1);
    world.set_availability("n1", Availability::Active);
    world.set_node_state("n2", NodeState::Ready);
    world.settle();
    assert_eq!(world.per_node(&id), [1, 1, 1]);
    let failed = world.running(&id)[0].clone();
    world.report(&failed, TaskState::Failed);
    world.run_for(5 * SECOND);
    assert_eq!(world.per_node(&id), [1, 1, 1]);
    world.must(Action::RemoveService { id });
    world.settle();
    assert!(world.state.tasks.is_empty());
}

#[test]
fn restart_policies_are_kept() {
    for (condition, image, expected_tasks) in [
        (RestartCondition::None, FAILS, 1),
        (RestartCondition::None, COMPLETES, 1),
        (RestartCondition::OnFailure, COMPLETES, 1),
        (RestartCondition::OnFailure, FAILS, 4),
        (RestartCondition::Any, COMPLETES, 4),
    ] {
        let mut world = World::new(&["n1"]);
        let mut spec = service("job", 1);
        spec.task.container.image = image.into();
        spec.task.restart.condition = condition;
        spec.task.restart.max_attempts = 3;
        spec.task.restart.delay_ns = SECOND;
        let id = world.create_service(spec);
        world.run_for(100 * SECOND);
        assert_eq!(world.state.tasks_of_service(&id).count(), expected_tasks, "{condition:?} {image}");
        world.update_service(&id, |spec| spec.task.container.image = "works".into());
        world.run_for(100 * SECOND);
        assert_eq!(world.running(&id).len(), 1, "an update starts afresh");
    }
}

#[test]
fn a_crash_loop_keeps_a_bounded_history() {
    let mut world = World::new(&["n1"]);
    let mut spec = service("bad", 2);
    spec.task.container.image = FAILS.into();
    let id = world.create_service(spec);
    world.run_for(300 * SECOND);
    let tasks = world.state.tasks_of_service(&id).count();
    assert!((8..=10).contains(&tasks), "{tasks} tasks");
    world.must(Action::RemoveService { id });
    world.settle();
    assert!(world.state.tasks.is_empty());
}

#[test]
fn an_update_goes_slot_by_slot_with_its_delay_and_ends_after_its_watch() {
    let mut world = World::new(&["n1", "n2"]);
    let mut web = service("web", 3);
    web.update.delay_ns = 10 * SECOND;
    let id = world.create_service(web);
    world.settle();
    world.update_service(&id, |spec| spec.task.container.image = "v2".into());
    for slots in 1..=3_usize {
        world.settle();
        let updated = world.running(&id).iter().filter(|task| task.template.container.image == "v2").count();
        assert_eq!((updated, world.running(&id).len()), (slots, 3));
        assert_eq!(world.update_state(&id), Some(UpdateState::Updating));
        world.run_for(if slots < 3 { 10 * SECOND } else { 5 * SECOND });
    }
    assert_eq!(world.update_state(&id), Some(UpdateState::Completed));
    assert_eq!(world.images(&id), BTreeSet::from(["v2".to_owned()]));
}

#[test]
fn the_order_of_an_update_is_kept() {
    for order in [UpdateOrder::StopFirst, UpdateOrder::StartFirst] {
        let mut world = World::new(&["n1"]);
        let mut web = service("web", 1);
        web.update.order = order;
        let id = world.create_service(web);
        world.settle();
        world.update_service(&id, |spec| spec.task.container.image = "v2".into());
        world.orchestrate();
        let wanted = |world: &World, desired| {
            world.state.tasks.values().filter(|task| task.desired == desired).count()
        };
        let (ready, running) = (wanted(&world, TaskState::Ready), wanted(&world, TaskState::Running));
        let expected = if order == UpdateOrder::StopFirst { (1, 0) } else { (0, 2) };
        assert_eq!((ready, running), expected, "{order:?}");
        world.run_for(5 * SECOND);
        assert_eq!(world.running(&id).len(), 1);
        assert_eq!(world.update_state(&id), Some(UpdateState::Completed));
    }
}

#[test]
fn a_failing_update_pauses_goes_on_or_turns_back() {
    for (action, state, images) in [
        (FailureAction::Pause, UpdateState::Paused, "shoal/whoami"),
        (FailureAction::Rollback, UpdateState::RollbackCompleted, "shoal/whoami"),
        (FailureAction::Continue, UpdateState::Updating, ""),
    ] {
        let mut world = World::new(&["n1"]);
        let mut web = service("web", 3);
        web.update.failure_action = action;
        let id = world.create_service(web);
        world.settle();
        world.update_service(&id, |spec| spec.task.container.image = FAILS.into());
        world.run_for(60 * SECOND);
        assert_eq!(world.update_state(&id), Some(state), "{action:?}");
        if images.is_empty() {
            assert!(world.images(&id).is_empty());
        } else {
            assert_eq!(world.images(&id), BTreeSet::from([images.to_owned()]), "{action:?}");
        }
        let running = world.running(&id).len();
        assert_eq!(
            running,
            match action {
                FailureAction::Pause => 2,
                FailureAction::Rollback => 3,
                FailureAction::Continue => 0,
            }
        );
        world.update_service(&id, |spec| spec.task.container.image = "fixed".into());
        world.run_for(60 * SECOND);
        assert_eq!(world.update_state(&id), Some(UpdateState::Completed), "{action:?}");
        assert_eq!(world.running_slots(&id), [1, 2, 3]);
    }
}

#[test]
fn where_the_other_task_fails_for_good_the_old_one_goes_on() {
    let mut world = World::new(&["n1"]);
    let mut web = service("web", 1);
    web.update.order = UpdateOrder::StartFirst;
    web.update.failure_action = FailureAction::Continue;
    web.task.restart.condition = RestartCondition::None;
    let id = world.create_service(web);
    world.settle();
    world.update_service(&id, |spec| spec.task.container.image = FAILS.into());
    world.run_for(30 * SECOND);
    assert_eq!(world.images(&id), BTreeSet::from(["shoal/whoami".to_owned()]));
    assert_eq!(world.update_state(&id), Some(UpdateState::Completed));
    assert_eq!(world.state.tasks_of_service(&id).count(), 2);
}

#[test]
fn publishing_another_port_leaves_tasks_alone_and_force_does_not() {
    let mut world = World::new(&["n1"]);
    let mut web = service("web", 2);
    web.endpoint.ports.push(ingress_port(8080, 80));
    let id = world.create_service(web);
    world.settle();
    let before: BTreeSet<_> = world.running(&id).iter().map(|task| task.id.clone()).collect();
    world.update_service(&id, |spec| spec.endpoint.ports.push(ingress_port(8081, 81)));
    world.run_for(30 * SECOND);
    let after: BTreeSet<_> = world.running(&id).iter().map(|task| task.id.clone()).collect();
    assert_eq!(before, after);
    world.update_service(&id, |spec| spec.task.force_update += 1);
    world.run_for(30 * SECOND);
    assert!(world.running(&id).iter().all(|task| !before.contains(&task.id)));
    assert_eq!(world.running(&id).len(), 2);
}

#[test]
fn what_is_encrypted_runs_where_nodes_have_keys() {
    let mut world = World::new(&["n1", "n2", "n3"]);
    world.must(world.keys("n1", &[identity(1, 51820)]));
    let encrypted = |world: &mut World, name: &str, ingress| {
        let mut spec = network(name);
        spec.options.insert("encrypted".into(), String::new());
        spec.ingress = ingress;
        world.must(Action::CreateNetwork { id: name.into(), spec });
    };
    let nodes = |world: &World, id: &ServiceId| {
        let nodes = world.running(id).into_iter().map(|task| task.node.clone().unwrap().to_string());
        nodes.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(" ")
    };
    let errs = |world: &World, id: &ServiceId| {
        let waiting = world.state.tasks_of_service(id).filter(|task| task.status.state == TaskState::Pending);
        waiting.map(|task| task.status.err.clone()).collect::<Vec<_>>()
    };
    encrypted(&mut world, "secret", false);
    let on_secret = |name: &str, mode| {
        let mut spec = service(name, 0);
        spec.mode = mode;
        spec.task.networks.push(attachment("secret"));
        spec
    };
    let web = world.create_service(on_secret("web", Mode::Replicated { replicas: 3 }));
    let each = world.create_service(on_secret("each", Mode::Global));
    let plain = world.create_service(service("plain", 3));
    world.settle();
    assert_eq!([&web, &each, &plain].map(|id| nodes(&world, id)), ["n1", "n1", "n1 n2 n3"]);
    let missing = "no suitable node (encryption of its networks not available on 1 node)";
    assert_eq!(errs(&world, &each), [missing, missing], "a global service's tasks wait on their nodes");

    // Those that run stay where they are, whatever becomes of the keys.
    world.must(world.keys("n1", &[]));
    world.update_service(&web, |spec| spec.mode = Mode::Replicated { replicas: 4 });
    world.settle();
    assert_eq!(world.running(&web).len(), 3);
    assert_eq!(
        errs(&world, &web),
        ["no suitable node (encryption of its networks not available on 3 nodes)"]
    );
    world.must(world.keys("n2", &[identity(2, 51820)]));
    world.settle();
    assert_eq!([&web, &each].map(|id| nodes(&world, id)), ["n1 n2", "n1 n2"]);
    assert_eq!(errs(&world, &each), [missing]);

    // The ingress network counts where ports are published in it, and not as the way out.
    world.must(Action::RemoveService { id: plain });
    world.settle();
    let ingress = world.state.ingress().unwrap().id.clone();
    world.must(Action::RemoveNetwork { id: ingress });
    encrypted(&mut world, "mesh", true);
    let plain = world.create_service(service("plain", 3));
    let mut port = ingress_port(9000, 80);
    let mut published = service("published", 3);
    published.endpoint.ports.push(port.clone());
    let published = world.create_service(published);
    port.mode = PublishMode::Host;
    port.published = 9001;
    let mut host = service("host", 3);
    host.endpoint.ports.push(port);
    let host = world.create_service(host);
    world.settle();
    assert_eq!([&plain, &published, &host].map(|id| nodes(&world, id)), ["n1 n2 n3", "n2", "n1 n2 n3"]);
}

#[test]
fn what_has_no_place_says_why_and_waits() {
    let mut world = World::new(&["n1", "n2"]);
    let mut web = service("web", 1);
    web.task.placement.constraints.push("node.labels.disk==ssd".into());
    let id = world.create_service(web);
    let mut host = service("host", 3);
    host.endpoint.ports.push(ingress_port(9000, 80));
    host.endpoint.ports[0].mode = PublishMode::Host;
    world.create_service(host);
    let mut single = service("single", 3);
    single.task.placement.max_replicas = 1;
    world.create_service(single);
    world.settle();
    let err = |world: &World, name: &str| {
        let waits = |task: &&Arc<Task>| task.service_name == name && task.status.state == TaskState::Pending;
        world.state.tasks.values().find(waits).map(|task| task.status.err.clone()).unwrap()
    };
    assert_eq!(err(&world, "web"), "no suitable node (scheduling constraints not satisfied on 2 nodes)");
    assert_eq!(err(&world, "host"), "no suitable node (host-mode port already in use on 2 nodes)");
    assert_eq!(err(&world, "single"), "no suitable node (max replicas per node limit exceed on 2 nodes)");

    let node = world.node("n2").clone();
    let mut spec = node.spec.clone();
    spec.labels.insert("disk".into(), "ssd".into());
    world.must(Action::UpdateNode { id: "n2".into(), version: node.spec_version, spec: spec.clone() });
    world.settle();
    assert_eq!(world.running(&id)[0].node, Some("n2".into()));
    assert!(world.running(&id)[0].status.err.is_empty());
    spec.labels.clear();
    let version = world.node("n2").spec_version;
    world.must(Action::UpdateNode { id: "n2".into(), version, spec });
    world.settle();
    assert!(world.running(&id).is_empty(), "the node no longer satisfies the constraint");
}

#[test]
fn a_node_on_which_a_service_keeps_failing_comes_last() {
    let mut world = World::new(&["n1", "n2"]);
    world.set_availability("n2", Availability::Pause);
    let mut spec = service("bad", 1);
    spec.task.container.image = FAILS.into();
    let id = world.create_service(spec);
    world.run_for(40 * SECOND);
    world.set_availability("n2", Availability::Active);
    world.run_for(6 * SECOND);
    let newest = world.state.tasks_of_service(&id).max_by_key(|task| task.incarnation).unwrap();
    assert_eq!(newest.node, Some("n2".into()));
}

#[test]
fn many_tasks_come_in_several_commands() {
    let mut world = World::new(&["n1", "n2", "n3"]);
    let mut spec = crate::testing::network("big");
    let subnet = Some("172.16.0.0/16".parse().unwrap());
    spec.ipam.push(crate::model::IpamConfig { subnet, ..Default::default() });
    world.must(Action::CreateNetwork { id: "big".into(), spec });
    let mut web = service("web", 2500);
    web.task.networks.push(attachment("big"));
    let id = world.create_service(web);
    for _ in 0..50 {
        if !world.orchestrate().0 {
            break;
        }
    }
    let placed = world.state.tasks_of_service(&id).filter(|task| task.status.state == TaskState::Assigned);
    assert_eq!(placed.count(), 2500);
    world.check_invariants();
}

#[test]
fn a_clock_that_was_ahead_holds_nothing_up() {
    const HOUR: u64 = 3600 * SECOND;
    let mut world = World::new(&["n1", "n2"]);
    let mut web = service("web", 2);
    web.update.delay_ns = 30 * SECOND;
    web.labels.insert(SLOW_START.to_owned(), "20s".to_owned());
    let id = world.create_service(web);
    let mut often = service("often", 1);
    often.task.restart = RestartPolicy { max_attempts: 2, window_ns: 60 * SECOND, ..often.task.restart };
    let often = world.create_service(often);
    world.settle();
    world.now_ns += HOUR;
    let fail_one = |world: &mut World, id: &ServiceId| {
        let failed = world.running(id)[0].clone();
        world.report(&failed, TaskState::Failed);
    };
    fail_one(&mut world, &id);
    for _ in 0..2 {
        fail_one(&mut world, &often);
        world.run_for(10 * SECOND);
    }
    world.update_service(&id, |spec| spec.task.container.env.push("A=1".to_owned()));
    world.settle();
    // Another manager leads, whose clock is right.
    world.now_ns -= HOUR;
    world.run_for(60 * SECOND);
    assert_eq!(world.running(&id).len(), 2);
    assert_eq!(world.update_state(&id), Some(UpdateState::Completed));
    // What was noted under that clock is no reason to give a service up, nor to warm its tasks for long.
    fail_one(&mut world, &often);
    world.run_for(60 * SECOND);
    assert_eq!(world.running(&often).len(), 1);
    for task in world.state.tasks.values().filter(|task| task.status.state == TaskState::Running) {
        assert_eq!(task.warmth, WARM, "{}", task.name());
    }
}

#[test]
fn what_two_leaders_make_of_one_state_is_done_once() {
    let mut world = World::new(&["n1", "n2"]);
    let id = world.create_service(service("web", 2));
    let do_twice = |world: &mut World, what: &str| {
        for steps in ["former", "present"].map(|leader| {
            let mut number = 0;
            let mut ids = || {
                number += 1;
                TaskId::from(format!("{what}-{leader}-{number}"))
            };
            reconcile(&world.state, world.now_ns, &mut ids).steps
        }) {
            world.must(Action::Orchestrate { steps });
        }
        world.settle();
        let wanted = world.state.tasks_of_service(&id).filter(|task| task.is_wanted());
        assert_eq!((wanted.count(), world.running(&id).len()), (2, 2), "{what}");
    };
    do_twice(&mut world, "create");
    world.update_service(&id, |spec| spec.task.restart.delay_ns = 0);
    let failed = world.running(&id)[0].clone();
    world.report(&failed, TaskState::Failed);
    do_twice(&mut world, "restart");
    world.update_service(&id, |spec| {
        spec.update.order = UpdateOrder::StartFirst;
        spec.task.force_update += 1;
    });
    do_twice(&mut world, "update");
}

#[test]
fn tasks_that_ran_for_the_last_time_are_not_run_again_for_lack_of_history() {
    for history in [0, 1] {
        let mut world = World::new(&["n1", "n2"]);
        world.update_cluster(|spec| spec.task_history = history);
        let mut job = service("job", 2);
        job.task.container.image = COMPLETES.to_owned();
        job.task.restart.condition = RestartCondition::OnFailure;
        let id = world.create_service(job);
        let mut sweep = service("sweep", 1);
        sweep.mode = Mode::Global;
        sweep.task.container.image = COMPLETES.to_owned();
        sweep.task.restart.condition = RestartCondition::None;
        world.create_service(sweep);
        let mut web = service("web", 1);
        web.task.restart.condition = RestartCondition::None;
        web.update.order = UpdateOrder::StartFirst;
        web.update.failure_action = FailureAction::Continue;
        let web = world.create_service(web);
        world.run_for(10 * SECOND);
        world.update_service(&web, |spec| FAILS.clone_into(&mut spec.task.container.image));
        world.run_for(60 * SECOND);
        assert_eq!(world.state.counters.incarnation, 6, "{history}: each ran once");
        assert_eq!(world.state.tasks_of_service(&id).count(), 2, "{history}");
    }
}

#[test]
fn other_constraints_move_tasks_at_the_updates_pace() {
    let mut world = World::new(&["n1", "n2"]);
    let mut web = service("web", 4);
    web.task.placement.constraints = vec!["node.hostname==n1".to_owned()];
    let id = world.create_service(web);
    world.settle();
    world.update_service(&id, |spec| {
        spec.task.placement.constraints = vec!["node.hostname==n2".to_owned()];
        spec.update.delay_ns = 10 * SECOND;
    });
    world.settle();
    let moved = |world: &World| {
        world
            .running(&id)
            .iter()
            .filter(|task| task.node.as_ref().is_some_and(|it| it.as_str() == "n2"))
            .count()
    };
    assert_eq!((world.running(&id).len(), moved(&world)), (4, 1), "one at a time");
    world.run_for(60 * SECOND);
    assert_eq!((world.running(&id).len(), moved(&world)), (4, 4));
}

#[test]
fn scaling_down_by_thousands_takes_no_time() {
    let mut world = World::new(&["n1", "n2", "n3"]);
    let id = world.create_service(service("web", 10_000));
    while world.orchestrate().0 {}
    world.update_service(&id, |spec| spec.mode = Mode::Replicated { replicas: 1 });
    let start = std::time::Instant::now();
    while world.orchestrate().0 {}
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
    let wanted: Vec<_> = world.state.tasks.values().filter(|task| task.is_wanted()).collect();
    assert_eq!(wanted.len(), 1);
    assert!(wanted[0].node.is_some(), "those without a place go first");
}

#[test]
fn fixed_egress_addresses_choose_nodes_and_other_ones_replace_tasks() {
    let mut world = World::new(&["n1", "n2", "n3"]);
    world.has_addresses("n1", &["192.0.2.7", "2001:db8::7"]);
    world.has_addresses("n2", &["192.0.2.8", "192.0.2.9"]);
    let label = |addresses: &str| ("shoal.egress".to_owned(), addresses.to_owned());
    let nodes = |world: &World, id: &ServiceId| -> Vec<String> {
        world.running(id).iter().map(|task| task.node.clone().unwrap().to_string()).collect()
    };
    let mut spec = service("web", 2);
    spec.labels.extend([label("192.0.2.9,192.0.2.7,2001:db8::7")]);
    let web = world.create_service(spec);
    world.settle();
    assert_eq!(nodes(&world, &web), ["n1", "n1"], "one address of each family");
    let egress = world.running(&web)[0].egress.clone();
    assert_eq!(egress[0], "192.0.2.9".parse::<std::net::IpAddr>().unwrap(), "in the label's order");

    // Those that run stay, whatever becomes of the address; others wait.
    world.has_addresses("n1", &["2001:db8::7"]);
    world.update_service(&web, |spec| spec.mode = Mode::Replicated { replicas: 3 });
    world.settle();
    assert_eq!(nodes(&world, &web), ["n1", "n1"]);
    let waiting = world.state.tasks_of_service(&web).find(|task| task.status.state == TaskState::Pending);
    let missing = "no suitable node (egress address (label shoal.egress) not available on 3 nodes)";
    assert_eq!(waiting.unwrap().status.err, missing);
    world.has_addresses("n3", &["192.0.2.7", "2001:db8::7"]);
    world.settle();
    assert_eq!(world.per_node(&web), [2, 1]);

    // Tasks keep what they were made with: for other addresses there are others, a few at a time.
    let before = world.running(&web);
    world.update_service(&web, |spec| spec.labels.extend([label("192.0.2.8")]));
    world.run_for(60 * SECOND);
    assert_eq!(nodes(&world, &web), ["n2"; 3]);
    assert!(world.running(&web).iter().all(|task| before.iter().all(|former| former.id != task.id)));
    assert_eq!(world.update_state(&web), Some(UpdateState::Completed));
    let before = world.running(&web);
    world.update_service(&web, |spec| spec.labels.extend([("tier".to_owned(), "front".to_owned())]));
    world.run_for(60 * SECOND);
    assert_eq!(world.running(&web), before, "other labels replace none");
    world.update_service(&web, |spec| drop(spec.labels.remove("shoal.egress")));
    world.run_for(60 * SECOND);
    assert_eq!(world.per_node(&web), [1, 1, 1]);
}
