//! Reading the counters of how packets ended, from the pins: also while no agent runs.

use std::path::Path;

use aya::maps::{Map, MapData, PerCpuArray};
use mesh_common::counter::Counter;

use super::error::DataplaneError;
use super::pins::version_folder;

/// The map, under its pin.
const NAME: &str = "shoal_counters";

/// How many packets ended which way on this node since its dataplane was set up, all CPUs together; in the order of
/// [`Counter::ALL`]. `pin_dir` is the agent's folder on a BPF file system.
pub fn read_counters(pin_dir: &Path) -> Result<Vec<(Counter, u64)>, DataplaneError> {
    let failed = |source| DataplaneError::Map { name: NAME, operation: "reading", source };
    let pin = pin_dir.join(version_folder()).join(NAME);
    if !pin.exists() {
        return Err(DataplaneError::NotSetUp { path: pin_dir.to_owned() });
    }
    let map: PerCpuArray<MapData, u64> =
        Map::PerCpuArray(MapData::from_pin(pin).map_err(failed)?).try_into().map_err(failed)?;
    let total = |counter: &Counter| Ok((*counter, map.get(&(*counter as u32), 0)?.iter().sum()));
    Counter::ALL.iter().map(total).collect::<Result<_, _>>().map_err(failed)
}
