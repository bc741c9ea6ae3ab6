//! How the host describes itself to the managers.

use std::net::Ipv4Addr;
use std::sync::{Arc, OnceLock};

use mesh_api::session::NodeDescription;

use arc_swap::ArcSwap;

/// The parts of a node's description that the agent knows at any time.
#[derive(Debug, Clone)]
pub(crate) struct Describe {
    hostname: String,
    dataplane: Arc<ArcSwap<&'static str>>,
}

impl Describe {
    pub(crate) fn new(hostname: String) -> Self {
        Self { hostname, dataplane: Arc::new(ArcSwap::from_pointee("none")) }
    }

    /// Sets how the dataplane is attached.
    pub(crate) fn set_dataplane(&self, mode: &'static str) {
        self.dataplane.store(Arc::new(mode));
    }

    pub(crate) fn describe(&self, advertise: Ipv4Addr, data_path: Ipv4Addr) -> NodeDescription {
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
            dataplane: (**self.dataplane.load()).to_owned(),
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
        let addr = Ipv4Addr::new(192, 0, 2, 1);
        let description = Describe::new("h".to_owned()).describe(addr, addr);
        assert!(description.nano_cpus >= 1_000_000_000);
        assert!(description.memory_bytes > 1 << 20);
        assert_eq!(description.dataplane, "none");
    }
}
