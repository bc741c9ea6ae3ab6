//! What is told of the cluster as it changes: Docker's events, and Shoal's own lines.

use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::http::{Method, Request, StatusCode, Uri};
use futures::StreamExt as _;
use mesh_api::table::Role;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::docker::Docker;
use super::host::{Client, FakeHost};
use crate::clock;
use crate::cluster::Cluster;
use crate::command::{Action, Command};
use crate::docker::local::LocalNode as _;
use crate::docker::shoal::watch::{Asked, Limits, begin};
use crate::testing::{World, attach, ingress_port, network, service};

const PATH: &str = "/shoal/v1/watch";
const LIMIT: Duration = Duration::from_secs(20);

/// A stream of lines.
struct Lines {
    stream: BodyDataStream,
    rest: Vec<u8>,
}

impl Lines {
    fn of(body: Body) -> Self {
        Self { stream: body.into_data_stream(), rest: Vec::new() }
    }

    async fn open(client: &Client, path: &str) -> Self {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = client.router.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        Self::of(response.into_body())
    }

    /// The next line; `None` at the end.
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let piece = tokio::time::timeout(LIMIT, self.stream.next()).await.expect("a line comes");
            self.rest.extend_from_slice(&piece?.unwrap());
        }
    }

    /// The next line's action, kind and name.
    async fn says(&mut self) -> String {
        let line = self.next().await.expect("the stream goes on");
        ["Action", "Kind", "Name"].map(|field| line[field].as_str().unwrap_or("-")).join(" ")
    }

    /// The next line that is about an object of this kind.
    async fn of_kind(&mut self, kind: &str) -> Value {
        loop {
            let line = self.next().await.expect("the stream goes on");
            if line["Kind"] == kind {
                return line;
            }
        }
    }
}

