//! The tasks of this node in the loop's hands: started, drained, stopped, found again, cleared away.

use std::net::{IpAddr, Ipv4Addr};

use mesh_api::error::chain;
use mesh_api::id::TaskId;
use mesh_api::table::{Table, TaskState};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::assign::{AssignError, LinkPlan, Wiring, assign, wire};
use super::attach::{Callers, Inside};
use super::driver::{BringUpError, End, Event, StopPlan};
use super::plan::{Drain, Phase, TaskView};
use super::plane::Plane;
use super::setup::{NodeError, RESOLV_CONF};
use super::{Worker, status};
use crate::dataplane::LocalEndpoint;
use crate::links::{Egress, Links, TaskNetwork};
use crate::runtime::layout::Exit;
use crate::runtime::{Found, Running};

/// What follows the table and the uplinks of a running task's links.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Wired {
    /// MTU of each, bytes.
    mtus: Vec<u32>,
    /// What is configured inside; `None` for what was, where the table doesn't hold the task.
    network: Option<TaskNetwork>,
}

/// A task of this node.
#[derive(Debug)]
pub(super) struct LocalTask {
    pub(super) view: TaskView,
    /// Its endpoints, once they are in the dataplane.
    pub(super) endpoints: Vec<LocalEndpoint>,
    /// Links that programs are attached to.
    pub(super) attached: Vec<u32>,
    /// Aliases that it holds.
    pub(super) aliases: Vec<Ipv4Addr>,
    /// What it sends to the outside under, where its service has fixed addresses.
    egress: Vec<IpAddr>,
    /// Where its links lead, while it runs.
    pub(super) inside: Option<Inside>,
    /// Who waits for it.
    pub(super) callers: Callers,
    /// What its links were brought to; `None` after a failure.
    wired: Option<Wired>,
    /// Why it is stopped though the managers want it to run.
    failure: Option<&'static str>,
    /// Tells its driver to stop it.
    stop: watch::Sender<bool>,
}

impl LocalTask {
    pub(super) fn new(phase: Phase, stop: watch::Sender<bool>) -> Self {
        Self {
            view: TaskView { phase, drain: None },
            endpoints: Vec::new(),
            attached: Vec::new(),
            aliases: Vec::new(),
            egress: Vec::new(),
            inside: None,
            callers: Callers::default(),
            wired: Some(Wired::default()),
            failure: None,
            stop,
        }
    }

    pub(super) fn ended() -> Self {
        Self::new(Phase::Ended, watch::channel(true).0)
    }

    /// Its links are made as `wiring` says.
    pub(super) fn wire(&mut self, wiring: &Wiring) {
        let Wiring { links, network, .. } = wiring;
        let mtus = links.iter().map(|(_, link)| link.mtu).collect();
        self.wired = Some(Wired { mtus, network: Some(network.clone()) });
    }

    pub(super) fn has_ended(&self) -> bool {
        self.view.phase == Phase::Ended
    }

    /// Notes the index that this node and the others have `settled` on by `now`.
    pub(super) fn note_settled(&mut self, settled: u64, now: Instant) {
        if let Some(drain) = &mut self.view.drain {
            drain.note(settled, now);
        }
    }

    /// When its drain is over without news, if that is waited for.
    pub(super) fn drain_deadline(&self) -> Option<Instant> {
        let waiting = matches!(self.view.phase, Phase::Starting | Phase::Running);
        self.view.drain.filter(|_| waiting).map(|drain| drain.deadline())
    }
}

