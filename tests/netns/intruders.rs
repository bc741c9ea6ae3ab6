//! What nobody asked for: every port, addresses that are a node's own, and mesh requests that no node made.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, Map, MapData};
use etherparse::PacketBuilder;
use mesh_agent::dataplane::Counter;
use mesh_agent::dataplane::pins::version_folder;
use mesh_common::addr::backend_mac;
use mesh_common::be::Be32;
use mesh_common::map::Backend;
use mesh_common::vxlan::VNI_MESH_REQUEST;

use crate::client;
use crate::figure;
use crate::lab::{self, CLIENT, Lab, Node, as_client, as_host, on_client, until};
use crate::mesh::python;
use crate::peers::{BALANCER, BEHIND, Balancer, Kind, SERVED};
use crate::raw::{self, SYN, Sender, segment};
use crate::undo::Undo;
use crate::ways::{self, Back, Family};

const THREADS: u16 = 4;
/// How long an open port may take to say so.
const PATIENCE: Duration = Duration::from_secs(1);
/// Where the agent of a manager listens for the others.
const CLUSTER_PORT: u16 = 2377;
/// Where the node's own loopback services listen.
const LOOPBACK_PORT: u16 = 9998;

/// A server on a node, until it is dropped.
struct Server(Child);

impl Server {
    fn start(node: &Node, address: IpAddr) -> Result<Self> {
        let mut command = node.command(&python()?);
        command.args(["-m", "http.server", "--bind", &address.to_string(), &LOOPBACK_PORT.to_string()]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let server = Self(command.spawn().context("could not start python3")?);
        let to = SocketAddr::new(address, LOOPBACK_PORT);
        until(&format!("{to} listens"), Duration::from_secs(10), || {
            Ok(as_host(&node.name, || Ok(TcpStream::connect(to)?)).ok())
        })?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The ports of an address that accept connections, and those that say nothing.
fn scan(address: IpAddr) -> Result<(Vec<u16>, Vec<u16>)> {
    let part = |first: u16| {
        let (mut open, mut silent) = (Vec::new(), Vec::new());
        for port in (1..=u16::MAX).skip(first.into()).step_by(THREADS.into()) {
            let started = Instant::now();
            match TcpStream::connect_timeout(&SocketAddr::new(address, port), PATIENCE) {
                Ok(_) => open.push(port),
                Err(_) if started.elapsed() >= PATIENCE => silent.push(port),
                Err(_) => {}
            }
        }
        (open, silent)
    };
    as_client(|| {
        let mut found = (Vec::new(), Vec::new());
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|first| scope.spawn(move || part(first))).collect();
            for thread in threads {
                let (open, silent) = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                found.0.extend(open);
                found.1.extend(silent);
            }
        });
        found.0.sort_unstable();
        Ok(found)
    })
}

pub(crate) fn scan_finds_what_is_published_and_nothing_else(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 2, &[])?;
    let manager = lab.manager();
    let _servers = Family::ALL
        .map(|family| Server::start(manager, family.loopback()))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    for (node, families) in [(manager, &Family::ALL[..]), (&lab.nodes[1], &Family::ALL[..1])] {
        for family in families {
            let started = Instant::now();
            let (open, silent) = scan(family.of(node))?;
            let seconds = started.elapsed().as_secs_f32();
            figure!(
                "{node}, {family}: of 65535 ports {open:?} are open, {} silent ({seconds:.1} s)",
                silent.len()
            );
            let published = Back::ALL.map(Back::port);
            let others: Vec<u16> = open.iter().copied().filter(|port| !published.contains(port)).collect();
            ensure!(published.iter().all(|port| open.contains(port)), "a published port is closed: {open:?}");
            ensure!(
                others.iter().all(|port| *port == CLUSTER_PORT),
                "open without being published: {others:?}"
            );
            ensure!(silent.is_empty(), "neither open nor refused: {silent:?}");
        }
    }
    Ok(())
}

