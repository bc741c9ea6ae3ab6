//! What is sealed can't be read without its key, nor changed, nor put in another's place.

use std::collections::BTreeSet;
use std::path::Path;

use super::{ENGINES, bare, create, folder, put};
use crate::store::folder::{Engine, Folder};
use crate::store::snapshot::Snapshots as _;
use crate::store::{LogKv, Op, StoreError};

const SECRET: &str = "-----BEGIN PRIVATE KEY-----";

/// What somebody does to an engine's files.
type Change = fn(&dyn LogKv) -> Vec<Op>;

/// Writes a vote, entries and a snapshot, each with the secret in it.
fn write(dir: &Path, engine: Engine) {
    let Folder { log, snapshots, .. } = create(dir, engine);
    log.note(vec![put("C", SECRET)]).unwrap();
    log.commit(vec![put("V", SECRET), put("L1", &SECRET.repeat(100)), put("L2", SECRET)]).unwrap();
    snapshots.save(7, SECRET.as_bytes()).unwrap();
}

/// Changes the engine's files below the seal.
fn tamper(dir: &Path, engine: Engine, change: impl FnOnce(&dyn LogKv) -> Vec<Op>) {
    let kv = bare(dir, engine);
    let ops = change(&*kv);
    kv.commit(ops).unwrap();
}

/// Whether any file below `dir` holds `secret`.
pub(super) fn holds(dir: &Path, secret: &str) -> bool {
    std::fs::read_dir(dir).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return holds(&path, secret);
        }
        std::fs::read(path).unwrap().windows(secret.len()).any(|window| window == secret.as_bytes())
    })
}

#[test]
fn nothing_is_on_the_disk_in_the_clear() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), engine);
        assert!(!holds(dir.path(), SECRET), "{engine:?}");
        // The search would find it.
        tamper(dir.path(), engine, |_| vec![put("clear", SECRET)]);
        assert!(holds(dir.path(), SECRET), "{engine:?}");
    }
}

#[test]
fn records_of_another_key_in_anothers_place_cut_off_or_in_the_clear_are_refused() {
    let get = |kv: &dyn LogKv, key: &str| kv.get(key.as_bytes()).unwrap().unwrap();
    for engine in ENGINES {
        let changes: [(&str, Change); 4] = [
            ("swapped", |kv| {
                let (one, other) = (kv.get(b"L1").unwrap().unwrap(), kv.get(b"L2").unwrap().unwrap());
                vec![Op::Put("L1".into(), other), Op::Put("L2".into(), one)]
            }),
            ("cut off", |kv| {
                let mut value = kv.get(b"L1").unwrap().unwrap();
                value.pop();
                vec![Op::Put("L1".into(), value)]
            }),
            ("in the clear", |_| {
                vec![put("L1", "a record in the clear, as an engine without a seal has it")]
            }),
            ("empty", |_| vec![put("L1", "")]),
        ];
        for (how, change) in changes {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), engine);
            tamper(dir.path(), engine, change);
            let log = folder::open(dir.path(), None).unwrap().log;
            let error = log.get(b"L1").unwrap_err();
            assert!(error.to_string().contains("the record L1: it can't be opened"), "{how}: {error}");
            assert!(
                log.range("L1".into(), "M".into()).is_err() && log.first("L1".into(), "M".into()).is_err()
            );
            assert_eq!(get(&*log, "V"), SECRET.as_bytes(), "{how}: the others are as they were");
        }

        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(one.path(), engine);
        write(other.path(), engine);
        std::fs::copy(other.path().join("key"), one.path().join("key")).unwrap();
        let Folder { log, snapshots, .. } = folder::open(one.path(), None).unwrap();
        assert!(log.get(b"V").is_err() && log.last("L".into(), "M".into()).is_err());
        assert!(matches!(snapshots.load(), Err(StoreError::Damaged { .. })));
    }
}

#[test]
fn a_snapshot_under_another_index_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), Engine::Redb);
    let file = |index: u64| dir.path().join(format!("snapshot-{index:020}"));
    std::fs::rename(file(7), file(8)).unwrap();
    let error = folder::open(dir.path(), None).unwrap().snapshots.load().unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
}

#[test]
fn the_same_value_is_never_the_same_on_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    drop(create(dir.path(), Engine::Redb));
    let mut seen = BTreeSet::new();
    for _ in 0..16 {
        let log = folder::open(dir.path(), None).unwrap().log;
        log.commit(vec![put("V", "the same vote")]).unwrap();
        drop(log);
        assert!(seen.insert(bare(dir.path(), Engine::Redb).get(b"V").unwrap().unwrap()));
    }
}
