//! The node's loop on real links and processes, with a dataplane that only takes notes.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Mutex;

use hickory_server::proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_server::proto::rr::{Name, RecordType};
use mesh_api::table::{EndpointMode, Role, ServiceRecord, TaskRecord, VipRecord};
use tempfile::TempDir;

use super::assign::tests::{table, task};
use super::*;
use crate::config::XdpMode;
use crate::dataplane::{DataplaneConfig, LocalEndpoint};
use crate::links::{HOST_ADDR, Links};
use crate::sys::testing::{KillTasks, in_netns, program, run, until};

/// What the fake was told, by the folder that it would pin to: each test has its own.
static NOTES: Mutex<BTreeMap<std::path::PathBuf, Notes>> = Mutex::new(BTreeMap::new());

#[derive(Debug, Clone, Default)]
struct Notes {
    opened: Vec<DataplaneConfig>,
    local: Option<Local>,
    attached: Vec<u32>,
    installed: bool,
}

struct Fake {
    pins: std::path::PathBuf,
}

impl Fake {
    fn note(&self, change: impl FnOnce(&mut Notes)) {
        change(NOTES.lock().unwrap().entry(self.pins.clone()).or_default());
    }
}

impl Plane for Fake {
    type Error = std::io::Error;

    fn open(config: DataplaneConfig) -> Result<Self, Self::Error> {
        let fake = Self { pins: config.pin_dir.clone() };
        fake.note(|notes| {
            notes.opened.push(config);
            notes.installed = true;
        });
        Ok(fake)
    }

    fn apply(&mut self, _: &Table, local: &Local) -> Result<(), Self::Error> {
        self.note(|notes| {
            let attached = |endpoint: &LocalEndpoint| notes.attached.contains(&endpoint.ifindex);
            assert!(
                local.endpoints.iter().all(attached),
                "endpoints are attached before they are in the maps"
            );
            notes.local = Some(local.clone());
        });
        Ok(())
    }

    fn attach_endpoint(&mut self, ifindex: u32) -> Result<(), Self::Error> {
        self.note(|notes| notes.attached.push(ifindex));
        Ok(())
    }

    fn detach_endpoint(&mut self, ifindex: u32) {
        self.note(|notes| notes.attached.retain(|attached| *attached != ifindex));
    }

    fn mode(&self) -> &'static str {
        "fake"
    }

    fn uninstall(self) -> Result<(), Vec<Self::Error>> {
        Self::clear_away(&self.pins)
    }

    fn clear_away(pin_dir: &Path) -> Result<(), Vec<Self::Error>> {
        Self { pins: pin_dir.to_owned() }.note(|notes| notes.installed = false);
        Ok(())
    }
}

/// A host with an uplink, and what a session would hold.
struct Host {
    // Dropped before the folder that it looks into.
    _tasks: KillTasks,
    folder: TempDir,
    tables: watch::Sender<Option<Arc<Table>>>,
    settled: watch::Sender<u64>,
    applied: watch::Sender<Option<u64>>,
    statuses: watch::Sender<Statuses>,
}

impl Host {
    fn new(table: Table) -> Self {
        run("ip link set lo up");
        run("ip link add up0 type veth peer name up1");
        run("ip address add 192.0.2.1/24 dev up0");
        run("ip link set up0 up");
        run("ip link set up1 up");
        let folder = tempfile::tempdir().unwrap();
        Self {
            _tasks: KillTasks(folder.path().join("tasks")),
            folder,
            tables: watch::channel(Some(Arc::new(table))).0,
            settled: watch::channel(0).0,
            applied: watch::channel(None).0,
            statuses: watch::channel(Statuses::new()).0,
        }
    }

    fn config(&self) -> Config {
        Config {
            state_dir: self.folder.path().to_owned(),
            run_dir: self.folder.path().to_owned(),
            bpffs: self.folder.path().join("bpf"),
            hostname: "here".to_owned(),
            xdp: XdpMode::Off,
            uplinks: Vec::new(),
            flows_max: 1024,
        }
    }

    async fn start(&self) -> Result<Node, NodeError> {
        let (node, came_up) = self.try_start().await;
        came_up.map(|()| node)
    }

    async fn try_start(&self) -> (Node, Result<(), NodeError>) {
        let vtep = Ipv4Addr::new(192, 0, 2, 1);
        let membership = Membership {
            cluster_id: "c".into(),
            node_id: "here".into(),
            role: Role::Worker,
            advertise: vtep,
            data_path: vtep,
            remotes: Vec::new(),
        };
        let inputs = NodeInputs {
            config: self.config(),
            membership,
            runtime: Runtime::new(self.folder.path().join("tasks"), program()),
            describe: Describe::new("here".to_owned()),
            tables: self.tables.subscribe(),
            settled: self.settled.subscribe(),
            applied: self.applied.clone(),
            statuses: self.statuses.clone(),
        };
        let (node, ready) = Node::start::<Fake>(inputs);
        (node, ready.await.unwrap())
    }

