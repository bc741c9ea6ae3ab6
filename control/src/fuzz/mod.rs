//! What a fuzzer is given to try of this crate, as [`mesh_api::fuzz`] has it: functions of bytes that others send, which panic on
//! what must not be.

#![expect(clippy::missing_panics_doc, reason = "to panic on what must not be is what the targets are for")]

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use mesh_api::codec::AGENT_FRAME_BYTES_MAX;
use mesh_api::fuzz::{Target, lines, message};
use mesh_api::id::NodeId;
use mesh_api::session::AgentMessage;
use mesh_api::table::{NodeState, Role};
use mesh_api::tls::KeyRequest;

use crate::apply::apply;
pub use crate::backup::fuzz::backup;
use crate::command::{Action, Command};
pub use crate::docker::fuzz::{filters, network, request, service};
use crate::model::{State, constraint, labels};
use crate::pki::{Authority, Subject};
use crate::raft::fuzz::state;
pub use crate::raft::fuzz::{raft_entry, raft_message, snapshot};

/// The targets by name.
pub const TARGETS: [(&str, Target); 11] = [
    ("raft_message", raft_message),
    ("raft_entry", raft_entry),
    ("snapshot", snapshot),
    ("backup", backup),
    ("node", node),
    ("csr", csr),
    ("service", service),
    ("network", network),
    ("request", request),
    ("filters", filters),
    ("labels", self::labels),
];

/// A cluster with two nodes, a network and a service.
pub(crate) static STATE: LazyLock<State> = LazyLock::new(state);

/// What a node says in its session, and what becomes of the state by it.
pub fn node(data: &[u8]) -> bool {
    let mut state = STATE.clone();
    let node = NodeId::from("n1");
    let mut is_sound = false;
    for body in lines(data) {
        let Some(message) = message::<AgentMessage>(body, AGENT_FRAME_BYTES_MAX) else { continue };
        is_sound = true;
        let described = |description| Action::SetNodeStatus {
            id: node.clone(),
            state: NodeState::Ready,
            message: String::new(),
            description: Some(description),
        };
        let action = match message {
            AgentMessage::Resume { node, .. } | AgentMessage::Described { node } => described(node),
            AgentMessage::Tasks { statuses } => Action::ReportTasks { node: node.clone(), statuses },
            AgentMessage::Attach { id, spec } => Action::Attach { id, node: node.clone(), spec },
            AgentMessage::Applied { index } => Action::Acknowledge { index: index.min(state.index) },
            _ => continue,
        };
        // A refusal leaves the state as it was.
        if let Ok((next, _)) = apply(&state, state.index + 1, &Command { at_ns: 1, action }) {
            state = next;
        }
    }
    check(state);
    is_sound
}

/// Checks what must hold in every state, where the tests' measure of that is at hand.
pub(crate) fn check(state: State) {
    #[cfg(test)]
    crate::testing::World::of(state).check_invariants();
    #[cfg(not(test))]
    drop(state);
}

/// Requests for certificates: what is signed is a certificate of the node, whatever the request says.
pub fn csr(data: &[u8]) -> bool {
    static CA: LazyLock<Option<Authority>> = LazyLock::new(|| Authority::generate(SystemTime::now()).ok());
    let Some(ca) = &*CA else { panic!("no CA can be made") };
    let subject = Subject { node: "n1".into(), role: Role::Worker, cluster: "c".into() };
    let csr = String::from_utf8_lossy(data);
    let Ok(issued) = ca.sign(&csr, &subject, Duration::from_hours(1), SystemTime::now()) else {
        return false;
    };
    // Of a key that isn't this one's.
    if let Ok(own) = KeyRequest::new() {
        assert!(own.identity(&issued.chain).is_err());
    }
    assert_eq!(issued.issuer, ca.signer().id);
    true
}

/// Labels and constraints, as `key=value` lines: of a service, a node and the cluster.
pub fn labels(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let all: BTreeMap<String, String> =
        pairs.map(|(label, value)| (label.to_owned(), value.to_owned())).collect();
    let service = labels::service(&all);
    let read = [service.is_ok(), labels::node(&all).is_ok(), labels::cluster(&all).is_ok()];
    let _ = labels::egress(&all);
    let texts: Vec<String> = all.iter().map(|(label, value)| format!("{label}={value}")).collect();
    if let Ok(constraints) = constraint::parse_all(&texts) {
        for node in STATE.nodes.values() {
            let _ = constraints.iter().filter(|constraint| constraint.holds(node)).count();
        }
    }
    !all.is_empty() && read.contains(&true)
}
