//! Certificates of nodes.

use std::time::{Duration, SystemTime};

use mesh_api::id::{ClusterId, NodeId};
use mesh_api::table::Role;
use mesh_api::tls::{BACKDATE, KeyId, MANAGER_OU, SERVER_NAME, WORKER_OU};
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyUsagePurpose, PublicKeyData as _, SanType,
};

use super::{Authority, PkiError, serial};

/// A point of P-256, uncompressed.
const POINT_BYTES: usize = 65;

/// Whom a certificate is for: SwarmKit's layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The node.
    pub node: NodeId,
    /// What it may do.
    pub role: Role,
    /// Its cluster.
    pub cluster: ClusterId,
}

/// A certificate that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The chain, PEM: the node's certificate, and what leads to each trusted root but that.
    pub chain: String,
    /// The root that signed it.
    pub issuer: KeyId,
}

impl Authority {
    /// Certifies, from `now` for `life`, the key of the request `csr` (PEM), whose signature proves that the asker has
    /// it. Whatever else the request says is passed over.
    pub fn sign(
        &self,
        csr: &str,
        subject: &Subject,
        life: Duration,
        now: SystemTime,
    ) -> Result<Issued, PkiError> {
        let request = CertificateSigningRequestParams::from_pem(csr).map_err(|_| PkiError::Request)?;
        let key = &request.public_key;
        if key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 || key.der_bytes().len() != POINT_BYTES {
            return Err(PkiError::Request);
        }
        let Subject { node, role, cluster } = subject;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let unit = match role {
            Role::Manager => MANAGER_OU,
            Role::Worker => WORKER_OU,
        };
        params.distinguished_name.push(DnType::OrganizationName, cluster.as_str());
        params.distinguished_name.push(DnType::OrganizationalUnitName, unit);
        params.distinguished_name.push(DnType::CommonName, node.as_str());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if *role == Role::Manager {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
            params.subject_alt_names.push(SanType::DnsName(SERVER_NAME.try_into()?));
        }
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + life).into();
        params.serial_number = Some(serial());
        params.use_authority_key_identifier_extension = true;
        let signer = self.signer();
        let certificate = params.signed_by(key, &signer.issuer()?)?;
        let cross = self.rotation.as_ref().map_or("", |rotation| &rotation.cross);
        Ok(Issued { chain: certificate.pem() + cross, issuer: signer.id })
    }
}
