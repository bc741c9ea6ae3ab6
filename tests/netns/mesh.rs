//! A published port, from the client outside.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::capture::Capture;
use crate::client::{self, Answer};
use crate::engine::{self, Task};
use crate::figure;
use crate::lab::{self, CLIENT, Lab, ROUTED_CLIENT, as_client, command_in, on_client, until};

/// Requests over all nodes, each from a port of its own.
const REQUESTS: u16 = 3000;
/// The first of these ports.
const FIRST_PORT: u16 = 20_000;
/// The service's published port.
pub(crate) const PORT: u16 = 8080;
/// How far the shares of tasks may be apart, in percent of the largest.
const SPREAD_MAX: u32 = 25;
const DOWNLOAD_BYTES: u32 = 100_000_000;
const UPLOAD_BYTES: u32 = 100_000_000;
/// A run with so many failures is over: each takes seconds.
const FAILURES_MAX: usize = 20;

/// Creates `web` with `replicas` tasks, published for TCP and UDP, and waits until every node answers.
pub(crate) fn create_web(lab: &Lab, replicas: usize, arguments: &[&str]) -> Result<Vec<Task>> {
    let count = replicas.to_string();
    let publish = ["--replicas", &count, "--publish", "8080:80", "--publish", "8080:80/udp"];
    let tasks = engine::create(lab, "web", replicas, &[&publish[..], arguments, &["shoal/whoami"]].concat())?;
    until_every_node_answers(lab)?;
    Ok(tasks)
}

/// Waits until a request to each node is answered: its maps hold what the manager knows.
pub(crate) fn until_every_node_answers(lab: &Lab) -> Result<()> {
    for target in targets(lab) {
        until(&format!("{target} answers"), Duration::from_secs(10), || {
            Ok(as_client(|| client::http(any(CLIENT), target, "/")).ok())
        })?;
    }
    Ok(())
}

/// The published port on every node.
pub(crate) fn targets(lab: &Lab) -> Vec<SocketAddrV4> {
    lab.nodes.iter().map(|node| SocketAddrV4::new(node.address, PORT)).collect()
}

/// Any port of an address.
pub(crate) fn any(address: Ipv4Addr) -> SocketAddrV4 {
    SocketAddrV4::new(address, 0)
}

pub(crate) fn http_reaches_every_task_by_every_node_with_the_clients_address(lab: &Lab) -> Result<()> {
    create_web(lab, 3, &[])?;
    ask_by_every_node(lab, |source, to| client::http(source, to, "/"))
}

pub(crate) fn udp_reaches_every_task_by_every_node_with_the_clients_address(lab: &Lab) -> Result<()> {
    create_web(lab, 3, &[])?;
    ask_by_every_node(lab, |source, to| client::udp(source, to, b"shoal"))
}

fn ask_by_every_node(lab: &Lab, ask: fn(SocketAddrV4, SocketAddrV4) -> Result<Answer>) -> Result<()> {
    let targets = targets(lab);
    let started = Instant::now();
    let (mut answers, mut errors) = (Vec::new(), Vec::new());
    as_client(|| {
        for (port, to) in (FIRST_PORT..FIRST_PORT + REQUESTS).zip(targets.iter().cycle()) {
            let source = SocketAddrV4::new(CLIENT, port);
            match ask(source, *to) {
                Ok(answer) if answer.client == source.to_string() => answers.push(answer),
                Ok(answer) => errors.push(format!("{to} saw {} for {source}", answer.client)),
                Err(error) => errors.push(format!("{error:#}")),
            }
            if errors.len() == FAILURES_MAX {
                break;
            }
        }
        Ok(())
    })?;
    let seconds = started.elapsed().as_secs_f32();
    let (shares, spread) = client::shares(answers.iter().map(|answer| answer.task.as_str()));
    figure!(
        "{} answers over {} nodes in {seconds:.1} s, {} failed",
        answers.len(),
        targets.len(),
        errors.len()
    );
    figure!("tasks' shares {shares:?}, {spread} % apart");
    ensure!(errors.is_empty(), "{} failed: {}", errors.len(), errors[..errors.len().min(3)].join("; "));
    ensure!(shares.len() == 3, "{} of 3 tasks were reached", shares.len());
    ensure!(spread <= SPREAD_MAX, "the shares are more than {SPREAD_MAX} % apart");
    Ok(())
}

pub(crate) fn client_behind_a_router_is_served_and_seen(lab: &Lab) -> Result<()> {
    create_web(lab, 2, &[])?;
    for to in targets(lab).into_iter().cycle().take(30) {
        let answer = as_client(|| client::http(any(ROUTED_CLIENT), to, "/"))?;
        ensure!(answer.client.starts_with(&format!("{ROUTED_CLIENT}:")), "{to} saw {}", answer.client);
        let answer = as_client(|| client::udp(any(ROUTED_CLIENT), to, b"routed"))?;
        ensure!(answer.client.starts_with(&format!("{ROUTED_CLIENT}:")), "{to} saw {} (UDP)", answer.client);
    }
    Ok(())
}

