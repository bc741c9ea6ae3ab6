//! A node that doesn't answer gets no new flows long before the managers give it up.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::client::{self, Answer, anywhere};
use crate::engine::{self, Task};
use crate::figure;
use crate::lab::{self, BINARY, Lab, Node, as_client, until};
use crate::mesh::PORT;
use crate::overlay::{create_idle, create_network};
use crate::steady::Connection;
use crate::ways::Family;

/// Between two requests of a load, whether or not the former has been answered.
const GAP: Duration = Duration::from_millis(20);
/// Requests a second of a load, at least; they should be 50.
const RATE_MIN: u128 = 40;
/// How long a request may take to connect.
const LIMIT: Duration = Duration::from_secs(1);
/// Requests of a load that may be under way.
const THREADS: u32 = 60;
/// How long the loads run before and after what happens; other nodes are trusted to answer after two seconds.
const QUIET: Duration = Duration::from_secs(3);
/// How long a node is away: the managers give it up after fifteen seconds.
const AWAY: Duration = Duration::from_secs(5);
/// How long a request may still fail after a node was lost. On an idle machine it is less than one.
const NOTICED: Duration = Duration::from_secs(3);
/// How long a node that is back may be left out. It has to be found by ARP before it can answer.
const HEARD: Duration = Duration::from_secs(5);
const SUBNET: &str = "fd00:b1::/64";

/// Requests at a steady rate, each by a connection of its own, until [`Rate::finish`].
struct Rate {
    name: String,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Vec<Request>>>>,
}

struct Request {
    began: Instant,
    outcome: Result<Answer>,
}

impl Rate {
    /// Starts to ask `to` from inside of a network namespace.
    fn start(name: String, namespace: &Path, to: SocketAddr) -> Self {
        let (stop, start) = (Arc::new(AtomicBool::new(false)), Instant::now());
        let thread = |number: u32| {
            let (stop, namespace, first) = (Arc::clone(&stop), namespace.to_owned(), start + GAP * number);
            std::thread::spawn(move || lab::within(&namespace, || Ok(requests(to, first, &stop))))
        };
        let threads = (0..THREADS).map(thread).collect();
        Self { name, stop, threads }
    }

    fn finish(self) -> Result<(String, Vec<Request>)> {
        self.stop.store(true, Ordering::Relaxed);
        let mut requests = Vec::new();
        for thread in self.threads {
            requests.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        requests.sort_by_key(|request| request.began);
        Ok((self.name, requests))
    }
}

/// One thread's requests: the first at its time, the next when it is its turn again.
fn requests(to: SocketAddr, first: Instant, stop: &AtomicBool) -> Vec<Request> {
    let mut requests = Vec::new();
    let mut next = first;
    loop {
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        if stop.load(Ordering::Relaxed) {
            return requests;
        }
        let began = Instant::now();
        requests.push(Request { began, outcome: client::http_within(anywhere(to), to, "/", LIMIT) });
        next += GAP * THREADS;
    }
}

/// The published port on a node, from the client and in either family; the VIP, from a task on the node and in either family.
fn loads(node: &Node, caller: &Task, vips: [SocketAddr; 2]) -> Vec<Rate> {
    let (inside, client) = (inside(caller), lab::namespace("client"));
    let by_port = published(node).map(|to| Rate::start(to.to_string(), &client, to));
    let by_vip = vips.map(|vip| Rate::start(format!("{vip}, a VIP"), &inside, vip));
    by_port.into_iter().chain(by_vip).collect()
}

/// A task's network namespace.
fn inside(task: &Task) -> PathBuf {
    PathBuf::from(format!("/proc/{}/ns/net", task.pid))
}

fn published(node: &Node) -> [SocketAddr; 2] {
    Family::ALL.map(|family| SocketAddr::new(family.of(node), PORT))
}

/// `web`, two tasks on each node, published and on a network, and a task on the first node; the VIPs of both families.
fn create(lab: &Lab) -> Result<(Vec<Task>, Task, [SocketAddr; 2])> {
    create_network(lab, "blue", &["--ipv6", "--subnet", SUBNET])?;
    let spread = ["--network", "blue", "--replicas-max-per-node", "2"];
    let web = crate::mesh::create_web(lab, 6, &spread)?;
    let caller = create_idle(lab, "caller", &["--network", "blue", "--constraint", "node.hostname==n1"])?;
    let vips = engine::vips(lab, "web")?;
    // The ingress network's is the other.
    let (shared, of_ingress): (Vec<Ipv4Addr>, Vec<Ipv4Addr>) =
        vips.into_iter().partition(|vip| web.iter().all(|task| is_near(*vip, task.addresses.last())));
    ensure!(shared.len() == 1 && of_ingress.len() == 1, "VIPs {shared:?} and {of_ingress:?}");
    let [a, b] = [shared[0].to_bits() >> 16, shared[0].to_bits() & 0xffff].map(|half| half as u16);
    let of_v6 = Ipv6Addr::new(0xfd00, 0xb1, 0, 0, 0, 0, a, b);
    Ok((web, caller, [SocketAddr::new(shared[0].into(), 80), SocketAddr::new(of_v6.into(), 80)]))
}

/// Whether both are in a subnet of 24 bits.
fn is_near(one: Ipv4Addr, other: Option<&Ipv4Addr>) -> bool {
    other.is_some_and(|other| one.octets()[..3] == other.octets()[..3])
}

/// A UDP client with a port of its own, and the task that answers it.
struct Datagrams {
    namespace: PathBuf,
    source: SocketAddr,
    to: SocketAddr,
    task: String,
}

impl Datagrams {
    /// Those of some ports that are answered from `node`.
    fn of(node: &Node, namespace: &Path, targets: [SocketAddr; 2]) -> Result<Vec<Self>> {
        let mut found = Vec::new();
        for to in targets {
            for port in 24_000..24_012 {
                let source = SocketAddr::new(anywhere(to).ip(), port);
                let answer = lab::within(namespace, || client::udp(source, to, b"first"))?;
                if answer.node == node.name {
                    found.push(Self { namespace: namespace.to_owned(), source, to, task: answer.task });
                }
            }
        }
        Ok(found)
    }

