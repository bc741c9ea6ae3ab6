//! The managers' port, over real TLS: who is let in, and everybody who is not.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use futures::FutureExt as _;
use mesh_api::codec::JOIN_FRAME_BYTES_MAX;
use mesh_api::tls::testing::{Ca, Wanted};
use mesh_api::tls::{Alpn, HandshakeError, Shared, connect, join_config, provider};
use mesh_api::token::JoinToken;
use tokio::io::{AsyncReadExt as _, DuplexStream};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::{self, ClientConfig};

use super::*;
use crate::leader::Leader;
use crate::pki::{First, Subject, first_manager};
use crate::session::Listener;

pub(super) const HOUR: Duration = Duration::from_hours(1);

/// A manager with its port.
pub(super) struct Port {
    pub(super) server: Arc<Server>,
    pub(super) cluster: Cluster,
    pub(super) addr: SocketAddr,
    /// What the manager proves itself with.
    pub(super) credential: Shared,
    leader: Leader,
    listening: JoinHandle<()>,
}

impl Port {
    pub(super) async fn new(dir: &std::path::Path) -> Self {
        let cluster = Cluster::create(dir, InitRequest::default()).await.unwrap();
        let First { credential, .. } = first_manager(&cluster, "m1".into(), description("m1")).await.unwrap();
        Self::open(cluster, credential).await
    }

    pub(super) async fn open(cluster: Cluster, credential: Credential) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        Self::open_at(listener, cluster, credential)
    }

    pub(super) fn open_at(listener: TcpListener, cluster: Cluster, credential: Credential) -> Self {
        let shared = Shared::default();
        shared.set(Some(Arc::new(credential)));
        let server = Server::new(cluster.clone());
        let leader = Leader::start(&cluster, &server);
        let addr = listener.local_addr().unwrap();
        // Tells each manager that it is one.
        let welcome = Arc::new(|mut stream: Box<dyn crate::session::Stream>, peer: Peer| {
            async move {
                assert_eq!(peer.role, Role::Manager);
                stream.write_all(b"raft").await.unwrap();
                stream.shutdown().await.unwrap();
            }
            .boxed()
        });
        let port = Listener::new(Arc::clone(&server), shared.clone()).with_raft(welcome);
        let listening = tokio::spawn(port.serve(listener));
        Self { server, cluster, addr, credential: shared, leader, listening }
    }

    pub(super) async fn close(self) {
        self.listening.abort();
        let _ = self.listening.await;
        self.leader.stop().await;
        drop(self.server);
        self.cluster.shutdown().await;
    }

    pub(super) fn token(&self) -> JoinToken {
        self.cluster.join_token(Role::Worker)
    }

    pub(super) async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    pub(super) async fn tls(
        &self,
        config: Arc<ClientConfig>,
    ) -> Result<TlsStream<TcpStream>, HandshakeError> {
        connect(self.tcp().await, config).await
    }

    /// Joins by `token`.
    pub(super) async fn join(&self, token: &JoinToken, hostname: &str) -> Result<Credential, HandshakeError> {
        let stream = self.tls(join_config(token).unwrap()).await?;
        let key = KeyRequest::new().unwrap();
        let (token, csr) = (token.to_string(), key.csr().to_owned());
        let node = description(hostname);
        let request = JoinRequest { protocol: PROTOCOL_VERSION, token, csr, node };
        match ask(stream, &request).await {
            Some(JoinAnswer::Joined { chain, roots, .. }) => Ok(Credential {
                identity: key.identity(&chain).unwrap(),
                roots: Roots::from_pem(&roots).unwrap(),
            }),
            answer => panic!("unexpected: {answer:?}"),
        }
    }

    /// Opens a session as far as TLS goes.
    pub(super) async fn session(&self, credential: &Credential) -> FakeAgent {
        let stream = self.tls(credential.client_config(Alpn::Session).unwrap()).await.unwrap();
        FakeAgent::over(stream, tokio::spawn(async { Ok(()) }), credential.identity.peer())
    }

    /// Opens a session.
    pub(super) async fn resume(&self, credential: &Credential, hostname: &str) -> FakeAgent {
        let mut agent = self.session(credential).await;
        agent.say(resume(hostname, None)).await;
        match agent.hear().await {
            Some(ManagerMessage::Resumed { .. }) => agent,
            answer => panic!("{hostname}: {answer:?}"),
        }
    }

    /// A certificate from the cluster's own CA, that it never gave to anybody.
    pub(super) fn forge(&self, subject: &Subject, at: SystemTime) -> Credential {
        let ca = &self.cluster.state().cluster.unwrap().ca;
        let key = KeyRequest::new().unwrap();
        let issued = ca.sign(key.csr(), subject, HOUR, at).unwrap();
        let roots = Roots::from_pem(&ca.trusted()).unwrap();
        Credential { identity: key.identity(&issued.chain).unwrap(), roots }
    }

    /// What `attack` does is refused for `cause`, once, and for nothing else.
    pub(super) async fn refuses(&self, what: &str, cause: Cause, attack: impl Future<Output = ()>) {
        let before: Vec<u64> = Cause::ALL.iter().map(|cause| self.server.refusals().get(*cause)).collect();
        let attempt = async {
            attack.await;
            while self.server.refusals().get(cause) == before[cause as usize] {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let refused = tokio::time::timeout(Duration::from_secs(20), attempt).await;
        let now: Vec<u64> = Cause::ALL.iter().map(|cause| self.server.refusals().get(*cause)).collect();
        assert!(refused.is_ok(), "{what}: not refused for {cause:?}: {before:?} {now:?}");
        for other in Cause::ALL {
            let expected = u64::from(other == cause);
            assert_eq!(now[other as usize] - before[other as usize], expected, "{what}: {other:?}");
        }
    }
}

/// Whom a certificate is of.
pub(super) fn subject(peer: &Peer) -> Subject {
    Subject { node: peer.node.clone(), role: peer.role, cluster: peer.cluster.clone() }
}

/// Says `request`, and hears the answer.
async fn ask<S: AsyncRead + AsyncWrite>(stream: S, request: &JoinRequest) -> Option<JoinAnswer> {
    let (reading, writing) = tokio::io::split(stream);
    let (mut reader, mut writer) =
        (FrameReader::new(reading, JOIN_FRAME_BYTES_MAX), FrameWriter::new(writing));
    writer.send(request).await.unwrap();
    reader.next().await.unwrap_or_default()
}

/// Nothing more comes on the stream, whether it ends well or not.
pub(super) async fn drained<S: AsyncRead + Unpin>(mut stream: S) -> Vec<u8> {
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    rest
}

/// A client that trusts whom it is told, shows nothing, and says what ALPN it likes.
fn client(roots: &Roots, alpn: &[&[u8]]) -> Arc<ClientConfig> {
    let mut store = rustls::RootCertStore::empty();
    store.add_parsable_certificates(roots.certificates().iter().cloned());
    let builder = ClientConfig::builder_with_provider(provider());
    let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
    let mut config = builder.with_root_certificates(store).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|alpn| alpn.to_vec()).collect();
    Arc::new(config)
}

