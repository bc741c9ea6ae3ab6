//! `GET /shoal/v1/watch`: a line of JSON for each change of an object, from now on or from an index on that this manager's
//! history still has. Every manager tells of the state as it comes to it, by itself.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Uri};
use axum::response::Response;
use futures::stream;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::parameters;
use crate::cluster::Cluster;
use crate::docker::differences::{Difference, differences};
use crate::docker::error::{ApiError, ApiResult};
use crate::docker::time::rfc3339;
use crate::docker::{Api, ClusterState, networks, nodes, services, swarm, tasks};
use crate::model::{ClusterObject, Network, Node, Service, Task};
use crate::raft::{History, Member, Moment, Next};

/// How lines are told.
#[derive(Debug, Clone, Copy)]
pub(in crate::docker) struct Limits {
    /// Lines that wait for whoever reads them.
    pub(in crate::docker) lines: usize,
    /// How long the next of them may wait before the reader is given up.
    pub(in crate::docker) patience: Duration,
    /// How often something is said where nothing happens.
    pub(in crate::docker) heartbeat: Duration,
    /// How long to wait for the index from which on to tell: another manager may have come to it earlier.
    pub(in crate::docker) catching_up: Duration,
}

impl Limits {
    /// The product's.
    pub(in crate::docker) const PRODUCT: Self = Self {
        lines: 32,
        patience: Duration::from_secs(10),
        heartbeat: Duration::from_secs(10),
        catching_up: Duration::from_secs(5),
    };
}

/// A kind of object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::docker) enum Kind {
    Attachment,
    Cluster,
    Network,
    Node,
    Service,
    Task,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::Attachment, Self::Cluster, Self::Network, Self::Node, Self::Service, Self::Task];

    fn name(self) -> &'static str {
        match self {
            Self::Attachment => "attachment",
            Self::Cluster => "cluster",
            Self::Network => "network",
            Self::Node => "node",
            Self::Service => "service",
            Self::Task => "task",
        }
    }

    fn of(name: &str) -> ApiResult<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            ApiError::invalid(format!("kind: unknown kind '{name}': expected one of {known}"))
        })
    }

    fn of_task(task: &Task) -> Self {
        if task.is_attachment() { Self::Attachment } else { Self::Task }
    }
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::docker) struct Asked {
    since: Option<u64>,
    kinds: BTreeSet<Kind>,
}

impl Asked {
    pub(in crate::docker) fn read(uri: &Uri) -> ApiResult<Self> {
        let (mut since, mut kinds) = (None, BTreeSet::new());
        for (name, value) in parameters(uri, &["kind", "since"])? {
            if name == "kind" {
                kinds.insert(Kind::of(&value)?);
            } else {
                since = Some(value.parse().map_err(|_| {
                    ApiError::invalid(format!(
                        "since: '{value}' is not an index: give the Index of the last line that was read"
                    ))
                })?);
            }
        }
        if kinds.is_empty() {
            kinds = Kind::ALL.into();
        }
        Ok(Self { since, kinds })
    }
}

/// A line, but for the object.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Line<'a> {
    /// Up to here all has been told; of a change: its own index.
    index: u64,
    /// An object's, or `begin`, `heartbeat` or `end`.
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<&'static str>,
    #[serde(rename = "ID", skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    /// When that was proposed.
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

impl Line<'_> {
    /// One that is not about an object.
    fn bare(index: u64, kind: &'static str) -> Self {
        Self { index, kind, action: None, id: None, name: None, time: None, message: None }
    }

    fn encode(&self, object: Option<&[u8]>) -> Bytes {
        let mut line = encode(self);
        if let Some(object) = object {
            line.pop();
            line.extend_from_slice(b",\"Object\":");
            line.extend_from_slice(object);
            line.push(b'}');
        }
        line.push(b'\n');
        line.into()
    }
}

/// What is of texts, numbers and lists always encodes.
fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

/// `GET /shoal/v1/watch`.
pub(in crate::docker) async fn watch(State(api): State<Api>, uri: Uri) -> ApiResult<Response> {
    let asked = Asked::read(&uri)?;
    let body = begin(api.manager()?, asked, Limits::PRODUCT).await?;
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    Ok(response)
}

