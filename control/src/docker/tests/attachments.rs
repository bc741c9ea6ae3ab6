//! Attachments over the API: what is asked for, shown and refused.

use axum::http::{Method, StatusCode};
use serde_json::json;

use super::host::{Client, FakeHost};

const PATH: &str = "/shoal/v1/attachments";

#[tokio::test]
async fn an_attachment_is_made_shown_and_ended() {
    let client = Client::manager().await;
    let body = r#"{"Network":"front","Name":"db","Aliases":["store"],"IPv4Address":"10.0.1.9","Pid":1,"Interface":"net1"}"#;
    let (status, made) = client.post(PATH, body).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let expected = json!({
        "ID": "0123456789abcdefghijklmno",
        "NetworkID": "network-id",
        "Network": "front",
        "Name": "db",
        "Aliases": ["store"],
        "Pid": 1,
        "Interface": "net1",
        "Addresses": ["10.0.1.9/24"],
        "Gateways": ["10.0.1.1"],
        "NameServer": "10.0.1.1",
        "MacAddress": "02:42:0a:00:01:09",
        "MTU": 1450,
        "CreatedAt": "1970-01-01T00:00:01Z",
    });
    assert_eq!(made, expected);
    assert_eq!(client.get(PATH).await, (StatusCode::OK, json!([expected])));
    assert_eq!(client.get(&format!("/v1.50{PATH}/db")).await, (StatusCode::OK, expected));
    let (status, _) = client.ask(Method::DELETE, &format!("{PATH}/db"), "").await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert_eq!(client.get(PATH).await, (StatusCode::OK, json!([])));
    let (status, made) = client.post(PATH, r#"{"Network":"front","Netns":"/run/netns/x"}"#).await;
    assert_eq!(
        (status, &made["Netns"], made.get("Pid")),
        (StatusCode::CREATED, &json!("/run/netns/x"), None)
    );
}

#[tokio::test]
async fn what_can_not_be_attached_says_why() {
    let client = Client::manager().await;
    for (body, status, part) in [
        (r#"{"Pid":1}"#, 400, "Network:"),
        (r#"{"Network":"front"}"#, 400, "Pid, Netns:"),
        (r#"{"Network":"front","Pid":1,"Netns":"/run/netns/x"}"#, 400, "Pid, Netns:"),
        (r#"{"Network":"front","Pid":-1}"#, 400, "Pid"),
        (r#"{"Network":"front","Pid":1,"IPv4Address":"10.0.1"}"#, 400, "IPv4Address: '10.0.1'"),
        (r#"{"Network":"front","Pid":2}"#, 404, "pid:"),
        ("[]", 400, "expected an object"),
    ] {
        let (answered, answer) = client.post(PATH, body).await;
        assert_eq!(answered.as_u16(), status, "{body}: {answer}");
        assert!(answer["message"].as_str().unwrap().contains(part), "{body}: {answer}");
    }
    for (method, path) in [(Method::GET, "/nothing"), (Method::DELETE, "/nothing")] {
        let (status, _) = client.ask(method, &format!("{PATH}{path}"), "").await;
        assert_eq!(status, StatusCode::NOT_FOUND);
    }
    let outside = Client::of(FakeHost::new());
    let (status, _) = outside.post(PATH, r#"{"Network":"front","Pid":1}"#).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
}
