//! What certificates say.

use std::fmt;
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::AttributeTypeAndValue;

use super::{BACKDATE, MANAGER_OU, WORKER_OU};
use crate::id::{BASE36, ClusterId, ID_LEN, NodeId};
use crate::table::Role;

/// SHA-256 of a certificate's DER: what join tokens name a cluster by.
pub fn digest(certificate: &[u8]) -> [u8; 32] {
    Sha256::digest(certificate).into()
}

/// A certificate that is not of a node of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the certificate is not of a node of a swarm: {0}")]
pub struct NotANode(&'static str);

/// Names the key of a CA: its certificate's subject key identifier, which those that it signed bear as their authority's.
/// The default names none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyId([u8; 20]);

impl KeyId {
    fn of(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A node, as its certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The node: the common name.
    pub node: NodeId,
    /// What it may do: the organizational unit.
    pub role: Role,
    /// Its cluster: the organization.
    pub cluster: ClusterId,
    /// The CA's key that signed it.
    pub issuer: KeyId,
    /// Valid from then.
    pub not_before: SystemTime,
    /// Valid until then.
    pub not_after: SystemTime,
}

impl Peer {
    /// Reads a certificate, which is to be verified already where it is not the reader's own.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, NotANode> {
        let parsed = parse(certificate)?;
        let subject = parsed.subject();
        let node = only(subject.iter_common_name()).filter(|text| is_id(text));
        let cluster = only(subject.iter_organization()).filter(|text| is_id(text));
        let role = match only(subject.iter_organizational_unit()) {
            Some(MANAGER_OU) => Role::Manager,
            Some(WORKER_OU) => Role::Worker,
            _ => return Err(NotANode("its organizational unit is no role")),
        };
        let issuer = parsed.iter_extensions().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(authority) => {
                authority.key_identifier.as_ref().and_then(|id| KeyId::of(id.0))
            }
            _ => None,
        });
        let validity = parsed.validity();
        Ok(Self {
            node: node.ok_or(NotANode("its common name is no node's id"))?.into(),
            role,
            cluster: cluster.ok_or(NotANode("its organization is no cluster's id"))?.into(),
            issuer: issuer.ok_or(NotANode("it does not say which key signed it"))?,
            not_before: time(validity.not_before.timestamp()),
            not_after: time(validity.not_after.timestamp()),
        })
    }

    /// When to ask for the next certificate: once `fraction` of this one's life is over.
    pub fn renewal(&self, fraction: f64) -> SystemTime {
        let made = (self.not_before + BACKDATE).min(self.not_after);
        let life = self.not_after.duration_since(made).unwrap_or_default();
        made + life.mul_f64(fraction.clamp(0.0, 1.0))
    }
}

/// What a certificate of a CA says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFacts {
    /// Its key, as certificates name it that the key signed.
    pub key_id: KeyId,
    /// Its name, DER.
    pub subject: Vec<u8>,
    /// Its public key with the algorithm (SubjectPublicKeyInfo), DER.
    pub public_key: Vec<u8>,
}

impl CertificateFacts {
    /// Reads the certificate of a CA.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, NotANode> {
        let parsed = parse(certificate)?;
        let key_id = parsed.iter_extensions().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => KeyId::of(id.0),
            _ => None,
        });
        Ok(Self {
            key_id: key_id.ok_or(NotANode("it does not name its key"))?,
            subject: parsed.subject().as_raw().to_vec(),
            public_key: parsed.public_key().raw.to_vec(),
        })
    }
}

/// The public key that a certificate is for, as its algorithm writes it.
pub(super) fn public_key(certificate: &CertificateDer<'_>) -> Result<Vec<u8>, NotANode> {
    Ok(parse(certificate)?.public_key().subject_public_key.data.to_vec())
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, NotANode> {
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        Ok(_) | Err(_) => Err(NotANode("it does not parse")),
    }
}

/// The text of an attribute that a name has once.
fn only<'a>(mut attributes: impl Iterator<Item = &'a AttributeTypeAndValue<'a>>) -> Option<&'a str> {
    let first = attributes.next()?;
    if attributes.next().is_some() { None } else { first.as_str().ok() }
}

fn is_id(text: &str) -> bool {
    (1..=ID_LEN).contains(&text.len()) && text.bytes().all(|byte| BASE36.contains(&byte) || byte == b'-')
}

/// A time of a certificate, seconds since the epoch.
fn time(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs())
}
