//! The programs in the kernel, run on single packets by BPF_PROG_TEST_RUN.
//!
//! A [`Kernel`] lives in a network namespace and on a BPF file system of its own, with the interfaces and routes that
//! `super::world` speaks of. It leaves with its thread's namespaces.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues};
use aya::programs::{Program, SchedClassifier, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use mesh_agent::dataplane::object::{self, Maps, Programs};
use mesh_common::counter::Counter;
use mesh_common::map::{Flow, FlowKey, Peer};

use super::world::{CLIENT, CLIENT_ROUTE, N1, World};
use super::{Hook, Outcome};

/// The probe programs' object.
static PROBE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shoal.bpf.o"));

/// Entries of the flow table in tests.
const FLOWS_MAX: u32 = 262_144;
/// Longest packet that comes back, bytes.
const OUTPUT_MAX: usize = 4096;
/// Bytes of `struct __sk_buff`, and offsets in it.
const SKB_LEN: usize = 192;
const SKB_IFINDEX: usize = 40;
const SKB_CB: usize = 48;

/// The programs and maps.
pub struct Kernel {
    /// The agent's programs.
    pub programs: Programs,
    /// The probe programs.
    pub probe: Ebpf,
    maps: Maps,
    peers: Array<MapData, Peer>,
    flows: HashMap<MapData, FlowKey, Flow>,
    counters: PerCpuArray<MapData, u64>,
}

/// What one program run said.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// The program's return value.
    pub code: u32,
    /// Mean time of a run, ns.
    pub ns: u32,
}

impl Kernel {
    /// Loads everything, in new namespaces of the calling thread. Fails without root, or in a build without BPF.
    pub fn new() -> Result<Self> {
        let folder = enter_namespaces()?;
        let (programs, maps) = object::load(&folder, FLOWS_MAX).context("loading the agent's programs")?;
        if PROBE.is_empty() {
            bail!("built without the probe programs: run `cargo xtask setup`");
        }
        let mut probe = EbpfLoader::new()
            .default_map_pin_directory(&folder)
            .map_max_entries("shoal_flows", FLOWS_MAX)
            .load(PROBE)
            .context("loading the probe programs")?;
        for (name, program) in probe.programs_mut() {
            match program {
                Program::Xdp(program) => program.load(),
                Program::SchedClassifier(program) => program.load(),
                _ => bail!("{name} is of an unexpected kind"),
            }
            .with_context(|| format!("loading {name}"))?;
        }
        let pinned =
            |name: &str| MapData::from_pin(folder.join(name)).with_context(|| format!("opening {name}"));
        Ok(Self {
            programs,
            probe,
            maps,
            peers: Map::Array(pinned("shoal_peers")?).try_into()?,
            flows: Map::LruHashMap(pinned("shoal_flows")?).try_into()?,
            counters: Map::PerCpuArray(pinned("shoal_counters")?).try_into()?,
        })
    }

    /// Writes a world's contents into the maps.
    pub fn set_up(&mut self, world: &World) -> Result<()> {
        self.maps.write(&world.config, &world.contents)?;
        for (slot, peer) in world.peers() {
            self.peers.set(slot, peer, 0)?;
        }
        for key in self.flows.keys().collect::<Result<Vec<_>, _>>()? {
            self.flows.remove(&key)?;
        }
        for (key, flow) in &world.flows {
            self.flows.insert(key, flow, 0)?;
        }
        let zeros = vec![0; aya::util::nr_cpus().map_err(|(_, error)| error)?];
        for counter in Counter::ALL {
            self.counters.set(*counter as u32, PerCpuValues::try_from(zeros.clone())?, 0)?;
        }
        Ok(())
    }

    /// What the kernel makes of a packet: return value, bytes, counters that moved, flows that changed.
    pub fn run(&mut self, hook: Hook, world: &World, input: &[u8]) -> Result<(u32, KernelOutcome)> {
        self.set_up(world)?;
        let mut output = vec![0; OUTPUT_MAX];
        let context = skb_context(hook);
        let mut options =
            TestRunOptions { data_in: Some(input), data_out: Some(&mut output), ..TestRunOptions::new() };
        let result = if hook == Hook::UplinkXdp {
            self.programs.xdp()?.test_run(options)?
        } else {
            options.ctx_in = Some(&context);
            self.classifier(hook)?.test_run(options)?
        };
        output.truncate(result.data_size_out as usize);
        let outcome = KernelOutcome {
            output,
            counters: self.counters()?,
            flows: super::host::changed(&world.flows, &self.flows.iter().collect::<Result<_, _>>()?),
        };
        Ok((result.return_value, outcome))
    }

    /// Runs an XDP program of the probe, or the agent's if `name` is `uplink_xdp`, on a packet many times.
    pub fn repeat(&mut self, name: &'static str, input: &[u8], repeat: u32) -> Result<Run> {
        let options = TestRunOptions { data_in: Some(input), repeat, ..TestRunOptions::new() };
        let program: &mut Xdp = match self.probe.program_mut(name) {
            Some(program) => program.try_into()?,
            None => self.programs.xdp()?,
        };
        let result = program.test_run(options)?;
        Ok(Run { code: result.return_value, ns: result.duration.as_nanos() as u32 })
    }

    /// How much of every program the verifier walked, instructions.
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
            Hook::Overlay(_) => {
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

/// The `struct __sk_buff` that a packet comes with at a hook.
fn skb_context(hook: Hook) -> [u8; SKB_LEN] {
    let mut context = [0; SKB_LEN];
    let mut set = |offset: usize, value: u32| context[offset..][..4].copy_from_slice(&value.to_ne_bytes());
    match hook {
        Hook::Task(ifindex) => set(SKB_IFINDEX, ifindex),
        Hook::Overlay(arrival) => {
            set(SKB_CB, arrival.vni);
            set(SKB_CB + 4, arrival.vtep.get());
        }
        Hook::UplinkXdp | Hook::Uplink | Hook::Host => {}
    }
    context
}

/// What the kernel left behind.
#[derive(Debug, PartialEq, Eq)]
pub struct KernelOutcome {
    /// The packet's bytes.
    pub output: Vec<u8>,
    /// Counters that aren't zero.
    pub counters: Vec<(Counter, u64)>,
    /// Flows gained or changed.
    pub flows: Vec<(FlowKey, Flow)>,
}

impl KernelOutcome {
    /// What the kernel must have left behind for `outcome`.
    pub fn expected(outcome: &Outcome) -> Self {
        Self {
            output: outcome.output.clone(),
            counters: outcome.counter.map(|counter| (counter, 1)).into_iter().collect(),
            flows: outcome.flows.clone(),
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
    ip(&format!("addr add {N1}/24 dev two"))?;
    ip(&format!("neigh add {CLIENT} lladdr {} dev two", colons(CLIENT_ROUTE.next_hop)))?;
    ip("route add default via 198.18.0.1")?;
    for scope in ["all", "lo", "two", "three"] {
        fs::write(format!("/proc/sys/net/ipv4/conf/{scope}/forwarding"), "1").context("forwarding")?;
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
