//! The scheduler: gives pending tasks a node. First filters, then the node with the fewest tasks of the service, then
//! with the fewest tasks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_api::id::{NodeId, ServiceId};
use mesh_api::table::{Protocol, TaskState};

use super::pass::Pass;
use crate::apply::{has_free_address, lacks_vip, publishes_in_ingress};
use crate::command::Step;
use crate::model::constraint::{Constraint, parse_all};
use crate::model::{Node, State, Task};

/// Tries again for tasks and services that lack an address, where there are free ones.
pub(super) fn allocate(pass: &mut Pass<'_>) {
    let state = pass.draft.state.clone();
    let services = state.services.values().filter(|service| lacks_vip(service));
    for service in services {
        let lacking = service.endpoint.vips.iter().filter(|vip| vip.addr.is_none());
        if lacking.into_iter().any(|vip| has_free_address(&pass.draft.state, &vip.network)) {
            pass.take(Step::AllocateService { service: service.id.clone() });
        }
    }
    let waiting = |task: &&Arc<Task>| task.status.state == TaskState::New && task.is_wanted();
    let open = pass.open_tasks();
    let mut waiting: Vec<&Arc<Task>> = open.iter().filter(waiting).collect();
    waiting.sort_by_key(|task| task.incarnation);
    for task in waiting {
        let mut lacking = task.endpoints.iter().filter(|endpoint| endpoint.addr.is_none());
        if lacking.all(|endpoint| has_free_address(&pass.draft.state, &endpoint.network)) && !pass.is_full() {
            pass.take(Step::AllocateTask { task: task.id.clone() });
        }
    }
}

/// How often a service's tasks may fail on a node lately before others come first, and what lately is: SwarmKit's.
const FAILURES_MAX: usize = 5;
const FAILURES_WINDOW_NS: u64 = 5 * 60 * 1_000_000_000;

/// What a node carries.
#[derive(Debug, Default)]
struct Load {
    tasks: usize,
    host_ports: BTreeSet<(Protocol, u16)>,
}

/// What a node carries of one service.
#[derive(Debug, Clone, Copy, Default)]
struct Share {
    tasks: usize,
    /// Tasks that failed lately.
    failures: usize,
}

impl Share {
    /// A rank that puts nodes on which a service keeps failing last; otherwise failures don't matter.
    fn failures_rank(self) -> usize {
        if self.failures >= FAILURES_MAX { self.failures } else { 0 }
    }
}

/// What the nodes carry.
#[derive(Debug)]
struct Loads<'a> {
    state: &'a State,
    now_ns: u64,
    nodes: BTreeMap<NodeId, Load>,
    /// Of the services that were asked for.
    shares: BTreeMap<ServiceId, BTreeMap<NodeId, Share>>,
}

impl<'a> Loads<'a> {
    fn new(state: &'a State, now_ns: u64) -> Self {
        let mut loads = Self { state, now_ns, nodes: BTreeMap::new(), shares: BTreeMap::new() };
        // A preset node of a global service counts once the task is placed.
        for task in state.tasks.values().filter(|task| is_placed(task)) {
            if let Some(node) = &task.node {
                loads.add_to_node(node, task);
            }
        }
        loads
    }

    fn add_to_node(&mut self, node: &NodeId, task: &Task) {
        if !self.nodes.contains_key(node) {
            self.nodes.insert(node.clone(), Load::default());
        }
        if let Some(load) = self.nodes.get_mut(node) {
            load.tasks += usize::from(task.is_wanted());
            load.host_ports.extend(task.host_ports.iter().map(|port| (port.protocol, port.published)));
        }
    }

    /// A task is placed.
    fn add(&mut self, node: &NodeId, task: &Task) {
        self.add_to_node(node, task);
        if let Some(shares) = self.shares.get_mut(&task.service) {
            shares.entry(node.clone()).or_default().tasks += usize::from(task.is_wanted());
        }
    }

    /// What the nodes carry, and what of it is of `service`.
    fn of(&mut self, service: &ServiceId) -> (&BTreeMap<NodeId, Load>, &BTreeMap<NodeId, Share>) {
        let shares = self.shares.entry(service.clone());
        (&self.nodes, shares.or_insert_with(|| shares_of(self.state, service, self.now_ns)))
    }
}

fn is_placed(task: &Task) -> bool {
    task.status.state >= TaskState::Assigned && !task.has_ended()
}

fn shares_of(state: &State, service: &ServiceId, now_ns: u64) -> BTreeMap<NodeId, Share> {
    let mut shares: BTreeMap<NodeId, Share> = BTreeMap::new();
    for task in state.tasks_of_service(service) {
        let Some(node) = &task.node else { continue };
        let has_failed = matches!(task.status.state, TaskState::Failed | TaskState::Rejected)
            && task.ended_ns.saturating_add(FAILURES_WINDOW_NS) > now_ns;
        let share = shares.entry(node.clone()).or_default();
        share.tasks += usize::from(is_placed(task) && task.is_wanted());
        share.failures += usize::from(has_failed);
    }
    shares
}