/// The hello of a client that speaks TLS 1.2 alone.
fn hello_of_tls12() -> Vec<u8> {
    let suites = [0xc0_u8, 0x2b, 0xc0, 0x2f];
    // Groups: P-256. Signatures: ECDSA with P-256.
    let extensions = [0x00, 0x0a, 0, 4, 0, 2, 0, 23, 0x00, 0x0d, 0, 4, 0, 2, 4, 3_u8];
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.push(0);
    body.extend([0, suites.len() as u8]);
    body.extend(suites);
    body.extend([1, 0, 0, extensions.len() as u8]);
    body.extend(extensions);
    let mut message = vec![1, 0, 0, body.len() as u8];
    message.extend(body);
    [&[22, 3, 1, 0, message.len() as u8], &message[..]].concat()
}

#[tokio::test]
async fn a_host_joins_once_and_is_known_by_its_certificate_from_then_on() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let worker = port.join(&port.token(), "n1").await.unwrap();
    worker.check().unwrap();
    assert_eq!(worker.identity.peer().role, Role::Worker);
    let mut agent = port.resume(&worker, "n1").await;
    let create = Action::CreateService { id: "web".into(), spec: Box::new(service("web", 2)) };
    port.cluster.propose(Command::now(create)).await.unwrap();
    let manager = port.credential.get().unwrap();
    let mut own = port.resume(&manager, "m1").await;
    tokio::join!(agent.until(|agent| agent.running() == 2), own.until(|agent| agent.running() == 2));
    let before = agent.table.clone().unwrap();
    port.close().await;
    drop((agent, own));

    // With the same certificates to a manager that was restarted.
    let cluster = Cluster::open(dir.path()).await.unwrap();
    let port = Port::open(cluster, Credential::clone(&manager)).await;
    let mut own = port.resume(&manager, "m1").await;
    let mut agent = port.resume(&worker, "n1").await;
    tokio::join!(agent.until(|agent| agent.running() == 2), own.until(|agent| agent.running() == 2));
    let after = agent.table.clone().unwrap();
    assert!(after.index >= before.index);
    assert_eq!(after.tasks, before.tasks, "the same tasks, addresses and incarnations");
    assert_eq!(port.server.refusals().counted(), []);
    port.close().await;
}

