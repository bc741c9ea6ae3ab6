//! Process descriptors: a process that can be waited for and signalled without the risk that its number was reused.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd, FromRawFd as _, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A process, by descriptor (Linux 5.3).
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
}

impl PidFd {
    /// Opens process `pid`; `ESRCH` when there is none.
    pub fn open(pid: u32) -> io::Result<Self> {
        let pid = libc::pid_t::try_from(pid).map_err(|_| io::Error::from(Errno::ESRCH))?;
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| io::Error::from(Errno::EBADF))?;
        // SAFETY: the kernel has just given us this descriptor, close-on-exec, and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// Another descriptor of the same process.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()? })
    }

    /// Sends `signal` to the process; `ESRCH` when it has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        self.send(signal as libc::c_int)
    }

    /// Whether a signal could be sent: `ESRCH` when the process has ended and was waited for.
    pub fn signal_zero(&self) -> io::Result<()> {
        self.send(0)
    }

    fn send(&self, signal: libc::c_int) -> io::Result<()> {
        let null = std::ptr::null::<libc::siginfo_t>();
        let fd = self.fd.as_raw_fd();
        // SAFETY: a null siginfo asks for what kill(2) sends; the other arguments are integers.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, null, 0) };
        Errno::result(result)?;
        Ok(())
    }

    /// Takes the zombie away if the process is a child of ours and has ended; otherwise does nothing.
    pub fn reap(&self) {
        // A process adopted from an earlier agent is another's child: ECHILD is as good as success.
        let _ = waitid(Id::PIDFd(self.fd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
    }
}

/// A process whose end can be awaited.
#[derive(Debug)]
pub struct WatchedPid {
    fd: AsyncFd<PidFd>,
}

impl WatchedPid {
    /// Watches a process. To be called inside a tokio runtime.
    pub fn new(pidfd: PidFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open, owned by `pidfd`, and never replaced or closed before `pidfd` is dropped.
        let fd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
        Ok(Self { fd: fd? })
    }

    /// Waits until the process has ended. Cancel-safe.
    pub async fn ended(&self) {
        // An error would mean that the runtime shuts down, and this task with it.
        let _ = self.fd.readable().await;
    }

    /// The process.
    pub fn pidfd(&self) -> &PidFd {
        self.fd.get_ref()
    }
}

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_signalled_and_reaped_and_an_unknown_one_is_an_error() {
        #[expect(clippy::zombie_processes, reason = "it is reaped by what is tested")]
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let pidfd = PidFd::open(child.id()).unwrap();
        pidfd.signal(Signal::SIGKILL).unwrap();
        let stat = format!("/proc/{}/stat", child.id());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while std::fs::metadata(&stat).is_ok() {
            pidfd.reap();
            assert!(std::time::Instant::now() < deadline, "still there");
            std::thread::yield_now();
        }
        assert_eq!(pidfd.signal(Signal::SIGKILL).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        assert_eq!(PidFd::open(u32::MAX).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
