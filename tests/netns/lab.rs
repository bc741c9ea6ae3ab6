//! The lab that `cargo xtask test` brought up, as cases see it: nodes, namespaces, and the switch's cables.
//!
//! What `cargo xtask lab` can do is done by calling it; names and addresses are those that it documents.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mesh_agent::dataplane::{Counter, read_counters};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::engine;

/// The client's address on the underlay.
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 100);
/// The same, IPv6.
pub(crate) const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xc6, 0, 0, 0, 0, 0, 0x100);
/// The client's address behind the switch's router.
pub(crate) const ROUTED_CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 1, 100);
/// The same, IPv6.
pub(crate) const ROUTED_CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xc7, 0, 0, 0, 0, 0, 0x100);
/// The binary that the lab runs.
pub(crate) const BINARY: &str = "/run/shoal/bin/shoal";
/// How long a process may take to stand still.
const STILL_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take until a case has left nothing behind.
const RESET_LIMIT: Duration = Duration::from_secs(30);
/// The variable of the environment that says how many times slower than usual this machine is.
const SLOWNESS: &str = "SHOAL_SLOWNESS";

/// A lab with a swarm: n1 is its manager.
pub(crate) struct Lab {
    xtask: OsString,
    /// The nodes attach their dataplanes with XDP where they can.
    pub(crate) has_xdp: bool,
    pub(crate) nodes: Vec<Node>,
}

/// A node, by number from 1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) address6: Ipv6Addr,
}

impl Node {
    fn new(number: u8) -> Self {
        let last = 10 + number;
        let digits = u16::from(last / 10) << 4 | u16::from(last % 10);
        Self {
            name: format!("n{number}"),
            address: Ipv4Addr::new(198, 18, 0, last),
            address6: Ipv6Addr::new(0xfd00, 0xc6, 0, 0, 0, 0, 0, digits),
        }
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        PathBuf::from("/run/shoal").join(&self.name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.run_dir().join("docker.sock")
    }

    /// How often the node's managers have sent it the whole table since its agent started.
    pub(crate) fn tables(&self) -> Result<usize> {
        let log = self.run_dir().join("agent.log");
        let log = fs::read_to_string(&log).with_context(|| format!("reading {}", log.display()))?;
        Ok(log.matches("gets the whole table").count())
    }

    /// Its agent's `--state-dir`.
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.run_dir().join("state")
    }

    /// The process of its agent, the last that was started.
    pub(crate) fn agent(&self) -> Result<Pid> {
        let text = fs::read_to_string(self.run_dir().join("agent.pid"))?;
        Ok(Pid::from_raw(text.trim().parse()?))
    }

    /// What its dataplane counted.
    pub(crate) fn count(&self, counter: Counter) -> Result<u64> {
        let totals = read_counters(&self.run_dir().join("bpf"))?;
        let found = totals.into_iter().find_map(|(found, packets)| (found == counter).then_some(packets));
        found.with_context(|| format!("no counter {}", counter.name()))
    }

    /// A program on this node.
    pub(crate) fn command(&self, program: &str) -> Command {
        command_in(&self.name, program)
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Lab {
    /// The lab that `cargo xtask test` names in the environment.
    pub(crate) fn from_environment() -> Option<Self> {
        let xtask = std::env::var_os("SHOAL_XTASK")?;
        let record = fs::read("/run/shoal/lab.json").ok()?;
        let record: Value = serde_json::from_slice(&record).ok()?;
        let count = u8::try_from(record["nodes"].as_u64()?).ok()?;
        let has_xdp = record["xdp"].as_str()? != "off";
        Some(Self { xtask, has_xdp, nodes: (1..=count).map(Node::new).collect() })
    }

    pub(crate) fn manager(&self) -> &Node {
        &self.nodes[0]
    }

    pub(crate) fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.name == name).with_context(|| format!("no node {name:?}"))
    }

