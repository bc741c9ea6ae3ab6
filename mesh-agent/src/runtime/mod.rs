//! The process runtime: a task is a process of the host in namespaces of its own.
//!
//! Makes, starts, watches, stops and finds again the processes, each with a folder of files ([`layout`]) that says
//! what there is to know after a restart. Networks are configured by the caller, between [`Runtime::prepare`] and
//! [`Prepared::start`].

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr as _;
use std::time::Duration;

use mesh_api::id::TaskId;
use mesh_api::table::TaskSpec;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout};
use tokio::time::timeout;
use tracing::warn;

use crate::files;
use crate::sys::limits;
use crate::sys::netns::Netns;
use crate::sys::pidfd::{PidFd, WatchedPid};
use crate::sys::process;

pub mod guest;
mod image;
pub mod layout;
pub mod task_init;
pub mod whoami;

use guest::Guests;
pub use image::ImageError;
use layout::{EndpointFile, Exit, InitSpec, Layout, StartedFile, TaskFile, now_ns};

/// How long the shim may take for each of its steps.
const SHIM_TIMEOUT: Duration = Duration::from_secs(10);
/// How long after SIGKILL the shim itself is killed, if the program's end is not recorded by then.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);
/// Characters of a task's id in its host name, as in Docker's container ids.
pub const SHORT_ID_LEN: usize = 12;
/// The folder of attachments' files, beside that of tasks' folders.
pub(crate) const GUESTS_FOLDER: &str = "attachments";
/// How the shim is started, with the task's folder after it.
const COMMAND: [&str; 2] = ["internal", "task-init"];
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What can go wrong with a task's process.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The task can't be run as asked.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file of the task's folder.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The task's first process can't be made, or is of no use.
    #[error("cannot {operation} the task's first process")]
    Shim {
        /// What was tried.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The program can't be started.
    #[error("starting task failed: {text}")]
    Start {
        /// The exit code that stands for it: 127 not found, 126 not executable, 125 otherwise.
        code: i32,
        /// What went wrong, with the program's name.
        text: String,
    },
}

/// A task's network, as far as its files tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskNames {
    /// The task's name.
    pub task: String,
    /// The node's host name.
    pub node: String,
    /// The content of /etc/resolv.conf.
    pub resolv_conf: String,
    /// The addresses, of which the first stands for the host name.
    pub addresses: Vec<Ipv4Addr>,
}

/// Makes and finds tasks' processes.
#[derive(Debug, Clone)]
pub struct Runtime {
    root: PathBuf,
    guests: Guests,
    program: PathBuf,
}

/// A task whose namespaces are made and whose program waits.
#[derive(Debug)]
pub struct Prepared {
    layout: Layout,
    shim: u32,
    pidfd: PidFd,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

/// A task whose program runs.
#[derive(Debug)]
pub struct Running {
    layout: Layout,
    shim: WatchedPid,
    pid: u32,
    since_ns: u64,
}

/// A task from an earlier run of the agent.
#[derive(Debug)]
pub struct Found {
    /// What the agent knew of it.
    pub file: TaskFile,
    /// Its process, or how it ended.
    pub state: Result<Running, Exit>,
}

impl Found {
    /// While it runs, the aliases of its endpoints with what it sends to the outside under.
    pub fn senders(&self) -> impl Iterator<Item = (Ipv4Addr, &[IpAddr])> {
        let endpoints = self.file.endpoints.iter().filter(|_| self.state.is_ok());
        endpoints.map(|endpoint| (endpoint.alias, self.file.egress.as_slice()))
    }
}

impl Runtime {
    /// A runtime that keeps its tasks' folders in `root`, and beside it the files of attachments, and starts
    /// `program internal task-init` for each task.
    pub fn new(root: PathBuf, program: PathBuf) -> Self {
        // Tasks' first processes have another working directory. It fails for an empty path alone.
        let root = std::path::absolute(&root).unwrap_or(root);
        Self { guests: Guests::new(root.with_file_name(GUESTS_FOLDER)), root, program }
    }

    /// The attachments of what the runtime does not run.
    pub fn guests(&self) -> &Guests {
        &self.guests
    }

    /// A task's folder.
    pub fn dir(&self, task: &TaskId) -> PathBuf {
        self.root.join(task.as_str())
    }

