//! The programs in the kernel, run on single packets by BPF_PROG_TEST_RUN.
//!
//! A [`Kernel`] lives in a network namespace and on a BPF file system of its own, with the interfaces and routes that
//! `super::world` speaks of. It leaves with its thread's namespaces.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues};
use aya::programs::{Program, SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use mesh_agent::dataplane::contents::{Changes as Writes, Contents};
use mesh_agent::dataplane::maps::Maps;
use mesh_agent::dataplane::object::{self, Programs};
use mesh_common::addr::Ip6;
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::map::{
    BUDGET_PER_S, BUDGETS_MAX, Budget, Flow, FlowKey, FragmentKey, FragmentPorts, Peer, Sent,
};
use nix::time::{ClockId, clock_gettime};

use super::entries::{
    Changes, Entries, Held, Place, changes, lift_flow, lift_fragment, lift_key, lower_flow, lower_fragment,
    lower_key,
};
use super::family::{Family, Side};
use super::world::{CLIENT, CLIENT_ROUTE, N1, NOWHERE, ROUTER, World};
use super::{Fixture, Hook, Outcome};

/// The probe programs' object.
static PROBE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shoal.bpf.o"));

/// Entries of the flow tables: more than tests write between two clearings, and few enough to be cleared quickly.
const FLOWS_MAX: u32 = 16_384;
/// How often a fixture is run in search of a run within one second.
const ATTEMPTS: usize = 10;
/// Longest packet that comes back, bytes.
const OUTPUT_MAX: usize = 4096;
/// Bytes of `struct __sk_buff`, and offsets in it.
const SKB_LEN: usize = 192;
const SKB_IFINDEX: usize = 40;
const SKB_CB: usize = 48;
const SKB_GSO_SIZE: usize = 176;

/// The programs and maps.
pub struct Kernel {
    /// The agent's programs.
    programs: Programs,
    /// The probe programs.
    probe: Ebpf,
    maps: Maps,
    /// What `maps` hold.
    held: Contents,
    peers: Array<MapData, Peer>,
    v4: Written<Be32>,
    v6: Written<Ip6>,
    counters: PerCpuArray<MapData, u64>,
    budgets: PerCpuArray<MapData, Budget>,
}

/// What the programs write for one family.
struct Written<A: Side + aya::Pod> {
    sent: HashMap<MapData, FlowKey<A>, Sent>,
    opening: HashMap<MapData, FlowKey<A>, Flow<A>>,
    established: HashMap<MapData, FlowKey<A>, Flow<A>>,
    fragments: HashMap<MapData, FragmentKey<A>, FragmentPorts>,
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
        for (name, program) in probe.programs_mut() {
            match program {
                Program::Xdp(program) => program.load(),
                Program::SchedClassifier(program) => program.load(),
                _ => bail!("{name} is of an unexpected kind"),
            }
            .with_context(|| format!("loading {name}"))?;
        }
        Ok(Self {
            programs,
            probe,
            maps: Maps::open(&folder)?,
            held: Contents::default(),
            peers: Map::Array(pinned(&folder, "shoal_peers")?).try_into()?,
            v4: Written::open(&folder, 4)?,
            v6: Written::open(&folder, 6)?,
            counters: Map::PerCpuArray(pinned(&folder, "shoal_counters")?).try_into()?,
            budgets: Map::PerCpuArray(pinned(&folder, "shoal_budgets")?).try_into()?,
        })
    }

    /// Writes a world into the maps. Gives the second that times in it count from.
    pub fn set_up(&mut self, world: &World) -> Result<u32> {
        let contents = world.contents();
        self.maps.write(&Writes::between(self.held.clone(), contents.clone()), &world.places)?;
        self.maps.configure(&world.config())?;
        self.held = contents;
        self.set_peers(world)?;
        let now = now()?;
        let now_s = now.as_secs() as u32;
        self.v4.set(&world.known, now_s)?;
        self.v6.set(&world.known, now_s)?;
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        for counter in Counter::ALL {
            self.counters.set(*counter as u32, PerCpuValues::try_from(vec![0; cpus])?, 0)?;
        }
        for budget in 0..BUDGETS_MAX {
            let spent = if world.spent.contains(&budget) { BUDGET_PER_S } else { 0 };
            let value = Budget { since_ns: now.as_nanos() as u64, spent };
            self.budgets.set(budget, PerCpuValues::try_from(vec![value; cpus])?, 0)?;
        }
        Ok(now_s)
    }

    /// Writes the next hops of a world, over those that the programs have found since.
    pub fn set_peers(&mut self, world: &World) -> Result<()> {
        for (slot, peer) in world.peers() {
            self.peers.set(slot, peer, 0)?;
        }
        Ok(())
    }

    /// Runs a hook of `world` on a packet, on the maps as they are: return value and bytes.
    pub fn run(
        &mut self,
        hook: Hook,
        world: &World,
        segment_len: u32,
        input: &[u8],
    ) -> Result<(u32, Vec<u8>)> {
        let mut output = vec![0; OUTPUT_MAX];
        let context = skb_context(hook, world, segment_len);
        let mut options =
            TestRunOptions { data_in: Some(input), data_out: Some(&mut output), ..TestRunOptions::new() };
        let result = if hook == Hook::UplinkXdp {
            self.programs.xdp()?.test_run(options)?
        } else {
            options.ctx_in = Some(&context);
            self.classifier(hook)?.test_run(options)?
        };
        output.truncate(result.data_size_out as usize);
        Ok((result.return_value, output))
    }

    /// What the kernel makes of a fixture's packet: return value, bytes, counters that moved, entries that changed.
    pub fn run_fixture(&mut self, fixture: &Fixture) -> Result<(u32, KernelOutcome)> {
        let Fixture { name, hook, world, segment_len, input, .. } = fixture;
        for _ in 0..ATTEMPTS {
            let now_s = self.set_up(world)?;
            let (code, output) = self.run(*hook, world, *segment_len, input)?;
            // Otherwise, nobody can tell which of the two seconds a stamp is of.
            if now()?.as_secs() as u32 == now_s {
                let (counters, changes) = (self.counters()?, self.changes(world, now_s)?);
                return Ok((code, KernelOutcome { output, counters, changes }));
            }
        }
        bail!("{name}: no run within one second")
    }

    /// How the programs' tables differ from those of `world`, whose times count from `now_s`.
    fn changes(&self, world: &World, now_s: u32) -> Result<Changes> {
        let before = world.known.iter().map(|(place, held)| (*place, held.at(now_s))).collect();
        let after = self.v4.entries()?.into_iter().chain(self.v6.entries()?).collect();
        let changes = changes(&before, &after).into_iter();
        Ok(changes.map(|(place, held)| (place, held.map(|held| held.since(now_s)))).collect())
    }

    /// How much of every program of the agent the verifier walked, instructions.
    pub fn verified_instructions(&mut self) -> Result<BTreeMap<String, u32>> {
        let mut verified = BTreeMap::new();
        for (name, program) in self.programs.ebpf().programs() {
            let count = program.info()?.verified_instruction_count();
            verified.insert(name.to_owned(), count.context("the kernel doesn't say (5.16 and later do)")?);
        }
        Ok(verified)
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

    fn counters(&self) -> Result<Vec<(Counter, u64)>> {
        let mut moved = Vec::new();
        for counter in Counter::ALL {
            let count: u64 = self.counters.get(&(*counter as u32), 0)?.iter().sum();
            if count != 0 {
                moved.push((*counter, count));
            }
        }
        Ok(moved)
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
        for (place, held) in entries.iter().filter(|(place, _)| A::is_of(place.dst())) {
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

    fn entries(&self) -> Result<Entries> {
        let mut entries = Entries::new();
        for entry in &self.sent {
            let (key, sent) = entry?;
            entries.insert(Place::Sent(lift_key(&key)), Held::Sent(sent));
        }
        for entry in &self.opening {
            let (key, flow) = entry?;
            entries.insert(Place::Opening(lift_key(&key)), Held::Flow(lift_flow(&flow)));
        }
        for entry in &self.established {
            let (key, flow) = entry?;
            entries.insert(Place::Established(lift_key(&key)), Held::Flow(lift_flow(&flow)));
        }
        for entry in &self.fragments {
            let (key, ports) = entry?;
            entries.insert(Place::Fragment(lift_fragment(&key)), Held::Fragment(ports));
        }
        Ok(entries)
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

/// Now, on the clock that programs read.
fn now() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)?.into())
}

/// The `struct __sk_buff` that a packet comes with at a hook.
fn skb_context(hook: Hook, world: &World, segment_len: u32) -> [u8; SKB_LEN] {
    let mut context = [0; SKB_LEN];
    let mut set = |offset: usize, value: u32| context[offset..][..4].copy_from_slice(&value.to_ne_bytes());
    match hook {
        Hook::Task(ifindex) => set(SKB_IFINDEX, ifindex),
        Hook::Overlay { vni, from } => {
            set(SKB_CB, vni);
            for (i, word) in world.vtep(from).0.iter().enumerate() {
                set(SKB_CB + 4 + 4 * i, word.get());
            }
        }
        Hook::UplinkXdp | Hook::Uplink | Hook::Host => {}
    }
    set(SKB_GSO_SIZE, segment_len);
    context
}

/// What the kernel left behind.
#[derive(Debug, PartialEq, Eq)]
pub struct KernelOutcome {
    /// The packet's bytes.
    pub output: Vec<u8>,
    /// Counters that aren't zero.
    pub counters: Vec<(Counter, u64)>,
    /// Entries gained, changed or lost.
    pub changes: Changes,
}

impl KernelOutcome {
    /// What the kernel must have left behind for `outcome`.
    pub fn expected(outcome: &Outcome) -> Self {
        Self {
            output: outcome.output.clone(),
            counters: outcome.counters().into_iter().map(|counter| (counter, 1)).collect(),
            changes: outcome.changes.clone(),
        }
    }
}

/// Gives the calling thread new network and mount namespaces: interfaces 2 and 3, a default route for `Route`
/// verdicts, and a BPF file system. Returns the folder to pin in.
pub fn enter_namespaces() -> Result<PathBuf> {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("new namespaces need root")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
    let folder = Path::new("/sys/fs/bpf");
    fs::create_dir_all(folder).context("no /sys/fs/bpf")?;
    mount(Some("bpf"), folder, Some("bpf"), MsFlags::empty(), none).context("mounting bpffs")?;
    ip("link add two type veth peer name three")?;
    ip("link set lo up")?;
    ip("link set two up")?;
    ip("link set three up")?;
    ip(&format!("link set two address {}", colons(CLIENT_ROUTE.source)))?;
    for (family, bits) in [(Family::V4, 24), (Family::V6, 120)] {
        let addr = |addr| family.addr(addr);
        let nodad = if family == Family::V6 { " nodad" } else { "" };
        ip(&format!("addr add {}/{bits} dev two{nodad}", addr(N1)))?;
        ip(&format!("neigh add {} lladdr {} dev two", addr(CLIENT), colons(CLIENT_ROUTE.next_hop)))?;
        ip(&format!("route add default via {}", addr(ROUTER)))?;
        ip(&format!("route add {} dev two mtu lock {}", addr(CLIENT), CLIENT_ROUTE.mtu))?;
        ip(&format!("route add unreachable {}", addr(NOWHERE)))?;
    }
    for scope in ["all", "lo", "two", "three"] {
        for family in ["ipv4", "ipv6"] {
            let path = format!("/proc/sys/net/{family}/conf/{scope}/forwarding");
            fs::write(&path, "1").with_context(|| format!("writing {path}"))?;
        }
    }
    let pins = folder.join("packet-tests");
    fs::create_dir_all(&pins)?;
    Ok(pins)
}

fn colons(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output().context("running ip")?;
    if !output.status.success() {
        bail!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
