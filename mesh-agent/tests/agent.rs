//! Two agents with their real dataplane, a client, and a manager played by the test, each in a network namespace.
//!
//! Needs root. The test runs as process 1 of a PID namespace with mounts of its own: whatever fails, nothing is left.
#![expect(clippy::unwrap_used, reason = "a test, which clippy does not see without its harness")]

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record, RecordType};
use mesh_agent::dataplane::cgroup;
use mesh_agent::runtime::{task_init, whoami};
use mesh_agent::sys::netns::Netns;
use mesh_agent::sys::process::spawn_as_init;
use mesh_agent::{Agent, ClaimError, Config, Item, JoinRequest, Sealing, StartError, XdpMode, uninstall};
use mesh_api::codec::{AGENT_FRAME_BYTES_MAX, FrameReader, FrameWriter};
use mesh_api::id::{NodeId, TaskId};
use mesh_api::session::{AgentMessage, JoinAnswer, JoinRequest as MemberRequest, ManagerMessage};
use mesh_api::table::{
    BalancingRecord, ClusterRecord, EndpointMode, EndpointRecord, NetworkRecord, NodeRecord, NodeState,
    PortRecord, Protocol, PublishMode, ReturnPath, Role, ServiceRecord, Subnet6Record, SubnetRecord, Table,
    TaskRecord, TaskSpec, TaskState, VipRecord, WEIGHT_MAX,
};
use mesh_api::tls::testing::{Ca, Wanted};
use mesh_api::tls::{self, Alpn, Credential, Shared};
use mesh_api::token::JoinToken;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// The scenario's names; how XDP runs on the uplinks in each, and the underlay's address family.
const TESTS: [(&str, &str, &str); 3] = [
    ("two_agents_make_a_mesh_that_outlives_them_and_leave_nothing", "off", "ipv4"),
    ("the_same_with_generic_xdp", "generic", "ipv4"),
    ("the_same_on_an_ipv6_underlay", "generic", "ipv6"),
];
const MANAGER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);
const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 2);
/// The node's own resolver.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 53);
/// What other sites' names are, to the node's resolver and to those in tasks.
const OF_NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);
const OF_TASKS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 78);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["internal", "task-init", dir] => task_init::main(Path::new(dir)),
        ["internal", "whoami", ..] => whoami::main(),
        ["internal", "scenario", dir, xdp, underlay] => {
            scenario(Path::new(dir), xdp.parse().unwrap(), *underlay == "ipv6");
            ExitCode::SUCCESS
        }
        _ if args.contains(&"--list") => {
            for (name, ..) in TESTS {
                println!("{name}: test");
            }
            ExitCode::SUCCESS
        }
        _ => harness(args.iter().find(|arg| !arg.starts_with('-')).copied()),
    }
}

/// Runs the scenarios, and reports as the standard harness does.
fn harness(filter: Option<&str>) -> ExitCode {
    let wanted = TESTS.iter().filter(|(name, ..)| filter.is_none_or(|filter| name.contains(filter)));
    let wanted: Vec<_> = wanted.collect();
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    println!("\nrunning {} test{}", wanted.len(), if wanted.len() == 1 { "" } else { "s" });
    for (name, xdp, underlay) in &wanted {
        let outcome = if !nix::unistd::Uid::effective().is_root() {
            ignored += 1;
            "ignored, needs root"
        } else if passes(xdp, underlay) {
            passed += 1;
            "ok"
        } else {
            failed += 1;
            "FAILED"
        };
        println!("test {name} ... {outcome}");
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    let left_out = TESTS.len() - wanted.len();
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; {left_out} filtered out\n"
    );
    ExitCode::from(u8::from(failed > 0))
}

/// Runs the scenario in a process of its own.
fn passes(xdp: &str, underlay: &str) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("/proc/self/exe");
    command.args(["internal", "scenario"]).arg(folder.path()).args([xdp, underlay]);
    spawn_as_init(command).and_then(|mut child| child.wait()).unwrap().success()
}

