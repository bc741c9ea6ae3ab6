//! Hosts with agents and managers, clients, and everything that goes wrong, in one thread under a clock of its own, as a seed
//! says: partitions (one-way and flapping too), delays, reordering, loss, processes that die and disks that forget then what
//! was not synced, disks that are full or fail to sync, wall clocks that jump, nodes that are promoted and demoted, leaders
//! that change while agents resume. Invariants hold all the time; the clients' histories are linearizable; and once nothing
//! is wrong any longer, it serves, and every node has what the managers have.
//!
//! Each seed runs in a process of its own and goes the same way each time. `SHOAL_SEEDS=10000` runs so many; one that fails
//! says which command repeats it. `SHOAL_MUTANT` puts a defect into the cluster, which must be found.

mod agent;
mod clients;
mod faults;
mod hosts;
mod observer;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_api::id::NodeId;
use rand::RngExt as _;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use self::clients::Clients;
use self::hosts::Simulation;
use super::net::Wire;
use super::sys;
use crate::clock::simulated;
use crate::cluster::Cluster;
use crate::raft::{RaftId, Replica};
use crate::session::Server;

/// Seeds in a usual run.
const SEEDS: u64 = 200;
/// Seeds within which each defect is found: most show in the first ones, a disk that forgets in one of some five.
const MUTANT_SEEDS: u64 = 100;
/// Faults of a seed.
const STEPS: u32 = 12;
/// How long it may take until it serves, and until all is as it should be, once nothing is wrong any longer.
const HEALED: Duration = Duration::from_secs(30);
const SETTLED: Duration = Duration::from_secs(90);
const CLIENTS: usize = 3;
const WORKERS: u8 = 2;
/// How long a seed may take, as time passes for people: one that gets nowhere is found, too.
const SEED_LIMIT: Duration = Duration::from_mins(20);
/// Seeds that may fail before the others are left alone.
const FAILURES_MAX: usize = 10;
/// Lines shown of what a seed that failed said.
const LINES: usize = 60;

const SEED: &str = "SHOAL_SEED";
const MUTANT: &str = "SHOAL_MUTANT";

/// A defect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mutant {
    /// Disks say that they synced before they did.
    CarelessDisk,
    /// Managers answer reads with what they happen to know.
    StaleReads,
    /// The allocator does not look whether somebody has an address.
    AddressTwice,
    /// Addresses don't rest until all nodes let go of them.
    NoRest,
    /// A change of the table gets lost on its way to an agent.
    LostChange,
}

impl Mutant {
    const ALL: [Self; 5] =
        [Self::CarelessDisk, Self::StaleReads, Self::AddressTwice, Self::NoRest, Self::LostChange];

    /// Words of whatever finds it: another failure of a seed is no find.
    fn signs(self) -> &'static [&'static str] {
        match self {
            Self::CarelessDisk => {
                &["was acknowledged, and is gone", "what was seen of service", "'s and, on"]
            }
            Self::StaleReads => &["what was seen of service"],
            Self::AddressTwice => &["is wrong in itself", "is given twice"],
            Self::NoRest => &["sends to"],
            Self::LostChange => &["is not what the managers have", "does not fit"],
        }
    }

    fn from_environment() -> Option<Self> {
        let name = std::env::var(MUTANT).ok()?;
        Some(Self::ALL.into_iter().find(|it| format!("{it:?}") == name).expect("there is such a mutant"))
    }
}

fn node(number: u8) -> NodeId {
    NodeId::from(format!("n{number}"))
}

/// The node that listens at an address.
fn node_at(addr: SocketAddr) -> NodeId {
    match addr {
        SocketAddr::V4(addr) => node(addr.ip().octets()[3]),
        SocketAddr::V6(_) => panic!("no node listens at {addr}"),
    }
}

/// A manager's process.
struct Running {
    raft: RaftId,
    cluster: Cluster,
    replica: Replica,
    server: Arc<Server>,
    wire: Arc<Wire>,
    duties: AbortHandle,
    sessions: RefCell<Vec<AbortHandle>>,
    ahead_ns: Rc<Cell<i64>>,
}

/// Those that run.
type Managers = Rc<RefCell<BTreeMap<NodeId, Running>>>;

