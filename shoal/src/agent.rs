//! `shoal agent`: puts the parts together, and takes them apart on a signal.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use control::docker::{self, LocalNode, Membership};
use mesh_agent::sys::limits;
use mesh_agent::{Agent, Config, Health, Item, Sealing, Uninstalled};
use mesh_api::tls::Shared;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::args::AgentArgs;
use crate::facts;
use crate::host::{Host, Part};
use crate::manager::{self, Manager};
use crate::preflight::{self, PreflightError};
use crate::problems::Problems;

/// The Docker-compatible socket in the run folder.
pub(crate) const SOCKET: &str = "docker.sock";

/// Runs the agent until SIGTERM or SIGINT; or removes what agents left, if that is asked for.
pub(crate) fn run(args: &AgentArgs) -> anyhow::Result<()> {
    let health = Health::default();
    start_log(&args.log, health.clone())?;
    if args.uninstall {
        return uninstall(args);
    }
    preflight::check_host(&args.bpffs)?;
    let _lock = preflight::take_folders(&args.state_dir, &args.run_dir)?;
    limits::raise_open_files().context("can't raise the limit of open files")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    runtime.block_on(serve(args, health))
}

/// Removes what agents left on this host, and prints it.
fn uninstall(args: &AgentArgs) -> anyhow::Result<()> {
    let AgentArgs { state_dir, run_dir, bpffs, .. } = args;
    if !nix::unistd::geteuid().is_root() {
        return Err(PreflightError::NotRoot.into());
    }
    // Folders that are not there are not made for this: there is nothing to lock.
    let lock = state_dir.exists().then(|| preflight::take_folders(state_dir, run_dir)).transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    let Uninstalled { node, mut removed, left, mut errors } =
        runtime.block_on(mesh_agent::uninstall(state_dir, bpffs))?;
    let own_lock = state_dir.join(preflight::LOCK_FILE);
    let files = [
        state_dir.join(manager::DIR),
        state_dir.join(manager::UNFINISHED),
        state_dir.join(facts::ID_FILE),
        run_dir.join(SOCKET),
    ];
    for path in files.into_iter().chain([own_lock.clone()]) {
        match remove(&path) {
            // Taken just now.
            Ok(true) if path == own_lock => {}
            Ok(true) => removed.push(Item::File(path)),
            Ok(false) => {}
            Err(error) => errors.push(format!("cannot remove {}: {error}", path.display())),
        }
    }
    drop(lock);
    for folder in [state_dir, run_dir] {
        // What is not Shoal's stays, with its folder.
        let _ = std::fs::remove_dir(folder);
    }
    print!("{}", report(&removed));
    if let Some(node) = node {
        println!(
            "The cluster that this host was in lists it until `docker node rm --force {node}` on a manager."
        );
    }
    errors.extend(left.iter().map(|item| format!("still there: {}", describe(item).join(" "))));
    anyhow::ensure!(errors.is_empty(), "not all could be removed: {}", errors.join("; "));
    Ok(())
}

/// Removes a file, a socket, or a folder with all in it; whether it was there.
fn remove(path: &Path) -> io::Result<bool> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// What was removed, a line for each kind.
fn report(removed: &[Item]) -> String {
    if removed.is_empty() {
        return "Nothing of Shoal's was found on this host.\n".to_owned();
    }
    let mut kinds: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for [kind, name] in removed.iter().map(describe) {
        kinds.entry(kind).or_default().push(name);
    }
    let lines = kinds.iter().map(|(kind, names)| format!("  {kind}: {}\n", names.join(", ")));
    format!(
        "Removed from this host:\n{}Left as they are: the sysctls net.ipv4.ip_forward and net.ipv6.conf.all.forwarding.\n",
        lines.collect::<String>()
    )
}

/// What an item is, and which.
fn describe(item: &Item) -> [String; 2] {
    match item {
        Item::Task(id) => ["tasks".to_owned(), id.clone()],
        Item::Link(name) => ["network interfaces".to_owned(), name.clone()],
        Item::Table(name) => ["netfilter tables".to_owned(), name.clone()],
        Item::Pin(path) => {
            let folder = path.parent().unwrap_or(path).display();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            [format!("BPF objects pinned in {folder}"), name]
        }
        Item::File(path) => ["files".to_owned(), path.display().to_string()],
    }
}

fn start_log(filter: &str, health: Health) -> anyhow::Result<()> {
    // The user-space WireGuard device tells of every peer that comes or goes, and openraft of each of its steps, unless the
    // filter asks for them by name. What became of raft's steps, `control::raft` says.
    let filter = EnvFilter::try_new(format!("gotatun=warn,openraft=off,{filter}")).with_context(|| {
        format!(
            "--log: '{filter}' is not a filter: use error, warn, info, debug, trace, or module=level pairs"
        )
    })?;
    let ansi = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(ansi);
    tracing_subscriber::registry().with(filter).with(lines).with(Problems(health)).init();
    Ok(())
}

