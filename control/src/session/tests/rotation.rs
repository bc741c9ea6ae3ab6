//! Renewal of certificates, and the change from one root to the next under load.

use std::sync::atomic::{AtomicBool, Ordering};

use mesh_api::tls::HandshakeError;

use super::port::Port;
use super::*;

/// A node that follows what the managers ask of its certificate, in one session after the other.
struct Follower {
    hostname: String,
    credential: Credential,
    /// It keeps the manager's own credential too.
    shared: Option<mesh_api::tls::Shared>,
    sessions: usize,
}

impl Follower {
    /// One session of some messages.
    async fn session(&mut self, port: &Port, messages: usize) {
        let mut agent = port.session(&self.credential).await;
        agent.say(resume(&self.hostname, None)).await;
        match agent.hear().await {
            Some(ManagerMessage::Resumed { roots, .. }) => self.trust(&roots),
            answer => panic!("{}: {answer:?}", self.hostname),
        }
        self.sessions += 1;
        let mut asked: Option<KeyRequest> = None;
        for _ in 0..messages {
            let Ok(heard) = tokio::time::timeout(Duration::from_millis(100), agent.reader.next()).await
            else {
                agent.say(AgentMessage::Alive).await;
                // The reader may be amid a frame.
                return;
            };
            match heard.unwrap().expect("the session goes on") {
                ManagerMessage::Renew => {
                    let key = KeyRequest::new().unwrap();
                    agent.say(AgentMessage::Renew { csr: key.csr().to_owned() }).await;
                    asked = Some(key);
                }
                ManagerMessage::Certificate { chain, roots } => {
                    let identity = asked.take().unwrap().identity(&chain).unwrap();
                    self.keep(Credential { identity, roots: Roots::from_pem(&roots).unwrap() });
                    agent.say(AgentMessage::Renewed).await;
                }
                ManagerMessage::Trust { roots } => self.trust(&roots),
                ManagerMessage::Refused { message, .. } => panic!("{}: {message}", self.hostname),
                _ => {}
            }
        }
    }

    fn trust(&mut self, roots: &str) {
        let roots = Roots::from_pem(roots).unwrap();
        self.keep(Credential { roots, ..self.credential.clone() });
    }

    fn keep(&mut self, credential: Credential) {
        credential.check().unwrap();
        if let Some(shared) = &self.shared {
            shared.set(Some(Arc::new(credential.clone())));
        }
        self.credential = credential;
    }
}

