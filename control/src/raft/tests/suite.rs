//! openraft's own tests of a store, on both engines.

use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::{StoreBuilder, Suite};

use crate::raft::log::LogStore;
use crate::raft::machine::Machine;
use crate::raft::{RaftId, Storage, TypeConfig};
use crate::store::folder::Engine;

struct Build(Engine);

impl StoreBuilder<TypeConfig, LogStore, Machine, tempfile::TempDir> for Build {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, Machine), StorageError<RaftId>> {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::create(dir.path(), self.0, 1).unwrap();
        // The suite purges without snapshots.
        storage.log.keeps(u64::MAX);
        let (machine, ..) = Machine::open(Arc::clone(&storage.log), storage.snapshots).await.unwrap();
        Ok((dir, LogStore(storage.log), machine))
    }
}

#[test]
fn sled_passes_openrafts_suite() {
    Suite::test_all(Build(Engine::Sled)).unwrap();
}

#[test]
fn redb_passes_openrafts_suite() {
    Suite::test_all(Build(Engine::Redb)).unwrap();
}
