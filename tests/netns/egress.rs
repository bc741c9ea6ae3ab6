//! The way out: under which address tasks are seen outside, and what no port is left for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::client::anywhere;
use crate::engine::{self, Task};
use crate::figure;
use crate::lab::{self, BINARY, CLIENT, Lab, Node, as_client, until};
use crate::overlay::create_idle;
use crate::raw::Sender;
use crate::ways::Family;

/// The addresses that the service's tasks are to send under; the first is nobody's.
const LISTED: &str = "198.18.0.202,198.18.0.201,fd00:c6::201";
/// Those of them that a node is given.
const FIXED: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 18, 0, 201)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xc6, 0, 0, 0, 0, 0, 0x201)),
];
/// How long a node may take to follow its addresses, its tasks or its rules; to tell the managers of its addresses, it waits
/// for 5 s.
const LIMIT: Duration = Duration::from_secs(15);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// Outside of the swarm: answers every datagram with the address that it came from, and remembers how many came from where.
struct Outside {
    port: u16,
    seen: Arc<Mutex<BTreeMap<IpAddr, u64>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Outside {
    fn start() -> Result<Self> {
        let socket = as_client(|| Ok(UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let port = socket.local_addr()?.port();
        let (seen, stop) = (Arc::<Mutex<BTreeMap<IpAddr, u64>>>::default(), Arc::new(AtomicBool::new(false)));
        let (noted, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut data = [0; 64];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((_, from)) = socket.recv_from(&mut data) else { continue };
                let source = from.ip().to_canonical();
                *noted.lock().unwrap_or_else(PoisonError::into_inner).entry(source).or_default() += 1;
                // Who can't be answered is seen all the same.
                let _ = socket.send_to(source.to_string().as_bytes(), from);
            }
        });
        Ok(Self { port, seen, stop, thread: Some(thread) })
    }

    /// The sources seen since the last look, with how many came from each.
    fn take(&self) -> BTreeMap<IpAddr, u64> {
        std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn address(&self, family: Family) -> SocketAddr {
        SocketAddr::new(family.client(), self.port)
    }

    /// Which address a task is seen under; an error if nothing gets out, or back.
    fn ask(&self, task: &Task, family: Family) -> Result<IpAddr> {
        let to = self.address(family);
        task.inside(|| {
            let socket = UdpSocket::bind(anywhere(to))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send_to(b"who am I", to)?;
            let mut data = [0; 64];
            let len = socket.recv(&mut data).context("no answer")?;
            Ok(std::str::from_utf8(&data[..len])?.parse()?)
        })
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A task that sends all the time, in both families, each datagram a flow of its own, and one more flow that stays.
struct Talker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Talker {
    fn start(task: &Task, outside: &Outside) -> Self {
        let targets = Family::ALL.map(|family| outside.address(family));
        let (task, stop) = (task.clone(), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            task.inside(|| {
                let bind = |to: SocketAddr| UdpSocket::bind(anywhere(to));
                let lasting = [bind(targets[0])?, bind(targets[1])?];
                while !stopped.load(Ordering::Relaxed) {
                    for (to, lasting) in targets.iter().zip(&lasting) {
                        // What the node does not let out may come back as an error.
                        let _ = bind(*to)?.send_to(b"new", to);
                        let _ = lasting.send_to(b"known", to);
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                Ok(())
            })
        });
        Self { stop, thread }
    }

    fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Addresses that a node has for a while.
struct Extra<'n>(&'n Node);

impl<'n> Extra<'n> {
    fn add(node: &'n Node) -> Result<Self> {
        let extra = Self(node);
        for addr in FIXED {
            extra.ip("add", addr)?;
        }
        Ok(extra)
    }

    fn ip(&self, verb: &str, addr: IpAddr) -> Result<()> {
        let prefix = if addr.is_ipv4() { 24 } else { 64 };
        let mut command = self.0.command("ip");
        command.args(["address", verb, &format!("{addr}/{prefix}"), "dev", "eth0"]);
        if verb == "add" && addr.is_ipv6() {
            // Or the kernel prefers the newer address for others as well.
            command.args(["nodad", "preferred_lft", "0"]);
        }
        lab::output(&mut command).map(drop)
    }
}

impl Drop for Extra<'_> {
    fn drop(&mut self) {
        for addr in FIXED {
            let _ = self.ip("del", addr);
        }
    }
}

/// What a node tells of with `shoal WORD`.
fn tell(node: &Node, words: &[&str]) -> Result<String> {
    lab::output(node.command(BINARY).args(words).arg("--bpffs").arg(node.run_dir().join("bpf")))
}

/// How many packets a node has lost for a reason, as `shoal drops` tells.
fn lost(node: &Node, reason: &str) -> Result<u64> {
    let told: BTreeMap<String, Value> = serde_json::from_str(&tell(node, &["drops", "--json"])?)?;
    Ok(told.get(reason).and_then(|ended| ended["packets"].as_u64()).unwrap_or_default())
}

fn status(node: &Node) -> Result<String> {
    let state_dir = node.state_dir().display().to_string();
    tell(node, &["status", "--state-dir", &state_dir])
}

/// Whether an address is of those that mean a task on its node alone.
fn is_alias(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.segments()[..4] == [0xfd73, 0x686f, 0x616c, 1],
    }
}

pub(crate) fn tasks_with_fixed_addresses_send_under_no_other(lab: &Lab) -> Result<()> {
    let node = &lab.nodes[1];
    let outside = Outside::start()?;
    let label = format!("shoal.egress={LISTED}");
    let idle = ["shoal/exec", "sleep", "1000000"];
    let create = ["service", "create", "--detach", "--name", "fixed", "--label", &label];
    engine::docker_ok(lab.manager(), &[&create[..], &idle].concat())?;
    let missing = "no suitable node (egress address (label shoal.egress) not available on 3 nodes)";
    until("nobody has the address", LIMIT, || {
        let shown = engine::docker_ok(lab.manager(), &["service", "ps", "--no-trunc", "fixed"])?;
        Ok(shown.contains(missing).then_some(()))
    })?;

    let extra = Extra::add(node)?;
    let fixed = engine::until_running(lab, "fixed", 1)?.remove(0);
    ensure!(fixed.node == *node, "on {}, which does not have the address", fixed.node);
    let on_node = format!("node.hostname=={node}");
    let free = create_idle(lab, "free", &["--constraint", &on_node])?;
    let others_go_on = || -> Result<()> {
        for family in Family::ALL {
            let seen = outside.ask(&free, family)?;
            ensure!(seen == family.of(node), "{family}: a task without a fixed address is seen as {seen}");
        }
        Ok(())
    };
    for (family, addr) in Family::ALL.into_iter().zip(FIXED) {
        let seen = outside.ask(&fixed, family)?;
        figure!("{family}: with the label a task on {node} is seen as {seen}");
        ensure!(seen == addr, "{family}: seen as {seen}");
    }
    others_go_on()?;
    ensure!(status(node)?.contains("tasks of fixed send under 198.18.0.201\n"), "{}", status(node)?);

    // An agent that dies and comes back.
    let talker = Talker::start(&fixed, &outside);
    outside.take();
    lab.xtask(&["kill", &node.name])?;
    std::thread::sleep(Duration::from_secs(1));
    lab.xtask(&["start", &node.name])?;
    lab.until_ready(lab.nodes.len())?;
    let seen = outside.take();
    figure!("while the agent was killed and came back, the outside saw {seen:?}");
    ensure!(seen.keys().eq(FIXED.iter()), "seen: {seen:?}");

    // Rules that somebody removes. Without any, nothing is translated, and no router takes such a source.
    for family in ["ip", "ip6"] {
        lab::output(node.command("nft").args(["delete", "table", family, "shoal"]))?;
    }
    let mut sources = BTreeSet::new();
    until("the rules come back", LIMIT, || {
        let asked = Family::ALL.map(|family| outside.ask(&fixed, family).ok());
        sources.extend(outside.take().into_keys());
        Ok((asked == FIXED.map(Some)).then_some(()))
    })?;
    figure!("while rules were removed and came back, the outside saw {sources:?}");
    sources.retain(|source| !FIXED.contains(source) && !is_alias(*source));
    ensure!(sources.is_empty(), "seen: {sources:?}");
    outside.take();
    std::thread::sleep(Duration::from_millis(500));
    let seen = outside.take();
    ensure!(seen.keys().eq(FIXED.iter()), "seen: {seen:?}");

    // The addresses go elsewhere.
    let dropped = lost(node, "egress_no_address")?;
    for addr in FIXED {
        extra.ip("del", addr)?;
    }
    until("the node notices", LIMIT, || Ok((lost(node, "egress_no_address")? > dropped).then_some(())))?;
    until("both families are dropped", LIMIT, || {
        outside.take();
        std::thread::sleep(Duration::from_millis(100));
        Ok(outside.take().is_empty().then_some(()))
    })?;
    talker.stop()?;
    let dropped = lost(node, "egress_no_address")?;
    for family in Family::ALL {
        ensure!(outside.ask(&fixed, family).is_err(), "{family}: a task without its address got out");
    }
    let told = lost(node, "egress_no_address")? - dropped;
    figure!("without the addresses nothing is seen: {:?}; 2 sent, {told} counted", outside.take());
    ensure!(told == 2 && outside.take().is_empty(), "2 were sent, {told} counted");
    let shown = status(node)?;
    let words = "tasks of fixed are to send under 198.18.0.202, 198.18.0.201, NOT HERE: what they send to the outside by IPv4";
    ensure!(shown.contains(words), "{shown}");
    others_go_on()?;

    // And come back: to the task that is there still.
    for addr in FIXED {
        extra.ip("add", addr)?;
    }
    for (family, addr) in Family::ALL.into_iter().zip(FIXED) {
        until("the task gets out again", LIMIT, || {
            Ok(outside.ask(&fixed, family).is_ok_and(|seen| seen == addr).then_some(()))
        })?;
    }
    ensure!(engine::running(lab, "fixed")?[0].id == fixed.id, "the task was replaced");
    Ok(())
}

/// The ports that flows leave by.
const PORTS: std::ops::RangeInclusive<u16> = 1024..=u16::MAX;
/// How many datagrams are sent in a row: queues are longer than that.
const ROW: u16 = 64;

/// Sends one datagram from each of [`PORTS`] of a task.
fn from_every_port(task: &Task, to: SocketAddrV4) -> Result<u64> {
    let from = task.address()?;
    task.inside(|| {
        let sender = Sender::open()?;
        let mut sent = 0;
        for port in PORTS {
            let datagram = datagram(SocketAddrV4::new(from, port), to);
            while !sender.send(&datagram, *to.ip())? {
                std::thread::sleep(Duration::from_millis(1));
            }
            sent += 1;
            if port % ROW == 0 {
                std::thread::sleep(Duration::from_micros(500));
            }
        }
        Ok(sent)
    })
}

/// An empty datagram, without a checksum, as IPv4 lets it be.
fn datagram(from: SocketAddrV4, to: SocketAddrV4) -> [u8; 28] {
    let mut packet = [0; 28];
    packet[0] = 0x45;
    packet[8] = 64;
    packet[9] = 17;
    packet[12..16].copy_from_slice(&from.ip().octets());
    packet[16..20].copy_from_slice(&to.ip().octets());
    packet[20..22].copy_from_slice(&from.port().to_be_bytes());
    packet[22..24].copy_from_slice(&to.port().to_be_bytes());
    packet[25] = 8;
    packet
}

pub(crate) fn flows_that_no_port_is_left_for_are_counted(lab: &Lab) -> Result<()> {
    let node = &lab.nodes[1];
    let on_node = format!("node.hostname=={node}");
    let first = create_idle(lab, "first", &["--constraint", &on_node])?;
    let second = create_idle(lab, "second", &["--constraint", &on_node])?;
    let (full, other) = (Outside::start()?, Outside::start()?);
    let tracked = |name: &str| -> Result<u64> {
        let text =
            lab::output(node.command("cat").arg(format!("/proc/sys/net/netfilter/nf_conntrack_{name}")))?;
        Ok(text.trim().parse()?)
    };
    let ports = PORTS.len() as u64;
    ensure!(
        tracked("max")? > 2 * ports,
        "this kernel tracks too few flows: raise net.netfilter.nf_conntrack_max"
    );

    let to = SocketAddrV4::new(CLIENT, full.port);
    // A datagram that was lost on its way has another try: known flows are only kept alive.
    until("every port is taken", LIMIT, || {
        from_every_port(&first, to)?;
        Ok((tracked("count")? >= ports).then_some(()))
    })?;
    let before = lost(node, "egress_no_port")?;
    full.take();
    let sent = from_every_port(&second, to)?;
    let told = lost(node, "egress_no_port")? - before;
    std::thread::sleep(Duration::from_millis(200));
    let arrived: u64 = full.take().values().sum();
    figure!(
        "{ports} ports taken by one task; of another's {sent} datagrams {arrived} arrived, {told} are counted as lost"
    );
    ensure!(sent == ports && arrived + told == sent && told > 0, "not each is accounted for");
    ensure!(tell(node, &["drops"])?.contains("egress_no_port"), "{}", tell(node, &["drops"])?);

    let seen = other.ask(&second, Family::V4)?;
    ensure!(seen == node.address, "another destination sees {seen}");
    for task in [&first, &second] {
        ensure!(full.ask(task, Family::V6)? == node.address6, "the other family is not affected");
    }
    ensure!(lost(node, "egress_no_port")? == before + told, "what got out was counted");
    Ok(())
}
