//! Word of changes to interfaces, addresses, routes and netfilter rules, from the kernel's multicast groups.

use std::io;

use futures::StreamExt as _;
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket};
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Duration, sleep};

use super::{LinkError, RULES_TABLE};

/// The multicast group of nf_tables.
const NFTABLES_GROUP: u32 = libc::NFNLGRP_NFTABLES.cast_unsigned();

/// Tells that something of the namespace changed; not what.
#[derive(Debug)]
pub struct Watch {
    changes: watch::Receiver<u64>,
    // The connection ends with its last handle.
    _handle: Option<Handle>,
    // They end with it.
    _listeners: JoinSet<()>,
}

impl Watch {
    /// Watches the interfaces and addresses of the calling thread's namespace. To be called inside a tokio runtime.
    pub fn open() -> Result<Self, LinkError> {
        Self::of(&[MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])
    }

    /// Watches its routes and addresses instead, likewise.
    pub fn of_routes() -> Result<Self, LinkError> {
        let routes = [MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
        Self::of(&[&routes[..], &[MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr]].concat())
    }

    /// Watches Shoal's netfilter tables instead, likewise.
    pub fn of_rules() -> Result<Self, LinkError> {
        let socket = rules_socket().map_err(LinkError::Socket)?;
        let (sender, changes) = watch::channel(0_u64);
        let mut listeners = JoinSet::new();
        listeners.spawn(async move {
            loop {
                let is_ours = match socket.recv_from_full().await {
                    Ok((messages, _)) => names_our_table(&messages),
                    // Some were lost, since too many came at once.
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => true,
                    Err(_) => return,
                };
                if is_ours {
                    sender.send_modify(|count| *count += 1);
                }
            }
        });
        Ok(Self { changes, _handle: None, _listeners: listeners })
    }

    fn of(groups: &[MulticastGroup]) -> Result<Self, LinkError> {
        let (connection, handle, mut messages) =
            rtnetlink::new_multicast_connection(groups).map_err(LinkError::Socket)?;
        let (sender, changes) = watch::channel(0);
        let mut listeners = JoinSet::new();
        listeners.spawn(connection);
        listeners.spawn(async move {
            while messages.next().await.is_some() {
                sender.send_modify(|count| *count += 1);
            }
        });
        Ok(Self { changes, _handle: Some(handle), _listeners: listeners })
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

fn rules_socket() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
    socket.socket_mut().add_membership(NFTABLES_GROUP)?;
    Ok(socket)
}

/// Whether messages of nf_tables are of tables with the name of Shoal's. The name is an attribute that ends with a zero byte.
fn names_our_table(messages: &[u8]) -> bool {
    let name = [RULES_TABLE.as_bytes(), &[0]].concat();
    messages.windows(name.len()).any(|bytes| bytes == name)
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

    #[test]
    fn changes_of_shoals_own_tables_are_told_and_of_others_not() {
        in_netns(|| async {
            let mut watch = Watch::of_rules().unwrap();
            let mut told =
                async |patience| timeout(patience, watch.changed(Duration::from_millis(1))).await.is_ok();
            run("nft add table ip other");
            run("nft add chain ip other shoal0");
            assert!(!told(Duration::from_millis(100)).await);
            run("nft add table ip shoal");
            assert!(told(Duration::from_secs(5)).await);
            assert!(!told(Duration::from_millis(100)).await);
            run("nft flush ruleset");
            assert!(told(Duration::from_secs(5)).await);
        });
    }
}
