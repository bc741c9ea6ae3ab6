//! Network namespaces as file descriptors, and work done inside one.
//!
//! A thread that entered another namespace is never given back to a pool: every call runs on a thread of its own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::thread;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};

/// An open network namespace; it lives at least as long as this does.
#[derive(Debug)]
pub struct Netns {
    file: File,
}

impl Netns {
    /// The namespace of process `pid`.
    pub fn of_pid(pid: u32) -> io::Result<Self> {
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The namespace that a file (`/run/netns/NAME`) names.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::open(path)? })
    }

    /// A fresh namespace, which goes with its last user.
    pub fn fresh() -> io::Result<Self> {
        on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Self::current()
        })
    }

    /// The descriptor's number, for netlink messages that name a namespace.
    pub fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Runs `work` inside the namespace, on a thread of its own, and waits for it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_own_thread(|| {
            setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)?;
            work()
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What BPF programs know the calling thread's namespace by; never 0. `ENOPROTOOPT` before kernel 5.14.
pub fn cookie() -> io::Result<u64> {
    let socket = UnixDatagram::unbound()?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    let (value, fd) = ((&raw mut cookie).cast(), socket.as_raw_fd());
    // SAFETY: the kernel writes no more than `len` bytes to the value; both live through the call.
    let result =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, value, &raw mut len) };
    Errno::result(result)?;
    Ok(cookie)
}

/// Runs `work` on a thread that ends with it.
pub(super) fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("shoal-ns".to_owned()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_namespace_has_one_cookie_and_another_has_another() {
        let ours = cookie().unwrap();
        assert_ne!(ours, 0);
        assert_eq!(cookie().unwrap(), ours);
        if !nix::unistd::Uid::effective().is_root() {
            let _ = io::stdout().write_all(b"\nSKIP: a fresh namespace needs root\n");
            return;
        }
        assert_ne!(Netns::fresh().unwrap().run(cookie).unwrap(), ours);
    }
}