/// A host beside the nodes sends to them what is theirs alone: nothing answers.
pub(crate) fn node_local_addresses_are_out_of_reach(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 2, &[])?;
    let node = lab.manager();
    let mut undo = Vec::new();
    for family in Family::ALL {
        let subnet = if family == Family::V4 { "169.254.64.0/18" } else { "fd73:686f:616c::/48" };
        let ip = |action: &str| {
            let mut command = on_client("ip");
            command.args([family.flag(), "route", action, subnet, "via", &family.of(node).to_string()]);
            command
        };
        lab::output(&mut ip("add"))?;
        undo.push(Undo::new(ip("del")));
    }
    let mut tried = 0;
    for address in
        ["169.254.64.1", "169.254.64.2", "169.254.64.3", "fd73:686f:616c:1::1", "fd73:686f:616c:1::2"]
    {
        for port in [53, CLUSTER_PORT, 80, Back::Tunnel.port()] {
            let to = SocketAddr::new(address.parse()?, port);
            let reached = as_client(|| {
                let tcp =
                    client::connect_within(client::anywhere(to), to, Duration::from_millis(250)).is_ok();
                let socket = UdpSocket::bind(client::anywhere(to))?;
                socket.set_read_timeout(Some(Duration::from_millis(50)))?;
                socket.connect(to)?;
                // The root's name servers, asked as a resolver does.
                let query = [0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1];
                socket.send(&query)?;
                Ok((tcp, socket.recv(&mut [0; 512]).is_ok()))
            })?;
            ensure!(reached == (false, false), "{to} answers the client (TCP, UDP: {reached:?})");
            tried += 1;
        }
    }
    figure!("{tried} ports of the node's own addresses dialled from the wire: no answer");
    drop(undo);
    Ok(())
}

/// Every port of a task, dialled from the wire at the task's own address by way of a node.
pub(crate) fn tasks_own_addresses_are_out_of_reach(lab: &Lab) -> Result<()> {
    let from = SocketAddrV4::new(CLIENT, 29_000);
    {
        let _balancer = Balancer::start(Kind::Nftables)?;
        // Its servers take a moment to listen.
        let scanned = until("the attack works on a peer", Duration::from_secs(10), || {
            let scanned = as_client(|| raw::scan(from, BEHIND, BALANCER))?;
            Ok((scanned.open == SERVED).then_some(scanned))
        })?;
        figure!("behind nftables: {:?} are open, {} refuse", scanned.open, scanned.closed);
    }
    let tasks = ways::create_web(lab, 1, &[])?;
    for task in &tasks {
        for address in &task.addresses {
            for node in [&task.node, &lab.nodes[2]] {
                let scanned = as_client(|| raw::scan(from, *address, node.address))?;
                let answers = scanned.open.len() + scanned.closed;
                ensure!(answers == 0, "{address} of a task answers by {node}: {scanned:?}");
            }
        }
    }
    figure!("all ports of {} tasks, by two nodes each: no answer", tasks.len());
    Ok(())
}

/// Datagrams for the loopback address that come to a host by the wire; gives how many a process got.
fn to_loopback(host: &str, by: Ipv4Addr) -> Result<usize> {
    const DATAGRAMS: usize = 20;
    let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, LOOPBACK_PORT);
    let server = as_host(host, || Ok(UdpSocket::bind(to)?))?;
    server.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4(CLIENT.octets(), to.ip().octets(), 64).udp(29_000, to.port());
    builder.write(&mut packet, b"local?")?;
    as_client(|| {
        let sender = Sender::open()?;
        (0..DATAGRAMS).try_for_each(|_| sender.send(&packet, by).map(drop))
    })?;
    let mut came = 0;
    while server.recv(&mut [0; 64]).is_ok() {
        came += 1;
    }
    Ok(came)
}

/// What listens on a node's loopback address, and the published port there, are for the node's own processes.
pub(crate) fn loopback_is_out_of_reach(lab: &Lab) -> Result<()> {
    {
        let balancer = Balancer::start(Kind::Nftables)?;
        // As balancers set it that translate what is dialled at 127.0.0.1.
        balancer.front.set("conf/all/route_localnet=1")?;
        let came = to_loopback(balancer.front.name, BALANCER)?;
        figure!("with route_localnet {came} of 20 datagrams from the wire came to 127.0.0.1");
        ensure!(came > 10, "the attack does not work on a peer");
    }
    ways::create_web(lab, 2, &[])?;
    let taken = |node: &Node| {
        let counts = [Counter::MeshDelivered, Counter::MeshForwarded].map(|counter| node.count(counter));
        counts.into_iter().sum::<Result<u64>>()
    };
    for node in &lab.nodes {
        let came = to_loopback(&node.name, node.address)?;
        ensure!(came == 0, "{came} datagrams came to 127.0.0.1 on {node}");
        let before = taken(node)?;
        as_client(|| {
            let sender = Sender::open()?;
            let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, Back::Tunnel.port());
            sender.send(&segment(SYN, SocketAddrV4::new(CLIENT, 29_001), to), node.address)
        })?;
        std::thread::sleep(Duration::from_millis(100));
        ensure!(taken(node)? == before, "{node} balances what is dialled at 127.0.0.1 from the wire");
    }
    figure!("127.0.0.1 of {} nodes: nothing came from the wire, and nothing was balanced", lab.nodes.len());
    Ok(())
}

