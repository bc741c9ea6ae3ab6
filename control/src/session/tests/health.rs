//! What nodes say of themselves, and what the leader knows of their sessions.

use mesh_api::health::{NodeHealth, PROBLEM_BYTES_MAX, Problem, UplinkHealth};

use super::*;
use crate::session::{NodeReport, Report};

/// The leader's knowledge of a node, once that is as it should be.
async fn report_of(server: &Server, node: &NodeId, holds: impl Fn(&NodeReport) -> bool) -> NodeReport {
    let mut last = None;
    for _ in 0..2000 {
        let report = server.report().nodes.unwrap().remove(node);
        if let Some(report) = report.clone().filter(|report| holds(report)) {
            return report;
        }
        last = report;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it comes to nothing more than {last:?}");
}

fn healthy(problem: &str) -> NodeHealth {
    let uplink = UplinkHealth { name: "eth0".to_owned(), mode: "tc".to_owned(), mtu: 1500 };
    let problem = Some(Problem { text: problem.to_owned(), at_ns: 7 });
    NodeHealth { uplinks: vec![uplink], wireguard: None, problem }
}

#[tokio::test]
async fn a_node_is_known_by_its_session_and_by_what_it_says() {
    let (_dir, server) = server().await;
    let mut agent = FakeAgent::join(&server, "n1").await;
    let node = agent.node.node.clone();
    agent.until(|agent| agent.table.is_some()).await;
    let index = server.cluster.state().index;
    let report =
        report_of(&server, &node, |it| it.session.as_ref().is_some_and(|it| it.applied == index)).await;
    let session = report.session.unwrap();
    assert!(session.is_open && session.since_ns <= session.heard_ns, "{session:?}");
    assert_eq!((session.behind, session.behind_ms, report.health), (0, None, None));

    agent.say(AgentMessage::Health { health: healthy("the uplink is gone") }).await;
    let report = report_of(&server, &node, |it| it.health.is_some()).await;
    assert_eq!(report.health, Some(healthy("the uplink is gone")));
    // More than a node may say is not kept.
    agent.say(AgentMessage::Health { health: healthy(&"long".repeat(PROBLEM_BYTES_MAX)) }).await;
    let is_other = |report: &NodeReport| report.health != Some(healthy("the uplink is gone"));
    let health = report_of(&server, &node, is_other).await.health.unwrap();
    assert!(health.problem.unwrap().text.len() <= PROBLEM_BYTES_MAX);

    // What is not taken is behind.
    let mut world = World::new(&[]);
    let network = world.create_network("front");
    let spec = world.state.networks[&network].spec.clone();
    let create = Action::CreateNetwork { id: network, spec };
    server.cluster.propose(Command::now(create)).await.unwrap();
    let behind =
        |it: &NodeReport| it.session.as_ref().is_some_and(|it| it.behind_ms.is_some_and(|ms| ms > 0));
    let session = report_of(&server, &node, behind).await.session.unwrap();
    assert!(session.behind > 0 && session.applied == index, "{session:?}");

    drop(agent);
    let session = report_of(&server, &node, |it| it.session.as_ref().is_some_and(|it| !it.is_open)).await;
    assert!(session.health.is_some(), "what it said last");
    let ended = session.session.unwrap();
    assert!(ended.since_ns >= ended.heard_ns, "{ended:?}");
}

#[tokio::test]
async fn what_a_former_leader_heard_is_forgotten_and_so_are_nodes_that_are_gone() {
    let (_dir, server) = server().await;
    let mut agent = FakeAgent::join(&server, "n1").await;
    let node = agent.node.node.clone();
    agent.until(|agent| agent.table.is_some()).await;
    agent.say(AgentMessage::Health { health: healthy("old") }).await;
    report_of(&server, &node, |it| it.health.is_some()).await;
    server.refusals().count(Cause::Token);
    server.resign();
    let Report { index, refused, nodes } = server.report();
    assert_eq!((index, nodes), (server.cluster.state().index, None), "it does not lead");
    assert_eq!(refused.into_iter().collect::<Vec<_>>(), [("token".to_owned(), 1)]);
    server.lead();
    assert_eq!(server.report().nodes.unwrap()[&node], NodeReport::default());

    server.note_health(&node, healthy("again"));
    server.note_health(&"gone".into(), healthy("gone"));
    assert_eq!(server.report().nodes.unwrap().len(), server.cluster.state().nodes.len());
    server.retain_health(&server.cluster.state());
    let known: Vec<_> = server.health().keys().cloned().collect();
    assert_eq!(known, [node]);
}

#[tokio::test]
async fn the_cluster_asks_the_server_that_is_there() {
    let (_dir, server) = server().await;
    let cluster = server.cluster.clone();
    let reports = cluster.reports().await;
    let nodes = |reports: &[(crate::raft::Member, Option<Report>)]| {
        reports[0].1.as_ref().map(|it| it.nodes.is_some())
    };
    assert_eq!((reports.len(), nodes(&reports)), (1, Some(true)));
    drop(server);
    assert_eq!(nodes(&cluster.reports().await), None, "nobody is left to ask");
}
