//! The maps, and the packet logic's tables over them.
//!
//! They are pinned by name under the agent's folder of bpffs, which carries the ABI's version.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use mesh_common::addr::Ip6;
use mesh_common::be::Be32;
use mesh_common::counter::{COUNTERS_MAX, Counter};
use mesh_common::map::{
    AddrKey, Alias, BACKENDS_MAX, BUDGET_PER_S, BUDGETS_MAX, Backend, Budget, Config, ENDPOINTS_MAX,
    EVENTS_BYTES, Endpoint, Example, FLOWS_MAX_DEFAULT, FRAGMENTS_MAX, Flow, FlowKey, FragmentKey,
    FragmentPorts, IFACES_MAX, Iface, LOCALS_MAX, NACKS_BYTES, Nack, OPENING_MAX, PEERS_MAX, PLACES_MAX,
    PORTS_MAX, Peer, Port, PortKey, RULES_MAX, RuleKey, SERVICES_MAX, Sent, Service, TaskKey, TaskSlots,
    VIPS_MAX,
};
use mesh_datapath::tables::{AddrTables, Stage, Tables};
use mesh_datapath::translation::Work;

/// `BPF_F_NO_PREALLOC`: memory for what is used, not for what may be.
const NO_PREALLOC: u32 = 1;
/// Nanoseconds in a second.
const NS_PER_S: u64 = 1_000_000_000;

#[map(name = "shoal_config")]
static CONFIG: Array<Config> = Array::pinned(1, 0);
#[map(name = "shoal_ports")]
static PORTS: HashMap<PortKey, Port> = HashMap::pinned(PORTS_MAX, NO_PREALLOC);
#[map(name = "shoal_services")]
static SERVICES: Array<Service> = Array::pinned(SERVICES_MAX, 0);
#[map(name = "shoal_places")]
static PLACES: Array<u32> = Array::pinned(PLACES_MAX, 0);
#[map(name = "shoal_members")]
static MEMBERS: HashMap<Ip6, u32> = HashMap::pinned(PEERS_MAX, NO_PREALLOC);
#[map(name = "shoal_tags")]
static TAGS: HashMap<u32, u32> = HashMap::pinned(PEERS_MAX, NO_PREALLOC);
#[map(name = "shoal_peers")]
static PEERS: Array<Peer> = Array::pinned(PEERS_MAX, 0);
#[map(name = "shoal_counters")]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(COUNTERS_MAX, 0);
#[map(name = "shoal_examples")]
static EXAMPLES: Array<Example> = Array::pinned(COUNTERS_MAX, 0);
#[map(name = "shoal_events")]
static EVENTS: RingBuf = RingBuf::pinned(EVENTS_BYTES, 0);
#[map(name = "shoal_nacks")]
static NACKS: RingBuf = RingBuf::pinned(NACKS_BYTES, 0);
#[map(name = "shoal_budgets")]
static BUDGETS: PerCpuArray<Budget> = PerCpuArray::pinned(BUDGETS_MAX, 0);

/// What one function of a program leaves for the next: one packet at a time on each CPU.
#[map(name = "shoal_work4")]
static WORK4: PerCpuArray<MaybeUninit<Work<Be32>>> = PerCpuArray::with_max_entries(1, 0);
#[map(name = "shoal_work6")]
static WORK6: PerCpuArray<MaybeUninit<Work<Ip6>>> = PerCpuArray::with_max_entries(1, 0);

/// The maps as the packet logic's tables.
pub struct Maps;

/// A family whose work has a place.
pub trait Desk: Sized {
    /// This CPU's place.
    fn desk() -> Option<*mut Work<Self>>;
}

impl Desk for Be32 {
    #[inline(always)]
    fn desk() -> Option<*mut Work<Self>> {
        WORK4.get_ptr_mut(0).map(|work| work.cast())
    }
}

impl Desk for Ip6 {
    #[inline(always)]
    fn desk() -> Option<*mut Work<Self>> {
        WORK6.get_ptr_mut(0).map(|work| work.cast())
    }
}

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
        CONFIG.get(0).filter(|config| config.vtep != Ip6::default())
    }

    #[inline(always)]
    fn port(&self, key: &PortKey) -> Option<&Port> {
        get!(PORTS, key)
    }

    #[inline(always)]
    fn service(&self, slot: u32) -> Option<&Service> {
        SERVICES.get(slot)
    }

    #[inline(always)]
    fn place(&self, place: u32) -> Option<u32> {
        PLACES.get(place).copied()
    }

    #[inline(always)]
    fn member(&self, vtep: &Ip6) -> Option<u32> {
        get!(MEMBERS, vtep).copied()
    }

    #[inline(always)]
    fn tagged(&self, tag: u32) -> Option<u32> {
        get!(TAGS, &tag).copied()
    }

    #[inline(always)]
    fn peer(&self, slot: u32) -> Option<&Peer> {
        PEERS.get(slot)
    }

    #[inline(always)]
    fn now_s(&self) -> u32 {
        (now_ns() / NS_PER_S) as u32
    }

    #[inline(always)]
    fn spend(&self, budget: u32) -> bool {
        let Some(budget) = BUDGETS.get_ptr_mut(budget) else { return false };
        let now_ns = now_ns();
        // SAFETY: The pointer is to this CPU's element, and programs are not preempted by one another on a CPU.
        unsafe {
            if now_ns - (*budget).since_ns > NS_PER_S {
                *budget = Budget { since_ns: now_ns, spent: 0 };
            }
            (*budget).spent += 1;
            (*budget).spent <= BUDGET_PER_S
        }
    }
}

