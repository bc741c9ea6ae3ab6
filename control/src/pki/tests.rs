//! What the certificate authority signs, and whom that convinces.

use std::time::{Duration, SystemTime};

use mesh_api::table::Role;
use mesh_api::tls::{BACKDATE, Credential, IdentityError, KeyRequest, Roots, digest};
use proptest::prelude::*;
use rcgen::{CertificateParams, DnType, KeyPair};

use super::{Authority, PkiError, Rotation, Subject};

const DAY: Duration = Duration::from_hours(24);

fn subject(role: Role) -> Subject {
    Subject { node: "n1".into(), role, cluster: "c1".into() }
}

fn credential(ca: &Authority, trusted: &str) -> Credential {
    let key = KeyRequest::new().unwrap();
    let issued = ca.sign(key.csr(), &subject(Role::Worker), DAY, SystemTime::now()).unwrap();
    Credential { identity: key.identity(&issued.chain).unwrap(), roots: Roots::from_pem(trusted).unwrap() }
}

#[test]
fn a_certificate_says_what_the_managers_know_and_nothing_of_the_request() {
    let now = SystemTime::now();
    let ca = Authority::generate(now).unwrap();
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::new(vec!["swarm-manager".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "n2");
    params.distinguished_name.push(DnType::OrganizationalUnitName, "swarm-manager");
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    let issued = ca.sign(&csr, &subject(Role::Worker), DAY, now).unwrap();
    let identity = mesh_api::tls::Identity::from_pem(&(key.serialize_pem() + &issued.chain)).unwrap();
    let peer = identity.peer();
    assert_eq!((peer.node.as_str(), peer.role, peer.cluster.as_str()), ("n1", Role::Worker, "c1"));
    assert_eq!((peer.issuer, issued.issuer), (ca.root.id, ca.root.id));
    let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert_eq!(seconds(peer.not_before), seconds(now - BACKDATE));
    assert_eq!(seconds(peer.not_after), seconds(now + DAY));
}

#[test]
fn requests_that_prove_no_key_are_refused() {
    let now = SystemTime::now();
    let ca = Authority::generate(now).unwrap();
    let good = KeyRequest::new().unwrap();
    let mut broken = good.csr().to_owned();
    // The last character of the signature, two lines from the end.
    let at = broken.find("-----END").unwrap() - 4;
    let other = if &broken[at..=at] == "A" { "B" } else { "A" };
    broken.replace_range(at..=at, other);
    let foreign = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let foreign = CertificateParams::default().serialize_request(&foreign).unwrap().pem().unwrap();
    let wide = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let wide = CertificateParams::default().serialize_request(&wide).unwrap().pem().unwrap();
    for csr in
        [broken.as_str(), &foreign, &wide, "", "-----BEGIN CERTIFICATE REQUEST-----", &ca.root.certificate]
    {
        let refused = ca.sign(csr, &subject(Role::Worker), DAY, now);
        assert!(matches!(refused, Err(PkiError::Request)), "{csr}: {refused:?}");
    }
    assert!(ca.sign(good.csr(), &subject(Role::Worker), DAY, now).is_ok());
}

#[test]
fn during_a_rotation_nodes_of_both_roots_believe_each_other() {
    let now = SystemTime::now();
    let mut ca = Authority::generate(now).unwrap();
    let old = ca.trusted();
    credential(&ca, &old).check().unwrap();
    ca.rotation = Some(ca.next(now).unwrap());
    let (both, next) = (ca.trusted(), ca.signer().certificate.clone());
    assert_ne!(ca.signer().id, ca.root.id);
    let before = Authority { rotation: None, ..ca.clone() };
    for trusted in [&old, &both, &next] {
        credential(&ca, trusted).check().unwrap();
    }
    credential(&before, &both).check().unwrap();
    let former = credential(&before, &next).check();
    assert!(matches!(former, Err(IdentityError::Untrusted(_))), "{former:?}");

    let Rotation { root, cross: _ } = ca.rotation.take().unwrap();
    assert_eq!(root.digest(), digest(Roots::from_pem(&next).unwrap().certificates()[0].as_ref()));
    ca.root = root;
    credential(&ca, &next).check().unwrap();
    let late = credential(&ca, &old).check();
    assert!(matches!(late, Err(IdentityError::Untrusted(_))), "{late:?}");
}

#[test]
fn keys_reach_no_log() {
    let ca = Authority::generate(SystemTime::now()).unwrap();
    let rotated = Authority { rotation: Some(ca.next(SystemTime::now()).unwrap()), ..ca };
    let shown = format!("{rotated:?}");
    let key: String = rotated.root.key.lines().nth(1).unwrap().to_owned();
    assert!(!shown.contains("PRIVATE") && !shown.contains(&key), "{shown}");
}

proptest! {
    #[test]
    fn whatever_a_request_holds_is_signed_or_refused(at in 0_usize..600, byte: u8, cut in 0_usize..600) {
        let ca = &crate::testing::CA;
        let mut csr = KeyRequest::new().unwrap().csr().as_bytes().to_vec();
        if let Some(place) = csr.get_mut(at) {
            *place = byte;
        }
        csr.truncate(csr.len().max(cut) - cut.min(csr.len()) / 8);
        let csr = String::from_utf8_lossy(&csr);
        let signed = ca.sign(&csr, &subject(Role::Manager), DAY, SystemTime::now());
        prop_assert!(matches!(signed, Ok(_) | Err(PkiError::Request)), "{:?}", signed);
    }
}
