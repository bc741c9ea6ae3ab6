//! How the host describes itself to the managers.

use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::Duration;

use ipnet::IpNet;
use mesh_api::error::chain;
use mesh_api::session::{ADDRESSES_MAX, ManagerDescription, NodeDescription};
use mesh_api::wireguard::WireguardIdentity;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::warn;

use crate::health::Health;
use crate::links::{LinkError, Links, Watch};

/// How a host that is no node has its dataplane attached.
const DETACHED: &str = "none";
/// How long changes of routes are gathered before they are told, at the price of an entry in the managers' log: longer
/// than an interface takes to restart.
const ROUTES_DEBOUNCE: Duration = Duration::from_secs(5);
/// How often routes are looked at when nothing tells of a change.
const ROUTES_AUDIT: Duration = Duration::from_mins(1);

/// The parts of a node's description that the agent knows at any time.
#[derive(Debug, Clone)]
pub(crate) struct Describe {
    hostname: String,
    changing: watch::Sender<Changing>,
    health: Health,
}

/// Those of them that change.
#[derive(Debug)]
pub(crate) struct Changing {
    dataplane: String,
    wireguard: Vec<WireguardIdentity>,
    manager: Option<ManagerDescription>,
    surroundings: Surroundings,
}

/// What the host's interfaces and routes say.
#[derive(Debug, Default, PartialEq)]
struct Surroundings {
    routes: Vec<IpNet>,
    addresses: Vec<IpAddr>,
}

impl Describe {
    pub(crate) fn new(hostname: String) -> Self {
        let changing = Changing {
            dataplane: DETACHED.to_owned(),
            wireguard: Vec::new(),
            manager: None,
            surroundings: Surroundings::default(),
        };
        Self { hostname, changing: watch::Sender::new(changing), health: Health::default() }
    }

    /// The same host, which says in `health` how it is.
    pub(crate) fn with_health(self, health: Health) -> Self {
        Self { health, ..self }
    }

    /// How the host is, beside what it describes itself with.
    pub(crate) fn health(&self) -> &Health {
        &self.health
    }

    /// Sets how the dataplane is attached to each uplink, by the uplink's name; to none, where the host is no node.
    pub(crate) fn set_dataplane(&self, modes: &[(String, &str)]) {
        let modes: Vec<_> = modes.iter().map(|(uplink, mode)| format!("{uplink}={mode}")).collect();
        let text = if modes.is_empty() { DETACHED.to_owned() } else { modes.join(",") };
        self.set(|changing| &mut changing.dataplane, text);
    }

    /// Sets what others reach the host by inside of WireGuard.
    pub(crate) fn set_wireguard(&self, identities: Vec<WireguardIdentity>) {
        self.set(|changing| &mut changing.wireguard, identities);
    }

    /// Sets which manager runs on the host.
    pub(crate) fn set_manager(&self, manager: Option<ManagerDescription>) {
        self.set(|changing| &mut changing.manager, manager);
    }

    /// Tells which subnets the host has routes to, and which addresses tasks could send under, from now until what it returns
    /// is dropped.
    pub(crate) async fn follow_routes(&self) -> JoinSet<()> {
        let mut follower = JoinSet::new();
        // What changes after the first look is heard of.
        match Links::open().and_then(|links| Ok((links, Watch::of_routes()?))) {
            Ok((links, watch)) => {
                self.look_around(&links).await;
                follower.spawn(self.clone().follow(links, watch));
            }
            Err(error) => warn!(error = chain(&error), "routes can't be followed: networks may overlap them"),
        }
        follower
    }

    async fn follow(self, links: Links, mut watch: Watch) {
        loop {
            let _ = timeout(ROUTES_AUDIT, watch.changed(ROUTES_DEBOUNCE)).await;
            self.look_around(&links).await;
        }
    }

