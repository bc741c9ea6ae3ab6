//! A network in memory: what members say is delayed, reordered, doubled, lost or cut off as a seeded generator says.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use mesh_api::id::NodeId;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::managers::wire::FRAME_BYTES_MAX;
use crate::raft::message::Calling;
use crate::raft::{Manager, Replica, Request, Response, Transport, TransportError};

/// How well messages travel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weather {
    /// Longest delay of a message, ms.
    pub(super) delay_ms: u64,
    /// Messages lost, of a hundred.
    pub(super) loss: u32,
    /// Messages that arrive twice, of a hundred.
    pub(super) doubled: u32,
}

impl Weather {
    pub(super) const FAIR: Self = Self { delay_ms: 2, loss: 0, doubled: 0 };
}

#[derive(Debug)]
struct State {
    rng: StdRng,
    weather: Weather,
    members: BTreeMap<NodeId, Replica>,
    /// Who is not heard by whom.
    cut: BTreeSet<(NodeId, NodeId)>,
    /// How often a node forgot its streams, without a word to the other ends.
    lost: BTreeMap<NodeId, u64>,
    /// Nodes that are found at one address alone.
    homes: BTreeMap<NodeId, SocketAddr>,
    messages: u64,
    /// Depends on all that was drawn.
    drawn: u64,
}

/// The network. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Net {
    state: Arc<Mutex<State>>,
}

/// What becomes of a message.
pub(super) enum Fate {
    Arrives { after: Duration, again: Option<Duration> },
    Lost,
}

impl Net {
    pub(super) fn new(seed: u64) -> Self {
        let rng = StdRng::seed_from_u64(seed);
        let (members, cut, lost) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        let (weather, homes) = (Weather::FAIR, BTreeMap::new());
        let state = State { rng, weather, members, cut, lost, homes, messages: 0, drawn: 0 };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The way of a node to others.
    pub(super) fn wire(&self, from: &NodeId) -> Arc<Wire> {
        Arc::new(Wire { from: from.clone(), net: self.clone(), dead: Mutex::new(false) })
    }

    pub(super) fn plug(&self, node: &NodeId, replica: Replica) {
        self.lock().members.insert(node.clone(), replica);
    }

    pub(super) fn unplug(&self, node: &NodeId) {
        self.lock().members.remove(node);
    }

    pub(super) fn set_weather(&self, weather: Weather) {
        self.lock().weather = weather;
    }

    /// `to` does not hear `from` any longer.
    pub(super) fn cut(&self, from: &NodeId, to: &NodeId) {
        self.lock().cut.insert((from.clone(), to.clone()));
    }

    /// Neither of two hears the other.
    pub(super) fn part(&self, one: &NodeId, other: &NodeId) {
        self.cut(one, other);
        self.cut(other, one);
    }

    /// Everybody hears everybody.
    pub(super) fn heal(&self) {
        self.lock().cut.clear();
    }

    /// A node's streams are no more, and the other ends hear nothing of it.
    pub(super) fn lose(&self, node: &NodeId) {
        *self.lock().lost.entry(node.clone()).or_default() += 1;
    }

    /// Grows whenever one of two nodes loses its streams.
    pub(super) fn ages(&self, one: &NodeId, other: &NodeId) -> u64 {
        let state = self.lock();
        let lost = |node| state.lost.get(node).copied().unwrap_or_default();
        lost(one) + lost(other)
    }

    /// A node is found at this address alone.
    pub(super) fn settle(&self, node: &NodeId, addr: SocketAddr) {
        self.lock().homes.insert(node.clone(), addr);
    }

    fn lives_elsewhere(&self, manager: &Manager) -> bool {
        self.lock().homes.get(&manager.node).is_some_and(|home| *home != manager.addr)
    }

    /// Messages so far, and something that depends on all of them.
    pub(super) fn trace(&self) -> (u64, u64) {
        let state = self.lock();
        (state.messages, state.drawn)
    }

    /// What becomes of a message that is sent at this moment.
    pub(super) fn fate(&self, from: &NodeId, to: &NodeId) -> Fate {
        let mut state = self.lock();
        state.messages += 1;
        let Weather { delay_ms, loss, doubled } = state.weather;
        let mut delay = || Duration::from_millis(state.rng.random_range(0..=delay_ms));
        let (after, again) = (delay(), delay());
        let is_lost = state.rng.random_range(0..100) < loss;
        let is_doubled = state.rng.random_range(0..100) < doubled;
        let way = from.as_str().bytes().chain(to.as_str().bytes());
        let way = way.fold(u64::from(after.subsec_millis()) * 2 + u64::from(is_lost), |sum: u64, byte| {
            sum.wrapping_mul(31) + u64::from(byte)
        });
        state.drawn = (state.drawn ^ way).wrapping_mul(0x0100_0000_01b3);
        if is_lost || state.cut.contains(&(from.clone(), to.clone())) {
            return Fate::Lost;
        }
        Fate::Arrives { after, again: is_doubled.then_some(again) }
    }

    fn member(&self, node: &NodeId) -> Option<Replica> {
        self.lock().members.get(node).cloned()
    }
}

/// A node's way to others.
#[derive(Debug)]
pub(super) struct Wire {
    from: NodeId,
    net: Net,
    dead: Mutex<bool>,
}

impl Wire {
    /// Nothing leaves any longer, and no answer is heard.
    pub(super) fn kill(&self) {
        *self.dead.lock().unwrap() = true;
    }

    fn is_dead(&self) -> bool {
        *self.dead.lock().unwrap()
    }

    async fn deliver(&self, to: &NodeId, request: Request) -> Response {
        if self.is_dead() {
            return std::future::pending().await;
        }
        let Fate::Arrives { after, again } = self.net.fate(&self.from, to) else {
            return std::future::pending().await;
        };
        let arrive = |request: Request, after: Duration| {
            let (net, from, to) = (self.net.clone(), self.from.clone(), to.clone());
            // It is on its way, whatever becomes of whoever sent it.
            tokio::spawn(async move {
                tokio::time::sleep(after).await;
                let Some(member) = net.member(&to) else { return std::future::pending().await };
                member.handle(&from, request).await
            })
        };
        if let Some(again) = again {
            drop(arrive(request.clone(), again));
        }
        let response = arrive(request, after).await.unwrap();
        match self.net.fate(to, &self.from) {
            Fate::Arrives { after, .. } if !self.is_dead() => {
                tokio::time::sleep(after).await;
                response
            }
            _ => std::future::pending().await,
        }
    }
}

impl Transport for Wire {
    fn call<'a>(&'a self, to: &'a Manager, request: Request) -> Calling<'a> {
        Box::pin(async move {
            // As it would be read on the other side.
            let bytes = serde_json::to_vec(&request).unwrap();
            assert!(bytes.len() < FRAME_BYTES_MAX as usize, "a message of {} bytes", bytes.len());
            if self.net.lives_elsewhere(to) {
                return std::future::pending().await;
            }
            let request = serde_json::from_slice(&bytes).unwrap();
            let response = self.deliver(&to.node, request).await;
            let response = serde_json::from_slice(&serde_json::to_vec(&response).unwrap());
            response.map_err(|error| TransportError { to: to.node.clone(), problem: error.to_string() })
        })
    }
}
