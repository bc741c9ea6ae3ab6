//! A task: one running instance of a service, in a slot, on a node.
//!
//! An attachment is a task as well: of what runs on its node already, so that it has no service, and is never moved or
//! started again. Its name is where others have their service's.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId};
use mesh_api::table::TaskState;
use serde::{Deserialize, Serialize};

use super::{Meta, PortConfig, TaskTemplate};

/// The [`Task::warmth`] of a task that gets its full share of new flows.
pub const WARM: u8 = 8;

fn warm() -> u8 {
    WARM
}

/// What is known of a task's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskStatus {
    /// Its observed state.
    pub state: TaskState,
    /// When it entered the state, ns since the epoch, by the clock of whoever saw it.
    pub since_ns: u64,
    /// For people: what happens.
    pub message: String,
    /// For people: what went wrong; empty if nothing.
    pub err: String,
    /// The process id on its node, while it runs.
    pub pid: Option<u32>,
    /// The exit code, once it has ended.
    pub exit_code: Option<i32>,
}

/// One attachment of a task to a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskEndpoint {
    /// The network.
    pub network: NetworkId,
    /// The task's address; `None` while the network has no free one.
    pub addr: Option<Ipv4Addr>,
    /// Further names of its service in the network.
    pub aliases: Vec<String>,
}

/// A task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its id.
    pub id: TaskId,
    /// Version and times.
    pub meta: Meta,
    /// Its service, which may be gone by now; the empty id for an attachment.
    pub service: ServiceId,
    /// Its service's name, or an attachment's own.
    pub service_name: String,
    /// Its slot, from 1; 0 for a task of a global service.
    pub slot: u64,
    /// Its node: from the start for a task of a global service, otherwise once it is placed.
    pub node: Option<NodeId>,
    /// What it runs: the service's template when the task was made.
    pub template: Arc<TaskTemplate>,
    /// [`super::Service::spec_version`] of then.
    pub spec_version: u64,
    /// The service's published ports in host mode of then.
    pub host_ports: Vec<PortConfig>,
    /// The service's fixed egress addresses of then, in order.
    #[serde(default)]
    pub egress: Vec<IpAddr>,
    /// Its attachments, the ingress network's first where it has one.
    pub endpoints: Vec<TaskEndpoint>,
    /// A number no other task of the cluster has had; never 0.
    pub incarnation: u32,
    /// What the managers want: `Ready` (placed, held back), `Running`, `Shutdown` or `Remove`.
    pub desired: TaskState,
    /// What is known of its process.
    pub status: TaskStatus,
    /// When the managers learnt that it runs, ns since the epoch by their clock; 0 if it never has.
    pub running_since_ns: u64,
    /// How far its slow start is, in [`WARM`]ths of its weight; it only grows.
    #[serde(default = "warm")]
    pub warmth: u8,
    /// When the managers learnt that it ended, ns since the epoch by their clock; 0 if it has not.
    pub ended_ns: u64,
    /// While `desired` is `Ready`: not to be started before this, ns since the epoch.
    pub start_at_ns: u64,
    /// While `desired` is `Ready`: not to be started before this task has ended.
    pub start_after: Option<TaskId>,
    /// When earlier tasks of this slot and specification were replaced, ns since the epoch, oldest first;
    /// as many as the restart policy can count.
    pub restarts_ns: Vec<u64>,
}

/// What tells the places of a service's tasks apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SlotKey {
    /// A replica, from 1.
    Replica(u64),
    /// A node, of a global service.
    Node(NodeId),
}

impl SlotKey {
    /// That of a task with this slot, 0 for a global service's, and node.
    pub fn new(slot: u64, node: Option<&NodeId>) -> Self {
        match (node, slot) {
            (Some(node), 0) => Self::Node(node.clone()),
            (_, slot) => Self::Replica(slot),
        }
    }
}

impl Task {
    /// Whether it is an attachment.
    pub fn is_attachment(&self) -> bool {
        self.service == ServiceId::from("")
    }

    /// Whether it runs since a moment that has been. Another was noted by a clock that was ahead, say a former leader's, and
    /// nothing waits for that.
    pub fn has_begun(&self, now_ns: u64) -> bool {
        self.running_since_ns <= now_ns
    }

    /// Docker's name of a task: `web.1.<id>`, `agent.<node id>.<id>`; an attachment's own.
    pub fn name(&self) -> String {
        if self.is_attachment() {
            return self.service_name.clone();
        }
        match self.slot_key() {
            SlotKey::Replica(slot) => format!("{}.{slot}.{}", self.service_name, self.id),
            SlotKey::Node(node) => format!("{}.{node}.{}", self.service_name, self.id),
        }
    }

    /// Its place in its service.
    pub fn slot_key(&self) -> SlotKey {
        SlotKey::new(self.slot, self.node.as_ref())
    }

    /// The managers want it to run, now or in a moment.
    pub fn is_wanted(&self) -> bool {
        self.desired <= TaskState::Running
    }

    /// It has ended for good.
    pub fn has_ended(&self) -> bool {
        self.status.state.is_terminal()
    }
}
