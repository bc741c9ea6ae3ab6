//! Attachments: what runs on a node without Shoal and has an endpoint on a network. What the node's API is asked for and
//! answers, and what the agent knows.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::id::{NetworkId, TaskId};

/// What is attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachTarget {
    /// A process, by its number on the node: the network namespace that it is in, until it ends.
    Process(u32),
    /// A network namespace, by the file that it is mounted on, until that is gone.
    Netns(PathBuf),
}

impl fmt::Display for AttachTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid) => write!(f, "process {pid}"),
            Self::Netns(path) => path.display().fmt(f),
        }
    }
}

/// What to attach, and to what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachRequest {
    /// The network, by its id or its name.
    pub network: String,
    /// The name that it is to have there; where not given, the beginning of its id.
    pub name: Option<String>,
    /// Further names.
    pub aliases: Vec<String>,
    /// The IPv4 address that it is to have; any where not given.
    pub addr: Option<Ipv4Addr>,
    /// What to attach.
    pub target: AttachTarget,
    /// The interface that it is to get; where not given, the first of `eth0`, `eth1`… that it does not have.
    pub interface: Option<String>,
}

/// An attachment of something on this node to a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Its id.
    pub id: TaskId,
    /// What is attached.
    pub target: AttachTarget,
    /// The network.
    pub network: NetworkId,
    /// The network's name.
    pub network_name: String,
    /// Its name in the network.
    pub name: String,
    /// Its further names there.
    pub aliases: Vec<String>,
    /// The interface that it got, inside of its namespace.
    pub interface: String,
    /// The interface's addresses, IPv4 first, each with its subnet's prefix length.
    pub addresses: Vec<IpNet>,
    /// Where the way out leads, one address a family; none in an internal network.
    pub gateways: Vec<IpAddr>,
    /// Where names are asked for.
    pub name_server: Ipv4Addr,
    /// The interface's MAC.
    pub mac: [u8; 6],
    /// The interface's MTU when it was attached, bytes.
    pub mtu: u32,
    /// When it was attached, ns since the epoch.
    pub since_ns: u64,
}
