//! The limit of open files: the agent needs more than the usual 1024, and its tasks are to have what the host gives.

use std::io;
use std::sync::OnceLock;

use nix::errno::Errno;

/// The soft limit that this process started with.
static FORMER: OnceLock<libc::rlim_t> = OnceLock::new();

/// Raises this process's soft limit to the hard one: every task, question and call takes descriptors.
pub fn raise_open_files() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit, to a place that is ours and lives through the call.
    Errno::result(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    FORMER.get_or_init(|| limit.rlim_cur);
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the kernel reads one rlimit, which lives through the call.
    Errno::result(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    Ok(())
}

/// Gives a child the soft limit that this process had before it raised its own.
pub fn restore_open_files(child: u32) -> io::Result<()> {
    let Some(&former) = FORMER.get() else { return Ok(()) };
    let pid = libc::pid_t::try_from(child).map_err(|_| io::Error::from(Errno::ESRCH))?;
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: null asks for no change; the kernel writes one rlimit, which lives through the call.
    Errno::result(unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) })?;
    limit.rlim_cur = former.min(limit.rlim_max);
    // SAFETY: the kernel reads one rlimit, which lives through the call; null asks for no former value.
    Errno::result(unsafe {
        libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut())
    })?;
    Ok(())
}
