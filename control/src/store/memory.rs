//! Engine and snapshots in memory: for tests, which clone them to see what a crash at that moment would leave.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::snapshot::Snapshots;
use super::{LogKv, Op, Pair, StoreError};

/// An ordered map. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct MemoryKv {
    map: Arc<Mutex<BTreeMap<Vec<u8>, Vec<u8>>>>,
}

impl MemoryKv {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Vec<u8>, Vec<u8>>> {
        // A panic elsewhere can't leave the map half changed: each lock makes one change.
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogKv for MemoryKv {
    fn commit(&self, ops: Vec<Op>) -> io::Result<()> {
        let mut map = self.lock();
        for op in ops {
            match op {
                Op::Put(key, value) => drop(map.insert(key, value)),
                Op::Del(key) => drop(map.remove(&key)),
            }
        }
        Ok(())
    }

    fn note(&self, ops: Vec<Op>) -> io::Result<()> {
        self.commit(ops)
    }

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.lock().get(key).cloned())
    }

    fn range(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Vec<Pair>> {
        Ok(self.lock().range(from..to).map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn first(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>> {
        Ok(self.lock().range(from..to).next().map(|(key, value)| (key.clone(), value.clone())))
    }

    fn last(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>> {
        Ok(self.lock().range(from..to).next_back().map(|(key, value)| (key.clone(), value.clone())))
    }
}

/// The latest snapshot, in memory. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct MemorySnapshots {
    latest: Arc<Mutex<Option<Indexed>>>,
}

/// A snapshot and its index.
type Indexed = (u64, Vec<u8>);

impl Snapshots for MemorySnapshots {
    fn load(&self) -> Result<Option<Vec<u8>>, StoreError> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(latest.as_ref().map(|(_, body)| body.clone()))
    }

    fn save(&self, index: u64, body: &[u8]) -> Result<(), StoreError> {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if latest.as_ref().is_none_or(|(kept, _)| *kept <= index) {
            *latest = Some((index, body.to_vec()));
        }
        Ok(())
    }
}