    async fn look_around(&self, links: &Links) {
        let look = async {
            let (routes, mut addresses) = (links.routes().await?, links.facts().await?.egress_addresses());
            addresses.truncate(ADDRESSES_MAX);
            Ok::<_, LinkError>(Surroundings { routes, addresses })
        };
        match look.await {
            Ok(surroundings) => self.set(|changing| &mut changing.surroundings, surroundings),
            Err(error) => warn!(error = chain(&error), "routes and addresses can't be listed"),
        }
    }

    fn set<T: PartialEq>(&self, field: impl FnOnce(&mut Changing) -> &mut T, value: T) {
        self.changing.send_if_modified(|changing| {
            let former = field(changing);
            let changed = *former != value;
            *former = value;
            changed
        });
    }

    /// Tells of changes of the description.
    pub(crate) fn watch(&self) -> watch::Receiver<Changing> {
        self.changing.subscribe()
    }

    pub(crate) fn describe(&self, advertise: IpAddr, data_path: IpAddr) -> NodeDescription {
        let changing = self.changing.borrow();
        NodeDescription {
            hostname: self.hostname.clone(),
            addr: advertise,
            vtep: data_path,
            os: "linux".to_owned(),
            architecture: std::env::consts::ARCH.to_owned(),
            nano_cpus: cpus() * 1_000_000_000,
            memory_bytes: memory_bytes(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            labels: Vec::new(),
            dataplane: changing.dataplane.clone(),
            routes: changing.surroundings.routes.clone(),
            wireguard: changing.wireguard.clone(),
            addresses: changing.surroundings.addresses.clone(),
            manager: changing.manager.clone(),
        }
    }
}

fn cpus() -> u64 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u64)
}

fn memory_bytes() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib = total.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        kib.unwrap_or_default() * 1024
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{in_netns, run};

    #[test]
    fn a_host_has_a_processor_and_memory() {
        let addr = "192.0.2.1".parse().unwrap();
        let description = Describe::new("h".to_owned()).describe(addr, addr);
        assert!(description.nano_cpus >= 1_000_000_000);
        assert!(description.memory_bytes > 1 << 20);
    }

    #[test]
    fn every_uplink_is_told_with_its_mode() {
        let addr = "2001:db8::1".parse().unwrap();
        let describe = Describe::new("h".to_owned());
        assert_eq!(describe.describe(addr, addr).dataplane, "none");
        describe.set_dataplane(&[("eth0".to_owned(), "xdp-native"), ("eth1".to_owned(), "tc")]);
        assert_eq!(describe.describe(addr, addr).dataplane, "eth0=xdp-native,eth1=tc");
        describe.set_dataplane(&[]);
        assert_eq!(describe.describe(addr, addr).dataplane, "none");
    }

    #[test]
    fn routes_are_told_from_the_start_and_their_changes_once_they_are_over() {
        in_netns(|| async {
            run("ip link add up0 type veth peer name up1");
            run("ip link set up1 up");
            run("ip link set up0 up");
            run("ip address add 192.0.2.1/24 dev up0");
            let addr = "192.0.2.1".parse().unwrap();
            let describe = Describe::new("h".to_owned());
            let told = || -> Vec<String> {
                describe.describe(addr, addr).routes.iter().map(ToString::to_string).collect()
            };
            let mut watch = describe.watch();
            let follower = describe.follow_routes().await;
            assert_eq!(told(), ["192.0.2.0/24"]);
            watch.mark_unchanged();

            for number in 1..=3 {
                run(&format!("ip route add 10.{number}.0.0/16 via 192.0.2.2"));
            }
            run("ip route del 10.3.0.0/16");
            run("ip address add 192.0.2.7/24 dev up0");
            timeout(3 * ROUTES_DEBOUNCE, watch.changed()).await.unwrap().unwrap();
            assert_eq!(told(), ["10.1.0.0/16", "10.2.0.0/16", "192.0.2.0/24"]);
            let addresses = describe.describe(addr, addr).addresses;
            assert_eq!(addresses, [addr, "192.0.2.7".parse().unwrap()]);
            drop(follower);
        });
    }
}
