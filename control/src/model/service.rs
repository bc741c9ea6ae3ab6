//! What is asked for: a service and its specification, in SwarmKit's words and with its defaults.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use mesh_api::id::{NetworkId, ServiceId};
use mesh_api::table::{EndpointMode, Protocol, PublishMode};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Meta;

/// How many tasks a service has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A number of tasks, spread over the nodes.
    Replicated {
        /// How many.
        replicas: u64,
    },
    /// One task on each node that fits.
    Global,
}

/// What a task's process is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// The image.
    pub image: String,
    /// Labels of the container.
    pub labels: BTreeMap<String, String>,
    /// Replaces the image's entry point (`--entrypoint`).
    pub command: Vec<String>,
    /// What follows the entry point.
    pub args: Vec<String>,
    /// `KEY=value` pairs.
    pub env: Vec<String>,
    /// Working directory.
    pub dir: String,
    /// User.
    pub user: String,
    /// Host name.
    pub hostname: String,
    /// Stop signal's name; empty for the image's or `SIGTERM`.
    pub stop_signal: String,
    /// How long after the stop signal the task is killed, ns; `None` for 10 s.
    pub stop_grace_ns: Option<u64>,
    /// Fields of Docker's `ContainerSpec` that Shoal gives back as they came, but does not act on.
    pub other: BTreeMap<String, Value>,
}

/// Stop grace where the specification has none, ns.
pub const DEFAULT_STOP_GRACE_NS: u64 = 10_000_000_000;

/// An amount of resources.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceAmount {
    /// CPUs in 1e-9 units; 0 for none given.
    pub nano_cpus: i64,
    /// Memory, bytes; 0 for none given.
    pub memory_bytes: i64,
    /// Processes; 0 for none given. Limits only.
    pub pids: i64,
}

/// What a task may use, and what is set aside for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// What it may use.
    pub limits: ResourceAmount,
    /// What is set aside.
    pub reservations: ResourceAmount,
}

/// When an ended task is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartCondition {
    /// Never.
    None,
    /// When it ended with an error.
    OnFailure,
    /// Always.
    Any,
}

/// Whether, when and how often an ended task is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// When.
    pub condition: RestartCondition,
    /// How long after the end, ns.
    pub delay_ns: u64,
    /// How often within the window; 0 for no limit.
    pub max_attempts: u64,
    /// The window, ns; 0 for the service's life.
    pub window_ns: u64,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self { condition: RestartCondition::Any, delay_ns: 5_000_000_000, max_attempts: 0, window_ns: 0 }
    }
}

/// Where tasks may run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Expressions as in `--constraint`, all of which must hold; read by [`super::constraint`].
    pub constraints: Vec<String>,
    /// Most tasks of the service on one node; 0 for no limit.
    pub max_replicas: u64,
    /// Fields of Docker's `Placement` that Shoal gives back as they came (`Preferences`, `Platforms`).
    pub other: BTreeMap<String, Value>,
}

/// A network that the tasks of a service are on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkAttachment {
    /// The network.
    pub target: NetworkId,
    /// Further names of the service in it.
    pub aliases: Vec<String>,
    /// Driver options, given back as they came.
    pub options: BTreeMap<String, String>,
}

/// What each task of a service is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskTemplate {
    /// Its process.
    pub container: ContainerSpec,
    /// Its resources (kept and given back; the scheduler does not count them).
    pub resources: Resources,
    /// What happens when it ends.
    pub restart: RestartPolicy,
    /// Where it may run.
    pub placement: Placement,
    /// Its networks, in order; the ingress network is implied.
    pub networks: Vec<NetworkAttachment>,
    /// Counts `docker service update --force`.
    pub force_update: u64,
    /// Fields of Docker's `TaskTemplate` that Shoal gives back as they came (`LogDriver`, `Runtime`).
    pub other: BTreeMap<String, Value>,
}

/// What to do when an update's tasks fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailureAction {
    /// Stop the update.
    Pause,
    /// Go on.
    Continue,
    /// Return to the previous specification.
    Rollback,
}