/// A network namespace, and a runtime whose threads are all inside.
struct Host {
    netns: Arc<Netns>,
    runtime: tokio::runtime::Runtime,
}

impl Host {
    fn new() -> Self {
        let host = Self::within(Netns::fresh().unwrap());
        host.command("ip link set lo up");
        host
    }

    fn within(netns: Netns) -> Self {
        let netns = Arc::new(netns);
        let inside = Arc::clone(&netns);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .on_thread_start(move || setns(inside.as_fd(), CloneFlags::CLONE_NEWNET).unwrap())
            .build()
            .unwrap();
        Self { netns, runtime }
    }

    /// The namespace as `ip` and `nsenter` take it.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.netns.raw_fd())
    }

    fn command(&self, line: &str) -> String {
        run(&format!("nsenter --net={} {line}", self.path()))
    }

    fn block_on<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        let (sender, receiver) = mpsc::channel();
        self.runtime.spawn(async move { sender.send(work.await) });
        receiver.recv().unwrap()
    }

    /// Plugs the host into the switch.
    fn plug(&self, switch: &Host, port: &str, addr: Ipv4Addr) {
        switch.command(&format!("ip link add {port} type veth peer name up0 netns {}", self.path()));
        switch.command(&format!("ip link set {port} master br0 up"));
        self.command("ip link set up0 up");
        self.command(&format!("ip address add {addr}/24 dev up0"));
        self.command(&format!("ip address add {}/64 dev up0 nodad", v6(addr)));
    }
}

/// The IPv6 address of the host at `addr`.
fn v6(addr: Ipv4Addr) -> Ipv6Addr {
    let [.., number] = addr.octets();
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into())
}

fn try_run(line: &str) -> Result<String, String> {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout).unwrap());
    }
    Err(format!("{line}: {} {}", output.status, String::from_utf8_lossy(&output.stderr)))
}

fn run(line: &str) -> String {
    try_run(line).unwrap()
}

fn until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The managers' side: one table, sent whole to every agent at every change.
#[derive(Clone)]
struct Manager {
    table: watch::Sender<Table>,
    applied: Arc<Mutex<BTreeMap<NodeId, u64>>>,
    /// How each node's dataplane is attached, as it said last.
    attached: Arc<Mutex<BTreeMap<NodeId, String>>>,
    settled: watch::Sender<u64>,
    ca: Arc<Ca>,
}

impl Manager {
    fn change(&self, change: impl FnOnce(&mut Table)) -> u64 {
        self.table.send_modify(|table| {
            table.index += 1;
            change(table);
        });
        self.table.borrow().index
    }

    fn settles(&self, index: u64) {
        until("every node has applied the table", || (*self.settled.borrow() >= index).then_some(()));
    }

