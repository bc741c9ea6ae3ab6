//! What of the table changed since when: what a node that was away lacks.
//!
//! Every manager keeps one, leader or not, since each may be the next that agents come to. It knows which records changed, not
//! how: a node is sent what they are now ([`view::renewed`]), so one that changed ten times is sent once, and as that node
//! sees it. It is noted entry by entry of raft's log, and so reaches back to any index that any leader may have sent.
//!
//! It is not on the disk: it begins with the snapshot that a manager starts from or is sent, and goes on with the entries
//! after that. Table indices are the same on all managers and are never given twice, not even by a swarm that was forced anew
//! or restored ([`crate::raft`], [`crate::backup`]), so an index within its reach means the state that this manager had.

use std::collections::{BTreeMap, BTreeSet};

use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId};
use mesh_api::table::Change;

use super::view;
use crate::model::State;

/// Records that are known to have changed. A table of 20,000 tasks has a third as many: a node that lacks more than that is
/// served no worse by a snapshot.
const CHANGED_MAX: usize = 1 << 16;
/// What they take at most, bytes, each being kept twice (by index, and by itself), and the trees' nodes half full.
const BYTES_MAX: usize = 12 << 20;
const _: () = assert!(CHANGED_MAX * 2 * size_of::<(u64, Part)>() * 2 <= BYTES_MAX);

/// A part of the table that changes at once.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// The cluster's record.
    Cluster,
    /// A node's.
    Node(NodeId),
    /// A network's.
    Network(NetworkId),
    /// Those of all services that follow the cluster in how replies return.
    ReturnPath,
    /// Those of all services that choose the nodes they are published on.
    PublishNodes,
    /// A service's.
    Service(ServiceId),
    /// That which gives an attachment its names.
    Names(TaskId),
    /// Those of all tasks of a node: its weight is another.
    Weight(NodeId),
    /// A task's.
    Task(TaskId),
}

impl Part {
    /// What a change is of.
    pub(super) fn of(change: &Change) -> Self {
        match change {
            Change::Cluster(_) => Self::Cluster,
            Change::Node(record) => Self::Node(record.id.clone()),
            Change::NodeRemoved(id) => Self::Node(id.clone()),
            Change::Network(record) => Self::Network(record.id.clone()),
            Change::NetworkRemoved(id) => Self::Network(id.clone()),
            Change::Service(record) => Self::Service(record.id.clone()),
            Change::ServiceRemoved(id) => Self::Service(id.clone()),
            Change::Task(record) => Self::Task(record.id.clone()),
            Change::TaskRemoved(id) => Self::Task(id.clone()),
        }
    }
}

/// What changed since when.
#[derive(Debug)]
pub(crate) struct Journal {
    /// The least index that it reaches back to.
    since: u64,
    /// The index of the last state that was noted.
    at: u64,
    /// When each part changed last.
    changed: BTreeMap<Part, u64>,
    /// The same in order of time.
    order: BTreeSet<(u64, Part)>,
    changed_max: usize,
}

impl Journal {
    /// Begins with the state at `index`.
    pub(crate) fn new(index: u64) -> Self {
        Self::bounded(index, CHANGED_MAX)
    }

    /// Begins with the state at `index`, and never knows more than `changed_max` parts.
    fn bounded(index: u64, changed_max: usize) -> Self {
        let (changed, order) = (BTreeMap::new(), BTreeSet::new());
        Self { since: index, at: index, changed, order, changed_max }
    }

    /// Begins anew with the state at `index`: what was before is unknown, or of another life of the swarm.
    pub(crate) fn begin(&mut self, index: u64) {
        *self = Self::bounded(index, self.changed_max);
    }

    /// Notes what one entry of the log made of the state: `old` is the state that was noted last.
    pub(crate) fn note(&mut self, old: &State, new: &State) {
        self.at = new.index;
        for part in view::touched(old, new) {
            if let Some(before) = self.changed.insert(part.clone(), new.index) {
                self.order.remove(&(before, part.clone()));
            }
            self.order.insert((new.index, part));
        }
        while self.changed.len() > self.changed_max
            && let Some((index, part)) = self.order.pop_first()
        {
            self.changed.remove(&part);
            // What else changed there may be known still, but is not all.
            self.since = index;
        }
    }

