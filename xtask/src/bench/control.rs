//! The control plane under many agents, by the program `bench` of `shoal-tests`: what a change takes to reach all of them,
//! and what it costs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::figures::{Case, Goal, show, show_goals};
use super::{Output, programs};
use crate::workspace;

/// Without the build: much more than it takes on a machine that does nothing else.
const LIMIT: Duration = Duration::from_mins(20);
/// Cases whose 99th percentile is shown beside the median.
const WITH_P99: [&str; 4] =
    ["control_commit", "control_change_to_last_maps", "control_change_to_settled", "control_apply"];

/// How much is measured.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Agents, each a process with its own session and its own copy of everything
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1000))]
    agents: u32,
    /// Services; every fourth publishes a port
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    services: u32,
    /// Tasks, spread over the services and the agents
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    tasks: u32,
    /// Changes of a service, one after another
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    changes: u32,
    /// Managers
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=7))]
    managers: u32,
    #[command(flatten)]
    pub(super) output: Output,
}

/// Measures, and shows goals for the changes.
pub(super) fn run(options: &Options) -> Result<Vec<Case>> {
    let Options { agents, services, tasks, changes, managers, output: _ } = options;
    println!(
        "control: {agents} agents, {managers} manager(s), {services} services, {tasks} tasks; all on this machine, each a \
         process, over TLS on a loopback of their own; managers' stores on disk; an agent's maps are in its memory, it \
         gets no packets, and its tasks start at once; a change publishes another port of a service, and its time counts \
         from the command's answer; the restart is of the leader, from its kill -9\n"
    );
    let folder = Folder::make()?;
    let scale = serde_json::json!({
        "dir": folder.0, "managers": managers, "agents": agents, "services": services, "tasks": tasks, "changes": changes,
    });
    let cases = programs::measure("control", "release", Some(&scale.to_string()), LIMIT)?;
    drop(folder);
    let find = |name: &str| cases.iter().find(|case| case.name == name).with_context(|| format!("no {name}"));
    let p99 = WITH_P99.iter().map(|name| Ok(find(name)?.percentile(99, format!("{name}_p99"))));
    let p99 = p99.collect::<Result<Vec<_>>>()?;
    show(cases.iter().chain(&p99));
    let [_, last_p99, ..] = p99.as_slice() else { return Ok(cases) };
    show_goals(&[
        (find("control_change_to_last_maps")?.clone(), Goal::AtMost(50.0)),
        (last_p99.clone(), Goal::AtMost(200.0)),
    ]);
    Ok([cases, p99].concat())
}

/// A folder for the managers' stores, which goes with this.
struct Folder(PathBuf);

impl Folder {
    fn make() -> Result<Self> {
        let path = workspace::target_dir().join(format!("bench-control-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("could not make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn remove(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder) {
        eprintln!("could not remove {}: {error}", folder.display());
    }
}
