//! What a node has: its key with the certificate that it was given, and the roots that it trusts.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pem::{EncodeConfig, LineEnding, Pem};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::pem::{PemObject as _, SectionKind};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use tokio::sync::watch;

use super::{NotANode, Peer, digest, provider};

const CERTIFICATE: &str = "CERTIFICATE";
const KEY: &str = "PRIVATE KEY";
/// Certificates in a chain, or in a set of roots.
const CERTIFICATES_MAX: usize = 8;

/// `der` as PEM (RFC 7468) under `label`.
fn to_pem(label: &str, der: &[u8]) -> String {
    pem::encode_config(&Pem::new(label, der), EncodeConfig::new().set_line_ending(LineEnding::LF))
}

/// Why a text is not an [`Identity`], or an identity not what it is to be.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// No PEM, or not of what is expected.
    #[error("it is not the PEM of a certificate chain and its private key")]
    Pem,
    /// The key is not the certificate's, or can't be used.
    #[error("the certificate and the private key don't belong together")]
    Key(#[source] rustls::Error),
    /// The certificate is not a node's.
    #[error(transparent)]
    Peer(#[from] NotANode),
    /// No key could be made.
    #[error("no key can be made")]
    Random(#[source] rcgen::Error),
    /// The trusted roots don't vouch for it.
    #[error("the certificate does not verify against the cluster's root")]
    Untrusted(#[source] rustls::Error),
}

/// A node's certificate chain (its own certificate first, no root) and private key.
#[derive(Clone)]
pub struct Identity {
    certified: Arc<CertifiedKey>,
    /// PKCS #8.
    key: Arc<PrivateKeyDer<'static>>,
    peer: Peer,
}

impl Identity {
    /// Reads what [`Identity::to_pem`] wrote.
    pub fn from_pem(text: &str) -> Result<Self, IdentityError> {
        let mut chain = Vec::new();
        let mut key = None;
        for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(text.as_bytes()) {
            match section.map_err(|_| IdentityError::Pem)? {
                (SectionKind::Certificate, der) if chain.len() < CERTIFICATES_MAX => chain.push(der.into()),
                (SectionKind::PrivateKey, der) if key.is_none() => key = Some(der),
                _ => return Err(IdentityError::Pem),
            }
        }
        Self::new(chain, key.ok_or(IdentityError::Pem)?)
    }

    fn new(chain: Vec<CertificateDer<'static>>, key: Vec<u8>) -> Result<Self, IdentityError> {
        let peer = Peer::of(chain.first().ok_or(IdentityError::Pem)?)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        let certified = CertifiedKey::from_der(chain, key.clone_key(), &provider());
        let certified = certified.map_err(IdentityError::Key)?;
        Ok(Self { certified: Arc::new(certified), key: Arc::new(key), peer })
    }

    /// The key, then the chain, as PEM: a secret.
    pub fn to_pem(&self) -> String {
        self.key() + &self.chain()
    }

    /// The key, as PEM: a secret.
    pub fn key(&self) -> String {
        to_pem(KEY, self.key.secret_der())
    }

    /// The chain, as PEM.
    pub fn chain(&self) -> String {
        self.certified.cert.iter().map(|certificate| to_pem(CERTIFICATE, certificate)).collect()
    }

    /// The node, as its own certificate says.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The chain with its key, for rustls.
    pub(super) fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// A key made on this node, which never leaves it, and the request that asks for its certificate.
pub struct KeyRequest {
    key: KeyPair,
    csr: String,
}

impl KeyRequest {
    /// Makes a P-256 key.
    pub fn new() -> Result<Self, IdentityError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(IdentityError::Random)?;
        // Names are the manager's to give.
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let csr = params.serialize_request(&key).and_then(|csr| csr.pem()).map_err(IdentityError::Random)?;
        Ok(Self { key, csr })
    }

    /// The request, PEM.
    pub fn csr(&self) -> &str {
        &self.csr
    }

    /// The identity that `chain`, PEM, makes of the key.
    pub fn identity(&self, chain: &str) -> Result<Identity, IdentityError> {
        Identity::new(certificates(chain).ok_or(IdentityError::Pem)?, self.key.serialize_der())
    }
}

impl fmt::Debug for KeyRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyRequest(…)")
    }
}

/// The certificates in a text of nothing else, at least one.
pub(super) fn certificates(text: &str) -> Option<Vec<CertificateDer<'static>>> {
    let mut found = Vec::new();
    for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(text.as_bytes()) {
        match section.ok()? {
            (SectionKind::Certificate, der) if found.len() < CERTIFICATES_MAX => found.push(der.into()),
            _ => return None,
        }
    }
    (!found.is_empty()).then_some(found)
}