    /// `cargo xtask lab …`.
    pub(crate) fn xtask(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.xtask);
        output(command.arg("lab").args(arguments)).map(drop)
    }

    /// Removes services and networks, heals what a case broke, and waits until nothing of it is left.
    pub(crate) fn reset(&self) -> Result<()> {
        self.repair()?;
        let manager = self.manager();
        for service in engine::names(manager, &["service", "ls", "--format", "{{.Name}}"])? {
            engine::docker_ok(manager, &["service", "rm", &service])?;
        }
        let networks = ["network", "ls", "--filter", "type=custom", "--format", "{{.Name}}"];
        for network in engine::names(manager, &networks)?.into_iter().filter(|name| name != "ingress") {
            // It is in use until the last task of its services is gone.
            until("the network can be removed", RESET_LIMIT, || {
                Ok(engine::docker(manager, &["network", "rm", &network])?.status.success().then_some(()))
            })?;
        }
        let mut left = Vec::new();
        let gone = until("nothing is left", RESET_LIMIT, || {
            left = self.leftovers()?;
            Ok(left.is_empty().then_some(()))
        });
        gone.with_context(|| left.join("\n    "))
    }

    /// Starts agents that don't run, plugs cables in, and waits until all nodes are ready.
    fn repair(&self) -> Result<()> {
        for node in &self.nodes {
            self.xtask(&["heal", &node.name])?;
            if engine::get(node, "/_ping").is_err() {
                self.xtask(&["start", &node.name])?;
            }
        }
        self.until_ready(self.nodes.len())
    }

    /// Waits until `count` nodes are ready.
    pub(crate) fn until_ready(&self, count: usize) -> Result<()> {
        until(&format!("{count} nodes are ready"), RESET_LIMIT, || {
            let nodes = engine::get_list(self.manager(), "/nodes")?;
            let ready = nodes.iter().filter(|node| node["Status"]["State"] == "ready").count();
            Ok((ready == count).then_some(()))
        })
    }

    /// What tasks left on the nodes: their processes and their links, one line each.
    pub(crate) fn leftovers(&self) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let words = words_of(pid);
            if words.first().is_some_and(|program| program == BINARY)
                && words.get(1).is_none_or(|word| word != "agent")
            {
                left.push(format!("process {pid}: {}", words.join(" ")));
            }
        }
        for node in &self.nodes {
            let links = output(node.command("ip").args(["-oneline", "link", "show", "type", "veth"]))?;
            let names = links.lines().filter_map(|line| line.split(": ").nth(1));
            let names: BTreeSet<&str> = names.map(|name| name.split('@').next().unwrap_or(name)).collect();
            let tasks = names.into_iter().filter(|name| !["eth0", "shoal0", "shoal0p"].contains(name));
            left.extend(tasks.map(|name| format!("link {name} on {node}")));
        }
        Ok(left)
    }
}

/// An agent that stands still until this is dropped: its disk is as it would be after a kill at that moment.
#[must_use = "it goes on when this is dropped"]
pub(crate) struct Still(Pid);

impl Still {
    pub(crate) fn agent(node: &Node) -> Result<Self> {
        let still = Self(node.agent()?);
        kill(still.0, Signal::SIGSTOP)?;
        until(&format!("the agent of {node} stands still"), STILL_LIMIT, || {
            for thread in fs::read_dir(format!("/proc/{}/task", still.0))? {
                // It may have ended meanwhile.
                let Ok(stat) = fs::read_to_string(thread?.path().join("stat")) else { return Ok(None) };
                // The name before it may hold anything.
                if !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')) {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })?;
        Ok(still)
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        if let Err(error) = kill(self.0, Signal::SIGCONT) {
            println!("    not undone: {error:#}");
        }
    }
}

fn words_of(pid: u32) -> Vec<String> {
    // The kernel adds a word to the name of a file that was replaced.
    let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default().display().to_string();
    let exe = exe.strip_suffix(" (deleted)").unwrap_or(&exe).to_owned();
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let arguments = arguments.split(|byte| *byte == 0).filter(|word| !word.is_empty()).skip(1);
    let arguments = arguments.map(|word| String::from_utf8_lossy(word).into_owned());
    std::iter::once(exe).chain(arguments).collect()
}

/// A program in the namespace of a node (`n1`), the client (`client`) or the switch (`sw`).
pub(crate) fn command_in(host: &str, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/shoal-{host}")).arg("--").arg(program);
    command
}

/// A program in the client's namespace.
pub(crate) fn on_client(program: &str) -> Command {
    command_in("client", program)
}

/// Runs `work` on a thread in the client's network namespace. Threads that it starts are in there as well.
pub(crate) fn as_client<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    as_host("client", work)
}

/// The same in the namespace of a node, the client or the switch.
pub(crate) fn as_host<T: Send>(host: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    within(&namespace(host), work)
}

/// The file behind which the network namespace of a node, the client or the switch is.
pub(crate) fn namespace(host: &str) -> PathBuf {
    PathBuf::from(format!("/run/netns/shoal-{host}"))
}

/// The same in the network namespace behind a file.
pub(crate) fn within<T: Send>(namespace: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(File::open(namespace)?, CloneFlags::CLONE_NEWNET)?;
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs a program to its end and gives its standard output; a failure says what it said.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let line = format!("{command:?}");
    let Output { status, stdout, stderr } = command.output().with_context(|| line.clone())?;
    if !status.success() {
        bail!("{line} ended with {status}: {}", String::from_utf8_lossy(&stderr).trim_end());
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

/// Polls until `condition` gives something.
pub(crate) fn until<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let limit = limit * slowness();
    let started = Instant::now();
    loop {
        if let Some(found) = condition()? {
            return Ok(found);
        }
        ensure!(started.elapsed() < limit, "{what}: not within {} s", limit.as_secs_f32());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// How many times slower than usual this machine is: so much longer may things take. 1, unless who runs the cases says more:
/// QEMU emulates the processor of a guest.
pub(crate) fn slowness() -> u32 {
    std::env::var(SLOWNESS).ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}