/// To the task all these connections look the same, and replies have to leave as from the address last dialled.
pub(crate) fn one_source_port_dials_the_nodes_in_turn(lab: &Lab) -> Result<()> {
    create_web(lab, 1, &["--constraint", "node.hostname==n1"])?;
    let source = SocketAddrV4::new(CLIENT, 23_900);
    for (turn, to) in (1..).zip(targets(lab).into_iter().cycle().take(12)) {
        let started = Instant::now();
        as_client(|| client::touch(source, to)).with_context(|| format!("turn {turn}"))?;
        ensure!(started.elapsed() < Duration::from_millis(900), "turn {turn} took a retransmission");
    }
    Ok(())
}

/// The same for a socket of the client that talks to several nodes: each answers under its own address.
pub(crate) fn one_socket_asks_the_nodes_in_turn(lab: &Lab) -> Result<()> {
    create_web(lab, 1, &["--constraint", "node.hostname==n1"])?;
    let source = SocketAddrV4::new(CLIENT, 23_901);
    for (turn, to) in (1..).zip(targets(lab).into_iter().cycle().take(12)) {
        let answer =
            as_client(|| client::udp(source, to, b"turn")).with_context(|| format!("turn {turn}"))?;
        ensure!(answer.client.starts_with(&format!("{CLIENT}:")), "turn {turn}: {to} saw {}", answer.client);
    }
    Ok(())
}

pub(crate) fn datagrams_of_every_size_come_back_unchanged(lab: &Lab) -> Result<()> {
    create_web(lab, 1, &["--constraint", "node.hostname==n1"])?;
    // By the task's own node and by another; up to what fits the overlay with headers and the echo's own line.
    for to in targets(lab).into_iter().take(2) {
        for len in [0, 1, 2, 511, 512, 1300] {
            let payload: Vec<u8> = (0..len).map(|at: u32| (at % 251) as u8).collect();
            as_client(|| client::udp(any(CLIENT), to, &payload))?;
        }
    }
    Ok(())
}

pub(crate) fn download_by_a_node_without_the_task_is_intact(lab: &Lab) -> Result<()> {
    create_web(lab, 1, &["--constraint", "node.hostname==n1"])?;
    download(lab, "offloads on")?;
    let features = ["rx", "tx", "sg", "tso", "gso", "gro"];
    set_features(&features, "off")?;
    let without = download(lab, "offloads off");
    set_features(&features, "on")?;
    without
}

fn download(lab: &Lab, how: &str) -> Result<()> {
    // n1 has the task: its way is the short one; n2 passes everything on to it and back.
    for node in &lab.nodes[..2] {
        let started = Instant::now();
        as_client(|| client::download(SocketAddrV4::new(node.address, PORT), DOWNLOAD_BYTES as usize))?;
        let seconds = started.elapsed().as_secs_f64();
        let megabits = f64::from(DOWNLOAD_BYTES) * 8.0 / seconds / 1e6;
        figure!(
            "{DOWNLOAD_BYTES} bytes by {node}, client's {how}: {seconds:.2} s, {megabits:.0} Mbit/s, each byte right"
        );
    }
    Ok(())
}

fn set_features(features: &[&str], value: &str) -> Result<()> {
    let mut command = on_client("ethtool");
    command.args(["-K", "eth0"]).args(features.iter().flat_map(|feature| [*feature, value]));
    lab::output(&mut command).map(drop)
}

