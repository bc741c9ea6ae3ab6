//! The whole of it over sockets, with dig as the client, in a network namespace that is a host's.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::{A, SOA};
use hickory_proto::rr::{Name, RData, Record};
use mesh_api::table::Protocol;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::zone::tests::{ASKER, INNER, example, local, port};
use super::*;
use crate::links::HOST_ADDR;
use crate::sys::testing::{in_netns, run};

const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 53);
/// Nobody answers there, not even to say so.
const SILENT: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 99);

/// A name server with the zone's example, and a web service with ports, on a host with these resolvers.
struct Host {
    dns: Dns,
    table: watch::Sender<Option<Arc<Table>>>,
    folder: TempDir,
}

impl Host {
    async fn new(resolvers: &[Ipv4Addr]) -> Self {
        run("ip link set lo up");
        for addr in [HOST_ADDR, ASKER, INNER] {
            // The aliases are the host's own here, since no BPF program translates.
            run(&format!("ip address add {addr}/32 dev lo"));
        }
        let (mut table, _) = example();
        let web = table.services.get_mut(&"Web".into()).unwrap();
        web.ports = vec![port("http", Protocol::Tcp, 80)];
        let folder = tempfile::tempdir().unwrap();
        let (sender, tables) = watch::channel(Some(Arc::new(table.clone())));
        let mut host = Self {
            dns: Dns::start((HOST_ADDR, 53).into(), &folder.path().join("resolv.conf"), tables)
                .await
                .unwrap(),
            table: sender,
            folder,
        };
        host.resolvers(resolvers);
        host.dns.update(
            &table,
            &Touched::all(),
            &[local("abcdefghijklmnop", "front", ASKER), local("c1", "back", INNER)],
        );
        host
    }

    fn resolvers(&mut self, resolvers: &[Ipv4Addr]) {
        let lines: Vec<String> = resolvers.iter().map(|addr| format!("nameserver {addr}\n")).collect();
        std::fs::write(self.folder.path().join("resolv.conf"), lines.concat()).unwrap();
    }
}

/// Runs a test on a host that has dig; elsewhere says that it is skipped.
fn with_dig<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if Command::new("dig").arg("-v").output().is_err() {
        // As `in_netns` says it.
        let _ = std::io::stdout().write_all(b"\nSKIP: needs dig\n");
        return;
    }
    in_netns(test);
}

/// What dig prints.
async fn dig(from: Ipv4Addr, arguments: &str) -> String {
    let arguments = format!("-b {from} @{HOST_ADDR} +time=6 +tries=1 {arguments}");
    let output = tokio::task::spawn_blocking(move || {
        Command::new("dig").args(arguments.split_whitespace()).output().unwrap()
    });
    String::from_utf8(output.await.unwrap().stdout).unwrap()
}

