//! What a member finds again on its disk.

use std::path::Path;
use std::sync::Arc;

use openraft::storage::{RaftLogStorage as _, RaftLogStorageExt as _, RaftStateMachine as _};
use openraft::{CommittedLeaderId, EntryPayload, RaftLogReader as _, RaftSnapshotBuilder as _};

use super::platter::Platter;
use crate::apply::apply;
use crate::command::{Action, Command};
use crate::model::{Lock, State};
use crate::raft::log::{LogStore, Work};
use crate::raft::machine::{Contents, Machine};
use crate::raft::{Batch, Entry, LogId, Membership, Storage, Vote};
use crate::store::folder::Engine;
use crate::store::memory::{MemoryKv, MemorySnapshots};
use crate::store::snapshot::Snapshots as _;
use crate::store::{LogKv as _, Op, StoreError, folder};
use crate::testing::{World, copy_dir, genesis, network, service};

const ENGINES: [Engine; 2] = [Engine::Sled, Engine::Redb];

pub(super) fn log_id(index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(1, 1), index)
}

pub(super) fn entry(index: u64, action: Action) -> Entry {
    let commands = vec![Command { at_ns: index, action }];
    Entry {
        log_id: log_id(index),
        payload: EntryPayload::Normal(Batch { proposer: 1, number: index, commands }),
    }
}

/// Some entries from index 1 on, one of them far longer than the longest value.
pub(super) fn entries(count: u64) -> Vec<Entry> {
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

pub(super) fn state_of(entries: &[Entry]) -> State {
    let step = |state: State, entry: &Entry| match &entry.payload {
        EntryPayload::Normal(batch) => apply(&state, entry.log_id.index, &batch.commands[0]).unwrap().0,
        EntryPayload::Blank | EntryPayload::Membership(_) => state,
    };
    entries.iter().fold(State::empty(), step)
}

/// A member's parts, without raft.
struct Parts {
    log: LogStore,
    machine: Machine,
}

async fn parts(storage: Storage) -> Parts {
    let (machine, ..) = Machine::open(Arc::clone(&storage.log), storage.snapshots).await.unwrap();
    Parts { log: LogStore(storage.log), machine }
}

/// Recovers as raft does: the snapshot, and the entries after it.
async fn recovered(storage: Storage) -> Result<State, StoreError> {
    let (mut machine, states, _) = Machine::open(Arc::clone(&storage.log), storage.snapshots).await?;
    let (last, _) = machine.applied_state().await.unwrap();
    let next = last.map_or(1, |last| last.index + 1);
    let entries = storage.log.entries(next, u64::MAX)?;
    machine.apply(entries).await.unwrap();
    let state = states.borrow().clone();
    Ok(state)
}

#[tokio::test]
async fn a_crash_loses_nothing_that_was_appended() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let live = dir.path().join("live");
        let entries = entries(40);
        let mut log = LogStore(Storage::create(&live, engine, 1).unwrap().log);
        for (crash, batch) in entries.chunks(7).enumerate() {
            log.blocking_append(batch.to_vec()).await.unwrap();
            let copy = dir.path().join(format!("crash-{crash}"));
            copy_dir(&live, &copy);
            let appended = entries.len().min((crash + 1) * 7);
            let found = recovered(Storage::open(&copy).unwrap()).await.unwrap();
            assert_eq!(found, state_of(&entries[..appended]), "{engine:?}");
        }
    }
}

#[tokio::test]
async fn a_snapshot_takes_the_entries_place_and_more_follow() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let entries = entries(40);
        let Parts { mut log, mut machine } = parts(Storage::create(dir.path(), engine, 1).unwrap()).await;
        log.blocking_append(entries[..25].to_vec()).await.unwrap();
        machine.apply(entries[..20].to_vec()).await.unwrap();
        let made = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
        assert_eq!(made.meta.last_log_id, Some(log_id(20)));
        log.purge(log_id(20)).await.unwrap();
        assert_eq!(log.try_get_log_entries(0..100).await.unwrap().len(), 5);
        log.blocking_append(entries[25..].to_vec()).await.unwrap();
        drop((log, machine));
        let found = recovered(reopened(dir.path()).await).await.unwrap();
        assert_eq!(found, state_of(&entries), "{engine:?}");
    }
}