#[tokio::test]
async fn every_change_is_a_line_with_the_object_as_docker_shows_it() {
    let client = Client::manager().await;
    let mut lines = Lines::open(&client, PATH).await;
    let first = lines.next().await.unwrap();
    let index = client.host.cluster().unwrap().state().index;
    assert_eq!(first, json!({"Index": index, "Kind": "begin"}));

    client.post("/networks/create", r#"{"Name":"front","Attachable":true}"#).await;
    let line = lines.next().await.unwrap();
    let (_, shown) = client.get("/networks/front").await;
    assert_eq!((&line["Kind"], &line["Action"]), (&json!("network"), &json!("create")));
    assert_eq!((&line["ID"], &line["Name"]), (&shown["Id"], &json!("front")));
    assert_eq!((&line["Time"], &line["Object"]), (&shown["Created"], &shown));
    assert!(line["Index"].as_u64().unwrap() > index);

    client.service("web", "").await;
    let line = lines.next().await.unwrap();
    let (_, shown) = client.get("/services/web").await;
    assert_eq!((&line["Index"], &line["Object"]), (&shown["Version"]["Index"], &shown));
    client.ask(Method::DELETE, "/services/web", "").await;
    let line = lines.next().await.unwrap();
    assert_eq!((&line["Action"], &line["Object"]), (&json!("remove"), &shown), "as it was");

    client.host.add_node("n2", Role::Worker).await;
    assert_eq!(lines.says().await, "create node n2");
    let line = lines.next().await.unwrap();
    let (_, shown) = client.get("/nodes/n2").await;
    assert_eq!((&line["Action"], &line["Object"]), (&json!("update"), &shown), "it is ready");

    let (_, swarm) = client.get("/swarm").await;
    let version = swarm["Version"]["Index"].as_u64().unwrap();
    let body = r#"{"Name":"default","Labels":{"site":"b"}}"#;
    let (status, answer) = client.post(&format!("/swarm/update?version={version}"), body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let line = lines.next().await.unwrap();
    assert_eq!((&line["Kind"], &line["ID"]), (&json!("cluster"), &swarm["ID"]));
    assert_eq!(line["Object"]["Spec"]["Labels"], json!({"site": "b"}));
    assert_eq!(line["Object"].get("JoinTokens"), None, "no secret is told");
}

#[tokio::test]
async fn tasks_and_attachments_are_told_apart_and_others_left_out() {
    let client = Client::of(FakeHost::that_runs_tasks());
    client.post("/swarm/init", r#"{"ListenAddr":"0.0.0.0:2377"}"#).await;
    let cluster = client.host.cluster().unwrap();
    let mut tasks = Lines::open(&client, &format!("{PATH}?kind=task")).await;
    let mut attached = Lines::open(&client, &format!("{PATH}?kind=attachment&kind=service")).await;
    assert_eq!((tasks.says().await, attached.says().await), ("- begin -".into(), "- begin -".into()));
    client.post("/networks/create", r#"{"Name":"front","Attachable":true}"#).await;
    let id = client.service("web", r#","Mode":{"Replicated":{"Replicas":1}}"#).await;
    assert_eq!(attached.says().await, "create service web");
    let created = tasks.of_kind("task").await;
    assert_eq!((&created["Action"], &created["Object"]["ServiceID"]), (&json!("create"), &json!(id)));
    while tasks.of_kind("task").await["Object"]["Status"]["State"] != "running" {}
    let node = cluster.state().nodes.keys().next().unwrap().clone();
    cluster.propose(Command::now(attach("a1", node.as_str(), "front", "db"))).await.unwrap();
    let line = attached.of_kind("attachment").await;
    assert_eq!((&line["Action"], &line["ID"], &line["Name"]), (&json!("create"), &json!("a1"), &json!("db")));
    assert_eq!(line["Object"]["NodeID"], json!(node));
}

#[tokio::test]
async fn a_watch_goes_on_where_another_ended() {
    let client = Client::manager().await;
    let mut lines = Lines::open(&client, PATH).await;
    let begin = lines.next().await.unwrap()["Index"].as_u64().unwrap();
    for name in ["a", "b", "c"] {
        client.post("/networks/create", &format!(r#"{{"Name":"{name}"}}"#)).await;
    }
    let index = lines.next().await.unwrap()["Index"].as_u64().unwrap();
    assert!(index > begin);
    let mut again = Lines::open(&client, &format!("{PATH}?since={index}")).await;
    assert_eq!(again.next().await, Some(json!({"Index": index, "Kind": "begin"})));
    assert_eq!([again.says().await, again.says().await], ["create network b", "create network c"]);
    let mut all = Lines::open(&client, &format!("{PATH}?since={begin}&kind=network")).await;
    all.next().await;
    assert_eq!(all.next().await.unwrap()["Index"], json!(index), "the same change has the same index");
    client.post("/networks/create", r#"{"Name":"d"}"#).await;
    for lines in [&mut lines, &mut again, &mut all] {
        while lines.says().await != "create network d" {}
    }
}

#[tokio::test]
async fn what_can_not_be_watched_says_why() {
    let client = Client::manager().await;
    for (query, part) in [
        (
            "?kind=volume",
            "kind: unknown kind 'volume': expected one of attachment, cluster, network, node, service, task",
        ),
        ("?kind=task&kind=tsak", "unknown kind 'tsak'"),
        ("?since=yesterday", "since: 'yesterday' is not an index"),
        ("?since=-1", "since: '-1' is not an index"),
        ("?sinse=1", "unknown parameter 'sinse': expected one of kind, since"),
    ] {
        let (status, answer) = client.get(&format!("{PATH}{query}")).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{query}: {answer}");
        assert!(answer["message"].as_str().unwrap().contains(part), "{query}: {answer}");
    }
    for (host, part) in
        [(FakeHost::new(), "docker swarm init"), (FakeHost::worker(), "Worker nodes can't be used")]
    {
        let (status, answer) = Client::of(host).get(PATH).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(answer["message"].as_str().unwrap().contains(part), "{answer}");
    }
}

fn asked(query: &str) -> Asked {
    Asked::read(&format!("{PATH}{query}").parse::<Uri>().unwrap()).unwrap()
}

/// A cluster without a disk, at the index of its first state.
async fn cluster() -> (Cluster, u64) {
    let state = World::new(&["n1"]).state;
    let index = state.index;
    (Cluster::in_memory(state).await, index)
}

async fn create(cluster: &Cluster, name: &str) {
    let action = Action::CreateNetwork { id: name.into(), spec: network(name) };
    cluster.propose(Command::now(action)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_not_kept_any_longer_is_gone_and_what_has_not_come_is_waited_for() {
    let (cluster, index) = cluster().await;
    let error =
        begin(cluster.clone(), asked(&format!("?since={}", index - 1)), Limits::PRODUCT).await.unwrap_err();
    assert_eq!(error.status, StatusCode::GONE);
    assert!(
        error.message.contains(&format!("begins at {index}")) && error.message.contains("list"),
        "{error:?}"
    );

    let late = begin(cluster.clone(), asked("?since=99999"), Limits::PRODUCT).await.unwrap_err();
    assert_eq!(late.status, StatusCode::BAD_REQUEST);
    assert!(late.message.contains("99999") && late.message.contains(&index.to_string()), "{late:?}");

    let next = cluster.linearizable().await.unwrap().index + 1;
    let waiting = tokio::spawn(begin(cluster.clone(), asked(&format!("?since={next}")), Limits::PRODUCT));
    tokio::time::sleep(Limits::PRODUCT.catching_up / 2).await;
    assert!(!waiting.is_finished());
    while cluster.state().index < next {
        create(&cluster, &format!("n{}", cluster.state().index)).await;
    }
    Lines::of(waiting.await.unwrap().unwrap()).next().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_reads_too_slowly_is_told_so_and_can_go_on() {
    let (cluster, _) = cluster().await;
    let body = begin(cluster.clone(), asked("?kind=network"), Limits::PRODUCT).await.unwrap();
    for number in 0..100 {
        create(&cluster, &format!("n{number}")).await;
    }
    tokio::time::sleep(2 * Limits::PRODUCT.patience).await;
    let mut lines = Lines::of(body);
    assert_eq!(lines.says().await, "- begin -");
    let (mut read, mut last) = (0, 0);
    let end = loop {
        let line = lines.next().await.expect("the last line says that it is the last");
        if line["Kind"] == "end" {
            break line;
        }
        assert_eq!(line["Name"], json!(format!("n{read}")));
        read += 1;
        last = line["Index"].as_u64().unwrap();
    };
    assert!(read < Limits::PRODUCT.lines, "{read} lines were kept");
    assert_eq!(end["Index"], json!(last));
    assert!(end["Message"].as_str().unwrap().contains(&format!("since={last}")), "{end}");
    assert_eq!(lines.next().await, None);

    let body = begin(cluster.clone(), asked(&format!("?kind=network&since={last}")), Limits::PRODUCT).await;
    let mut lines = Lines::of(body.unwrap());
    assert_eq!(lines.says().await, "- begin -");
    while read < 100 {
        let line = lines.next().await.unwrap();
        assert_eq!(line["Name"], json!(format!("n{read}")));
        last = line["Index"].as_u64().unwrap();
        read += 1;
    }
    assert_eq!(lines.next().await, Some(json!({"Index": last, "Kind": "heartbeat"})));
    cluster.shutdown().await;
    let end = lines.next().await.unwrap();
    assert_eq!((&end["Kind"], &end["Index"]), (&json!("end"), &json!(last)));
    assert!(end["Message"].as_str().unwrap().contains("serves no longer"), "{end}");
}

#[tokio::test(start_paused = true)]
async fn what_looks_the_same_is_not_told() {
    let (cluster, _) = cluster().await;
    create(&cluster, "front").await;
    let body = begin(cluster.clone(), asked("?kind=network"), Limits::PRODUCT).await.unwrap();
    // Its VIP moves where the ingress network's next address is looked for.
    let mut spec = service("web", 0);
    spec.endpoint.ports = vec![ingress_port(8080, 80)];
    let action = Action::CreateService { id: "web".into(), spec: Box::new(spec) };
    let before = cluster.state().ingress().unwrap().clone();
    cluster.propose(Command::now(action)).await.unwrap();
    assert_ne!(*cluster.state().ingress().unwrap(), before);
    create(&cluster, "back").await;
    let mut lines = Lines::of(body);
    assert_eq!([lines.says().await, lines.says().await], ["- begin -", "create network back"]);
}

#[tokio::test]
async fn times_that_are_none_are_refused_by_name() {
    let client = Client::manager().await;
    for (query, part) in [
        ("since=yesterday", "since: 'yesterday' is not a time"),
        ("until=-1", "until: '-1' is not a time"),
        ("since=7.x", "since: '7.x' is not a time"),
        ("until=.5", "until: '.5' is not a time"),
        ("since=7.12345678%C3%A9", "since: '7.12345678é' is not a time"),
        ("since=8.5&until=8.499", "`since` time (8.5) cannot be after `until` time (8.499)"),
    ] {
        let (status, answer) = client.get(&format!("/events?{query}")).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{query}: {answer}");
        assert!(answer["message"].as_str().unwrap().contains(part), "{query}: {answer}");
    }
    // What is over ends at once, and is empty where nothing happened.
    let mut past = Lines::open(&client, "/events?since=7.1234567891&until=99999999999999999999").await;
    let event = past.next().await.unwrap();
    assert_eq!(
        (&event["Type"], &event["Actor"]["Attributes"]),
        (&json!("network"), &json!({"name": "ingress"}))
    );
    assert_eq!(Lines::open(&client, "/events?since=7&until=8.000000001").await.next().await, None);
}

#[tokio::test]
async fn the_command_line_shows_what_happened_and_what_happens() {
    let Some(docker) = Docker::swarm().await else { return };
    let passed = async |second: u64| {
        while clock::now_ns() / 1_000_000_000 <= second {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    passed(clock::now_ns() / 1_000_000_000).await;
    let before = clock::now_ns() / 1_000_000_000;
    docker.ok("network create --driver overlay front").await;
    docker.ok("service create --quiet --detach --name web --replicas 1 shoal/whoami").await;
    docker.ok("service update --quiet --detach --replicas 2 web").await;
    docker.ok("node update --availability drain n2").await;
    docker.ok("service rm web").await;
    let now = clock::now_ns() / 1_000_000_000 + 1;
    passed(now).await;
    let past =
        async |filters: &str| docker.ok(&format!("events --since {before} --until {now} {filters}")).await;
    let all = past("").await;
    for part in [
        " network create ",
        "(name=front)",
        " service create ",
        "(name=web)",
        "(name=web, replicas.new=2, replicas.old=1)",
        " node update ",
        "(availability.new=drain, availability.old=active, name=n2)",
        " service remove ",
    ] {
        assert!(all.contains(part), "{part:?} is not in:\n{all}");
    }
    assert!(!all.contains("name=ingress"), "that was before:\n{all}");
    for (filters, shown, hidden) in [
        ("--filter type=network", &["name=front"][..], &["name=web", "name=n2"][..]),
        ("--filter type=network --filter type=node", &["name=front", "name=n2"], &["name=web"]),
        ("--filter service=web --filter event=create", &[" service create "], &[" update ", "name=front"]),
        ("--filter service=we", &["name=web"], &["name=front"]),
        ("--filter scope=swarm --filter node=n2", &["name=n2"], &["name=web"]),
        ("--filter scope=local", &[], &["name=web", "name=front", "name=n2"]),
        ("--filter service=web --filter node=n2", &[], &["name=web", "name=n2"]),
        ("--filter label=name=front", &["name=front"], &["name=web"]),
        ("--filter container=web", &[], &["name=web"]),
        (
            "--filter type=service --format {{.Type}}/{{.Action}}/{{.Actor.Attributes.name}}/{{.Scope}}",
            &["service/create/web/swarm", "service/remove/web/swarm"],
            &["name=front"],
        ),
    ] {
        let some = past(filters).await;
        for part in shown {
            assert!(some.contains(part), "{filters}: {part:?} is not in:\n{some}");
        }
        for part in hidden {
            assert!(!some.contains(part), "{filters}: {part:?} is in:\n{some}");
        }
    }
    let event = past("--filter network=front --format {{json·.}}").await;
    let event: Value = serde_json::from_str(event.trim()).unwrap();
    assert_eq!(event["Actor"]["Attributes"], json!({"name": "front"}));
    assert_eq!(event["timeNano"].as_u64().unwrap() / 1_000_000_000, event["time"].as_u64().unwrap());
    assert!((before..=now).contains(&event["time"].as_u64().unwrap()));
    docker
        .fails(
            &format!("events --since {now} --until {before}"),
            &["`since` time (", "cannot be after `until` time ("],
        )
        .await;

    // One that is to go on ends at its time, too.
    let until = clock::now_ns() / 1_000_000_000 + 2;
    let lasting = docker.ok(&format!("events --since {before} --until {until} --filter network=front")).await;
    assert!(lasting.contains(" network create ") && clock::now_ns() / 1_000_000_000 >= until, "{lasting}");
}
