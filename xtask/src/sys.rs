//! What std has no safe form of: sending and hearing of signals; [`bpf`] beside it loads a program.

pub(crate) mod bpf;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn remember(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From here on Ctrl-C, SIGTERM and a closed terminal don't end this process: they make [`interrupted`] true, so that
/// whoever works can clean up. Programs started from here get the default behaviour back when they are executed.
pub(crate) fn catch_interrupts() {
    let handler = remember as extern "C" fn(libc::c_int);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe, and lives as long as the program.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Whether the user asked to stop, since [`catch_interrupts`] or [`forget_interrupt`].
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Lets a clean-up run to its end after an interrupt.
pub(crate) fn forget_interrupt() {
    INTERRUPTED.store(false, Ordering::Relaxed);
}

/// Sends `signal` to one process; one that is gone is an error like any other.
pub(crate) fn kill(pid: u32, signal: i32) -> io::Result<()> {
    send(checked(pid)?, signal)
}

/// Kills the process group that `leader` was started as the leader of.
pub(crate) fn kill_group(leader: u32) -> io::Result<()> {
    send(-checked(leader)?, libc::SIGKILL)
}

/// A process that can be meant: 0 and 1, and with them -1, mean more than one.
fn checked(pid: u32) -> io::Result<libc::pid_t> {
    let pid = libc::pid_t::try_from(pid).ok().filter(|pid| *pid > 1);
    pid.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

fn send(target: libc::pid_t, signal: i32) -> io::Result<()> {
    // SAFETY: takes two numbers and touches no memory of this process.
    match unsafe { libc::kill(target, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