    fn notes(&self) -> Notes {
        NOTES.lock().unwrap().get(&self.folder.path().join("bpf")).cloned().unwrap_or_default()
    }

    fn change(&self, change: impl FnOnce(&mut Table)) {
        self.tables.send_modify(|table| {
            let table = Arc::make_mut(table.as_mut().unwrap());
            table.index += 1;
            change(table);
        });
    }

    fn status(&self, id: &str) -> Option<TaskStatus> {
        self.statuses.borrow().get(&TaskId::from(id)).cloned()
    }

    async fn reaches(&self, id: &str, state: TaskState) -> TaskStatus {
        let what = format!("{id} is {state:?}");
        until(&what, || self.status(id).is_some_and(|status| status.state == state)).await;
        self.status(id).unwrap()
    }
}

const T1: &str = "t1aaaaaaaaaaaaaaaaaaaaaaa";
const T2: &str = "t2aaaaaaaaaaaaaaaaaaaaaaa";
const T3: &str = "t3aaaaaaaaaaaaaaaaaaaaaaa";

fn with(tasks: impl IntoIterator<Item = TaskRecord>) -> Table {
    let mut table = table();
    table.tasks.extend(tasks.into_iter().map(|task| (task.id.clone(), task)));
    table
}

fn links() -> String {
    run("ip -o link")
}

#[test]
fn a_task_is_started_drained_stopped_and_forgotten() {
    in_netns(|| async {
        let host = Host::new(with([task(T1, "shoal/whoami", &[], &["ingress", "front"])]));
        let node = host.start().await.unwrap();
        let status = host.reaches(T1, TaskState::Running).await;
        let pid = status.pid.unwrap();
        assert!(Path::new(&format!("/proc/{pid}")).exists());

        let local = host.notes().local.unwrap();
        let aliases: Vec<_> = local.endpoints.iter().map(|endpoint| endpoint.alias).collect();
        assert_eq!(aliases, [Ipv4Addr::new(169, 254, 64, 2), Ipv4Addr::new(169, 254, 64, 3)]);
        assert_eq!(local.addresses, [Ipv4Addr::new(192, 0, 2, 1)]);
        let inside = run(&format!("nsenter --net=/proc/{pid}/ns/net ip -o address"));
        assert!(inside.contains("10.0.0.5/24") && inside.contains("10.0.1.5/24"), "{inside}");
        let routes = run(&format!("nsenter --net=/proc/{pid}/ns/net ip route"));
        assert!(routes.contains("default via 10.0.0.1 dev eth0"), "{routes}");
        let link = run(&format!("nsenter --net=/proc/{pid}/ns/net ip link show eth1"));
        assert!(link.contains("mtu 1450") && link.contains("02:42:0a:00:01:05"), "{link}");

        host.change(|table| {
            let record = table.tasks.get_mut(&TaskId::from(T1)).unwrap();
            (record.desired, record.observed) = (TaskState::Shutdown, TaskState::Running);
        });
        until("the drain is applied", || *host.applied.borrow() == Some(1)).await;
        assert_eq!(host.notes().local.unwrap().endpoints.len(), 2, "its flows are still delivered");
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(host.status(T1).unwrap().state, TaskState::Running, "it waits for the cluster");
        host.settled.send_replace(1);
        let status = host.reaches(T1, TaskState::Shutdown).await;
        assert_eq!(status.exit_code, Some(0));
        until("its endpoints are gone", || host.notes().local.unwrap().endpoints.is_empty()).await;
        assert!(host.notes().attached.is_empty());
        assert!(!links().contains("sht1"));

        host.change(|table| table.tasks.clear());
        until("it is forgotten", || host.status(T1).is_none()).await;
        assert!(!host.folder.path().join("tasks").join(T1).exists());
        assert!(node.tear_down().await.is_empty());
    });
}

#[test]
fn ends_that_nobody_asked_for_are_reported_with_their_reasons() {
    in_netns(|| async {
        let host = Host::new(with([
            task(T1, "shoal/exec", &["sleep", "1000"], &["front"]),
            task(T2, "nginx:latest", &[], &["front"]),
            task(T3, "shoal/exec", &["no-such-program"], &["front"]),
            task("t4", "shoal/exec", &["true"], &[]),
        ]));
        let node = host.start().await.unwrap();
        let pid = host.reaches(T1, TaskState::Running).await.pid.unwrap();
        run(&format!("kill -9 {pid}"));
        let status = host.reaches(T1, TaskState::Failed).await;
        assert_eq!((status.exit_code, status.err.as_str()), (Some(137), "task: non-zero exit (137)"));
        assert!(host.reaches(T2, TaskState::Rejected).await.err.starts_with("No such image: nginx:latest"));
        let status = host.reaches(T3, TaskState::Failed).await;
        assert!(status.err.contains("no-such-program"), "{}", status.err);
        assert_eq!(status.exit_code, Some(127));
        assert_eq!(host.reaches("t4", TaskState::Complete).await.exit_code, Some(0));
        until("no links are left", || !links().contains(": sht")).await;
        assert!(node.tear_down().await.is_empty());
    });
}