/// Opens a folder whose former user is just closing it.
async fn reopened(dir: &Path) -> Storage {
    for _ in 0..200 {
        match Storage::open(dir) {
            Ok(storage) => return storage,
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    }
    Storage::open(dir).unwrap()
}

#[tokio::test]
async fn a_world_with_history_survives() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(&["n1", "n2"]);
    let id = world.create_service(service("web", 4));
    while world.orchestrate().0 {}
    world.must(Action::RemoveService { id });
    while world.orchestrate().0 {}
    let entries: Vec<Entry> = (1..)
        .zip(&world.log)
        .map(|(index, command)| {
            let batch = Batch { proposer: 1, number: index, commands: vec![command.clone()] };
            Entry { log_id: log_id(index), payload: EntryPayload::Normal(batch) }
        })
        .collect();
    let mut log = LogStore(Storage::create(dir.path(), Engine::Redb, 1).unwrap().log);
    log.blocking_append(entries).await.unwrap();
    drop(log);
    assert_eq!(recovered(reopened(dir.path()).await).await.unwrap(), world.state);
}

#[tokio::test]
async fn a_batch_that_is_in_the_log_twice_takes_effect_once() {
    let Parts { machine: mut one, .. } = parts(Storage::in_memory(1).unwrap()).await;
    let mut entries = entries(5);
    let mut again = entries[4].clone();
    again.log_id = log_id(6);
    let mut late = entries[3].clone();
    late.log_id = log_id(7);
    entries.extend([again, late]);
    let answers = one.apply(entries).await.unwrap();
    assert_eq!(answers[5], answers[4]);
    assert_eq!(answers[6], crate::raft::Answer::Late);

    // Whoever starts from a snapshot knows it too.
    let made = one.get_snapshot_builder().await.build_snapshot().await.unwrap();
    let Parts { machine: mut other, .. } = parts(Storage::in_memory(2).unwrap()).await;
    other.install_snapshot(&made.meta, made.snapshot).await.unwrap();
    let mut again = self::entries(5)[4].clone();
    again.log_id = log_id(8);
    assert_eq!(other.apply([again]).await.unwrap()[0], answers[4]);
}

#[tokio::test]
async fn damage_is_named_not_guessed_over() {
    let kv = MemoryKv::default();
    let snapshots = MemorySnapshots::default();
    let open = || {
        let snapshots = Arc::new(snapshots.clone());
        Storage::check(Box::new(kv.clone()), snapshots, Path::new("log"), Work::Inline)
    };
    let error = open().unwrap_err();
    assert!(error.to_string().contains("nothing is in it"), "{error}");
    kv.commit(vec![
        Op::Put("F".into(), 1_u32.to_be_bytes().to_vec()),
        Op::Put("I".into(), 7_u64.to_be_bytes().to_vec()),
    ])
    .unwrap();
    let entries = entries(20);
    let mut log = LogStore(open().unwrap().log);
    log.blocking_append(entries[..4].to_vec()).await.unwrap();
    log.blocking_append(entries[5..10].to_vec()).await.unwrap();
    let error = recovered(open().unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("entry 5 is missing"), "{error}");

    let contents = Contents::new(Some(log_id(20)), Membership::default(), state_of(&entries));
    snapshots.save(20, &contents.encode().unwrap()).unwrap();
    let error = recovered(open().unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("it ends at 10, before its snapshot's 20"), "{error}");
    // Unless the snapshot came from another member.
    open().unwrap().log.receiving(20).unwrap();
    assert_eq!(recovered(open().unwrap()).await.unwrap(), state_of(&entries));
}

