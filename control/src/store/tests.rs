//! What the store keeps over restarts and crashes. A crash's leftovers are a copy of the folder, taken while the store
//! is open: what the kernel holds of the files at that moment.

use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::journal::{Entry, Journal};
use super::memory::MemoryKv;
use super::sled::{SledKv, VALUE_BYTES_MAX};
use super::{FORMAT, LogKv, Op, StoreError};
use crate::apply::apply;
use crate::command::{Action, Command};
use crate::model::State;
use crate::testing::{World, genesis, network, service};

fn put(key: &str, value: &str) -> Op {
    Op::Put(key.into(), value.into())
}

/// An engine in memory that counts the pairs read.
#[derive(Debug, Default)]
struct CountingKv {
    kv: MemoryKv,
    read: std::sync::Arc<std::sync::atomic::AtomicUsize>,
}

impl LogKv for CountingKv {
    fn commit(&self, ops: Vec<Op>) -> std::io::Result<()> {
        self.kv.commit(ops)
    }

    fn get(&self, key: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
        self.kv.get(key)
    }

    fn range(&self, from: Vec<u8>, to: Vec<u8>) -> std::io::Result<Vec<super::Pair>> {
        let pairs = self.kv.range(from, to)?;
        self.read.fetch_add(pairs.len(), std::sync::atomic::Ordering::Relaxed);
        Ok(pairs)
    }

    fn first(&self, from: Vec<u8>, to: Vec<u8>) -> std::io::Result<Option<super::Pair>> {
        self.kv.first(from, to)
    }

    fn last(&self, from: Vec<u8>, to: Vec<u8>) -> std::io::Result<Option<super::Pair>> {
        self.kv.last(from, to)
    }
}

#[test]
fn compaction_reads_each_entry_once() {
    let dir = tempfile::tempdir().unwrap();
    let kv = CountingKv::default();
    let (log, read) = (kv.kv.clone(), kv.read.clone());
    let (journal, _) = Journal::recover(dir.path(), Box::new(kv), 1000).unwrap();
    let entries = entries(1000);
    journal.append(&entries).unwrap();
    let pairs = log.len();
    journal.snapshot(&state_of(&entries[..990])).unwrap();
    assert_eq!(read.load(std::sync::atomic::Ordering::Relaxed), pairs - log.len());
    assert_eq!(Journal::recover(dir.path(), Box::new(log), 1000).unwrap().1, state_of(&entries));
}

fn engine_keeps_order_and_atomicity(kv: &dyn LogKv) {
    kv.commit(vec![put("b", "2"), put("a", "1"), put("c", "3")]).unwrap();
    kv.commit(vec![Op::Del("b".into()), put("d", "4")]).unwrap();
    assert_eq!(kv.get(b"a").unwrap().as_deref(), Some(&b"1"[..]));
    assert_eq!(kv.get(b"b").unwrap(), None);
    let keys: Vec<Vec<u8>> =
        kv.range("a".into(), "d".into()).unwrap().into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, [b"a".to_vec(), b"c".to_vec()]);
    assert_eq!(kv.last("a".into(), "d".into()).unwrap().unwrap().0, b"c");
    assert!(kv.last("x".into(), "z".into()).unwrap().is_none());
}

#[test]
fn both_engines_keep_order_and_atomicity() {
    let dir = tempfile::tempdir().unwrap();
    engine_keeps_order_and_atomicity(&SledKv::open(&dir.path().join("log")).unwrap());
    engine_keeps_order_and_atomicity(&MemoryKv::default());
}

#[test]
fn sled_refuses_values_that_it_would_not_sync() {
    let dir = tempfile::tempdir().unwrap();
    let kv = SledKv::open(&dir.path().join("log")).unwrap();
    let ops = vec![put("small", "x"), Op::Put("large".into(), vec![0; VALUE_BYTES_MAX + 1])];
    assert!(kv.commit(ops).is_err());
    assert_eq!(kv.get(b"small").unwrap(), None);
}

