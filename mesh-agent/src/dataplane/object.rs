//! The BPF object: its programs, and its maps under their pins.

use std::fs;
use std::path::{Path, PathBuf};

use aya::maps::{Map, MapInfo};
use aya::programs::{Program, ProgramError, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use mesh_common::ABI_VERSION;
use mesh_common::be::Be32;
use mesh_common::map::{AddrKey, Alias, Backend, Config, Endpoint, Iface, Peer, Port, PortKey, Service};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::error::DataplaneError;
use super::layout::Contents;
use super::mirror::{ArrayMirror, HashMirror, Mirror, RangeWriter};

/// The object that `build.rs` made; empty in a build without a BPF toolchain.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shoal.bpf.o"));

/// Names of the programs in the object.
pub const UPLINK_XDP: &str = "uplink_xdp";
/// See [`UPLINK_XDP`].
pub const UPLINK_INGRESS: &str = "uplink_ingress";
/// See [`UPLINK_XDP`].
pub const FROM_TASK: &str = "from_task";
/// See [`UPLINK_XDP`].
pub const FROM_OVERLAY: &str = "from_overlay";
/// See [`UPLINK_XDP`].
pub const FROM_HOST: &str = "from_host";

const CLASSIFIERS: [&str; 4] = [UPLINK_INGRESS, FROM_TASK, FROM_OVERLAY, FROM_HOST];

/// The loaded programs.
pub struct Programs {
    ebpf: Ebpf,
}

impl Programs {
    /// A TC program.
    pub fn classifier(&mut self, name: &'static str) -> Result<&mut SchedClassifier, DataplaneError> {
        let program = self.ebpf.program_mut(name).ok_or(DataplaneError::Missing { name })?;
        program.try_into().map_err(|source| failed(name, source))
    }

    /// The XDP program.
    pub fn xdp(&mut self) -> Result<&mut Xdp, DataplaneError> {
        let program =
            self.ebpf.program_mut(UPLINK_XDP).ok_or(DataplaneError::Missing { name: UPLINK_XDP })?;
        program.try_into().map_err(|source| failed(UPLINK_XDP, source))
    }

    /// The object, for what the agent itself has no use for: test runs, and program and map information.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }
}

/// The folder of pins of this version under `pin_dir`, made if need be.
pub fn pin_folder(pin_dir: &Path) -> Result<PathBuf, DataplaneError> {
    let at = |path: &Path, source| DataplaneError::PinFolder { path: path.to_owned(), source };
    let mount = pin_dir.ancestors().find(|path| path.exists()).unwrap_or(pin_dir);
    match statfs(mount) {
        Ok(stat) if stat.filesystem_type() == BPF_FS_MAGIC => {}
        _ => return Err(DataplaneError::NotBpffs { path: pin_dir.to_owned() }),
    }
    let folder = pin_dir.join(version_folder());
    fs::create_dir_all(&folder).map_err(|source| at(&folder, source))?;
    Ok(folder)
}

/// Removes the pins of other versions, whose programs and maps these don't understand. Their attachments end with them:
/// only once this version's programs have loaded.
pub fn remove_other_versions(pin_dir: &Path) -> Result<(), DataplaneError> {
    let at = |path: &Path, source| DataplaneError::PinFolder { path: path.to_owned(), source };
    let folder = pin_dir.join(version_folder());
    for entry in fs::read_dir(pin_dir).map_err(|source| at(pin_dir, source))?.flatten() {
        // The file system's root also holds files of the kernel's own.
        let name = entry.file_name();
        let of_a_version =
            name.to_str().and_then(|name| name.strip_prefix('v')?.parse::<u32>().ok()).is_some();
        if of_a_version && entry.path() != folder {
            fs::remove_dir_all(entry.path()).map_err(|source| at(&entry.path(), source))?;
        }
    }
    Ok(())
}

/// The name of the folder of pins of this version.
pub fn version_folder() -> String {
    format!("v{ABI_VERSION}")
}

/// Loads the object with its maps pinned in `folder`; maps that are there are taken over with what they hold.
pub fn load(folder: &Path, flows_max: u32) -> Result<(Programs, Maps), DataplaneError> {
    if OBJECT.is_empty() {
        return Err(DataplaneError::NoObject);
    }
    discard_flows_of_another_size(folder, flows_max)?;
    let mut ebpf = EbpfLoader::new()
        .default_map_pin_directory(folder)
        .map_max_entries("shoal_flows", flows_max)
        .load(OBJECT)
        .map_err(|error| DataplaneError::Object(Box::new(error)))?;
    // Before the maps are taken out: the programs refer to them by descriptors that this closes.
    for name in CLASSIFIERS {
        match ebpf.program_mut(name) {
            Some(Program::SchedClassifier(program)) => {
                program.load().map_err(|source| failed(name, source))?;
            }
            _ => return Err(DataplaneError::Missing { name }),
        }
    }
    match ebpf.program_mut(UPLINK_XDP) {
        Some(Program::Xdp(program)) => program.load().map_err(|source| failed(UPLINK_XDP, source))?,
        _ => return Err(DataplaneError::Missing { name: UPLINK_XDP }),
    }
    let maps = Maps::open(&mut ebpf)?;
    Ok((Programs { ebpf }, maps))
}

fn failed(name: &'static str, source: ProgramError) -> DataplaneError {
    DataplaneError::Program { name, source: Box::new(source) }
}

/// A pinned map is taken over whatever its size, so a flow table of another size has to go first.
fn discard_flows_of_another_size(folder: &Path, flows_max: u32) -> Result<(), DataplaneError> {
    let pin = folder.join("shoal_flows");
    let Ok(info) = MapInfo::from_pin(&pin) else { return Ok(()) };
    if info.max_entries() == flows_max {
        return Ok(());
    }
    tracing::warn!(flows_max, "the flow table's capacity changed: flows are forgotten");
    fs::remove_file(&pin).map_err(|source| DataplaneError::PinFolder { path: pin, source })
}

/// The maps that the agent writes.
pub struct Maps {
    config: ArrayMirror<Config>,
    locals: HashMirror<Be32, u32>,
    members: HashMirror<Be32, u32>,
    peers: ArrayMirror<Peer>,
    backends: ArrayMirror<Backend>,
    maglev: RangeWriter,
    services: ArrayMirror<Service>,
    ports: HashMirror<PortKey, Port>,
    vips: HashMirror<AddrKey, u32>,
    endpoints: HashMirror<AddrKey, Endpoint>,
    ifaces: HashMirror<u32, Iface>,
    aliases: HashMirror<Be32, Alias>,
}

impl Maps {
    fn open(ebpf: &mut Ebpf) -> Result<Self, DataplaneError> {
        let mut take = |name: &'static str| -> Result<Map, DataplaneError> {
            ebpf.take_map(name).ok_or(DataplaneError::Missing { name })
        };
        macro_rules! open {
            ($kind:ident, $name:literal) => {
                $kind::open($name, take($name)?)?
            };
        }
        Ok(Self {
            config: open!(ArrayMirror, "shoal_config"),
            locals: open!(HashMirror, "shoal_locals"),
            members: open!(HashMirror, "shoal_members"),
            peers: open!(ArrayMirror, "shoal_peers"),
            backends: open!(ArrayMirror, "shoal_backends"),
            maglev: open!(RangeWriter, "shoal_maglev"),
            services: open!(ArrayMirror, "shoal_services"),
            ports: open!(HashMirror, "shoal_ports"),
            vips: open!(HashMirror, "shoal_vips"),
            endpoints: open!(HashMirror, "shoal_endpts"),
            ifaces: open!(HashMirror, "shoal_ifaces"),
            aliases: open!(HashMirror, "shoal_aliases"),
        })
    }

    /// What the maps hold, but for the Maglev tables.
    pub fn held(&self) -> Contents {
        Contents {
            locals: self.locals.held().clone(),
            members: self.members.held().clone(),
            peers: self.peers.held().iter().map(|(slot, peer)| (*slot, peer.vtep)).collect(),
            backends: self.backends.held().clone(),
            maglev: Vec::new(),
            services: self.services.held().clone(),
            ports: self.ports.held().clone(),
            vips: self.vips.held().clone(),
            endpoints: self.endpoints.held().clone(),
            ifaces: self.ifaces.held().clone(),
            aliases: self.aliases.held().clone(),
        }
    }

    /// Brings the maps to `contents`: first what others refer to, then what refers to it, then what is left over.
    pub fn write(&mut self, config: &Config, contents: &Contents) -> Result<(), DataplaneError> {
        // The programs keep their next hops in the same elements: one that names the right VTEP stays as it is.
        let held = self.peers.held();
        let peers = contents
            .peers
            .iter()
            .map(|(slot, vtep)| match held.get(slot) {
                Some(peer) if peer.vtep == *vtep => (*slot, *peer),
                _ => (*slot, Peer { vtep: *vtep, ..Peer::default() }),
            })
            .collect();
        self.config.upsert(&[(0, *config)].into())?;
        self.peers.upsert(&peers)?;
        self.members.upsert(&contents.members)?;
        self.locals.upsert(&contents.locals)?;
        self.backends.upsert(&contents.backends)?;
        for (start, places) in &contents.maglev {
            self.maglev.write(*start, places)?;
        }
        self.services.upsert(&contents.services)?;
        self.ifaces.upsert(&contents.ifaces)?;
        self.aliases.upsert(&contents.aliases)?;
        self.endpoints.upsert(&contents.endpoints)?;
        self.vips.upsert(&contents.vips)?;
        self.ports.upsert(&contents.ports)?;

        self.ports.prune(&contents.ports)?;
        self.vips.prune(&contents.vips)?;
        self.endpoints.prune(&contents.endpoints)?;
        self.aliases.prune(&contents.aliases)?;
        self.ifaces.prune(&contents.ifaces)?;
        self.services.prune(&contents.services)?;
        self.backends.prune(&contents.backends)?;
        self.locals.prune(&contents.locals)?;
        self.members.prune(&contents.members)?;
        self.peers.prune(&peers)
    }
}
