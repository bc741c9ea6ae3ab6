//! `GET /shoal/v1/status`: how each node is. The leader knows of the nodes' sessions and of what they say of themselves, each
//! manager of whom its port turned away; whichever manager is asked, asks them all.

use axum::Json;
use axum::extract::State;
use mesh_api::health::{NodeHealth, Problem, UplinkHealth, WireguardHealth, WireguardKind};

use crate::docker::error::ApiResult;
use crate::docker::nodes::{role_name, state_name};
use crate::docker::time::rfc3339;
use crate::docker::wire::status as wire;
use crate::docker::{Api, ClusterState};
use crate::model::Node;
use crate::raft::Member;
use crate::session::{NodeReport, Report, SessionReport};

const NO_LEADER: &str = "The swarm does not have a leader, who alone knows of the nodes' sessions: this is what the asked manager's state \
     says of them.";
const SILENT_LEADER: &str = "The leader does not answer, who alone knows of the nodes' sessions: this is what the asked manager's state \
     says of them.";

/// `GET /shoal/v1/status`.
pub(in crate::docker) async fn status(State(api): State<Api>) -> ApiResult<Json<wire::Status>> {
    let cluster = api.manager()?;
    let reports = cluster.reports().await;
    Ok(Json(show(&cluster.state(), &reports)))
}

fn show(state: &ClusterState, reports: &[(Member, Option<Report>)]) -> wire::Status {
    let by_leader = reports.iter().filter_map(|(member, report)| {
        let Report { index, refused: _, nodes } = report.as_ref()?;
        Some((*index, member, nodes.as_ref()?))
    });
    // A former leader may not know yet that it is none.
    let by_leader = by_leader.max_by_key(|(index, member, _)| (member.is_leader, *index));
    let leader = by_leader.map(|(_, member, _)| &member.manager.node);
    let known = by_leader.map(|(_, _, nodes)| nodes);
    let nodes = state.nodes.values().map(|node| {
        let report = known.and_then(|known| known.get(&node.id)).cloned().unwrap_or_default();
        show_node(node, Some(&node.id) == leader, report)
    });
    let note = match leader {
        Some(_) => None,
        None if reports.iter().any(|(member, _)| member.is_leader) => Some(SILENT_LEADER),
        None => Some(NO_LEADER),
    };
    wire::Status {
        index: by_leader.map_or(state.index, |(index, ..)| index),
        leader: leader.map(ToString::to_string),
        note,
        nodes: nodes.collect(),
        managers: reports
            .iter()
            .map(|(member, report)| show_manager(state, member, report.as_ref()))
            .collect(),
    }
}

fn show_node(node: &Node, is_leader: bool, report: NodeReport) -> wire::Node {
    let NodeReport { session, health } = report;
    let (uplinks, wire_guard, problem) = match health {
        Some(NodeHealth { uplinks, wireguard, problem }) => {
            let uplinks = uplinks.into_iter().map(|uplink| {
                let UplinkHealth { name, mode, mtu } = uplink;
                wire::Uplink { name, mode, mtu: Some(mtu) }
            });
            (uplinks.collect(), Some(show_wireguard(wireguard)), problem)
        }
        None => (described_uplinks(&node.description.dataplane), None, None),
    };
    wire::Node {
        id: node.id.to_string(),
        hostname: node.description.hostname.clone(),
        role: role_name(node.spec.role),
        leader: is_leader,
        state: state_name(node.status.state),
        version: node.description.version.clone(),
        session: session.as_ref().map(show_session),
        uplinks,
        wire_guard,
        problem: problem.map(|Problem { text, at_ns }| wire::Problem { text, time: rfc3339(at_ns) }),
    }
}

fn show_session(session: &SessionReport) -> wire::Session {
    let SessionReport { is_open, since_ns, heard_ns, applied, behind, behind_ms } = *session;
    wire::Session {
        open: is_open,
        since: rfc3339(since_ns),
        heard: rfc3339(heard_ns),
        applied,
        behind,
        behind_ms: behind_ms.unwrap_or_default(),
    }
}

fn show_wireguard(wireguard: Option<WireguardHealth>) -> wire::WireGuard {
    let kind = match wireguard {
        None => "none",
        Some(WireguardHealth { kind: WireguardKind::Kernel, .. }) => "kernel",
        Some(WireguardHealth { kind: WireguardKind::UserSpace, .. }) => "user-space",
    };
    wire::WireGuard { kind, key_made: wireguard.map(|wireguard| rfc3339(wireguard.key_made_ns)) }
}

/// The uplinks as the node describes itself with, which the state has: `eth0=xdp-native,eth1=tc`.
fn described_uplinks(dataplane: &str) -> Vec<wire::Uplink> {
    let uplinks = dataplane.split(',').filter_map(|uplink| uplink.split_once('='));
    uplinks
        .map(|(name, mode)| wire::Uplink { name: name.to_owned(), mode: mode.to_owned(), mtu: None })
        .collect()
}

fn show_manager(state: &ClusterState, member: &Member, report: Option<&Report>) -> wire::Manager {
    let node = &member.manager.node;
    wire::Manager {
        id: node.to_string(),
        hostname: state.nodes.get(node).map(|node| node.description.hostname.clone()).unwrap_or_default(),
        answers: report.is_some(),
        index: report.map(|report| report.index),
        refused: report.map(|report| report.refused.clone()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{Ipv4Addr, SocketAddr};

    use super::*;
    use crate::raft::Manager;

    fn member(node: &str, is_leader: bool) -> Member {
        let addr = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 2377));
        let manager = Manager { node: node.into(), addr };
        Member { id: 1, manager, is_voter: true, is_leader, is_reachable: None, lag: None }
    }

    /// What a member says, who believes that it leads or doesn't.
    fn answers(node: &str, is_leader: bool, index: u64, leads: bool) -> (Member, Option<Report>) {
        let report = Report { index, refused: BTreeMap::new(), nodes: leads.then(BTreeMap::new) };
        (member(node, is_leader), Some(report))
    }

    #[test]
    fn whoever_is_known_to_lead_is_believed_before_a_former_leader() {
        let reports =
            [answers("m1", false, 50, true), answers("m2", true, 42, true), answers("m3", false, 60, false)];
        let shown = show(&ClusterState::empty(), &reports);
        assert_eq!((shown.leader.as_deref(), shown.index, shown.note), (Some("m2"), 42, None));
        // Where nobody is known to lead, the one that has come furthest.
        let reports = [answers("m1", false, 50, true), answers("m2", false, 42, true)];
        let shown = show(&ClusterState::empty(), &reports);
        assert_eq!((shown.leader.as_deref(), shown.index, shown.note), (Some("m1"), 50, None));
    }

    #[test]
    fn what_is_not_known_without_a_leader_is_said() {
        let silent = [(member("m1", true), None), answers("m2", false, 42, false)];
        assert_eq!(show(&ClusterState::empty(), &silent).note, Some(SILENT_LEADER));
        assert_eq!(show(&ClusterState::empty(), &silent[1..]).note, Some(NO_LEADER));
    }
}
