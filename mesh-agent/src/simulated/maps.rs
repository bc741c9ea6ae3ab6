//! Maps in this process's memory: they hold what the kernel's would, and nobody asks them.

use std::collections::BTreeMap;

use mesh_common::map::{Config, Service};

use crate::dataplane::DataplaneError;
use crate::dataplane::contents::{Changes, Contents};
use crate::dataplane::places::Places;
use crate::dataplane::tables::Backing;

/// What the maps hold.
#[derive(Debug, Default)]
pub(super) struct Maps {
    config: Config,
    contents: Contents,
    /// Maglev tables in use, each with its nodes behind it, by their first place.
    places: BTreeMap<u32, Box<[u32]>>,
}

impl Maps {
    /// Forgets the places of services that are about to be others'.
    fn forget_places(&mut self, changes: &Changes) {
        let (set, removed) = (&changes.set.common.services, &changes.removed.common.services);
        let next = |slot: &u32| set.get(slot).map(|service| service.start);
        for slot in set.keys().chain(removed.keys()) {
            let start = self.contents.common.services.get(slot).map(|service| service.start);
            if let Some(start) = start.filter(|start| next(slot) != Some(*start)) {
                self.places.remove(&start);
            }
        }
    }
}

impl Backing for Maps {
    fn read(&self) -> Result<Contents, DataplaneError> {
        Ok(self.contents.clone())
    }

    fn read_places(&self, services: &BTreeMap<u32, Service>) -> Result<Places, DataplaneError> {
        let of = |service: &Service| Some((service.start, self.places.get(&service.start)?));
        Ok(services.values().filter_map(of).collect())
    }

    fn write(&mut self, changes: &Changes, places: &Places) -> Result<(), DataplaneError> {
        self.forget_places(changes);
        self.places.extend(places.iter().map(|(start, range)| (start, range.into())));
        self.contents.follow(changes);
        Ok(())
    }

    fn configure(&mut self, config: &Config) -> Result<(), DataplaneError> {
        self.config = *config;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(start: u32) -> Service {
        Service { start, len: 2, ..Service::default() }
    }

    fn changes(set: &[(u32, u32)], removed: &[(u32, u32)]) -> Changes {
        let services = |entries: &[(u32, u32)]| {
            entries.iter().map(|(slot, start)| (*slot, service(*start))).collect::<BTreeMap<_, _>>()
        };
        let mut changes = Changes::default();
        changes.set.common.services = services(set);
        changes.removed.common.services = services(removed);
        changes
    }

    #[test]
    fn places_are_held_for_as_long_as_a_service_has_them() {
        let mut maps = Maps::default();
        let places = |starts: &[u32]| starts.iter().map(|start| (*start, [*start, 7])).collect();
        maps.write(&changes(&[(1, 10), (2, 20)], &[]), &places(&[10, 20])).unwrap();
        maps.write(&changes(&[(1, 30), (2, 20)], &[]), &places(&[30])).unwrap();
        assert_eq!(maps.places.keys().copied().collect::<Vec<_>>(), [20, 30]);
        maps.write(&changes(&[], &[(2, 20)]), &places(&[])).unwrap();
        let held = maps.read().unwrap().common.services;
        assert_eq!(held, BTreeMap::from([(1, service(30))]));
        let places = maps.read_places(&held).unwrap();
        assert_eq!(places.iter().collect::<Vec<_>>(), [(30, &[30, 7][..])]);
        assert_eq!(maps.places.len(), 1);
    }
}
