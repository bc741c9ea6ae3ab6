//! An agent without a host of its own, for benchmarks of managers with many agents on one machine.
//!
//! Its session, its names and all that leads from the table to the contents of maps are the product's. The maps are in
//! memory; there are no links and no programs, and a task runs, and stops, as soon as it is to.

mod maps;
mod tasks;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_api::id::NodeId;
use mesh_api::table::Table;
use mesh_api::tls::{Credential, Shared};
use mesh_common::map::Config;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use self::maps::Maps;
use self::tasks::Tasks;
use crate::agent::{JoinError, JoinRequest, become_node};
use crate::dataplane::tables::Tables;
use crate::dataplane::{DataplaneError, Local, Touched};
use crate::dns::Zone;
use crate::facts::Describe;
use crate::node::DEBOUNCE;
use crate::session::{Credentials, Membership, Session, SessionState, Statuses, Store};

/// What a simulated agent tells of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Its maps hold the table.
    Applied {
        /// The table index.
        index: u64,
        /// What names, plan, layout and maps took.
        took: Duration,
    },
    /// The managers say that every live node has applied the table up to this index.
    Settled {
        /// The table index.
        index: u64,
    },
    /// Its session has begun.
    Connected,
    /// Its session has ended, or can't begin.
    Disconnected,
}

/// An agent that has joined a cluster.
#[derive(Debug)]
pub struct Simulated {
    store: Store,
    describe: Describe,
    credentials: Credentials,
}

impl Simulated {
    /// Joins a cluster as a host of this name, with a state folder of its own.
    pub async fn join(state_dir: &Path, hostname: String, request: JoinRequest) -> Result<Self, JoinError> {
        let (store, describe) = (Store::new(state_dir), Describe::new(hostname));
        describe.set_dataplane(&[("simulated".to_owned(), "tc")]);
        let node = describe.describe(request.advertise, request.data_path);
        let (membership, credential) = become_node(request, node).await?;
        let credentials = Credentials { membership, credential: Arc::new(credential) };
        let saved = store.save_credentials(&credentials);
        saved.map_err(|source| JoinError::State { dir: state_dir.to_owned(), source })?;
        Ok(Self { store, describe, credentials })
    }

    /// Its place in the cluster.
    pub fn membership(&self) -> &Membership {
        &self.credentials.membership
    }

    /// What it proves itself with.
    pub fn credential(&self) -> &Arc<Credential> {
        &self.credentials.credential
    }

    /// Follows the table, telling `report` how that goes, until the table doesn't fit the maps.
    pub async fn run(self, mut report: impl FnMut(Event)) -> Result<(), DataplaneError> {
        let Self { store, describe, credentials } = self;
        let Membership { node_id, data_path, .. } = credentials.membership.clone();
        let shared = Shared::default();
        shared.set(Some(Arc::clone(&credentials.credential)));
        let session = Session::start(store, Arc::new(Mutex::new(credentials)), shared, describe, None, true);
        let mut worker = Worker::new(node_id, data_path, &session);
        let (mut settled, mut state) = (session.settled.clone(), session.state.clone());
        let mut apply_at = None;
        loop {
            tokio::select! {
                Ok(()) = worker.tables.changed() => {
                    apply_at.get_or_insert_with(|| Instant::now() + DEBOUNCE);
                }
                Ok(()) = settled.changed() => report(Event::Settled { index: *settled.borrow_and_update() }),
                Ok(()) = state.changed() => report(match *state.borrow_and_update() {
                    SessionState::Connected => Event::Connected,
                    SessionState::Disconnected(_) | SessionState::Refused(..) => Event::Disconnected,
                }),
                () = at(apply_at) => {
                    apply_at = None;
                    let started = Instant::now();
                    if let Some(index) = worker.apply()? {
                        report(Event::Applied { index, took: started.elapsed() });
                    }
                }
            }
        }
    }
}

/// What follows the table, as a node's loop does.
struct Worker {
    node: NodeId,
    vtep: IpAddr,
    tables: watch::Receiver<Option<Arc<Table>>>,
    touched: Arc<Mutex<Touched>>,
    applied: watch::Sender<Option<u64>>,
    statuses: watch::Sender<Statuses>,
    tasks: Tasks,
    zone: Zone,
    plane: Tables<Maps>,
}

impl Worker {
    fn new(node: NodeId, vtep: IpAddr, session: &Session) -> Self {
        Self {
            tasks: Tasks::new(node.clone()),
            node,
            vtep,
            tables: session.tables.clone(),
            touched: Arc::clone(&session.touched),
            applied: session.applied.clone(),
            statuses: session.statuses.clone(),
            zone: Zone::default(),
            plane: Tables::over(Maps::default()),
        }
    }

    /// Brings names and maps to the table, says so, and returns its index; `None` before there is one.
    fn apply(&mut self) -> Result<Option<u64>, DataplaneError> {
        let (table, touched) = {
            let table = self.tables.borrow_and_update();
            let touched = std::mem::take(&mut *self.touched.lock().unwrap_or_else(PoisonError::into_inner));
            let Some(table) = table.clone() else { return Ok(None) };
            (table, touched)
        };
        let started = self.tasks.follow(&table, &touched);
        let local = Local {
            node: self.node.clone(),
            vtep: self.vtep,
            wireguard: None,
            addresses: vec![self.vtep],
            endpoints: self.tasks.endpoints(),
            absent: BTreeSet::new(),
            answering: BTreeSet::new(),
            silent: BTreeSet::new(),
        };
        let config =
            Config { hash_seed: table.cluster.hash_seed, vtep: self.vtep.into(), ..Config::default() };
        self.zone.update(&table, &touched, &local.endpoints);
        self.plane.change(&table, &touched, &local, &config)?;
        let index = Some(table.index);
        self.applied.send_if_modified(|applied| std::mem::replace(applied, index) != index);
        if started {
            self.statuses.send_replace(self.tasks.statuses());
        }
        Ok(index)
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