    /// Checks that a task can be run as asked, and says what that is.
    pub fn plan(task: &TaskId, spec: &TaskSpec, names: &TaskNames) -> Result<InitSpec, ImageError> {
        let argv = image::argv(spec)?;
        parse_signal(&spec.stop_signal)?;
        let hostname = match spec.hostname.as_str() {
            "" => task.as_str().chars().take(SHORT_ID_LEN).collect(),
            given => given.to_owned(),
        };
        let mut env = vec![PATH.to_owned(), "HOME=/root".to_owned(), format!("HOSTNAME={hostname}")];
        env.extend(spec.env.iter().cloned());
        env.push(format!("SHOAL_TASK_NAME={}", names.task));
        env.push(format!("SHOAL_TASK_ID={task}"));
        env.push(format!("SHOAL_NODE={}", names.node));
        env.push(format!("SHOAL_SERVICE={}", spec.service_name));
        let resolv_conf = names.resolv_conf.clone();
        let own = names.addresses.first().map(|addr| format!("{addr}\t{hostname}\n")).unwrap_or_default();
        let hosts = format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{own}");
        let (dir, user) = (spec.dir.clone(), spec.user.clone());
        Ok(InitSpec { argv, env, dir, user, hostname, resolv_conf, hosts })
    }

    /// Makes a task's folder and namespaces. Its program waits for [`Prepared::start`].
    pub async fn prepare(
        &self,
        task: &TaskId,
        spec: &TaskSpec,
        init: &InitSpec,
        endpoints: Vec<EndpointFile>,
    ) -> Result<Prepared, RuntimeError> {
        let layout = Layout::new(&self.dir(task));
        write_files(&layout, init)?;
        let mut child = process::spawn_as_init(self.command(&layout)?)
            .map_err(|source| RuntimeError::Shim { operation: "start", source })?;
        let shim = child.id();
        let wrap = |source| RuntimeError::Shim { operation: "watch", source };
        let pidfd = PidFd::open(shim).map_err(wrap)?;
        reap_when_ended(pidfd.try_clone().map_err(wrap)?).map_err(wrap)?;
        let missing = || wrap(io::Error::from(io::ErrorKind::BrokenPipe));
        // Before it is told to go on: what it starts inherits it.
        limits::restore_open_files(shim).map_err(wrap)?;
        let stdin = child.stdin.take().ok_or_else(missing)?;
        let stdout = child.stdout.take().ok_or_else(missing)?;
        let mut prepared = Prepared {
            layout,
            shim,
            pidfd,
            stdin: ChildStdin::from_std(stdin).map_err(wrap)?,
            lines: BufReader::new(ChildStdout::from_std(stdout).map_err(wrap)?).lines(),
        };
        let file = TaskFile {
            task: task.clone(),
            boot_id: process::boot_id().map_err(wrap)?,
            shim,
            shim_start_time: process::start_time(shim).map_err(wrap)?,
            stop_grace_ns: spec.stop_grace_ns,
            stop_signal: spec.stop_signal.clone(),
            endpoints,
            egress: spec.egress.clone(),
        };
        write_json(&prepared.layout.task(), &file)?;
        match prepared.line().await? {
            line if line == "ready" => Ok(prepared),
            line => Err(prepared.failed(&line)),
        }
    }

    fn command(&self, layout: &Layout) -> Result<Command, RuntimeError> {
        let path = layout.init_log();
        let log = fs::File::create(&path);
        let log = log.map_err(|source| RuntimeError::File { operation: "create", path, source })?;
        let mut command = Command::new(&self.program);
        command.args(COMMAND).arg(&layout.dir).current_dir("/").env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::from(log));
        Ok(command)
    }

    /// The tasks of earlier runs of the agent, to be taken on or cleared away.
    pub fn find(&self) -> Result<Vec<Found>, RuntimeError> {
        let root = &self.root;
        let wrap = |source| RuntimeError::File { operation: "list", path: root.clone(), source };
        let entries = match fs::read_dir(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(wrap)?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let layout = Layout::new(&entry.map_err(wrap)?.path());
            match files::read_json::<TaskFile>(&layout.task()) {
                Ok(Some(file)) => {
                    let state = Running::find(layout, &file).map_err(|exit| *exit);
                    found.push(Found { file, state });
                }
                // The agent died before it had anything to remember; the shim died with it.
                Ok(None) => remove_dir(&layout.dir)?,
                Err(error) => {
                    warn!(folder = %layout.dir.display(), %error, "a task's folder can't be read; the task is ended");
                    kill_unknown(&layout)?;
                }
            }
        }
        Ok(found)
    }

    /// Removes a task's folder.
    pub fn remove(&self, task: &TaskId) -> Result<(), RuntimeError> {
        remove_dir(&self.dir(task))
    }
}