fn entry(index: u64, action: Action) -> Entry {
    Entry { index, command: Command { at_ns: index, action } }
}

/// Some entries, one of them far longer than the longest value.
fn entries(count: u64) -> Vec<Entry> {
    let mut long = service("long", 1);
    long.task.container.env = (0..2000).map(|at| format!("VARIABLE_{at}=some value of it")).collect();
    let mut entries = vec![
        entry(1, Action::Initialize(Box::new(genesis()))),
        entry(2, Action::CreateService { id: "long".into(), spec: Box::new(long) }),
    ];
    for index in 3..=count {
        let name = format!("n{index}");
        entries.push(entry(index, Action::CreateNetwork { id: name.as_str().into(), spec: network(&name) }));
    }
    entries
}

fn state_of(entries: &[Entry]) -> State {
    let step = |state: State, entry: &Entry| apply(&state, entry.index, &entry.command).unwrap().0;
    entries.iter().fold(State::empty(), step)
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
fn a_crash_loses_nothing_that_was_appended() {
    let dir = tempfile::tempdir().unwrap();
    let entries = entries(60);
    let (journal, state) = Journal::open(&dir.path().join("live")).unwrap();
    assert_eq!(state, State::empty());
    for (crash, batch) in entries.chunks(7).enumerate() {
        journal.append(batch).unwrap();
        let copy = dir.path().join(format!("crash-{crash}"));
        copy_dir(&dir.path().join("live"), &copy);
        let (_, recovered) = Journal::open(&copy).unwrap();
        let appended = entries.len().min((crash + 1) * 7);
        assert_eq!(recovered, state_of(&entries[..appended]));
    }
}

#[test]
fn a_snapshot_takes_the_entries_place_and_more_follow() {
    let dir = tempfile::tempdir().unwrap();
    let entries = entries(40);
    let kv = MemoryKv::default();
    let (journal, _) = Journal::recover(dir.path(), Box::new(kv.clone()), 10).unwrap();
    assert!(!journal.wants_snapshot(9) && journal.wants_snapshot(10));
    journal.append(&entries[..25]).unwrap();
    journal.snapshot(&state_of(&entries[..20])).unwrap();
    assert!(!journal.wants_snapshot(25) && journal.wants_snapshot(30));
    assert_eq!(kv.len(), 6, "entries 21 to 25 are left, and the format");
    journal.append(&entries[25..]).unwrap();
    journal.snapshot(&state_of(&entries[..30])).unwrap();
    let files = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(files, 1, "one snapshot is left");
    let (_, recovered) = Journal::recover(dir.path(), Box::new(kv), 10).unwrap();
    assert_eq!(recovered, state_of(&entries));
}

#[test]
fn a_crash_between_snapshot_and_compaction_is_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let entries = entries(30);
    let kv = MemoryKv::default();
    let (journal, _) = Journal::recover(dir.path(), Box::new(kv.clone()), 10).unwrap();
    journal.append(&entries).unwrap();
    super::snapshot::save(dir.path(), &state_of(&entries[..20])).unwrap();
    std::fs::write(dir.path().join("snapshot.tmp"), "half").unwrap();
    let (_, recovered) = Journal::recover(dir.path(), Box::new(kv), 10).unwrap();
    assert_eq!(recovered, state_of(&entries));
}

#[test]
fn damage_is_named_not_guessed_over() {
    let dir = tempfile::tempdir().unwrap();
    let entries = entries(10);
    let kv = MemoryKv::default();
    let (journal, _) = Journal::recover(dir.path(), Box::new(kv.clone()), 100).unwrap();
    journal.append(&entries[..4]).unwrap();
    journal.append(&entries[5..]).unwrap();
    let error = Journal::recover(dir.path(), Box::new(kv), 100).unwrap_err();
    assert!(error.to_string().contains("entry 5 is missing"), "{error}");

    super::snapshot::save(dir.path(), &state_of(&entries[..3])).unwrap();
    let path = super::snapshot::latest(dir.path()).unwrap().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = Journal::recover(dir.path(), Box::new(MemoryKv::default()), 100).unwrap_err();
    assert!(error.to_string().contains("its checksum is wrong"), "{error}");
}

