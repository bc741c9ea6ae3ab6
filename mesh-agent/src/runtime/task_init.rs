//! `shoal internal task-init DIR`: a task's first process.
//!
//! It is process 1 of the task's PID namespace (the agent starts it so), so whatever the task leaves behind dies with
//! it. It makes the other namespaces, tells the agent that they are ready, waits for the network to be configured,
//! starts the program and records how that ended. It never talks to the agent after the start: a task outlives it.
//!
//! On stdout: `ready`, then `started <pid in the namespace>` or `failed <exit code> <text>`. On stdin: `go`; its end
//! before that means that the agent is gone, and the task with it.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, Read, Write};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Gid, Group, Pid, Uid, User, pipe2, sethostname, setsid};

use super::layout::{Exit, InitSpec, Layout, StartedFile, now_ns};
use crate::files;

/// A log file is put aside at this size; with the one put aside before, twice as much is kept.
const LOG_BYTES_MAX: u64 = 512 << 10;
/// How long output is waited for that processes other than the program may still hold the pipe of.
const LOG_DRAIN: Duration = Duration::from_millis(200);

/// Why a task could not be started, with the exit code that shells and Docker give it.
#[derive(Debug)]
struct Failure {
    code: i32,
    text: String,
}

impl Failure {
    fn setup(what: &str, error: impl std::fmt::Display) -> Self {
        Self { code: 125, text: format!("{what}: {error}") }
    }
}

/// Runs the task whose folder is `dir`, and returns when it has ended. Must be called with one thread alone.
pub fn main(dir: &Path) -> ExitCode {
    let layout = Layout::new(dir);
    match run(&layout) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { code, text }) => {
            eprintln!("task-init: {text}");
            let exit = Exit { code, since_ns: now_ns(), err: text.clone() };
            if let Err(error) = files::write_json(&layout.exit(), &exit, files::PUBLIC) {
                eprintln!("task-init: cannot record the failure: {error}");
            }
            say(&format!("failed {code} {}", text.replace('\n', " ")));
            ExitCode::FAILURE
        }
    }
}

fn run(layout: &Layout) -> Result<(), Failure> {
    let spec = files::read_json::<InitSpec>(&layout.init())
        .and_then(|spec| spec.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound)))
        .map_err(|error| Failure::setup("cannot read what to run", error))?;
    // Signals to the agent's terminal or session are not the task's.
    let _ = setsid();
    let namespaces = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS;
    unshare(namespaces).map_err(|error| Failure::setup("cannot make the task's namespaces", error))?;
    say("ready");
    let mut word = String::new();
    match io::stdin().lock().read_line(&mut word) {
        Ok(_) if word.trim() == "go" => {}
        _ => return Err(Failure::setup("cannot start", "the agent went away before the network was ready")),
    }
    mount_all(layout).map_err(|error| Failure::setup("cannot mount the task's own files", error))?;
    sethostname(&spec.hostname).map_err(|error| Failure::setup("cannot set the host name", error))?;

    let (program, log) = start(&spec, layout)?;
    let inner_pid = program.id();
    let started = StartedFile { inner_pid, since_ns: now_ns() };
    if let Err(error) = files::write_json(&layout.started(), &started, files::PUBLIC) {
        eprintln!("task-init: cannot record the start: {error}");
    }
    say(&format!("started {inner_pid}"));

    let code = wait_for(inner_pid);
    let _ = log.recv_timeout(LOG_DRAIN);
    let exit = Exit { code, since_ns: now_ns(), err: String::new() };
    files::write_json(&layout.exit(), &exit, files::PUBLIC)
        .map_err(|error| Failure::setup("cannot record how the program ended", error))
}

/// A line to the agent, which may be gone.
fn say(line: &str) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

/// Gives the task its own view of /proc and of the three files in /etc that Docker writes as well.
fn mount_all(layout: &Layout) -> io::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    for (source, target) in layout.etc() {
        // Nothing is created in the host's /etc for it: a host without the file has tasks without it.
        if Path::new(target).exists() {
            mount(Some(&source), target, none, MsFlags::MS_BIND, none)?;
        } else {
            eprintln!("task-init: the host has no {target}: the task goes without its own");
        }
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, none)?;
    Ok(())
}

