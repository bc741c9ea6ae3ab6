//! How a node whose certificate has expired says who it is: by its chain, whose time is passed over, and by a signature of
//! the key in it over the connection on which it asks, which is therefore good for nothing on another.

use std::sync::Arc;
use std::time::SystemTime;

use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ConnectionCommon, Error, SignatureScheme};

use super::credential::certificates;
use super::{Identity, Peer, Roots, certificate, provider};

/// What nodes' keys sign with.
const SCHEME: SignatureScheme = SignatureScheme::ECDSA_NISTP256_SHA256;
/// Sets what is signed, and what is drawn from the connection for it, apart from all else (RFC 5705).
const LABEL: &[u8] = b"EXPORTER-shoal-readmit";

/// What both ends of one TLS connection know, and nobody else: keying material exported from it (RFC 8446, section 7.5).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Binding([u8; 32]);

impl Binding {
    /// That of a connection whose handshake is over; fails before.
    pub fn of<Side>(connection: &ConnectionCommon<Side>) -> Result<Self, Error> {
        connection.export_keying_material([0; 32], LABEL, None).map(Self)
    }

    /// What is signed, to have a certificate for the key of `csr`.
    fn statement(&self, csr: &str) -> Vec<u8> {
        [LABEL, &self.0, csr.as_bytes()].concat()
    }
}

impl std::fmt::Debug for Binding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Binding(…)")
    }
}

impl Identity {
    /// Proves, on the connection of `binding`, that this node has its key and asks for a certificate by `csr`.
    pub fn prove(&self, binding: &Binding, csr: &str) -> Result<Vec<u8>, Error> {
        let signer = self.certified().key.choose_scheme(&[SCHEME]);
        let signer = signer.ok_or_else(|| Error::General("the node's key is not of P-256".to_owned()))?;
        signer.sign(&binding.statement(csr))
    }
}

/// A chain that says nothing, or that the roots don't vouch for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the certificate chain is not one of this swarm's CA")]
pub struct NotVouched;

/// The node of a certificate that roots vouch for, or did until it expired.
#[derive(Debug, Clone)]
pub struct Former {
    peer: Peer,
    certificate: CertificateDer<'static>,
}

impl Former {
    /// Reads and verifies a chain, PEM, as of the last moment of the node's certificate.
    pub fn of(chain: &str, roots: &Roots) -> Result<Self, NotVouched> {
        let chain = certificates(chain).ok_or(NotVouched)?;
        let (own, intermediates) = chain.split_first().ok_or(NotVouched)?;
        let peer = Peer::of(own).map_err(|_| NotVouched)?;
        let last = peer.not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots.store()), provider());
        let verifier = verifier.build().map_err(|_| NotVouched)?;
        let last = UnixTime::since_unix_epoch(last);
        verifier.verify_client_cert(own, intermediates, last).map_err(|_| NotVouched)?;
        Ok(Self { peer, certificate: own.clone() })
    }

    /// The node, as the certificate says.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Whether `proof` is [`Identity::prove`]'s, by the key of this certificate.
    pub fn has_proved(&self, binding: &Binding, csr: &str, proof: &[u8]) -> bool {
        let algorithms = provider().signature_verification_algorithms;
        let known = algorithms.mapping.iter().find(|(scheme, _)| *scheme == SCHEME);
        let algorithm = known.and_then(|(_, algorithms)| algorithms.first());
        let key = certificate::public_key(&self.certificate);
        let (Some(algorithm), Ok(key)) = (algorithm, key) else { return false };
        algorithm.verify_signature(&key, &binding.statement(csr), proof).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::testing::{Ca, Wanted};
    use super::super::{Credential, Roots};
    use super::*;
    use crate::table::Role;

    const CSR: &str = "a request";

    fn expired(ca: &Ca) -> Credential {
        let now = SystemTime::now();
        let (not_before, not_after) = (now - Duration::from_hours(2), now - Duration::from_hours(1));
        ca.credential(&Wanted { not_before, not_after, ..Wanted::new("n1", Role::Worker, "c") })
    }

    #[test]
    fn a_chain_is_known_by_its_roots_whatever_the_time() {
        let (ca, other) = (Ca::new(), Ca::new());
        let credential = expired(&ca);
        assert!(credential.check().is_err());
        let former = Former::of(&credential.identity.chain(), &ca.roots()).unwrap();
        assert_eq!(former.peer(), credential.identity.peer());
        let valid = ca.credential(&Wanted::new("n2", Role::Manager, "c"));
        assert_eq!(Former::of(&valid.identity.chain(), &ca.roots()).unwrap().peer(), valid.identity.peer());
        let foreign = |chain: &str, roots: &Roots| Former::of(chain, roots).is_err();
        assert!(foreign(&credential.identity.chain(), &other.roots()));
        assert!(foreign(&expired(&other).identity.chain(), &ca.roots()));
        for text in ["", "x", &ca.roots().to_pem(), &credential.identity.to_pem()] {
            assert!(foreign(text, &ca.roots()), "{text}");
        }
    }

    #[test]
    fn a_proof_is_of_one_key_one_request_and_one_connection() {
        let ca = Ca::new();
        let (own, other) = (expired(&ca), expired(&ca));
        let former = Former::of(&own.identity.chain(), &ca.roots()).unwrap();
        let here = Binding([7; 32]);
        let proof = own.identity.prove(&here, CSR).unwrap();
        assert!(former.has_proved(&here, CSR, &proof));
        assert!(!former.has_proved(&Binding([8; 32]), CSR, &proof), "another connection");
        assert!(!former.has_proved(&here, "another request", &proof));
        assert!(!former.has_proved(&here, CSR, &other.identity.prove(&here, CSR).unwrap()), "another key");
        for at in 0..proof.len() {
            let mut broken = proof.clone();
            broken[at] ^= 1;
            assert!(!former.has_proved(&here, CSR, &broken), "byte {at}");
            assert!(!former.has_proved(&here, CSR, &proof[..at]), "cut at {at}");
        }
    }
}
