//! What the engines and the snapshots keep over restarts and crashes. A crash's leftovers are a copy of the folder, taken
//! while the store is open: what the kernel holds of the files at that moment.

use std::path::Path;

mod keys;
mod sealed;

use super::folder::{self, Engine, Folder};
use super::memory::MemoryKv;
use super::redb::RedbKv;
use super::sled::SledKv;
use super::snapshot::Snapshots as _;
use super::{LogKv, Op, PLAIN_BYTES_MAX, StoreError, VALUE_BYTES_MAX};
use crate::model::Lock;
use crate::testing::copy_dir;

const ENGINES: [Engine; 2] = [Engine::Sled, Engine::Redb];

fn create(dir: &Path, engine: Engine) -> Folder {
    folder::create(dir, engine, Lock::default()).unwrap()
}

/// An engine in a folder, as it is below the seal.
fn bare(dir: &Path, engine: Engine) -> Box<dyn LogKv> {
    match engine {
        Engine::Sled => Box::new(SledKv::open(&dir.join("log")).unwrap()),
        Engine::Redb => Box::new(RedbKv::open(&dir.join("log.redb")).unwrap()),
    }
}

fn put(key: &str, value: &str) -> Op {
    Op::Put(key.into(), value.into())
}

fn keeps_order_and_atomicity(kv: &dyn LogKv) {
    kv.commit(vec![put("b", "2"), put("a", "1"), put("c", "3")]).unwrap();
    kv.commit(vec![Op::Del("b".into()), put("d", "4")]).unwrap();
    kv.note(vec![put("n", "noted")]).unwrap();
    assert_eq!(kv.get(b"a").unwrap().as_deref(), Some(&b"1"[..]));
    assert_eq!(kv.get(b"b").unwrap(), None);
    assert_eq!(kv.get(b"n").unwrap().as_deref(), Some(&b"noted"[..]));
    let keys: Vec<Vec<u8>> =
        kv.range("a".into(), "d".into()).unwrap().into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, [b"a".to_vec(), b"c".to_vec()]);
    assert_eq!(kv.first("b".into(), "z".into()).unwrap().unwrap().0, b"c");
    assert_eq!(kv.last("a".into(), "d".into()).unwrap().unwrap().0, b"c");
    assert!(kv.last("x".into(), "z".into()).unwrap().is_none());

    let ops = vec![put("small", "x"), Op::Put("large".into(), vec![0; VALUE_BYTES_MAX + 1])];
    assert!(kv.commit(ops).is_err(), "sled would not sync it");
    assert_eq!(kv.get(b"small").unwrap(), None);
}

#[test]
fn both_engines_keep_order_and_atomicity() {
    let dir = tempfile::tempdir().unwrap();
    for engine in ENGINES {
        let dir = dir.path().join(format!("{engine:?}"));
        keeps_order_and_atomicity(&*create(&dir, engine).log);
        std::fs::create_dir(dir.join("bare")).unwrap();
        keeps_order_and_atomicity(&*bare(&dir.join("bare"), engine));
    }
}

#[test]
fn the_engine_in_memory_does_as_the_others() {
    let kv = MemoryKv::default();
    kv.commit(vec![put("b", "2"), put("a", "1")]).unwrap();
    kv.note(vec![Op::Del("b".into()), put("c", "3")]).unwrap();
    assert_eq!(kv.get(b"b").unwrap(), None);
    assert_eq!(kv.range("a".into(), "z".into()).unwrap().len(), 2);
    assert_eq!(kv.first("b".into(), "z".into()).unwrap().unwrap().0, b"c");
    assert_eq!(kv.last("a".into(), "c".into()).unwrap().unwrap().0, b"a");
}

#[test]
fn a_crash_loses_nothing_that_was_committed() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let live = dir.path().join("live");
        let kv = create(&live, engine).log;
        for crash in 0..8_u32 {
            let entry = |part: u32| Op::Put(format!("L{crash:03}{part}").into(), vec![0x5a; PLAIN_BYTES_MAX]);
            kv.note(vec![put("committed", &crash.to_string())]).unwrap();
            kv.commit((0..7).map(entry).collect()).unwrap();
            let copy = dir.path().join(format!("crash-{crash}"));
            copy_dir(&live, &copy);
            let recovered = folder::open(&copy, None).unwrap().log;
            let found = recovered.range("L".into(), "M".into()).unwrap();
            assert_eq!(found.len() as u32, (crash + 1) * 7, "{engine:?}");
            assert_eq!(
                recovered.get(b"committed").unwrap(),
                Some(crash.to_string().into_bytes()),
                "{engine:?}"
            );
        }
    }
}

#[test]
fn a_folder_in_use_or_damaged_is_refused_with_a_remedy() {
    for (engine, name, file) in [(Engine::Sled, "log", "log/db"), (Engine::Redb, "log.redb", "log.redb")] {
        let dir = tempfile::tempdir().unwrap();
        let open = create(dir.path(), engine);
        let error = folder::open(dir.path(), None).unwrap_err();
        assert!(matches!(&error, StoreError::Open { dir: named, .. } if *named == dir.path().join(name)));
        assert!(error.to_string().contains("stop that one"), "{error}");
        drop(open);
        assert_eq!(folder::engine_of(dir.path()), Some(engine));
        drop(folder::open(dir.path(), None).unwrap());

        let file = dir.path().join(file);
        let length = std::fs::metadata(&file).unwrap().len();
        std::fs::write(&file, vec![0xa5; usize::try_from(length).unwrap()]).unwrap();
        let error = folder::open(dir.path(), None).unwrap_err();
        assert!(error.to_string().contains("move the folder aside"), "{error}");
    }
}

#[test]
fn an_emptied_sled_is_not_taken_for_a_fresh_one() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    drop(SledKv::open(&log).unwrap());
    std::fs::remove_dir_all(&log).unwrap();
    std::fs::create_dir(&log).unwrap();
    let error = SledKv::open(&log).unwrap_err();
    assert!(error.to_string().contains("finds nothing of what it holds"), "{error}");
}

#[test]
fn the_latest_snapshot_counts_and_only_the_owner_reads_it() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let Folder { snapshots: files, .. } = create(dir.path(), Engine::Redb);
    assert_eq!(files.load().unwrap(), None);
    files.save(20, b"twenty").unwrap();
    // What was asked for first may be done last.
    files.save(10, b"ten").unwrap();
    std::fs::write(dir.path().join("snapshot.unfinished"), "half").unwrap();
    assert_eq!(files.load().unwrap().as_deref(), Some(&b"twenty"[..]));
    files.save(30, b"thirty").unwrap();
    let kept = std::fs::read_dir(dir.path())
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("snapshot-"));
    assert_eq!(kept.count(), 1, "one snapshot is left");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(dir.path()), 0o700);
    let path = dir.path().join("snapshot-00000000000000000030");
    assert_eq!((mode(&path), mode(&dir.path().join("key"))), (0o600, 0o600));

    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = files.load().unwrap_err();
    assert!(error.to_string().contains("it is damaged") && error.to_string().contains("join"), "{error}");
}

#[test]
fn a_snapshot_without_its_log_is_not_taken_for_the_state() {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), Engine::Sled).snapshots.save(5, b"state").unwrap();
    std::fs::remove_dir_all(dir.path().join("log")).unwrap();
    assert!(folder::exists(dir.path()));
    let error = folder::open(dir.path(), None).unwrap_err();
    assert!(error.to_string().contains("the log is missing"), "{error}");
    folder::clear(dir.path()).unwrap();
    assert!(!folder::exists(dir.path()));
}
