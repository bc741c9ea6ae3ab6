//! The lab's processes, found by what /proc says of them: a lab that crashed left no list.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};

use super::layout::{self, BINARY, Host};
use super::topology;
use crate::{bounded, sys};

/// How long a killed process may take to be gone.
const LIMIT: Duration = Duration::from_secs(10);

/// A process, told from a later one of the same number by when it started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Process {
    pub(super) pid: u32,
    start_time: u64,
    /// Its command line, for people.
    pub(super) command: String,
}

impl Process {
    /// The process `pid`, unless it is gone or only waits to be reaped.
    fn read(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, start_time) = state_and_start(&stat)?;
        // Its first thread may have ended before others, which still hold its files.
        if matches!(state, 'Z' | 'X') && threads(pid) < 2 {
            return None;
        }
        let command = arguments(pid).join(" ");
        Some(Self { pid, start_time, command })
    }

    /// Whether it still runs.
    pub(super) fn lives(&self) -> bool {
        Self::read(self.pid).is_some_and(|found| found.is(self))
    }

    fn is(&self, other: &Self) -> bool {
        (self.pid, self.start_time) == (other.pid, other.start_time)
    }

    /// Sends it a signal; that it is gone already is no error.
    pub(super) fn signal(&self, signal: i32) -> Result<()> {
        if !self.lives() {
            return Ok(());
        }
        match sys::kill(self.pid, signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                bail!("could not signal process {} ({}): {error}", self.pid, self.command)
            }
            _ => Ok(()),
        }
    }
}

/// How many threads of a process are there, the one that waits to be reaped included.
fn threads(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

/// The agent of a node, if it runs.
pub(super) fn agent(node: &Host) -> Option<Process> {
    let pid: u32 = fs::read_to_string(node.pid_file()).ok()?.trim().parse().ok()?;
    let process = Process::read(pid)?;
    // The number may be another process's by now: the agent is the lab's binary with this node's name.
    let arguments = arguments(pid);
    let is_agent = runs_the_labs_binary(pid)
        && arguments.get(1).is_some_and(|word| word == "agent")
        && arguments.windows(2).any(|pair| pair[0] == "--hostname" && pair[1] == node.name);
    is_agent.then_some(process)
}

/// Whatever runs the lab's binary, or in a namespace of the lab or of one of its tasks.
pub(super) fn all() -> Vec<Process> {
    let own = fs::metadata("/proc/self/ns/net").map(|own| own.ino()).unwrap_or_default();
    let pids = pids();
    let of_binary: Vec<u32> = pids.iter().copied().filter(|pid| runs_the_labs_binary(*pid)).collect();
    let of_lab = topology::namespaces().into_iter().map(|name| layout::netns_path(&name));
    let of_tasks = of_binary.iter().map(|pid| netns_of(*pid));
    let mut namespaces: BTreeSet<u64> =
        of_lab.chain(of_tasks).filter_map(|path| fs::metadata(path).ok()).map(|netns| netns.ino()).collect();
    // The binary may be run outside the lab as well; all that shares its namespace then is not the lab's.
    namespaces.remove(&own);
    let is_inside =
        |pid: u32| fs::metadata(netns_of(pid)).is_ok_and(|netns| namespaces.contains(&netns.ino()));
    let own_pid = std::process::id();
    pids.into_iter()
        .filter(|pid| *pid > 1 && *pid != own_pid && (of_binary.contains(pid) || is_inside(*pid)))
        .filter_map(Process::read)
        .collect()
}

/// Kills all of the lab's processes, those that appear meanwhile as well; gives how many there were.
pub(super) fn kill_all() -> Result<usize> {
    let mut killed = Vec::new();
    bounded::until("the lab's processes ended", LIMIT, || {
        let found = all();
        let are_none = found.is_empty();
        for process in found {
            process.signal(libc::SIGKILL)?;
            if !killed.iter().any(|one: &Process| one.is(&process)) {
                killed.push(process);
            }
        }
        // One that is ending is not found by its binary any more, and may hold its devices for a moment yet.
        Ok((are_none && !killed.iter().any(Process::lives)).then_some(()))
    })?;
    Ok(killed.len())
}

fn pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn netns_of(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join("ns/net")
}

fn runs_the_labs_binary(pid: u32) -> bool {
    let Ok(path) = fs::read_link(format!("/proc/{pid}/exe")) else { return false };
    // The kernel adds a word to the name of a file that was removed or replaced.
    let path = path.to_string_lossy();
    path.strip_suffix(" (deleted)").unwrap_or(&path) == BINARY && sees_our_run(pid)
}

/// A container may hold a lab of its own, whose binary has the same path, but in another file system.
fn sees_our_run(pid: u32) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|folder| (folder.dev(), folder.ino())).ok();
    let theirs = Path::new("/proc").join(pid.to_string()).join("root").join("run");
    identity(Path::new("/run")).is_some_and(|ours| identity(&theirs) == Some(ours))
}

fn arguments(pid: u32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = bytes.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// State and start time (clock ticks since boot) of a /proc/PID/stat: fields 3 and 22, counted after the command's name,
/// which may hold blanks and brackets (proc_pid_stat(5)).
fn state_and_start(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_and_start_are_read_past_an_odd_name() {
        let stat = "42 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 987 20";
        assert_eq!(state_and_start(stat), Some(('S', 987)));
    }

    #[test]
    fn this_process_lives_and_is_not_the_labs() {
        let own = Process::read(std::process::id()).unwrap();
        assert!(own.lives());
        assert!(!runs_the_labs_binary(own.pid));
        assert!(!Process { start_time: own.start_time + 1, ..own }.lives());
    }
}
