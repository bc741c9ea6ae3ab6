//! The host, with agents of its own that get no dataplane.

mod locked;
mod restored;

use std::path::Path;

use mesh_agent::{Config, Sealing, XdpMode};
use mesh_api::tls::Shared;
use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};

use super::*;

const ADDR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

#[test]
fn an_init_whose_client_goes_away_comes_to_its_end() {
    alone(abandoned_init);
}

#[test]
fn a_look_at_the_role_during_init_leaves_the_new_manager_alone() {
    alone(watched_init);
}

/// Runs a test as root in namespaces of its own: what an init makes or clears away is not this host's.
fn alone<F: Future<Output = ()> + 'static>(test: fn(PathBuf) -> F) {
    if !nix::unistd::geteuid().is_root() {
        std::io::Write::write_all(&mut std::io::stdout(), b"\nSKIP: needs root\n").unwrap();
        return;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let bpffs = dir.path().join("bpf");
        std::fs::create_dir(&bpffs).unwrap();
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), none).unwrap();
        let net = format!("address add {ADDR}/24 dev eth0");
        let veth = "link add eth0 type veth peer name other";
        for line in ["link set lo up", veth, "link set other up", "link set eth0 up", &net] {
            let done = std::process::Command::new("ip").args(line.split(' ')).status();
            assert!(done.unwrap().success(), "{line}");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(dir.path().to_owned()));
        umount(&bpffs).unwrap();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

async fn host(dir: &Path, uplink: &str) -> Arc<Host> {
    let config = Config {
        state_dir: dir.to_owned(),
        run_dir: dir.to_owned(),
        bpffs: dir.join("bpf"),
        hostname: "h".to_owned(),
        xdp: XdpMode::Off,
        uplinks: vec![uplink.to_owned()],
        flows_max: 1024,
        key_rotation: mesh_agent::KEY_ROTATION,
        health: mesh_agent::Health::default(),
    };
    let agent = Agent::start(config, Shared::default(), Sealing::None).await.unwrap();
    Host::new(agent, Part::None, "id".to_owned(), "h".to_owned(), dir.to_owned())
}

fn request() -> InitRequest {
    let free = std::net::TcpListener::bind((ADDR, 0)).unwrap().local_addr().unwrap();
    InitRequest {
        listen: free,
        advertise: ADDR.into(),
        advertise_port: free.port(),
        data_path: ADDR.into(),
        data_path_port: 4789,
        address_pools: vec!["10.0.0.0/8".parse().unwrap()],
        subnet_size: 24,
        labels: std::collections::BTreeMap::new(),
        task_history: None,
        cert_expiry_ns: None,
        autolock: false,
        availability: Availability::Active,
    }
}

/// Goes on with an init until it has begun to make a manager.
async fn until_begun(made: &Path, init: &mut BoxFuture<'_, Result<NodeId, SwarmError>>) {
    while !made.exists() {
        let waited = timeout(Duration::from_millis(1), &mut *init).await;
        assert!(waited.is_err(), "it is over already: {waited:?}");
    }
}

async fn watched_init(dir: PathBuf) {
    let host = host(&dir, "eth0").await;
    let made = dir.join("manager");
    let mut init = LocalNode::swarm_init(&*host, request());
    until_begun(&made, &mut init).await;
    // The node is none yet, and has no certificate.
    let following = tokio::spawn(Host::follow_role(Arc::downgrade(&host)));
    tokio::task::yield_now().await;
    init.await.unwrap();
    // Whoever waited for the init goes on now.
    drop(host.changing.lock().await);
    assert!(host.cluster().is_some() && made.exists(), "the new manager was taken for one too many");
    following.abort();
    assert!(following.await.unwrap_err().is_cancelled());
    host.leave().await.unwrap();
    host.shutdown().await;
}

async fn abandoned_init(dir: PathBuf) {
    let host = host(&dir, "no-such-uplink").await;
    let asked = request();
    let free = asked.listen;
    let mut init = LocalNode::swarm_init(&*host, asked);
    let made = dir.join("manager");
    until_begun(&made, &mut init).await;
    drop(init);
    // The uplink is missing, so its end is that nothing is left, the port included.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while made.exists() || std::net::TcpListener::bind(free).is_err() {
        assert!(tokio::time::Instant::now() < deadline, "the init was left half-way");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!dir.join("membership.json").exists());
    let again = host.init(request()).await;
    assert!(matches!(&again, Err(SwarmError::Host(text)) if text.contains("no-such-uplink")), "{again:?}");
    host.shutdown().await;
}