#[tokio::test]
async fn every_attack_is_refused_for_what_it_is_and_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let honest = port.join(&port.token(), "n1").await.unwrap();
    let mut beside = port.resume(&honest, "n1").await;
    let manager = port.credential.get().unwrap();
    let (worker_peer, manager_peer) = (honest.identity.peer(), manager.identity.peer());

    // What is no TLS, and what is too old.
    let noise: Vec<u8> = (0..4096_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for (what, bytes) in [
        ("plain HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("a frame of the session", [&[0, 0, 0, 2], &b"{}"[..]].concat()),
        ("noise", noise),
        ("TLS 1.2", hello_of_tls12()),
        ("silence, and its end", Vec::new()),
    ] {
        let attack = async {
            let mut stream = port.tcp().await;
            stream.write_all(&bytes).await.unwrap();
            stream.shutdown().await.unwrap();
            let answer = drained(stream).await;
            assert!(answer.is_empty() || answer[0] == 21, "{what}: an alert at most: {answer:?}");
        };
        port.refuses(what, Cause::Handshake, attack).await;
    }

    // Other protocols.
    for (what, alpn) in [("no ALPN", &[][..]), ("another ALPN", &[&b"h2"[..]][..])] {
        let attack = async {
            if let Ok(stream) = port.tls(client(&honest.roots, alpn)).await {
                assert_eq!(drained(stream).await, b"");
            }
        };
        port.refuses(what, Cause::Protocol, attack).await;
    }

    // No certificate where one is needed.
    for alpn in [Alpn::Session, Alpn::Raft] {
        let attack = async {
            let stream = port.tls(client(&honest.roots, &[alpn.name()])).await.unwrap();
            assert_eq!(drained(stream).await, b"");
        };
        port.refuses("no certificate", Cause::Anonymous, attack).await;
    }

    // Certificates that prove nothing, by themselves or any more.
    let now = SystemTime::now();
    let other_ca = Ca::new();
    let cluster = worker_peer.cluster.as_str();
    let role = Role::Manager;
    let other = other_ca.credential(&Wanted::new(manager_peer.node.as_str(), role, cluster));
    let other = Credential { roots: honest.roots.clone(), ..other };
    let other_cluster = Subject { cluster: "another".into(), ..subject(manager_peer) };
    let removed = port.join(&port.token(), "n2").await.unwrap();
    let action = Action::RemoveNode { id: removed.identity.peer().node.clone(), force: true };
    port.cluster.propose(Command::now(action)).await.unwrap();
    let cases = [
        ("another CA's", Cause::Certificate, other),
        ("expired", Cause::Certificate, port.forge(&subject(manager_peer), now - 2 * HOUR)),
        ("not yet valid", Cause::Certificate, port.forge(&subject(manager_peer), now + 3 * HOUR)),
        ("another cluster's", Cause::Node, port.forge(&other_cluster, now)),
        ("a removed node's", Cause::Node, removed),
    ];
    for (what, cause, credential) in cases {
        for alpn in [Alpn::Session, Alpn::Raft] {
            let attack = async {
                let stream = port.tls(credential.client_config(alpn).unwrap()).await.unwrap();
                let (reading, writing) = tokio::io::split(stream);
                let mut writer = FrameWriter::new(writing);
                let _ = writer.send(&resume("m1", None)).await;
                let answer = drained(reading).await;
                let said = String::from_utf8_lossy(&answer);
                let is_told = alpn == Alpn::Session && cause == Cause::Node;
                assert_eq!(said.contains("leave the swarm and join it again"), is_told, "{what}: {said}");
                assert!(is_told || answer.is_empty(), "{what}: {said}");
            };
            port.refuses(what, cause, attack).await;
        }
    }

    // A worker where a manager is expected.
    let raft = |credential: &Credential| {
        let config = credential.client_config(Alpn::Raft).unwrap();
        async { drained(port.tls(config).await.unwrap()).await }
    };
    assert_eq!(raft(&manager).await, b"raft");
    port.refuses("a worker's", Cause::Role, async { assert_eq!(raft(&honest).await, b"") }).await;

    beside.say(AgentMessage::Alive).await;
    let create = Action::CreateService { id: "web".into(), spec: Box::new(service("web", 1)) };
    port.cluster.propose(Command::now(create)).await.unwrap();
    beside.until(|agent| agent.table.as_ref().is_some_and(|table| table.services.len() == 1)).await;
    port.close().await;
}

#[tokio::test]
async fn whoever_is_not_asked_to_join_does_not_join() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let token = port.token();
    let key = KeyRequest::new().unwrap();
    let node = || description("n1");
    let good = || JoinRequest {
        protocol: PROTOCOL_VERSION,
        token: token.to_string(),
        csr: key.csr().to_owned(),
        node: node(),
    };
    let asked = async |request: JoinRequest| {
        let stream = port.tls(join_config(&token).unwrap()).await.unwrap();
        ask(stream, &request).await
    };
    // Tokens with this cluster's digest and another secret, or the other way round.
    let flipped = |text: &str| {
        let (head, last) = text.split_at(text.len() - 1);
        format!("{head}{}", if last == "0" { "1" } else { "0" })
    };
    let other = JoinToken::new(&[7; 32], &[8; 16]);
    let mixed = JoinToken { digest: other.digest.clone(), secret: token.secret.clone() };
    for wrong in [flipped(&token.to_string()), other.to_string(), mixed.to_string(), "SWMTKN".to_owned()] {
        let attack = async {
            let answer = asked(JoinRequest { token: wrong.clone(), ..good() }).await;
            let refused =
                matches!(&answer, Some(JoinAnswer::Refused { reason: RefusalReason::InvalidToken, .. }));
            assert!(refused, "{wrong}: {answer:?}");
        };
        port.refuses("a wrong token", Cause::Token, attack).await;
    }
    let mut broken = key.csr().to_owned();
    let at = broken.find("-----END").unwrap() - 8;
    let letter = if &broken[at..=at] == "x" { "y" } else { "x" };
    broken.replace_range(at..=at, letter);
    let attack = async {
        let answer = asked(JoinRequest { csr: broken, ..good() }).await;
        let refused = matches!(&answer, Some(JoinAnswer::Refused { reason: RefusalReason::Certificate, .. }));
        assert!(refused, "{answer:?}");
    };
    port.refuses("a request that its key did not sign", Cause::Message, attack).await;
    let attack = async {
        let huge = "x".repeat(JOIN_FRAME_BYTES_MAX as usize);
        let stream = port.tls(join_config(&token).unwrap()).await.unwrap();
        let (reading, writing) = tokio::io::split(stream);
        let _ = FrameWriter::new(writing).send(&JoinRequest { csr: huge, ..good() }).await;
        assert_eq!(drained(reading).await, b"");
    };
    port.refuses("a request that is too long", Cause::Message, attack).await;
    assert_eq!(port.cluster.state().nodes.len(), 1, "the manager itself");

    // What the good request looks like on the wire is good for nothing.
    let (recorded, answer) = overheard(&port, &good()).await;
    assert!(matches!(answer, Some(JoinAnswer::Joined { .. })));
    assert_eq!(port.cluster.state().nodes.len(), 2);
    let secret = token.secret.as_bytes();
    assert!(!recorded.windows(secret.len()).any(|bytes| bytes == secret), "the token in the clear");
    let attack = async {
        let mut stream = port.tcp().await;
        stream.write_all(&recorded).await.unwrap();
        stream.shutdown().await.unwrap();
        drained(stream).await;
    };
    port.refuses("a replay", Cause::Handshake, attack).await;
    assert_eq!(port.cluster.state().nodes.len(), 2);

    // A rotated token opens nothing from the next request on.
    let state = port.cluster.state();
    let cluster = state.cluster.as_ref().unwrap();
    let (version, spec) = (cluster.meta.version, cluster.spec.clone());
    let worker_secret = Some([9; 16]);
    let rotate = Action::UpdateCluster {
        version,
        spec,
        worker_secret,
        manager_secret: None,
        rotation: None,
        unlock_key: None,
    };
    port.cluster.propose(Command::now(rotate)).await.unwrap();
    let attack = async {
        assert!(matches!(asked(good()).await, Some(JoinAnswer::Refused { .. })));
    };
    port.refuses("a rotated token", Cause::Token, attack).await;
    port.join(&port.token(), "n2").await.unwrap();
    port.close().await;
}

