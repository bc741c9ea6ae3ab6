//! What a large table costs the agent: to install it, to change one service of it, and to hold it.
//!
//! The table goes through what the agent does with one, [`Dataplane`](mesh_agent::dataplane::Dataplane), into maps of a
//! node without tasks of its own, in namespaces of this process.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use mesh_agent::dataplane::Touched;
use mesh_api::table::{Change, Delta, Table};
use nix::time::ClockId;

use super::cluster;
use super::node::Node;
use super::{Case, Unit, cpu_time, milliseconds, rss_mb};
use crate::packet::kernel::enter_namespaces;

const SERVICES: u32 = 10_000;
const TASKS_EACH: u32 = 10;
/// How often the table is installed into empty maps.
const INSTALLS: usize = 3;
/// How many services are changed, each on its own.
const CHANGES: u32 = 200;

const PROCESS: ClockId = ClockId::CLOCK_PROCESS_CPUTIME_ID;

/// Measures all cases.
pub fn run() -> Result<Vec<Case>> {
    let folder = enter_namespaces()?;
    let mut table = cluster::table(SERVICES, TASKS_EACH)?;
    let local = cluster::local()?;
    let mut cases = Cases::new();
    let table_rss = rss_mb("self")?;
    for round in 0..INSTALLS {
        let mut node = Node::open(&folder.join(format!("install-{round}")))?;
        let started = Stopwatch::start()?;
        node.dataplane.change(&table, &Touched::all(), &local)?;
        let (time, cpu) = started.stop()?;
        cases.install.samples.push(milliseconds(time));
        cases.install_cpu.samples.push(milliseconds(cpu));
        // Of one dataplane in a process that has had no other.
        if round == 0 {
            cases.rss.samples.push(rss_mb("self")?);
            cases.table_rss.samples.push(table_rss);
            cases.maps.samples.push(maps_mb()?);
            for number in 0..CHANGES {
                let change = Change::Task(Box::new(cluster::draining(&table, number)?));
                let started = Stopwatch::start()?;
                let mut touched = Touched::default();
                touched.note(&table, &change);
                bring(&mut table, change)?;
                node.dataplane.change(&table, &touched, &local)?;
                let (time, cpu) = started.stop()?;
                cases.change.samples.push(milliseconds(time));
                cases.change_cpu.samples.push(milliseconds(cpu));
            }
        }
        node.close()?;
    }
    Ok(cases.into_vec())
}

struct Cases {
    install: Case,
    install_cpu: Case,
    change: Case,
    change_cpu: Case,
    rss: Case,
    table_rss: Case,
    maps: Case,
}

impl Cases {
    fn new() -> Self {
        Self {
            install: Case::new("churn_install", Unit::Ms),
            install_cpu: Case::new("churn_install_cpu", Unit::Ms),
            change: Case::new("churn_change", Unit::Ms),
            change_cpu: Case::new("churn_change_cpu", Unit::Ms),
            rss: Case::new("churn_rss", Unit::Mb),
            table_rss: Case::new("churn_rss_of_table_alone", Unit::Mb),
            maps: Case::new("churn_dataplane_memory", Unit::Mb),
        }
    }

    fn into_vec(self) -> Vec<Case> {
        let Self { install, install_cpu, change, change_cpu, rss, table_rss, maps } = self;
        vec![install, install_cpu, change, change_cpu, rss, table_rss, maps]
    }
}

fn bring(table: &mut Table, change: Change) -> Result<()> {
    let from = table.index;
    Ok(table.apply(Delta { from, to: from + 1, changes: vec![change] })?)
}

/// Time, and this process's CPU time in user and kernel mode.
struct Stopwatch {
    time: Instant,
    cpu: Duration,
}

impl Stopwatch {
    fn start() -> Result<Self> {
        Ok(Self { cpu: cpu_time(PROCESS)?, time: Instant::now() })
    }

    fn stop(self) -> Result<(Duration, Duration)> {
        Ok((self.time.elapsed(), cpu_time(PROCESS)?.saturating_sub(self.cpu)))
    }
}

/// Kernel memory of all BPF maps that this process has open, MB, each counted once.
fn maps_mb() -> Result<f64> {
    let mut bytes_by_id = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fdinfo")?.flatten() {
        // The descriptor of this listing is gone by now.
        let Ok(info) = fs::read_to_string(entry.path()) else { continue };
        let field = |name: &str| {
            info.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse::<u64>().ok())
        };
        if let (Some(id), Some(bytes)) = (field("map_id"), field("memlock")) {
            bytes_by_id.insert(id, bytes);
        }
    }
    if bytes_by_id.is_empty() {
        bail!("no BPF map is open");
    }
    let kib = u32::try_from(bytes_by_id.values().sum::<u64>() >> 10)?;
    Ok(f64::from(kib) * 1.024e-3)
}
