//! One BPF map, read and written many entries at a time.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use aya::Pod;
use aya::maps::{Map, MapData, RingBuf};

use super::error::DataplaneError;
use crate::sys::bpf;

/// Opens the ring of that name in `folder`. It has one reader: what one has taken another does not see.
pub fn open_ring(folder: &Path, name: &'static str) -> Result<RingBuf<MapData>, DataplaneError> {
    let ring = MapData::from_pin(folder.join(name)).and_then(|map| Map::RingBuf(map).try_into());
    ring.map_err(|source| DataplaneError::Map { name, operation: "opening", source })
}

/// A pinned map.
#[derive(Debug)]
pub struct PinnedMap {
    name: &'static str,
    map: MapData,
}

impl PinnedMap {
    /// Opens the map of that name in `folder`, whose keys and values are to have these types.
    pub fn open<K: Pod, V: Pod>(folder: &Path, name: &'static str) -> Result<Self, DataplaneError> {
        let failed = |source| DataplaneError::Map { name, operation: "opening", source };
        let map = MapData::from_pin(folder.join(name)).map_err(failed)?;
        let info = map.info().map_err(failed)?;
        let sizes = [info.key_size(), info.value_size()];
        if sizes == [size_of::<K>() as u32, size_of::<V>() as u32] {
            Ok(Self { name, map })
        } else {
            Err(DataplaneError::MapSizes { name, key: sizes[0], value: sizes[1] })
        }
    }

    /// All entries.
    pub fn read<K: Pod, V: Pod>(&self, each: impl FnMut(K, V)) -> Result<(), DataplaneError> {
        bpf::read(self.fd(), each).map_err(|source| self.failed("reading", source))
    }

    /// Elements of an array, from `start` on; fewer where it ends.
    pub fn read_range<V: Pod>(&self, start: u32, len: u32) -> Result<Vec<V>, DataplaneError> {
        bpf::read_array(self.fd(), start, len).map_err(|source| self.failed("reading", source))
    }

    /// The value of `key`.
    pub fn get<K: Pod, V: Pod + Default>(&self, key: &K) -> Result<Option<V>, DataplaneError> {
        bpf::lookup(self.fd(), key).map_err(|source| self.failed("reading", source))
    }

    /// Writes entries.
    pub fn write<K: Pod, V: Pod>(&self, entries: &[(K, V)]) -> Result<(), DataplaneError> {
        bpf::update(self.fd(), entries).map_err(|source| self.failed("writing", source))
    }

    /// Removes entries; those that are not there are no error.
    pub fn remove<K: Pod>(&self, keys: &[K]) -> Result<(), DataplaneError> {
        bpf::remove(self.fd(), keys).map_err(|source| self.failed("removing from", source))
    }

    /// Removes the entry of `key` if `is_over` says so of its value; `false` if it is another one by now. One that the
    /// programs replace at that very moment is put back.
    pub fn remove_if<K: Pod, V: Pod + Default>(
        &self,
        key: &K,
        is_over: impl Fn(&V) -> bool,
    ) -> Result<bool, DataplaneError> {
        let failed = |source| self.failed("removing from", source);
        if !bpf::lookup(self.fd(), key).map_err(failed)?.is_some_and(|value| is_over(&value)) {
            return Ok(false);
        }
        match bpf::take(self.fd(), key).map_err(failed)? {
            Some(value) if !is_over(&value) => {
                bpf::insert_new(self.fd(), key, &value).map_err(failed)?;
                Ok(false)
            }
            Some(_) => Ok(true),
            None => Ok(false),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.map.fd().as_fd()
    }

    fn failed(&self, operation: &'static str, source: std::io::Error) -> DataplaneError {
        DataplaneError::MapAccess { name: self.name, operation, source }
    }
}