#[test]
fn an_agent_that_comes_back_finds_its_tasks_and_clears_away_what_is_nobodys() {
    in_netns(|| async {
        let endless = ["sleep", "1000"];
        let host = Host::new(with([
            task(T1, "shoal/exec", &endless, &["front"]),
            task(T2, "shoal/exec", &endless, &["front"]),
        ]));
        let node = host.start().await.unwrap();
        let pid = host.reaches(T1, TaskState::Running).await.pid;
        let dies = host.reaches(T2, TaskState::Running).await.pid.unwrap();
        let before = host.notes().local.unwrap();
        drop(node);
        run(&format!("kill -9 {dies}"));
        run("ip link add sh0000000000x type veth peer name stray");
        host.statuses.send_replace(Statuses::new());

        let node = host.start().await.unwrap();
        assert_eq!(host.reaches(T1, TaskState::Running).await.pid, pid);
        assert_eq!(host.reaches(T2, TaskState::Failed).await.exit_code, Some(137));
        let after = host.notes().local.unwrap();
        let kept = before.endpoints.iter().find(|endpoint| endpoint.task.as_str() == T1).unwrap();
        assert_eq!(after.endpoints, std::slice::from_ref(kept));
        until("the stray link is gone", || !links().contains("sh0000000000x")).await;

        // A task without its network is of no use.
        run("ip link del sht1aaaaaaaa0");
        let status = host.reaches(T1, TaskState::Failed).await;
        assert!(status.err.contains("link was removed"), "{}", status.err);
        assert!(node.tear_down().await.is_empty());
    });
}

#[test]
fn devices_are_repaired_follow_the_uplink_and_are_gone_after_a_tear_down() {
    in_netns(|| async {
        let host = Host::new(with([task(T1, "shoal/exec", &["sleep", "1000"], &["front"])]));
        let before = (links(), run("nft list tables"));
        let node = host.start().await.unwrap();
        let pid = host.reaches(T1, TaskState::Running).await.pid.unwrap();
        for name in ["shoal-vxlan", "shoal0@shoal0p", "shoal0p@shoal0"] {
            assert!(links().contains(name), "{name}");
        }
        assert!(run("ip -d link show shoal-vxlan").contains("external"));
        assert!(run("ip -d link show shoal-vxlan").contains("dstport 4789"));
        assert!(run("ip address show shoal0").contains("169.254.64.1/18"));
        assert!(run("nft list table ip shoal").contains("masquerade"));
        let opened = host.notes().opened.len();

        run("ip link set up0 mtu 1400");
        until("the dataplane knows the uplink's MTU", || {
            host.notes().opened.last().is_some_and(|config| config.uplinks[0].mtu == 1400)
        })
        .await;
        until("the task's link follows", || {
            run(&format!("nsenter --net=/proc/{pid}/ns/net ip link show eth0")).contains("mtu 1350")
        })
        .await;
        run("ip link del shoal0");
        run("ip link del shoal-vxlan");
        until("the devices are back", || {
            host.notes().opened.len() >= opened + 2
                && links().contains("shoal-vxlan")
                && run("ip address show").contains("169.254.64.1/18")
        })
        .await;
        run("nft flush ruleset");
        until("the rules are back", || run("nft list ruleset").contains("masquerade")).await;
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        until("the host forwards", || {
            std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim() == "1"
        })
        .await;
        run("ip address add 192.0.2.77/24 dev up0");
        until("the address counts as the node's", || {
            host.notes().local.unwrap().addresses.contains(&Ipv4Addr::new(192, 0, 2, 77))
        })
        .await;

        assert!(node.tear_down().await.is_empty());
        assert!(!host.notes().installed);
        let shape = |links: String| links.lines().count();
        assert_eq!((shape(links()), run("nft list tables")), (shape(before.0), before.1));
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        // Again, where nothing is left.
        assert!(Links::open().unwrap().remove_node_devices().await.is_empty());
    });
}

