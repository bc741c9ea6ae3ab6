//! `GET /events`: a stream that stays open, with what happens to nodes, services and networks from now on. It
//! follows the replicated state: an event is a difference between two states.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::Response;
use futures::stream;
use imbl::ordmap::DiffItem;
use mesh_api::table::{NodeState, Role};
use serde::Serialize;
use tokio::sync::watch;

use super::error::{ApiError, ApiResult};
use super::filters::Filters;
use super::request::Params;
use super::{Api, services};
use crate::clock;
use crate::model::{self, Availability, Mode, Network, Node, Service};

/// `events.Message`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Event {
    #[serde(rename = "Type")]
    kind: &'static str,
    #[serde(rename = "Action")]
    action: &'static str,
    #[serde(rename = "Actor")]
    actor: Actor,
    scope: &'static str,
    time: u64,
    #[serde(rename = "timeNano")]
    time_nano: u64,
}

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Actor {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Attributes")]
    attributes: BTreeMap<&'static str, String>,
}

/// `GET /events`.
pub(super) async fn events(State(api): State<Api>, params: Params) -> ApiResult<Response> {
    let accepted = [
        "config",
        "container",
        "daemon",
        "event",
        "id",
        "image",
        "label",
        "network",
        "node",
        "plugin",
        "scope",
        "secret",
        "service",
        "type",
        "volume",
    ];
    let filters = Filters::parse(params.get("filters"), &accepted)?;
    let until = deadline(params.get("until"))?;
    // A worker's stream stays open and silent, as there is nothing that it would know first-hand.
    let watched = api.host.cluster().map(|cluster| cluster.watch());
    let follower = Follower {
        last: watched.as_ref().map(|state| state.borrow().clone()),
        watched,
        until,
        queue: VecDeque::new(),
    };
    let body = stream::unfold((follower, filters), |(mut follower, filters)| async move {
        loop {
            let event = follower.next().await?;
            if matches(&filters, &event) {
                // A struct of strings and numbers always encodes.
                let mut line = serde_json::to_vec(&event).unwrap_or_default();
                line.push(b'\n');
                return Some((Ok::<_, std::convert::Infallible>(Bytes::from(line)), (follower, filters)));
            }
        }
    });
    let mut response = Response::new(Body::from_stream(body));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Reads `until`: seconds since the epoch, with a fraction.
fn deadline(text: Option<&str>) -> ApiResult<Option<tokio::time::Instant>> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    let seconds: f64 =
        text.parse().ok().filter(|seconds: &f64| seconds.is_finite() && *seconds >= 0.0).ok_or_else(
            || ApiError::invalid(format!("until: '{text}' is not a time: expected seconds since the epoch")),
        )?;
    let end = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    let left = end.saturating_sub(Duration::from_nanos(clock::now_ns()));
    Ok(tokio::time::Instant::now().checked_add(left))
}

/// Turns states into events.
struct Follower {
    watched: Option<watch::Receiver<model::State>>,
    last: Option<model::State>,
    until: Option<tokio::time::Instant>,
    queue: VecDeque<Event>,
}

impl Follower {
    /// The next event; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Some(event);
            }
            let changed = async {
                match &mut self.watched {
                    Some(watched) => watched.changed().await.is_ok(),
                    None => std::future::pending().await,
                }
            };
            let over = async {
                match self.until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                going_on = changed => if !going_on { return None },
                () = over => return None,
            }
            let state = self.watched.as_mut()?.borrow_and_update().clone();
            if let Some(last) = self.last.replace(state.clone()) {
                self.queue.extend(differences(&last, &state));
            }
        }
    }
}

/// What happened between two states.
fn differences(last: &model::State, state: &model::State) -> Vec<Event> {
    let mut events = Vec::new();
    for item in last.nodes.diff(&state.nodes) {
        match item {
            DiffItem::Add(_, node) => events.push(node_event("create", node)),
            DiffItem::Remove(_, node) => events.push(node_event("remove", node)),
            DiffItem::Update { old: (_, old), new: (_, new) } => events.extend(node_update(old, new)),
        }
    }
    for item in last.networks.diff(&state.networks) {
        match item {
            DiffItem::Add(_, network) => events.push(network_event("create", network)),
            DiffItem::Remove(_, network) => events.push(network_event("remove", network)),
            DiffItem::Update { old: (_, old), new: (_, new) } => {
                // Otherwise only the allocator's cursor moves.
                events.extend((old.spec != new.spec).then(|| network_event("update", new)));
            }
        }
    }
    for item in last.services.diff(&state.services) {
        match item {
            DiffItem::Add(_, service) => events.push(service_event("create", service)),
            DiffItem::Remove(_, service) => events.push(service_event("remove", service)),
            DiffItem::Update { old: (_, old), new: (_, new) } => events.push(service_update(old, new)),
        }
    }
    events
}

