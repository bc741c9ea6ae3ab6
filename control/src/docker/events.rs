//! `GET /events`: a stream that stays open, with what happens to nodes, services and networks, from now on or from a while
//! ago, as far as this manager's history goes. An event is a difference between two states.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::Response;
use futures::stream;
use serde::Serialize;
use tokio::time::Instant;

use super::differences::{Difference, differences};
use super::error::{ApiError, ApiResult};
use super::filters::Filters;
use super::request::Params;
use super::{Api, nodes, services};
use crate::clock;
use crate::model::{self, Mode, Network, Node, Service};
use crate::raft::{History, Moment, Next};

/// What Docker has events of; each is a filter, by a name or an id, or the beginning of one.
const KINDS: [&str; 10] =
    ["config", "container", "daemon", "image", "network", "node", "plugin", "secret", "service", "volume"];

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
    attributes: BTreeMap<String, String>,
}

/// `GET /events`.
pub(super) async fn events(State(api): State<Api>, params: Params) -> ApiResult<Response> {
    let accepted: Vec<&str> = KINDS.into_iter().chain(["event", "id", "label", "scope", "type"]).collect();
    let filters = Filters::parse(params.get("filters"), &accepted)?;
    let (since, until) = (parameter_ns(&params, "since")?, parameter_ns(&params, "until")?);
    if let (Some(since_ns), Some(until_ns)) = (since, until)
        && until_ns < since_ns
    {
        let [since, until] = ["since", "until"].map(|name| params.get(name).unwrap_or_default());
        return Err(ApiError::invalid(format!(
            "`since` time ({since}) cannot be after `until` time ({until})"
        )));
    }
    // A worker's stream stays open and silent, as there is nothing that it would know first-hand.
    let history = api.host.cluster().map(|cluster| cluster.history());
    let last = history.as_ref().map(|history| match since {
        Some(since_ns) => history.before(since_ns),
        None => history.newest(),
    });
    let left = until.map(|until_ns| Duration::from_nanos(until_ns.saturating_sub(clock::now_ns())));
    let follower = Follower {
        history,
        last,
        since_ns: since.unwrap_or_default(),
        until_ns: until.unwrap_or(u64::MAX),
        end: left.and_then(|left| Instant::now().checked_add(left)),
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

/// The time that a parameter names, ns since the epoch: `seconds[.nanoseconds]`, as `docker` makes it of whatever it is given.
pub(super) fn parameter_ns(params: &Params, name: &str) -> ApiResult<Option<u64>> {
    let Some(text) = params.get(name).filter(|text| !text.is_empty()) else { return Ok(None) };
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let point = || {
        if !is_number(seconds) || !is_number(fraction) {
            return None;
        }
        let fraction = &fraction[..fraction.len().min(9)];
        let ns: u64 = format!("{fraction:0<9}").parse().ok()?;
        // One that is centuries away is as good as any other.
        Some(seconds.parse().unwrap_or(u64::MAX).saturating_mul(1_000_000_000).saturating_add(ns))
    };
    let error =
        || ApiError::invalid(format!("{name}: '{text}' is not a time: expected seconds since the epoch"));
    point().map(Some).ok_or_else(error)
}

/// Turns states into events.
struct Follower {
    history: Option<History>,
    /// What has been told.
    last: Option<Moment>,
    /// Of which time to tell, ns since the epoch.
    since_ns: u64,
    until_ns: u64,
    end: Option<Instant>,
    queue: VecDeque<Event>,
}

impl Follower {
    /// The next event; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Some(event);
            }
            let last = self.last.as_ref().map(|last| last.state.index);
            match self.history.as_ref().zip(last).map(|(history, last)| (history.after(last), history)) {
                Some((Next::Moment(next), _)) => self.take(&next),
                // Whoever takes them slowly gets what came of many changes as one.
                Some((Next::Forgotten, history)) => {
                    let next = history.newest();
                    self.take(&next);
                }
                Some((Next::UpToDate, _)) | None => {
                    if !self.wait().await {
                        return None;
                    }
                }
            }
        }
    }

    fn take(&mut self, next: &Moment) {
        if let Some(last) = self.last.replace(next.clone())
            && (self.since_ns..=self.until_ns).contains(&next.at_ns)
        {
            self.queue.extend(events_between(&last.state, next));
        }
    }

    /// Waits for another state; false if there is to be none, or if it is time to end.
    async fn wait(&mut self) -> bool {
        let changed = async {
            match &mut self.history {
                Some(history) => history.changed().await,
                None => std::future::pending().await,
            }
        };
        let over = async {
            match self.end {
                Some(end) => tokio::time::sleep_until(end).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            going_on = changed => going_on,
            () = over => false,
        }
    }
}

