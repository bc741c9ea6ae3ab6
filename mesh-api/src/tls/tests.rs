//! Handshakes over streams in memory, and what is read from bytes.

use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;

use super::testing::{Ca, Wanted};
use super::*;
use crate::table::Role;
use crate::token::JoinToken;

fn manager(ca: &Ca) -> Credential {
    ca.credential(&Wanted::new("m1", Role::Manager, "c"))
}

fn worker(ca: &Ca) -> Credential {
    ca.credential(&Wanted::new("n1", Role::Worker, "c"))
}

/// What a handshake with `server`, which trusts its own roots, comes to on both sides: the client's error, or what it reads
/// then; and the protocol and the peer that the server sees.
async fn handshake(
    server: &Credential,
    client: Arc<rustls::ClientConfig>,
) -> (Result<io::Result<Vec<u8>>, HandshakeError>, Option<(Option<Alpn>, Option<Peer>)>) {
    let config = server_config(&server.identity, &server.roots, &Alpn::ALL).unwrap();
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let answering = async {
        let mut stream = TlsAcceptor::from(config).accept(theirs).await.ok()?;
        stream.write_all(b"welcome").await.unwrap();
        stream.shutdown().await.unwrap();
        let (_, connection) = stream.get_ref();
        let alpn = connection.alpn_protocol().and_then(Alpn::of);
        Some((alpn, peer_of(connection.peer_certificates()).unwrap()))
    };
    let dialling = async {
        let mut stream = connect(ours, client).await?;
        let mut read = Vec::new();
        Ok(stream.read_to_end(&mut read).await.map(|_| read))
    };
    tokio::join!(dialling, answering)
}

#[tokio::test]
async fn members_know_each_other_and_a_host_knows_the_cluster_by_its_token() {
    let ca = Ca::new();
    for (credential, alpn) in
        [(worker(&ca), Alpn::Session), (manager(&ca), Alpn::Session), (manager(&ca), Alpn::Raft)]
    {
        let (read, seen) = handshake(&manager(&ca), credential.client_config(alpn).unwrap()).await;
        assert_eq!(read.unwrap().unwrap(), b"welcome");
        assert_eq!(seen, Some((Some(alpn), Some(credential.identity.peer().clone()))));
    }
    let token = JoinToken::new(&ca.digest(), &[1; 16]);
    let (read, seen) = handshake(&manager(&ca), join_config(&token).unwrap()).await;
    assert_eq!(read.unwrap().unwrap(), b"welcome");
    assert_eq!(seen, Some((Some(Alpn::Join), None)));
}

#[tokio::test]
async fn who_can_not_prove_to_be_a_manager_of_the_cluster_gets_no_word() {
    let (ca, other) = (Ca::new(), Ca::new());
    let own = worker(&ca).client_config(Alpn::Session).unwrap();
    let join = |digest: [u8; 32]| join_config(&JoinToken::new(&digest, &[1; 16])).unwrap();
    // With the right root behind it, that did not sign it.
    let pretender = Credential { roots: ca.roots(), ..manager(&other) };
    for (what, server, client) in [
        ("a worker", worker(&ca), own.clone()),
        ("another CA's manager", manager(&other), own.clone()),
        ("a pretender", pretender.clone(), own),
        ("a worker, to a host", worker(&ca), join(ca.digest())),
        ("a pretender, to a host", pretender, join(ca.digest())),
    ] {
        let (read, seen) = handshake(&server, client).await;
        assert!(matches!(read, Err(HandshakeError::Untrusted(_))), "{what}: {read:?}");
        assert_eq!(seen, None, "{what}");
    }
    for digest in [other.digest(), [0; 32]] {
        let (read, seen) = handshake(&manager(&ca), join(digest)).await;
        assert!(matches!(read, Err(HandshakeError::Fingerprint)), "{read:?}");
        assert_eq!(seen, None);
    }
}

#[tokio::test]
async fn who_shows_a_certificate_that_is_not_taken_learns_of_it() {
    let (ca, other) = (Ca::new(), Ca::new());
    let now = SystemTime::now();
    let wanted =
        |not_before, not_after| Wanted { not_before, not_after, ..Wanted::new("n1", Role::Worker, "c") };
    let hour = Duration::from_hours(1);
    for (what, client) in [
        ("another CA's", Credential { roots: ca.roots(), ..worker(&other) }),
        ("expired", ca.credential(&wanted(now - 2 * hour, now - hour))),
        ("not valid yet", ca.credential(&wanted(now + hour, now + 2 * hour))),
    ] {
        assert!(client.check().is_err(), "{what}");
        let (read, seen) = handshake(&manager(&ca), client.client_config(Alpn::Session).unwrap()).await;
        let error = read.unwrap().unwrap_err();
        assert!(is_certificate_refused(&error), "{what}: {error}");
        assert_eq!(seen, None, "{what}");
    }
}