fn event(kind: &'static str, action: &'static str, id: String, name: String) -> Event {
    let now = clock::now_ns();
    Event {
        kind,
        action,
        actor: Actor { id, attributes: BTreeMap::from([("name", name)]) },
        scope: "swarm",
        time: now / 1_000_000_000,
        time_nano: now,
    }
}

fn node_event(action: &'static str, node: &Node) -> Event {
    event("node", action, node.id.to_string(), node.description.hostname.clone())
}

fn network_event(action: &'static str, network: &Network) -> Event {
    event("network", action, network.id.to_string(), network.spec.name.clone())
}

fn service_event(action: &'static str, service: &Service) -> Event {
    event("service", action, service.id.to_string(), service.spec.name.clone())
}

impl Event {
    /// Notes a value that changed, under Docker's `<what>.old` and `<what>.new`.
    fn changed(&mut self, [old_key, new_key]: [&'static str; 2], old: &str, new: &str) {
        if old != new {
            self.actor.attributes.insert(old_key, old.to_owned());
            self.actor.attributes.insert(new_key, new.to_owned());
        }
    }
}

/// What changed of a node, if it is something that operators set or see.
fn node_update(old: &Node, new: &Node) -> Option<Event> {
    let state = |node: &Node| match node.status.state {
        NodeState::Unknown => "unknown",
        NodeState::Ready => "ready",
        NodeState::Down => "down",
    };
    let availability = |node: &Node| match node.spec.availability {
        Availability::Active => "active",
        Availability::Pause => "pause",
        Availability::Drain => "drain",
    };
    let role = |node: &Node| match node.spec.role {
        Role::Manager => "manager",
        Role::Worker => "worker",
    };
    let mut event = node_event("update", new);
    event.changed(["state.old", "state.new"], state(old), state(new));
    event.changed(["availability.old", "availability.new"], availability(old), availability(new));
    event.changed(["role.old", "role.new"], role(old), role(new));
    (event.actor.attributes.len() > 1 || old.spec != new.spec).then_some(event)
}

fn service_update(old: &Service, new: &Service) -> Event {
    let update = |service: &Service| {
        service.update_status.as_ref().map_or("", |status| services::state_name(status.state))
    };
    let replicas = |service: &Service| match service.spec.mode {
        Mode::Replicated { replicas } => replicas.to_string(),
        Mode::Global => String::new(),
    };
    let mut event = service_event("update", new);
    event.changed(["image.old", "image.new"], &old.spec.task.container.image, &new.spec.task.container.image);
    event.changed(["replicas.old", "replicas.new"], &replicas(old), &replicas(new));
    event.changed(["updatestate.old", "updatestate.new"], update(old), update(new));
    event
}

fn matches(filters: &Filters, event: &Event) -> bool {
    let actor = |kind: &str| {
        let name = event.actor.attributes.get("name");
        filters.any(kind, |wanted| {
            event.kind == kind
                && (event.actor.id.starts_with(wanted) || name.is_some_and(|name| name == wanted))
        })
    };
    let never = ["config", "container", "daemon", "image", "plugin", "secret", "volume"];
    let actors = ["network", "node", "service"];
    let chosen: Vec<&str> = actors.into_iter().filter(|kind| filters.contains(kind)).collect();
    filters.any("type", |wanted| wanted == event.kind)
        && filters.any("event", |wanted| wanted == event.action)
        && filters.any("scope", |wanted| wanted == event.scope)
        && filters.any("id", |wanted| event.actor.id == wanted)
        && !filters.contains("label")
        && !never.into_iter().any(|kind| filters.contains(kind))
        && (chosen.is_empty() || chosen.into_iter().any(actor))
}
