//! `cargo xtask lab`: a cluster on this machine. Hosts are network namespaces, each with the real agent in it.
//!
//! A lab is described by [`layout`]; all other modules do things to the machine. Whatever state it is in, `lab down`
//! leaves nothing of it.

mod agents;
mod claim;
mod down;
mod engine;
mod layout;
mod processes;
mod status;
mod topology;

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::{build, setup, sys};

pub(crate) use claim::claim;
pub(crate) use down::down;
pub(crate) use engine::{docker, get_json};
pub(crate) use layout::{
    BINARY, GATEWAY, GATEWAY6, Host, Lab, PREFIX, PREFIX6, ROUTED_CLIENT, ROUTED_CLIENT6, Underlay, Xdp,
};
pub(crate) use status::table;
pub(crate) use topology::in_netns;

/// The profile of Cargo.toml that the lab's binary is built with.
pub(crate) const PROFILE: &str = "lab";

/// Where managers listen for other nodes.
const MANAGER_PORT: u16 = 2377;

/// What to do with the lab.
#[derive(Subcommand)]
pub(crate) enum Action {
    /// Brings a lab up: a switch, a client and nodes with their agents
    Up(Up),
    /// Shows the nodes
    Status,
    /// Runs a command on a node, on the client or on the switch (`sw`); DOCKER_HOST and `shoal` are the node's
    Exec {
        /// `n1`, `client`, `sw`
        host: String,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Kills a node's agent (SIGKILL); tasks and dataplane go on
    Kill {
        /// `n1`…
        node: String,
    },
    /// Stops a node's agent (SIGTERM); tasks and dataplane go on
    Stop {
        /// `n1`…
        node: String,
    },
    /// Starts a node's agent
    Start {
        /// `n1`…
        node: String,
    },
    /// Pulls the cable between a node and the switch
    Cut {
        /// `n1`…
        node: String,
    },
    /// Plugs it in again
    Heal {
        /// `n1`…
        node: String,
    },
    /// Shows the log of a node's agent
    Logs {
        /// `n1`…
        node: String,
        /// Goes on as it grows
        #[arg(short, long)]
        follow: bool,
    },
    /// Takes the lab down, whatever state it is in: leaves nothing
    Down,
}

/// What lab to bring up.
#[derive(Args, Clone)]
pub(crate) struct Up {
    /// Number of nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=layout::NODES_MAX as i64))]
    pub(crate) nodes: u8,
    /// How the agents attach XDP to their uplink
    #[arg(long, value_enum, default_value_t = Xdp::Auto)]
    pub(crate) xdp: Xdp,
    /// MTU of every link, bytes
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(576..=9000))]
    pub(crate) mtu: u32,
    /// The family that the nodes speak among themselves; everybody has addresses of both
    #[arg(long, value_enum, default_value_t = Underlay::Ipv4)]
    pub(crate) underlay: Underlay,
    /// Makes a swarm of the nodes: n1 its manager, the others workers
    #[arg(long)]
    pub(crate) swarm: bool,
    /// So many managers, from n1 on
    #[arg(long, default_value_t = 1, requires = "swarm", value_parser = clap::value_parser!(u8).range(1..=7))]
    pub(crate) managers: u8,
    /// Runs this binary; without it, one is built
    #[arg(long, value_name = "PATH")]
    pub(crate) binary: Option<PathBuf>,
}

/// `cargo xtask lab …`.
pub(crate) fn run(action: &Action) -> Result<()> {
    require_root()?;
    match action {
        Action::Up(options) => {
            let _claim = claim()?;
            let lab = up(options)?;
            status::show(&lab);
            Ok(())
        }
        Action::Status => {
            status::show(&Lab::current()?);
            Ok(())
        }
        Action::Exec { host, command } => exec(host, command),
        Action::Kill { node } => agents::stop(&Lab::current()?.node(node)?, libc::SIGKILL),
        Action::Stop { node } => agents::stop(&Lab::current()?.node(node)?, libc::SIGTERM),
        Action::Start { node } => {
            let lab = Lab::current()?;
            agents::start(&lab, &lab.node(node)?)
        }
        Action::Cut { node } => topology::set_cable(&Lab::current()?.node(node)?, false),
        Action::Heal { node } => topology::set_cable(&Lab::current()?.node(node)?, true),
        Action::Logs { node, follow } => logs(&Lab::current()?.node(node)?, *follow),
        Action::Down => {
            sys::catch_interrupts();
            let _claim = claim()?;
            let removed = down()?;
            if removed == down::Removed::default() {
                println!("lab: there was none");
            } else {
                let down::Removed { processes, mounts, namespaces, files: _ } = removed;
                println!(
                    "lab: gone, with {processes} processes, {namespaces} namespaces and {mounts} mounts"
                );
            }
            Ok(())
        }
    }
}

/// Builds the binary that a lab runs.
pub(crate) fn build() -> Result<PathBuf> {
    build::shoal(PROFILE)
}