/// What happened between two states.
fn events_between(last: &model::State, next: &Moment) -> Vec<Event> {
    let (state, at_ns) = (&next.state, next.at_ns);
    let nodes =
        differences(&last.nodes, &state.nodes).into_iter().filter_map(|difference| match difference {
            Difference::Created(node) => Some(node_event("create", &node, at_ns)),
            Difference::Removed(node) => Some(node_event("remove", &node, at_ns)),
            Difference::Updated { old, new } => node_update(&old, &new, at_ns),
        });
    let networks = differences(&last.networks, &state.networks).into_iter();
    let networks = networks.filter_map(|difference| match difference {
        Difference::Created(network) => Some(network_event("create", &network, at_ns)),
        Difference::Removed(network) => Some(network_event("remove", &network, at_ns)),
        // Otherwise only the allocator's cursor moves.
        Difference::Updated { old, new } => {
            (old.spec != new.spec).then(|| network_event("update", &new, at_ns))
        }
    });
    let services = differences(&last.services, &state.services).into_iter();
    let services = services.map(|difference| match difference {
        Difference::Created(service) => service_event("create", &service, at_ns),
        Difference::Removed(service) => service_event("remove", &service, at_ns),
        Difference::Updated { old, new } => service_update(&old, &new, at_ns),
    });
    nodes.chain(networks).chain(services).collect()
}

fn event(kind: &'static str, action: &'static str, id: String, name: String, at_ns: u64) -> Event {
    Event {
        kind,
        action,
        actor: Actor { id, attributes: BTreeMap::from([("name".to_owned(), name)]) },
        scope: "swarm",
        time: at_ns / 1_000_000_000,
        time_nano: at_ns,
    }
}

fn node_event(action: &'static str, node: &Node, at_ns: u64) -> Event {
    let name = if node.spec.name.is_empty() { &node.description.hostname } else { &node.spec.name };
    event("node", action, node.id.to_string(), name.clone(), at_ns)
}

fn network_event(action: &'static str, network: &Network, at_ns: u64) -> Event {
    event("network", action, network.id.to_string(), network.spec.name.clone(), at_ns)
}

fn service_event(action: &'static str, service: &Service, at_ns: u64) -> Event {
    event("service", action, service.id.to_string(), service.spec.name.clone(), at_ns)
}

impl Event {
    /// Notes a value that changed, under Docker's `<what>.old` and `<what>.new`.
    fn changed(&mut self, what: &str, old: &str, new: &str) {
        if old != new {
            self.actor.attributes.insert(format!("{what}.old"), old.to_owned());
            self.actor.attributes.insert(format!("{what}.new"), new.to_owned());
        }
    }
}

/// What changed of a node, if it is something that operators set or see.
fn node_update(old: &Node, new: &Node, at_ns: u64) -> Option<Event> {
    let mut event = node_event("update", new, at_ns);
    let mut note = |what: &str, value: fn(&Node) -> &'static str| event.changed(what, value(old), value(new));
    note("state", |node| nodes::state_name(node.status.state));
    note("availability", |node| nodes::availability_name(node.spec.availability));
    note("role", |node| nodes::role_name(node.spec.role));
    (event.actor.attributes.len() > 1 || old.spec != new.spec).then_some(event)
}

fn service_update(old: &Service, new: &Service, at_ns: u64) -> Event {
    let update = |service: &Service| {
        service.update_status.as_ref().map_or("", |status| services::state_name(status.state))
    };
    let replicas = |service: &Service| match service.spec.mode {
        Mode::Replicated { replicas } => replicas.to_string(),
        Mode::Global => String::new(),
    };
    let mut event = service_event("update", new, at_ns);
    event.changed("image", &old.spec.task.container.image, &new.spec.task.container.image);
    event.changed("replicas", &replicas(old), &replicas(new));
    event.changed("updatestate", update(old), update(new));
    event
}

/// Whether an event is asked for: by any value of each filter, as in Docker.
fn matches(filters: &Filters, event: &Event) -> bool {
    let Event { kind, action, actor: Actor { id, attributes }, scope, .. } = event;
    let name = attributes.get("name").map(String::as_str).unwrap_or_default();
    let is_it = |of_kind: &str| {
        filters
            .any(of_kind, |wanted| of_kind == *kind && (id.starts_with(wanted) || name.starts_with(wanted)))
    };
    filters.any("type", |wanted| wanted == *kind)
        && filters.any("event", |wanted| wanted == *action)
        && filters.any("scope", |wanted| wanted == *scope)
        && filters.any("id", |wanted| wanted == id)
        && filters.labels("label", attributes)
        && KINDS.into_iter().all(is_it)
}
