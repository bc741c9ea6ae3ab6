//! A task's folder: which files are in it, who writes each, and what they hold.
//!
//! | file | written by | holds |
//! |---|---|---|
//! | `init.json` | agent | what the shim sets up and runs |
//! | `task.json` | agent | the shim's identity and the endpoints, to find them again after a restart |
//! | `started.json` | shim | that the program started |
//! | `exit.json` | shim | how it ended |
//! | `log`, `log.1` | shim | the program's output, the last 512 KiB to 1 MiB |
//! | `init.log` | shim | its own complaints |
//! | `resolv.conf`, `hosts`, `hostname` | agent | mounted over the task's /etc |

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use mesh_api::id::{NetworkId, TaskId};
use serde::{Deserialize, Serialize};

/// What the shim sets up and runs: `init.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitSpec {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// `KEY=value`: the whole environment.
    pub env: Vec<String>,
    /// Working directory.
    pub dir: String,
    /// `user[:group]`, by name or number; empty for root.
    pub user: String,
    /// Host name.
    pub hostname: String,
    /// Content of /etc/resolv.conf.
    pub resolv_conf: String,
    /// Content of /etc/hosts.
    pub hosts: String,
}

/// An endpoint as the agent made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointFile {
    /// The network.
    pub network: NetworkId,
    /// The address in it.
    pub addr: Ipv4Addr,
    /// The node-local alias.
    pub alias: Ipv4Addr,
    /// Name of the host's side of the pair.
    pub link: String,
}

/// A task as the agent knows it across restarts: `task.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskFile {
    /// The task.
    pub task: TaskId,
    /// The boot of the machine that the numbers below are of.
    pub boot_id: String,
    /// The shim's process id.
    pub shim: u32,
    /// When the shim started, clock ticks since boot.
    pub shim_start_time: u64,
    /// How long after the stop signal the task is killed, ns.
    pub stop_grace_ns: u64,
    /// The stop signal's name.
    pub stop_signal: String,
    /// Its endpoints.
    pub endpoints: Vec<EndpointFile>,
    /// What it sends to the outside under, as [`mesh_api::table::TaskSpec::egress`] says.
    #[serde(default)]
    pub egress: Vec<IpAddr>,
}

/// That the program started: `started.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartedFile {
    /// Its process id in the task's own PID namespace.
    pub inner_pid: u32,
    /// When, ns since the epoch.
    pub since_ns: u64,
}

/// How the program ended: `exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Its exit code; 128 + signal for a signal, as shells count.
    pub code: i32,
    /// When, ns since the epoch.
    pub since_ns: u64,
    /// For people: what else there is to say; empty mostly.
    pub err: String,
}

/// The paths in a task's folder.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) dir: PathBuf,
}

impl Layout {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    pub(crate) fn init(&self) -> PathBuf {
        self.dir.join("init.json")
    }

    pub(crate) fn task(&self) -> PathBuf {
        self.dir.join("task.json")
    }

    pub(crate) fn started(&self) -> PathBuf {
        self.dir.join("started.json")
    }

    pub(crate) fn exit(&self) -> PathBuf {
        self.dir.join("exit.json")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    pub(crate) fn old_log(&self) -> PathBuf {
        self.dir.join("log.1")
    }

    pub(crate) fn init_log(&self) -> PathBuf {
        self.dir.join("init.log")
    }

    /// The files mounted over the task's /etc, each with its place there.
    pub(crate) fn etc(&self) -> [(PathBuf, &'static str); 3] {
        [
            (self.dir.join("resolv.conf"), "/etc/resolv.conf"),
            (self.dir.join("hosts"), "/etc/hosts"),
            (self.dir.join("hostname"), "/etc/hostname"),
        ]
    }
}

/// Nanoseconds since the epoch.
pub(crate) fn now_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
