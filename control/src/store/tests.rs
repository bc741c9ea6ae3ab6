//! What the engines and the snapshots keep over restarts and crashes. A crash's leftovers are a copy of the folder, taken
//! while the store is open: what the kernel holds of the files at that moment.

use std::path::Path;

use super::folder::{self, Engine};
use super::memory::MemoryKv;
use super::sled::SledKv;
use super::snapshot::{Files, Snapshots as _};
use super::{LogKv, Op, StoreError, VALUE_BYTES_MAX};

const ENGINES: [Engine; 2] = [Engine::Sled, Engine::Redb];

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
        let kv = folder::create(&dir.path().join(format!("{engine:?}")), engine).unwrap();
        keeps_order_and_atomicity(&*kv);
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

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_crash_loses_nothing_that_was_committed() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let live = dir.path().join("live");
        let kv = folder::create(&live, engine).unwrap();
        for crash in 0..8_u32 {
            let entry = |part: u32| Op::Put(format!("L{crash:03}{part}").into(), vec![0x5a; VALUE_BYTES_MAX]);
            kv.note(vec![put("committed", &crash.to_string())]).unwrap();
            kv.commit((0..7).map(entry).collect()).unwrap();
            let copy = dir.path().join(format!("crash-{crash}"));
            copy_dir(&live, &copy);
            let recovered = folder::open(&copy).unwrap();
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
        let open = folder::create(dir.path(), engine).unwrap();
        let error = folder::open(dir.path()).unwrap_err();
        assert!(matches!(&error, StoreError::Open { dir: named, .. } if *named == dir.path().join(name)));
        assert!(error.to_string().contains("stop that one"), "{error}");
        drop(open);
        assert_eq!(folder::engine_of(dir.path()), Some(engine));
        drop(folder::open(dir.path()).unwrap());

        let file = dir.path().join(file);
        let length = std::fs::metadata(&file).unwrap().len();
        std::fs::write(&file, vec![0xa5; usize::try_from(length).unwrap()]).unwrap();
        let error = folder::open(dir.path()).unwrap_err();
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
    drop(folder::create(dir.path(), Engine::Redb).unwrap());
    let files = Files::new(dir.path());
    assert_eq!(files.load().unwrap(), None);
    files.save(20, b"twenty").unwrap();
    // What was asked for first may be done last.
    files.save(10, b"ten").unwrap();
    std::fs::write(dir.path().join("snapshot.tmp"), "half").unwrap();
    assert_eq!(files.load().unwrap().as_deref(), Some(&b"twenty"[..]));
    files.save(30, b"thirty").unwrap();
    let kept = std::fs::read_dir(dir.path())
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".json"));
    assert_eq!(kept.count(), 1, "one snapshot is left");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(dir.path()), 0o700);
    assert_eq!(mode(&files.latest().unwrap().unwrap()), 0o600);

    let path = files.latest().unwrap().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = files.load().unwrap_err();
    assert!(error.to_string().contains("its checksum is wrong"), "{error}");
}

#[test]
fn a_snapshot_without_its_log_is_not_taken_for_the_state() {
    let dir = tempfile::tempdir().unwrap();
    drop(folder::create(dir.path(), Engine::Sled).unwrap());
    Files::new(dir.path()).save(5, b"state").unwrap();
    std::fs::remove_dir_all(dir.path().join("log")).unwrap();
    assert!(folder::exists(dir.path()));
    let error = folder::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("the log is missing"), "{error}");
    folder::clear(dir.path()).unwrap();
    assert!(!folder::exists(dir.path()));
}
