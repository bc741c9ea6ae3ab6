//! How the nodes are, which Docker's API has no words for: in its style.

use std::collections::BTreeMap;

use serde::Serialize;

/// The nodes and the managers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Status {
    /// The table index that the leader is at, or this manager.
    pub(in crate::docker) index: u64,
    /// The node that leads and has been asked; null if there is none.
    pub(in crate::docker) leader: Option<String>,
    /// Why not all of this is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) note: Option<&'static str>,
    pub(in crate::docker) nodes: Vec<Node>,
    pub(in crate::docker) managers: Vec<Manager>,
}

/// A node. What is null is not known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Node {
    #[serde(rename = "ID")]
    pub(in crate::docker) id: String,
    pub(in crate::docker) hostname: String,
    pub(in crate::docker) role: &'static str,
    pub(in crate::docker) leader: bool,
    pub(in crate::docker) state: &'static str,
    pub(in crate::docker) version: String,
    pub(in crate::docker) session: Option<Session>,
    pub(in crate::docker) uplinks: Vec<Uplink>,
    pub(in crate::docker) wire_guard: Option<WireGuard>,
    pub(in crate::docker) problem: Option<Problem>,
}

/// A node's session with the leader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Session {
    /// It is up; else it has ended.
    pub(in crate::docker) open: bool,
    /// Since when that is so.
    pub(in crate::docker) since: String,
    /// When the node was heard last.
    pub(in crate::docker) heard: String,
    /// The index whose table the node's dataplane holds.
    pub(in crate::docker) applied: u64,
    /// By how many entries of the log that is behind.
    pub(in crate::docker) behind: u64,
    /// For how long it has been behind, ms; 0 if it isn't.
    pub(in crate::docker) behind_ms: u64,
}

/// An interface towards the underlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Uplink {
    pub(in crate::docker) name: String,
    pub(in crate::docker) mode: String,
    #[serde(rename = "MTU", skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) mtu: Option<u32>,
}

/// What a node encrypts with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct WireGuard {
    /// `kernel`, `user-space` or `none`.
    pub(in crate::docker) kind: &'static str,
    /// When the key was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) key_made: Option<String>,
}

/// Something that went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Problem {
    pub(in crate::docker) text: String,
    pub(in crate::docker) time: String,
}

/// A manager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Manager {
    #[serde(rename = "ID")]
    pub(in crate::docker) id: String,
    pub(in crate::docker) hostname: String,
    /// Whether it answered; if not, the rest is null.
    pub(in crate::docker) answers: bool,
    /// The table index that it is at.
    pub(in crate::docker) index: Option<u64>,
    /// How many peers its port turned away since it began, by what was wrong with them.
    pub(in crate::docker) refused: Option<BTreeMap<String, u64>>,
}
