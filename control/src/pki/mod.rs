//! The cluster's own certificate authority: its root, what it signs, and the change from one root to the next.
//!
//! It is part of the replicated state, so that every manager signs with it. A root is made once; nodes' certificates
//! are signed by whichever manager is asked, and kept by their nodes alone.

mod first;
mod sign;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::{Duration, SystemTime};

use mesh_api::tls::{CertificateFacts, KeyId, Roots, RootsError, digest};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SerialNumber,
};
use serde::{Deserialize, Serialize};

pub(crate) use first::manager_credential;
pub use first::{First, FirstError, OwnError, first_manager};
pub use sign::{Issued, Subject};

/// Least life of node certificates, ns: 1 h, as Docker's.
pub const CERT_EXPIRY_MIN_NS: u64 = 3600 * 1_000_000_000;
/// Life of a root: 20 years, as SwarmKit's.
const ROOT_LIFE: Duration = Duration::from_hours(20 * 365 * 24);
/// The name of every root, as SwarmKit's.
const ROOT_NAME: &str = "swarm-ca";

/// What the certificate authority can't do.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The request is none, or its signature not that of its key, or the key not one that Shoal's nodes have.
    #[error("the certificate request is not one of a P-256 key, signed by it")]
    Request,
    /// The root in the cluster's state is unusable.
    #[error("the cluster's root certificate or its key is damaged")]
    Root,
    /// A key or a certificate can't be made.
    #[error("no certificate can be made")]
    Make(#[from] rcgen::Error),
}

impl From<RootsError> for PkiError {
    fn from(_: RootsError) -> Self {
        Self::Root
    }
}

/// A root: a certificate that vouches for itself, and its key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootCa {
    /// The certificate, PEM.
    pub certificate: String,
    /// Its private key, PEM (PKCS #8).
    key: String,
    /// What the certificates that it signs call it.
    pub id: KeyId,
}

impl fmt::Debug for RootCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootCa").field("id", &self.id).finish_non_exhaustive()
    }
}

impl RootCa {
    /// A new root, valid from `now` (less what certificates are backdated) for 20 years.
    pub fn generate(now: SystemTime) -> Result<Self, PkiError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let certificate = root_params(now, BasicConstraints::Constrained(1)).self_signed(&key)?;
        let id = CertificateFacts::of(certificate.der()).map_err(|_| PkiError::Root)?.key_id;
        Ok(Self { certificate: certificate.pem(), key: key.serialize_pem(), id })
    }

    /// The certificate's facts, for `docker swarm inspect`.
    pub fn facts(&self) -> Result<CertificateFacts, PkiError> {
        let roots = Roots::from_pem(&self.certificate)?;
        let certificate = roots.certificates().first().ok_or(PkiError::Root)?;
        CertificateFacts::of(certificate).map_err(|_| PkiError::Root)
    }

    /// SHA-256 of the certificate's DER: the cluster's name in join tokens. Zeros where the certificate is damaged.
    pub fn digest(&self) -> [u8; 32] {
        let roots = Roots::from_pem(&self.certificate);
        roots.ok().and_then(|roots| roots.certificates().first().map(|it| digest(it))).unwrap_or_default()
    }

    fn key(&self) -> Result<KeyPair, PkiError> {
        KeyPair::from_pem(&self.key).map_err(|_| PkiError::Root)
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, PkiError> {
        Issuer::from_ca_cert_pem(&self.certificate, self.key()?).map_err(|_| PkiError::Root)
    }

    /// Certifies `next`'s key by this root: who trusts only this one can verify what `next` signs.
    fn cross_sign(&self, next: &Self, now: SystemTime) -> Result<String, PkiError> {
        let mut params = root_params(now, BasicConstraints::Constrained(0));
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(&next.key()?, &self.issuer()?)?.pem())
    }
}

fn root_params(now: SystemTime, constraints: BasicConstraints) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, ROOT_NAME);
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - mesh_api::tls::BACKDATE).into();
    params.not_after = (now + ROOT_LIFE).into();
    params.serial_number = Some(serial());
    params
}

/// A serial number that no other certificate has: 127 random bits.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] &= 0x7f;
    SerialNumber::from_slice(&bytes)
}

/// The change to another root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// The next root, which signs already.
    pub root: RootCa,
    /// Its key, certified by the present root, PEM.
    pub cross: String,
}

/// The cluster's certificate authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    /// The root that join tokens name.
    pub root: RootCa,
    /// The change to another, until every node has a certificate from that.
    pub rotation: Option<Rotation>,
}

impl Authority {
    /// With a new root.
    pub fn generate(now: SystemTime) -> Result<Self, PkiError> {
        Ok(Self { root: RootCa::generate(now)?, rotation: None })
    }

    /// A new root, to rotate to.
    pub fn next(&self, now: SystemTime) -> Result<Rotation, PkiError> {
        let root = RootCa::generate(now)?;
        let cross = self.root.cross_sign(&root, now)?;
        Ok(Rotation { root, cross })
    }

    /// The root that signs.
    pub fn signer(&self) -> &RootCa {
        self.rotation.as_ref().map_or(&self.root, |rotation| &rotation.root)
    }

    /// The roots to trust, PEM.
    pub fn trusted(&self) -> String {
        let next = self.rotation.as_ref().map_or("", |rotation| &rotation.root.certificate);
        format!("{}{next}", self.root.certificate)
    }

    /// The trusted root with this key.
    pub fn root_of(&self, issuer: KeyId) -> Option<&RootCa> {
        let next = self.rotation.as_ref().map(|rotation| &rotation.root);
        [Some(&self.root), next].into_iter().flatten().find(|root| root.id == issuer)
    }
}