/// The tables of one family.
macro_rules! addr_tables {
    ($addr:ty, $module:ident, $locals:literal, $rules:literal, $vips:literal, $backends:literal, $tasks:literal,
     $endpoints:literal, $ifaces:literal, $aliases:literal, $sent:literal, $opening:literal, $flows:literal,
     $fragments:literal) => {
        mod $module {
            use super::*;

            #[map(name = $locals)]
            pub static LOCALS: HashMap<$addr, u32> = HashMap::pinned(LOCALS_MAX, NO_PREALLOC);
            #[map(name = $rules)]
            pub static RULES: LpmTrie<RuleKey<$addr>, u32> = LpmTrie::pinned(RULES_MAX, 0);
            #[map(name = $vips)]
            pub static VIPS: HashMap<AddrKey<$addr>, u32> = HashMap::pinned(VIPS_MAX, NO_PREALLOC);
            #[map(name = $backends)]
            pub static BACKENDS: Array<Backend<$addr>> = Array::pinned(BACKENDS_MAX, 0);
            #[map(name = $tasks)]
            pub static TASKS: HashMap<TaskKey, TaskSlots> = HashMap::pinned(BACKENDS_MAX, NO_PREALLOC);
            #[map(name = $endpoints)]
            pub static ENDPOINTS: HashMap<AddrKey<$addr>, Endpoint> =
                HashMap::pinned(ENDPOINTS_MAX, NO_PREALLOC);
            #[map(name = $ifaces)]
            pub static IFACES: HashMap<u32, Iface<$addr>> = HashMap::pinned(IFACES_MAX, NO_PREALLOC);
            #[map(name = $aliases)]
            pub static ALIASES: HashMap<$addr, Alias<$addr>> = HashMap::pinned(IFACES_MAX, NO_PREALLOC);
            #[map(name = $sent)]
            pub static SENT: LruHashMap<FlowKey<$addr>, Sent> = LruHashMap::pinned(FLOWS_MAX_DEFAULT, 0);
            #[map(name = $opening)]
            pub static OPENING: LruHashMap<FlowKey<$addr>, Flow<$addr>> = LruHashMap::pinned(OPENING_MAX, 0);
            #[map(name = $flows)]
            pub static FLOWS: LruHashMap<FlowKey<$addr>, Flow<$addr>> =
                LruHashMap::pinned(FLOWS_MAX_DEFAULT, 0);
            #[map(name = $fragments)]
            pub static FRAGMENTS: LruHashMap<FragmentKey<$addr>, FragmentPorts> =
                LruHashMap::pinned(FRAGMENTS_MAX, 0);
        }

        impl AddrTables<$addr> for Maps {
            #[inline(always)]
            fn is_local(&self, addr: &$addr) -> bool {
                use $module::LOCALS;
                get!(LOCALS, addr).is_some()
            }

            #[inline(always)]
            fn rule(&self, key: &RuleKey<$addr>) -> Option<u32> {
                $module::RULES.get(Key::new(8 * size_of::<RuleKey<$addr>>() as u32, *key)).copied()
            }

            #[inline(always)]
            fn vip(&self, key: &AddrKey<$addr>) -> Option<u32> {
                use $module::VIPS;
                get!(VIPS, key).copied()
            }

            #[inline(always)]
            fn backend(&self, slot: u32) -> Option<&Backend<$addr>> {
                $module::BACKENDS.get(slot)
            }

            #[inline(always)]
            fn task(&self, key: &TaskKey) -> Option<&TaskSlots> {
                use $module::TASKS;
                get!(TASKS, key)
            }

            #[inline(always)]
            fn endpoint(&self, key: &AddrKey<$addr>) -> Option<&Endpoint> {
                use $module::ENDPOINTS;
                get!(ENDPOINTS, key)
            }

            #[inline(always)]
            fn iface(&self, ifindex: u32) -> Option<&Iface<$addr>> {
                use $module::IFACES;
                get!(IFACES, &ifindex)
            }

            #[inline(always)]
            fn alias(&self, addr: &$addr) -> Option<&Alias<$addr>> {
                use $module::ALIASES;
                get!(ALIASES, addr)
            }

            #[inline(always)]
            fn sent(&self, key: &FlowKey<$addr>) -> Option<Sent> {
                use $module::SENT;
                get!(SENT, key).copied()
            }

            #[inline(always)]
            fn insert_sent(&self, key: &FlowKey<$addr>, sent: &Sent) {
                // A cache: without the entry, the next packet finds the same backend by the Maglev table.
                let _ = $module::SENT.insert(key, sent, u64::from(BPF_ANY));
            }

            #[inline(always)]
            fn remove_sent(&self, key: &FlowKey<$addr>) {
                let _ = $module::SENT.remove(key);
            }

            #[inline(always)]
            fn flow(&self, key: &FlowKey<$addr>, stage: Stage) -> Option<Flow<$addr>> {
                use $module::{FLOWS, OPENING};
                match stage {
                    Stage::Established => get!(FLOWS, key).copied(),
                    Stage::Opening => get!(OPENING, key).copied(),
                }
            }

            #[inline(always)]
            fn insert_flow(&self, key: &FlowKey<$addr>, flow: &Flow<$addr>, stage: Stage) -> bool {
                let inserted = match stage {
                    Stage::Established => $module::FLOWS.insert(key, flow, u64::from(BPF_ANY)),
                    Stage::Opening => $module::OPENING.insert(key, flow, u64::from(BPF_ANY)),
                };
                inserted.is_ok()
            }

            #[inline(always)]
            fn remove_flow(&self, key: &FlowKey<$addr>, stage: Stage) {
                let _ = match stage {
                    Stage::Established => $module::FLOWS.remove(key),
                    Stage::Opening => $module::OPENING.remove(key),
                };
            }

            #[inline(always)]
            fn mark_flow(&self, key: &FlowKey<$addr>, stage: Stage, stamp: u32, flags: u8) {
                let flow = match stage {
                    Stage::Established => $module::FLOWS.get_ptr_mut(key),
                    Stage::Opening => $module::OPENING.get_ptr_mut(key),
                };
                if let Some(flow) = flow {
                    // SAFETY: The element is not freed while the program runs. Another CPU may write the same two
                    // fields for another packet of the flow, each at once: either value is right.
                    unsafe {
                        (*flow).stamp = stamp;
                        (*flow).flags |= flags;
                    }
                }
            }

            #[inline(always)]
            fn fragment(&self, key: &FragmentKey<$addr>) -> Option<FragmentPorts> {
                use $module::FRAGMENTS;
                get!(FRAGMENTS, key).copied()
            }

            #[inline(always)]
            fn insert_fragment(&self, key: &FragmentKey<$addr>, ports: &FragmentPorts) {
                // Refused: the packet's later fragments are dropped, and its sender sends it again.
                let _ = $module::FRAGMENTS.insert(key, ports, u64::from(BPF_ANY));
            }
        }
    };
}

