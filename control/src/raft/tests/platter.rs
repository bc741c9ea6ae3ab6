//! A disk in memory that forgets, in a crash, what was not synced, and that can fail: it is full, or a sync fails. As on
//! Linux, whoever goes on after a failed sync is told that all is well, and what that sync was to write is gone.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::raft::log::{Log, Work};
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
    /// How writes fail.
    fault: Option<Fault>,
    /// A write has failed since the last restart.
    failed: bool,
    /// It says that it synced, and didn't.
    careless: bool,
}

/// How a disk fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// Nothing can be written until it is mended.
    Full,
    /// The next sync fails. What it was to write may be there after a restart nonetheless.
    Sync { is_written: bool },
}

impl Fault {
    fn error(self) -> io::Error {
        // ENOSPC, EIO.
        io::Error::from_raw_os_error(if self == Self::Full { 28 } else { 5 })
    }
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
            Log::new(Box::new(handle()), "platter".into(), Work::Inline).0.begin(id)?;
        }
        Storage::check(Box::new(handle()), Arc::new(handle()), Path::new("platter"), Work::Inline)
    }

    /// What was not synced goes but for its first `kept` writes, which the kernel had written by itself. Whoever had it open
    /// can't use it any longer.
    pub(super) fn crash(&self, kept: usize) {
        let mut content = self.lock();
        content.age += 1;
        let Content { synced, unsynced, careless, .. } = &mut *content;
        // What a careless disk only said to have synced has long been written, but for the last of it.
        let kept = if *careless { unsynced.len().saturating_sub(1 + kept) } else { kept };
        change(synced, &unsynced[..kept.min(unsynced.len())]);
        unsynced.clear();
        content.live = content.synced.clone();
    }

    /// It fails from here on.
    pub(super) fn fail(&self, fault: Fault) {
        self.lock().fault = Some(fault);
    }

    /// It goes on as it should.
    pub(super) fn mend(&self) {
        self.lock().fault = None;
    }

    /// It says from here on that it synced, and doesn't.
    pub(super) fn be_careless(&self) {
        self.lock().careless = true;
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
        if content.age == self.age { Ok(content) } else { Err(io::Error::other("the disk is gone")) }
    }

    /// Writes and syncs: `live` is what is read from here on, `synced` what outlives a crash.
    fn write(&self, live: impl FnOnce(&mut Content), synced: impl FnOnce(&mut Content)) -> io::Result<()> {
        let mut content = self.lock()?;
        let fault = content.fault;
        content.failed |= fault.is_some();
        match fault {
            None => {
                live(&mut content);
                synced(&mut content);
                Ok(())
            }
            Some(Fault::Full) => Err(Fault::Full.error()),
            Some(fault @ Fault::Sync { is_written }) => {
                content.fault = None;
                live(&mut content);
                if is_written {
                    synced(&mut content);
                } else {
                    content.unsynced.clear();
                }
                Err(fault.error())
            }
        }
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
        let sync = |content: &mut Content| {
            let Content { synced, unsynced, careless, .. } = content;
            unsynced.extend(ops.iter().cloned());
            if !*careless {
                change(synced, unsynced);
                unsynced.clear();
            }
        };
        self.write(|content| change(&mut content.live, &ops), sync)
    }

    fn note(&self, ops: Vec<Op>) -> io::Result<()> {
        let mut content = self.lock()?;
        if content.fault == Some(Fault::Full) {
            content.failed = true;
            return Err(Fault::Full.error());
        }
        change(&mut content.live, &ops);
        content.unsynced.extend(ops);
        Ok(())
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
        // A file that takes its name only when it is synced.
        self.write(|_| (), save).map_err(StoreError::io("writing a snapshot"))
    }
}

#[test]
fn a_crash_takes_what_was_not_synced() {
    let disk = Platter::default();
    let put = |key: &str| vec![Op::Put(key.into(), Vec::new())];
    let open = |age: u64| Handle { disk: disk.clone(), age };
    let count = |age: u64| open(age).range(b"a".to_vec(), b"z".to_vec()).unwrap().len();
    open(0).commit(put("a")).unwrap();
    open(0).note(put("b")).unwrap();
    open(0).note(put("c")).unwrap();
    disk.crash(1);
    assert!(open(0).get(b"a").is_err(), "one that was opened before a crash is gone");
    assert_eq!(count(1), 2, "the first of the notes had been written");

    disk.fail(Fault::Sync { is_written: false });
    assert_eq!(open(1).commit(put("d")).unwrap_err().raw_os_error(), Some(5));
    assert!(disk.has_failed());
    assert_eq!(count(1), 3, "it is read until the crash");
    open(1).commit(put("e")).unwrap();
    disk.crash(0);
    assert!(open(2).get(b"d").unwrap().is_none() && open(2).get(b"e").unwrap().is_some());

    disk.fail(Fault::Full);
    assert_eq!(open(2).commit(put("f")).unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert!(open(2).note(put("f")).is_err() && open(2).get(b"f").unwrap().is_none());
    disk.mend();
    open(2).commit(put("f")).unwrap();
    disk.be_careless();
    open(2).commit(put("g")).unwrap();
    disk.crash(0);
    assert_eq!(count(3), 4, "what it only said to have synced is gone");
}