/// Begins to tell what is asked for.
pub(in crate::docker) async fn begin(cluster: Cluster, asked: Asked, limits: Limits) -> ApiResult<Body> {
    let Asked { since, kinds } = asked;
    let mut history = cluster.history();
    let last = match since {
        None => history.newest(),
        Some(index) => {
            let _ = timeout(limits.catching_up, history.reached(index)).await;
            moment_at(&history, index)?
        }
    };
    let from = since.unwrap_or(last.state.index);
    let (lines, mut told) = mpsc::channel(limits.lines);
    let unread = || ApiError::unavailable("the reader is gone");
    // There is always room for the last word.
    let farewell = lines.clone().reserve_owned().await.map_err(|_| unread())?;
    lines.send(Line::bare(from, "begin").encode(None)).await.map_err(|_| unread())?;
    let watcher = Watcher { cluster, history, last, from, kinds, lines, limits };
    tokio::spawn(async move {
        if let Some(end) = watcher.tell().await {
            farewell.send(end);
        }
    });
    Ok(Body::from_stream(stream::poll_fn(move |cx| {
        told.poll_recv(cx).map(|line| line.map(Ok::<_, Infallible>))
    })))
}

/// Where to begin for who has been told all up to `index`.
fn moment_at(history: &History, index: u64) -> ApiResult<Moment> {
    let newest = history.newest().state.index;
    if index > newest {
        return Err(ApiError::invalid(format!(
            "since: {index} is an index that this manager has not come to: its state is at {newest}"
        )));
    }
    history.at(index).ok_or_else(|| {
        ApiError::gone(format!(
            "since: {index} is too long ago: this manager's history begins at {}: watch without since, and list the objects \
             again",
            history.oldest_index()
        ))
    })
}

/// Why no more is told.
enum End {
    /// Nobody reads any more.
    Unread,
    /// Lines are not taken as fast as there are more.
    Slow,
    /// This manager is none any longer, or stops.
    Stopped,
}

/// One who watches.
struct Watcher {
    cluster: Cluster,
    history: History,
    /// What has been told.
    last: Moment,
    /// Where it began: what is up to here was told by another manager, or another time.
    from: u64,
    kinds: BTreeSet<Kind>,
    lines: mpsc::Sender<Bytes>,
    limits: Limits,
}

impl Watcher {
    /// Tells until the end, and returns the last line.
    async fn tell(mut self) -> Option<Bytes> {
        let end = self.follow().await;
        let index = self.last.state.index.max(self.from);
        let why = match end {
            End::Unread => return None,
            End::Slow => "lines are read more slowly than there are more of them",
            End::Stopped => "this manager serves no longer",
        };
        let message = format!("{why}: watch again with since={index}, here or at another manager");
        Some(Line { message: Some(message), ..Line::bare(index, "end") }.encode(None))
    }

    async fn follow(&mut self) -> End {
        let mut heartbeat = interval(self.limits.heartbeat);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeat.reset();
        loop {
            match self.history.after(self.last.state.index) {
                Next::Moment(next) => {
                    if next.state.index > self.from
                        && let Err(end) = self.tell_of(&next).await
                    {
                        return end;
                    }
                    self.last = next;
                }
                Next::Forgotten => return End::Slow,
                Next::UpToDate => {
                    let index = self.last.state.index.max(self.from);
                    tokio::select! {
                        going_on = self.history.changed() => if !going_on { return End::Stopped },
                        () = self.lines.closed() => return End::Unread,
                        _ = heartbeat.tick() => {
                            if let Err(end) = self.say(Line::bare(index, "heartbeat").encode(None)).await {
                                return end;
                            }
                        }
                    }
                }
            }
        }
    }

    async fn say(&self, line: Bytes) -> Result<(), End> {
        match timeout(self.limits.patience, self.lines.send(line)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Unread),
            Err(_) => Err(End::Slow),
        }
    }

    /// Tells what happened between the last moment and the next.
    async fn tell_of(&self, next: &Moment) -> Result<(), End> {
        let (old, new) = (&self.last.state, &next.state);
        let events = events(old, new, &self.kinds);
        let has_nodes = events.iter().any(|event| matches!(event, Event::Node(_)));
        let managers = if has_nodes { self.cluster.managers() } else { Vec::new() };
        let view = View { old, new, managers: &managers };
        for event in events {
            if let Some(line) = view.line(&event, next.at_ns) {
                self.say(line).await?;
            }
        }
        Ok(())
    }
}

