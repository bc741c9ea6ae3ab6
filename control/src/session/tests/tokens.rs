//! Join tokens with an end, at the managers' port.

use mesh_api::id::TokenId;
use mesh_api::session::{JoinAnswer, JoinRequest};
use mesh_api::tls::join_config;
use mesh_api::token::JoinToken;

use super::port::Port;
use super::*;

const HOUR_NS: u64 = 3600 * 1_000_000_000;

/// Makes a token; `at_ns`: when that was.
async fn make(port: &Port, id: &str, role: Role, uses: Option<u32>, at_ns: u64) -> JoinToken {
    let digest = port.cluster.state().cluster.unwrap().ca.root.digest();
    let token = JoinToken::new(&digest, &rand::random());
    let (id, secret_digest) = (TokenId::from(id), token.secret_digest());
    let action = Action::CreateToken { id, role, secret_digest, life_ns: HOUR_NS, uses };
    port.cluster.propose(Command { at_ns, action }).await.unwrap();
    token
}

/// What comes of an attempt to join by `token`.
async fn attempt(port: &Port, token: &JoinToken, hostname: &str) -> JoinAnswer {
    let stream = port.tls(join_config(&port.token()).unwrap()).await.unwrap();
    let (reading, writing) = tokio::io::split(stream);
    let (csr, node) = (KeyRequest::new().unwrap().csr().to_owned(), description(hostname));
    let request = JoinRequest { protocol: PROTOCOL_VERSION, token: token.to_string(), csr, node };
    FrameWriter::new(writing).send(&request).await.unwrap();
    FrameReader::new(reading, MANAGER_FRAME_BYTES_MAX).next().await.unwrap().unwrap()
}

fn refusal(answer: &JoinAnswer) -> Option<&str> {
    match answer {
        JoinAnswer::Refused { reason: RefusalReason::InvalidToken, message } => Some(message),
        _ => None,
    }
}

#[tokio::test]
async fn a_token_with_an_end_opens_until_then_and_says_why_it_does_not_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let now_ns = crate::clock::now_ns();
    let few = make(&port, "few", Role::Worker, Some(1), now_ns).await;
    let manager = make(&port, "manager", Role::Manager, None, now_ns).await;
    let expired = make(&port, "expired", Role::Worker, None, now_ns - 2 * HOUR_NS).await;
    let removed = make(&port, "removed", Role::Worker, None, now_ns).await;
    port.cluster.propose(Command::now(Action::RemoveToken { id: "removed".into() })).await.unwrap();

    assert_eq!(port.join(&few, "n1").await.unwrap().identity.peer().role, Role::Worker);
    assert_eq!(port.join(&manager, "m2").await.unwrap().identity.peer().role, Role::Manager);
    assert_eq!(port.server.refusals().counted(), []);
    let stored = port.cluster.state().tokens[&TokenId::from("manager")].secret_digest;
    let digits: String = stored.iter().map(|byte| char::from(b'a' + byte % 26)).take(25).collect();
    for (what, token, cause, part) in [
        ("used up", few.clone(), Cause::TokenUsedUp, "as many nodes have joined"),
        ("expired", expired, Cause::TokenExpired, "it has expired; `shoal token create`"),
        ("removed", removed, Cause::Token, "removed"),
        (
            "what is stored",
            JoinToken { secret: digits, ..manager.clone() },
            Cause::Token,
            "not this cluster's",
        ),
        (
            "another cluster's digest",
            JoinToken { digest: JoinToken::new(&[7; 32], &[8; 16]).digest, ..manager.clone() },
            Cause::Token,
            "not this cluster's",
        ),
    ] {
        let attack = async {
            let answer = attempt(&port, &token, "n9").await;
            assert!(refusal(&answer).is_some_and(|message| message.contains(part)), "{what}: {answer:?}");
        };
        port.refuses(what, cause, attack).await;
    }
    assert_eq!(port.cluster.state().nodes.len(), 3);
    let shown = serde_json::to_string(&port.cluster.state()).unwrap();
    for token in [&few, &manager] {
        assert!(!shown.contains(&token.secret), "no working token is in the state");
    }
    port.close().await;
}

#[tokio::test]
async fn a_token_is_not_used_more_often_by_asking_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let token = make(&port, "three", Role::Worker, Some(3), crate::clock::now_ns()).await;
    let hosts: Vec<String> = (0..12).map(|at| format!("n{at}")).collect();
    let attempts = hosts.iter().map(|host| attempt(&port, &token, host));
    let answers = futures::future::join_all(attempts).await;
    let joined = answers.iter().filter(|answer| matches!(answer, JoinAnswer::Joined { .. })).count();
    assert_eq!((joined, answers.iter().filter(|answer| refusal(answer).is_some()).count()), (3, 9));
    assert_eq!(port.cluster.state().nodes.len(), 4);
    assert_eq!(port.server.refusals().counted(), [(Cause::TokenUsedUp, 9)]);
    port.close().await;
}

#[tokio::test]
async fn the_leader_drops_tokens_whose_end_is_long_over() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let now_ns = crate::clock::now_ns();
    make(&port, "old", Role::Worker, None, now_ns - 26 * HOUR_NS).await;
    make(&port, "recent", Role::Worker, None, now_ns - 2 * HOUR_NS).await;
    let mut states = port.cluster.watch();
    let dropped = states.wait_for(|state| !state.tokens.contains_key(&TokenId::from("old")));
    tokio::time::timeout(Duration::from_secs(10), dropped).await.unwrap().unwrap();
    assert!(port.cluster.state().tokens.contains_key(&TokenId::from("recent")));
    port.close().await;
}