#[test]
fn a_folder_in_use_or_damaged_is_refused_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let open = SledKv::open(&log).unwrap();
    let error = SledKv::open(&log).unwrap_err();
    assert!(matches!(&error, StoreError::Open { dir: named, .. } if *named == log), "{error}");
    assert!(error.to_string().contains("stop that one"), "{error}");
    drop(open);
    SledKv::open(&log).unwrap();

    let length = std::fs::metadata(log.join("db")).unwrap().len();
    std::fs::write(log.join("db"), vec![0xa5; usize::try_from(length).unwrap()]).unwrap();
    let error = SledKv::open(&log).unwrap_err();
    assert!(error.to_string().contains("move the folder aside"), "{error}");
}

#[test]
fn a_world_with_history_survives() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(&["n1", "n2"]);
    let id = world.create_service(service("web", 4));
    while world.orchestrate().0 {}
    world.must(Action::RemoveService { id });
    while world.orchestrate().0 {}
    let numbered = world.log.iter().cloned().zip(1..);
    let entries: Vec<Entry> = numbered.map(|(command, index)| Entry { index, command }).collect();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    journal.append(&entries).unwrap();
    drop(journal);
    assert_eq!(Journal::open(dir.path()).unwrap().1, world.state);
}

#[test]
fn only_the_owner_reads_what_holds_the_tokens() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    journal.snapshot(&World::new(&[]).state).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(dir.path()), 0o700);
    let mut files = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    let snapshot = files.find(|path| path.extension().is_some_and(|it| it == "json")).unwrap();
    assert_eq!(mode(&snapshot), 0o600);
}

/// What a world of format 1 left: a log, and the snapshot of all of it.
const FORMAT_1_LOG: &str = include_str!("testdata/format1-log.jsonl");
const FORMAT_1_SNAPSHOT: &[u8] = include_bytes!("testdata/format1-snapshot.json");

/// What a world of format 2 left, likewise.
const FORMAT_2_LOG: &str = include_str!("testdata/format2-log.jsonl");
const FORMAT_2_SNAPSHOT: &[u8] = include_bytes!("testdata/format2-snapshot.json");

/// What a world of format 3 left, likewise.
const FORMAT_3_LOG: &str = include_str!("testdata/format3-log.jsonl");
const FORMAT_3_SNAPSHOT: &[u8] = include_bytes!("testdata/format3-snapshot.json");

/// What a world of format 4 left, likewise.
const FORMAT_4_LOG: &str = include_str!("testdata/format4-log.jsonl");
const FORMAT_4_SNAPSHOT: &[u8] = include_bytes!("testdata/format4-snapshot.json");

fn log_of(commands: &str) -> MemoryKv {
    let kv = MemoryKv::default();
    for (command, index) in commands.lines().zip(1_u64..) {
        let key = [&b"L"[..], &index.to_be_bytes(), &0_u16.to_be_bytes()].concat();
        kv.commit(vec![Op::Put(key, command.into())]).unwrap();
    }
    kv
}

#[test]
fn what_format_1_left_is_read_and_becomes_of_this_format() {
    let dir = tempfile::tempdir().unwrap();
    let kv = log_of(FORMAT_1_LOG);
    let (journal, state) = Journal::recover(dir.path(), Box::new(kv.clone()), 1000).unwrap();
    assert_eq!(kv.len(), 1, "a snapshot took the entries' place, and the format is noted");
    assert_eq!(Journal::recover(dir.path(), Box::new(kv), 1000).unwrap().1, state);
    drop(journal);

    let ingress = state.ingress().unwrap();
    let subnet6 = ingress.subnet6.unwrap();
    assert!(ingress.spec.ipam6.is_some() && subnet6.cidr.to_string().ends_with(":1000::/64"), "{subnet6:?}");
    let app = state.network_by_name("app").unwrap();
    assert_eq!((&app.spec.ipam6, app.subnet6), (&None, None));
    let labels = &state.service_by_name("web").unwrap().spec.labels;
    assert_eq!(labels.keys().collect::<Vec<_>>(), ["tier"], "labels that are Shoal's own by now are gone");
    assert_eq!(state.tasks.len(), 3);
    assert!(state.tasks.values().all(|task| task.warmth == crate::model::WARM));

    let snapshots = tempfile::tempdir().unwrap();
    std::fs::write(snapshots.path().join("snapshot-00000000000000000010.json"), FORMAT_1_SNAPSHOT).unwrap();
    let (_, of_snapshot) = Journal::recover(snapshots.path(), Box::<MemoryKv>::default(), 1000).unwrap();
    assert_eq!(of_snapshot, state, "the log and its snapshot lead to the same state");
}