addr_tables!(
    Be32,
    v4,
    "shoal_locals4",
    "shoal_rules4",
    "shoal_vips4",
    "shoal_backends4",
    "shoal_tasks4",
    "shoal_endpts4",
    "shoal_ifaces4",
    "shoal_aliases4",
    "shoal_sent4",
    "shoal_opening4",
    "shoal_flows4",
    "shoal_frags4"
);
addr_tables!(
    Ip6,
    v6,
    "shoal_locals6",
    "shoal_rules6",
    "shoal_vips6",
    "shoal_backends6",
    "shoal_tasks6",
    "shoal_endpts6",
    "shoal_ifaces6",
    "shoal_aliases6",
    "shoal_sent6",
    "shoal_opening6",
    "shoal_flows6",
    "shoal_frags6"
);

/// Now, ns of the monotonic clock; a few ms late.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: A plain helper call.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// Keeps a peer's next hop for the packets to come.
#[inline(always)]
pub fn update_peer(slot: u32, update: impl FnOnce(&mut Peer)) {
    if let Some(peer) = PEERS.get_ptr_mut(slot) {
        // SAFETY: Elements of an array are never freed. CPUs that write one at once write the same, and one that reads it
        // meanwhile sends its packet to the former next hop or to the new one.
        update(unsafe { &mut *peer });
    }
}

/// Counts one packet.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: The pointer is to this CPU's element, and programs are not preempted by one another on a CPU.
        unsafe { *value += 1 };
    }
}

/// The place for the example of a counter; `None` if the last one is so young that another would tell nothing new.
#[inline(always)]
pub fn example(counter: Counter, period_ns: u64) -> Option<&'static mut Example> {
    let example = EXAMPLES.get_ptr_mut(counter as u32)?;
    // SAFETY: Elements of an array are never freed. Two CPUs that write one at once leave a mixture of two packets,
    // which is no worse an example of its kind.
    let example = unsafe { &mut *example };
    let now_ns = now_ns();
    if now_ns - example.time_ns < period_ns {
        return None;
    }
    example.time_ns = now_ns;
    Some(example)
}

/// Sends an example to whoever reads the ring of events.
#[inline(always)]
pub fn tell(example: &Example) {
    // Nobody reads, and the ring is full.
    let _ = EVENTS.output::<Example>(example, 0);
}

/// Tells the agent of a negative acknowledgement.
#[inline(always)]
pub fn tell_nack(nack: &Nack) {
    // The agent is behind: the next packet for the task brings another one.
    let _ = NACKS.output::<Nack>(nack, 0);
}
