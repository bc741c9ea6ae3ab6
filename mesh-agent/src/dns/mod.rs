//! The name server of the node's tasks, on the host's address of the node-local range.
//!
//! Tasks reach it as their gateway's address; the dataplane translates that, and their own address to their alias, by
//! which this tells them apart. What they may know is in the [`zone`]; the rest goes to the host's resolvers.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use mesh_api::table::Table;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::watch;
use tokio::task::JoinSet;

mod answer;
mod forward;
pub(crate) mod resolv_conf;
mod serve;
mod turns;
mod zone;

use crate::dataplane::{LocalEndpoint, Touched};
use answer::Answerer;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use answer::fuzz;
use forward::Forwarder;
pub use zone::{Answer, Server, Zone};

/// The running name server; it ends when dropped.
pub struct Dns {
    answerer: Arc<Answerer>,
    _servers: JoinSet<()>,
}

impl Dns {
    /// Serves at `addr`, UDP and TCP, from the last table, forwarding to the resolvers of `resolv_conf`; nobody may ask
    /// before the first [`Dns::update`].
    pub async fn start(
        addr: SocketAddr,
        resolv_conf: &Path,
        tables: watch::Receiver<Option<Arc<Table>>>,
    ) -> io::Result<Self> {
        let socket = UdpSocket::bind(addr).await?;
        let listener = TcpListener::bind(addr).await?;
        let (zone, forwarder) = (RwLock::default(), Forwarder::new(resolv_conf));
        let answerer = Arc::new(Answerer { zone, tables, forwarder });
        let mut servers = JoinSet::new();
        servers.spawn(serve::udp(socket, Arc::clone(&answerer)));
        servers.spawn(serve::tcp(listener, Arc::clone(&answerer)));
        Ok(Self { answerer, _servers: servers })
    }

    /// Follows the table: see [`Zone::update`].
    pub fn update(&self, table: &Table, touched: &Touched, endpoints: &[LocalEndpoint]) {
        let mut zone = self.answerer.zone.write().unwrap_or_else(PoisonError::into_inner);
        zone.update(table, touched, endpoints);
    }
}

impl std::fmt::Debug for Dns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dns").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