#[test]
fn a_node_that_does_not_come_up_is_torn_down_at_once_with_what_an_earlier_run_left() {
    in_netns(|| async {
        let host = Host::new(with([task(T1, "shoal/exec", &["sleep", "1000"], &["front"])]));
        let before = (links().lines().count(), run("nft list tables"));
        let node = host.start().await.unwrap();
        let pid = host.reaches(T1, TaskState::Running).await.pid.unwrap();
        drop(node);
        until("its name server is gone", || UdpSocket::bind((HOST_ADDR, 53)).is_ok()).await;
        let _taken = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53)).unwrap();
        let (node, came_up) = host.try_start().await;
        assert!(matches!(came_up, Err(NodeError::Dns(_))), "{came_up:?}");
        assert!(host.notes().installed);

        let started = Instant::now();
        assert_eq!(node.tear_down().await, Vec::<String>::new());
        assert!(started.elapsed() < RETRY, "it did not wait for the next attempt");
        assert!(!host.notes().installed);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        // The kernel takes the task's link down in its own time.
        until("no link is left", || links().lines().count() == before.0).await;
        assert_eq!(run("nft list tables"), before.1);
        assert_eq!(std::fs::read_dir(host.folder.path().join("tasks")).unwrap().count(), 0);
    });
}

#[test]
fn a_task_that_is_stopped_while_it_waits_for_its_turn_never_runs() {
    in_netns(|| async {
        let ids: Vec<_> = (0..24).map(|number| format!("q{number:02}aaaaaaaaaaaaaaaaaaaaaa")).collect();
        let host = Host::new(with(ids.iter().map(|id| task(id, "shoal/exec", &["sleep", "1000"], &[]))));
        let node = host.start().await.unwrap();
        until("all are accepted", || ids.iter().all(|id| host.status(id).is_some())).await;
        let errors = node.tear_down().await;
        assert_eq!(errors, Vec::<String>::new());
        let ends: Vec<_> = ids.iter().map(|id| host.status(id).unwrap()).collect();
        assert!(ends.iter().all(|end| end.state == TaskState::Shutdown), "{ends:?}");
        assert!(ends.iter().any(|end| end.exit_code.is_none()), "the last ones were never started");
    });
}

#[test]
fn a_host_without_the_address_or_the_uplink_says_so() {
    in_netns(|| async {
        let host = Host::new(table());
        run("ip address del 192.0.2.1/24 dev up0");
        let error = host.start().await.unwrap_err();
        assert!(error.to_string().contains("192.0.2.1"), "{error}");
    });
}

/// Asks the node's name server from an alias, as the dataplane would make it look, and returns code and addresses.
fn ask(alias: Ipv4Addr, name: &str, record_type: RecordType) -> (ResponseCode, Vec<String>) {
    let socket = UdpSocket::bind((alias, 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut question = Message::new(7, MessageType::Query, OpCode::Query);
    question.add_query(Query::query(Name::from_ascii(name).unwrap(), record_type));
    socket.send_to(&question.to_vec().unwrap(), SocketAddr::from((HOST_ADDR, 53))).unwrap();
    let mut buffer = [0; 512];
    let len = socket.recv(&mut buffer).unwrap();
    let answer = Message::from_vec(&buffer[..len]).unwrap();
    let records = answer.answers.iter().map(|record| record.data.to_string());
    (answer.metadata.response_code, records.collect())
}

#[test]
fn tasks_ask_for_names_by_their_aliases() {
    in_netns(|| async {
        let mut table = with([task(T1, "shoal/exec", &["sleep", "1000"], &["front"])]);
        let vip = VipRecord { network: "front".into(), addr: Some([10, 0, 1, 2].into()), aliases: vec![] };
        let name = "db".to_owned();
        let service = ServiceRecord {
            id: "db".into(),
            name,
            endpoint_mode: EndpointMode::Vip,
            vips: vec![vip],
            ports: vec![],
        };
        table.services.insert(service.id.clone(), service);
        let host = Host::new(table);
        let node = host.start().await.unwrap();
        host.reaches(T1, TaskState::Running).await;
        // The alias is a host's address here, since no BPF program translates.
        run("ip address add 169.254.64.2/32 dev lo");
        let alias = Ipv4Addr::new(169, 254, 64, 2);
        let asked = tokio::task::spawn_blocking(move || {
            [
                ask(alias, "DB.", RecordType::A),
                ask(alias, "db.", RecordType::AAAA),
                ask(alias, "tasks.nobody.", RecordType::A),
                ask(alias, "2.1.0.10.in-addr.arpa.", RecordType::PTR),
                ask(HOST_ADDR, "db.", RecordType::A),
            ]
        });
        let expected = [
            (ResponseCode::NoError, vec!["10.0.1.2".to_owned()]),
            (ResponseCode::NoError, vec![]),
            (ResponseCode::NXDomain, vec![]),
            (ResponseCode::NoError, vec!["db.".to_owned()]),
            (ResponseCode::Refused, vec![]),
        ];
        assert_eq!(asked.await.unwrap(), expected);
        assert!(node.tear_down().await.is_empty());
    });
}
