//! The engine in memory: for tests, which clone it to see what a crash at that moment would leave.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{LogKv, Op, Pair};

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

    /// Keys in the map.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether the map has no keys.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
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