/// A text that does not hold root certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is not the PEM of one or more root certificates")]
pub struct RootsError;

/// The roots that a node trusts, at least one: two while the cluster changes from one to the other.
#[derive(Clone)]
pub struct Roots {
    certificates: Vec<CertificateDer<'static>>,
    store: Arc<RootCertStore>,
}

impl Roots {
    /// Reads PEM.
    pub fn from_pem(text: &str) -> Result<Self, RootsError> {
        Self::new(certificates(text).ok_or(RootsError)?)
    }

    pub(super) fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, RootsError> {
        let mut store = RootCertStore::empty();
        for certificate in &certificates {
            store.add(certificate.clone()).map_err(|_| RootsError)?;
        }
        Ok(Self { certificates, store: Arc::new(store) })
    }

    /// As PEM.
    pub fn to_pem(&self) -> String {
        self.certificates.iter().map(|certificate| to_pem(CERTIFICATE, certificate)).collect()
    }

    /// The certificates.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// The roots, for rustls.
    pub(super) fn store(&self) -> &Arc<RootCertStore> {
        &self.store
    }
}

impl PartialEq for Roots {
    fn eq(&self, other: &Self) -> bool {
        self.certificates == other.certificates
    }
}

impl Eq for Roots {}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digests = self.certificates.iter().map(|certificate| STANDARD.encode(digest(certificate)));
        f.debug_list().entries(digests).finish()
    }
}

/// What a node proves itself with, and whom it trusts.
#[derive(Debug, Clone)]
pub struct Credential {
    /// Its certificate and key.
    pub identity: Identity,
    /// The roots that others' certificates must come from.
    pub roots: Roots,
}

impl Credential {
    /// Checks that the roots vouch for the identity at this moment.
    pub fn check(&self) -> Result<(), IdentityError> {
        let untrusted = |error: &dyn fmt::Display| rustls::Error::General(error.to_string());
        let roots = Arc::clone(self.roots.store());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
        let verifier = verifier.map_err(|error| IdentityError::Untrusted(untrusted(&error)))?;
        let Some((own, intermediates)) = self.identity.certified.cert.split_first() else {
            return Err(IdentityError::Pem);
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now = UnixTime::since_unix_epoch(now);
        verifier.verify_client_cert(own, intermediates, now).map(drop).map_err(IdentityError::Untrusted)
    }
}

/// A node's credential, as all of its process share it: what the agent puts in is what the next handshake takes, of the
/// manager's listener too. Clones share it. Empty while the host is in no cluster.
#[derive(Debug, Clone, Default)]
pub struct Shared(Arc<watch::Sender<Option<Arc<Credential>>>>);

impl Shared {
    /// The credential of this moment.
    pub fn get(&self) -> Option<Arc<Credential>> {
        self.0.borrow().clone()
    }

    /// Replaces it.
    pub fn set(&self, credential: Option<Arc<Credential>>) {
        self.0.send_replace(credential);
    }

    /// Replaces it, if it is `former` still.
    pub fn replace(&self, former: &Arc<Credential>, credential: Arc<Credential>) {
        self.0.send_if_modified(|present| {
            let is_former = present.as_ref().is_some_and(|present| Arc::ptr_eq(present, former));
            if is_former {
                *present = Some(credential);
            }
            is_former
        });
    }

    /// Follows it.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<Credential>>> {
        self.0.subscribe()
    }
}
