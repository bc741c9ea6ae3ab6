//! The maps, and `Tables` over them.
//!
//! They are pinned by name under the agent's folder of bpffs, which carries the ABI's version.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray};
use mesh_common::be::Be32;
use mesh_common::counter::{COUNTERS_MAX, Counter};
use mesh_common::map::{
    AddrKey, Alias, BACKENDS_MAX, Backend, Config, ENDPOINTS_MAX, Endpoint, FLOWS_MAX_DEFAULT, Flow, FlowKey,
    IFACES_MAX, Iface, LOCALS_MAX, MAGLEV_MAX, PEERS_MAX, PORTS_MAX, Peer, Port, PortKey, SERVICES_MAX,
    Service, VIPS_MAX,
};
use mesh_datapath::tables::Tables;

/// `BPF_F_NO_PREALLOC`: memory for what is used, not for what may be.
const NO_PREALLOC: u32 = 1;

#[map(name = "shoal_config")]
static CONFIG: Array<Config> = Array::pinned(1, 0);
#[map(name = "shoal_locals")]
static LOCALS: HashMap<Be32, u32> = HashMap::pinned(LOCALS_MAX, NO_PREALLOC);
#[map(name = "shoal_ports")]
static PORTS: HashMap<PortKey, Port> = HashMap::pinned(PORTS_MAX, NO_PREALLOC);
#[map(name = "shoal_vips")]
static VIPS: HashMap<AddrKey, u32> = HashMap::pinned(VIPS_MAX, NO_PREALLOC);
#[map(name = "shoal_services")]
static SERVICES: Array<Service> = Array::pinned(SERVICES_MAX, 0);
#[map(name = "shoal_maglev")]
static MAGLEV: Array<u32> = Array::pinned(MAGLEV_MAX, 0);
#[map(name = "shoal_backends")]
static BACKENDS: Array<Backend> = Array::pinned(BACKENDS_MAX, 0);
#[map(name = "shoal_endpts")]
static ENDPOINTS: HashMap<AddrKey, Endpoint> = HashMap::pinned(ENDPOINTS_MAX, NO_PREALLOC);
#[map(name = "shoal_ifaces")]
static IFACES: HashMap<u32, Iface> = HashMap::pinned(IFACES_MAX, NO_PREALLOC);
#[map(name = "shoal_aliases")]
static ALIASES: HashMap<Be32, Alias> = HashMap::pinned(IFACES_MAX, NO_PREALLOC);
#[map(name = "shoal_members")]
static MEMBERS: HashMap<Be32, u32> = HashMap::pinned(PEERS_MAX, NO_PREALLOC);
#[map(name = "shoal_peers")]
static PEERS: Array<Peer> = Array::pinned(PEERS_MAX, 0);
#[map(name = "shoal_flows")]
static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::pinned(FLOWS_MAX_DEFAULT, 0);
#[map(name = "shoal_counters")]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(COUNTERS_MAX, 0);

/// The maps as the packet logic's tables.
pub struct Maps;

/// A value of a hash map by reference.
macro_rules! get {
    ($map:ident, $key:expr) => {
        // SAFETY: The agent replaces whole values, and the kernel frees a replaced one only after the programs that
        // may see it have ended.
        unsafe { $map.get($key) }
    };
}

impl Tables for Maps {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        // An array always has its element; an agent that has not written it yet has no VTEP.
        CONFIG.get(0).filter(|config| config.vtep != Be32::default())
    }

    #[inline(always)]
    fn is_local(&self, addr: Be32) -> bool {
        get!(LOCALS, &addr).is_some()
    }

    #[inline(always)]
    fn port(&self, key: &PortKey) -> Option<&Port> {
        get!(PORTS, key)
    }

    #[inline(always)]
    fn vip(&self, key: &AddrKey) -> Option<u32> {
        get!(VIPS, key).copied()
    }

    #[inline(always)]
    fn service(&self, slot: u32) -> Option<&Service> {
        SERVICES.get(slot)
    }

    #[inline(always)]
    fn maglev(&self, place: u32) -> Option<u32> {
        MAGLEV.get(place).copied()
    }

    #[inline(always)]
    fn backend(&self, slot: u32) -> Option<&Backend> {
        BACKENDS.get(slot)
    }

    #[inline(always)]
    fn endpoint(&self, key: &AddrKey) -> Option<&Endpoint> {
        get!(ENDPOINTS, key)
    }

    #[inline(always)]
    fn iface(&self, ifindex: u32) -> Option<&Iface> {
        get!(IFACES, &ifindex)
    }

    #[inline(always)]
    fn alias(&self, addr: Be32) -> Option<&Alias> {
        get!(ALIASES, &addr)
    }

    #[inline(always)]
    fn member(&self, vtep: Be32) -> Option<u32> {
        get!(MEMBERS, &vtep).copied()
    }

    #[inline(always)]
    fn peer(&self, slot: u32) -> Option<&Peer> {
        PEERS.get(slot)
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        get!(FLOWS, key).copied()
    }

    #[inline(always)]
    fn insert_flow(&self, key: &FlowKey, flow: &Flow) {
        // The flow table is a cache: without the entry, the next packet finds the same backend by the Maglev table.
        let _ = FLOWS.insert(key, flow, u64::from(BPF_ANY));
    }
}

/// Keeps a peer's next hop for the packets to come.
#[inline(always)]
pub fn update_peer(slot: u32, peer: &Peer) {
    let _ = PEERS.set(slot, peer, u64::from(BPF_ANY));
}

/// Counts one packet.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: The pointer is to this CPU's element, and programs are not preempted by one another on a CPU.
        unsafe { *value += 1 };
    }
}