    /// Sends until another task answers.
    fn until_moved(&self) -> Result<()> {
        until("another task answers", NOTICED, || {
            let ask = || client::udp_within(self.source, self.to, b"next", Duration::from_millis(20));
            let answer = lab::within(&self.namespace, || Ok(ask().ok()))?;
            Ok(answer.filter(|answer| answer.task != self.task))
        })
        .map(drop)
    }
}

fn seconds(from: Instant, to: Instant) -> f32 {
    to.saturating_duration_since(from).as_secs_f32()
}

fn status(node: &Node) -> Result<String> {
    let run_dir = node.run_dir();
    let mut status = node.command(BINARY);
    status
        .arg("status")
        .arg("--state-dir")
        .arg(run_dir.join("state"))
        .arg("--bpffs")
        .arg(run_dir.join("bpf"));
    lab::output(&mut status)
}

fn ensure_ready(lab: &Lab) -> Result<()> {
    let nodes = engine::get_list(lab.manager(), "/nodes")?;
    ensure!(nodes.iter().all(|node| node["Status"]["State"] == "ready"), "the managers have given a node up");
    Ok(())
}

/// What happened to a node, and when.
struct Absence<'a> {
    node: &'a Node,
    cut: Instant,
    heal: Instant,
}

impl Absence<'_> {
    /// How long after the cut a load's last failed request began, s.
    fn judge(&self, name: &str, requests: &[Request]) -> Result<f32> {
        let Self { node, cut, heal } = self;
        let failed = |request: &&Request| request.outcome.is_err();
        let mut before = requests.iter().filter(|request| request.began + LIMIT < *cut);
        ensure!(!before.any(|request| request.outcome.is_err()), "{name}: a request failed before the cut");
        let during = || requests.iter().filter(|request| (*cut..*heal).contains(&request.began));
        let rate = during().count() as u128 * 1000 / (*heal - *cut).as_millis();
        ensure!(rate > RATE_MIN / u128::from(lab::slowness()), "{name}: only {rate} requests a second");
        let last = requests.iter().filter(failed).map(|request| request.began).max();
        let noticed = seconds(*cut, last.unwrap_or(*cut));
        let is_there = |request: &&Request| {
            request.began > *heal && request.outcome.as_ref().is_ok_and(|answer| answer.node == node.name)
        };
        let first = requests.iter().find(is_there).with_context(|| format!("{name}: {node} is not back"))?;
        let back = seconds(*heal, first.began);
        figure!(
            "{name}: while {node} was away {} of {} requests failed, the last begun {noticed:.2} s after the cut; {node} \
             serves again {back:.2} s after it was healed",
            during().filter(failed).count(),
            during().count(),
        );
        Ok(noticed)
    }
}

