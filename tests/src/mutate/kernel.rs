//! The same packets in the kernel, by BPF_PROG_TEST_RUN, beside the host library: both must return and write the same.
//!
//! Unlike `packet::kernel`, this sets the maps up once a round, so that a million packets take minutes.

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues};
use aya::programs::{Program, SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use mesh_agent::dataplane::contents::{Changes, Contents};
use mesh_agent::dataplane::maps::Maps;
use mesh_agent::dataplane::object::{self, Programs};
use mesh_common::addr::Ip6;
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::map::{
    BUDGET_PER_S, BUDGETS_MAX, Budget, Flow, FlowKey, FragmentKey, FragmentPorts, Peer, Sent,
};
use mesh_datapath::verdict::Action;
use nix::time::{ClockId, clock_gettime};

use super::ROUND;
use super::hooks::{Ended, Node};
use super::layout::{ETHERNET, Layout, word};
use super::rounds::{Ends, hex, name, packets};
use super::starts::{Stand, Starts};
use crate::packet::entries::{Entries, Held, Place, lower_flow, lower_fragment, lower_key};
use crate::packet::family::{Family, Side};
use crate::packet::frames::octets6;
use crate::packet::host::Bytes;
use crate::packet::kernel::enter_namespaces;
use crate::packet::world::{CLIENT, World};
use crate::packet::{End, Hook};

/// The probe programs' object.
static PROBE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shoal.bpf.o"));

/// Entries of the flow tables: more than a round can fill, and few enough to be cleared quickly.
const FLOWS_MAX: u32 = 16 * ROUND as u32;
/// Longest packet that comes back, bytes.
const OUTPUT_MAX: usize = 4096;
/// How often a round with a difference is run anew: a second may have begun amid it, which only the kernel notices.
const ATTEMPTS: usize = 3;
/// Bytes of `struct __sk_buff`, and offsets in it.
const SKB_LEN: usize = 192;
const SKB_IFINDEX: usize = 40;
const SKB_CB: usize = 48;
const SKB_GSO_SIZE: usize = 176;

/// The programs and maps, in namespaces of the calling thread.
pub struct Kernel {
    programs: Programs,
    probe: Ebpf,
    maps: Maps,
    /// What `maps` hold.
    held: Contents,
    peers: Array<MapData, Peer>,
    v4: Written<Be32>,
    v6: Written<Ip6>,
    budgets: PerCpuArray<MapData, Budget>,
}

/// What the programs write for one family.
struct Written<A: Side + aya::Pod> {
    sent: HashMap<MapData, FlowKey<A>, Sent>,
    opening: HashMap<MapData, FlowKey<A>, Flow<A>>,
    established: HashMap<MapData, FlowKey<A>, Flow<A>>,
    fragments: HashMap<MapData, FragmentKey<A>, FragmentPorts>,
}

/// What many rounds came to.
#[derive(Debug, Default)]
pub struct Total {
    /// Packets that both have run.
    pub packets: u64,
    /// Packets that the kernel's test runs don't take: they end within the IP header.
    pub not_taken: u64,
    /// Packets that go by the host's routes, which the host library takes to lead everywhere.
    pub no_way: u64,
    /// How they ended.
    pub ends: Ends,
    /// Where kernel and host library differ.
    pub differences: Vec<Difference>,
}

/// A packet of which kernel and host library make different things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What all packets come from.
    pub seed: u64,
    /// The round.
    pub round: u64,
    /// The packet's number in the round.
    pub packet: usize,
    /// Where it came in.
    pub hook: Hook,
    /// Its bytes.
    pub input: Vec<u8>,
    /// What the kernel returned, and the bytes then.
    pub kernel: (u32, Vec<u8>),
    /// What the host library made of it.
    pub host: (Ended, Vec<u8>),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, round, packet, hook, input, kernel, host } = self;
        writeln!(f, "packet {packet} of round {round} of seed {seed}, at {hook:?}")?;
        writeln!(f, "  in     {}", hex(input))?;
        writeln!(f, "  kernel {} ({})", hex(&kernel.1), kernel.0.cast_signed())?;
        write!(f, "  host   {} ({}, {:?})", hex(&host.1), host.0.end.code().cast_signed(), host.0)
    }
}