impl Prepared {
    /// The task's network namespace.
    pub fn netns(&self) -> Result<Netns, RuntimeError> {
        Netns::of_pid(self.shim).map_err(|source| RuntimeError::Shim { operation: "look into", source })
    }

    /// Starts the program.
    pub async fn start(mut self) -> Result<Running, RuntimeError> {
        let sent = self.stdin.write_all(b"go\n").await;
        sent.map_err(|source| RuntimeError::Shim { operation: "talk to", source })?;
        let line = self.line().await?;
        let inner_pid = line.strip_prefix("started ").and_then(|text| text.parse().ok());
        let Some(inner_pid) = inner_pid else { return Err(self.failed(&line)) };
        match self.watch(inner_pid) {
            Ok((pid, shim)) => Ok(Running { layout: self.layout, shim, pid, since_ns: now_ns() }),
            Err(source) => {
                // What can't be watched must not run on unknown to anybody.
                self.abandon();
                Err(RuntimeError::Shim { operation: "watch", source })
            }
        }
    }

    fn watch(&self, inner_pid: u32) -> io::Result<(u32, WatchedPid)> {
        // Where the shim has ended already, the program has no number any more; its end is about to be read.
        let pid = process::child_in_namespace(self.shim, inner_pid)?.unwrap_or(self.shim);
        Ok((pid, WatchedPid::new(self.pidfd.try_clone()?)?))
    }

    /// Ends a task whose program has not been started.
    pub fn abandon(self) {
        // ESRCH: it has ended by itself.
        let _ = self.pidfd.signal(Signal::SIGKILL);
    }

    async fn line(&mut self) -> Result<String, RuntimeError> {
        let wrap = |source| RuntimeError::Shim { operation: "hear from", source };
        match timeout(SHIM_TIMEOUT, self.lines.next_line()).await {
            Ok(Ok(Some(line))) => Ok(line),
            Ok(Ok(None)) => Err(wrap(io::Error::other(self.complaint()))),
            Ok(Err(error)) => Err(wrap(error)),
            Err(_) => {
                let _ = self.pidfd.signal(Signal::SIGKILL);
                Err(wrap(io::Error::from(io::ErrorKind::TimedOut)))
            }
        }
    }

    fn complaint(&self) -> String {
        let text = fs::read_to_string(self.layout.init_log()).unwrap_or_default();
        format!("it ended early: {}", text.trim())
    }

    fn failed(self, line: &str) -> RuntimeError {
        let failure = line.strip_prefix("failed ").and_then(|rest| rest.split_once(' '));
        let error = match failure {
            Some((code, text)) => {
                RuntimeError::Start { code: code.parse().unwrap_or(125), text: text.to_owned() }
            }
            None => {
                RuntimeError::Start { code: 125, text: format!("unexpected word from task-init: {line:?}") }
            }
        };
        self.abandon();
        error
    }
}

impl Running {
    fn find(layout: Layout, file: &TaskFile) -> Result<Self, Box<Exit>> {
        let lost = |err: &str| Box::new(Exit { code: 137, since_ns: now_ns(), err: err.to_owned() });
        let ended = |layout: &Layout, err: &str| {
            files::read_json::<Exit>(&layout.exit()).ok().flatten().map_or_else(|| lost(err), Box::new)
        };
        let died = "the task died while the agent was not running";
        if process::boot_id().ok().as_ref() != Some(&file.boot_id) {
            return Err(ended(&layout, "the host was restarted"));
        }
        let Ok(pidfd) = PidFd::open(file.shim) else { return Err(ended(&layout, died)) };
        // Asked after the descriptor is open: from here on the number can't be another process's.
        if process::start_time(file.shim).ok() != Some(file.shim_start_time) || layout.exit().exists() {
            return Err(ended(&layout, died));
        }
        let started = files::read_json::<StartedFile>(&layout.started()).ok().flatten();
        let found = started.and_then(|started| {
            let pid = process::child_in_namespace(file.shim, started.inner_pid).ok()??;
            Some((pid, started.since_ns))
        });
        let Some((pid, since_ns)) = found else {
            // Killed rather than waited for: it waits for an agent that is gone, or is about to end.
            let _ = pidfd.signal(Signal::SIGKILL);
            return Err(ended(&layout, "the agent stopped while the task was being started"));
        };
        let Ok(shim) = WatchedPid::new(pidfd) else { return Err(lost("the task can't be watched")) };
        Ok(Self { layout, shim, pid, since_ns })
    }

