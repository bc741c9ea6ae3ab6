//! Word of changes to interfaces and addresses, from the kernel's multicast groups.

use futures::StreamExt as _;
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::LinkError;

/// Tells that an interface or an IPv4 address of the namespace changed; not which.
#[derive(Debug)]
pub struct Watch {
    changes: watch::Receiver<u64>,
    // The connection ends with its last handle.
    _handle: Handle,
    connection: JoinHandle<()>,
    counter: JoinHandle<()>,
}

impl Watch {
    /// Watches the calling thread's namespace. To be called inside a tokio runtime.
    pub fn open() -> Result<Self, LinkError> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr];
        let (connection, handle, mut messages) =
            rtnetlink::new_multicast_connection(&groups).map_err(LinkError::Socket)?;
        let (sender, changes) = watch::channel(0);
        let counter = tokio::spawn(async move {
            while messages.next().await.is_some() {
                sender.send_modify(|count| *count += 1);
            }
        });
        Ok(Self { changes, _handle: handle, connection: tokio::spawn(connection), counter })
    }

    /// Waits for a change since the last call. Pending for ever when the socket is lost: the audit still looks.
    pub async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.connection.abort();
        self.counter.abort();
    }
}