impl<P: Plane> Worker<P> {
    pub(super) fn start(&mut self, id: &TaskId) {
        let is_attachment =
            |table: &Table| table.tasks.get(id)?.spec.as_ref().map(|spec| spec.is_attachment());
        if self.with_table(is_attachment).flatten() == Some(true) {
            return self.start_attachment(id);
        }
        let (hostname, plan) = (&self.config.hostname, self.setup.link_plan());
        let resolv_conf = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
        let assigned = self.with_table(|table| {
            table.tasks.get(id).map(|record| assign(table, record, hostname, &resolv_conf, plan))
        });
        let Some(assigned) = assigned.flatten() else { return };
        let assignment = match assigned {
            Ok(assignment) => assignment,
            Err(error) => {
                let state = match error {
                    AssignError::Image(_) | AssignError::TooManyEndpoints => TaskState::Rejected,
                    AssignError::NoSpec | AssignError::NoSubnet { .. } => TaskState::Failed,
                };
                self.tasks.insert(id.clone(), LocalTask::ended());
                self.report(status(id, state, "preparing", error.to_string()));
                return;
            }
        };
        let (sender, stop) = watch::channel(false);
        let mut task = LocalTask::new(Phase::Starting, sender);
        let links = &assignment.wiring.links;
        task.wire(&assignment.wiring);
        task.egress.clone_from(&assignment.spec.egress);
        while task.aliases.len() < links.len() {
            let Some(alias) = self.aliases.take() else {
                for alias in task.aliases {
                    self.aliases.release(alias);
                }
                self.tasks.insert(id.clone(), LocalTask::ended());
                let err = "this node has no node-local address left for the task".to_owned();
                self.report(status(id, TaskState::Failed, "preparing", err));
                return;
            };
            task.aliases.push(alias);
        }
        let aliases = task.aliases.clone();
        self.tasks.insert(id.clone(), task);
        self.report(status(id, TaskState::Accepted, "accepted", String::new()));
        tokio::spawn(self.drivers.clone().start(id.clone(), assignment, aliases, stop));
    }

    pub(super) fn decline(&mut self, id: &TaskId) {
        self.tasks.insert(id.clone(), LocalTask::ended());
        self.report(status(id, TaskState::Shutdown, "shutdown before it started", String::new()));
    }

    pub(super) fn drain(&mut self, id: &TaskId) {
        let index = self.with_table(|table| table.index).unwrap_or_default();
        if let Some(task) = self.tasks.get_mut(id) {
            debug!(task = %id, index, "draining");
            task.view.drain = Some(Drain::new(index, Instant::now()));
        }
    }

    pub(super) fn stop(&mut self, id: &TaskId) {
        if let Some(task) = self.tasks.get_mut(id).filter(|task| !task.has_ended()) {
            task.view.phase = Phase::Stopping;
            task.stop.send_replace(true);
        }
    }

    pub(super) fn forget(&mut self, id: &TaskId) {
        self.tasks.remove(id);
        self.statuses.send_modify(|statuses| drop(statuses.remove(id)));
        if let Err(error) = self.runtime.remove(id) {
            warn!(task = %id, error = &error as &dyn std::error::Error, "a task's folder is left behind");
        }
    }

    pub(super) async fn event(&mut self, event: Event) {
        match event {
            Event::Progress { task, state, message } => {
                self.report(status(&task, state, message, String::new()));
            }
            Event::Attach { task, ifindex, done } => {
                let attached = self.setup.plane.attach_endpoint(ifindex);
                if let Err(error) = &attached {
                    warn!(%task, error = error as &dyn std::error::Error, "a task's link can't be attached to");
                }
                if let Some(task) = self.tasks.get_mut(&task) {
                    task.attached.push(ifindex);
                }
                // Before its first packet. An alias of a task with fixed addresses may have become another's, too.
                let rules = self.follow_egress().await;
                let _ = done.send(attached.is_ok() && rules);
            }
            Event::Endpoints { task, endpoints, done } => {
                if let Some(task) = self.tasks.get_mut(&task) {
                    task.endpoints = endpoints;
                }
                let applied = self.apply().await;
                if let Err(error) = &applied {
                    warn!(%task, error = error as &dyn std::error::Error, "a task's endpoints can't be applied");
                }
                let _ = done.send(applied.is_ok());
            }
            Event::Running { task, inside, since_ns } => {
                self.running(&task, inside, since_ns);
                // The table may have changed on its way up.
                self.rewire(&task).await;
            }
            Event::Ended { task, end } => self.end(&task, end).await,
        }
    }