#[test]
fn another_format_is_refused_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let folder = folder::create(dir.path(), Engine::Redb, Lock::default()).unwrap();
    folder.log.commit(vec![Op::Put("F".into(), 6_u32.to_be_bytes().to_vec())]).unwrap();
    drop(folder);
    let error = Storage::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("has format 6, and this version of Shoal reads format 1"), "{error}");

    let error = Contents::decode(br#"{"format":6,"state":"in another shape"}"#).unwrap_err();
    assert!(matches!(error, StoreError::Format { format: 6, .. }), "{error}");
}

#[tokio::test]
async fn what_raft_builds_on_outlives_a_crash() {
    let disk = Platter::default();
    let mut log = LogStore(disk.open(1).unwrap().log);
    let (entries, vote) = (entries(5), Vote::new(3, 2));
    log.blocking_append(entries[..3].to_vec()).await.unwrap();
    disk.crash(0);
    let mut log = LogStore(disk.open(1).unwrap().log);
    assert_eq!(log.try_get_log_entries(1..10).await.unwrap(), entries[..3]);
    log.save_vote(&vote).await.unwrap();
    disk.crash(0);
    let mut log = LogStore(disk.open(1).unwrap().log);
    assert_eq!(log.read_vote().await.unwrap(), Some(vote));
    log.truncate(log_id(3)).await.unwrap();
    disk.crash(0);
    let mut log = LogStore(disk.open(1).unwrap().log);
    assert_eq!(log.try_get_log_entries(1..10).await.unwrap(), entries[..2]);
    // This much may be forgotten: the leader tells it again.
    log.save_committed(Some(log_id(2))).await.unwrap();
    disk.crash(0);
    assert_eq!(LogStore(disk.open(1).unwrap().log).read_committed().await.unwrap(), None);
}

#[tokio::test]
async fn a_vote_and_an_id_outlive_a_restart() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogStore(Storage::create(dir.path(), engine, 42).unwrap().log);
        log.save_vote(&Vote::new(3, 42)).await.unwrap();
        drop(log);
        let storage = reopened(dir.path()).await;
        assert_eq!((storage.id, storage.log.vote().unwrap()), (42, Some(Vote::new(3, 42))));
        assert!(storage.snapshots.load().unwrap().is_none());
    }
}

#[test]
fn what_is_not_known_to_be_decided_is_counted() {
    let (storage, entries) = (Storage::in_memory(7).unwrap(), entries(5));
    let contents = Contents::new(Some(log_id(2)), Membership::default(), state_of(&entries[..2]));
    storage.snapshots.save(2, &contents.encode().unwrap()).unwrap();
    storage.log.append(&entries).unwrap();
    for (committed, undecided) in [(None, 3), (Some(log_id(3)), 2), (Some(log_id(5)), 0)] {
        storage.log.save_committed(committed).unwrap();
        let read = storage.read().unwrap();
        assert!(read.state == state_of(&entries) && read.undecided == undecided, "{committed:?}");
    }
}

#[test]
fn what_was_noted_as_decided_and_is_not_in_the_log_says_nothing() {
    let log = Storage::in_memory(7).unwrap().log;
    let noted = |committed: LogId| {
        log.save_committed(Some(committed)).unwrap();
        log.committed().unwrap()
    };
    assert_eq!(noted(log_id(5)), None, "a snapshot was to come");
    log.append(&entries(5)).unwrap();
    let of_another_leader = LogId::new(CommittedLeaderId::new(2, 1), 4);
    assert_eq!([log_id(3), of_another_leader, log_id(6)].map(noted), [Some(log_id(3)), None, None]);
    log.purge(log_id(4)).unwrap();
    assert_eq!([log_id(3), log_id(5)].map(noted), [Some(log_id(3)), Some(log_id(5))]);
}