/// The records that dig prints, in order.
async fn short(from: Ipv4Addr, arguments: &str) -> Vec<String> {
    let printed = dig(from, &format!("+short {arguments}")).await;
    let mut lines: Vec<_> = printed.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// The code that dig prints, and how many answers.
async fn status(from: Ipv4Addr, arguments: &str) -> (String, String) {
    let printed = dig(from, arguments).await;
    let field = |key: &str| {
        let found = printed.split_once(key).and_then(|(_, rest)| rest.split([',', '\n']).next());
        found.unwrap_or("nothing").to_owned()
    };
    (field("status: "), field("ANSWER: "))
}

/// Answers every question at `addr`, and counts them: the name `no.*` is none, all others are `answer`.
fn resolver(addr: Ipv4Addr, answer: Ipv4Addr) -> watch::Receiver<usize> {
    let (count, counted) = watch::channel(0);
    tokio::spawn(async move {
        let socket = UdpSocket::bind((addr, 53)).await.unwrap();
        let mut buffer = [0; 4096];
        loop {
            let (len, client) = socket.recv_from(&mut buffer).await.unwrap();
            count.send_modify(|count| *count += 1);
            let mut message = Message::from_vec(&buffer[..len]).unwrap().into_response();
            let name = message.queries[0].name().clone();
            if name.to_string().starts_with("no.") {
                message.metadata.response_code = ResponseCode::NXDomain;
                let soa = SOA::new(Name::root(), Name::root(), 1, 1, 1, 1, 60);
                message.add_authority(Record::from_rdata(Name::root(), 60, RData::SOA(soa)));
            } else {
                message.add_answer(Record::from_rdata(name, 60, RData::A(A(answer))));
            }
            socket.send_to(&message.to_vec().unwrap(), client).await.unwrap();
        }
    });
    counted
}

#[test]
fn dig_finds_every_kind_of_record() {
    with_dig(|| async {
        let _host = Host::new(&[]).await;
        for (from, arguments, expected) in [
            (ASKER, "web A", &["10.0.1.2"][..]),
            (ASKER, "+tcp web A", &["10.0.1.2"]),
            (ASKER, "+noedns web A", &["10.0.1.2"]),
            (ASKER, "tasks.web A", &["10.0.1.3"]),
            (ASKER, "db A", &["10.0.1.7", "10.0.1.8"]),
            (INNER, "cache AAAA", &["fd00:2::a00:209"]),
            (INNER, "c1 ANY", &["10.0.2.3", "fd00:2::a00:203"]),
            (ASKER, "web.1.abcdefghijklmnop A", &["10.0.1.3"]),
            (ASKER, "abcdefghijkl A", &["10.0.1.3"]),
            (ASKER, "_http._tcp.web SRV", &["0 0 80 Web.Front."]),
            (ASKER, "_80._tcp.tasks.web SRV", &["0 0 80 Web.1.abcdefghijklmnop.Front."]),
            (ASKER, "-x 10.0.1.2", &["Web.Front."]),
            (INNER, "-x fd00:2::a00:203", &["cache.1.c1.back."]),
        ] {
            assert_eq!(short(from, arguments).await, expected, "{arguments}");
        }
        for (from, arguments, code, answers) in [
            (ASKER, "web AAAA", "NOERROR", "0"),
            (ASKER, "web TXT", "NOERROR", "0"),
            (ASKER, "tasks.nothing A", "NXDOMAIN", "0"),
            (ASKER, "-x 10.0.1.200", "NXDOMAIN", "0"),
            (INNER, "example.com A", "SERVFAIL", "0"),
            (HOST_ADDR, "web A", "REFUSED", "0"),
            (ASKER, "+edns=1 +noednsneg web A", "BADVERS", "0"),
        ] {
            assert_eq!(status(from, arguments).await, (code.to_owned(), answers.to_owned()), "{arguments}");
        }
        let printed = dig(ASKER, "_http._tcp.web SRV").await;
        assert!(printed.contains("ADDITIONAL: 2") && printed.contains("10.0.1.2"), "{printed}");
    });
}

#[test]
fn other_names_are_asked_once_for_as_long_as_the_answer_holds() {
    with_dig(|| async {
        let mut host = Host::new(&[RESOLVER]).await;
        let asked = resolver(RESOLVER, Ipv4Addr::new(192, 0, 2, 1));
        for _ in 0..3 {
            assert_eq!(short(ASKER, "Example.com A").await, ["192.0.2.1"]);
            assert_eq!(status(ASKER, "no.example.com A").await, ("NXDOMAIN".to_owned(), "0".to_owned()));
        }
        assert_eq!(*asked.borrow(), 2);
        // Nobody else's answers count any more.
        let other = Ipv4Addr::new(127, 0, 0, 54);
        let _asked = resolver(other, Ipv4Addr::new(192, 0, 2, 2));
        host.resolvers(&[other]);
        assert_eq!(short(ASKER, "example.com A").await, ["192.0.2.2"]);
    });
}

#[test]
fn names_of_ours_never_wait_for_resolvers_that_are_silent() {
    with_dig(|| async {
        let _host = Host::new(&[SILENT, RESOLVER]).await;
        let _silent = UdpSocket::bind((SILENT, 53)).await.unwrap();
        let _asked = resolver(RESOLVER, Ipv4Addr::new(192, 0, 2, 1));
        let ask = |number| async move { short(ASKER, &format!("n{number}.example A")).await };
        let waiting: Vec<_> = (0..20).map(|number| tokio::spawn(ask(number))).collect();
        let start = Instant::now();
        assert_eq!(short(ASKER, "web A").await, ["10.0.1.2"]);
        assert_eq!(status(INNER, "web A").await.0, "NXDOMAIN");
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        for waiting in waiting {
            assert_eq!(waiting.await.unwrap(), ["192.0.2.1"]);
        }
        // Known to be silent by now.
        let printed = dig(ASKER, "later.example A").await;
        let took_ms = printed.split_once("Query time: ").and_then(|(_, rest)| rest.split(' ').next());
        assert!(took_ms.unwrap().parse::<u32>().unwrap() < 400, "{printed}");
    });
}

#[test]
fn a_name_resolves_as_soon_as_its_task_runs_and_no_longer_than_it_does() {
    with_dig(|| async {
        let host = Host::new(&[]).await;
        assert_eq!(short(ASKER, "tasks.db A").await, ["10.0.1.7", "10.0.1.8"]);
        let mut table = Table::clone(host.table.borrow().as_deref().unwrap());
        let mut touched = Touched::default();
        let task = table.tasks.get_mut(&"d1".into()).unwrap();
        task.desired = mesh_api::table::TaskState::Shutdown;
        touched.note_task(task);
        host.table.send_replace(Some(Arc::new(table.clone())));
        let locals = [local("abcdefghijklmnop", "front", ASKER), local("c1", "back", INNER)];
        host.dns.update(&table, &touched, &locals);
        assert_eq!(short(ASKER, "tasks.db A").await, ["10.0.1.8"]);
        assert_eq!(status(ASKER, "-x 10.0.1.7").await.0, "NXDOMAIN");
    });
}

/// Connections that say nothing, nonsense, or a question in pieces.
#[test]
fn connections_are_bounded_and_survive_nonsense() {
    with_dig(|| async {
        let _host = Host::new(&[]).await;
        let connect = async |from: Ipv4Addr| {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind((from, 0).into()).unwrap();
            socket.connect((HOST_ADDR, 53).into()).await.unwrap()
        };
        let is_closed = async |stream: &mut TcpStream| {
            let read = tokio::time::timeout(Duration::from_millis(300), stream.read(&mut [0; 16])).await;
            matches!(read, Ok(Ok(0) | Err(_)))
        };
        let mut idle = Vec::new();
        for _ in 0..16 {
            idle.push(connect(ASKER).await);
        }
        assert!(is_closed(&mut connect(ASKER).await).await, "one too many");
        assert!(is_closed(&mut connect(HOST_ADDR).await).await, "nobody's");
        assert!(!is_closed(&mut idle[0]).await);
        // Others have theirs.
        assert_eq!(short(INNER, "+tcp cache A").await, ["10.0.2.9"]);
        idle[0].write_all(b"\0\x20nonsense").await.unwrap();
        idle[1].write_all(b"\xff\xff").await.unwrap();
        assert!(is_closed(&mut idle[1]).await, "longer than any question");
        assert!(!is_closed(&mut idle[0]).await, "its end may still come");
        drop(idle);
        let start = Instant::now();
        while short(ASKER, "+tcp web A").await != ["10.0.1.2"] {
            assert!(start.elapsed() < Duration::from_secs(5));
        }
        let nonsense = UdpSocket::bind((ASKER, 0)).await.unwrap();
        for len in 0..200 {
            let bytes: Vec<u8> = (0..len).map(|_| rand::random()).collect();
            nonsense.send_to(&bytes, (IpAddr::V4(HOST_ADDR), 53)).await.unwrap();
        }
        assert_eq!(short(ASKER, "web A").await, ["10.0.1.2"]);
    });
}
