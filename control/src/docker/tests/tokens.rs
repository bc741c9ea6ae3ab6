//! Join tokens with an end, and nodes that come back, over the API.

use axum::http::{Method, StatusCode};
use mesh_api::id::TokenId;
use mesh_api::table::Role;
use mesh_api::token::JoinToken;
use serde_json::{Value, json};

use super::host::Client;
use crate::command::{Action, Command};
use crate::docker::LocalNode as _;

const PATH: &str = "/shoal/v1/tokens";
const NODES: &str = "/shoal/v1/nodes";

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[tokio::test]
async fn a_token_is_shown_once_and_listed_without_its_secret() {
    let client = Client::manager().await;
    assert_eq!(client.get(PATH).await, (StatusCode::OK, json!([])));
    let (status, made) = client.post(PATH, r#"{"Role":"worker","Expires":"90m","Uses":3}"#).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let shown = ["CreatedAt", "ExpiresAt", "ID", "RemoteAddr", "Role", "State", "Token", "UsesLeft"];
    assert_eq!(keys(&made), shown);
    assert_eq!(
        (&made["Role"], &made["UsesLeft"], &made["State"]),
        (&json!("worker"), &json!(3), &json!("valid"))
    );
    let token: JoinToken = made["Token"].as_str().unwrap().parse().unwrap();
    let (_, swarm) = client.get("/swarm").await;
    let own: JoinToken = swarm["JoinTokens"]["Worker"].as_str().unwrap().parse().unwrap();
    assert_eq!(token.digest, own.digest);
    assert_ne!(token.secret, own.secret);

    let (_, listed) = client.get(PATH).await;
    assert!(!listed.to_string().contains(&token.secret), "{listed}");
    assert_eq!(keys(&listed[0]), ["CreatedAt", "ExpiresAt", "ID", "Role", "State", "UsesLeft"]);
    assert_eq!(listed[0]["ID"], made["ID"]);
    // What is not said: a day, for any number of managers.
    let (_, other) = client.post(PATH, r#"{"Role":"manager"}"#).await;
    assert_eq!((&other["Role"], &other["UsesLeft"]), (&json!("manager"), &Value::Null));
    let tokens = client.host.cluster().unwrap().state().tokens;
    let life_s = |made: &Value| {
        let token = &tokens[&TokenId::from(made["ID"].as_str().unwrap())];
        (token.expires_ns - token.created_ns) / 1_000_000_000
    };
    assert_eq!([life_s(&made), life_s(&other)], [90 * 60, 24 * 3600]);

    let id = made["ID"].as_str().unwrap();
    let (status, _) = client.ask(Method::DELETE, &format!("/v1.50{PATH}/{}", &id[..12]), "").await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let (status, gone) = client.ask(Method::DELETE, &format!("{PATH}/{id}"), "").await;
    assert_eq!(
        (status, gone),
        (StatusCode::NOT_FOUND, json!({ "message": format!("token {id} not found") }))
    );
    assert_eq!(client.get(PATH).await.1.as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn what_is_wrong_with_a_token_is_named() {
    let client = Client::manager().await;
    for (body, part) in [
        ("{}", "Role: missing: expected manager or worker"),
        (r#"{"Role":"boss"}"#, "invalid Role: \"boss\""),
        (r#"{"Role":"worker","Expires":"soon"}"#, "Expires: 'soon' is no time: give one such as 90m"),
        (r#"{"Role":"worker","Expires":"10s"}"#, "Expires: a token is good for 1m to 8760h"),
        (r#"{"Role":"worker","Expires":"8761h"}"#, "Expires: a token is good for 1m to 8760h"),
        (r#"{"Role":"worker","Uses":0}"#, "Uses: a token is good for 1 to 10000 nodes"),
        (r#"{"Role":"worker","Uses":-1}"#, "Uses: a token is good for"),
        (r#"{"Role":"worker","Uses":99999999999}"#, "Uses: a token is good for"),
        (r#"{"Role":"worker","Uses":"3"}"#, "Uses"),
        (r#"{"Role":"worker","Expiry":"1h"}"#, "unknown field `Expiry`"),
    ] {
        let (status, answer) = client.post(PATH, body).await;
        let message = answer["message"].as_str().unwrap();
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}: {message}");
        assert!(message.contains(part), "{body}: {message}");
    }
    assert_eq!(client.get(PATH).await.1, json!([]));
}

#[tokio::test]
async fn an_operator_sees_who_asks_to_come_back_and_approves() {
    let client = Client::manager().await;
    let id = client.host.add_node("n2", Role::Worker).await;
    let shown =
        |nodes: Value| nodes.as_array().unwrap().iter().find(|it| it["Hostname"] == "n2").unwrap().clone();
    let ready = json!({ "ID": id, "Hostname": "n2", "Role": "worker", "State": "ready" });
    assert_eq!(shown(client.get(NODES).await.1), ready);
    let approve = format!("{NODES}/n2/approve");
    let (status, answer) = client.post(&approve, "").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(answer["message"].as_str().unwrap().contains("nothing to approve"), "{answer}");

    let cluster = client.host.cluster().unwrap();
    let (state, message) = (mesh_api::table::NodeState::Down, String::new());
    for action in [
        Action::SetNodeStatus { id: id.clone(), state, message, description: None },
        Action::NoteAsking { id: id.clone() },
    ] {
        cluster.propose(Command::now(action)).await.unwrap();
    }
    let asking = shown(client.get(NODES).await.1);
    assert_eq!(keys(&asking), ["AskingSince", "Hostname", "ID", "Role", "State"]);
    let (status, approved) = client.post(&approve, "").await;
    assert_eq!(status, StatusCode::OK, "{approved}");
    assert_eq!(keys(&approved), ["ApprovedUntil", "AskingSince", "Hostname", "ID", "Role", "State"]);
    assert_eq!(shown(client.get(NODES).await.1), approved);
    let (status, _) = client.post(&format!("{NODES}/nobody/approve"), "").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}