/// What happened to an object.
enum Event {
    Cluster(Difference<ClusterObject>),
    Network(Difference<Network>),
    Node(Difference<Node>),
    Service(Difference<Service>),
    Task(Difference<Task>),
}

/// What happened between two states to objects of these kinds.
fn events(old: &ClusterState, new: &ClusterState, kinds: &BTreeSet<Kind>) -> Vec<Event> {
    let has = |kind| kinds.contains(&kind);
    let mut events = Vec::new();
    if has(Kind::Cluster) {
        events.extend(
            match (&old.cluster, &new.cluster) {
                (None, Some(new)) => Some(Difference::Created(Arc::clone(new))),
                (Some(old), Some(new)) if !Arc::ptr_eq(old, new) => {
                    Some(Difference::Updated { old: Arc::clone(old), new: Arc::clone(new) })
                }
                _ => None,
            }
            .map(Event::Cluster),
        );
    }
    if has(Kind::Node) {
        events.extend(differences(&old.nodes, &new.nodes).into_iter().map(Event::Node));
    }
    if has(Kind::Network) {
        events.extend(differences(&old.networks, &new.networks).into_iter().map(Event::Network));
    }
    if has(Kind::Service) {
        events.extend(differences(&old.services, &new.services).into_iter().map(Event::Service));
    }
    if has(Kind::Task) || has(Kind::Attachment) {
        let tasks = differences(&old.tasks, &new.tasks).into_iter();
        let tasks = tasks.filter(|difference| has(Kind::of_task(difference.object())));
        events.extend(tasks.map(Event::Task));
    }
    events
}

/// What objects are shown by.
#[derive(Clone, Copy)]
struct View<'a> {
    old: &'a ClusterState,
    new: &'a ClusterState,
    managers: &'a [Member],
}

impl View<'_> {
    /// The line of an event; `None` where nothing that the API shows is different.
    fn line(&self, event: &Event, at_ns: u64) -> Option<Bytes> {
        let Self { old, new, managers } = *self;
        let line = |kind: Kind, id: &str, name: &str, told: Option<(&'static str, Vec<u8>)>| {
            let (action, object) = told?;
            let line = Line {
                index: new.index,
                kind: kind.name(),
                action: Some(action),
                id: Some(id),
                name: Some(name),
                time: Some(rfc3339(at_ns)),
                message: None,
            };
            Some(line.encode(Some(&object)))
        };
        match event {
            Event::Cluster(event) => {
                let object = event.object();
                let show = |_: &ClusterState, cluster: &ClusterObject| encode(&swarm::show(cluster, false));
                line(Kind::Cluster, object.id.as_str(), &object.spec.name, told(event, old, new, show))
            }
            Event::Node(event) => {
                let object = event.object();
                let ca = &new.cluster.as_ref()?.ca;
                let show = |_: &ClusterState, node: &Node| encode(&nodes::show(node, managers, ca));
                line(
                    Kind::Node,
                    object.id.as_str(),
                    &object.description.hostname,
                    told(event, old, new, show),
                )
            }
            Event::Network(event) => {
                let object = event.object();
                let show = |_: &ClusterState, network: &Network| encode(&networks::show_network(network));
                line(Kind::Network, object.id.as_str(), &object.spec.name, told(event, old, new, show))
            }
            Event::Service(event) => {
                let object = event.object();
                let show = |state: &ClusterState, service: &Service| encode(&services::show(state, service));
                line(Kind::Service, object.id.as_str(), &object.spec.name, told(event, old, new, show))
            }
            Event::Task(event) => {
                let object = event.object();
                let show = |state: &ClusterState, task: &Task| encode(&tasks::show(state, task));
                line(Kind::of_task(object), object.id.as_str(), &object.name(), told(event, old, new, show))
            }
        }
    }
}

/// What is done to an object, and how the API shows it: as it is, or as it was. `None` if the one looks like the other.
fn told<T>(
    event: &Difference<T>,
    old_state: &ClusterState,
    new_state: &ClusterState,
    show: impl Fn(&ClusterState, &T) -> Vec<u8>,
) -> Option<(&'static str, Vec<u8>)> {
    match event {
        Difference::Created(object) => Some(("create", show(new_state, object))),
        Difference::Removed(object) => Some(("remove", show(old_state, object))),
        Difference::Updated { old, new } => {
            let object = show(new_state, new);
            (object != show(old_state, old)).then_some(("update", object))
        }
    }
}