    async fn serve(self, listener: TcpListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(self.clone().session(stream));
        }
    }

    async fn session(self, stream: TcpStream) {
        let Credential { identity, roots } = self.ca.credential(&Wanted::new("m", Role::Manager, "c"));
        let config = tls::server_config(&identity, &roots, &Alpn::ALL).unwrap();
        // An agent that ends may be dialling.
        let Ok(stream) = TlsAcceptor::from(config).accept(stream).await else { return };
        let peer = tls::peer_of(stream.get_ref().1.peer_certificates()).unwrap();
        let (read, write) = tokio::io::split(stream);
        let Some(peer) = peer else {
            let request = FrameReader::new(read, AGENT_FRAME_BYTES_MAX).next().await.unwrap().unwrap();
            return FrameWriter::new(write).send(&self.join(request)).await.unwrap();
        };
        let mut reader = FrameReader::<_, AgentMessage>::new(read, AGENT_FRAME_BYTES_MAX);
        let mut writer = FrameWriter::<_, ManagerMessage>::new(write);
        let first = reader.next().await.unwrap().unwrap();
        let AgentMessage::Resume { node, .. } = first else { panic!("{first:?}") };
        let id = peer.node;
        self.attached.lock().unwrap().insert(id.clone(), node.dataplane);
        let roots = roots.to_pem();
        let greeting = ManagerMessage::Resumed { cluster_id: "c".into(), role: Role::Worker, roots };
        writer.send(&greeting).await.unwrap();
        let (mut tables, mut settled) = (self.table.subscribe(), self.settled.subscribe());
        let own = id.clone();
        tables.mark_changed();
        let writing = tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    Ok(()) = tables.changed() => {
                        let mut table = Box::new(tables.borrow_and_update().clone());
                        for task in table.tasks.values_mut().filter(|task| task.node != own) {
                            task.spec = None;
                        }
                        ManagerMessage::Snapshot { table }
                    }
                    Ok(()) = settled.changed() => ManagerMessage::Settled { index: *settled.borrow_and_update() },
                };
                if writer.send(&message).await.is_err() {
                    return;
                }
            }
        });
        while let Ok(Some(message)) = reader.next().await {
            self.hear(&id, message);
        }
        writing.abort();
    }

    fn join(&self, request: MemberRequest) -> JoinAnswer {
        let MemberRequest { csr, node, .. } = request;
        let id = format!("node-{}", node.hostname);
        let record = NodeRecord {
            id: id.as_str().into(),
            hostname: node.hostname,
            role: Role::Worker,
            vtep: node.vtep,
            state: NodeState::Ready,
            wireguard: Vec::new(),
            manager: None,
        };
        self.change(|table| drop(table.nodes.insert(record.id.clone(), record)));
        JoinAnswer::Joined {
            cluster_id: "c".into(),
            node_id: id.as_str().into(),
            role: Role::Worker,
            chain: self.ca.sign_request(&Wanted::new(&id, Role::Worker, "c"), &csr),
            roots: self.ca.roots().to_pem(),
        }
    }

    fn hear(&self, id: &NodeId, message: AgentMessage) {
        match message {
            AgentMessage::Applied { index } => {
                let mut applied = self.applied.lock().unwrap();
                applied.insert(id.clone(), index);
                let all = self.table.borrow().nodes.keys().all(|node| applied.contains_key(node));
                self.settled.send_replace(applied.values().min().copied().filter(|_| all).unwrap_or(0));
            }
            AgentMessage::Tasks { statuses } => drop(self.change(|table| {
                for status in statuses {
                    println!("  {id}: {} {:?} {}", status.task, status.state, status.err);
                    if let Some(task) = table.tasks.get_mut(&status.task) {
                        task.observed = status.state;
                    }
                    if status.state.is_terminal() {
                        table.tasks.remove(&status.task);
                    }
                }
            })),
            AgentMessage::Described { node } => {
                self.attached.lock().unwrap().insert(id.clone(), node.dataplane);
            }
            AgentMessage::Leave => {
                self.applied.lock().unwrap().remove(id);
                self.change(|table| drop(table.nodes.remove(id)));
            }
            _ => {}
        }
    }

    fn running(&self) -> usize {
        self.table.borrow().tasks.values().filter(|task| task.observed == TaskState::Running).count()
    }
}

