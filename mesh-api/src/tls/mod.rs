//! What agents and managers prove themselves to each other with: TLS 1.3, and certificates of the cluster's own CA.
//!
//! A node's certificate says who it is ([`Peer`]). One port serves several protocols, which ALPN tells apart ([`Alpn`]);
//! only a host that joins has no certificate, and it knows the cluster by its token; only a node whose certificate
//! has expired shows it by other means ([`Former`]). Sessions are never resumed: every
//! connection is verified against the roots of its moment.

mod certificate;
mod config;
mod credential;
mod proof;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use rustls::crypto::CryptoProvider;

pub use certificate::{CertificateFacts, KeyId, NotANode, Peer, digest};
pub use config::{HandshakeError, connect, is_certificate_refused, join_config, peer_of, server_config};
pub use credential::{Credential, Identity, IdentityError, KeyRequest, Roots, RootsError, Shared};
pub use proof::{Binding, Former, NotVouched};

/// The name that managers' certificates bear, and no others: who dials a manager takes no worker for one. SwarmKit's.
pub const SERVER_NAME: &str = "swarm-manager";
/// The organizational unit of managers' certificates.
pub const MANAGER_OU: &str = "swarm-manager";
/// The organizational unit of workers' certificates.
pub const WORKER_OU: &str = "swarm-worker";
/// How far before its making a certificate is valid from, for hosts whose clocks are behind.
pub const BACKDATE: Duration = Duration::from_hours(1);

/// What a connection to a manager's port is for, as it says by ALPN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alpn {
    /// A host asks to become a node; it has no certificate.
    Join,
    /// A node whose certificate has expired asks for another.
    Readmit,
    /// A node's session.
    Session,
    /// Managers among themselves.
    Raft,
}

impl Alpn {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Join, Self::Readmit, Self::Session, Self::Raft];

    /// The name on the wire.
    pub fn name(self) -> &'static [u8] {
        match self {
            Self::Join => b"shoal-join",
            Self::Readmit => b"shoal-readmit",
            Self::Session => b"shoal-session",
            Self::Raft => b"shoal-raft",
        }
    }

    /// The one of this name.
    pub fn of(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|alpn| alpn.name() == name)
    }
}

/// The cryptography that all of Shoal's TLS uses. There may be other providers in a process, so rustls must not choose.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));
    Arc::clone(&PROVIDER)
}

/// The error of TLS in an I/O error, where there is one.
pub fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}