pub(crate) fn node_cut_off_gets_no_new_flows_within_a_second_and_does_again_once_it_is_back(
    lab: &Lab,
) -> Result<()> {
    let (_, caller, vips) = create(lab)?;
    let (ingress, node) = (&lab.nodes[0], &lab.nodes[1]);
    let mut datagrams = Datagrams::of(node, &lab::namespace("client"), published(ingress))?;
    datagrams.extend(Datagrams::of(node, &inside(&caller), vips)?);
    ensure!(!datagrams.is_empty(), "no UDP flow is with {node}");
    // Connections that are idle while the node is away.
    let mut kept = Vec::new();
    for to in published(ingress).into_iter().cycle().take(24) {
        let (connection, answer) = as_client(|| Connection::open(to))?;
        if answer.node == node.name {
            kept.push((connection, answer));
        }
    }
    ensure!(!kept.is_empty(), "no connection is with {node}");
    let loads = loads(ingress, &caller, vips);
    std::thread::sleep(QUIET);

    let cut = Instant::now();
    lab.xtask(&["cut", &node.name])?;
    figure!("the cable was pulled within {:.2} s", seconds(cut, Instant::now()));
    let moved = std::thread::scope(|scope| {
        let wait =
            |one| scope.spawn(move || Datagrams::until_moved(one).map(|()| seconds(cut, Instant::now())));
        let waiting: Vec<_> = datagrams.iter().map(wait).collect();
        let ended = waiting.into_iter().map(std::thread::ScopedJoinHandle::join);
        let ended = ended.map(|ended| ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        ended.collect::<Result<Vec<f32>>>()
    });
    let told = status(ingress)?;
    std::thread::sleep(AWAY.saturating_sub(cut.elapsed()));
    ensure_ready(lab)?;
    let heal = Instant::now();
    lab.xtask(&["heal", &node.name])?;
    std::thread::sleep(HEARD * lab::slowness());
    let (mut noticed, absence) = (0.0_f32, Absence { node, cut, heal });
    for load in loads {
        let (name, requests) = load.finish()?;
        noticed = noticed.max(absence.judge(&name, &requests)?);
    }
    let moved = moved?;
    let slowest = moved.iter().copied().fold(0.0, f32::max);
    figure!("{} UDP flows went to others, the last {slowest:.2} s after the cut", moved.len());
    let limit = NOTICED * lab::slowness();
    ensure!(noticed < limit.as_secs_f32(), "requests still failed {noticed:.2} s after the cut");
    ensure!(told.lines().any(|line| line.starts_with("SILENT") && line.contains(&node.name)), "{told}");
    let told = status(ingress)?;
    ensure!(!told.contains("SILENT"), "{told}");
    for (connection, answer) in &mut kept {
        let after = as_client(|| connection.ask()).context("a connection that was idle meanwhile")?;
        ensure!(after.task == answer.task, "{after:?} instead of {answer:?}");
    }
    figure!("{} connections with {node}, idle while it was away, go on", kept.len());
    lab.until_ready(lab.nodes.len())
}

pub(crate) fn node_whose_agent_is_dead_goes_on_getting_new_flows(lab: &Lab) -> Result<()> {
    let (_, caller, vips) = create(lab)?;
    let node = &lab.nodes[2];
    let loads = loads(&lab.nodes[0], &caller, vips);
    std::thread::sleep(QUIET);
    let killed = Instant::now();
    lab.xtask(&["kill", &node.name])?;
    std::thread::sleep(QUIET);
    let told = status(&lab.nodes[0])?;
    let loads = loads.into_iter().map(Rate::finish).collect::<Result<Vec<_>>>()?;
    lab.xtask(&["start", &node.name])?;
    for (name, requests) in loads {
        let late = requests.iter().filter(|request| request.began > killed + QUIET / 2);
        let answers: Vec<&Answer> = late.filter_map(|request| request.outcome.as_ref().ok()).collect();
        let there = answers.iter().filter(|answer| answer.node == node.name).count();
        let errors: Vec<_> = requests.iter().filter_map(|request| request.outcome.as_ref().err()).collect();
        figure!("{name}: {there} of {} answers from {node}, {} requests failed", answers.len(), errors.len());
        ensure!(errors.is_empty(), "{errors:?}");
        ensure!(there * 5 > answers.len(), "{node} got less than its share");
    }
    ensure!(!told.contains("SILENT"), "{told}");
    lab.until_ready(lab.nodes.len())
}
