//! The maps that the agent writes: read whole at start, written by differences, each in the order that keeps what
//! refers to something from being there without it.

use std::collections::BTreeMap;
use std::path::Path;

use aya::Pod;
use mesh_common::addr::{Address, Ip6};
use mesh_common::be::Be32;
use mesh_common::map::{
    AddrKey, Alias, Backend, Config, Endpoint, Iface, Peer, Port, PortKey, RuleKey, Service, TaskKey,
    TaskSlots,
};

use super::contents::{Changes, Common, Contents, Family};
use super::error::DataplaneError;
use super::map::PinnedMap;
use super::places::Places;
use crate::sys::bpf::Prefix;

/// The maps of one family.
#[derive(Debug)]
struct FamilyMaps {
    locals: PinnedMap,
    rules: PinnedMap,
    vips: PinnedMap,
    backends: PinnedMap,
    tasks: PinnedMap,
    endpoints: PinnedMap,
    ifaces: PinnedMap,
    aliases: PinnedMap,
}

/// The maps that the agent writes.
#[derive(Debug)]
pub struct Maps {
    config: PinnedMap,
    v4: FamilyMaps,
    v6: FamilyMaps,
    ports: PinnedMap,
    services: PinnedMap,
    places: PinnedMap,
    members: PinnedMap,
    tags: PinnedMap,
    peers: PinnedMap,
}

/// Names of a family's maps, in the order of [`FamilyMaps`].
pub(super) const NAMES4: [&str; 8] = [
    "shoal_locals4",
    "shoal_rules4",
    "shoal_vips4",
    "shoal_backends4",
    "shoal_tasks4",
    "shoal_endpts4",
    "shoal_ifaces4",
    "shoal_aliases4",
];
/// See [`NAMES4`].
pub(super) const NAMES6: [&str; 8] = [
    "shoal_locals6",
    "shoal_rules6",
    "shoal_vips6",
    "shoal_backends6",
    "shoal_tasks6",
    "shoal_endpts6",
    "shoal_ifaces6",
    "shoal_aliases6",
];

impl Maps {
    /// Opens the maps that are pinned in `folder`.
    pub fn open(folder: &Path) -> Result<Self, DataplaneError> {
        Ok(Self {
            config: PinnedMap::open::<u32, Config>(folder, "shoal_config")?,
            v4: FamilyMaps::open::<Be32>(folder, NAMES4)?,
            v6: FamilyMaps::open::<Ip6>(folder, NAMES6)?,
            ports: PinnedMap::open::<PortKey, Port>(folder, "shoal_ports")?,
            services: PinnedMap::open::<u32, Service>(folder, "shoal_services")?,
            places: PinnedMap::open::<u32, u32>(folder, "shoal_places")?,
            members: PinnedMap::open::<Ip6, u32>(folder, "shoal_members")?,
            tags: PinnedMap::open::<u32, u32>(folder, "shoal_tags")?,
            peers: PinnedMap::open::<u32, Peer>(folder, "shoal_peers")?,
        })
    }

    /// What the programs know of their node; none before the first [`Maps::configure`].
    pub fn config(&self) -> Result<Option<Config>, DataplaneError> {
        let config: Option<Config> = self.config.get(&0_u32)?;
        Ok(config.filter(|config| config.vtep != Ip6::default()))
    }

    /// Tells the programs what they know of their node, and, the first time, that the maps hold what they need.
    pub fn configure(&self, config: &Config) -> Result<(), DataplaneError> {
        if self.config.get(&0_u32)? == Some(*config) {
            return Ok(());
        }
        self.config.write(&[(0_u32, *config)])
    }

    /// What the maps hold.
    pub fn read(&self) -> Result<Contents, DataplaneError> {
        let mut peers = BTreeMap::new();
        self.peers.read(|slot: u32, peer: Peer| {
            if peer.vtep != Ip6::default() {
                peers.insert(slot, peer.vtep);
            }
        })?;
        let common = Common {
            ports: entries(&self.ports)?,
            services: elements(&self.services)?,
            members: entries(&self.members)?,
            tags: entries(&self.tags)?,
            peers,
        };
        Ok(Contents { v4: self.v4.read()?, v6: self.v6.read()?, common })
    }

    /// The places of `services`, by the first of each range.
    pub fn read_places(&self, services: &BTreeMap<u32, Service>) -> Result<Places, DataplaneError> {
        let ranges = services.values().map(|Service { start, len, nodes, .. }| {
            let len = len.saturating_add(*nodes).min(PLACES_READ_MAX);
            Ok((*start, self.places.read_range::<u32>(*start, len)?))
        });
        ranges.collect()
    }

