//! A disk in memory that forgets, in a crash, what was not synced, and that can fail.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::raft::log::Work;
use crate::raft::{RaftId, Storage};
use crate::store::snapshot::Snapshots;
use crate::store::{LogKv, Op, Pair, StoreError};

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Debug, Default)]
struct Content {
    /// What is read.
    live: Map,
    /// What outlives a crash, and what has been written since.
    synced: Map,
    unsynced: Vec<Op>,
    snapshot: Option<(u64, Vec<u8>)>,
    /// Counts crashes: what was opened before the last one is dead.
    age: u64,
    /// How the next write fails: whether what it writes is there after a restart.
    fault: Option<bool>,
    /// A write has failed since the last restart.
    failed: bool,
}

/// The disk. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Platter {
    content: Arc<Mutex<Content>>,
}

impl Platter {
    fn lock(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap()
    }

    /// Opens it for a member, whose log begins here where nothing is.
    pub(super) fn open(&self, id: RaftId) -> Result<Storage, StoreError> {
        let (is_new, age) = {
            let mut content = self.lock();
            content.failed = false;
            (content.live.is_empty(), content.age)
        };
        let handle = || Handle { disk: self.clone(), age };
        if is_new {
            let id = Op::Put(b"I".to_vec(), id.to_be_bytes().to_vec());
            let format = Op::Put(b"F".to_vec(), crate::store::FORMAT.to_be_bytes().to_vec());
            handle().commit(vec![format, id]).map_err(StoreError::io("beginning the log"))?;
        }
        Storage::check(Box::new(handle()), Arc::new(handle()), Path::new("platter"), Work::Inline)
    }

    /// What was not synced goes, and whoever had it open can't use it any longer.
    pub(super) fn crash(&self) {
        let mut content = self.lock();
        content.age += 1;
        content.live = content.synced.clone();
        content.unsynced.clear();
        content.fault = None;
    }

    /// The next write fails. What it writes may be there after a restart nonetheless.
    pub(super) fn fail_next(&self, but_is_written: bool) {
        self.lock().fault = Some(but_is_written);
    }

    /// It goes on as it should.
    pub(super) fn mend(&self) {
        self.lock().fault = None;
    }

    pub(super) fn has_failed(&self) -> bool {
        self.lock().failed
    }
}

/// A disk as it was opened once.
#[derive(Debug)]
struct Handle {
    disk: Platter,
    age: u64,
}

impl Handle {
    fn lock(&self) -> io::Result<MutexGuard<'_, Content>> {
        let content = self.disk.lock();
        let dead = content.age != self.age || content.failed;
        if dead { Err(io::Error::other("the disk is gone")) } else { Ok(content) }
    }

    fn write(&self, write: impl FnOnce(&mut Content)) -> io::Result<()> {
        let mut content = self.lock()?;
        let fault = content.fault.take();
        if fault != Some(false) {
            write(&mut content);
        }
        content.failed = fault.is_some();
        if content.failed { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
    }
}

fn change(map: &mut Map, ops: &[Op]) {
    for op in ops {
        match op {
            Op::Put(key, value) => drop(map.insert(key.clone(), value.clone())),
            Op::Del(key) => drop(map.remove(key)),
        }
    }
}

impl LogKv for Handle {
    fn commit(&self, ops: Vec<Op>) -> io::Result<()> {
        self.write(|content| {
            change(&mut content.live, &ops);
            let Content { synced, unsynced, .. } = content;
            change(synced, unsynced);
            unsynced.clear();
            change(synced, &ops);
        })
    }

    fn note(&self, ops: Vec<Op>) -> io::Result<()> {
        self.write(|content| {
            change(&mut content.live, &ops);
            content.unsynced.extend(ops);
        })
    }

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.lock()?.live.get(key).cloned())
    }

    fn range(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Vec<Pair>> {
        Ok(self.lock()?.live.range(from..to).map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn first(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>> {
        Ok(self.lock()?.live.range(from..to).next().map(|(key, value)| (key.clone(), value.clone())))
    }

    fn last(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>> {
        Ok(self.lock()?.live.range(from..to).next_back().map(|(key, value)| (key.clone(), value.clone())))
    }
}

impl Snapshots for Handle {
    fn load(&self) -> Result<Option<Vec<u8>>, StoreError> {
        let content = self.lock().map_err(StoreError::io("reading a snapshot"))?;
        Ok(content.snapshot.as_ref().map(|(_, body)| body.clone()))
    }

    fn save(&self, index: u64, body: &[u8]) -> Result<(), StoreError> {
        let save = |content: &mut Content| {
            if content.snapshot.as_ref().is_none_or(|(kept, _)| *kept <= index) {
                content.snapshot = Some((index, body.to_vec()));
            }
        };
        self.write(save).map_err(StoreError::io("writing a snapshot"))
    }
}

#[test]
fn a_crash_takes_what_was_not_synced() {
    let disk = Platter::default();
    let put = |key: &str| vec![Op::Put(key.into(), Vec::new())];
    let handle = Handle { disk: disk.clone(), age: 0 };
    handle.commit(put("a")).unwrap();
    handle.note(put("b")).unwrap();
    disk.fail_next(false);
    assert!(handle.commit(put("c")).is_err() && disk.has_failed());
    assert!(handle.get(b"a").is_err(), "a disk that failed is not trusted");
    disk.crash();
    assert!(handle.get(b"a").is_err(), "nor is one that was opened before a crash");
    drop(disk.open(1));
    let handle = Handle { disk: disk.clone(), age: 1 };
    assert_eq!(handle.range(b"a".to_vec(), b"d".to_vec()).unwrap().len(), 1);
}
