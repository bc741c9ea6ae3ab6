//! Processes: starting one as the init of a fresh PID namespace, and what /proc says of those that run.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::process::{Child, Command};

use nix::sched::{CloneFlags, unshare};

use super::netns::on_own_thread;

/// Starts `command` as process 1 of a fresh PID namespace: when it ends, the kernel kills whatever it started.
///
/// The namespace for children belongs to a thread, so the command is started from one that ends right after.
pub fn spawn_as_init(mut command: Command) -> io::Result<Child> {
    on_own_thread(move || {
        unshare(CloneFlags::CLONE_NEWPID)?;
        command.spawn()
    })
}

/// When process `pid` started, in clock ticks since boot: with the number, it tells a process from a later one.
pub fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Field 22, counted after the command's name, which may hold spaces and brackets (proc_pid_stat(5)).
    let field = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19));
    field.and_then(|text| text.parse().ok()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// The number that this boot of the machine goes by.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// The child of `parent` that goes by `inner` in its own PID namespace, as this namespace numbers it.
///
/// A process learns its children's numbers only as its own namespace counts; this walks /proc for ours.
pub fn child_in_namespace(parent: u32, inner: u32) -> io::Result<Option<u32>> {
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A process that ended between the listing and here has no status any more.
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { continue };
        if is_child_in_namespace(&status, parent, inner) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// The processes whose command line ends in `arguments`.
pub fn with_arguments(arguments: &[&OsStr]) -> io::Result<Vec<u32>> {
    let mut end = Vec::new();
    for argument in arguments {
        end.push(0);
        end.extend_from_slice(argument.as_bytes());
    }
    end.push(0);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.ends_with(&end)) {
            found.push(pid);
        }
    }
    Ok(found)
}

fn is_child_in_namespace(status: &str, parent: u32, inner: u32) -> bool {
    let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    field("PPid:").and_then(|text| text.parse().ok()) == Some(parent)
        && field("NSpid:").and_then(|text| text.split_whitespace().last()?.parse().ok()) == Some(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_start_time_is_stable_and_no_process_has_none() {
        let pid = std::process::id();
        assert_eq!(start_time(pid).unwrap(), start_time(pid).unwrap());
        assert!(start_time(u32::MAX).is_err());
    }

    #[test]
    fn a_child_is_known_by_its_parent_and_its_innermost_number() {
        let status = "Name:\tx\nPPid:\t41\nNSpid:\t42\t2\n";
        assert!(is_child_in_namespace(status, 41, 2));
        assert!(!is_child_in_namespace(status, 41, 42));
        assert!(!is_child_in_namespace(status, 40, 2));
    }
}