    /// The program's process id on the host.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// When the program started, ns since the epoch.
    pub fn since_ns(&self) -> u64 {
        self.since_ns
    }

    /// The task's network namespace.
    pub fn netns(&self) -> io::Result<Netns> {
        Netns::of_pid(self.pid)
    }

    /// Waits for the task's end. Cancel-safe.
    pub async fn wait(&self) -> Exit {
        self.shim.ended().await;
        let lost = |err: String| Exit { code: 137, since_ns: now_ns(), err };
        match files::read_json::<Exit>(&self.layout.exit()) {
            Ok(Some(exit)) => exit,
            Ok(None) => lost("the task's first process was killed".to_owned()),
            Err(error) => lost(format!("how the task ended can't be read: {error}")),
        }
    }

    /// Sends the stop signal, and after the grace period kills; returns how it ended.
    pub async fn stop(&self, signal: Signal, grace: Duration) -> Exit {
        self.signal(signal);
        if let Ok(exit) = timeout(grace, self.wait()).await {
            return exit;
        }
        self.signal(Signal::SIGKILL);
        if let Ok(exit) = timeout(KILL_TIMEOUT, self.wait()).await {
            return exit;
        }
        let _ = self.shim.pidfd().signal(Signal::SIGKILL);
        self.wait().await
    }

    /// Sends a signal to the program's process group, or to it alone where it has left its group.
    fn signal(&self, signal: Signal) {
        let Ok(raw) = i32::try_from(self.pid) else { return };
        let pid = Pid::from_raw(raw);
        // The program's number is its own as long as the shim has not ended: the shim never takes its zombie away.
        if self.shim.pidfd().signal_zero().is_err() {
            return;
        }
        if killpg(pid, signal).is_err() {
            let _ = kill(pid, signal);
        }
    }
}

/// A signal by its name, with or without `SIG`; SIGTERM where none is given.
pub fn parse_signal(name: &str) -> Result<Signal, ImageError> {
    if name.is_empty() {
        return Ok(Signal::SIGTERM);
    }
    let upper = name.to_ascii_uppercase();
    let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    if let Ok(number) = name.parse::<i32>() {
        return Signal::try_from(number).map_err(|_| ImageError::UnknownSignal(name.to_owned()));
    }
    Signal::from_str(&full).map_err(|_| ImageError::UnknownSignal(name.to_owned()))
}

/// Kills a task of which only the folder is known: started again, it would run twice.
fn kill_unknown(layout: &Layout) -> Result<(), RuntimeError> {
    let wrap = |source| RuntimeError::Shim { operation: "look for", source };
    let [internal, task_init] = COMMAND.map(OsStr::new);
    for pid in process::with_arguments(&[internal, task_init, layout.dir.as_os_str()]).map_err(wrap)? {
        // Gone meanwhile is as good.
        let _ = PidFd::open(pid).and_then(|pidfd| pidfd.signal(Signal::SIGKILL));
    }
    Ok(())
}

/// Takes the zombie away once the process has ended, whoever else watches it.
fn reap_when_ended(pidfd: PidFd) -> io::Result<()> {
    let pidfd = WatchedPid::new(pidfd)?;
    tokio::spawn(async move {
        pidfd.ended().await;
        pidfd.pidfd().reap();
    });
    Ok(())
}

fn write_files(layout: &Layout, init: &InitSpec) -> Result<(), RuntimeError> {
    remove_dir(&layout.dir)?;
    let wrap = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| RuntimeError::File { operation, path, source }
    };
    fs::create_dir_all(&layout.dir).map_err(wrap("create", &layout.dir))?;
    let hostname = format!("{}\n", init.hostname);
    let contents = [&init.resolv_conf, &init.hosts, &hostname];
    for ((path, _), content) in layout.etc().iter().zip(contents) {
        fs::write(path, content).map_err(wrap("write", path))?;
    }
    // The environment may hold secrets.
    let path = layout.init();
    files::write_json(&path, init, files::SECRET).map_err(wrap("write", &path))
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), RuntimeError> {
    files::write_json(path, value, files::PUBLIC).map_err(|source| RuntimeError::File {
        operation: "write",
        path: path.to_owned(),
        source,
    })
}

fn remove_dir(dir: &Path) -> Result<(), RuntimeError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => {
            other.map_err(|source| RuntimeError::File { operation: "remove", path: dir.to_owned(), source })
        }
    }
}

#[cfg(test)]
mod tests;