/// Sets up, builds and brings a lab up. What it can't finish it takes down again.
pub(crate) fn up(options: &Up) -> Result<Lab> {
    require_root()?;
    setup::ensure()?;
    refuse_a_second()?;
    let binary = match &options.binary {
        Some(binary) => binary.clone(),
        None => build()?,
    };
    sys::catch_interrupts();
    let _lock = lock()?;
    refuse_a_second()?;
    if down::is_any_left() {
        println!("lab: removing what an earlier one left");
        down()?;
        fs::create_dir_all(layout::RUN_DIR)?;
    }
    let Up { nodes, xdp, mtu, underlay, .. } = *options;
    let lab = Lab { nodes: usize::from(nodes), xdp, mtu, underlay };
    let started = Instant::now();
    let result = bring_up(&lab, &binary, options.swarm.then_some(options.managers));
    if let Err(error) = result {
        sys::forget_interrupt();
        return match down() {
            Ok(_) => Err(error.context("the lab did not come up, and is gone again")),
            Err(left) => Err(error.context(format!("the lab did not come up, and {left:#}"))),
        };
    }
    println!("lab: {} nodes up in {:.1} s", lab.nodes, started.elapsed().as_secs_f32());
    Ok(lab)
}

/// Fails where a lab is up. One in which nothing runs any more, say after the machine started anew, is none.
fn refuse_a_second() -> Result<()> {
    if Lab::recorded()?.is_some() && !processes::all().is_empty() {
        bail!("a lab is up: see cargo xtask lab status, or cargo xtask lab down");
    }
    Ok(())
}

fn bring_up(lab: &Lab, binary: &Path, managers: Option<u8>) -> Result<()> {
    lab.write()?;
    agents::install_binary(binary)?;
    topology::make(lab)?;
    for node in lab.nodes() {
        agents::start(lab, &node)?;
    }
    managers.map_or(Ok(()), |managers| make_swarm(lab, managers))
}

fn make_swarm(lab: &Lab, managers: u8) -> Result<()> {
    let nodes = lab.nodes();
    let [first, others @ ..] = nodes.as_slice() else { bail!("a swarm needs a node") };
    let address = |node: &Host| node.underlay(lab.underlay);
    docker(first, &["swarm", "init", "--advertise-addr", &address(first).to_string()])?;
    let to = SocketAddr::new(address(first), MANAGER_PORT).to_string();
    for (number, other) in (2..).zip(others) {
        let role = if number <= managers { "manager" } else { "worker" };
        let token = docker(first, &["swarm", "join-token", "--quiet", role])?;
        let own = address(other).to_string();
        docker(other, &["swarm", "join", "--token", &token, "--advertise-addr", &own, &to])?;
    }
    Ok(())
}

/// Runs a command in a host's namespace, in place of this process: its exit status is the command's.
fn exec(host: &str, command: &[String]) -> Result<()> {
    let lab = Lab::current()?;
    let mut inside = match host {
        "client" | topology::SWITCH => in_netns(&layout::netns(host), &command[0]),
        node => {
            let node = lab.node(node)?;
            let mut inside = in_netns(&node.netns(), &command[0]);
            inside.env("DOCKER_HOST", node.docker_host()).env_remove("DOCKER_CONTEXT");
            let path = std::env::var("PATH").unwrap_or_default();
            let bin = Path::new(BINARY).parent().unwrap_or(Path::new("/"));
            inside.env("SHOAL_BPFFS", node.bpffs()).env("PATH", format!("{}:{path}", bin.display()));
            inside
        }
    };
    let error = inside.args(&command[1..]).exec();
    Err(error).context("could not start nsenter")
}

fn logs(node: &Host, follow: bool) -> Result<()> {
    let mut tail = Command::new("tail");
    tail.args(["--lines", "+1"]);
    if follow {
        tail.arg("--follow=name");
    }
    let error = tail.arg(node.log()).exec();
    Err(error).context("could not start tail")
}

/// The ends of all agents' logs, for whoever looks into a failure.
pub(crate) fn print_log_ends(lab: &Lab, lines: usize) {
    for node in lab.nodes() {
        eprintln!("--- {} ends:\n{}", node.log().display(), agents::log_end(&node, lines));
    }
}

/// Kills a node's agent.
pub(crate) fn kill_agent(node: &Host) -> Result<()> {
    agents::stop(node, libc::SIGKILL)
}

/// Starts a node's agent.
pub(crate) fn start_agent(lab: &Lab, node: &Host) -> Result<()> {
    agents::start(lab, node)
}

/// One `lab up` at a time.
fn lock() -> Result<File> {
    fs::create_dir_all(layout::RUN_DIR).with_context(|| format!("could not create {}", layout::RUN_DIR))?;
    let folder = File::open(layout::RUN_DIR)?;
    if folder.try_lock().is_err() {
        bail!("another lab is coming up");
    }
    Ok(folder)
}

/// Fails with the remedy for a user who is not root.
pub(crate) fn require_root() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    bail!("a lab is made of network namespaces, which takes root: sudo env \"PATH=$PATH\" cargo xtask lab …")
}

/// The owner of this process, as /proc tells it.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}