/// The tasks that a node's tables know.
pub(crate) fn backends(node: &Node) -> Result<Vec<Backend<Be32>>> {
    let pin = node.run_dir().join("bpf").join(version_folder()).join("shoal_backends4");
    let backends: Array<MapData, Backend<Be32>> = Map::Array(MapData::from_pin(pin)?).try_into()?;
    let all = backends.iter().take(4096).filter_map(Result::ok);
    Ok(all.filter(|backend| backend.incarnation != 0).collect())
}

/// A mesh request in VXLAN, for a connection that nobody has.
fn forged(incarnation: u32, asked: u8, ingress: u32, to: &Node, port: u16) -> Result<Vec<u8>> {
    let [a, b, c, d] = ingress.to_be_bytes();
    let builder = PacketBuilder::ethernet2([2, asked, a, b, c, d], backend_mac(incarnation));
    let builder = builder.ipv4(CLIENT.octets(), to.address.octets(), 60);
    let builder = builder.tcp(port, Back::Tunnel.port(), 1_000_000, 65_000).ack(77);
    let mut packet = vec![8, 0, 0, 0];
    packet.extend((VNI_MESH_REQUEST << 8).to_be_bytes());
    builder.write(&mut packet, b"forged")?;
    Ok(packet)
}

/// How often the nodes have sent packets on to each other.
pub(crate) fn forwarded(lab: &Lab) -> Result<u64> {
    let of = |node: &Node| Ok(node.count(Counter::MeshForwarded)? + node.count(Counter::MeshSearched)?);
    lab.nodes.iter().map(of).sum()
}

/// From a member, whom the others believe: what it asks for ends, however it points them at one another.
pub(crate) fn forged_requests_do_not_go_in_circles(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 3, &[])?;
    let member = &lab.nodes[1];
    let known = backends(member)?.into_iter().map(|backend| backend.incarnation);
    let chosen: Vec<u32> = known.chain([0x7fff_ffff]).collect();
    let tags = lab.nodes.iter().map(|node| u32::from(node.address));
    let tags: Vec<u32> = tags.chain([0, u32::from(Ipv4Addr::BROADCAST)]).collect();
    let mut packets = Vec::new();
    for (number, incarnation) in chosen.iter().enumerate() {
        for tag in &tags {
            for asked in [0, 1, 2, 14, 15, 16, 254, 255] {
                for to in [&lab.nodes[0], &lab.nodes[2]] {
                    let port = 30_000 + number as u16 * 100 + packets.len() as u16 % 100;
                    packets.push((to, forged(*incarnation, asked, *tag, to, port)?));
                }
            }
        }
    }
    let before = forwarded(lab)?;
    as_host(&member.name, || {
        let socket = UdpSocket::bind((member.address, 0))?;
        for (to, packet) in &packets {
            socket.send_to(packet, (to.address, 4789))?;
        }
        Ok(())
    })?;
    std::thread::sleep(Duration::from_millis(300));
    let soon = forwarded(lab)?;
    std::thread::sleep(Duration::from_secs(1));
    let later = forwarded(lab)?;
    figure!(
        "{} forged requests for {} tasks: sent on {} times in all, and {} times a second later",
        packets.len(),
        chosen.len(),
        soon - before,
        later - soon
    );
    let most = packets.len() as u64 * lab.nodes.len() as u64;
    ensure!(soon - before <= most, "more than {most}");
    ensure!(later - soon < 20, "they still go round");
    Ok(())
}
