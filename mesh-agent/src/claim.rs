//! One agent for a network namespace: two would take each other's devices away.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::{Duration, Instant};

/// The name of the socket that stands for the claim. Abstract sockets are a network namespace's own, and go with the
/// process that holds them, however it ends.
const NAME: &[u8] = b"shoal-agent";

/// How long an agent that was killed may hold the claim, until all of it is gone.
const ENDING_MAX: Duration = Duration::from_millis(500);
/// Between two looks at that.
const POLL: Duration = Duration::from_millis(10);

/// Why the network namespace can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another agent has it.
    #[error(
        "another Shoal agent runs in this network namespace (it holds the socket @{}): stop that one first",
        String::from_utf8_lossy(NAME)
    )]
    InUse,
    /// It can't be told whether another agent has it.
    #[error("cannot make the socket @{}", String::from_utf8_lossy(NAME))]
    Socket(#[source] io::Error),
}

/// The calling thread's network namespace, for as long as this lives.
#[derive(Debug)]
pub(crate) struct NetnsClaim {
    _socket: UnixListener,
}

/// Whether an agent has the calling thread's network namespace, told without taking it.
pub(crate) fn is_taken() -> bool {
    let sockets = std::fs::read_to_string("/proc/thread-self/net/unix").unwrap_or_default();
    let name = format!("@{}", String::from_utf8_lossy(NAME));
    sockets.lines().any(|line| line.split_whitespace().next_back() == Some(name.as_str()))
}

impl NetnsClaim {
    pub(crate) fn take() -> Result<Self, ClaimError> {
        let name = SocketAddr::from_abstract_name(NAME).map_err(ClaimError::Socket)?;
        let since = Instant::now();
        loop {
            match UnixListener::bind_addr(&name) {
                Ok(socket) => return Ok(Self { _socket: socket }),
                Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                    return Err(ClaimError::Socket(error));
                }
                Err(_) if since.elapsed() >= ENDING_MAX => return Err(ClaimError::InUse),
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns::Netns;
    use crate::sys::testing::in_netns;

    #[test]
    fn a_network_namespace_has_one_agent_and_another_namespace_another() {
        in_netns(|| async {
            assert!(!is_taken());
            let claim = NetnsClaim::take().unwrap();
            assert!(is_taken());
            assert!(matches!(NetnsClaim::take(), Err(ClaimError::InUse)));
            let elsewhere = Netns::fresh().unwrap().run(|| Ok(NetnsClaim::take().is_ok()));
            assert!(elsewhere.unwrap());
            drop(claim);
            assert!(NetnsClaim::take().is_ok());
        });
    }
}