impl Kernel {
    /// Loads everything, in new namespaces of the calling thread. Fails without root, or in a build without BPF.
    pub fn new() -> Result<Self> {
        let folder = enter_namespaces()?;
        let programs = Programs::load(&folder, FLOWS_MAX).context("loading the agent's programs")?;
        if PROBE.is_empty() {
            bail!("built without the probe programs: run `cargo xtask setup`");
        }
        let mut loader = EbpfLoader::new();
        loader.default_map_pin_directory(&folder);
        let mut probe = loader.load(PROBE).context("loading the probe programs")?;
        let overlay = probe.program_mut("probe_overlay").context("no probe_overlay")?;
        let Program::SchedClassifier(overlay) = overlay else { bail!("probe_overlay is not of TC") };
        overlay.load().context("loading probe_overlay")?;
        Ok(Self {
            programs,
            probe,
            maps: Maps::open(&folder)?,
            held: Contents::default(),
            peers: Map::Array(pinned(&folder, "shoal_peers")?).try_into()?,
            v4: Written::open(&folder, 4)?,
            v6: Written::open(&folder, 6)?,
            budgets: Map::PerCpuArray(pinned(&folder, "shoal_budgets")?).try_into()?,
        })
    }

    /// Runs a round in the kernel and on the host library.
    pub fn round(&mut self, starts: &Starts, seed: u64, round: u64, total: &mut Total) -> Result<()> {
        for attempt in 1.. {
            let mut found = Total::default();
            self.attempt(starts, seed, round, &mut found)?;
            if found.differences.is_empty() || attempt == ATTEMPTS {
                total.packets += found.packets;
                total.not_taken += found.not_taken;
                total.no_way += found.no_way;
                total.differences.extend(found.differences);
                for (name, count) in found.ends {
                    *total.ends.entry(name).or_default() += count;
                }
                return Ok(());
            }
        }
        Ok(())
    }

    /// Ends at the first difference: the tables may differ from there on.
    fn attempt(&mut self, starts: &Starts, seed: u64, round: u64, total: &mut Total) -> Result<()> {
        let (stand, packets) = packets(starts, seed, round);
        self.set_up(stand.world)?;
        let node = Node::new(stand.world, stand.hook);
        for (packet, input) in packets.enumerate() {
            if !is_taken(stand.hook, &input) {
                total.not_taken += 1;
                continue;
            }
            if stand.world.next_hop_mtu == 0 {
                // The kernel looks for the next hops, and may find them; the host library doesn't.
                self.set_peers(stand.world)?;
            }
            let kernel = self.run(&stand, &input).with_context(|| {
                format!("packet {packet} of round {round} of seed {seed}: {}", hex(&input))
            })?;
            let mut bytes = Bytes::new(input.clone());
            bytes.segment_len = stand.segment_len;
            let ended = node.run(&mut bytes);
            let host = (ended, bytes.into_inner());
            total.packets += 1;
            if kernel.0 == ended.end.code() && kernel.1 == host.1 {
                *total.ends.entry(name(ended.end)).or_default() += 1;
            } else if has_no_way(&input, &kernel, &host) {
                total.no_way += 1;
            } else {
                let hook = stand.hook;
                total.differences.push(Difference { seed, round, packet, hook, input, kernel, host });
                return Ok(());
            }
        }
        Ok(())
    }

    /// Writes a world into the maps.
    fn set_up(&mut self, world: &World) -> Result<()> {
        let contents = world.contents();
        self.maps.write(&Changes::between(self.held.clone(), contents.clone()), &world.places)?;
        self.maps.configure(&world.config())?;
        self.held = contents;
        self.set_peers(world)?;
        let now: Duration = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)?.into();
        self.v4.set(&world.known, now.as_secs() as u32)?;
        self.v6.set(&world.known, now.as_secs() as u32)?;
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        for budget in 0..BUDGETS_MAX {
            let spent = if world.spent.contains(&budget) { BUDGET_PER_S } else { 0 };
            let value = Budget { since_ns: now.as_nanos() as u64, spent };
            self.budgets.set(budget, PerCpuValues::try_from(vec![value; cpus])?, 0)?;
        }
        Ok(())
    }

    fn set_peers(&mut self, world: &World) -> Result<()> {
        for (slot, peer) in world.peers() {
            self.peers.set(slot, peer, 0)?;
        }
        Ok(())
    }

    /// What the kernel returns, and the packet then.
    fn run(&mut self, stand: &Stand<'_>, input: &[u8]) -> Result<(u32, Vec<u8>)> {
        let mut output = vec![0; OUTPUT_MAX];
        let context = skb_context(stand);
        let mut options =
            TestRunOptions { data_in: Some(input), data_out: Some(&mut output), ..TestRunOptions::new() };
        let result = if stand.hook == Hook::UplinkXdp {
            self.programs.xdp()?.test_run(options)?
        } else {
            options.ctx_in = Some(&context);
            self.classifier(stand.hook)?.test_run(options)?
        };
        output.truncate(result.data_size_out as usize);
        Ok((result.return_value, output))
    }

    fn classifier(&mut self, hook: Hook) -> Result<&mut SchedClassifier> {
        Ok(match hook {
            Hook::Uplink | Hook::UplinkXdp => self.programs.classifier(object::UPLINK_INGRESS)?,
            Hook::Task(_) => self.programs.classifier(object::FROM_TASK)?,
            Hook::Host => self.programs.classifier(object::FROM_HOST)?,
            Hook::Overlay { .. } => {
                self.probe.program_mut("probe_overlay").context("no probe_overlay")?.try_into()?
            }
        })
    }
}

