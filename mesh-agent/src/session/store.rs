//! What the node remembers across restarts: its membership with its secret, and the last table.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use mesh_api::id::{ClusterId, NodeId};
use mesh_api::table::{Role, Table};
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tracing::warn;

use crate::files;

/// Between two writes of the table passes at least this many times what the last one took. An agent that is killed in
/// between comes back with an older table than its maps hold, and takes them back for as long as the managers need to
/// answer: so no longer than it has to be.
const TABLE_PAUSE_FACTOR: u32 = 4;

/// This node's place in a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The cluster.
    pub cluster_id: ClusterId,
    /// The node's id in it.
    pub node_id: NodeId,
    /// Manager or worker, as the managers last said.
    pub role: Role,
    /// The address that the node advertises.
    pub advertise: Ipv4Addr,
    /// Its VXLAN address.
    pub data_path: Ipv4Addr,
    /// The managers that it knows.
    pub remotes: Vec<SocketAddr>,
}

/// A membership, and what proves it: `membership.json`, readable by root alone.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Credentials {
    pub(crate) membership: Membership,
    pub(crate) secret: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { membership, secret: _ } = self;
        f.debug_struct("Credentials").field("membership", membership).finish_non_exhaustive()
    }
}

/// The state folder of an agent.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    dir: PathBuf,
}

impl Store {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    fn membership(&self) -> PathBuf {
        self.dir.join("membership.json")
    }

    fn table(&self) -> PathBuf {
        self.dir.join("table.json")
    }

    /// The folder of the tasks' folders.
    pub(crate) fn tasks(&self) -> PathBuf {
        self.dir.join("tasks")
    }

    pub(crate) fn load_credentials(&self) -> io::Result<Option<Credentials>> {
        files::read_json(&self.membership())
    }

    pub(crate) fn save_credentials(&self, credentials: &Credentials) -> io::Result<()> {
        std::fs::create_dir_all(&self.dir)?;
        files::write_json(&self.membership(), credentials, files::SECRET)
    }

    /// The last table; none where it can't be read, since the managers have it.
    pub(crate) fn load_table(&self) -> Option<Table> {
        files::read_json(&self.table()).unwrap_or_else(|error| {
            warn!(file = %self.table().display(), %error, "the last table can't be read");
            None
        })
    }

    /// Task specifications hold environments, and these secrets.
    pub(crate) fn save_table(&self, table: &Table) -> io::Result<()> {
        files::write_json(&self.table(), table, files::SECRET)
    }

    /// Forgets the membership and the table.
    pub(crate) fn forget(&self) -> Vec<io::Error> {
        let removed = [self.membership(), self.table()].map(|path| files::remove(&path));
        removed.into_iter().filter_map(Result::err).collect()
    }

    /// Writes the tables that come, leaving out those that others replace meanwhile.
    pub(crate) fn keep_tables(self, tables: watch::Receiver<Option<Arc<Table>>>) -> TableKeeper {
        let (stop, stopped) = oneshot::channel();
        TableKeeper { stop, task: tokio::spawn(keep(self, tables, stopped)) }
    }
}

/// What writes tables as they come; it ends with the sender of tables, and when dropped.
#[derive(Debug)]
pub(crate) struct TableKeeper {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl TableKeeper {
    /// Ends it; nothing is written any more once this returns.
    pub(crate) async fn stop(self) {
        drop(self.stop);
        // Not aborted: a write that is on its way would go on without it.
        let _ = self.task.await;
    }
}

async fn keep(
    store: Store,
    mut tables: watch::Receiver<Option<Arc<Table>>>,
    mut stop: oneshot::Receiver<()>,
) {
    loop {
        tokio::select! {
            changed = tables.changed() => if changed.is_err() { return },
            _ = &mut stop => return,
        }
        let started = Instant::now();
        let Some(table) = tables.borrow_and_update().clone() else { continue };
        let store = store.clone();
        match tokio::task::spawn_blocking(move || store.save_table(&table)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "the table can't be written to the state folder"),
            // The runtime is shutting down.
            Err(_) => return,
        }
        tokio::select! {
            () = tokio::time::sleep(started.elapsed() * TABLE_PAUSE_FACTOR) => {}
            _ = &mut stop => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::table::ClusterRecord;

    use super::*;

    fn credentials() -> Credentials {
        let membership = Membership {
            cluster_id: "c".into(),
            node_id: "n".into(),
            role: Role::Worker,
            advertise: Ipv4Addr::new(192, 0, 2, 1),
            data_path: Ipv4Addr::new(192, 0, 2, 2),
            remotes: vec!["192.0.2.9:2377".parse().unwrap()],
        };
        Credentials { membership, secret: "s".to_owned() }
    }

    #[test]
    fn what_was_saved_is_loaded_until_it_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(&folder.path().join("state"));
        assert!(store.load_credentials().unwrap().is_none());
        store.save_credentials(&credentials()).unwrap();
        let table = Table::new(ClusterRecord { id: "c".into(), hash_seed: 7, data_path_port: 4789 });
        store.save_table(&table).unwrap();
        assert_eq!(store.load_credentials().unwrap().unwrap().membership, credentials().membership);
        assert_eq!(store.load_table(), Some(table));
        assert!(store.forget().is_empty());
        assert!(store.load_credentials().unwrap().is_none());
        assert!(store.load_table().is_none());
    }

    #[tokio::test]
    async fn a_keeper_that_was_stopped_writes_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let table = Table::new(ClusterRecord { id: "c".into(), hash_seed: 7, data_path_port: 4789 });
        for _ in 0..50 {
            let (tables, receiver) = watch::channel(None);
            let keeper = store.clone().keep_tables(receiver);
            tables.send_replace(Some(Arc::new(table.clone())));
            // Far enough for a write to be on its way.
            tokio::task::yield_now().await;
            keeper.stop().await;
            assert!(store.forget().is_empty());
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_spoilt_table_is_as_good_as_none() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("table.json"), "{").unwrap();
        assert_eq!(Store::new(folder.path()).load_table(), None);
    }
}