#[tokio::test]
async fn the_root_changes_under_load_and_no_session_and_no_join_fails() {
    let dir = tempfile::tempdir().unwrap();
    let port = Arc::new(Port::new(dir.path()).await);
    let first = port.cluster.state().cluster.unwrap();
    let token = port.token();
    let mut followers = vec![Follower {
        hostname: "m1".to_owned(),
        credential: Credential::clone(&port.credential.get().unwrap()),
        shared: Some(port.credential.clone()),
        sessions: 0,
    }];
    for at in 0..4 {
        let hostname = format!("n{at}");
        let credential = port.join(&token, &hostname).await.unwrap();
        followers.push(Follower { hostname, credential, shared: None, sessions: 0 });
    }
    let stop = Arc::new(AtomicBool::new(false));
    let running: Vec<JoinHandle<Follower>> = followers
        .into_iter()
        .map(|mut follower| {
            let (port, stop) = (Arc::clone(&port), Arc::clone(&stop));
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    follower.session(&port, 6).await;
                }
                follower
            })
        })
        .collect();
    let writing = {
        let (cluster, stop) = (port.cluster.clone(), Arc::clone(&stop));
        tokio::spawn(async move {
            let mut written = 0;
            while !stop.load(Ordering::Relaxed) {
                let create = Action::CreateNetwork {
                    id: format!("net{written}").as_str().into(),
                    spec: crate::testing::network(&format!("net{written}")),
                };
                cluster.propose(Command::now(create)).await.unwrap();
                written += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            written
        })
    };

    let rotation = first.ca.next(SystemTime::now()).unwrap();
    let next = rotation.root.id;
    let present = port.cluster.state().cluster.unwrap();
    let rotate = Action::UpdateCluster {
        version: present.meta.version,
        spec: present.spec.clone(),
        worker_secret: None,
        manager_secret: None,
        rotation: Some(Box::new(rotation)),
        unlock_key: None,
    };
    port.cluster.propose(Command::now(rotate)).await.unwrap();
    assert_eq!(port.token(), token, "the former root's until nobody needs it");
    let late = port.join(&token, "late").await.unwrap();
    assert_eq!(late.identity.peer().issuer, next);
    let mut states = port.cluster.watch();
    let is_over = |state: &State| state.cluster.as_ref().unwrap().ca.rotation.is_none();
    tokio::time::timeout(Duration::from_secs(30), states.wait_for(is_over)).await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    stop.store(true, Ordering::Relaxed);
    assert!(writing.await.unwrap() > 0);
    for follower in running {
        let Follower { credential, sessions, hostname, .. } = follower.await.unwrap();
        assert!(sessions > 1, "{hostname}");
        assert_eq!(credential.identity.peer().issuer, next, "{hostname}");
        assert_eq!(credential.roots.certificates().len(), 1, "{hostname} trusts the next root alone");
    }
    // Who was away since the beginning of the rotation comes back by what it has.
    drop(port.resume(&late, "late").await);
    let now = port.cluster.state().cluster.unwrap();
    assert_eq!((now.ca.root.id, now.ca.rotation.is_none()), (next, true));
    assert_ne!(now.join_secrets, first.join_secrets, "who has the former key may have been shown them");
    let outdated = port.join(&token, "n9").await;
    assert!(matches!(outdated, Err(HandshakeError::Fingerprint)), "{outdated:?}");
    port.join(&port.token(), "n9").await.unwrap();
    let counted = port.server.refusals().counted();
    assert_eq!(counted, [(Cause::Handshake, 1)], "the outdated token's host alone");
}

#[tokio::test]
async fn a_renewed_certificate_says_what_the_node_is_by_then_and_lives_as_long_as_is_set() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let worker = port.join(&port.token(), "n1").await.unwrap();
    let life = |credential: &Credential| {
        let peer = credential.identity.peer();
        peer.not_after.duration_since(peer.not_before + mesh_api::tls::BACKDATE).unwrap()
    };
    assert_eq!(life(&worker), Duration::from_hours(90 * 24));
    let cluster = port.cluster.state().cluster.unwrap();
    let mut spec = cluster.spec.clone();
    spec.cert_expiry_ns = 2 * 3600 * 1_000_000_000;
    let update = Action::UpdateCluster {
        version: cluster.meta.version,
        spec,
        worker_secret: None,
        manager_secret: None,
        rotation: None,
        unlock_key: None,
    };
    port.cluster.propose(Command::now(update)).await.unwrap();
    let mut agent = port.resume(&worker, "n1").await;
    let key = KeyRequest::new().unwrap();
    agent.say(AgentMessage::Renew { csr: key.csr().to_owned() }).await;
    let (chain, roots) = loop {
        let heard = agent.hear().await.expect("the session goes on");
        if let ManagerMessage::Certificate { chain, roots } = heard {
            break (chain, roots);
        }
    };
    let renewed =
        Credential { identity: key.identity(&chain).unwrap(), roots: Roots::from_pem(&roots).unwrap() };
    let (peer, former) = (renewed.identity.peer(), worker.identity.peer());
    assert_eq!((&peer.node, peer.role, &peer.cluster), (&former.node, former.role, &former.cluster));
    assert_eq!(life(&renewed), Duration::from_hours(2));
    drop(agent);
    // Both are good, until the former expires.
    drop(port.resume(&worker, "n1").await);
    drop(port.resume(&renewed, "n1").await);
    assert_eq!(port.server.refusals().counted(), []);
    port.close().await;
}