/// One seed. Something that depends on all that happened.
async fn simulate(seed: u64, mutant: Option<Mutant>) -> (u64, u64) {
    simulated::begin();
    let mut simulation = Simulation::new(seed, mutant);
    let managers = if seed.is_multiple_of(3) { 5 } else { 3 };
    simulation.found(managers, WORKERS).await;
    // Some take longer, so that nodes are given up.
    let pace = if seed % 8 == 4 { 10 } else { 1 };
    let clients = Clients::start(CLIENTS, seed, &simulation.managers, pace, mutant);
    for _ in 0..STEPS {
        simulation.fault().await;
        let time = Duration::from_millis(simulation.rng.random_range(20..500) * pace);
        simulation.pass(time).await;
    }
    simulation.mend().await;
    let healed = Instant::now() + HEALED;
    while !simulation.serves().await {
        assert!(Instant::now() < healed, "it does not serve after {HEALED:?}: {:#?}", simulation.seen());
        simulation.pass(Duration::from_millis(50)).await;
    }
    clients.go_on_until(Instant::now() + Duration::from_millis(500)).await;
    let settled = Instant::now() + SETTLED;
    while let Some(problem) = simulation.unsettled() {
        assert!(
            Instant::now() < settled,
            "it does not settle within {SETTLED:?}: {problem}\n{}",
            simulation.details()
        );
        simulation.pass(Duration::from_millis(100)).await;
    }
    let leader = simulation.leader().and_then(|leader| simulation.cluster(&leader)).unwrap();
    let last = leader.linearizable().await.expect("it serves");
    clients.check(&last);
    assert!(simulation.observer.compared() > 0, "no agent's table was looked at");
    simulation.net.trace()
}

/// Runs one seed, in a process of its own.
#[test]
fn seed() {
    let Some(seed) = number(SEED) else { return };
    let mutant = Mutant::from_environment();
    let run = move || {
        sys::seed(seed);
        crate::testing::give_addresses_twice(mutant == Some(Mutant::AddressTwice));
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let simulated = async { timeout(Duration::from_hours(1), simulate(seed, mutant)).await };
        let ended = tokio::task::LocalSet::new().block_on(&runtime, simulated);
        let (messages, trace) = ended.expect("it comes to its end");
        println!("\nseed {seed}: {messages} messages, {trace:016x}");
    };
    // A thread that has drawn nothing at random yet.
    if let Err(failed) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(failed);
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().expect("it is a number"))
}

/// What a seed says, and whether it passes.
fn run(seed: u64, mutant: Option<Mutant>) -> Result<String, String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "raft::tests::simulation::seed", "--nocapture"]);
    command.env(SEED, seed.to_string()).env_remove(MUTANT).env("RUST_BACKTRACE", "0").stdin(Stdio::null());
    command.envs(mutant.map(|mutant| (MUTANT, format!("{mutant:?}"))));
    let output = tempfile::NamedTempFile::new().unwrap();
    let append = || std::fs::OpenOptions::new().append(true).open(output.path()).unwrap();
    let mut child = command.stdout(append()).stderr(append()).spawn().unwrap();
    let since = std::time::Instant::now();
    let passed = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status.success(),
            None if since.elapsed() > SEED_LIMIT => {
                let _ = child.kill();
                let _ = child.wait();
                break false;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let said = std::fs::read_to_string(output.path()).unwrap();
    let trace = said.lines().find(|line| line.starts_with("seed ")).map(str::to_owned);
    trace.filter(|_| passed).ok_or(said)
}

#[test]
fn whatever_goes_wrong_nothing_acknowledged_is_lost_and_it_heals() {
    let seeds = number("SHOAL_SEEDS").unwrap_or(SEEDS);
    let (since, next) = (std::time::Instant::now(), AtomicU64::new(0));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds || failed.lock().unwrap().len() >= FAILURES_MAX {
                        return;
                    }
                    if let Err(said) = run(seed, None) {
                        let lines: Vec<&str> = said.lines().take(LINES).collect();
                        eprintln!(
                            "{}\nseed {seed} failed: {SEED}={seed} cargo test -p control --lib \
                             raft::tests::simulation::seed -- --exact --nocapture",
                            lines.join("\n")
                        );
                        failed.lock().unwrap().push(seed);
                    }
                    if seed % 500 == 499 {
                        eprintln!("{} seeds after {:.0} s", seed + 1, since.elapsed().as_secs_f32());
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "seeds {failed:?} failed");
    println!("{seeds} seeds in {:.1} s on {threads} threads", since.elapsed().as_secs_f32());
}

#[test]
fn a_seed_goes_the_same_way_each_time() {
    for seed in [0, 1, 4] {
        assert_eq!(run(seed, None).unwrap(), run(seed, None).unwrap());
    }
}

/// The first seed that finds a defect.
fn found(mutant: Mutant) -> Option<u64> {
    let is_sign = |said: &String| mutant.signs().iter().any(|sign| said.contains(sign));
    (0..MUTANT_SEEDS).find(|seed| run(*seed, Some(mutant)).is_err_and(|said| is_sign(&said)))
}

#[test]
fn each_defect_is_found() {
    std::thread::scope(|scope| {
        for mutant in Mutant::ALL {
            scope.spawn(move || {
                let seed = found(mutant);
                println!("{mutant:?}: {seed:?}");
                assert!(seed.is_some(), "{mutant:?} is not found within {MUTANT_SEEDS} seeds");
            });
        }
    });
}