#[test]
fn addresses_given_out_in_format_2_stay_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let kv = log_of(FORMAT_2_LOG);
    kv.commit(vec![Op::Put("F".into(), 2_u32.to_be_bytes().to_vec())]).unwrap();
    let (journal, state) = Journal::recover(dir.path(), Box::new(kv.clone()), 1000).unwrap();
    assert_eq!(kv.len(), 1, "a snapshot took the entries' place, and the format is noted");
    assert_eq!(Journal::recover(dir.path(), Box::new(kv), 1000).unwrap().1, state);
    drop(journal);
    assert!(
        state.freed.is_empty() && state.counters.acknowledged == 0,
        "addresses that are freed from here on rest"
    );

    let labels = &state.service_by_name("web").unwrap().spec.labels;
    assert_eq!(labels["shoal.affinity"], "client-ip");
    // The subnet has five addresses: they went round.
    let addrs = state.tasks.values().filter(|task| task.service_name == "web");
    let addrs: Vec<String> = addrs.map(|task| task.endpoints[0].addr.unwrap().to_string()).collect();
    assert_eq!(addrs, ["192.0.2.4", "192.0.2.5", "192.0.2.6"]);

    let snapshots = tempfile::tempdir().unwrap();
    std::fs::write(snapshots.path().join("snapshot-00000000000000000033.json"), FORMAT_2_SNAPSHOT).unwrap();
    let (_, of_snapshot) = Journal::recover(snapshots.path(), Box::<MemoryKv>::default(), 1000).unwrap();
    assert_eq!(of_snapshot, state, "the log and its snapshot lead to the same state");
}

#[test]
fn what_format_3_left_means_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let kv = log_of(FORMAT_3_LOG);
    kv.commit(vec![Op::Put("F".into(), 3_u32.to_be_bytes().to_vec())]).unwrap();
    let (journal, state) = Journal::recover(dir.path(), Box::new(kv.clone()), 1000).unwrap();
    assert_eq!(kv.len(), 1, "a snapshot took the entries' place, and the format is noted");
    assert_eq!(kv.get(b"F").unwrap(), Some(FORMAT.to_be_bytes().to_vec()));
    drop(journal);
    assert_eq!(state.counters.acknowledged, 11, "freed addresses go on to rest");
    assert_eq!(state.cluster.as_ref().unwrap().key_epoch, 0);
    assert!(state.nodes.values().all(|node| node.description.wireguard.is_empty()));
    let plan = state.network_by_name("plan").unwrap();
    assert_eq!((plan.is_encrypted(), plan.spec.mtu(), plan.subnets.len()), (false, Ok(Some(1400)), 2));

    // Whatever comes after is of this format, and read back.
    let (journal, _) = Journal::recover(dir.path(), Box::new(kv.clone()), 1000).unwrap();
    let rotate = entry(state.index + 1, Action::RotateKeys);
    journal.append(std::slice::from_ref(&rotate)).unwrap();
    let (_, rotated) = Journal::recover(dir.path(), Box::new(kv), 1000).unwrap();
    assert_eq!(rotated.cluster.unwrap().key_epoch, 1);

    let snapshots = tempfile::tempdir().unwrap();
    std::fs::write(snapshots.path().join("snapshot-00000000000000000014.json"), FORMAT_3_SNAPSHOT).unwrap();
    let (_, of_snapshot) = Journal::recover(snapshots.path(), Box::<MemoryKv>::default(), 1000).unwrap();
    assert_eq!(of_snapshot, state, "the log and its snapshot lead to the same state");
}