impl<A: Side + aya::Pod> Written<A> {
    fn open(folder: &Path, family: u8) -> Result<Self> {
        let table = |name| pinned(folder, &format!("shoal_{name}{family}")).map(Map::LruHashMap);
        Ok(Self {
            sent: table("sent")?.try_into()?,
            opening: table("opening")?.try_into()?,
            established: table("flows")?.try_into()?,
            fragments: table("frags")?.try_into()?,
        })
    }

    /// Makes the tables hold the entries of this family, with times that count from `now_s`, and nothing else.
    fn set(&mut self, entries: &Entries, now_s: u32) -> Result<()> {
        clear(&mut self.sent)?;
        clear(&mut self.opening)?;
        clear(&mut self.established)?;
        clear(&mut self.fragments)?;
        for (place, held) in entries {
            let (Place::Sent(FlowKey { dst, .. })
            | Place::Opening(FlowKey { dst, .. })
            | Place::Established(FlowKey { dst, .. })
            | Place::Fragment(FragmentKey { dst, .. })) = place;
            if !A::is_of(*dst) {
                continue;
            }
            match (place, held.at(now_s)) {
                (Place::Sent(key), Held::Sent(sent)) => self.sent.insert(lower_key(key), sent, 0)?,
                (Place::Opening(key), Held::Flow(flow)) => {
                    self.opening.insert(lower_key(key), lower_flow(&flow), 0)?;
                }
                (Place::Established(key), Held::Flow(flow)) => {
                    self.established.insert(lower_key(key), lower_flow(&flow), 0)?;
                }
                (Place::Fragment(key), Held::Fragment(ports)) => {
                    self.fragments.insert(lower_fragment(key), ports, 0)?;
                }
                (place, held) => bail!("{held:?} can't be at {place:?}"),
            }
        }
        Ok(())
    }
}

fn clear<K: aya::Pod, V: aya::Pod>(map: &mut HashMap<MapData, K, V>) -> Result<()> {
    for key in map.keys().collect::<Result<Vec<_>, _>>()? {
        map.remove(&key)?;
    }
    Ok(())
}

fn pinned(folder: &Path, name: &str) -> Result<MapData> {
    MapData::from_pin(folder.join(name)).with_context(|| format!("opening {name}"))
}

/// The `struct __sk_buff` that packets come with at a hook.
fn skb_context(stand: &Stand<'_>) -> [u8; SKB_LEN] {
    let mut context = [0; SKB_LEN];
    let mut set = |offset: usize, value: u32| context[offset..][..4].copy_from_slice(&value.to_ne_bytes());
    match stand.hook {
        Hook::Task(ifindex) => set(SKB_IFINDEX, ifindex),
        Hook::Overlay { vni, from } => {
            set(SKB_CB, vni);
            for (i, word) in stand.world.vtep(from).0.iter().enumerate() {
                set(SKB_CB + 4 + 4 * i, word.get());
            }
        }
        Hook::UplinkXdp | Hook::Uplink | Hook::Host => {}
    }
    set(SKB_GSO_SIZE, stand.segment_len);
    context
}

/// Whether the kernel's test runs take a packet.
fn is_taken(hook: Hook, frame: &[u8]) -> bool {
    let header = match word(frame, 12) {
        Some(0x0800) if hook != Hook::UplinkXdp => Family::V4.header_len(),
        Some(0x86dd) if hook != Hook::UplinkXdp => Family::V6.header_len(),
        _ => 0,
    };
    frame.len() >= ETHERNET + header
}

/// Whether kernel and host library differ in nothing but that the kernel's routes don't lead to the packet's destination:
/// the host library takes every destination to be `CLIENT`.
fn has_no_way(input: &[u8], kernel: &(u32, Vec<u8>), host: &(Ended, Vec<u8>)) -> bool {
    let (ended, output) = host;
    let to_client = Layout::read_ip(output, 0).is_none_or(|layout| {
        let addresses = &output[layout.addresses()];
        match layout.family.addr(CLIENT) {
            IpAddr::V4(client) => addresses.ends_with(&client.octets()),
            client @ IpAddr::V6(_) => addresses.ends_with(&octets6(client)),
        }
    });
    let left = match ended.end {
        End::Tc(Action::Route) => *kernel == (End::Tc(Action::Drop).code(), output.clone()),
        End::XdpRedirect if ended.counter == Some(Counter::MeshReplied) => {
            kernel.0 == End::XdpPass.code() && kernel.1 == input
        }
        _ => false,
    };
    left && !to_client
}
