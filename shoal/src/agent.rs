//! `shoal agent`: puts the parts together, and takes them apart on a signal.

use std::io::IsTerminal;
use std::sync::Arc;

use anyhow::Context;
use control::docker::{self, LocalNode, Membership};
use mesh_agent::sys::limits;
use mesh_agent::{Agent, Config};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::args::AgentArgs;
use crate::facts;
use crate::host::Host;
use crate::manager::Manager;
use crate::preflight;

/// The Docker-compatible socket in the run folder.
const SOCKET: &str = "docker.sock";

/// Runs the agent until SIGTERM or SIGINT.
pub(crate) fn run(args: &AgentArgs) -> anyhow::Result<()> {
    start_log(&args.log)?;
    preflight::check_host(&args.bpffs)?;
    let _lock = preflight::take_folders(&args.state_dir, &args.run_dir)?;
    limits::raise_open_files().context("can't raise the limit of open files")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    runtime.block_on(serve(args))
}

fn start_log(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| {
        format!(
            "--log: '{filter}' is not a filter: use error, warn, info, debug, trace, or module=level pairs"
        )
    })?;
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).init();
    Ok(())
}

async fn serve(args: &AgentArgs) -> anyhow::Result<()> {
    // Before anything else, so that a signal during the start is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("can't listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("can't listen for SIGINT")?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    let socket = args.run_dir.join(SOCKET);
    let listener = docker::bind(&socket).await?;
    let host = bring_up(args).await?;
    tracing::info!(socket = %socket.display(), version = facts::version_line(), "the agent is up");
    let stopped = async {
        let signal = stop.await;
        tracing::info!(signal, "the agent stops; tasks and dataplane go on");
    };
    docker::serve(listener, docker::router(Arc::clone(&host) as Arc<dyn LocalNode>), stopped).await;
    host.shutdown().await;
    // A socket that nobody listens on would only slow clients down.
    if let Err(error) = std::fs::remove_file(&socket) {
        tracing::debug!(%error, "the socket can't be removed");
    }
    Ok(())
}

/// The manager first, if this host is one: its own agent's session goes to it like any other's.
async fn bring_up(args: &AgentArgs) -> anyhow::Result<Arc<Host>> {
    let AgentArgs { state_dir, run_dir, bpffs, hostname, xdp, uplinks, flows_max, log: _ } = args;
    let id = facts::installation_id(state_dir)?;
    let hostname = match hostname {
        Some(hostname) => hostname.clone(),
        None => nix::unistd::gethostname()
            .context("can't read the host's name: give one with --hostname")?
            .to_string_lossy()
            .into_owned(),
    };
    let manager = Manager::open(state_dir).await?;
    let config = Config {
        state_dir: state_dir.clone(),
        run_dir: run_dir.clone(),
        bpffs: bpffs.clone(),
        hostname: hostname.clone(),
        xdp: *xdp,
        uplinks: uplinks.clone(),
        flows_max: *flows_max,
    };
    let agent = Agent::start(config).await?;
    let manager = match manager {
        Some(manager) if agent.membership().is_none() => drop_unfinished(manager).await?,
        manager => manager,
    };
    let host = Host::new(agent, manager, id, hostname, state_dir.clone());
    if let Membership::Active { node, role, addr, .. } = host.membership() {
        tracing::info!(%node, ?role, %addr, "back in the cluster");
    }
    Ok(host)
}

/// A cluster that this host is not a node of: an init that was cut short, unless others have come to it.
async fn drop_unfinished(manager: Manager) -> anyhow::Result<Option<Manager>> {
    let state = manager.cluster().state();
    anyhow::ensure!(
        state.nodes.len() <= 1 && state.services.is_empty(),
        "the state folder holds a cluster of {} nodes, but not this node's membership in it: restore membership.json, or remove \
         the folder's `manager` to give the cluster up",
        state.nodes.len()
    );
    tracing::warn!("an init was cut short: the cluster that it made is removed");
    manager.destroy().await;
    Ok(None)
}
