//! Hosts in network namespaces of their own, with an underlay between them, and a table as managers would make it.

use std::future::Future;
use std::net::SocketAddr;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use futures::FutureExt as _;
use futures::future::LocalBoxFuture;
use mesh_api::table::{ClusterRecord, NodeRecord, NodeState, ReturnPath, Role};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Uid, gettid};
use tempfile::TempDir;
use tokio::net::UdpSocket;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{sleep, timeout};

use super::super::*;
use crate::sys::testing::run;

/// Of the underlay, bytes.
pub(super) const MTU: u32 = 1500;
/// How long a packet that must not come is waited for.
pub(super) const SILENCE: Duration = Duration::from_millis(400);
/// The port that tests listen on.
pub(super) const PORT: u16 = 7777;

/// A host's own part, inside its namespace.
pub(super) struct Host {
    pub(super) encryption: Mutex<Option<Encryption>>,
    pub(super) folder: TempDir,
}

type Job = Box<dyn FnOnce(Rc<Host>) -> LocalBoxFuture<'static, ()> + Send>;

/// A host, from outside of it.
pub(super) struct Remote {
    tid: i32,
    jobs: Option<mpsc::UnboundedSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Remote {
    /// A host in a namespace that goes with it.
    fn start() -> Self {
        let (jobs, mut receiver) = mpsc::unbounded_channel::<Job>();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name("wgt-host".to_owned()).spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            tell.send(gettid().as_raw()).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            LocalSet::new().block_on(&runtime, async {
                let folder = tempfile::tempdir().unwrap();
                let host = Rc::new(Host { encryption: Mutex::new(None), folder });
                while let Some(job) = receiver.recv().await {
                    spawn_local(job(Rc::clone(&host)));
                }
            });
        });
        Self { tid: told.recv().unwrap(), jobs: Some(jobs), thread: Some(thread.unwrap()) }
    }

    /// Does `work` in the host; works go on beside each other.
    pub(super) async fn on<T: Send + 'static, F: Future<Output = T> + 'static>(
        &self,
        work: impl FnOnce(Rc<Host>) -> F + Send + 'static,
    ) -> T {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(|host| {
            let work = work(host);
            async move { drop(answer.send(work.await)) }.boxed_local()
        });
        self.jobs.as_ref().unwrap().send(job).unwrap_or_else(|_| panic!("the host has stopped"));
        answered.await.expect("the host's work failed")
    }

    /// Runs a command that has to succeed, and returns what it printed.
    pub(super) async fn run(&self, line: impl Into<String>) -> String {
        let line = line.into();
        self.on(move |_| async move { run(&line) }).await
    }

    /// Whether a command succeeds.
    pub(super) async fn tries(&self, line: impl Into<String>) -> bool {
        let line = line.into();
        let attempt = move |_| async move {
            let mut words = line.split(' ');
            let mut command = tokio::process::Command::from(Command::new(words.next().unwrap()));
            command.args(words).output().await.unwrap().status.success()
        };
        self.on(attempt).await
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        drop(self.jobs.take());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Two hosts on one underlay, and the table that managers would tell them.
pub(super) struct Pair {
    pub(super) hosts: Arc<[Remote; 2]>,
    pub(super) underlay: [IpAddr; 2],
    pub(super) table: Table,
    pub(super) settled: u64,
    /// How far the clock was put forward.
    pub(super) later: Duration,
}

/// The nodes' ids.
pub(super) const IDS: [&str; 2] = ["left", "right"];

impl Pair {
    async fn new(underlay: [&str; 2]) -> Self {
        let hosts = Arc::new([Remote::start(), Remote::start()]);
        let right = hosts[1].tid;
        hosts[0].run(format!("ip link add up0 type veth peer name up0 netns {right}")).await;
        let underlay = underlay.map(|addr| addr.parse::<IpAddr>().unwrap());
        for (host, addr) in hosts.iter().zip(underlay) {
            host.run("ip link set lo up").await;
            let line = if addr.is_ipv4() {
                format!("{addr}/24 dev up0")
            } else {
                format!("{addr}/64 dev up0 nodad")
            };
            host.run(format!("ip address add {line}")).await;
            host.run("ip link set up0 up").await;
        }
        let cluster = ClusterRecord {
            id: "c".into(),
            hash_seed: 1,
            data_path_port: 4789,
            return_path: ReturnPath::Tunnel,
            key_epoch: 0,
        };
        let mut table = Table::new(cluster);
        for (id, vtep) in IDS.into_iter().zip(underlay) {
            let record = NodeRecord {
                id: id.into(),
                hostname: id.to_owned(),
                role: Role::Worker,
                vtep,
                state: NodeState::Ready,
                wireguard: Vec::new(),
                manager: None,
            };
            table.nodes.insert(record.id.clone(), record);
        }
        let pair = Self { hosts, underlay, table, settled: 0, later: Duration::ZERO };
        pair.open(0).await;
        pair.open(1).await;
        pair
    }

    /// As the agent does when it starts.
    pub(super) async fn open(&self, which: usize) {
        let open = |host: Rc<Host>| async move {
            let links = Links::open().unwrap();
            *host.encryption.lock().await = Some(Encryption::open(links, host.folder.path(), KEY_ROTATION));
        };
        self.hosts[which].on(open).await;
    }

    /// Has a host follow `table`, and returns what it describes itself with.
    pub(super) async fn follow_table(
        &self,
        which: usize,
        table: &Table,
        look: Look,
        mtu: u32,
    ) -> Vec<WireguardIdentity> {
        let mut situation =
            Situation::new(table, &IDS[which].into(), self.settled, mtu, self.underlay[which]);
        situation.now += self.later;
        situation.today += self.later;
        let follow = move |host: Rc<Host>| async move {
            let mut encryption = host.encryption.lock().await;
            let encryption = encryption.as_mut().unwrap();
            encryption.follow(&situation, look).await;
            encryption.identities()
        };
        self.hosts[which].on(follow).await
    }

    /// Has both follow the table, and the table show what they say then. What it was has settled after that.
    pub(super) async fn round(&mut self, look: Look) {
        let before = self.table.index;
        for which in [0, 1] {
            let told = self.follow_table(which, &self.table, look, MTU).await;
            let node = self.table.nodes.get_mut(&IDS[which].into()).unwrap();
            if node.wireguard != told {
                node.wireguard = told;
                self.table.index += 1;
            }
        }
        self.settled = before;
    }

    /// Until nothing changes any more.
    pub(super) async fn settle(&mut self) {
        loop {
            let before = (self.table.index, self.settled);
            self.round(Look::Changes).await;
            if (self.table.index, self.settled) == before {
                return;
            }
        }
    }

    /// What a host tells the others.
    pub(super) fn told(&self, which: usize) -> &[WireguardIdentity] {
        &self.table.nodes[&IDS[which].into()].wireguard
    }

    /// The address that a host sends from.
    pub(super) fn addr(&self, which: usize) -> Ipv6Addr {
        self.told(which)[0].address()
    }

    /// Whether the right host hears a datagram of the left one, which goes on sending them for this long.
    pub(super) async fn is_heard(&self, within: Duration) -> bool {
        let (from, to) = (SocketAddr::from((self.addr(0), 0)), SocketAddr::from((self.addr(1), PORT)));
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let receive = self.hosts[1].on(move |_| async move {
            let socket = UdpSocket::bind(to).await.unwrap();
            let heard = timeout(within, socket.recv(&mut [0; 16])).await.is_ok();
            told.store(true, Ordering::Relaxed);
            heard
        });
        let send = self.hosts[0].on(move |_| async move {
            let socket = UdpSocket::bind(from).await.unwrap();
            while !over.load(Ordering::Relaxed) {
                let _ = socket.send_to(b"hear", to).await;
                sleep(SILENCE / 20).await;
            }
        });
        futures::join!(receive, send).0
    }

    /// Whether an echo of this size comes back, in one of a few attempts: others keep the machine busy.
    pub(super) async fn pings(&self, from: usize, size: u32) -> bool {
        for _ in 0..5 {
            if self.ping(from, size).await {
                return true;
            }
        }
        false
    }

    /// Whether a single one does.
    pub(super) async fn ping(&self, from: usize, size: u32) -> bool {
        let (own, other) = (self.addr(from), self.addr(1 - from));
        self.hosts[from].tries(format!("ping -6 -c 1 -W 1 -M do -s {size} -I {own} {other}")).await
    }
}

/// Runs a test of two hosts, on an underlay of either family.
pub(super) fn with_pair<F: Future<Output = ()>>(underlay: [&str; 2], test: impl FnOnce(Pair) -> F) {
    if !Uid::effective().is_root() {
        use std::io::Write as _;
        let _ = std::io::stdout().write_all(b"\nSKIP: needs root\n");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { test(Pair::new(underlay).await).await });
}

/// Addresses of the underlay.
pub(super) const V4: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
pub(super) const V6: [&str; 2] = ["2001:db8::1", "2001:db8::2"];

/// Bytes that tell their place.
pub(super) fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}