/// Starts the program; its output goes to the log, whose end the channel tells.
fn start(spec: &InitSpec, layout: &Layout) -> Result<(Child, mpsc::Receiver<()>), Failure> {
    let [program, arguments @ ..] = spec.argv.as_slice() else {
        return Err(Failure::setup("cannot start", "no program is given"));
    };
    let dir = if spec.dir.is_empty() { "/" } else { &spec.dir };
    if !Path::new(dir).is_dir() {
        return Err(Failure {
            code: 126,
            text: format!("working directory {dir:?} does not exist on this host"),
        });
    }
    let (output, input) =
        pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|error| Failure::setup("no pipe", error))?;
    let error_input = input.try_clone().map_err(|error| Failure::setup("no pipe", error))?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(dir).env_clear().process_group(0);
    command.envs(spec.env.iter().filter_map(|pair| pair.split_once('=')));
    command.stdin(Stdio::null()).stdout(Stdio::from(input)).stderr(Stdio::from(error_input));
    if !spec.user.is_empty() {
        let (uid, gid) = user(&spec.user)?;
        command.uid(uid.as_raw()).gid(gid.as_raw());
    }
    let child = command.spawn().map_err(|error| {
        let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
        let text = match error.kind() {
            io::ErrorKind::NotFound if program.contains('/') => "no such file".to_owned(),
            io::ErrorKind::NotFound => "executable file not found in $PATH".to_owned(),
            _ => error.to_string(),
        };
        Failure { code, text: format!("exec: {program:?}: {text}") }
    })?;
    // The command holds the pipe's other side: while it does, the log has no end.
    drop(command);
    let (done, log) = mpsc::channel();
    let layout = layout.clone();
    thread::spawn(move || {
        if let Err(error) = pump(File::from(output), &layout, LOG_BYTES_MAX) {
            eprintln!("task-init: cannot write the log: {error}");
        }
        let _ = done.send(());
    });
    Ok((child, log))
}

/// Waits until the program has ended, taking away on the way whatever orphans end, and returns its exit code.
///
/// The program itself stays a zombie until this process ends: the agent signals it by its number, which must not
/// become another's meanwhile.
fn wait_for(program: u32) -> i32 {
    let is_program = |pid: Pid| u32::try_from(pid.as_raw()) == Ok(program);
    loop {
        match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(WaitStatus::Exited(pid, code)) if is_program(pid) => return code,
            Ok(WaitStatus::Signaled(pid, signal, _)) if is_program(pid) => return 128 + signal as i32,
            Ok(orphan) => drop(waitpid(orphan.pid(), None)),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                eprintln!("task-init: cannot wait for the program: {error}");
                return 125;
            }
        }
    }
}

/// Copies output to the log, bounded. When the disk fails it goes on reading: a task must not block on its log.
fn pump(mut output: impl Read, layout: &Layout, bytes_max: u64) -> io::Result<()> {
    let open = || OpenOptions::new().create(true).append(true).open(layout.log());
    let mut log = open()?;
    let mut written = log.metadata()?.len();
    let mut buffer = vec![0; 16 << 10];
    let mut result = Ok(());
    loop {
        let len = match output.read(&mut buffer) {
            Ok(0) => return result,
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if result.is_err() {
            continue;
        }
        result = log.write_all(&buffer[..len]);
        written += len as u64;
        if result.is_ok() && written >= bytes_max {
            result = std::fs::rename(layout.log(), layout.old_log()).and_then(|()| {
                log = open()?;
                written = 0;
                Ok(())
            });
        }
    }
}

/// The ids of `user[:group]`, by name or number; the group is the user's own where none is given.
fn user(text: &str) -> Result<(Uid, Gid), Failure> {
    let (name, group) = text.split_once(':').map_or((text, None), |(name, group)| (name, Some(group)));
    let unknown = |kind: &str, name: &str| Failure {
        code: 126,
        text: format!("unable to find {kind} {name}: no such {kind} on this host"),
    };
    let (uid, own_gid) = if let Ok(number) = name.parse() {
        let uid = Uid::from_raw(number);
        let known = User::from_uid(uid).ok().flatten();
        (uid, known.map_or(Gid::from_raw(0), |user| user.gid))
    } else {
        let known = User::from_name(name).ok().flatten().ok_or_else(|| unknown("user", name))?;
        (known.uid, known.gid)
    };
    let gid = match group.map(|group| (group, group.parse())) {
        None => own_gid,
        Some((_, Ok(number))) => Gid::from_raw(number),
        Some((group, Err(_))) => {
            Group::from_name(group).ok().flatten().ok_or_else(|| unknown("group", group))?.gid
        }
    };
    Ok((uid, gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_and_number() {
        let ids = |text: &str| user(text).map(|(uid, gid)| (uid.as_raw(), gid.as_raw())).map_err(|f| f.text);
        assert_eq!(ids("root"), Ok((0, 0)));
        assert_eq!(ids("1234:root"), Ok((1234, 0)));
        assert_eq!(ids("1234:5678"), Ok((1234, 5678)));
        assert!(ids("nobody-of-that-name").unwrap_err().contains("nobody-of-that-name"));
        assert!(ids("root:no-such-group").unwrap_err().contains("no-such-group"));
    }

    #[test]
    fn a_log_keeps_its_end_within_twice_its_bound() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::new(folder.path());
        let output: Vec<u8> = (0..100_000_u32).map(|i| i as u8).collect();
        pump(output.as_slice(), &layout, 20_000).unwrap();
        let old = std::fs::read(layout.old_log()).unwrap();
        let log = std::fs::read(layout.log()).unwrap();
        assert!(old.len() + log.len() < 2 * 20_000 + 2 * (16 << 10));
        let kept: Vec<u8> = old.into_iter().chain(log).collect();
        assert_eq!(kept, output[output.len() - kept.len()..]);
    }
}
