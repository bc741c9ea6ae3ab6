//! The programs at the root of cgroup v2: how the node's own processes reach published ports.
//!
//! They see the sockets of the whole machine, and of several agents' programs there each minds the sockets of its own
//! network namespace only. Attachments are links pinned among those to interfaces, as to interface 0; a later agent
//! swaps the program in them atomically.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{Array, MapError};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::sys::{link, netns};

/// The programs, those that tell a process what it dialled before those that lead its socket elsewhere: where only the
/// first ones are attached, nothing has changed.
pub const PROGRAMS: [&str; 8] = [
    "sock_peername4",
    "sock_peername6",
    "sock_recvmsg4",
    "sock_recvmsg6",
    "sock_sendmsg4",
    "sock_sendmsg6",
    "sock_connect4",
    "sock_connect6",
];

/// The map of the node's network namespace.
const NETNS: &str = "shoal_netns";

/// Why local processes don't reach published ports at this node's addresses.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The mounts can't be listed.
    #[error("can't read /proc/thread-self/mountinfo")]
    Mounts(#[source] io::Error),
    /// cgroup v2 is not mounted.
    #[error("cgroup v2 is not mounted: mount it with `mount -t cgroup2 none /sys/fs/cgroup/unified`")]
    NotMounted,
    /// The cgroup can't be opened.
    #[error("can't open the cgroup {path}")]
    Open {
        /// Its folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The network namespace has no cookie.
    #[error("can't read the network namespace's cookie (kernel 5.14 or later is needed)")]
    Cookie(#[source] io::Error),
    /// The object lacks a program or a map.
    #[error("the BPF object has no {name}: it is of another version; build again")]
    Missing {
        /// The program or map.
        name: &'static str,
    },
    /// The network namespace can't be written.
    #[error("writing the BPF map shoal_netns failed")]
    Map(#[from] MapError),
    /// A program can't be attached.
    #[error("can't attach {name} to the cgroup {path}")]
    Attach {
        /// The program.
        name: &'static str,
        /// The cgroup's folder.
        path: PathBuf,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Has the programs at the root of cgroup v2 serve the calling thread's network namespace. Without cgroup v2, or where
/// another's exclusive program is in the way, says so and goes on: it is only the node's own processes that miss it.
pub fn serve(ebpf: &mut Ebpf, folder: &Path) {
    if let Err(error) = root().and_then(|root| attach(ebpf, folder, &root)) {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(error, "this node's own processes don't reach published ports at its addresses");
    }
}

/// Where the attachment of a program is pinned in the folder of attachments.
pub fn pin(folder: &Path, program: &str) -> PathBuf {
    folder.join(format!("{program}-0"))
}

/// Attaches to `cgroup`, and pins in `folder`; swaps the programs of links that are pinned there.
pub fn attach(ebpf: &mut Ebpf, folder: &Path, cgroup: &Path) -> Result<(), CgroupError> {
    let cookie = netns::cookie().map_err(CgroupError::Cookie)?;
    let map = ebpf.map_mut(NETNS).ok_or(CgroupError::Missing { name: NETNS })?;
    Array::<_, u64>::try_from(map)?.set(0, cookie, 0)?;
    let file = File::open(cgroup).map_err(|source| CgroupError::Open { path: cgroup.to_owned(), source })?;
    for name in PROGRAMS {
        attach_one(program(ebpf, name)?, &pin(folder, name), &file)
            .map_err(|source| CgroupError::Attach { name, path: cgroup.to_owned(), source })?;
    }
    Ok(())
}

fn attach_one(
    program: &mut CgroupSockAddr,
    pin: &Path,
    cgroup: &File,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    if link::update_pinned(pin, program.fd()?.as_fd()).is_ok() {
        return Ok(());
    }
    // Whatever the mode, a link lets others attach beside it; kernels differ in whether they take one that says so.
    let id = program.attach(cgroup, CgroupAttachMode::Single)?;
    let link = FdLink::try_from(program.take_link(id)?)?;
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    link.pin(pin)?;
    Ok(())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut CgroupSockAddr, CgroupError> {
    let program = ebpf.program_mut(name).ok_or(CgroupError::Missing { name })?;
    program.try_into().map_err(|_| CgroupError::Missing { name })
}

/// Where the root of cgroup v2 is mounted.
pub fn root() -> Result<PathBuf, CgroupError> {
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").map_err(CgroupError::Mounts)?;
    // One that something else was mounted over is in the list as well.
    let is_visible =
        |point: &PathBuf| statfs(point).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC);
    mounts.lines().filter_map(root_mount).find(is_visible).ok_or(CgroupError::NotMounted)
}

/// The mount point, if a line of mountinfo (proc_pid_mountinfo(5)) is about the root of cgroup v2.
fn root_mount(line: &str) -> Option<PathBuf> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(3);
    let (root, point) = (fields.next()?, fields.next()?);
    (root == "/" && file_system.starts_with("cgroup2 ")).then(|| PathBuf::from(unescaped(point)))
}

/// Undoes mountinfo's escapes: a backslash and three octal digits.
fn unescaped(point: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(point.to_owned(), |point, (escape, plain)| point.replace(escape, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_cgroup_v2_is_found_in_every_layout() {
        let unified = "30 24 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
        let hybrid = "35 32 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        let spaced = r"36 32 0:29 / /my\040cgroups rw master:1 propagate_from:2 - cgroup2 none rw";
        let v1 = "36 32 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu";
        let part = "37 32 0:29 /system.slice /mnt rw - cgroup2 cgroup2 rw";
        assert_eq!(root_mount(unified), Some("/sys/fs/cgroup".into()));
        assert_eq!(root_mount(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(root_mount(spaced), Some("/my cgroups".into()));
        assert_eq!(root_mount(v1), None);
        assert_eq!(root_mount(part), None);
        assert_eq!(root_mount(""), None);
    }
}
