//! The node's own processes at published ports: their sockets are led to the mesh address, and they are told what they
//! dialled. The mesh is played by servers in another network namespace, behind a pair that stands for `shoal0`.

#![expect(clippy::unwrap_used, reason = "a test that can't set itself up has failed")]

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData};
use aya::programs::links::{FdLink, LinkInfo, PinnedLink};
use mesh_agent::dataplane::cgroup;
use mesh_agent::dataplane::object::Programs;
use mesh_agent::sys::netns::Netns;
use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{Config, Host, PROTO_TCP, PROTO_UDP, Port, PortKey};
use nix::mount::{MsFlags, mount};
use shoal_tests::packet::kernel::enter_namespaces;

const FLOWS_MAX: u32 = 1024;
/// A published port, and one that isn't.
const PORT: u16 = 8080;
const OTHER_PORT: u16 = 8081;
/// Addresses of `shoal0`, and the mesh addresses behind it.
const HOST: &str = "169.254.64.1";
const HOST6: &str = "fd73:686f:616c:1::1";
const MESH: &str = "169.254.64.2";
const MESH6: &str = "fd73:686f:616c:1::2";
/// Addresses of the node.
const LOCAL: &str = "192.0.2.1";
const LOCAL6: &str = "2001:db8::1";
/// What a node's process may dial, whose mesh it gets to, and what it is told: IPv4, IPv6, and IPv4 by IPv6 sockets.
const DIALLED: [(&str, &str, &str); 9] = [
    ("127.0.0.1", HOST, "127.0.0.1"),
    ("127.1.2.3", HOST, "127.1.2.3"),
    (LOCAL, HOST, LOCAL),
    ("0.0.0.0", HOST, "127.0.0.1"),
    ("::1", HOST6, "::1"),
    (LOCAL6, HOST6, LOCAL6),
    ("::", HOST6, "::1"),
    ("::ffff:127.0.0.1", HOST, "::ffff:127.0.0.1"),
    ("::ffff:192.0.2.1", HOST, "::ffff:192.0.2.1"),
];
/// Until when an answer must have come.
const PATIENCE: Duration = Duration::from_secs(5);

/// A process is in one cgroup, so tests that change it take turns.
static TURN: Mutex<()> = Mutex::new(());