#[tokio::test]
async fn no_neighbour_of_a_token_opens_anything() {
    let (_dir, server) = server().await;
    let key = KeyRequest::new().unwrap();
    let good = join_request(&server, key.csr(), "n1");
    let digits = "0123456789abcdefghijklmnopqrstuvwxyz";
    for at in "SWMTKN-1-".len()..good.token.len() {
        for digit in digits.chars().step_by(5) {
            let mut token = good.token.clone();
            token.replace_range(at..=at, digit.encode_utf8(&mut [0; 4]));
            if token != good.token {
                let refused = join::admit(&server, JoinRequest { token, ..good.clone() }).await;
                assert_eq!(reason(refused), RefusalReason::InvalidToken);
            }
        }
    }
    assert!(server.cluster.state().nodes.is_empty());
    assert!(join::admit(&server, good).await.is_ok());
}

/// Joins through an eavesdropper: what the host sent, and the answer.
async fn overheard(port: &Port, request: &JoinRequest) -> (Vec<u8>, Option<JoinAnswer>) {
    let (ours, mut middle): (DuplexStream, DuplexStream) = tokio::io::duplex(1 << 16);
    let mut onwards = port.tcp().await;
    let listening = tokio::spawn(async move {
        let mut heard = Vec::new();
        let (mut from, mut to) = ([0; 4096], [0; 4096]);
        loop {
            tokio::select! {
                Ok(count) = middle.read(&mut from) => {
                    if count == 0 {
                        return heard;
                    }
                    heard.extend(&from[..count]);
                    onwards.write_all(&from[..count]).await.unwrap();
                }
                Ok(count) = onwards.read(&mut to) => {
                    if count == 0 {
                        return heard;
                    }
                    middle.write_all(&to[..count]).await.unwrap();
                }
            }
        }
    });
    let config = join_config(&port.token()).unwrap();
    let answer = ask(connect(ours, config).await.unwrap(), request).await;
    (listening.await.unwrap(), answer)
}

