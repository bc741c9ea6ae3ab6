//! What has to be so before the agent starts. Each failure says what to do about it.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

/// The oldest kernel that the dataplane was seen to work on (`cargo xtask vm-test`).
const KERNEL_MIN: (u32, u32) = (6, 1);

/// What the dataplane uses that older kernels lack, and the first to have it.
const SINCE: [((u32, u32), &str); 5] = [
    ((5, 8), "BPF ring buffers"),
    ((5, 9), "XDP links"),
    ((5, 10), "bpf_redirect_peer"),
    ((5, 11), "bpf_ktime_get_coarse_ns"),
    ((5, 18), "bpf_xdp_load_bytes"),
];

/// The file in the state folder that a running agent holds locked.
pub(crate) const LOCK_FILE: &str = "lock";

/// Why the agent can't start here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PreflightError {
    #[error(
        "must run as root, as it loads BPF programs and makes network devices: run it with sudo, or as a system service"
    )]
    NotRoot,
    #[error(
        "kernel {release} is too old: {}Shoal needs Linux {}.{} or later",
        lacks(release),
        KERNEL_MIN.0,
        KERNEL_MIN.1
    )]
    OldKernel { release: String },
    #[error(
        "{} is not on a BPF file system: mount one (mount -t bpf bpf {}), or name another folder with --bpffs",
        path.display(),
        mount_point(path).display()
    )]
    NoBpffs { path: PathBuf },
    #[error("can't make the folder {}: choose another with {flag}", path.display())]
    Folder { path: PathBuf, flag: &'static str, source: io::Error },
    #[error("{} belongs to a running agent: stop that one first, or choose another folder with --state-dir", path.display())]
    StateInUse { path: PathBuf },
    #[error("can't lock {}", path.display())]
    Lock { path: PathBuf, source: io::Error },
}

/// Checks the host: user, kernel, BPF file system.
pub(crate) fn check_host(bpffs: &Path) -> Result<(), PreflightError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(PreflightError::NotRoot);
    }
    let release = crate::facts::kernel_release();
    if version(&release) < KERNEL_MIN {
        return Err(PreflightError::OldKernel { release });
    }
    let existing = bpffs.ancestors().find(|path| path.exists()).unwrap_or(bpffs);
    match statfs(existing) {
        Ok(stat) if stat.filesystem_type() == BPF_FS_MAGIC => Ok(()),
        _ => Err(PreflightError::NoBpffs { path: bpffs.to_owned() }),
    }
}

/// How long an agent that was killed may hold its folder: until the last of its threads is gone, and its devices are.
const ENDING_MAX: Duration = Duration::from_secs(3);
/// Between two looks at that.
const POLL: Duration = Duration::from_millis(20);

/// A lock on the state folder; released when dropped, or when the process dies.
#[derive(Debug)]
pub(crate) struct StateLock {
    _file: Flock<std::fs::File>,
}

/// Makes the agent's folders, and takes the state folder for this process.
pub(crate) fn take_folders(state_dir: &Path, run_dir: &Path) -> Result<StateLock, PreflightError> {
    let make = |path: &Path, flag, mode| {
        let made = DirBuilder::new().recursive(true).mode(mode).create(path);
        made.map_err(|source| PreflightError::Folder { path: path.to_owned(), flag, source })
    };
    make(state_dir, "--state-dir", 0o700)?;
    // Whoever may dial the socket has to get to it.
    make(run_dir, "--run-dir", 0o755)?;
    take_state(state_dir)
}

/// Takes a state folder that exists for this process.
pub(crate) fn take_state(state_dir: &Path) -> Result<StateLock, PreflightError> {
    let path = state_dir.join(LOCK_FILE);
    let failed = |source| PreflightError::Lock { path: path.clone(), source };
    let mut file =
        std::fs::File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    let since = Instant::now();
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => return Ok(StateLock { _file: file }),
            Err((held, Errno::EWOULDBLOCK)) if since.elapsed() < ENDING_MAX => file = held,
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(PreflightError::StateInUse { path: state_dir.to_owned() });
            }
            Err((_, errno)) => return Err(PreflightError::Lock { path, source: errno.into() }),
        }
        std::thread::sleep(POLL);
    }
}

/// The first two numbers of a kernel release (`6.18.5-amd64`); zeros for what has none.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// What a kernel is known to lack, as the start of a sentence; empty if nothing.
fn lacks(release: &str) -> String {
    let since = SINCE.iter().filter(|(since, _)| version(release) < *since);
    let missing: Vec<String> =
        since.map(|((major, minor), what)| format!("{what} (Linux {major}.{minor})")).collect();
    if missing.is_empty() { String::new() } else { format!("it lacks {}; ", missing.join(", ")) }
}

/// Where a BPF file system for `path` would be mounted.
fn mount_point(path: &Path) -> &Path {
    let usual = Path::new("/sys/fs/bpf");
    if path.starts_with(usual) { usual } else { path }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        for release in ["6.1.0", "6.1", "6.18.5-amd64", "7.0.0-rc1", "10.2"] {
            assert!(version(release) >= KERNEL_MIN, "{release}");
        }
        for release in ["6.0.19", "5.15.0-91-generic", "4.19", "", "unknown"] {
            assert!(version(release) < KERNEL_MIN, "{release}");
        }
    }

    #[test]
    fn an_old_kernel_is_told_what_it_lacks() {
        let old = |release: &str| PreflightError::OldKernel { release: release.to_owned() }.to_string();
        assert_eq!(
            old("5.10.0-46-cloud-amd64"),
            "kernel 5.10.0-46-cloud-amd64 is too old: it lacks bpf_ktime_get_coarse_ns (Linux 5.11), \
             bpf_xdp_load_bytes (Linux 5.18); Shoal needs Linux 6.1 or later"
        );
        assert_eq!(old("6.0.19"), "kernel 6.0.19 is too old: Shoal needs Linux 6.1 or later");
    }

    #[test]
    fn a_state_folder_has_one_agent() {
        let dir = tempfile::tempdir().unwrap();
        let (state, run) = (dir.path().join("state"), dir.path().join("run"));
        let lock = take_folders(&state, &run).unwrap();
        assert!(matches!(take_folders(&state, &run), Err(PreflightError::StateInUse { .. })));
        drop(lock);
        take_folders(&state, &run).unwrap();
    }

    #[test]
    fn remedies_name_the_mount_point() {
        let usual = PreflightError::NoBpffs { path: "/sys/fs/bpf/shoal".into() }.to_string();
        assert!(usual.contains("mount -t bpf bpf /sys/fs/bpf)"), "{usual}");
        let other = PreflightError::NoBpffs { path: "/run/shoal/n1/bpf".into() }.to_string();
        assert!(other.contains("mount -t bpf bpf /run/shoal/n1/bpf)"), "{other}");
    }
}
