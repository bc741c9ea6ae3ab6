//! BPF maps, each with a copy of what it holds, so that only differences are written.
//!
//! The copy is read from the kernel at start, which makes the first write a reconciliation with whatever a former
//! agent, or an accident, left there.

use std::collections::BTreeMap;

use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData, MapError};

use super::error::DataplaneError;

/// A map that can be brought to a wanted content in two steps: additions first, removals once nothing refers to
/// them any more.
pub trait Mirror<K, V> {
    /// Writes what is missing or different.
    fn upsert(&mut self, wanted: &BTreeMap<K, V>) -> Result<(), DataplaneError>;
    /// Removes what isn't wanted.
    fn prune(&mut self, wanted: &BTreeMap<K, V>) -> Result<(), DataplaneError>;
}

/// A hash map.
#[derive(Debug)]
pub struct HashMirror<K, V> {
    name: &'static str,
    map: HashMap<MapData, K, V>,
    held: BTreeMap<K, V>,
}

impl<K: Pod + Ord, V: Pod + PartialEq> HashMirror<K, V> {
    /// Reads what the map holds.
    pub fn open(name: &'static str, map: Map) -> Result<Self, DataplaneError> {
        let failed = |source| DataplaneError::Map { name, operation: "reading", source };
        let map: HashMap<MapData, K, V> = map.try_into().map_err(failed)?;
        let held = map.iter().collect::<Result<_, _>>().map_err(failed)?;
        Ok(Self { name, map, held })
    }

    /// What the map holds.
    pub fn held(&self) -> &BTreeMap<K, V> {
        &self.held
    }
}

impl<K: Pod + Ord, V: Pod + PartialEq> Mirror<K, V> for HashMirror<K, V> {
    fn upsert(&mut self, wanted: &BTreeMap<K, V>) -> Result<(), DataplaneError> {
        for (key, value) in wanted {
            if self.held.get(key) == Some(value) {
                continue;
            }
            self.map.insert(key, value, 0).map_err(|source| DataplaneError::Map {
                name: self.name,
                operation: "writing",
                source,
            })?;
            self.held.insert(*key, *value);
        }
        Ok(())
    }

    fn prune(&mut self, wanted: &BTreeMap<K, V>) -> Result<(), DataplaneError> {
        let stale: Vec<K> = self.held.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        for key in stale {
            match self.map.remove(&key) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(source) => {
                    return Err(DataplaneError::Map { name: self.name, operation: "removing from", source });
                }
            }
            self.held.remove(&key);
        }
        Ok(())
    }
}

/// An array, of which only elements that aren't zero are looked at.
pub struct ArrayMirror<V: Pod> {
    name: &'static str,
    map: Array<MapData, V>,
    held: BTreeMap<u32, V>,
}

impl<V: Pod + PartialEq + Default> ArrayMirror<V> {
    /// Reads what the array holds.
    pub fn open(name: &'static str, map: Map) -> Result<Self, DataplaneError> {
        let failed = |source| DataplaneError::Map { name, operation: "reading", source };
        let map: Array<MapData, V> = map.try_into().map_err(failed)?;
        let mut held = BTreeMap::new();
        for index in 0..map.len() {
            let value = map.get(&index, 0).map_err(failed)?;
            if value != V::default() {
                held.insert(index, value);
            }
        }
        Ok(Self { name, map, held })
    }

    /// What the array holds.
    pub fn held(&self) -> &BTreeMap<u32, V> {
        &self.held
    }

    fn set(&mut self, index: u32, value: V) -> Result<(), DataplaneError> {
        self.map.set(index, value, 0).map_err(|source| DataplaneError::Map {
            name: self.name,
            operation: "writing",
            source,
        })
    }
}

impl<V: Pod + PartialEq + Default> Mirror<u32, V> for ArrayMirror<V> {
    fn upsert(&mut self, wanted: &BTreeMap<u32, V>) -> Result<(), DataplaneError> {
        for (&index, value) in wanted {
            if self.held.get(&index) != Some(value) {
                self.set(index, *value)?;
                self.held.insert(index, *value);
            }
        }
        Ok(())
    }

    fn prune(&mut self, wanted: &BTreeMap<u32, V>) -> Result<(), DataplaneError> {
        let stale: Vec<u32> = self.held.keys().filter(|index| !wanted.contains_key(index)).copied().collect();
        for index in stale {
            self.set(index, V::default())?;
            self.held.remove(&index);
        }
        Ok(())
    }
}

/// An array that is only written, range by range.
pub struct RangeWriter {
    name: &'static str,
    map: Array<MapData, u32>,
}

impl RangeWriter {
    /// The array behind `map`.
    pub fn open(name: &'static str, map: Map) -> Result<Self, DataplaneError> {
        let failed = |source| DataplaneError::Map { name, operation: "reading", source };
        Ok(Self { name, map: map.try_into().map_err(failed)? })
    }

    /// Writes `values` from `start` on.
    pub fn write(&mut self, start: u32, values: &[u32]) -> Result<(), DataplaneError> {
        for (index, value) in (start..).zip(values) {
            self.map.set(index, value, 0).map_err(|source| DataplaneError::Map {
                name: self.name,
                operation: "writing",
                source,
            })?;
        }
        Ok(())
    }
}
