//! A certificate authority for tests, which signs whatever it is asked to.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};

use super::{BACKDATE, Credential, Identity, MANAGER_OU, Roots, SERVER_NAME, WORKER_OU, digest};
use crate::table::Role;

/// What a certificate is to say.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// The node's id.
    pub node: &'a str,
    /// Its role.
    pub role: Role,
    /// The cluster's id.
    pub cluster: &'a str,
    /// Valid from then.
    pub not_before: SystemTime,
    /// Valid until then.
    pub not_after: SystemTime,
}

impl<'a> Wanted<'a> {
    /// A certificate made at this moment that lives for an hour.
    pub fn new(node: &'a str, role: Role, cluster: &'a str) -> Self {
        let now = SystemTime::now();
        Self { node, role, cluster, not_before: now - BACKDATE, not_after: now + Duration::from_hours(1) }
    }
}

/// A certificate authority.
pub struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ca(…)")
    }
}

impl Default for Ca {
    fn default() -> Self {
        Self::new()
    }
}

impl Ca {
    /// With a new key.
    ///
    /// # Panics
    /// Where the system has no randomness.
    #[expect(clippy::unwrap_used, reason = "for tests")]
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "swarm-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        Self { issuer: CertifiedIssuer::self_signed(params, key).unwrap() }
    }

    /// Its certificate.
    ///
    /// # Panics
    /// Never: the certificate is one.
    #[expect(clippy::unwrap_used, reason = "for tests")]
    pub fn roots(&self) -> Roots {
        Roots::new(vec![self.issuer.der().clone()]).unwrap()
    }

    /// SHA-256 of its certificate.
    pub fn digest(&self) -> [u8; 32] {
        digest(self.issuer.der())
    }

    /// The certificate, PEM, that says what is `wanted` of `key`.
    ///
    /// # Panics
    /// Where that can't be said.
    #[expect(clippy::unwrap_used, reason = "for tests")]
    pub fn sign(&self, wanted: &Wanted<'_>, key: &impl rcgen::PublicKeyData) -> String {
        let mut params = CertificateParams::default();
        params.not_before = wanted.not_before.into();
        params.not_after = wanted.not_after.into();
        let unit = match wanted.role {
            Role::Manager => MANAGER_OU,
            Role::Worker => WORKER_OU,
        };
        for (kind, text) in [
            (DnType::CommonName, wanted.node),
            (DnType::OrganizationalUnitName, unit),
            (DnType::OrganizationName, wanted.cluster),
        ] {
            params.distinguished_name.push(kind, text);
        }
        params.use_authority_key_identifier_extension = true;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if wanted.role == Role::Manager {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
            params.subject_alt_names.push(SanType::DnsName(SERVER_NAME.try_into().unwrap()));
        }
        params.signed_by(key, &self.issuer).unwrap().pem()
    }

    /// The certificate, PEM, that says what is `wanted` of the key of a request, PEM.
    ///
    /// # Panics
    /// Where the request is none.
    #[expect(clippy::unwrap_used, reason = "for tests")]
    pub fn sign_request(&self, wanted: &Wanted<'_>, csr: &str) -> String {
        let csr = rcgen::CertificateSigningRequestParams::from_pem(csr).unwrap();
        self.sign(wanted, &csr.public_key)
    }

    /// A node with a new key, that trusts this CA.
    ///
    /// # Panics
    /// Where what is wanted can't be said.
    #[expect(clippy::unwrap_used, reason = "for tests")]
    pub fn credential(&self, wanted: &Wanted<'_>) -> Credential {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let text = key.serialize_pem() + &self.sign(wanted, &key);
        Credential { identity: Identity::from_pem(&text).unwrap(), roots: self.roots() }
    }
}
