//! Word of changes to interfaces, addresses and routes, from the kernel's multicast groups.

use futures::StreamExt as _;
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Duration, sleep};

use super::LinkError;

/// Tells that something of the namespace changed; not what.
#[derive(Debug)]
pub struct Watch {
    changes: watch::Receiver<u64>,
    // The connection ends with its last handle.
    _handle: Handle,
    connection: JoinHandle<()>,
    counter: JoinHandle<()>,
}

impl Watch {
    /// Watches the interfaces and addresses of the calling thread's namespace. To be called inside a tokio runtime.
    pub fn open() -> Result<Self, LinkError> {
        Self::of(&[MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])
    }

    /// Watches its routes instead, likewise.
    pub fn of_routes() -> Result<Self, LinkError> {
        Self::of(&[MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route])
    }

    fn of(groups: &[MulticastGroup]) -> Result<Self, LinkError> {
        let (connection, handle, mut messages) =
            rtnetlink::new_multicast_connection(groups).map_err(LinkError::Socket)?;
        let (sender, changes) = watch::channel(0);
        let counter = tokio::spawn(async move {
            while messages.next().await.is_some() {
                sender.send_modify(|count| *count += 1);
            }
        });
        Ok(Self { changes, _handle: handle, connection: tokio::spawn(connection), counter })
    }

    /// Waits for a change since the last call, and then for `burst`: changes come with several messages each.
    /// Cancel-safe. Pending for ever when the socket is lost: an audit still looks.
    pub async fn changed(&mut self, burst: Duration) {
        // On a copy: a change counts as seen only at the end.
        if self.changes.clone().changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        sleep(burst).await;
        self.changes.mark_unchanged();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.connection.abort();
        self.counter.abort();
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::sys::testing::{in_netns, run};

    #[test]
    fn a_change_that_was_not_waited_for_to_the_end_is_told_again() {
        in_netns(|| async {
            let mut watch = Watch::open().unwrap();
            run("ip link add x type veth peer name y");
            let cancelled = timeout(Duration::from_millis(100), watch.changed(Duration::from_mins(1))).await;
            assert!(cancelled.is_err());
            let told = timeout(Duration::from_secs(5), watch.changed(Duration::from_millis(1))).await;
            assert!(told.is_ok());
            let again = timeout(Duration::from_millis(100), watch.changed(Duration::from_millis(1))).await;
            assert!(again.is_err());
        });
    }
}