#[tokio::test]
async fn a_host_says_nothing_to_a_manager_that_its_token_does_not_name() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let other = JoinToken { secret: port.token().secret, ..JoinToken::new(&[7; 32], &[8; 16]) };
    let attack = async {
        let refused = port.join(&other, "n1").await;
        assert!(matches!(refused, Err(HandshakeError::Fingerprint)), "{refused:?}");
    };
    port.refuses("a host with another cluster's token", Cause::Handshake, attack).await;

    // Nor to one that sends the right root, and is not of it.
    let worker = port.join(&port.token(), "n1").await.unwrap();
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let impostor = Ca::new().credential(&Wanted::new("m1", Role::Manager, "c"));
    for (identity, what) in [(&impostor.identity, "another CA's"), (&worker.identity, "a worker's")] {
        let config = mesh_api::tls::server_config(identity, &worker.roots, &Alpn::ALL).unwrap();
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let server = tokio_rustls::TlsAcceptor::from(config).accept(theirs);
        let host = connect(ours, join_config(&port.token()).unwrap());
        let (host, server) = tokio::join!(host, server);
        assert!(matches!(host, Err(HandshakeError::Untrusted(_))), "{what}: {host:?}");
        assert!(server.is_err(), "{what}: it gets no further than the handshake");
    }
    drop((ours, theirs));
    port.close().await;
}

#[tokio::test]
async fn silent_and_dribbling_peers_are_dropped_and_hold_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let worker = port.join(&port.token(), "n1").await.unwrap();
    let began = tokio::time::Instant::now();
    // More than there is room for, half of which begin a handshake; and hosts that say nothing once they may.
    let mut flood = Vec::new();
    for at in 0..super::super::HANDSHAKES_MAX + 64 {
        let mut stream = from(Ipv4Addr::new(127, 0, 0, 9).into(), port.addr).await;
        if at % 2 == 0 {
            stream.write_all(&[22, 3, 1, 2, 0, 1, 0]).await.unwrap();
        }
        flood.push(stream);
    }
    let mute = port.tls(join_config(&port.token()).unwrap()).await.unwrap();
    let dribble = async {
        let mut stream = port.tls(join_config(&port.token()).unwrap()).await.unwrap();
        while stream.write_all(&[0]).await.is_ok() && stream.flush().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let honest = async {
        let began = tokio::time::Instant::now();
        let mut agent = port.resume(&worker, "n1").await;
        agent.until(|agent| agent.table.is_some()).await;
        let other = port.join(&port.token(), "n2").await.unwrap();
        drop(port.resume(&other, "n2").await);
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    };
    let (rest, (), ()) = tokio::join!(drained(mute), dribble, honest);
    assert_eq!(rest, b"");
    for stream in flood {
        drained(stream).await;
    }
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    let refusals = port.server.refusals();
    assert!(refusals.get(Cause::Crowded) >= 64, "{:?}", refusals.counted());
    assert!(refusals.get(Cause::Slow) >= 2, "{:?}", refusals.counted());
    assert_eq!(port.server.slots.len(), 0);
    port.close().await;
}

/// A connection from an address of its own.
pub(super) async fn from(source: IpAddr, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    socket.connect(to).await.unwrap()
}