/// This process in a cgroup of its own; in the one that it was in before once this is dropped.
struct OwnCgroup {
    path: PathBuf,
    before: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl OwnCgroup {
    /// To be called in a mount namespace of the test's own.
    fn enter() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let root = cgroup::root().unwrap_or_else(|_| {
            let root = PathBuf::from("/sys/fs/cgroup");
            mount(Some("cgroup2"), &root, Some("cgroup2"), MsFlags::empty(), None::<&str>).unwrap();
            root
        });
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
        let before = root.join(own);
        let path = root.join(format!("shoal-socket-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let cgroup = Self { path, before, _turn: turn };
        fs::write(cgroup.path.join("cgroup.procs"), "0").unwrap();
        cgroup
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        // Both are asserted by the next test's `enter`, if there is one.
        let _ = fs::write(self.before.join("cgroup.procs"), "0");
        let _ = fs::remove_dir(&self.path);
    }
}

/// A node without tasks: `shoal0`, addresses, tables that publish [`PORT`], and who answers as the mesh.
struct Node {
    cgroup: OwnCgroup,
    pins: PathBuf,
    mesh: Netns,
}

/// A node set up in namespaces of its own, on a thread that takes them along; without root, says so.
fn on_node(test: impl FnOnce(&Node) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: attaching BPF programs needs root");
        return;
    }
    let thread = std::thread::spawn(move || {
        let pins = enter_namespaces().unwrap();
        let node = Node { cgroup: OwnCgroup::enter(), pins, mesh: Netns::fresh().unwrap() };
        node.add_links();
        test(&node);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Node {
    fn add_links(&self) {
        let netns = format!("/proc/{}/fd/{}", std::process::id(), self.mesh.raw_fd());
        ip(&format!("link add shoal0 type veth peer name shoal0p netns {netns}"));
        ip(&format!("addr add {HOST}/18 dev shoal0"));
        ip(&format!("addr add {HOST6}/64 dev shoal0 nodad"));
        ip("link set shoal0 up");
        ip(&format!("addr add {LOCAL}/32 dev lo"));
        ip(&format!("addr add {LOCAL6}/128 dev lo nodad"));
        self.in_mesh(|| {
            ip(&format!("addr add {MESH}/18 dev shoal0p"));
            ip(&format!("addr add {MESH6}/64 dev shoal0p nodad"));
            ip("link set shoal0p up");
        });
    }

    fn in_mesh<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.mesh.run(|| Ok(work())).unwrap()
    }

    /// The programs as a new agent loads them, attached.
    fn start_agent(&self) -> Programs {
        start_agent(&self.pins, &self.cgroup.path)
    }

    /// Servers at the published port, in the mesh.
    fn servers(&self) -> Servers {
        self.in_mesh(|| Servers::listen(Ipv6Addr::UNSPECIFIED.into()))
    }
}

/// Servers at the published port.
struct Servers {
    tcp: TcpListener,
    udp: UdpSocket,
}

impl Servers {
    /// Listens at an address of the calling thread's network namespace.
    fn listen(addr: IpAddr) -> Self {
        let udp = UdpSocket::bind((addr, PORT)).unwrap();
        udp.set_read_timeout(Some(PATIENCE)).unwrap();
        let tcp = TcpListener::bind((addr, PORT)).unwrap();
        tcp.set_nonblocking(true).unwrap();
        Self { tcp, udp }
    }

    /// Who connected; for connections that their clients see established.
    fn accepted(&self) -> Option<IpAddr> {
        match self.tcp.accept() {
            Ok((_, client)) => Some(client.ip().to_canonical()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Answers a datagram, and says whom.
    fn answer(&self) -> IpAddr {
        let (len, client) = self.udp.recv_from(&mut [0; 16]).unwrap();
        assert_eq!(len, 5);
        self.udp.send_to(b"answer", client).unwrap();
        client.ip().to_canonical()
    }
}

fn start_agent(pins: &Path, cgroup: &Path) -> Programs {
    let mut programs = Programs::load(pins, FLOWS_MAX).unwrap_or_else(|error| panic!("{error:?}"));
    write_tables(pins);
    cgroup::attach(programs.ebpf(), &links(pins), cgroup).unwrap_or_else(|error| panic!("{error:?}"));
    programs
}

/// What an agent writes for a service that publishes [`PORT`] for TCP and UDP.
fn write_tables(pins: &Path) {
    let config = Config {
        vtep: ip6("198.18.0.2"),
        host4: Host { addr: ip4(HOST), mesh: ip4(MESH), ..Host::default() },
        host6: Host { addr: ip6(HOST6), mesh: ip6(MESH6), ..Host::default() },
        ..Config::default()
    };
    let pinned = |name: &str| MapData::from_pin(pins.join(name)).unwrap();
    let mut map: Array<_, Config> = Map::Array(pinned("shoal_config")).try_into().unwrap();
    map.set(0, config, 0).unwrap();
    insert(pinned("shoal_locals4"), &ip4(LOCAL), &1_u32);
    insert(pinned("shoal_locals6"), &ip6(LOCAL6), &1_u32);
    for protocol in [PROTO_TCP, PROTO_UDP] {
        let port = Port { service: 1, target: Be16::new(80), ..Port::default() };
        insert(pinned("shoal_ports"), &PortKey::new::<Be32>(protocol, Be16::new(PORT)), &port);
        insert(pinned("shoal_ports"), &PortKey::new::<Ip6>(protocol, Be16::new(PORT)), &port);
    }
}

fn insert<K: Pod, V: Pod>(map: MapData, key: &K, value: &V) {
    let mut map: HashMap<_, K, V> = Map::HashMap(map).try_into().unwrap();
    map.insert(key, value, 0).unwrap();
}

fn ip6(text: &str) -> Ip6 {
    text.parse::<IpAddr>().unwrap().into()
}

fn ip4(text: &str) -> Be32 {
    ip6(text).to_mapped().unwrap()
}

fn at(addr: &str, port: u16) -> SocketAddr {
    SocketAddr::new(addr.parse().unwrap(), port)
}

fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&to, PATIENCE)
}

/// A datagram socket of the family of `addr`, bound to it.
fn datagrams(addr: &str) -> UdpSocket {
    let socket = UdpSocket::bind(at(addr, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A datagram socket that isn't bound to an address, of the family of `to`.
fn unbound(to: SocketAddr) -> UdpSocket {
    datagrams(if to.is_ipv4() { "0.0.0.0" } else { "::" })
}

/// Whom an answer comes from.
fn answered(socket: &UdpSocket) -> SocketAddr {
    let mut answer = [0; 16];
    let (len, server) = socket.recv_from(&mut answer).unwrap();
    assert_eq!(&answer[..len], b"answer");
    server
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The folder of attachments, beside that of the maps.
fn links(pins: &Path) -> PathBuf {
    let folder = pins.join("links");
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// What is pinned for a program.
fn link(pins: &Path, program: &str) -> LinkInfo {
    FdLink::from(PinnedLink::from_pin(cgroup::pin(&links(pins), program)).unwrap()).info().unwrap()
}

#[test]
fn a_connection_to_a_published_port_at_the_node_reaches_the_mesh_and_names_what_was_dialled() {
    on_node(|node| {
        let servers = node.servers();
        let _programs = node.start_agent();
        for (to, client, told) in DIALLED {
            let stream = connect(at(to, PORT)).unwrap_or_else(|error| panic!("{to}: {error}"));
            assert_eq!(servers.accepted(), Some(client.parse().unwrap()), "{to}");
            assert_eq!(stream.peer_addr().unwrap(), at(told, PORT), "{to}");
        }
    });
}

#[test]
fn datagrams_to_a_published_port_at_the_node_are_answered_from_the_address_dialled() {
    on_node(|node| {
        let servers = node.servers();
        let _programs = node.start_agent();
        for (to, client, told) in DIALLED {
            let socket = unbound(at(to, PORT));
            socket.send_to(b"hello", at(to, PORT)).unwrap_or_else(|error| panic!("{to}: {error}"));
            assert_eq!(servers.answer(), client.parse::<IpAddr>().unwrap(), "{to}");
            assert_eq!(answered(&socket), at(told, PORT), "{to}, not connected");

            socket.connect(at(to, PORT)).unwrap_or_else(|error| panic!("{to}: {error}"));
            assert_eq!(socket.peer_addr().unwrap(), at(told, PORT), "{to}");
            socket.send(b"hello").unwrap();
            assert_eq!(servers.answer(), client.parse::<IpAddr>().unwrap(), "{to}");
            assert_eq!(answered(&socket), at(told, PORT), "{to}, connected");
        }
    });
}

#[test]
fn a_published_port_goes_before_a_local_listener_and_any_other_does_not() {
    on_node(|node| {
        let servers = node.servers();
        let local = Servers::listen(at("127.0.0.1", 0).ip());
        let elsewhere = TcpListener::bind(at("127.0.0.1", OTHER_PORT)).unwrap();
        let programs = node.start_agent();
        connect(at("127.0.0.1", PORT)).unwrap();
        assert_eq!((servers.accepted(), local.accepted()), (Some(at(HOST, 0).ip()), None));
        connect(at("127.0.0.1", OTHER_PORT)).unwrap();
        elsewhere.accept().unwrap();

        // Uninstalled.
        drop(programs);
        fs::remove_dir_all(links(&node.pins)).unwrap();
        // The kernel detaches a little later.
        let deadline = Instant::now() + PATIENCE;
        while local.accepted().is_none() {
            assert!(Instant::now() < deadline, "still attached");
            connect(at("127.0.0.1", PORT)).unwrap();
            servers.accepted();
        }
    });
}

#[test]
fn a_socket_bound_to_an_address_or_an_interface_is_left_alone() {
    on_node(|node| {
        let local = Servers::listen(at("127.0.0.1", 0).ip());
        let _programs = node.start_agent();
        for from in ["127.0.0.1", LOCAL] {
            for connected in [false, true] {
                let socket = datagrams(from);
                if connected {
                    socket.connect(at("127.0.0.1", PORT)).unwrap();
                    socket.send(b"hello").unwrap();
                } else {
                    socket.send_to(b"hello", at("127.0.0.1", PORT)).unwrap();
                }
                assert_eq!(local.answer(), at(from, 0).ip());
                assert_eq!(answered(&socket), at("127.0.0.1", PORT));
            }
        }
        let socket = datagrams("0.0.0.0");
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::BindToDevice, &"lo".into()).unwrap();
        socket.send_to(b"hello", at("127.0.0.1", PORT)).unwrap();
        assert_eq!(local.answer(), at("127.0.0.1", 0).ip());
    });
}

#[test]
fn one_datagram_socket_asks_two_addresses_in_turn() {
    on_node(|node| {
        let servers = node.servers();
        let _programs = node.start_agent();
        let socket = datagrams("::");
        for to in ["::ffff:127.0.0.1", "::1", "::ffff:127.0.0.1", LOCAL6] {
            socket.send_to(b"hello", at(to, PORT)).unwrap();
            servers.answer();
            assert_eq!(answered(&socket), at(to, PORT));
        }
    });
}

#[test]
fn a_process_in_another_network_namespace_is_left_alone() {
    on_node(|node| {
        let servers = node.servers();
        let _programs = node.start_agent();
        let other = Netns::fresh().unwrap();
        let accepted = other.run(|| {
            ip("link set lo up");
            let local = Servers::listen(at("127.0.0.1", 0).ip());
            let stream = connect(at("127.0.0.1", PORT))?;
            assert_eq!(stream.peer_addr()?, at("127.0.0.1", PORT));
            let socket = datagrams("0.0.0.0");
            socket.send_to(b"hello", at("127.0.0.1", PORT))?;
            assert_eq!(local.answer(), at("127.0.0.1", 0).ip());
            assert_eq!(answered(&socket), at("127.0.0.1", PORT));
            Ok(local.accepted())
        });
        assert_eq!((accepted.unwrap(), servers.accepted()), (Some(at("127.0.0.1", 0).ip()), None));
    });
}

#[test]
fn two_nodes_of_one_machine_do_not_disturb_each_other() {
    on_node(|node| {
        let servers = node.servers();
        let _programs = node.start_agent();
        let other = Netns::fresh().unwrap();
        let pins = node.pins.join("other");
        fs::create_dir(&pins).unwrap();
        let led = other.run(|| {
            ip("link set lo up");
            let _local = Servers::listen(at("127.0.0.1", 0).ip());
            let _programs = start_agent(&pins, &node.cgroup.path);
            // That node's mesh address is nowhere.
            Ok(connect(at("127.0.0.1", PORT)).map(drop).map_err(|error| error.kind()))
        });
        assert_eq!(led.unwrap(), Err(ErrorKind::NetworkUnreachable));
        let stream = connect(at("127.0.0.1", PORT)).unwrap();
        assert_eq!(servers.accepted(), Some(at(HOST, 0).ip()));
        assert_eq!(stream.peer_addr().unwrap(), at("127.0.0.1", PORT));
    });
}

#[test]
fn the_next_agent_swaps_the_programs_and_knows_what_was_dialled() {
    on_node(|node| {
        let servers = node.servers();
        let first = node.start_agent();
        let stream = connect(at(LOCAL, PORT)).unwrap();
        let before = cgroup::PROGRAMS.map(|program| link(&node.pins, program));
        drop(first);
        assert_eq!(stream.peer_addr().unwrap(), at(LOCAL, PORT), "without an agent");

        drop(node.start_agent());
        for (program, before) in cgroup::PROGRAMS.iter().zip(before) {
            let after = link(&node.pins, program);
            assert_eq!(after.id(), before.id(), "{program}: the attachment stays");
            assert_ne!(after.program_id(), before.program_id(), "{program}: the program is the new agent's");
        }
        assert_eq!(stream.peer_addr().unwrap(), at(LOCAL, PORT));
        connect(at("127.0.0.1", PORT)).unwrap();
        assert!(servers.accepted().is_some() && servers.accepted().is_some());
        assert!(servers.accepted().is_none());
    });
}

#[test]
fn an_agent_finds_the_root_of_cgroup_v2_and_serves_its_own_network_namespace() {
    on_node(|node| {
        let servers = node.servers();
        let mut programs = Programs::load(&node.pins, FLOWS_MAX).unwrap();
        write_tables(&node.pins);
        cgroup::serve(programs.ebpf(), &links(&node.pins));
        connect(at("127.0.0.1", PORT)).unwrap();
        assert_eq!(servers.accepted(), Some(at(HOST, 0).ip()));
    });
}
