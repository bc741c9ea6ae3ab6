//! The benchmark's processes: started in namespaces of its own, looked at from outside, and ended with it.

use std::fs;
use std::io::{BufRead as _, BufReader, PipeWriter, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use super::super::rss_mb;
use super::words::{AgentStart, Answer, ManagerStart, Order, Ready};

/// The last lines of a log that a failure shows.
const LOG_LINES: usize = 10;

/// Has the calling process, and those that it starts from here on, talk by a loopback of their own, and keep what is in
/// `memory` in memory.
pub(super) fn enter_namespaces(memory: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("new namespaces need root")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
    fs::create_dir_all(memory)?;
    mount(Some("tmpfs"), memory, Some("tmpfs"), MsFlags::empty(), none).context("mounting a tmpfs")?;
    let status = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("running ip")?;
    if !status.success() {
        bail!("ip link set lo up: {status}");
    }
    Ok(())
}

/// Has this process end with the one that started it.
pub(super) fn die_with_parent() -> Result<()> {
    Ok(set_pdeathsig(Signal::SIGKILL)?)
}

/// Writes what is worth a warning, or what RUST_LOG says, to standard error.
pub(super) fn log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

/// A process that ends when this is dropped.
#[derive(Debug)]
pub(super) struct Process(Child);

impl Process {
    fn start(
        mut command: Command,
        detail: &impl Serialize,
        [stdin, stdout]: [Stdio; 2],
        log: &Path,
    ) -> Result<Self> {
        let file = fs::OpenOptions::new().create(true).append(true).open(log)?;
        command.arg(serde_json::to_string(detail)?).stdin(stdin).stdout(stdout).stderr(file);
        Ok(Self(command.spawn().with_context(|| format!("starting {}", log.display()))?))
    }

    /// Starts an agent, which tells `board` what happens.
    pub(super) fn agent(start: &AgentStart, board: &PipeWriter, log: &Path) -> Result<Self> {
        // In place of the agent, and with its process id.
        let mut command = Command::new("nice");
        command.args(["-n", "19"]).arg(std::env::current_exe()?).arg("control-agent");
        Self::start(command, start, [Stdio::null(), board.try_clone()?.into()], log)
    }

    /// CPU time in user and kernel mode that it has had.
    pub(super) fn cpu(&self) -> Result<Duration> {
        let clock = clock_getcpuclockid(self.pid()?).context("no clock of a process's CPU time")?;
        Ok(clock_gettime(clock)?.into())
    }

    /// Its memory that is in RAM, MB.
    pub(super) fn rss_mb(&self) -> Result<f64> {
        rss_mb(&self.pid()?.to_string())
    }

    /// Fails where it has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.0.try_wait()? {
            Some(status) => bail!("a process of the benchmark has ended: {status}"),
            None => Ok(()),
        }
    }

    fn pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.0.id())?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A manager's process.
#[derive(Debug)]
pub(super) struct Manager {
    pub(super) process: Process,
    /// What it said first.
    pub(super) ready: Ready,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Manager {
    /// Starts one; returns once it serves.
    pub(super) fn start(start: &ManagerStart, log: &Path) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("control-manager");
        let mut process = Process::start(command, start, [Stdio::piped(), Stdio::piped()], log)?;
        let (stdin, stdout) = (process.0.stdin.take(), process.0.stdout.take());
        let orders = stdin.context("no standard input")?;
        let mut answers = BufReader::new(stdout.context("no standard output")?);
        let Answer::Ready(ready) = answer(&mut answers)? else { bail!("a manager answers out of turn") };
        Ok(Self { process, ready, orders, answers })
    }

    /// Has it do something; returns once it has.
    pub(super) fn order(&mut self, order: &Order) -> Result<Answer> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        self.orders.write_all(&line).with_context(|| format!("ordering {order:?}"))?;
        answer(&mut self.answers).with_context(|| format!("the answer to {order:?}"))
    }
}

fn answer(answers: &mut BufReader<ChildStdout>) -> Result<Answer> {
    let mut line = String::new();
    if answers.read_line(&mut line)? == 0 {
        bail!("a manager has ended");
    }
    Ok(serde_json::from_str(&line)?)
}

/// Bytes that went over the loopback.
pub(super) fn loopback_bytes() -> Result<u64> {
    let counters = fs::read_to_string("/proc/self/net/dev")?;
    let lo = counters.lines().find_map(|line| line.trim().strip_prefix("lo:"));
    let received = lo.and_then(|fields| fields.split_whitespace().next());
    Ok(received.context("no loopback in /proc/self/net/dev")?.parse()?)
}

/// The last lines of the logs in `dir`.
pub(super) fn last_words(dir: &Path) -> String {
    let mut words = String::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            let said = fs::read_to_string(&path).unwrap_or_default();
            let lines: Vec<&str> = said.lines().collect();
            let last = lines[lines.len().saturating_sub(LOG_LINES)..].iter();
            words.extend(last.map(|line| format!("\n{}: {line}", entry.file_name().to_string_lossy())));
        }
    }
    words
}