async fn serve(args: &AgentArgs, health: Health) -> anyhow::Result<()> {
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
    let host = bring_up(args, health).await.inspect_err(|_| drop(std::fs::remove_file(&socket)))?;
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
pub(crate) async fn bring_up(args: &AgentArgs, health: Health) -> anyhow::Result<Arc<Host>> {
    let AgentArgs {
        state_dir,
        run_dir,
        bpffs,
        hostname,
        xdp,
        uplinks,
        flows_max,
        key_rotation,
        log: _,
        uninstall: _,
    } = args;
    let id = facts::installation_id(state_dir)?;
    let hostname = match hostname {
        Some(hostname) => hostname.clone(),
        None => nix::unistd::gethostname()
            .context("can't read the host's name: give one with --hostname")?
            .to_string_lossy()
            .into_owned(),
    };
    let credential = Shared::default();
    let sealing = manager::sealing(state_dir, None)?;
    let (manager, sealing) = match sealing {
        Sealing::Locked => (None, Sealing::Locked),
        Sealing::None => (None, Sealing::None),
        Sealing::With(seal) => {
            credential.set(Agent::credential(state_dir, Some(&seal))?);
            let manager = Manager::open(state_dir, credential.clone(), None).await?;
            let seal = manager.as_ref().and_then(Manager::seal);
            (manager, seal.map_or(Sealing::None, Sealing::With))
        }
    };
    let is_locked = matches!(sealing, Sealing::Locked);
    let config = Config {
        state_dir: state_dir.clone(),
        run_dir: run_dir.clone(),
        bpffs: bpffs.clone(),
        hostname: hostname.clone(),
        xdp: *xdp,
        uplinks: uplinks.clone(),
        flows_max: *flows_max,
        key_rotation: Duration::from_hours((*key_rotation).into()),
        health,
    };
    let agent = Agent::start(config, credential, sealing).await?;
    let manager = match manager {
        Some(manager) if agent.membership().is_none() => {
            agent.set_seal(None)?;
            drop_unfinished(manager).await?
        }
        manager => manager,
    };
    anyhow::ensure!(
        !is_locked || agent.membership().is_some(),
        "the state folder holds the locked state of a manager, but not this node's membership: restore membership.json, or \
         remove the folder's `manager` to give the cluster up"
    );
    agent.set_manager(manager.as_ref().map(Manager::description));
    let part = if is_locked { Part::Locked } else { manager.map_or(Part::None, Part::Manager) };
    let host = Host::new(agent, part, id, hostname, state_dir.clone());
    tokio::spawn(Host::follow_role(Arc::downgrade(&host)));
    if let Membership::Active { node, role, addr, .. } = host.membership() {
        tracing::info!(%node, ?role, %addr, "back in the cluster");
    }
    if let Membership::Locked { node, .. } = host.membership() {
        tracing::warn!(%node, "the manager is locked: tasks and dataplane go on, `docker swarm unlock` brings the rest");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_removed_is_told_by_kind() {
        let removed = [
            Item::Link("shoal0".to_owned()),
            Item::Link("shoal0p".to_owned()),
            Item::Pin("/sys/fs/bpf/shoal/v2/links/from_host-3".into()),
            Item::Pin("/sys/fs/bpf/shoal/v2/shoal_config".into()),
            Item::File("/var/lib/shoal/id".into()),
        ];
        let expected = "Removed from this host:\n\
            \x20 BPF objects pinned in /sys/fs/bpf/shoal/v2: shoal_config\n\
            \x20 BPF objects pinned in /sys/fs/bpf/shoal/v2/links: from_host-3\n\
            \x20 files: /var/lib/shoal/id\n\
            \x20 network interfaces: shoal0, shoal0p\n\
            Left as they are: the sysctls net.ipv4.ip_forward and net.ipv6.conf.all.forwarding.\n";
        assert_eq!(report(&removed), expected);
        assert_eq!(report(&[]), "Nothing of Shoal's was found on this host.\n");
    }

    #[test]
    fn a_file_a_folder_and_nothing_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (file, folder) = (dir.path().join("file"), dir.path().join("folder"));
        std::fs::write(&file, "").unwrap();
        std::fs::create_dir_all(folder.join("inner")).unwrap();
        assert!(remove(&file).unwrap() && remove(&folder).unwrap());
        assert!(!remove(&file).unwrap() && !remove(&folder).unwrap());
    }
}