#[test]
fn an_identity_reads_back_and_hides_its_key() {
    let ca = Ca::new();
    let credential = worker(&ca);
    credential.check().unwrap();
    let text = credential.identity.to_pem();
    let back = Identity::from_pem(&text).unwrap();
    assert_eq!((back.to_pem(), back.peer()), (text.clone(), credential.identity.peer()));
    let key = text.lines().nth(1).unwrap();
    let shown = format!("{credential:?} {:?}", KeyRequest::new().unwrap());
    assert!(shown.contains("n1") && !shown.contains(key) && !shown.contains("PRIVATE"), "{shown}");
    // Of one with another's key, or with none of either.
    let other = worker(&ca).identity.to_pem();
    let (_, chain) = text.split_once("-----END PRIVATE KEY-----\n").unwrap();
    let (key, _) = other.split_once("-----BEGIN CERTIFICATE-----").unwrap();
    assert!(matches!(Identity::from_pem(&format!("{key}{chain}")), Err(IdentityError::Key(_))));
    for part in [key, chain, ""] {
        assert!(matches!(Identity::from_pem(part), Err(IdentityError::Pem)), "{part}");
    }
    assert_eq!(Roots::from_pem(&ca.roots().to_pem()), Ok(ca.roots()));
    for text in ["", "x", key, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        assert_eq!(Roots::from_pem(text), Err(RootsError), "{text}");
    }
}

#[test]
fn certificates_of_no_node_are_told_from_those_of_nodes() {
    let ca = Ca::new();
    let key = rcgen::KeyPair::generate().unwrap();
    let read = |wanted: &Wanted<'_>| {
        Peer::of(&CertificateDer::from_pem_slice(ca.sign(wanted, &key).as_bytes()).unwrap())
    };
    let good = Wanted::new("n1", Role::Worker, "c");
    assert!(read(&good).is_ok());
    let long = "x".repeat(crate::id::ID_LEN + 1);
    for node in ["", "two words", "N1", &long] {
        assert!(read(&Wanted { node, ..good.clone() }).is_err(), "{node}");
        assert!(read(&Wanted { cluster: node, ..good.clone() }).is_err(), "{node}");
    }
    assert!(Peer::of(&ca.roots().certificates()[0]).is_err(), "a root");
    let facts = CertificateFacts::of(&ca.roots().certificates()[0]).unwrap();
    assert_eq!(facts.key_id, read(&good).unwrap().issuer);
}

static TEXT: LazyLock<(String, Vec<u8>)> = LazyLock::new(|| {
    let credential = worker(&Ca::new());
    let text = credential.identity.to_pem() + &credential.roots.to_pem();
    let der = CertificateDer::from_pem_slice(text.as_bytes()).unwrap().to_vec();
    (text, der)
});

fn read_all(text: &str, der: &[u8]) {
    let _ = Identity::from_pem(text);
    let _ = Roots::from_pem(text);
    let _ = KeyRequest::new().map(|key| key.identity(text).is_ok());
    let _ = text.parse::<JoinToken>();
    let der = CertificateDer::from(der.to_vec());
    let _ = (Peer::of(&der).is_ok(), CertificateFacts::of(&der).is_ok());
}

proptest! {
    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        read_all(&String::from_utf8_lossy(&bytes), &bytes);
    }

    #[test]
    fn no_change_of_good_bytes_makes_a_decoder_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        is_cut: bool,
    ) {
        let (text, der) = &*TEXT;
        let (mut text, mut der) = (text.clone().into_bytes(), der.clone());
        for (at, byte) in changes {
            let (in_text, in_der) = (at.index(text.len()), at.index(der.len()));
            (text[in_text], der[in_der]) = (byte, byte);
        }
        if is_cut {
            text.truncate(cut.index(text.len()));
            der.truncate(cut.index(der.len()));
        }
        read_all(&String::from_utf8_lossy(&text), &der);
    }

    #[test]
    fn tokens_are_read_as_they_are_written_or_not_at_all(digest: [u8; 32], secret: [u8; 16], at: prop::sample::Index, byte in 0_u8..128) {
        let token = JoinToken::new(&digest, &secret);
        let mut text = token.to_string().into_bytes();
        prop_assert_eq!(String::from_utf8_lossy(&text).parse(), Ok(token));
        let at = at.index(text.len());
        text[at] = byte;
        let text = String::from_utf8_lossy(&text);
        if let Ok(other) = text.parse::<JoinToken>() {
            prop_assert_eq!(other.to_string(), text);
        }
    }
}
