//! How the host describes itself to the managers.

use std::net::IpAddr;
use std::sync::OnceLock;

use mesh_api::session::NodeDescription;
use tokio::sync::watch;

/// How a host that is no node has its dataplane attached.
const DETACHED: &str = "none";

/// The parts of a node's description that the agent knows at any time.
#[derive(Debug, Clone)]
pub(crate) struct Describe {
    hostname: String,
    dataplane: watch::Sender<String>,
}

impl Describe {
    pub(crate) fn new(hostname: String) -> Self {
        Self { hostname, dataplane: watch::Sender::new(DETACHED.to_owned()) }
    }

    /// Sets how the dataplane is attached to each uplink, by the uplink's name; to none, where the host is no node.
    pub(crate) fn set_dataplane(&self, modes: &[(String, &str)]) {
        let modes: Vec<_> = modes.iter().map(|(uplink, mode)| format!("{uplink}={mode}")).collect();
        let text = if modes.is_empty() { DETACHED.to_owned() } else { modes.join(",") };
        self.dataplane.send_if_modified(|former| {
            let changed = *former != text;
            *former = text;
            changed
        });
    }

    /// Tells of changes of the description.
    pub(crate) fn watch(&self) -> watch::Receiver<String> {
        self.dataplane.subscribe()
    }

    pub(crate) fn describe(&self, advertise: IpAddr, data_path: IpAddr) -> NodeDescription {
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
            dataplane: self.dataplane.borrow().clone(),
            routes: Vec::new(),
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
}