    /// Has tasks send under the fixed addresses of their services; false if the rules don't follow.
    pub(super) async fn follow_egress(&mut self) -> bool {
        let tasks = self.tasks.values();
        let senders =
            tasks.flat_map(|task| task.aliases.iter().map(|alias| (*alias, task.egress.as_slice())));
        let egress = Egress::new(senders, &self.setup.facts);
        let followed = self.setup.send_under(egress).await;
        if let Err(error) = &followed {
            warn!(error = chain(error), "the netfilter rules can't follow the tasks' egress addresses");
        }
        followed.is_ok()
    }

    fn running(&mut self, id: &TaskId, inside: Inside, since_ns: u64) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        let pid = inside.pid();
        task.inside = Some(inside);
        task.callers.attached();
        if task.view.phase == Phase::Starting {
            task.view.phase = Phase::Running;
        }
        let mut status = status(id, TaskState::Running, "started", String::new());
        status.since_ns = since_ns;
        status.pid = pid;
        self.report(status);
    }

    async fn end(&mut self, id: &TaskId, end: End) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        task.view.phase = Phase::Ended;
        task.inside = None;
        task.endpoints.clear();
        let callers = std::mem::take(&mut task.callers);
        let (attached, aliases) = (std::mem::take(&mut task.attached), std::mem::take(&mut task.aliases));
        for ifindex in attached {
            self.setup.plane.detach_endpoint(ifindex);
            if let Err(error) = self.setup.links.remove(ifindex).await {
                warn!(task = %id, error = &error as &dyn std::error::Error, "a task's link is left behind");
            }
        }
        for alias in aliases {
            self.aliases.release(alias);
        }
        self.follow_egress().await;
        self.forget_attachment(id);
        callers.ended(&end);
        self.report_end(id, end);
        self.apply_soon();
    }

    pub(super) fn report_end(&self, id: &TaskId, end: End) {
        let failure = self.tasks.get(id).and_then(|task| task.failure);
        let reported = match end {
            End::NotStarted { state, err, exit_code } => {
                let message =
                    if state == TaskState::Shutdown { "shutdown before it started" } else { "starting" };
                let mut status = status(id, state, message, err);
                status.exit_code = exit_code;
                status
            }
            End::Exited { exit: Exit { code, since_ns, err }, told } => {
                let (state, message) = match (told, code) {
                    (true, _) if failure.is_some() => (TaskState::Failed, "stopped"),
                    (true, _) => (TaskState::Shutdown, "shutdown"),
                    (false, 0) => (TaskState::Complete, "finished"),
                    (false, _) => (TaskState::Failed, "started"),
                };
                // Docker's words for what ended by itself.
                let err = match state {
                    TaskState::Failed if told => failure.unwrap_or_default().to_owned(),
                    TaskState::Failed if err.is_empty() => format!("task: non-zero exit ({code})"),
                    TaskState::Failed => format!("task: non-zero exit ({code}): {err}"),
                    _ => err,
                };
                let mut status = status(id, state, message, err);
                status.since_ns = since_ns;
                status.exit_code = Some(code);
                status
            }
        };
        self.report(reported);
    }

    /// Takes on the tasks of an earlier run of the agent, and clears away what they left. Their links are still to be
    /// refreshed.
    pub(super) async fn adopt(&mut self) -> Result<(), NodeError> {
        let mut found = self.runtime.find()?;
        // Before any alias is given out anew.
        self.adopt_attachments().await?;
        self.adopt_aliases(&mut found);
        for Found { file, state } in found {
            let id = file.task.clone();
            match state {
                Ok(running) => {
                    let aliases: Vec<_> = file.endpoints.iter().map(|endpoint| endpoint.alias).collect();
                    let mut endpoints = Vec::new();
                    for endpoint in file.endpoints {
                        let Some(ifindex) = self.setup.links.index(&endpoint.link).await? else { break };
                        let (task, network) = (id.clone(), endpoint.network);
                        let (addr, alias) = (endpoint.addr, endpoint.alias);
                        endpoints.push(LocalEndpoint { task, network, addr, ifindex, alias });
                    }
                    let plan = StopPlan::new(&file.stop_signal, file.stop_grace_ns);
                    let whole = endpoints.len() == aliases.len();
                    self.adopt_running(&id, running, plan, endpoints, aliases);
                    if let Some(task) = self.tasks.get_mut(&id) {
                        task.egress = file.egress;
                    }
                    if !whole {
                        self.cut_off(&id);
                    }
                }
                Err(exit) => {
                    self.tasks.insert(id.clone(), LocalTask::ended());
                    let is_told =
                        |table: &Table| table.tasks.get(&id).is_none_or(|task| task.desired.is_terminal());
                    let told = self.with_table(is_told).unwrap_or(true);
                    self.report_end(&id, End::Exited { exit, told });
                }
            }
        }
        self.follow_egress().await;
        self.audit_links().await;
        Ok(())
    }

    /// Marks the aliases of running tasks as taken. One that an earlier version gave out and this one has another use
    /// for is replaced: the dataplane translates by what it is told, and the task itself never sees its alias.
    fn adopt_aliases(&mut self, found: &mut [Found]) {
        let mut unfit = Vec::new();
        for Found { file, state } in found {
            for endpoint in file.endpoints.iter_mut().filter(|_| state.is_ok()) {
                if !self.aliases.adopt(endpoint.alias) {
                    unfit.push(&mut endpoint.alias);
                }
            }
        }
        for alias in unfit {
            if let Some(free) = self.aliases.take() {
                *alias = free;
            }
        }
    }

    fn adopt_running(
        &mut self,
        id: &TaskId,
        running: Running,
        plan: StopPlan,
        endpoints: Vec<LocalEndpoint>,
        aliases: Vec<Ipv4Addr>,
    ) {
        info!(task = %id, pid = running.pid(), "found running");
        let (sender, stop) = watch::channel(false);
        let mut task = LocalTask::new(Phase::Running, sender);
        task.inside = Some(Inside::Process(running.pid()));
        task.aliases = aliases;
        task.attached = endpoints.iter().map(|endpoint| endpoint.ifindex).collect();
        task.endpoints = endpoints;
        self.tasks.insert(id.clone(), task);
        tokio::spawn(self.drivers.clone().watch(id.clone(), running, plan, stop));
    }

    /// Removes tasks' links that belong to no task of ours, and stops tasks whose links are gone.
    pub(super) async fn audit_links(&mut self) {
        let facts = match self.setup.links.facts().await {
            Ok(facts) => facts,
            Err(error) => {
                return warn!(error = &error as &dyn std::error::Error, "interfaces can't be listed");
            }
        };
        let ours = |ifindex| self.tasks.values().any(|task| task.attached.contains(&ifindex));
        // A task on its way up makes links before it tells of them.
        if self.tasks.values().all(|task| task.view.phase != Phase::Starting) {
            for link in facts.links.iter().filter(|link| link.is_task_link() && !ours(link.ifindex)) {
                info!(link = link.name, "removing the link of no task");
                if let Err(error) = self.setup.links.remove(link.ifindex).await {
                    warn!(link = link.name, error = chain(&error), "it can't be removed");
                }
            }
        }
        let there = |ifindex: &u32| facts.links.iter().any(|link| link.ifindex == *ifindex);
        let cut_off = self.tasks.iter().filter(|(_, task)| {
            task.view.phase == Phase::Running
                && !task.endpoints.iter().all(|endpoint| there(&endpoint.ifindex))
        });
        let cut_off: Vec<_> = cut_off.map(|(id, _)| id.clone()).collect();
        for id in cut_off {
            self.cut_off(&id);
        }
    }

    /// Stops a task that lost its network, for the managers to replace it.
    pub(super) fn cut_off(&mut self, id: &TaskId) {
        warn!(task = %id, "a task's link is gone; stopping the task");
        if let Some(task) = self.tasks.get_mut(id) {
            task.failure = Some("the task's network link was removed");
        }
        self.stop(id);
    }

    /// Attaches programs again to where they are to be, and brings links up to date.
    pub(super) async fn refresh_links(&mut self) {
        for (id, task) in &self.tasks {
            for endpoint in &task.endpoints {
                if let Err(error) = self.setup.plane.attach_endpoint(endpoint.ifindex) {
                    warn!(task = %id, error = chain(&error), "a task's link can't be attached to");
                }
            }
        }
        self.rewire_all().await;
    }

    /// Brings running tasks' links to what the table and the uplinks make of them, where they are not.
    pub(super) async fn rewire_all(&mut self) {
        let ids: Vec<_> = self.tasks.keys().cloned().collect();
        for id in ids {
            self.rewire(&id).await;
        }
    }

    /// Brings a running task's links to what the table and the uplinks make of them.
    async fn rewire(&mut self, id: &TaskId) {
        let plan = self.setup.link_plan();
        let Some(task) = self.tasks.get(id) else { return };
        let Some(inside) = task.inside.clone() else { return };
        let wire = |table: &Table| Wired::new(table, id, &task.endpoints, plan, inside.interface());
        let wanted = self.with_table(wire).unwrap_or_default();
        if task.wired.as_ref().is_some_and(|wired| wired.holds(&wanted)) {
            return;
        }
        let done = rewire(&self.setup.links, &inside, &task.endpoints, &wanted).await;
        let Some(task) = self.tasks.get_mut(id) else { return };
        match done {
            Ok(()) => {
                debug!(task = %id, mtus = ?wanted.mtus, "links brought up to date");
                task.wired = Some(wanted);
            }
            // It is tried again, and said once.
            Err(error) => {
                if task.wired.take().is_some() {
                    warn!(task = %id, error = chain(&error), "a task's links can't be brought up to date");
                }
            }
        }
    }
}