/// Which task of a slot is first in an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateOrder {
    /// The old task stops before the other starts.
    StopFirst,
    /// The old task stops once the other runs.
    StartFirst,
}

/// How an update (or a rollback) proceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateConfig {
    /// Slots at once; 0 for all.
    pub parallelism: u64,
    /// Pause after each slot, ns.
    pub delay_ns: u64,
    /// What to do when tasks fail.
    pub failure_action: FailureAction,
    /// How long a task is watched for failure once it runs, ns.
    pub monitor_ns: u64,
    /// Share of tasks that may fail, in millionths.
    pub max_failure_ppm: u32,
    /// Which task of a slot is first.
    pub order: UpdateOrder,
}

impl Default for UpdateConfig {
    fn default() -> Self {
        Self {
            parallelism: 1,
            delay_ns: 0,
            failure_action: FailureAction::Pause,
            monitor_ns: 5_000_000_000,
            max_failure_ppm: 0,
            order: UpdateOrder::StopFirst,
        }
    }
}

/// A port to publish, as asked for, or as allocated (then `published` is not 0).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortConfig {
    /// A name; mostly empty.
    pub name: String,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The port that tasks listen on.
    pub target: u16,
    /// The port that nodes answer on; 0 for an automatic one.
    pub published: u16,
    /// Every node, or each task's own.
    pub mode: PublishMode,
}

/// How a service is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSpec {
    /// By VIP, or by its tasks' addresses.
    pub mode: EndpointMode,
    /// Published ports.
    pub ports: Vec<PortConfig>,
}

impl Default for EndpointSpec {
    fn default() -> Self {
        Self { mode: EndpointMode::Vip, ports: Vec::new() }
    }
}

/// What an operator asks of a service (`docker service create`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSpec {
    /// Its name, unique.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// What each task is.
    pub task: TaskTemplate,
    /// How many tasks.
    pub mode: Mode,
    /// How an update proceeds.
    pub update: UpdateConfig,
    /// How a rollback proceeds.
    pub rollback: UpdateConfig,
    /// How it is reached.
    pub endpoint: EndpointSpec,
}

/// A service's VIP in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vip {
    /// The network.
    pub network: NetworkId,
    /// The address; `None` for a service in mode `dnsrr`, or while the network has no free address.
    pub addr: Option<Ipv4Addr>,
    /// Further names of the service in the network.
    pub aliases: Vec<String>,
}

/// How a service is reached, as allocated.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Published ports, none of them 0.
    pub ports: Vec<PortConfig>,
    /// One entry a network that the service is on, the ingress network first where it publishes ports there.
    pub vips: Vec<Vip>,
}

/// Where an update is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateState {
    /// Slots are being replaced.
    Updating,
    /// Stopped by failing tasks.
    Paused,
    /// All slots run the specification.
    Completed,
    /// Slots return to the previous specification.
    RollbackStarted,
    /// The rollback was stopped by failing tasks.
    RollbackPaused,
    /// All slots run the previous specification.
    RollbackCompleted,
}

/// Where an update is, since when, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateStatus {
    /// Where it is.
    pub state: UpdateState,
    /// When it began, ns since the epoch.
    pub started_ns: u64,
    /// When it ended, ns since the epoch.
    pub completed_ns: Option<u64>,
    /// For people.
    pub message: String,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its id.
    pub id: ServiceId,
    /// Version and times.
    pub meta: Meta,
    /// What was asked for.
    pub spec: ServiceSpec,
    /// The table index at which `spec` came in: tells tasks of one specification from those of the next.
    pub spec_version: u64,
    /// What was asked for before, for `docker service rollback`.
    pub previous_spec: Option<Box<ServiceSpec>>,
    /// Ports and VIPs, as allocated.
    pub endpoint: Endpoint,
    /// Where its update is; `None` if it never had one since its last specification.
    pub update_status: Option<UpdateStatus>,
}

impl Service {
    /// The number of tasks asked for; `None` for a global service.
    pub fn replicas(&self) -> Option<u64> {
        match self.spec.mode {
            Mode::Replicated { replicas } => Some(replicas),
            Mode::Global => None,
        }
    }
}