fn table() -> Table {
    let cluster = ClusterRecord {
        id: "c".into(),
        hash_seed: 0x5eed,
        data_path_port: 4789,
        return_path: ReturnPath::Tunnel,
        key_epoch: 0,
    };
    let mut table = Table::new(cluster);
    for (number, id) in ["ingress", "front"].into_iter().enumerate() {
        let subnet = |second: u8, third: u8| SubnetRecord {
            cidr: format!("10.{second}.{third}.0/24").parse().unwrap(),
            gateway: Ipv4Addr::new(10, second, third, 1),
        };
        // `front` has another, which the second task's address is of.
        let second = (id == "front").then(|| subnet(21, 1));
        let record = NetworkRecord {
            id: id.into(),
            name: id.to_owned(),
            vni: 4096 + number as u32,
            subnets: [subnet(0, number as u8)].into_iter().chain(second).collect(),
            subnet6: Some(Subnet6Record {
                cidr: format!("fd00:{number}::/64").parse().unwrap(),
                gateway: format!("fd00:{number}::1").parse().unwrap(),
            }),
            internal: false,
            ingress: id == "ingress",
            mtu: None,
            encrypted: false,
        };
        table.networks.insert(record.id.clone(), record);
    }
    let vip = |network: &str, addr| VipRecord { network: network.into(), addr: Some(addr), aliases: vec![] };
    let port = |protocol, target, published| PortRecord {
        name: "".into(),
        protocol,
        target,
        published,
        mode: PublishMode::Ingress,
    };
    let web = ServiceRecord {
        id: "web".into(),
        name: "web".to_owned(),
        stack: "".into(),
        endpoint_mode: EndpointMode::Vip,
        vips: vec![vip("ingress", Ipv4Addr::new(10, 0, 0, 2)), vip("front", VIP)],
        // DNS's own port as well, which the node's resolver on a loopback address has.
        ports: vec![
            port(Protocol::Tcp, 80, 8080),
            port(Protocol::Udp, 80, 8080),
            port(Protocol::Tcp, 53, 53),
            port(Protocol::Udp, 53, 53),
        ],
        balancing: BalancingRecord::default(),
    };
    table.services.insert(web.id.clone(), web);
    table
}

fn task(number: u8) -> TaskRecord {
    let id = TaskId::from(format!("{number}taskaaaaaaaaaaaaaaaaaaaa"));
    let endpoint = |network: &str, second, third| EndpointRecord {
        network: network.into(),
        addr: Ipv4Addr::new(10, second, third, 10 + number),
    };
    let second = if number == 1 { 0 } else { 21 };
    let empty = String::new;
    TaskRecord {
        name: format!("web.{number}.{id}").into(),
        id,
        service: "web".into(),
        slot: number.into(),
        node: NodeId::from(format!("node-n{number}")),
        incarnation: number.into(),
        desired: TaskState::Running,
        observed: TaskState::Assigned,
        weight: WEIGHT_MAX,
        endpoints: Box::new([endpoint("ingress", 0, 0), endpoint("front", second, 1)]),
        spec: Some(Box::new(TaskSpec {
            image: "shoal/whoami".to_owned(),
            command: vec![],
            args: vec![],
            env: vec![],
            dir: empty(),
            user: empty(),
            hostname: empty(),
            stop_grace_ns: 5_000_000_000,
            stop_signal: empty(),
            service_name: "web".to_owned(),
            egress: Vec::new(),
        })),
    }
}

fn config(folder: &Path, number: u8, xdp: XdpMode) -> Config {
    Config {
        state_dir: folder.join(format!("n{number}/state")),
        run_dir: folder.join(format!("n{number}")),
        bpffs: bpffs(folder, number),
        hostname: format!("n{number}"),
        xdp,
        uplinks: Vec::new(),
        flows_max: 4096,
        key_rotation: mesh_agent::KEY_ROTATION,
        health: mesh_agent::Health::default(),
    }
}

fn bpffs(folder: &Path, number: u8) -> PathBuf {
    folder.join("bpf").join(format!("n{number}"))
}

/// What answers on `addr`: its task and the client that it saw.
fn ask(from: &str, addr: &str) -> Option<(String, String)> {
    let body = try_run(&format!("nsenter {from} curl --silent --show-error --max-time 3 http://{addr}/"));
    let body = body.map_err(|error| println!("  {error}")).ok()?;
    let field = |key: &str| body.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned);
    Some((field("task: ")?, field("client: ")?))
}

/// The process ids of the tasks, by the name of the state folder's node.
fn shims(folder: &Path, number: u8) -> Vec<String> {
    let tasks = folder.join(format!("n{number}/state/tasks"));
    let entries = std::fs::read_dir(tasks).into_iter().flatten().filter_map(Result::ok);
    let files = entries.filter_map(|entry| std::fs::read_to_string(entry.path().join("task.json")).ok());
    let shim = |text: String| text.split("\"shim\":").nth(1)?.split(',').next().map(str::to_owned);
    files.filter_map(shim).collect()
}