/// Why a node does not take a task, in the order in which SwarmKit checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Misfit {
    NotAvailable,
    Encryption,
    Egress,
    Constraints,
    HostPort,
    MaxReplicas,
}

impl Misfit {
    fn explain(self, count: usize) -> String {
        let nodes = if count == 1 { "1 node".to_owned() } else { format!("{count} nodes") };
        match self {
            Self::NotAvailable => format!("{nodes} not available for new tasks"),
            Self::Encryption => format!("encryption of its networks not available on {nodes}"),
            Self::Egress => format!("egress address (label shoal.egress) not available on {nodes}"),
            Self::Constraints => format!("scheduling constraints not satisfied on {nodes}"),
            Self::HostPort => format!("host-mode port already in use on {nodes}"),
            Self::MaxReplicas => format!("max replicas per node limit exceed on {nodes}"),
        }
    }
}

/// Gives pending tasks a node.
pub(super) fn place(pass: &mut Pass<'_>) {
    let state = pass.draft.state.clone();
    let pending = |task: &&Arc<Task>| task.status.state == TaskState::Pending && task.is_wanted();
    let open = pass.open_tasks();
    let mut tasks: Vec<&Arc<Task>> = open.iter().filter(pending).collect();
    if tasks.is_empty() {
        return;
    }
    tasks.sort_by_key(|task| task.incarnation);
    let mut loads = Loads::new(&state, pass.now_ns);
    for task in tasks {
        if pass.is_full() {
            return;
        }
        // Constraints are checked when a service comes in; what does not parse holds nowhere.
        let constraints = parse_all(&task.template.placement.constraints).ok();
        match choose(&state, &mut loads, task, constraints.as_deref()) {
            Ok(node) => {
                loads.add(&node, task);
                pass.take(Step::Assign { task: task.id.clone(), node });
            }
            Err(err) if err == task.status.err => {}
            Err(err) => pass.take(Step::Unplaceable { task: task.id.clone(), err }),
        }
    }
}

/// Whether a task's packets from or to other nodes are encrypted. What is on the ingress network for the way out alone
/// exchanges none there.
fn is_encrypted(state: &State, task: &Task) -> bool {
    let service = state.services.get(&task.service);
    let publishes = service.is_some_and(|service| publishes_in_ingress(&service.spec.endpoint));
    let mut networks = task.endpoints.iter().filter_map(|endpoint| state.networks.get(&endpoint.network));
    networks.any(|network| network.is_encrypted() && (publishes || !network.spec.ingress))
}

fn choose(
    state: &State,
    loads: &mut Loads<'_>,
    task: &Task,
    constraints: Option<&[Constraint]>,
) -> Result<NodeId, String> {
    let (empty, encrypted) = (Load::default(), is_encrypted(state, task));
    let (loads, shares) = loads.of(&task.service);
    let mut misfits: BTreeMap<Misfit, usize> = BTreeMap::new();
    let mut best: Option<((usize, usize, usize), &NodeId)> = None;
    let candidates =
        state.nodes.values().filter(|node| task.node.as_ref().is_none_or(|preset| *preset == node.id));
    for node in candidates {
        let load = loads.get(&node.id).unwrap_or(&empty);
        let share = shares.get(&node.id).copied().unwrap_or_default();
        if let Some(misfit) = misfit(node, load, share, task, constraints, encrypted) {
            *misfits.entry(misfit).or_default() += 1;
            continue;
        }
        let rank = (share.failures_rank(), share.tasks, load.tasks);
        if best.is_none_or(|(least, _)| rank < least) {
            best = Some((rank, &node.id));
        }
    }
    best.map(|(_, node)| node.clone()).ok_or_else(|| explain(&misfits))
}

fn misfit(
    node: &Node,
    load: &Load,
    share: Share,
    task: &Task,
    constraints: Option<&[Constraint]>,
    encrypted: bool,
) -> Option<Misfit> {
    let max_replicas = task.template.placement.max_replicas;
    if !node.is_schedulable() {
        Some(Misfit::NotAvailable)
    } else if encrypted && !node.encrypts() {
        Some(Misfit::Encryption)
    } else if !node.can_send_under(&task.egress) {
        Some(Misfit::Egress)
    } else if !constraints.is_some_and(|all| all.iter().all(|constraint| constraint.holds(node))) {
        Some(Misfit::Constraints)
    } else if task.host_ports.iter().any(|port| load.host_ports.contains(&(port.protocol, port.published))) {
        Some(Misfit::HostPort)
    } else if max_replicas > 0 && share.tasks as u64 >= max_replicas {
        Some(Misfit::MaxReplicas)
    } else {
        None
    }
}

/// SwarmKit's text: the commonest reason first.
fn explain(misfits: &BTreeMap<Misfit, usize>) -> String {
    let mut reasons: Vec<(Misfit, usize)> = misfits.iter().map(|(misfit, count)| (*misfit, *count)).collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let reasons: Vec<String> = reasons.into_iter().map(|(misfit, count)| misfit.explain(count)).collect();
    if reasons.is_empty() {
        "no suitable node".to_owned()
    } else {
        format!("no suitable node ({})", reasons.join("; "))
    }
}
