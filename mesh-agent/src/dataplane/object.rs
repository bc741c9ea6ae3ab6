//! The BPF object: its programs, and its maps under their pins.

use std::fs;
use std::path::Path;

use aya::maps::MapInfo;
use aya::programs::{Program, ProgramError, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};

use super::cgroup;
use super::error::DataplaneError;

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

/// The programs of each kind.
const XDP: [&str; 1] = [UPLINK_XDP];
/// See [`XDP`].
pub const CLASSIFIERS: [&str; 4] = [UPLINK_INGRESS, FROM_TASK, FROM_OVERLAY, FROM_HOST];

/// The tables of flows whose capacity the agent is told.
const SIZED: [&str; 4] = ["shoal_flows4", "shoal_flows6", "shoal_sent4", "shoal_sent6"];

/// The loaded programs.
pub struct Programs {
    ebpf: Ebpf,
}

impl Programs {
    /// Loads the object with its maps pinned in `folder`; maps that are there are taken over with what they hold.
    pub fn load(folder: &Path, flows_max: u32) -> Result<Self, DataplaneError> {
        if OBJECT.is_empty() {
            return Err(DataplaneError::NoObject);
        }
        discard_flows_of_another_size(folder, flows_max)?;
        let mut loader = EbpfLoader::new();
        loader.default_map_pin_directory(folder);
        for name in SIZED {
            loader.map_max_entries(name, flows_max);
        }
        let mut ebpf = loader.load(OBJECT).map_err(|error| DataplaneError::Object(Box::new(error)))?;
        for name in XDP.into_iter().chain(CLASSIFIERS).chain(cgroup::PROGRAMS) {
            let result = match ebpf.program_mut(name) {
                Some(Program::Xdp(program)) => program.load(),
                Some(Program::SchedClassifier(program)) => program.load(),
                Some(Program::CgroupSockAddr(program)) => program.load(),
                _ => return Err(DataplaneError::Missing { name }),
            };
            result.map_err(|source| failed(name, source))?;
        }
        Ok(Self { ebpf })
    }

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

fn failed(name: &'static str, source: ProgramError) -> DataplaneError {
    DataplaneError::Program { name, source: Box::new(source) }
}

/// A pinned map is taken over whatever its size, so a flow table of another size has to go first.
fn discard_flows_of_another_size(folder: &Path, flows_max: u32) -> Result<(), DataplaneError> {
    for pin in SIZED.map(|name| folder.join(name)) {
        let Ok(info) = MapInfo::from_pin(&pin) else { continue };
        if info.max_entries() != flows_max {
            tracing::warn!(map = %pin.display(), flows_max, "the flow table's capacity changed: flows are forgotten");
            fs::remove_file(&pin).map_err(|source| DataplaneError::PinFolder { path: pin, source })?;
        }
    }
    Ok(())
}
