//! One task's way from its assignment to its end, told to the node's loop in events.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::error::chain;
use mesh_api::id::TaskId;
use mesh_api::table::TaskState;
use nix::sys::signal::Signal;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::assign::{Assignment, Wiring};
use super::attach::Inside;
use crate::dataplane::LocalEndpoint;
use crate::links::{LinkError, Links};
use crate::runtime::guest::GuestError;
use crate::runtime::layout::{EndpointFile, Exit};
use crate::runtime::{Found, Running, Runtime, RuntimeError, parse_signal};
use crate::sys::netns::Netns;

/// Tasks that are made at once: each takes a few processor-milliseconds, and a node may be given hundreds.
const STARTS_MAX: usize = 8;

/// What a task's driver tells the loop.
#[derive(Debug)]
pub(super) enum Event {
    /// The task entered a state on its way up.
    Progress { task: TaskId, state: TaskState, message: &'static str },
    /// Attach this link, which is not up yet; the answer is whether that worked.
    Attach { task: TaskId, ifindex: u32, done: oneshot::Sender<bool> },
    /// The task's links are configured: put them in the maps, then answer whether that worked.
    Endpoints { task: TaskId, endpoints: Vec<LocalEndpoint>, done: oneshot::Sender<bool> },
    /// The program runs, or what was there before is attached.
    Running { task: TaskId, inside: Inside, since_ns: u64 },
    /// The task is over.
    Ended { task: TaskId, end: End },
}

/// How a task ended.
#[derive(Debug)]
pub(super) enum End {
    /// Its program ended, by itself or because it was told to.
    Exited { exit: Exit, told: bool },
    /// It never ran.
    NotStarted { state: TaskState, err: String, exit_code: Option<i32> },
}

/// What drivers share.
#[derive(Debug, Clone)]
pub(super) struct Drivers {
    pub(super) runtime: Runtime,
    links: Links,
    pub(super) events: mpsc::Sender<Event>,
    starts: Arc<Semaphore>,
}

/// How a task is stopped.
#[derive(Debug, Clone, Copy)]
pub(super) struct StopPlan {
    signal: Signal,
    grace: Duration,
}

impl StopPlan {
    /// From a specification's signal name and grace period.
    pub(super) fn new(signal: &str, grace_ns: u64) -> Self {
        Self {
            signal: parse_signal(signal).unwrap_or(Signal::SIGTERM),
            grace: Duration::from_nanos(grace_ns),
        }
    }
}

/// Why a task could not be brought up.
#[derive(Debug, thiserror::Error)]
pub(super) enum BringUpError {
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("the dataplane does not take the task's links")]
    Dataplane,
    #[error("the agent is stopping")]
    Agent,
    #[error("the task was told to stop before it ran")]
    Stopped,
}

impl Drivers {
    pub(super) fn new(runtime: Runtime, links: Links, events: mpsc::Sender<Event>) -> Self {
        Self { runtime, links, events, starts: Arc::new(Semaphore::new(STARTS_MAX)) }
    }

    /// Brings a task up, and then watches it; `aliases` are its endpoints', in order.
    pub(super) async fn start(
        self,
        task: TaskId,
        assignment: Assignment,
        aliases: Vec<Ipv4Addr>,
        stop: watch::Receiver<bool>,
    ) {
        let plan = StopPlan::new(&assignment.spec.stop_signal, assignment.spec.stop_grace_ns);
        match self.bring_up(&task, &assignment, &aliases, &stop).await {
            Ok(running) => self.watch(task, running, plan, stop).await,
            // The loop is gone; the shim goes with its pipe.
            Err(BringUpError::Agent) => {}
            Err(BringUpError::Stopped) => {
                let (state, err) = (TaskState::Shutdown, String::new());
                self.end(task, End::NotStarted { state, err, exit_code: None }).await;
            }
            Err(error) => {
                let exit_code = match &error {
                    BringUpError::Runtime(RuntimeError::Start { code, .. }) => Some(*code),
                    _ => None,
                };
                let err = chain(&error);
                self.end(task, End::NotStarted { state: TaskState::Failed, err, exit_code }).await;
            }
        }
    }