#[test]
fn what_a_later_version_wrote_is_refused_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let kv = MemoryKv::default();
    kv.commit(vec![Op::Put("F".into(), 6_u32.to_be_bytes().to_vec())]).unwrap();
    let error = Journal::recover(dir.path(), Box::new(kv), 1000).unwrap_err();
    assert!(
        error.to_string().contains("has format 6") && error.to_string().contains("start the version"),
        "{error}"
    );

    let body = br#"{"format":6,"state":"in another shape"}"#;
    let digest = super::snapshot::hex(&Sha256::digest(body));
    let file = [digest.as_bytes(), b"\n", body].concat();
    std::fs::write(dir.path().join("snapshot-00000000000000000010.json"), file).unwrap();
    let error = Journal::recover(dir.path(), Box::<MemoryKv>::default(), 1000).unwrap_err();
    assert!(matches!(error, StoreError::Format { format: 6, .. }), "{error}");
}

#[test]
fn what_format_4_left_means_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let kv = log_of(FORMAT_4_LOG);
    kv.commit(vec![Op::Put("F".into(), 4_u32.to_be_bytes().to_vec())]).unwrap();
    let (journal, state) = Journal::recover(dir.path(), Box::new(kv.clone()), 1000).unwrap();
    assert_eq!(kv.len(), 1, "a snapshot took the entries' place, and the format is noted");
    assert_eq!(kv.get(b"F").unwrap(), Some(FORMAT.to_be_bytes().to_vec()));
    drop(journal);
    assert!(state.network_by_name("secret").unwrap().is_encrypted());
    assert_eq!(state.cluster.as_ref().unwrap().key_epoch, 1);
    assert_eq!(state.tasks.len(), 3);
    assert!(
        state.tasks.values().all(|task| task.egress.is_empty()),
        "tasks leave by their nodes' own addresses"
    );
    assert!(state.nodes.values().all(|node| node.description.addresses.is_empty()));

    // Whatever comes after is of this format, and read back.
    let (journal, _) = Journal::recover(dir.path(), Box::new(kv.clone()), 1000).unwrap();
    let mut spec = service("fixed", 1);
    spec.labels.insert("shoal.egress".into(), "192.0.2.7".into());
    let create = entry(state.index + 1, Action::CreateService { id: "fixed".into(), spec: Box::new(spec) });
    journal.append(std::slice::from_ref(&create)).unwrap();
    let (_, with_service) = Journal::recover(dir.path(), Box::new(kv), 1000).unwrap();
    assert!(with_service.service_by_name("fixed").is_some());

    let snapshots = tempfile::tempdir().unwrap();
    std::fs::write(snapshots.path().join("snapshot-00000000000000000011.json"), FORMAT_4_SNAPSHOT).unwrap();
    let (_, of_snapshot) = Journal::recover(snapshots.path(), Box::<MemoryKv>::default(), 1000).unwrap();
    assert_eq!(of_snapshot, state, "the log and its snapshot lead to the same state");
}

#[test]
fn a_log_that_lost_its_end_is_not_taken_for_whole() {
    let dir = tempfile::tempdir().unwrap();
    let kv = MemoryKv::default();
    let (journal, _) = Journal::recover(dir.path(), Box::new(kv.clone()), 1000).unwrap();
    let entries = entries(20);
    journal.snapshot(&state_of(&entries)).unwrap();
    journal.append(&entries[..10]).unwrap();
    let error = Journal::recover(dir.path(), Box::new(kv), 1000).unwrap_err();
    assert!(error.to_string().contains("it ends at 10, before its snapshot's 20"), "{error}");

    let error = Journal::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("the log is missing"), "{error}");
    assert!(!dir.path().join("log").exists());
}