    /// What changed after `index`; `None` where that is out of reach: too long ago, or ahead of the state.
    pub(crate) fn since(&self, index: u64) -> Option<BTreeSet<Part>> {
        let is_within = (self.since..=self.at).contains(&index);
        let after = (index.saturating_add(1), Part::Cluster);
        is_within.then(|| self.order.range(after..).map(|(_, part)| part.clone()).collect())
    }
}

#[cfg(test)]
impl Journal {
    /// What brings `viewer` from the table at `index` to that of `state`.
    pub(super) fn told(&self, index: u64, state: &State, viewer: &NodeId) -> Option<Vec<Change>> {
        Some(view::renewed(state, view::with_following(state, self.since(index)?), viewer))
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::table::{Delta, NodeState, Table, TaskState};
    use proptest::prelude::*;

    use super::*;
    use crate::command::Action;
    use crate::testing::{World, attach, attachment, ingress_port, service};

    const NODES: [&str; 3] = ["n1", "n2", "n3"];

    /// Something that happens to a cluster; the number says what to.
    #[derive(Debug, Clone, Copy)]
    enum Event {
        Service(u8),
        Update(u8),
        Remove(u8),
        Orchestrate,
        Nodes,
        Report(u8),
        Node(u8),
        Weight(u8),
        Edge(u8),
        RemoveNode(u8),
        Return(u8),
        Attach(u8),
        Network(u8),
        Rotate,
        Wait,
    }

    fn event() -> impl Strategy<Value = Event> {
        let at = any::<u8>;
        prop_oneof![
            2 => at().prop_map(Event::Service),
            1 => at().prop_map(Event::Update),
            1 => at().prop_map(Event::Remove),
            4 => Just(Event::Orchestrate),
            3 => Just(Event::Nodes),
            2 => at().prop_map(Event::Report),
            2 => at().prop_map(Event::Node),
            1 => at().prop_map(Event::Weight),
            1 => at().prop_map(Event::Edge),
            1 => at().prop_map(Event::RemoveNode),
            1 => at().prop_map(Event::Return),
            2 => at().prop_map(Event::Attach),
            1 => at().prop_map(Event::Network),
            1 => Just(Event::Rotate),
            1 => Just(Event::Wait),
        ]
    }

    /// What is refused doesn't happen.
    fn happen(world: &mut World, event: Event) {
        let existing = |world: &World, at: u8| {
            let ids: Vec<ServiceId> = world.state.services.keys().cloned().collect();
            (!ids.is_empty()).then(|| ids[usize::from(at) % ids.len()].clone())
        };
        let live = |world: &World, at: u8| {
            let name = NODES[usize::from(at) % NODES.len()];
            world.state.nodes.contains_key(&NodeId::from(name)).then_some(name)
        };
        match event {
            Event::Service(at) => {
                let mut spec = service(&format!("s{}", at % 4), u64::from(at % 3));
                if at & 4 != 0 {
                    spec.endpoint.ports.push(ingress_port(0, 80));
                }
                if at & 8 != 0 {
                    spec.task.networks.push(attachment("net-app"));
                }
                if at & 16 != 0 {
                    let nodes = "node.labels.edge==yes".to_owned();
                    spec.labels.insert("shoal.publish.nodes".to_owned(), nodes);
                }
                let id = format!("svc-s{}", at % 4).as_str().into();
                let _ = world.try_to(Action::CreateService { id, spec: Box::new(spec) });
            }
            Event::Update(at) => {
                if let Some(id) = existing(world, at) {
                    world.update_service(&id, |spec| spec.task.force_update += 1);
                }
            }
            Event::Remove(at) => {
                if let Some(id) = existing(world, at) {
                    world.must(Action::RemoveService { id });
                }
            }
            Event::Orchestrate => drop(world.orchestrate()),
            Event::Nodes => {
                let live = world.state.tasks.values().filter(|task| task.node.is_some() && !task.has_ended());
                for task in live.cloned().collect::<Vec<_>>() {
                    world.report(
                        &task,
                        if task.is_wanted() { TaskState::Running } else { TaskState::Shutdown },
                    );
                }
            }
            Event::Report(at) => {
                let placed =
                    world.state.tasks.values().filter(|task| task.node.is_some() && !task.has_ended());
                let placed: Vec<_> = placed.cloned().collect();
                if !placed.is_empty() {
                    let states = [TaskState::Running, TaskState::Failed, TaskState::Preparing];
                    world.report(&placed[usize::from(at) % placed.len()], states[usize::from(at % 3)]);
                }
            }
            Event::Node(at) => {
                if let Some(node) = live(world, at) {
                    let states = [NodeState::Ready, NodeState::Down, NodeState::Ready, NodeState::Unknown];
                    world.set_node_state(node, states[usize::from(at >> 4) % 4]);
                }
            }
            Event::Weight(at) => {
                if let Some(node) = live(world, at) {
                    world.label_node(node, "shoal.weight", &(1 + at % 100).to_string());
                }
            }
            Event::Edge(at) => {
                if let Some(node) = live(world, at) {
                    world.label_node(node, "edge", if at & 16 != 0 { "yes" } else { "no" });
                }
            }
            // The first stays: it is who looks.
            Event::RemoveNode(at) => match live(world, at).filter(|node| *node != NODES[0]) {
                Some(node) => drop(world.must(Action::RemoveNode { id: node.into(), force: true })),
                None => NODES.iter().for_each(|node| {
                    if !world.state.nodes.contains_key(&NodeId::from(*node)) {
                        world.add_node(node);
                    }
                }),
            },
            Event::Return(at) => world.update_cluster(|spec| {
                let path = if at & 1 == 0 { "direct" } else { "tunnel" };
                spec.labels.insert("shoal.return".to_owned(), path.to_owned());
            }),
            Event::Attach(at) => {
                if let Some(node) = live(world, at) {
                    let id = format!("a{}", world.state.index);
                    let _ = world.try_to(attach(&id, node, "front", &id));
                }
            }
            Event::Network(at) => {
                let name = format!("more{}", at % 3);
                let id = NetworkId::from(format!("net-{name}"));
                if world.state.networks.contains_key(&id) {
                    let _ = world.try_to(Action::RemoveNetwork { id });
                } else {
                    world.create_network(&name);
                }
            }
            Event::Rotate => drop(world.must(Action::RotateKeys)),
            Event::Wait => world.now_ns += 6_000_000_000,
        }
    }

    /// A world's states, one for each command; and what a journal of at most so many parts makes of them.
    struct Told {
        states: Vec<State>,
        journal: Journal,
    }

    impl Told {
        fn new(changed_max: usize, events: &[Event]) -> Self {
            let mut world = World::new(&NODES);
            world.create_network("app");
            world.create_attachable_network("front");
            let journal = Journal::bounded(world.state.index, changed_max);
            let mut told = Self { states: vec![world.state.clone()], journal };
            let mut seen = world.log.len();
            for event in events {
                happen(&mut world, *event);
                // Each command by itself, as each entry of the log is noted.
                for command in &world.log[seen..] {
                    let old = told.states.last().unwrap();
                    let (new, _) = crate::apply::apply(old, old.index + 1, command).unwrap();
                    if new.index != old.index {
                        told.journal.note(old, &new);
                        told.states.push(new);
                    }
                }
                seen = world.log.len();
                assert_eq!(told.states.last().unwrap().tasks, world.state.tasks);
            }
            told
        }
    }

    fn caught_up(journal: &Journal, from: &State, to: &State, viewer: &NodeId) -> Option<(Table, usize)> {
        let changes = journal.told(from.index, to, viewer)?;
        let mut table = view::table(from, viewer).unwrap();
        let count = changes.len();
        table.apply(Delta { from: from.index, to: to.index, changes }).unwrap();
        Some((table, count))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever happens and however little is remembered, a node that is told what changed since its index has the table that
        /// a snapshot would have given it.
        #[test]
        fn what_changed_leads_from_any_table_within_reach_to_the_last(
            events in prop::collection::vec(event(), 0..60),
            changed_max in prop_oneof![Just(0_usize), 1..40_usize, Just(CHANGED_MAX)],
        ) {
            let Told { states, journal } = Told::new(changed_max, &events);
            let last = states.last().unwrap();
            prop_assert!(journal.changed.len() <= changed_max);
            prop_assert_eq!(journal.changed.len(), journal.order.len());
            for state in &states {
                let is_within = state.index >= journal.since;
                for viewer in NODES.map(NodeId::from) {
                    let caught_up = caught_up(&journal, state, last, &viewer).map(|(table, _)| table);
                    prop_assert_eq!(caught_up, is_within.then(|| view::table(last, &viewer).unwrap()));
                }
            }
            prop_assert!(changed_max < CHANGED_MAX || journal.since == states[0].index);
        }
    }

    #[test]
    fn what_changed_often_is_told_once_and_as_the_asker_sees_it() {
        // Two tasks that run; then the weights of their nodes change, again and again.
        let mut events = vec![Event::Service(5), Event::Orchestrate, Event::Orchestrate, Event::Nodes];
        let before = events.len();
        events.extend((0..9).map(Event::Weight));
        let Told { states, journal } = Told::new(CHANGED_MAX, &events);
        let from = &states[Told::new(CHANGED_MAX, &events[..before]).states.len() - 1];
        let last = states.last().unwrap();
        let tasks: Vec<_> = last.tasks.values().cloned().collect();
        assert_eq!(tasks.len(), 2);
        for task in tasks {
            let node = task.node.clone().unwrap();
            for viewer in NODES.map(NodeId::from) {
                let changes = journal.told(from.index, last, &viewer).unwrap();
                let told: Vec<_> = changes
                    .iter()
                    .filter_map(|change| match change {
                        Change::Task(record) if record.id == task.id => Some(record.spec.is_some()),
                        _ => None,
                    })
                    .collect();
                assert_eq!(told, [viewer == node], "{changes:?}");
            }
        }
    }

    #[test]
    fn what_comes_and_goes_unseen_is_removed_without_harm() {
        let events = [Event::Service(2), Event::Orchestrate, Event::Orchestrate, Event::Remove(0)];
        let Told { states, journal } = Told::new(CHANGED_MAX, &events);
        let (first, last) = (states.first().unwrap(), states.last().unwrap());
        let (table, count) = caught_up(&journal, first, last, &"n1".into()).unwrap();
        assert!(count > 0);
        assert_eq!(table, view::table(last, &"n1".into()).unwrap());
    }

    #[test]
    fn an_index_ahead_of_the_state_or_before_the_beginning_is_out_of_reach() {
        let mut world = World::new(&["n1"]);
        let mut journal = Journal::new(world.state.index);
        let began = world.state.index;
        for _ in 0..3 {
            let old = world.state.clone();
            world.must(Action::RotateKeys);
            journal.note(&old, &world.state);
        }
        assert_eq!(journal.since(began - 1), None);
        assert_eq!(journal.since(began), Some([Part::Cluster].into()));
        assert_eq!(journal.since(world.state.index), Some(BTreeSet::new()));
        assert_eq!(journal.since(world.state.index + 1), None);
        assert_eq!(journal.since(u64::MAX), None);
        journal.begin(began + 100);
        assert_eq!(journal.since(world.state.index), None);
        assert_eq!(journal.since(began + 100), Some(BTreeSet::new()));
    }

    #[test]
    fn the_oldest_is_forgotten_first_and_what_changes_again_is_not_old() {
        let mut world = World::new(&["n1", "n2", "n3"]);
        let mut journal = Journal::bounded(world.state.index, 2);
        let mut down = |world: &mut World, node: &str, state| {
            let old = world.state.clone();
            world.set_node_state(node, state);
            journal.note(&old, &world.state);
            (world.state.index, journal.since, journal.changed.len())
        };
        let began = world.state.index;
        let (_, since, count) = down(&mut world, "n1", NodeState::Down);
        assert_eq!((since, count), (began, 1));
        let (second, since, count) = down(&mut world, "n2", NodeState::Down);
        assert_eq!((since, count), (began, 2));
        let (_, since, count) = down(&mut world, "n1", NodeState::Ready);
        assert_eq!((since, count), (began, 2), "n1 is known already");
        let (_, since, count) = down(&mut world, "n3", NodeState::Down);
        assert_eq!((since, count), (second, 2), "n2 is forgotten");
        let parts = [Part::Node("n1".into()), Part::Node("n3".into())];
        assert_eq!(journal.since(second), Some(parts.into()));
    }

    #[test]
    fn what_no_node_sees_takes_no_room() {
        let mut world = World::new(&["n1"]);
        let mut journal = Journal::new(world.state.index);
        let old = world.state.clone();
        // A description that no record shows.
        world.has_addresses("n1", &["192.0.2.9"]);
        world.update_cluster(|spec| spec.task_history = 3);
        world.must(Action::SetNodeIssuer { id: "n1".into(), issuer: mesh_api::tls::KeyId::default() });
        journal.note(&old, &world.state);
        assert_eq!(journal.since(old.index), Some([Part::PublishNodes].into()));
        assert_eq!(
            view::with_following(&world.state, [Part::PublishNodes].into()),
            [Part::PublishNodes].into()
        );
    }
}