    /// Makes the changes, and puts the places: first what others refer to, then what refers to it; then what is to go,
    /// the other way round.
    pub fn write(&self, changes: &Changes, places: &Places) -> Result<(), DataplaneError> {
        let Changes { set, removed } = changes;
        let peers =
            set.common.peers.iter().map(|(slot, vtep)| (*slot, Peer { vtep: *vtep, ..Peer::default() }));
        self.peers.write(&peers.collect::<Vec<_>>())?;
        write(&self.members, &set.common.members)?;
        write(&self.tags, &set.common.tags)?;
        self.v4.write_referred(&set.v4)?;
        self.v6.write_referred(&set.v6)?;
        let mut elements = Vec::new();
        for (start, range) in places.iter() {
            elements.extend((start..).zip(range.iter().copied()));
            if elements.len() >= PLACES_AT_ONCE {
                self.places.write(&elements)?;
                elements.clear();
            }
        }
        self.places.write(&elements)?;
        write(&self.services, &set.common.services)?;
        self.v4.write_referring(&set.v4)?;
        self.v6.write_referring(&set.v6)?;
        write(&self.ports, &set.common.ports)?;

        remove(&self.ports, &removed.common.ports)?;
        self.v4.remove_referring(&removed.v4)?;
        self.v6.remove_referring(&removed.v6)?;
        clear(&self.services, &removed.common.services)?;
        self.v4.remove_referred(&removed.v4)?;
        self.v6.remove_referred(&removed.v6)?;
        remove(&self.tags, &removed.common.tags)?;
        remove(&self.members, &removed.common.members)?;
        let peers = removed.common.peers.keys().map(|slot| (*slot, Peer::default()));
        self.peers.write(&peers.collect::<Vec<_>>())
    }
}

/// Elements of `shoal_places` that are gathered for a call.
const PLACES_AT_ONCE: usize = 65_536;
/// Places of one service that are read: more than any has, and little enough to read by mistake.
const PLACES_READ_MAX: u32 = 1 << 19;

impl FamilyMaps {
    fn open<A: Address + Pod>(folder: &Path, names: [&'static str; 8]) -> Result<Self, DataplaneError> {
        let [locals, rules, vips, backends, tasks, endpoints, ifaces, aliases] = names;
        Ok(Self {
            locals: PinnedMap::open::<A, u32>(folder, locals)?,
            rules: PinnedMap::open::<Prefix<RuleKey<A>>, u32>(folder, rules)?,
            vips: PinnedMap::open::<AddrKey<A>, u32>(folder, vips)?,
            backends: PinnedMap::open::<u32, Backend<A>>(folder, backends)?,
            tasks: PinnedMap::open::<TaskKey, TaskSlots>(folder, tasks)?,
            endpoints: PinnedMap::open::<AddrKey<A>, Endpoint>(folder, endpoints)?,
            ifaces: PinnedMap::open::<u32, Iface<A>>(folder, ifaces)?,
            aliases: PinnedMap::open::<A, Alias<A>>(folder, aliases)?,
        })
    }

    fn read<A: Address + Pod>(&self) -> Result<Family<A>, DataplaneError> {
        Ok(Family {
            locals: entries(&self.locals)?,
            rules: entries(&self.rules)?,
            vips: entries(&self.vips)?,
            backends: elements(&self.backends)?,
            tasks: entries(&self.tasks)?,
            endpoints: entries(&self.endpoints)?,
            ifaces: entries(&self.ifaces)?,
            aliases: entries(&self.aliases)?,
        })
    }

    /// What services refer to, or nothing does.
    fn write_referred<A: Address + Pod>(&self, set: &Family<A>) -> Result<(), DataplaneError> {
        write(&self.locals, &set.locals)?;
        write(&self.backends, &set.backends)?;
        // A service that asks for rules finds one for every address.
        write(&self.rules, &set.rules)
    }

    /// What refers to services and backends.
    fn write_referring<A: Address + Pod>(&self, set: &Family<A>) -> Result<(), DataplaneError> {
        write(&self.tasks, &set.tasks)?;
        write(&self.ifaces, &set.ifaces)?;
        write(&self.aliases, &set.aliases)?;
        write(&self.endpoints, &set.endpoints)?;
        write(&self.vips, &set.vips)
    }

    fn remove_referring<A: Address + Pod>(&self, removed: &Family<A>) -> Result<(), DataplaneError> {
        remove(&self.vips, &removed.vips)?;
        remove(&self.endpoints, &removed.endpoints)?;
        remove(&self.aliases, &removed.aliases)?;
        remove(&self.ifaces, &removed.ifaces)?;
        remove(&self.tasks, &removed.tasks)
    }

    fn remove_referred<A: Address + Pod>(&self, removed: &Family<A>) -> Result<(), DataplaneError> {
        remove(&self.rules, &removed.rules)?;
        clear(&self.backends, &removed.backends)?;
        remove(&self.locals, &removed.locals)
    }
}

fn entries<K: Pod + Ord, V: Pod>(map: &PinnedMap) -> Result<BTreeMap<K, V>, DataplaneError> {
    let mut entries = BTreeMap::new();
    map.read(|key, value| {
        entries.insert(key, value);
    })?;
    Ok(entries)
}

/// The elements of an array that are in use.
fn elements<V: Pod + Default + PartialEq>(map: &PinnedMap) -> Result<BTreeMap<u32, V>, DataplaneError> {
    let mut elements = BTreeMap::new();
    map.read(|slot, value| {
        if value != V::default() {
            elements.insert(slot, value);
        }
    })?;
    Ok(elements)
}

fn write<K: Pod, V: Pod>(map: &PinnedMap, entries: &BTreeMap<K, V>) -> Result<(), DataplaneError> {
    map.write(&entries.iter().map(|(key, value)| (*key, *value)).collect::<Vec<_>>())
}

fn remove<K: Pod, V>(map: &PinnedMap, entries: &BTreeMap<K, V>) -> Result<(), DataplaneError> {
    map.remove(&entries.keys().copied().collect::<Vec<_>>())
}

/// Puts elements of an array out of use.
fn clear<V: Pod + Default>(map: &PinnedMap, elements: &BTreeMap<u32, V>) -> Result<(), DataplaneError> {
    map.write(&elements.keys().map(|slot| (*slot, V::default())).collect::<Vec<_>>())
}