/// Serves DNS at `at`: each name of two labels or more is `addr`.
async fn serve_names(at: Ipv4Addr, addr: Ipv4Addr) {
    let socket = UdpSocket::bind((at, 53)).await.unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        loop {
            let (len, client) = socket.recv_from(&mut buffer).await.unwrap();
            let mut message = Message::from_vec(&buffer[..len]).unwrap().into_response();
            let (name, asked) = (message.queries[0].name().clone(), message.queries[0].query_type());
            if name.num_labels() < 2 {
                message.metadata.response_code = ResponseCode::NXDomain;
            } else if asked == RecordType::A {
                message.add_answer(Record::from_rdata(name, 60, RData::A(A(addr))));
            }
            socket.send_to(&message.to_vec().unwrap(), client).await.unwrap();
        }
    });
}

fn scenario(folder: &Path, xdp: XdpMode, ipv6_underlay: bool) {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).unwrap();
    std::fs::create_dir(folder.join("bpf")).unwrap();
    mount(Some("bpf"), &folder.join("bpf"), Some("bpf"), MsFlags::empty(), none).unwrap();
    let resolv_conf = folder.join("resolv.conf");
    std::fs::write(&resolv_conf, format!("nameserver {RESOLVER}\nsearch corp.example\n")).unwrap();
    mount(Some(&resolv_conf), "/etc/resolv.conf", none, MsFlags::MS_BIND, none).unwrap();

    let (switch, client) = (Host::new(), Host::new());
    switch.command("ip link add br0 type bridge");
    switch.command("ip link set br0 up");
    switch.command(&format!("ip address add {MANAGER}/24 dev br0"));
    client.plug(&switch, "port100", CLIENT);
    let hosts: Vec<Host> = (1..=2).map(|_| Host::new()).collect();
    let manager = Manager {
        table: watch::channel(table()).0,
        applied: Arc::default(),
        attached: Arc::default(),
        settled: watch::channel(0).0,
        ca: Arc::default(),
    };
    let serving = manager.clone();
    switch.block_on(async move {
        let listener = TcpListener::bind((MANAGER, 2377)).await.unwrap();
        tokio::spawn(serving.serve(listener));
    });

    let mut agents = Vec::new();
    for (number, host) in (1..).zip(&hosts) {
        let addr = Ipv4Addr::new(192, 0, 2, number);
        host.plug(&switch, &format!("port{number}"), addr);
        let addr: IpAddr = if ipv6_underlay { v6(addr).into() } else { addr.into() };
        let config = config(folder, number, xdp);
        let token = JoinToken::new(&manager.ca.digest(), &[2; 16]);
        let request = JoinRequest {
            remotes: vec![SocketAddr::from((MANAGER, 2377))],
            token,
            advertise: addr,
            data_path: addr,
        };
        agents.push(host.block_on(async move {
            let agent = Agent::start(config, Shared::default(), Sealing::None).await.unwrap();
            assert!(agent.membership().is_none());
            let membership = agent.join(request).await.unwrap();
            assert_eq!(agent.membership(), Some(membership));
            assert!(agent.applied().is_some());
            agent
        }));
        let attached = if xdp == XdpMode::Generic { "up0=xdp-generic" } else { "up0=tc" };
        until("the manager knows how the dataplane is attached", || {
            let known = manager.attached.lock().unwrap();
            known.get(&NodeId::from(format!("node-n{number}"))).filter(|known| *known == attached).map(drop)
        });
    }
    println!("  both joined");
    manager.change(|table| {
        for task in [task(1), task(2)] {
            table.tasks.insert(task.id.clone(), task);
        }
    });
    until("both tasks run", || (manager.running() == 2).then_some(()));
    let index = manager.table.borrow().index;
    manager.settles(index);

    let outside = format!("--net={}", client.path());
    for host in ["192.0.2.1", "192.0.2.2", "[2001:db8::1]", "[2001:db8::2]"] {
        let addr = format!("{host}:8080");
        let expected =
            if host.starts_with('[') { format!("[{}]:", v6(CLIENT)) } else { format!("{CLIENT}:") };
        let mut seen = BTreeMap::<String, u32>::new();
        for _ in 0..20 {
            let (task, client) = ask(&outside, &addr).unwrap_or_else(|| panic!("no answer on {addr}"));
            assert!(client.starts_with(&expected), "{client}");
            *seen.entry(task).or_default() += 1;
        }
        assert_eq!(seen.len(), 2, "both tasks answer on {addr}: {seen:?}");
    }
    println!("  published port answers on both nodes, by both tasks, in both families");

    // From inside a task: by name, to the VIP and its tasks.
    let shim = shims(folder, 1).pop().unwrap();
    let inside = format!("--net=/proc/{shim}/ns/net --mount=/proc/{shim}/ns/mnt");
    for (database, vip) in [("ahostsv4", VIP.to_string()), ("ahostsv6", "fd00:1::a00:102".to_owned())] {
        let resolved = run(&format!("nsenter {inside} getent {database} web"));
        assert!(resolved.starts_with(&vip), "{resolved}");
        let url = if vip.contains(':') { format!("[{vip}]") } else { vip };
        let mut seen: Vec<String> =
            (0..20).filter_map(|_| ask(&inside, &url)).map(|(task, _)| task).collect();
        assert_eq!(seen.len(), 20);
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 2, "the VIP balances over both: {seen:?}");
    }
    let direct = run(&format!("nsenter {inside} getent ahosts tasks.web"));
    for addr in ["10.0.1.11", "10.21.1.12", "fd00:1::a00:10b", "fd00:1::a15:10c"] {
        assert!(direct.contains(addr), "{direct}");
    }
    // Across the network's subnets, and to nobody there.
    let (_, client_seen) = ask(&inside, "10.21.1.12").unwrap();
    assert!(client_seen.starts_with("10.0.1.11:"), "{client_seen}");
    let refused = try_run(&format!("nsenter {inside} ping -c 1 -W 3 10.21.1.99")).unwrap_err();
    let neighbor = run(&format!("nsenter {inside} ip neighbor show 10.21.1.99"));
    assert!(["FAILED", "INCOMPLETE"].iter().any(|state| neighbor.contains(state)), "{neighbor}: {refused}");
    // Names of others are asked of the node's resolver, although its port is published; and where there is none, of the
    // service that publishes it.
    let tasks = (1..=2).flat_map(|number| shims(folder, number));
    let tasks: Vec<Host> =
        tasks.map(|shim| Host::within(Netns::of_pid(shim.parse().unwrap()).unwrap())).collect();
    for task in &tasks {
        task.block_on(serve_names(Ipv4Addr::UNSPECIFIED, OF_TASKS));
    }
    let resolves_to = |name: &str, expected: Ipv4Addr| {
        let resolved = run(&format!("nsenter {inside} getent ahostsv4 {name}"));
        assert!(resolved.starts_with(&expected.to_string()), "{name}: {resolved}");
    };
    resolves_to("www.example", OF_TASKS);
    hosts[0].block_on(serve_names(RESOLVER, OF_NODE));
    resolves_to("www.other.example", OF_NODE);
    resolves_to("www", OF_NODE);
    drop(tasks);
    let resolv_conf = run(&format!("nsenter {inside} cat /etc/resolv.conf"));
    assert_eq!(resolv_conf, "nameserver 10.0.0.1\nsearch corp.example\noptions ndots:0\n");
    // The way out, masqueraded.
    run(&format!("nsenter {inside} ping -c 1 -W 3 {CLIENT}"));
    run(&format!("nsenter {inside} ping -c 1 -W 3 {}", v6(CLIENT)));
    println!("  names, VIP and the way out work inside a task");

    // A host has one agent.
    let second = Agent::start(config(folder, 3, xdp), Shared::default(), Sealing::None);
    let refused = hosts[0].block_on(async { second.await.unwrap_err() });
    assert!(matches!(refused, StartError::Claim(ClaimError::InUse)), "{refused}");

    // Without its agent the node goes on; a new agent finds everything.
    let agent = agents.remove(0);
    hosts[0].block_on(agent.shutdown());
    assert!((0..10).all(|_| ask(&outside, "192.0.2.1:8080").is_some()));
    let credential = Shared::default();
    credential.set(Agent::credential(&config(folder, 1, xdp).state_dir, None).unwrap());
    assert!(credential.get().is_some());
    let start = Agent::start(config(folder, 1, xdp), credential, Sealing::None);
    agents.insert(0, hosts[0].block_on(async { start.await.unwrap() }));
    assert_eq!(shims(folder, 1), std::slice::from_ref(&shim));
    assert!((0..10).all(|_| ask(&outside, "192.0.2.1:8080").is_some()));
    until("the session is back", || {
        agents[0].session().filter(|state| *state == mesh_agent::SessionState::Connected)
    });
    println!("  the mesh outlives an agent");

    // An acknowledged drain: no request fails while a task goes away.
    let gone = task(1).id;
    manager.change(|table| {
        if let Some(task) = table.tasks.get_mut(&gone) {
            task.desired = TaskState::Shutdown;
        }
    });
    until("the drained task is gone", || {
        assert!(ask(&outside, "192.0.2.1:8080").is_some() && ask(&outside, "192.0.2.2:8080").is_some());
        (!manager.table.borrow().tasks.contains_key(&gone)).then_some(())
    });
    until("its folder is cleared away", || shims(folder, 1).is_empty().then_some(()));
    println!("  a task was drained without a failed request");

    // One leaves the cluster, the other is removed without it.
    let remaining = agents.remove(1);
    let agent = agents.remove(0);
    hosts[0].block_on(async move {
        agent.leave().await.unwrap();
        assert!(agent.membership().is_none());
    });
    let remove = |folder: &Path| {
        let (state, pins) = (folder.join("n2/state"), bpffs(folder, 2));
        hosts[1].block_on(async move { uninstall(&state, &pins).await })
    };
    assert!(matches!(remove(folder), Err(ClaimError::InUse)));
    hosts[1].block_on(remaining.shutdown());
    let done = remove(folder).unwrap();
    assert_eq!((&done.left[..], &done.errors[..]), (&[][..], &[][..]));
    assert_eq!(done.node, Some(NodeId::from("node-n2".to_owned())));
    for item in [
        Item::Task(task(2).id.to_string()),
        Item::Link("shoal0".to_owned()),
        Item::Table("ip6 shoal".to_owned()),
        Item::File(folder.join("n2/state/membership.json")),
    ] {
        assert!(done.removed.contains(&item), "{item:?} in {:?}", done.removed);
    }
    let of_processes = cgroup::root().ok().map(|_| "links/sock_connect6-0");
    for pin in of_processes.into_iter().chain(["links/from_task-"]) {
        let pin = bpffs(folder, 2).join(pin).into_os_string();
        let is_it = |item: &Item| matches!(item, Item::Pin(path) if path.as_os_str().as_encoded_bytes().starts_with(pin.as_encoded_bytes()));
        assert!(done.removed.iter().any(is_it), "{} in {:?}", pin.display(), done.removed);
    }
    let again = remove(folder).unwrap();
    assert_eq!((again.removed, again.left, again.errors), (vec![], vec![], vec![]));

    for (number, host) in (1..).zip(&hosts) {
        let links = host.command("ip -o link");
        assert_eq!(links.lines().count(), 2, "lo and the uplink are left: {links}");
        assert_eq!(host.command("nft list tables"), "");
        assert!(shims(folder, number).is_empty());
        let pins = std::fs::read_dir(bpffs(folder, number)).map_or(0, Iterator::count);
        assert_eq!(pins, 0, "pins are left");
    }
    println!("  nothing is left");
}
