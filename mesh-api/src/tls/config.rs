//! Both sides of a handshake.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::verify_tls13_signature;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError,
    PeerIncompatible, RootCertStore, ServerConfig, SignatureScheme,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{Alpn, Credential, Identity, NotANode, Peer, Roots, SERVER_NAME, digest, provider, tls_error};
use crate::token::JoinToken;

/// Why there is no connection with a manager.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The other side's root is not the one that the join token names.
    #[error("remote CA does not match fingerprint")]
    Fingerprint,
    /// The other side is no manager of the cluster.
    #[error("the other side does not prove to be a manager of this swarm")]
    Untrusted(#[source] Error),
    /// The stream failed, or the other side speaks something else.
    #[error("the TLS handshake failed")]
    Io(#[source] io::Error),
}

/// The root of the token's digest is not among what the server sent.
#[derive(Debug)]
struct NoSuchRoot;

impl fmt::Display for NoSuchRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no certificate of the chain has the join token's digest")
    }
}

impl std::error::Error for NoSuchRoot {}

/// How a host that joins dials: the root that `token` names must be in the chain that the server sends, and vouch for it.
pub fn join_config(token: &JoinToken) -> Result<Arc<ClientConfig>, Error> {
    let pinned = Arc::new(Pinned { token: token.clone() });
    let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    let config = builder.dangerous().with_custom_certificate_verifier(pinned).with_no_client_auth();
    Ok(Arc::new(finished(config, Alpn::Join)))
}

fn finished(mut config: ClientConfig, alpn: Alpn) -> ClientConfig {
    config.alpn_protocols = vec![alpn.name().to_vec()];
    config.resumption = Resumption::disabled();
    config
}

impl Roots {
    /// How a node dials a manager that its certificate proves nothing to.
    pub fn client_config(&self, alpn: Alpn) -> Result<Arc<ClientConfig>, Error> {
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
        let config = builder.with_webpki_verifier(self.verifier()?).with_no_client_auth();
        Ok(Arc::new(finished(config, alpn)))
    }

    fn verifier(&self) -> Result<Arc<WebPkiServerVerifier>, Error> {
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(self.store()), provider());
        verifier.build().map_err(|error| Error::General(error.to_string()))
    }
}

impl Credential {
    /// How a node dials a manager.
    pub fn client_config(&self, alpn: Alpn) -> Result<Arc<ClientConfig>, Error> {
        let own = SingleCertAndKey::from(CertifiedKey::clone(self.identity.certified()));
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
        let builder = builder.with_webpki_verifier(self.roots.verifier()?);
        Ok(Arc::new(finished(builder.with_client_cert_resolver(Arc::new(own)), alpn)))
    }
}

/// How a manager answers: with `identity`'s chain and the `trusted` roots behind it, for those that know one of them by
/// its digest. Certificates are asked for, and verified where there is one.
pub fn server_config(
    identity: &Identity,
    trusted: &Roots,
    protocols: &[Alpn],
) -> Result<Arc<ServerConfig>, Error> {
    let roots = Arc::clone(trusted.store());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
    let verifier = verifier.allow_unauthenticated().clear_root_hint_subjects().build();
    let verifier = verifier.map_err(|error| Error::General(error.to_string()))?;
    let mut own = CertifiedKey::clone(identity.certified());
    own.cert.extend(trusted.certificates().iter().cloned());
    let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    let resolver = Arc::new(SingleCertAndKey::from(own));
    let mut config = builder.with_client_cert_verifier(verifier).with_cert_resolver(resolver);
    config.alpn_protocols = protocols.iter().map(|alpn| alpn.name().to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Dials a manager over `stream`. That it takes this side's certificate is known only once it has answered: until then,
/// [`is_certificate_refused`] tells what became of the stream.
pub async fn connect<S>(stream: S, config: Arc<ClientConfig>) -> Result<TlsStream<S>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let name =
        ServerName::try_from(SERVER_NAME).map_err(|error| HandshakeError::Io(io::Error::other(error)))?;
    TlsConnector::from(config).connect(name, stream).await.map_err(|error| match tls_error(&error) {
        Some(Error::InvalidCertificate(CertificateError::Other(OtherError(other))))
            if other.is::<NoSuchRoot>() =>
        {
            HandshakeError::Fingerprint
        }
        Some(untrusted @ Error::InvalidCertificate(_)) => HandshakeError::Untrusted(untrusted.clone()),
        _ => HandshakeError::Io(error),
    })
}

/// Whether a stream failed because the other side does not take this side's certificate.
pub fn is_certificate_refused(error: &io::Error) -> bool {
    let Some(Error::AlertReceived(alert)) = tls_error(error) else { return false };
    matches!(
        alert,
        AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::DecryptError
            | AlertDescription::AccessDenied
            | AlertDescription::CertificateRequired
    )
}

/// The node on the other side of a connection whose certificates are verified; `None` where it showed none.
pub fn peer_of(certificates: Option<&[CertificateDer<'_>]>) -> Result<Option<Peer>, NotANode> {
    certificates.and_then(<[_]>::first).map(Peer::of).transpose()
}

/// Trusts the root that a join token names, and nothing before.
#[derive(Debug)]
struct Pinned {
    token: JoinToken,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let root = intermediates.iter().find(|certificate| self.token.names(&digest(certificate)));
        let no_such_root =
            || Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(NoSuchRoot))));
        let mut roots = RootCertStore::empty();
        roots.add(root.ok_or_else(no_such_root)?.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
        let verifier = verifier.map_err(|error| Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
