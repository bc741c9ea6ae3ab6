//! The data keys and the unlock key: whatever a crash leaves opens with the unlock key before or after, and with no other.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mesh_api::seal::UnlockKey;

use super::sealed::holds;
use super::{copy_dir, create, folder};
use crate::model::Lock;
use crate::store::folder::{Engine, Folder};
use crate::store::keys::Keys;
use crate::store::redb::RedbKv;
use crate::store::sealed::SealedKv;
use crate::store::snapshot::Snapshots as _;
use crate::store::{LogKv, Op, Pair, StoreError};

const RECORDS: u32 = 600;

fn locked(epoch: u64, key: &UnlockKey) -> Lock {
    Lock { epoch, key: Some(key.clone()) }
}

fn unlocked(epoch: u64) -> Lock {
    Lock { epoch, key: None }
}

fn records() -> Vec<Op> {
    (0..RECORDS).map(|at| Op::Put(format!("L{at:04}").into(), at.to_string().into())).collect()
}

/// Whether a folder opens with the unlock key, or without one, and holds all that was written.
fn is_whole(dir: &Path, unlock: Option<&UnlockKey>) -> bool {
    let Folder { log, snapshots, .. } = match folder::open(dir, unlock) {
        Ok(folder) => folder,
        Err(StoreError::Locked | StoreError::WrongUnlockKey) => return false,
        Err(error) => panic!("{error}"),
    };
    let pairs = log.range("L".into(), "M".into()).unwrap();
    let expected = records().into_iter().map(|op| match op {
        Op::Put(key, value) => (key, value),
        Op::Del(key) => (key, Vec::new()),
    });
    assert!(pairs.into_iter().eq(expected));
    assert_eq!(snapshots.load().unwrap().unwrap(), b"the state");
    true
}

fn write(dir: &Path) -> Folder {
    let folder = create(dir, Engine::Redb);
    folder.log.commit(records()).unwrap();
    folder.snapshots.save(9, b"the state").unwrap();
    folder
}

/// An engine that gives up after some commits, as one does whose host loses power.
#[derive(Debug)]
struct Mortal {
    kv: RedbKv,
    commits: AtomicUsize,
}

impl LogKv for Mortal {
    fn commit(&self, ops: Vec<Op>) -> io::Result<()> {
        let left = self.commits.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        left.map_err(|_| io::Error::other("the power is gone"))?;
        self.kv.commit(ops)
    }

    fn note(&self, ops: Vec<Op>) -> io::Result<()> {
        self.commit(ops)
    }

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.kv.get(key)
    }

    fn range(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Vec<Pair>> {
        self.kv.range(from, to)
    }

    fn first(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>> {
        self.kv.first(from, to)
    }

    fn last(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>> {
        self.kv.last(from, to)
    }
}

#[test]
fn a_crash_amid_locking_leaves_what_the_key_opens() {
    let key = UnlockKey::random();
    for commits in 0.. {
        let dir = tempfile::tempdir().unwrap();
        drop(write(dir.path()));
        let keys = Keys::open(dir.path(), None).unwrap();
        assert!(keys.follow(&locked(1, &key)).unwrap(), "there is another data key");
        let kv = RedbKv::open(&dir.path().join("log.redb")).unwrap();
        let log = SealedKv::new(Box::new(Mortal { kv, commits: commits.into() }), Arc::clone(&keys));
        let sealed = log.seal_anew();
        drop((log, keys));
        assert!(!is_whole(dir.path(), None) && !is_whole(dir.path(), Some(&UnlockKey::random())));
        assert!(is_whole(dir.path(), Some(&key)), "after {commits} commits");
        // The start has finished it: nothing needs the key that was in the clear.
        let kv = RedbKv::open(&dir.path().join("log.redb")).unwrap();
        let keys = Keys::open(dir.path(), Some(&key)).unwrap();
        for (name, value) in kv.range("L".into(), "M".into()).unwrap() {
            let name = [b"log ", &name[..]].concat();
            assert!(keys.seal().open_told(&name, &value).unwrap().1);
        }
        if sealed.is_ok() {
            assert!(commits > 2, "it is one commit");
            return;
        }
    }
}

#[test]
fn every_step_of_locking_rotating_and_unlocking_opens_with_one_key() {
    let (one, other) = (UnlockKey::random(), UnlockKey::random());
    let dir = tempfile::tempdir().unwrap();
    let live = dir.path().join("live");
    let Folder { log, snapshots, keys } = write(&live);
    let mut crash = 0;
    let mut leaves = |opens: Option<&UnlockKey>| {
        crash += 1;
        let copy = dir.path().join(format!("crash-{crash}"));
        copy_dir(&live, &copy);
        // Such a write broke off before its rename.
        std::fs::write(copy.join("key.unfinished"), "{").unwrap();
        for key in [None, Some(&one), Some(&other)] {
            let opens = key == opens || opens.is_none();
            assert_eq!(is_whole(&copy, key), opens, "crash {crash}");
        }
    };
    leaves(None);
    assert!(keys.follow(&locked(1, &one)).unwrap());
    leaves(Some(&one));
    log.seal_anew().unwrap();
    leaves(Some(&one));
    snapshots.seal_anew().unwrap();
    leaves(Some(&one));
    assert!(!keys.follow(&locked(2, &other)).unwrap(), "the data key was never in the clear");
    leaves(Some(&other));
    assert!(!keys.follow(&unlocked(3)).unwrap());
    leaves(None);
    assert!(keys.follow(&locked(4, &one)).unwrap());
    leaves(Some(&one));
    // Older states, as a start from a snapshot shows them.
    for lock in [unlocked(3), locked(2, &other), unlocked(0)] {
        assert!(!keys.follow(&lock).unwrap());
    }
    leaves(Some(&one));
    assert_eq!(keys.unlock_key(), Some(one.clone()));
}

#[test]
fn the_key_file_shows_nothing_and_is_not_to_be_changed() {
    let dir = tempfile::tempdir().unwrap();
    let key = UnlockKey::random();
    drop(folder::create(dir.path(), Engine::Redb, locked(1, &key)).unwrap());
    let file = dir.path().join("key");
    let text = std::fs::read_to_string(&file).unwrap();
    let digits = key.to_string();
    assert!(!holds(dir.path(), &digits["SWMKEY-1-".len()..]));
    for (part, other) in [("\"epoch\":1", "\"epoch\":2"), ("\"sealed\":\"", "\"sealed\":\"AAAA")] {
        assert!(text.contains(part), "{text}");
        std::fs::write(&file, text.replace(part, other)).unwrap();
        let error = folder::open(dir.path(), Some(&key)).unwrap_err();
        assert!(matches!(error, StoreError::WrongUnlockKey), "{error}");
    }
    std::fs::write(&file, text.replace("\"format\":1", "\"format\":9")).unwrap();
    let error = folder::open(dir.path(), Some(&key)).unwrap_err();
    assert!(matches!(error, StoreError::Format { format: 9, .. }), "{error}");
    for spoilt in ["", "{", &text.replace("sealed", "clear")] {
        std::fs::write(&file, spoilt).unwrap();
        let error = folder::open(dir.path(), Some(&key)).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    }
    std::fs::remove_file(&file).unwrap();
    let error = folder::open(dir.path(), Some(&key)).unwrap_err();
    assert!(error.to_string().contains("it is missing"), "{error}");
}
