//! Nodes whose certificates have expired, at the managers' port: with an operator's approval, and against it.

use mesh_api::session::{ReadmitAnswer, ReadmitRequest};
use mesh_api::tls::testing::{Ca, Wanted};
use mesh_api::tls::{Alpn, Binding, Identity};

use super::port::{HOUR, Port, subject};
use super::*;
use crate::model::Readmission;

/// What a node says that asks to come back.
struct Question {
    key: KeyRequest,
    request: ReadmitRequest,
}

/// Asks on a connection of its own by what `ask` makes of it.
async fn asked(
    port: &Port,
    roots: &Roots,
    ask: impl FnOnce(&Binding) -> Question,
) -> (Question, ReadmitAnswer) {
    let stream = port.tls(roots.client_config(Alpn::Readmit).unwrap()).await.unwrap();
    let question = ask(&Binding::of(stream.get_ref().1).unwrap());
    let (reading, writing) = tokio::io::split(stream);
    FrameWriter::new(writing).send(&question.request).await.unwrap();
    let answer = FrameReader::new(reading, MANAGER_FRAME_BYTES_MAX).next().await.unwrap().unwrap();
    (question, answer)
}

/// The question of the node of `shown`, proved by `prover`.
fn question(shown: &Identity, prover: &Identity, binding: &Binding) -> Question {
    let key = KeyRequest::new().unwrap();
    let proof = prover.prove(binding, key.csr()).unwrap();
    let (protocol, chain, csr) = (PROTOCOL_VERSION, shown.chain(), key.csr().to_owned());
    Question { key, request: ReadmitRequest { protocol, chain, csr, proof } }
}

async fn must(port: &Port, action: Action) {
    port.cluster.propose(Command::now(action)).await.unwrap();
}

/// A node that joined long ago: by its certificate, which has expired, and by one that it might have had since.
async fn away(port: &Port, hostname: &str) -> (Credential, Credential) {
    let valid = port.join(&port.token(), hostname).await.unwrap();
    let peer = valid.identity.peer();
    let expired = port.forge(&subject(peer), SystemTime::now() - 2 * HOUR);
    down(port, peer).await;
    (expired, valid)
}

async fn down(port: &Port, peer: &Peer) {
    let (id, message) = (peer.node.clone(), String::new());
    must(port, Action::SetNodeStatus { id, state: NodeState::Down, message, description: None }).await;
}

fn readmission(port: &Port, of: &Credential) -> Readmission {
    port.cluster.state().nodes[&of.identity.peer().node].readmission
}

#[tokio::test]
async fn an_expired_node_comes_back_once_it_is_approved() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let (node, _) = away(&port, "n1").await;
    let id = node.identity.peer().node.clone();
    let ask = async || asked(&port, &node.roots, |at| question(&node.identity, &node.identity, at)).await;
    for attempt in ["the first question", "another"] {
        let unapproved = async {
            let (_, answer) = ask().await;
            let ReadmitAnswer::Refused { reason: RefusalReason::Unapproved, message } = answer else {
                panic!("{answer:?}")
            };
            assert!(message.contains(&format!("`shoal node approve {id}`")), "{message}");
        };
        port.refuses(attempt, Cause::Unapproved, unapproved).await;
        assert!(readmission(&port, &node).asking_since_ns.is_some(), "operators see that it asks");
    }
    must(&port, Action::ApproveNode { id: id.clone() }).await;
    let (Question { key, .. }, answer) = ask().await;
    let ReadmitAnswer::Readmitted { chain, roots } = answer else { panic!("{answer:?}") };
    let back =
        Credential { identity: key.identity(&chain).unwrap(), roots: Roots::from_pem(&roots).unwrap() };
    back.check().unwrap();
    let (now, former) = (back.identity.peer(), node.identity.peer());
    assert_eq!((&now.node, now.role, &now.cluster), (&former.node, former.role, &former.cluster));
    assert_eq!(readmission(&port, &node), Readmission::default());
    let again = async {
        let (_, answer) = ask().await;
        assert!(
            matches!(answer, ReadmitAnswer::Refused { reason: RefusalReason::Unapproved, .. }),
            "{answer:?}"
        );
    };
    port.refuses("a second certificate", Cause::Unapproved, again).await;
    let mut agent = port.resume(&back, "n1").await;
    agent.until(|agent| agent.table.is_some()).await;
    assert_eq!(readmission(&port, &node), Readmission::default(), "it asks no longer");
    let copy = async {
        let (_, answer) = ask().await;
        let ReadmitAnswer::Refused { message, .. } = answer else { panic!("{answer:?}") };
        assert!(message.contains("the managers hear from this node"), "{message}");
    };
    port.refuses("a copy of a node that is there", Cause::Node, copy).await;
    drop(agent);
    port.close().await;
}