/// A server that checks what it gets as [`client::download`] does, and says how much was right.
pub(crate) const SINK: &str = "
import socket, socketserver
PERIOD = bytes(range(251))
class Sink(socketserver.BaseRequestHandler):
    def handle(self):
        offset = 0
        while True:
            part = self.request.recv(1 << 16)
            if not part:
                break
            start = offset % 251
            if part != (PERIOD * (len(part) // 251 + 2))[start:start + len(part)]:
                self.request.sendall(b'wrong from %d on' % offset)
                return
            offset += len(part)
        self.request.sendall(b'%d' % offset)
class Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
Server(('::', 80), Sink).serve_forever()
";

/// The test's own python: a task's PATH is shorter.
pub(crate) fn python() -> Result<String> {
    let printed = lab::output(Command::new("python3").args(["-c", "import sys; print(sys.executable)"]))?;
    Ok(printed.trim().to_owned())
}

pub(crate) fn upload_by_a_node_without_the_task_is_intact(lab: &Lab) -> Result<()> {
    let arguments = ["--publish", "8080:80", "--constraint", "node.hostname==n1", "shoal/exec"];
    engine::create(lab, "sink", 1, &[&arguments[..], &[&python()?, "-c", SINK]].concat())?;
    for to in targets(lab).into_iter().take(2) {
        until(&format!("{to} answers"), Duration::from_secs(10), || {
            Ok(as_client(|| client::upload(to, 0)).ok())
        })?;
        let started = Instant::now();
        let got = as_client(|| client::upload(to, UPLOAD_BYTES as usize))?;
        let megabits = f64::from(UPLOAD_BYTES) * 8.0 / started.elapsed().as_secs_f64() / 1e6;
        figure!("{UPLOAD_BYTES} bytes up by {to}: {megabits:.0} Mbit/s, the server has {got} right");
        ensure!(got == UPLOAD_BYTES.to_string(), "{got}");
    }
    Ok(())
}

/// The client's packets reach the task as from the client; replies leave as from the address that the client dialled;
/// checksums are right, whoever fills them in.
pub(crate) fn captures_show_the_client_and_the_dialled_address(lab: &Lab) -> Result<()> {
    let tasks = create_web(lab, 1, &["--constraint", "node.hostname==n1"])?;
    let task = &tasks[0];
    let address = task.addresses[0];
    // What leaves the switch has its checksums filled in, as on a wire; by default only towards the nodes.
    lab::output(command_in("sw", "ethtool").args(["-K", "client", "tx", "off"]))?;
    for offloads in ["on", "off"] {
        lab::output(task.command("ethtool").args(["-K", "eth0", "tx", offloads]))?;
        for (port, to) in (23_000..).zip(targets(lab)) {
            let source = SocketAddrV4::new(CLIENT, port + if offloads == "on" { 0 } else { 100 });
            let request = format!("{CLIENT}.{} > {address}.80", source.port());
            let reply = format!("{}.{PORT} > {CLIENT}.{}", to.ip(), source.port());
            for protocol in ["tcp", "udp"] {
                let in_task = Capture::start(task.command("tcpdump"), "eth0", &["-Q", "in", protocol])?;
                let on_wire =
                    Capture::start(command_in("sw", "tcpdump"), "client", &["-Q", "out", protocol])?;
                as_client(|| match protocol {
                    "tcp" => client::http(source, to, "/"),
                    _ => client::udp(source, to, b"captured"),
                })?;
                for (capture, pattern) in [(in_task, &request), (on_wire, &reply)] {
                    let seen = capture.finish(std::slice::from_ref(pattern))?;
                    ensure!(
                        !seen.contains("incorrect") && !seen.contains("bad udp cksum"),
                        "checksums:\n{seen}"
                    );
                    ensure!(
                        seen.contains("(correct)") || seen.contains("udp sum ok"),
                        "no checksum:\n{seen}"
                    );
                }
            }
            if offloads == "on" {
                figure!("task got {request}; the client got {reply}; checksums correct");
            }
        }
    }
    lab::output(command_in("sw", "ethtool").args(["-K", "client", "tx", "on"]))?;
    Ok(())
}

/// Between nodes as well: what is inside VXLAN has right checksums and the client's source.
pub(crate) fn underlay_carries_the_clients_packet_unchanged(lab: &Lab) -> Result<()> {
    create_web(lab, 1, &["--constraint", "node.hostname==n1"])?;
    let to = SocketAddrV4::new(lab.nodes[1].address, PORT);
    let source = SocketAddrV4::new(CLIENT, 23_500);
    let capture = Capture::start(command_in("sw", "tcpdump"), "n1", &["-Q", "out", "udp", "port", "4789"])?;
    as_client(|| client::http(source, to, "/"))?;
    let inner = format!("{CLIENT}.{} > {}.{PORT}", source.port(), to.ip());
    let seen = capture.finish(&[format!("{}.", to.ip()), "VXLAN".to_owned(), inner.clone()])?;
    ensure!(!seen.contains("incorrect"), "checksums:\n{seen}");
    figure!("in VXLAN from {} to n1: {inner}", lab.nodes[1]);
    Ok(())
}

pub(crate) fn unpublished_port_is_the_hosts_own(lab: &Lab) -> Result<()> {
    create_web(lab, 1, &[])?;
    let refused = as_client(|| {
        let to = SocketAddrV4::new(lab.nodes[0].address, PORT + 1);
        Ok(client::http(any(CLIENT), to, "/").err().map(|error| format!("{error:#}")))
    })?;
    ensure!(refused.as_ref().is_some_and(|error| error.contains("refused")), "{refused:?}");
    let ping =
        lab::output(on_client("ping").args(["-c", "1", "-W", "2", &lab.nodes[0].address.to_string()]))?;
    ensure!(ping.contains(" 1 received"), "{ping}");
    Ok(())
}
