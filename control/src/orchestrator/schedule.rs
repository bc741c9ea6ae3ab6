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
    let mut waiting: Vec<&Arc<Task>> = state.tasks.values().filter(waiting).collect();
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
    per_service: BTreeMap<ServiceId, usize>,
    host_ports: BTreeSet<(Protocol, u16)>,
    /// Tasks that failed lately.
    failures: BTreeMap<ServiceId, usize>,
}

impl Load {
    fn add(&mut self, task: &Task) {
        if task.is_wanted() {
            self.tasks += 1;
            *self.per_service.entry(task.service.clone()).or_default() += 1;
        }
        self.host_ports.extend(task.host_ports.iter().map(|port| (port.protocol, port.published)));
    }

    /// A rank that puts nodes on which a service keeps failing last; otherwise failures don't matter.
    fn failures_of(&self, service: &ServiceId) -> usize {
        self.failures.get(service).copied().filter(|count| *count >= FAILURES_MAX).unwrap_or_default()
    }

    fn of_service(&self, service: &ServiceId) -> usize {
        self.per_service.get(service).copied().unwrap_or_default()
    }
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
    let mut tasks: Vec<&Arc<Task>> = state.tasks.values().filter(pending).collect();
    if tasks.is_empty() {
        return;
    }
    tasks.sort_by_key(|task| task.incarnation);
    let mut loads = loads(&state, pass.now_ns);
    for task in tasks {
        if pass.is_full() {
            return;
        }
        // Constraints are checked when a service comes in; what does not parse holds nowhere.
        let constraints = parse_all(&task.template.placement.constraints).ok();
        match choose(&state, &loads, task, constraints.as_deref()) {
            Ok(node) => {
                let step = Step::Assign { task: task.id.clone(), node: node.clone() };
                pass.take(step);
                loads.entry(node).or_default().add(task);
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

fn loads(state: &State, now_ns: u64) -> BTreeMap<NodeId, Load> {
    let mut loads: BTreeMap<NodeId, Load> = BTreeMap::new();
    // A preset node of a global service counts once the task is placed.
    let placed = |task: &&Arc<Task>| task.status.state >= TaskState::Assigned && !task.has_ended();
    for task in state.tasks.values().filter(placed) {
        if let Some(node) = &task.node {
            loads.entry(node.clone()).or_default().add(task);
        }
    }
    let failed = |task: &&Arc<Task>| {
        matches!(task.status.state, TaskState::Failed | TaskState::Rejected)
            && task.ended_ns.saturating_add(FAILURES_WINDOW_NS) > now_ns
    };
    for task in state.tasks.values().filter(failed) {
        if let Some(node) = &task.node {
            *loads.entry(node.clone()).or_default().failures.entry(task.service.clone()).or_default() += 1;
        }
    }
    loads
}

fn choose(
    state: &State,
    loads: &BTreeMap<NodeId, Load>,
    task: &Task,
    constraints: Option<&[Constraint]>,
) -> Result<NodeId, String> {
    let (empty, encrypted) = (Load::default(), is_encrypted(state, task));
    let mut misfits: BTreeMap<Misfit, usize> = BTreeMap::new();
    let mut best: Option<((usize, usize, usize), &NodeId)> = None;
    let candidates =
        state.nodes.values().filter(|node| task.node.as_ref().is_none_or(|preset| *preset == node.id));
    for node in candidates {
        let load = loads.get(&node.id).unwrap_or(&empty);
        if let Some(misfit) = misfit(node, load, task, constraints, encrypted) {
            *misfits.entry(misfit).or_default() += 1;
            continue;
        }
        let rank = (load.failures_of(&task.service), load.of_service(&task.service), load.tasks);
        if best.is_none_or(|(least, _)| rank < least) {
            best = Some((rank, &node.id));
        }
    }
    best.map(|(_, node)| node.clone()).ok_or_else(|| explain(&misfits))
}

fn misfit(
    node: &Node,
    load: &Load,
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
    } else if max_replicas > 0 && load.of_service(&task.service) as u64 >= max_replicas {
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