#[tokio::test]
async fn an_approval_helps_nobody_but_the_node_that_it_is_for() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let (node, valid) = away(&port, "n1").await;
    let (other, _) = away(&port, "n2").await;
    let (removed, _) = away(&port, "n3").await;
    for id in [&node, &removed].map(|it| it.identity.peer().node.clone()) {
        must(&port, Action::ApproveNode { id }).await;
    }
    must(&port, Action::RemoveNode { id: removed.identity.peer().node.clone(), force: true }).await;
    let peer = node.identity.peer();
    let wanted = Wanted::new(peer.node.as_str(), Role::Worker, peer.cluster.as_str());
    let past = SystemTime::now() - 2 * HOUR;
    let wanted = Wanted { not_before: past - HOUR, not_after: past, ..wanted };
    let foreign = Ca::new().credential(&wanted);
    let another = port.forge(&of_cluster("another", peer), past);
    let identity = |credential: &Credential| credential.identity.clone();
    let certificate = (Cause::Certificate, RefusalReason::Certificate);
    let gone = (Cause::Node, RefusalReason::UnknownNode);
    for (what, (cause, expected), shown, prover) in [
        ("another node's chain", certificate, identity(&node), identity(&other)),
        ("its own chain by another's key", certificate, identity(&other), identity(&node)),
        ("another CA's chain", certificate, identity(&foreign), identity(&foreign)),
        ("another CA's chain, by the right key", certificate, identity(&foreign), identity(&node)),
        ("a certificate that is valid", certificate, identity(&valid), identity(&valid)),
        ("another cluster's node", gone, identity(&another), identity(&another)),
        ("a removed node", gone, identity(&removed), identity(&removed)),
        (
            "a node that is not approved",
            (Cause::Unapproved, RefusalReason::Unapproved),
            identity(&other),
            identity(&other),
        ),
    ] {
        let attack = async {
            let (_, answer) = asked(&port, &node.roots, |at| question(&shown, &prover, at)).await;
            assert!(
                matches!(&answer, ReadmitAnswer::Refused { reason, .. } if *reason == expected),
                "{what}: {answer:?}"
            );
        };
        port.refuses(what, cause, attack).await;
    }

    // What was said on one connection is good for nothing on another, nor for another key.
    let mut recorded = None;
    let attack = async {
        let stream = port.tls(node.roots.client_config(Alpn::Readmit).unwrap()).await.unwrap();
        let elsewhere = Binding::of(stream.get_ref().1).unwrap();
        recorded = Some(question(&node.identity, &node.identity, &elsewhere));
    };
    port.refuses("a question that is not asked", Cause::Message, attack).await;
    let recorded = recorded.unwrap();
    let attack = async {
        let (_, answer) = asked(&port, &node.roots, |_| recorded).await;
        assert!(
            matches!(answer, ReadmitAnswer::Refused { reason: RefusalReason::Certificate, .. }),
            "{answer:?}"
        );
    };
    port.refuses("a replay", Cause::Certificate, attack).await;
    let attack = async {
        let swapped = |at: &Binding| {
            let mut question = question(&node.identity, &node.identity, at);
            question.request.csr = KeyRequest::new().unwrap().csr().to_owned();
            question
        };
        let (_, answer) = asked(&port, &node.roots, swapped).await;
        assert!(matches!(answer, ReadmitAnswer::Refused { .. }), "{answer:?}");
    };
    port.refuses("a proof for another key", Cause::Certificate, attack).await;
    let attack = async {
        let broken = |at: &Binding| {
            let mut question = question(&node.identity, &node.identity, at);
            question.request.csr = "none".to_owned();
            question.request.proof = node.identity.prove(at, "none").unwrap();
            question
        };
        let (_, answer) = asked(&port, &node.roots, broken).await;
        assert!(matches!(answer, ReadmitAnswer::Refused { .. }), "{answer:?}");
    };
    port.refuses("a request that is none", Cause::Message, attack).await;

    assert!(readmission(&port, &node).approved_until_ns.is_some(), "the approval is still there");
    let (_, answer) = asked(&port, &node.roots, |at| question(&node.identity, &node.identity, at)).await;
    assert!(matches!(answer, ReadmitAnswer::Readmitted { .. }), "{answer:?}");
    port.close().await;
}

/// The same node, of another cluster.
fn of_cluster(cluster: &str, peer: &Peer) -> crate::pki::Subject {
    crate::pki::Subject { cluster: cluster.into(), ..subject(peer) }
}
