//! A node's dataplane, and the probe programs on its maps.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use aya::maps::{Array, Map, MapData};
use aya::programs::{Program, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use mesh_agent::config::XdpMode;
use mesh_agent::dataplane::{Dataplane, DataplaneConfig, Uplink, pins};
use mesh_common::map::{FLOWS_MAX_DEFAULT, Peer};
use nix::time::ClockId;

use super::cpu_time;

/// The probe programs' object.
static PROBE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shoal.bpf.o"));

/// The interfaces that [`enter_namespaces`](crate::packet::kernel::enter_namespaces) makes.
const LOOPBACK: u32 = 1;
const TWO: u32 = 2;
const THREE: u32 = 3;

/// A node's dataplane, attached in the calling thread's network namespace.
pub struct Node {
    /// What the agent has.
    pub dataplane: Dataplane,
}

impl Node {
    /// Opens one whose pins are below `pin_dir`.
    pub fn open(pin_dir: &Path) -> Result<Self> {
        let dataplane = Dataplane::open(DataplaneConfig {
            pin_dir: pin_dir.to_owned(),
            xdp: XdpMode::Off,
            flows_max: FLOWS_MAX_DEFAULT,
            vxlan_ifindex: THREE,
            host_ifindex: LOOPBACK,
            host_peer_ifindex: THREE,
            host_addr: std::net::Ipv4Addr::new(169, 254, 64, 1),
            alias_net: "169.254.64.0/18".parse()?,
            uplinks: vec![Uplink {
                ifindex: TWO,
                name: "two".to_owned(),
                mtu: 1500,
                is_veth: true,
                is_vlan: false,
            }],
        });
        Ok(Self { dataplane: dataplane.context("opening the dataplane")? })
    }

    /// Removes all of it.
    pub fn close(self) -> Result<()> {
        self.dataplane.uninstall().map_err(|errors| {
            let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
            anyhow!("removing the dataplane: {}", texts.join("; "))
        })
    }
}

/// The probe programs, on a node's maps.
pub struct Probe {
    programs: Ebpf,
    folder: PathBuf,
}

impl Probe {
    /// Loads them on the maps of the node whose pins are below `pin_dir`.
    pub fn load(pin_dir: &Path) -> Result<Self> {
        if PROBE.is_empty() {
            bail!("built without the probe programs: run `cargo xtask setup`");
        }
        let folder = pins::pin_folder(pin_dir)?;
        let loaded = EbpfLoader::new().default_map_pin_directory(&folder).load(PROBE);
        let mut programs = loaded.context("loading the probe programs")?;
        for (name, program) in programs.programs_mut() {
            match program {
                Program::Xdp(program) => program.load(),
                // Nothing else is measured here.
                _ => continue,
            }
            .with_context(|| format!("loading {name}"))?;
        }
        Ok(Self { programs, folder })
    }

    /// Gives all peers a next hop that stays, behind the interface that test runs come in by.
    pub fn make_peers_known(&self) -> Result<()> {
        let map = MapData::from_pin(self.folder.join("shoal_peers")).context("opening shoal_peers")?;
        let mut peers: Array<MapData, Peer> = Map::Array(map).try_into()?;
        for slot in 0..peers.len() {
            let peer = peers.get(&slot, 0)?;
            if peer.vtep != Peer::default().vtep {
                let (next_hop, source) = ([2, 0, 0, 0, 0, 0x12], [2, 0, 0, 0, 0, 0x11]);
                let known =
                    Peer { expires_ns: u64::MAX, ifindex: LOOPBACK, next_hop, source, mtu: 1500, ..peer };
                peers.set(slot, known, 0)?;
            }
        }
        Ok(())
    }

    /// Runs a program on a packet many times; gives its last return value, and the mean time of a run, ns.
    ///
    /// The time is this thread's on a CPU: the kernel tells its own mean too, but in whole ns, which is too coarse where
    /// a program takes ten.
    pub fn repeat(&mut self, name: &str, packet: &[u8], repeat: u32) -> Result<(u32, f64)> {
        let program = self.programs.program_mut(name).with_context(|| format!("no program {name}"))?;
        let program: &mut Xdp = program.try_into()?;
        let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::new() };
        let started = cpu_time(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
        let result = program.test_run(options).with_context(|| format!("running {name}"))?;
        let spent = cpu_time(ClockId::CLOCK_THREAD_CPUTIME_ID)?.saturating_sub(started);
        Ok((result.return_value, spent.as_secs_f64() * 1e9 / f64::from(repeat)))
    }
}
