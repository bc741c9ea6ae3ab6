//! Starts and stops the nodes' agents, each as its own session, so that they live on when xtask ends.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::layout::{BINARY, Host, Lab};
use super::{engine, processes};
use crate::{bounded, run};

/// How long an agent may take until its socket answers.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long one may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// Puts the binary where the lab runs it.
pub(super) fn install_binary(built: &Path) -> Result<()> {
    let folder = Path::new(BINARY).parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).with_context(|| format!("could not create {}", folder.display()))?;
    // On many machines nothing may be executed in /run.
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "mode=0755", "shoal-lab"]).arg(folder);
    bounded::output(&mut mount, Duration::from_secs(10))?;
    fs::copy(built, BINARY).with_context(|| format!("could not copy {} to {BINARY}", built.display()))?;
    Ok(())
}

/// Starts a node's agent and waits until its socket answers.
pub(super) fn start(lab: &Lab, node: &Host) -> Result<()> {
    if let Some(agent) = processes::agent(node) {
        bail!("the agent of {} runs already, as process {}", node.name, agent.pid);
    }
    let log_path = node.log();
    let log = OpenOptions::new().create(true).append(true).open(&log_path);
    let log = log.with_context(|| format!("could not write {}", log_path.display()))?;
    let mut command = command(lab, node);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let mut child = command.spawn().with_context(|| format!("could not start {}", run::line(&command)))?;
    fs::write(node.pid_file(), format!("{}\n", child.id()))?;
    bounded::until(&format!("the agent of {} answers", node.name), START_LIMIT, || {
        if let Some(status) = child.try_wait()? {
            bail!("the agent of {} ended with {status}", node.name);
        }
        Ok(engine::answers(node).then_some(()))
    })
    .with_context(|| format!("its log ends:\n{}", log_end(node, 25)))
}

/// `setsid` and `nsenter` become the program that they start, so the process that is spawned is the agent.
fn command(lab: &Lab, node: &Host) -> Command {
    let mut command = Command::new("setsid");
    command.args(["nsenter", &format!("--net=/run/netns/{}", node.netns()), "--", BINARY, "agent"]);
    command.arg("--state-dir").arg(node.state_dir()).arg("--run-dir").arg(node.run_dir());
    command.arg("--bpffs").arg(node.bpffs()).args(["--hostname", &node.name, "--xdp", &lab.xdp.to_string()]);
    command.current_dir("/").env_clear();
    for name in ["PATH", "LANG"] {
        command.envs(std::env::var_os(name).map(|value| (name, value)));
    }
    command.env("RUST_BACKTRACE", "1");
    command
}

/// Ends a node's agent by `signal`, and waits until it is gone. Its tasks and its dataplane go on.
pub(super) fn stop(node: &Host, signal: i32) -> Result<()> {
    let Some(agent) = processes::agent(node) else {
        bail!("the agent of {} is not running: cargo xtask lab start {}", node.name, node.name);
    };
    agent.signal(signal)?;
    let what = format!("the agent of {} (process {}) ends", node.name, agent.pid);
    bounded::until(&what, STOP_LIMIT, || Ok((!agent.lives()).then_some(())))
}

/// The last lines of an agent's log.
pub(super) fn log_end(node: &Host, lines: usize) -> String {
    let text = fs::read(node.log()).unwrap_or_default();
    run::last_lines(&String::from_utf8_lossy(&text), lines)
}