impl Wired {
    /// What the links behind `endpoints` are to be. Without the task's record, they are only resized.
    fn new(
        table: &Table,
        task: &TaskId,
        endpoints: &[LocalEndpoint],
        plan: LinkPlan,
        interface: Option<&str>,
    ) -> Self {
        let mtu = |endpoint: &LocalEndpoint| {
            let network = table.networks.get(&endpoint.network);
            network.map_or(plan, |network| plan.within(network)).mtu
        };
        let wiring = table.tasks.get(task).and_then(|record| wire(table, record, plan, interface).ok());
        Self { mtus: endpoints.iter().map(mtu).collect(), network: wiring.map(|wiring| wiring.network) }
    }

    /// Whether links brought to this are as `wanted`.
    fn holds(&self, wanted: &Self) -> bool {
        self.mtus == wanted.mtus && (wanted.network.is_none() || self.network == wanted.network)
    }
}

/// Sets the MTU of a task's links, on both sides, and configures them again inside: a network may have another subnet,
/// and a link whose MTU was too small for IPv6 has lost its addresses.
async fn rewire(
    links: &Links,
    inside: &Inside,
    endpoints: &[LocalEndpoint],
    wanted: &Wired,
) -> Result<(), BringUpError> {
    let (netns, interface) = (inside.netns()?, inside.interface());
    let inside = Links::open_in(&netns)?;
    for (number, (endpoint, mtu)) in endpoints.iter().zip(&wanted.mtus).enumerate() {
        links.set_mtu(endpoint.ifindex, *mtu).await?;
        let name = interface.map_or_else(|| format!("eth{number}"), str::to_owned);
        if let Some(index) = inside.index(&name).await? {
            inside.set_mtu(index, *mtu).await?;
        }
    }
    match &wanted.network {
        Some(network) => Ok(inside.configure_task(&netns, network).await?),
        None => Ok(()),
    }
}
