//! The node's loop on real links and processes, with a dataplane that only takes notes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Mutex;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use mesh_api::health::UplinkHealth;
use mesh_api::table::{BalancingRecord, EndpointMode, Role, ServiceRecord, TaskRecord, VipRecord};
use tempfile::TempDir;

use super::assign::tests::{table, task};
use super::plan::DRAIN_MIN;
use super::*;
use crate::config::XdpMode;
use crate::dataplane::{DataplaneConfig, LocalEndpoint};
use crate::links::{HOST_ADDR, Links};
use crate::sys::testing::{KillTasks, in_netns, program, run, until};

mod absent;
mod attach;
mod egress;
mod encryption;
mod networks;
mod silent;

/// What the fake was told, by the folder that it would pin to: each test has its own.
static NOTES: Mutex<BTreeMap<std::path::PathBuf, Notes>> = Mutex::new(BTreeMap::new());

#[derive(Debug, Clone, Default)]
struct Notes {
    /// How often it was opened, and for which interfaces it was then, or attached since.
    opened: usize,
    configs: Vec<DataplaneConfig>,
    local: Option<Local>,
    touched: Vec<Touched>,
    attached: Vec<u32>,
    installed: bool,
    nacks: Option<mpsc::Sender<AttachmentKey>>,
    /// It can't follow the table.
    is_stuck: bool,
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
            notes.opened += 1;
            notes.configs.push(config);
            notes.installed = true;
        });
        Ok(fake)
    }

    fn reattach(&mut self, config: DataplaneConfig) -> Result<(), Self::Error> {
        self.note(|notes| notes.configs.push(config));
        Ok(())
    }

    fn change(&mut self, _: &Table, touched: &Touched, local: &Local) -> Result<(), Self::Error> {
        self.note(|notes| {
            let attached = |endpoint: &LocalEndpoint| notes.attached.contains(&endpoint.ifindex);
            assert!(
                local.endpoints.iter().all(attached),
                "endpoints are attached before they are in the maps"
            );
            notes.local = Some(local.clone());
            notes.touched.push(touched.clone());
        });
        let mut is_stuck = false;
        self.note(|notes| is_stuck = notes.is_stuck);
        if is_stuck { Err(std::io::Error::other("stuck")) } else { Ok(()) }
    }

    fn attach_endpoint(&mut self, ifindex: u32) -> Result<(), Self::Error> {
        self.note(|notes| notes.attached.push(ifindex));
        Ok(())
    }

    fn detach_endpoint(&mut self, ifindex: u32) {
        self.note(|notes| notes.attached.retain(|attached| *attached != ifindex));
    }

    fn nacks(&self) -> Result<mpsc::Receiver<AttachmentKey>, Self::Error> {
        let (sender, receiver) = mpsc::channel(8);
        self.note(|notes| notes.nacks = Some(sender));
        Ok(receiver)
    }

    fn modes(&self) -> Vec<(String, &'static str)> {
        vec![("up0".to_owned(), "fake")]
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
    touched: Arc<Mutex<Touched>>,
    settled: watch::Sender<u64>,
    applied: watch::Sender<Option<u64>>,
    statuses: watch::Sender<Statuses>,
    describe: Describe,
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
            touched: Arc::default(),
            settled: watch::channel(0).0,
            applied: watch::channel(None).0,
            statuses: watch::channel(Statuses::new()).0,
            describe: Describe::new("here".to_owned()),
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
            key_rotation: crate::KEY_ROTATION,
            health: crate::health::Health::default(),
        }
    }

    async fn start(&self) -> Result<Node, NodeError> {
        // A node that was dropped ends a little later.
        let is_taken = |error: &std::io::Error| error.kind() == std::io::ErrorKind::AddrInUse;
        until("no name server is left", || !UdpSocket::bind((HOST_ADDR, 53)).as_ref().is_err_and(is_taken))
            .await;
        let (node, came_up) = self.try_start().await;
        came_up.map(|()| node)
    }

    async fn try_start(&self) -> (Node, Result<(), NodeError>) {
        self.start_at(UPLINK, Duration::ZERO).await
    }

    /// Starts a node that advertises `advertise`, and waits for its uplinks.
    async fn start_at(&self, advertise: IpAddr, patience: Duration) -> (Node, Result<(), NodeError>) {
        let membership = Membership {
            cluster_id: "c".into(),
            node_id: "here".into(),
            role: Role::Worker,
            advertise,
            data_path: UPLINK,
            remotes: Vec::new(),
        };
        let inputs = NodeInputs {
            config: self.config(),
            membership,
            runtime: Runtime::new(self.folder.path().join("tasks"), program()),
            describe: self.describe.clone(),
            tables: self.tables.subscribe(),
            touched: Arc::clone(&self.touched),
            settled: self.settled.subscribe(),
            applied: self.applied.clone(),
            statuses: self.statuses.clone(),
            patience,
        };
        let (node, ready) = Node::start::<Fake>(inputs);
        (node, ready.await.unwrap())
    }

    fn notes(&self) -> Notes {
        NOTES.lock().unwrap().get(&self.folder.path().join("bpf")).cloned().unwrap_or_default()
    }

    /// Has the dataplane follow the table no longer, or again.
    fn stick(&self, is_stuck: bool) {
        let mut notes = NOTES.lock().unwrap();
        notes.get_mut(&self.folder.path().join("bpf")).unwrap().is_stuck = is_stuck;
    }

    fn change(&self, change: impl FnOnce(&mut Table)) {
        self.tables.send_modify(|table| {
            let table = Arc::make_mut(table.as_mut().unwrap());
            let before = table.clone();
            table.index += 1;
            change(table);
            let mut touched = self.touched.lock().unwrap();
            // Of the rest of tables, the tests change the tasks alone.
            if before.networks != table.networks {
                *touched = Touched::all();
            }
            for task in before.tasks.values().chain(table.tasks.values()) {
                if before.tasks.get(&task.id) != table.tasks.get(&task.id) {
                    touched.note_task(task);
                }
            }
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

const UPLINK: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const T1: &str = "t1aaaaaaaaaaaaaaaaaaaaaaa";
const T2: &str = "t2aaaaaaaaaaaaaaaaaaaaaaa";
const T3: &str = "t3aaaaaaaaaaaaaaaaaaaaaaa";

fn with(tasks: impl IntoIterator<Item = TaskRecord>) -> Table {
    let mut table = table();
    table.tasks.extend(tasks.into_iter().map(|task| (task.id.clone(), task)));
    table
}

fn sysctl(name: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap().trim().to_owned()
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
        assert_eq!(aliases, [Ipv4Addr::new(169, 254, 64, 3), Ipv4Addr::new(169, 254, 64, 4)]);
        assert_eq!(local.addresses, [UPLINK]);
        let inside = run(&format!("nsenter --net=/proc/{pid}/ns/net ip -o address"));
        assert!(inside.contains("10.0.0.5/24") && inside.contains("10.0.1.5/24"), "{inside}");
        let routes = run(&format!("nsenter --net=/proc/{pid}/ns/net ip route"));
        assert!(routes.contains("default via 10.0.0.1 dev eth0"), "{routes}");
        // `front` has no IPv6, and what has some has the addresses that it was given alone.
        let inside = run(&format!("nsenter --net=/proc/{pid}/ns/net ip -6 -o address show scope global"));
        assert!(inside.contains("eth0    inet6 fd00:1::a00:5/64"), "{inside}");
        assert_eq!(inside.lines().count(), 1, "{inside}");
        assert!(!inside.contains("tentative"), "{inside}");
        let local = run(&format!("nsenter --net=/proc/{pid}/ns/net ip -6 -o address show scope link"));
        assert_eq!(local, "");
        let routes = run(&format!("nsenter --net=/proc/{pid}/ns/net ip -6 route"));
        assert!(routes.contains("default via fd00:1::1 dev eth0"), "{routes}");
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
        let holders = || Arc::strong_count(host.tables.borrow().as_ref().unwrap());
        until("nobody keeps the table, which a change would copy", || holders() == 1).await;
        assert!(!host.folder.path().join("tasks").join(T1).exists());
        assert!(node.tear_down().await.is_empty());
    });
}

#[test]
fn a_task_goes_on_until_its_own_node_sends_it_no_flows_whatever_the_others_have_settled_on() {
    in_netns(|| async {
        let host = Host::new(with([task(T1, "shoal/exec", &["sleep", "1000"], &["front"])]));
        let node = host.start().await.unwrap();
        host.reaches(T1, TaskState::Running).await;
        // They had given this node up, and gone on.
        host.settled.send_replace(99);
        host.stick(true);
        host.change(|table| {
            let record = table.tasks.get_mut(&TaskId::from(T1)).unwrap();
            (record.desired, record.observed) = (TaskState::Shutdown, TaskState::Running);
        });
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(host.status(T1).unwrap().state, TaskState::Running, "its own node may send it flows");
        let unstuck = Instant::now();
        host.stick(false);
        host.change(|_| ());
        host.reaches(T1, TaskState::Shutdown).await;
        let waited = unstuck.elapsed();
        assert!(waited >= DRAIN_MIN, "what it was sent just before is still on its way: {waited:?}");
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
        assert!(run("ip -d link show shoal-vxlan").contains(" udp6zerocsumrx"));
        let addresses = run("ip -o address show shoal0");
        assert!(
            ["169.254.64.1/18", "fd73:686f:616c:1::1/64", "fe80::1/64"]
                .iter()
                .all(|addr| addresses.contains(addr)),
            "{addresses}"
        );
        assert_eq!(addresses.lines().count(), 3, "{addresses}");
        assert!(!addresses.contains("tentative"), "{addresses}");
        for family in ["ip", "ip6"] {
            assert!(run(&format!("nft list table {family} shoal")).contains("masquerade"));
        }
        assert_eq!(sysctl("ipv6/conf/all/forwarding"), "1");
        assert_eq!(
            sysctl("ipv6/conf/up0/accept_ra"),
            "2",
            "the host keeps the routes that it has from routers"
        );
        assert_eq!(host.describe.describe(UPLINK, UPLINK).dataplane, "up0=fake");
        let told = host.describe.health().watch();
        let uplink = |mtu| UplinkHealth { name: "up0".to_owned(), mode: "fake".to_owned(), mtu };
        assert_eq!(told.borrow().uplinks, [uplink(1500)]);
        let attached = host.notes().configs.len();

        run("ip link set up0 mtu 1400");
        until("the dataplane knows the uplink's MTU", || {
            host.notes().configs.last().is_some_and(|config| config.uplinks[0].mtu == 1400)
        })
        .await;
        until("so do the managers", || told.borrow().uplinks == [uplink(1400)]).await;
        until("the task's link follows", || {
            run(&format!("nsenter --net=/proc/{pid}/ns/net ip link show eth0")).contains("mtu 1350")
        })
        .await;
        run("ip link del shoal0");
        run("ip link del shoal-vxlan");
        until("the devices are back", || {
            host.notes().configs.len() >= attached + 2
                && links().contains("shoal-vxlan")
                && run("ip address show").contains("169.254.64.1/18")
        })
        .await;
        assert_eq!(host.notes().opened, 1, "the programs are loaded once");
        for flushed in ["nft flush ruleset", "nft delete table ip6 shoal"] {
            run(flushed);
            until("the rules are back", || run("nft list ruleset").matches("masquerade").count() == 2).await;
        }
        for forwards in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{forwards}"), "0").unwrap();
            until("the host forwards", || sysctl(forwards) == "1").await;
        }
        for addr in ["fd73:686f:616c:1::1/64", "fe80::1/64"] {
            run(&format!("ip address del {addr} dev shoal0"));
            until("shoal0 has its IPv6 addresses", || run("ip address show shoal0").contains(addr)).await;
        }
        for addr in ["192.0.2.77/24", "2001:db8::77/64"] {
            run(&format!("ip address add {addr} dev up0"));
            let addr: ipnet::IpNet = addr.parse().unwrap();
            until("the address counts as the node's", || {
                host.notes().local.unwrap().addresses.contains(&addr.addr())
            })
            .await;
        }

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

#[test]
fn a_task_that_is_placed_here_later_is_started_and_one_that_is_placed_elsewhere_is_not() {
    in_netns(|| async {
        let host = Host::new(table());
        let node = host.start().await.unwrap();
        let elsewhere = TaskRecord { node: "there".into(), ..task(T2, "shoal/exec", &["true"], &[]) };
        host.change(|table| drop(table.tasks.insert(T2.into(), elsewhere)));
        host.change(|table| {
            table.tasks.insert(T1.into(), task(T1, "shoal/exec", &["sleep", "1000"], &["front"]));
        });
        host.reaches(T1, TaskState::Running).await;
        assert!(host.status(T2).is_none());
        assert!(node.tear_down().await.is_empty());
    });
}

#[test]
fn ipv6_goes_with_an_mtu_that_is_too_small_for_it_and_comes_back_with_a_larger_one() {
    in_netns(|| async {
        let host = Host::new(with([task(T1, "shoal/exec", &["sleep", "1000"], &["ingress"])]));
        let node = host.start().await.unwrap();
        let pid = host.reaches(T1, TaskState::Running).await.pid.unwrap();
        let has_ipv6 = || {
            let inside = run(&format!("nsenter --net=/proc/{pid}/ns/net ip -6 address show eth0"));
            let route = run(&format!("nsenter --net=/proc/{pid}/ns/net ip -6 route show default"));
            let host = run("ip -6 address show shoal0");
            let all = [inside.contains("fd00:1::a00:5"), !route.is_empty(), host.contains("fd73:")];
            assert_eq!(
                run(&format!("nsenter --net=/proc/{pid}/ns/net ip route show default")).lines().count(),
                1
            );
            all
        };
        assert_eq!(has_ipv6(), [true; 3]);
        run("ip link set up0 mtu 1300");
        until("IPv6 is gone", || has_ipv6() == [false; 3]).await;
        run("ip link set up0 mtu 1330");
        until("the node is right at that MTU", || {
            run(&format!("nsenter --net=/proc/{pid}/ns/net ip link show eth0")).contains("mtu 1280")
        })
        .await;
        until("IPv6 is back", || has_ipv6() == [true; 3]).await;
        assert!(node.tear_down().await.is_empty());
    });
}

#[test]
fn a_node_waits_for_its_uplinks_address_and_attaches_to_the_one_it_advertises_as_well() {
    in_netns(|| async {
        let host = Host::new(table());
        run("ip address del 192.0.2.1/24 dev up0");
        run("ip link add other0 type veth peer name other1");
        run("ip address add 198.51.100.1/24 dev other0");
        run("ip link set other0 up");
        let starting = host.start_at("198.51.100.1".parse().unwrap(), Duration::from_mins(1));
        let appears = async {
            tokio::time::sleep(Duration::from_millis(700)).await;
            assert_eq!(host.notes().opened, 0, "it waits");
            run("ip address add 192.0.2.1/24 dev up0");
        };
        let ((node, came_up), ()) = tokio::join!(starting, appears);
        came_up.unwrap();
        let config = host.notes().configs.pop().unwrap();
        let mut uplinks: Vec<_> = config.uplinks.iter().map(|uplink| uplink.name.as_str()).collect();
        uplinks.sort_unstable();
        assert_eq!(uplinks, ["other0", "up0"]);

        // An address that is gone for a while takes no uplink with it.
        run("ip address del 198.51.100.1/24 dev other0");
        until("the address is no longer the node's", || host.notes().local.unwrap().addresses == [UPLINK])
            .await;
        assert_eq!(host.notes().configs.len(), 1);
        assert!(node.tear_down().await.is_empty());
    });
}

#[test]
fn an_alias_that_an_earlier_version_gave_out_is_replaced() {
    in_netns(|| async {
        let host = Host::new(with([task(T1, "shoal/exec", &["sleep", "1000"], &["front", "back"])]));
        let node = host.start().await.unwrap();
        host.reaches(T1, TaskState::Running).await;
        drop(node);
        let path = host.folder.path().join("tasks").join(T1).join("task.json");
        let file = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, file.replace("169.254.64.3", "169.254.64.2")).unwrap();

        let node = host.start().await.unwrap();
        let endpoints = host.notes().local.unwrap().endpoints;
        let aliases: Vec<_> = endpoints.iter().map(|endpoint| endpoint.alias).collect();
        assert_eq!(aliases, [Ipv4Addr::new(169, 254, 64, 5), Ipv4Addr::new(169, 254, 64, 4)]);
        assert!(node.tear_down().await.is_empty());
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

/// An IPv6 address as names of reverse lookups have it.
fn nibbles(addr: &str) -> String {
    let addr: std::net::Ipv6Addr = addr.parse().unwrap();
    let digits = format!("{:032x}", addr.to_bits());
    digits.chars().rev().map(String::from).collect::<Vec<_>>().join(".")
}

#[test]
fn tasks_ask_for_names_by_their_aliases() {
    in_netns(|| async {
        let mut table = with([task(T1, "shoal/exec", &["sleep", "1000"], &["front", "back"])]);
        let vip = VipRecord { network: "front".into(), addr: Some([10, 0, 1, 2].into()), aliases: vec![] };
        let name = "db".to_owned();
        let service = ServiceRecord {
            id: "db".into(),
            name,
            stack: "".into(),
            endpoint_mode: EndpointMode::Vip,
            vips: vec![vip],
            ports: vec![],
            balancing: BalancingRecord::default(),
        };
        table.services.insert(service.id.clone(), service);
        table.tasks.values_mut().for_each(|task| task.observed = TaskState::Running);
        let host = Host::new(table);
        let node = host.start().await.unwrap();
        host.reaches(T1, TaskState::Running).await;
        // The alias is a host's address here, since no BPF program translates.
        run("ip address add 169.254.64.3/32 dev lo");
        let alias = Ipv4Addr::new(169, 254, 64, 3);
        let asked = tokio::task::spawn_blocking(move || {
            [
                ask(alias, "DB.", RecordType::A),
                ask(alias, "db.", RecordType::AAAA),
                ask(alias, "t1aaaaaaaaaa.", RecordType::AAAA),
                ask(alias, &format!("{}.ip6.arpa.", nibbles("fd00:3::a00:205")), RecordType::PTR),
                ask(alias, "tasks.nobody.", RecordType::A),
                ask(alias, "2.1.0.10.in-addr.arpa.", RecordType::PTR),
                ask(HOST_ADDR, "db.", RecordType::A),
            ]
        });
        let expected = [
            (ResponseCode::NoError, vec!["10.0.1.2".to_owned()]),
            (ResponseCode::NoError, vec![]),
            (ResponseCode::NoError, vec!["fd00:3::a00:205".to_owned()]),
            (ResponseCode::NoError, vec![format!("web.1.{T1}.back.")]),
            (ResponseCode::NXDomain, vec![]),
            (ResponseCode::NoError, vec!["db.front.".to_owned()]),
            (ResponseCode::Refused, vec![]),
        ];
        assert_eq!(asked.await.unwrap(), expected);
        assert!(node.tear_down().await.is_empty());
    });
}
