//! What a manager left on disk in format 1, as bytes that are part of the source: later versions must read them.
//!
//! `SHOAL_WRITE_FIXTURE=1` writes them anew, which only a new format is a reason for.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_api::id::{NodeId, ServiceId, TaskId};

use crate::cluster::Cluster;
use crate::command::{Action, Command};
use crate::model::Lock;
use crate::raft::{Isolated, Manager, Replica, Settings, Storage};
use crate::store::Op;
use crate::store::folder::{self, Engine};
use crate::store::snapshot::{Snapshots as _, hex};
use crate::testing::{World, attachment, ingress_port, network, service};

const LOG: &str = "log.txt";
const SNAPSHOT: &str = "snapshot.json";
/// Any number will do: the snapshot itself knows.
const SNAPSHOT_INDEX: u64 = 7;

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/raft/tests/format1")
}

fn manager() -> Manager {
    Manager { node: NodeId::from("n1"), addr: "192.0.2.1:2377".parse().unwrap() }
}

async fn start(dir: &Path, is_new: bool) -> Cluster {
    let storage = if is_new { Storage::create(dir, Engine::Redb, 1) } else { Storage::open(dir) };
    let settings = Settings { snapshot_every: 8, keep: 2, ..Settings::product(&mut rand::rng()) };
    let replica = Replica::start(storage.unwrap(), settings, Arc::new(Isolated)).await.unwrap();
    if is_new {
        replica.found(manager()).await.unwrap();
    }
    let cluster = Cluster::over(replica);
    cluster.leadership().wait_for(|it| it.is_leader).await.unwrap();
    cluster
}

/// A world with a history, up to somewhat after a snapshot.
async fn write(dir: &Path) {
    let cluster = start(dir, true).await;
    let must = async |action| cluster.propose(Command { at_ns: 1, action }).await.unwrap();
    for command in World::new(&["n1", "n2"]).log {
        must(command.action).await;
    }
    must(Action::CreateNetwork { id: "net-app".into(), spec: network("app") }).await;
    let mut web = service("web", 3);
    web.endpoint.ports = vec![ingress_port(8080, 80)];
    web.task.networks = vec![attachment("net-app")];
    let spec = Box::new(web.clone());
    must(Action::CreateService { id: "svc-web".into(), spec }).await;
    let mut ids = 0;
    loop {
        let mut id = || {
            ids += 1;
            TaskId::from(format!("id{ids:05}"))
        };
        let steps = crate::orchestrator::reconcile(&cluster.state(), 2, &mut id).steps;
        if steps.is_empty() {
            break;
        }
        must(Action::Orchestrate { steps }).await;
    }
    let spec = Box::new(service("gone", 1));
    must(Action::CreateService { id: "svc-gone".into(), spec }).await;
    must(Action::RemoveService { id: "svc-gone".into() }).await;
    web.task.container.env = vec!["A=1".to_owned()];
    let version = cluster.state().services[&ServiceId::from("svc-web")].meta.version;
    must(Action::UpdateService { id: "svc-web".into(), version, spec: Box::new(web) }).await;
    cluster.shutdown().await;
}

/// Takes what is in a folder apart: the log's keys and values as hexadecimal digits, a pair a line, and the snapshot.
fn take_apart(dir: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    let folder = folder::open(dir, None).unwrap();
    let pairs = folder.log.range(Vec::new(), vec![0xff]).unwrap();
    let lines = pairs.iter().map(|(key, value)| format!("{} {}\n", hex(key), hex(value)));
    std::fs::write(to.join(LOG), lines.collect::<String>()).unwrap();
    std::fs::write(to.join(SNAPSHOT), folder.snapshots.load().unwrap().unwrap()).unwrap();
}

fn put_together(from: &Path, dir: &Path, engine: Engine) {
    let folder = folder::create(dir, engine, Lock::default()).unwrap();
    let log = std::fs::read_to_string(from.join(LOG)).unwrap();
    let unhex = |text: &str| {
        let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
        (0..text.len()).step_by(2).map(byte).collect::<Vec<u8>>()
    };
    let put = |line: &str| {
        let (key, value) = line.split_once(' ').unwrap();
        Op::Put(unhex(key), unhex(value))
    };
    folder.log.commit(log.lines().map(put).collect()).unwrap();
    let snapshot = std::fs::read(from.join(SNAPSHOT)).unwrap();
    folder.snapshots.save(SNAPSHOT_INDEX, &snapshot).unwrap();
}

#[tokio::test]
async fn what_format_1_left_opens_and_goes_on() {
    if std::env::var_os("SHOAL_WRITE_FIXTURE").is_some() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path()).await;
        take_apart(dir.path(), &source());
        return;
    }
    for engine in [Engine::Sled, Engine::Redb] {
        let dir = tempfile::tempdir().unwrap();
        put_together(&source(), dir.path(), engine);
        opens_and_goes_on(dir.path()).await;
    }
}

async fn opens_and_goes_on(dir: &Path) {
    let cluster = start(dir, false).await;
    let state = cluster.state();
    assert_eq!(cluster.managers()[0].manager, manager());
    let web = state.service_by_name("web").unwrap();
    assert_eq!(web.spec.task.container.env, ["A=1"]);
    assert_eq!(web.endpoint.vips.len(), 2);
    assert!(state.service_by_name("gone").is_none());
    assert_eq!(state.tasks.values().filter(|task| task.service_name == "web").count(), 3);
    let mut world = World::new(&[]);
    world.state = state.clone();
    world.check_invariants();
    let create = Action::CreateNetwork { id: "more".into(), spec: network("more") };
    assert!(cluster.propose(Command::now(create)).await.unwrap().index > state.index);
    cluster.shutdown().await;
}