    /// Watches a running task until its end, and stops it when told to.
    pub(super) async fn watch(
        self,
        task: TaskId,
        running: Running,
        plan: StopPlan,
        mut stop: watch::Receiver<bool>,
    ) {
        let (inside, since_ns) = (Inside::Process(running.pid()), running.since_ns());
        if self.events.send(Event::Running { task: task.clone(), inside, since_ns }).await.is_err() {
            return;
        }
        let told = async { stop.wait_for(|stop| *stop).await.is_ok() };
        let end = tokio::select! {
            // A program that has ended is no longer to be stopped, though its links go with it and are missed.
            biased;
            exit = running.wait() => End::Exited { exit, told: false },
            told = told => {
                // Without word, the loop has dropped its end: the agent stops, the task goes on.
                if !told {
                    return;
                }
                End::Exited { exit: running.stop(plan.signal, plan.grace).await, told: true }
            }
        };
        self.end(task, end).await;
    }

    pub(super) async fn end(self, task: TaskId, end: End) {
        let _ = self.events.send(Event::Ended { task, end }).await;
    }

    async fn bring_up(
        &self,
        task: &TaskId,
        assignment: &Assignment,
        aliases: &[Ipv4Addr],
        stop: &watch::Receiver<bool>,
    ) -> Result<Running, BringUpError> {
        let _turn = self.starts.acquire().await.map_err(|_| BringUpError::Agent)?;
        // It may have waited long for its turn.
        if *stop.borrow() {
            return Err(BringUpError::Stopped);
        }
        self.progress(task, TaskState::Preparing, "preparing").await?;
        let Assignment { spec, init, wiring } = assignment;
        let files = wiring.links.iter().zip(aliases).map(|((network, link), alias)| EndpointFile {
            network: network.clone(),
            addr: link.addr,
            alias: *alias,
            link: link.host_name.clone(),
        });
        let prepared = self.runtime.prepare(task, spec, init, files.collect()).await?;
        let connected = async { self.connect(task, wiring, aliases, &prepared.netns()?).await };
        if let Err(error) = connected.await {
            prepared.abandon();
            return Err(error);
        }
        if *stop.borrow() {
            prepared.abandon();
            return Err(BringUpError::Stopped);
        }
        self.progress(task, TaskState::Starting, "starting").await?;
        Ok(prepared.start().await?)
    }

    /// Makes the task's links and puts them in the dataplane, each attached before it can carry a packet.
    pub(super) async fn connect(
        &self,
        task: &TaskId,
        wiring: &Wiring,
        aliases: &[Ipv4Addr],
        netns: &Netns,
    ) -> Result<(), BringUpError> {
        let mut endpoints = Vec::new();
        for ((network, link), alias) in wiring.links.iter().zip(aliases) {
            let ifindex = self.links.add_endpoint(netns, link).await?;
            self.ask(|done| Event::Attach { task: task.clone(), ifindex, done }).await?;
            self.links.start_endpoint(ifindex).await?;
            let (task, network) = (task.clone(), network.clone());
            endpoints.push(LocalEndpoint { task, network, addr: link.addr, ifindex, alias: *alias });
        }
        Links::open_in(netns)?.configure_task(netns, &wiring.network).await?;
        self.ask(|done| Event::Endpoints { task: task.clone(), endpoints, done }).await
    }

    pub(super) async fn progress(
        &self,
        task: &TaskId,
        state: TaskState,
        message: &'static str,
    ) -> Result<(), BringUpError> {
        let event = Event::Progress { task: task.clone(), state, message };
        self.events.send(event).await.map_err(|_| BringUpError::Agent)
    }

    async fn ask(&self, event: impl FnOnce(oneshot::Sender<bool>) -> Event) -> Result<(), BringUpError> {
        let (done, answer) = oneshot::channel();
        self.events.send(event(done)).await.map_err(|_| BringUpError::Agent)?;
        match answer.await {
            Ok(true) => Ok(()),
            Ok(false) => Err(BringUpError::Dataplane),
            Err(_) => Err(BringUpError::Agent),
        }
    }
}

/// Stops the tasks of an earlier run, which no loop has taken on, and removes their folders, and the files of what was
/// attached; returns what went wrong.
pub(super) async fn stop_all(runtime: &Runtime) -> Vec<String> {
    let mut errors: Vec<_> = runtime.guests().clear().err().map(|error| chain(&error)).into_iter().collect();
    let found = match runtime.find() {
        Ok(found) => found,
        Err(error) => {
            errors.push(chain(&error));
            return errors;
        }
    };
    let stopped = found.into_iter().map(async |Found { file, state }| {
        if let Ok(running) = state {
            let plan = StopPlan::new(&file.stop_signal, file.stop_grace_ns);
            running.stop(plan.signal, plan.grace).await;
        }
        runtime.remove(&file.task).err().map(|error| chain(&error))
    });
    errors.extend(futures::future::join_all(stopped).await.into_iter().flatten());
    errors
}
