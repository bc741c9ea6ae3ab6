//! From plans to the contents of the maps: numbers for what the maps index, tables for what balances.
//!
//! Families share numbers: a task has the same slot in both, a service too, and so they share its Maglev table.

mod adopt;
mod fragment;
#[cfg(test)]
pub(super) mod tests;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr};

use mesh_api::id::ServiceId;
use mesh_common::addr::Address;
use mesh_common::map::{BACKENDS_MAX, PEERS_MAX, PLACES_MAX, SERVICES_MAX, tag_of};

use self::adopt::Adopted;
use self::fragment::Laid;
use super::contents::{Changes, Common, Contents, Family};
use super::numbers::{Exhausted, Numbers, Ranges};
use super::places::Places;
use super::plan::{Fragment, LocalFamily, LocalPlan, PeerKey, Place, Plan};

/// A plan that doesn't fit the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the table has more {what} than the {max} that a node's dataplane holds")]
pub struct TooMany {
    /// Of what.
    pub what: &'static str,
    /// How many fit.
    pub max: u32,
}

/// A backend that gets nothing new, because its node doesn't answer, as flows name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Avoided {
    /// Its slot.
    pub slot: u32,
    /// Its incarnation.
    pub incarnation: u32,
}

/// The plan, with the numbers that are given out for it.
#[derive(Debug)]
pub struct Layout {
    given: Given,
    local: LocalPlan,
    fragments: BTreeMap<ServiceId, Laid>,
    adopted: Adopted,
}

/// What is given out.
#[derive(Debug)]
struct Given {
    /// This node's VTEP.
    own: IpAddr,
    services: Numbers,
    backends: Numbers,
    peers: Numbers,
    ranges: Ranges,
    /// The ways to other nodes, those that are about to go included.
    ways: BTreeMap<PeerKey, GivenPeer>,
    /// Those that came or went since a layout was written, and maybe back; and those that went before, but that a
    /// [displaced](Laid::is_displaced) fragment takes.
    moved: BTreeSet<PeerKey>,
    /// Tables that are not known to be in the kernel, until [`Layout::written`].
    unwritten: Places,
    retired: Retired,
}

/// A peer's slot, and its addresses: the first is where packets are sent.
#[derive(Debug)]
struct GivenPeer {
    slot: u32,
    addresses: Vec<IpAddr>,
    /// Whether the maps hold it.
    held: bool,
    /// Whether they are to.
    wanted: bool,
}

/// Which ways there are.
#[derive(Debug, Clone, Copy)]
enum Ways {
    /// Those that the maps hold.
    Held,
    /// Those that they are to hold.
    Wanted,
}

/// What the programs may still read until a layout without it is written.
#[derive(Debug, Default)]
struct Retired {
    services: Vec<u32>,
    backends: Vec<u32>,
    ranges: Vec<u32>,
}

impl Default for Layout {
    fn default() -> Self {
        let given = Given {
            own: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            services: Numbers::new(SERVICES_MAX),
            backends: Numbers::new(BACKENDS_MAX),
            peers: Numbers::new(PEERS_MAX),
            ranges: Ranges::new(PLACES_MAX),
            ways: BTreeMap::new(),
            moved: BTreeSet::new(),
            unwritten: Places::default(),
            retired: Retired::default(),
        };
        Self { given, local: LocalPlan::default(), fragments: BTreeMap::new(), adopted: Adopted::default() }
    }
}

#[cfg(test)]
impl Layout {
    /// One for maps of this many peers and places.
    pub(super) fn limited(peers_max: u32, places_max: u32) -> Self {
        let mut layout = Self::default();
        (layout.given.peers, layout.given.ranges) = (Numbers::new(peers_max), Ranges::new(places_max));
        layout
    }
}

impl Layout {
    /// Lays out a whole plan, and adds what that changes where `changes` are wanted. [`Layout::written`] is to be told once the maps hold it. What
    /// does not fit stays as it was, and is an error in the end; the rest is laid out all the same.
    pub fn set_all(&mut self, plan: Plan, mut changes: Option<&mut Changes>) -> Result<(), TooMany> {
        let Plan { vtep, peers, local, fragments } = plan;
        self.given.own = vtep;
        let result = self.set_peers(peers, changes.as_deref_mut());
        self.set_local(local, changes.as_deref_mut());
        let gone: Vec<_> = self.fragments.keys().filter(|id| !fragments.contains_key(id)).cloned().collect();
        let gone = gone.into_iter().map(|id| (id, Fragment::default()));
        result.and(self.set_fragments(gone.chain(fragments), changes))
    }

    /// Lays out what services contribute.
    pub fn set_fragments(
        &mut self,
        fragments: impl IntoIterator<Item = (ServiceId, Fragment)>,
        changes: Option<&mut Changes>,
    ) -> Result<(), TooMany> {
        let mut result = Ok(());
        let mut relaid = Vec::new();
        for (id, plan) in fragments {
            let former = match self.lay_out(&id, plan) {
                Ok(None) => continue,
                Ok(former) => former,
                // It stays as it was, but for the ways it takes.
                Err(error) => {
                    result = result.and(Err(error));
                    None
                }
            };
            if changes.is_some() {
                relaid.push((id, former));
            }
        }
        // All that stays is in memory by now, so that what comes and goes leaves no gaps in it.
        let Some(changes) = changes else { return result };
        for (id, former) in relaid {
            let (mut held, mut wanted) = (Contents::default(), Contents::default());
            let laid = self.fragments.get(&id);
            if let Some(former) = former.as_ref().or(laid) {
                former.emit(&self.given, Ways::Held, &mut held);
            }
            if let Some(laid) = laid {
                laid.emit(&self.given, Ways::Wanted, &mut wanted);
            }
            changes.add(Changes::between(held, wanted));
        }
        result
    }

    /// Lays out what one service contributes, and returns what it did before; `None` if it is the same.
    fn lay_out(&mut self, id: &ServiceId, plan: Fragment) -> Result<Option<Laid>, TooMany> {
        let former = self.fragments.get(id);
        let is_laid = |former: &Laid| *former.plan() == plan && !former.is_displaced();
        if former.map_or(plan.is_empty(), is_laid) {
            return Ok(None);
        }
        let laid = Laid::new(plan, former, &mut self.given, &mut self.adopted)?;
        let former = if laid.plan().is_empty() {
            self.fragments.remove(id)
        } else {
            self.fragments.insert(id.clone(), laid)
        };
        Ok(Some(former.unwrap_or_default()))
    }

    /// What one service contributes, as it was laid out last.
    pub fn fragment(&self, id: &ServiceId) -> Option<&Fragment> {
        self.fragments.get(id).map(Laid::plan)
    }

    /// The services that are to be laid out again, even if their plans are the same, because of ways that came or went.
    pub fn displaced(&self) -> impl Iterator<Item = &ServiceId> {
        self.fragments.iter().filter(|(_, laid)| laid.is_displaced()).map(|(id, _)| id)
    }

    /// The backends that get nothing new, because their nodes don't answer.
    pub fn avoided(&self) -> HashSet<Avoided> {
        self.fragments.values().flat_map(Laid::avoided).collect()
    }

    /// Lays out what is this node's own.
    pub fn set_local(&mut self, plan: LocalPlan, changes: Option<&mut Changes>) {
        if let Some(changes) = changes {
            let (mut held, mut wanted) = (Contents::default(), Contents::default());
            emit_local(&self.local, &mut held);
            emit_local(&plan, &mut wanted);
            changes.add(Changes::between(held, wanted));
        }
        self.local = plan;
    }

    /// Lays out the ways to other nodes. The services that are [displaced](Self::displaced) by that are to be laid out next.
    pub fn set_peers(
        &mut self,
        peers: BTreeMap<PeerKey, Vec<IpAddr>>,
        changes: Option<&mut Changes>,
    ) -> Result<(), TooMany> {
        let held = self.given.peer_contents();
        let given = &mut self.given;
        let mut result = Ok(());
        let mut moved = BTreeSet::new();
        for (key, known) in &mut given.ways {
            if known.wanted && !peers.contains_key(key) {
                known.wanted = false;
                moved.insert(*key);
            }
        }
        for (key, addresses) in peers {
            if let Some(known) = given.ways.get_mut(&key) {
                if !known.wanted {
                    moved.insert(key);
                }
                (known.addresses, known.wanted) = (addresses, true);
                continue;
            }
            let adopted = addresses.iter().find_map(|address| self.adopted.peer(*address));
            match adopted.map_or_else(|| given.peers.take(), Ok) {
                Ok(slot) => {
                    given.ways.insert(key, GivenPeer { slot, addresses, held: false, wanted: true });
                    moved.insert(key);
                }
                Err(Exhausted) => result = Err(too_many("nodes", PEERS_MAX)),
            }
        }
        if !moved.is_empty() {
            for laid in self.fragments.values_mut() {
                laid.displace(&moved, given);
            }
            given.moved.append(&mut moved);
        }
        if let Some(changes) = changes {
            changes.add(Changes::between(held, self.given.peer_contents()));
        }
        result
    }

    /// Everything that the maps are to hold, but for the places.
    pub fn contents(&self) -> Contents {
        let mut contents = self.given.peer_contents();
        emit_local(&self.local, &mut contents);
        for laid in self.fragments.values() {
            laid.emit(&self.given, Ways::Wanted, &mut contents);
        }
        contents
    }

    /// What is to be put to `shoal_places`.
    pub fn places(&self) -> &Places {
        &self.given.unwritten
    }

    /// The maps hold the layout: no program finds any more what is not in it.
    pub fn written(&mut self) {
        self.adopted.release(&mut self.given);
        self.given.unwritten = Places::default();
        let retired = std::mem::take(&mut self.given.retired);
        self.given.give_back(retired);
        if !self.given.moved.is_empty() {
            let displaced = self.fragments.values().filter(|laid| laid.is_displaced());
            let taken = displaced.flat_map(|laid| laid.ways(&self.given)).collect();
            self.given.settle_ways(&taken);
        }
    }
}

impl Given {
    /// The way to a place.
    fn peer_of(&self, place: Place, encrypted: bool) -> PeerKey {
        let vtep = match place {
            Place::Here { .. } => self.own,
            Place::There(vtep) => vtep,
        };
        PeerKey { vtep, encrypted }
    }

    /// How the maps name it; `None` without such a way.
    fn way_to(&self, place: Place, encrypted: bool, ways: Ways) -> Option<u32> {
        self.slot_of(self.peer_of(place, encrypted), ways)
    }

    /// How the maps name the way to a node: this one by 0, another by its slot as a peer.
    fn slot_of(&self, peer: PeerKey, ways: Ways) -> Option<u32> {
        if peer.vtep == self.own {
            return Some(0);
        }
        let given = self.ways.get(&peer).filter(|given| match ways {
            Ways::Held => given.held,
            Ways::Wanted => given.wanted,
        });
        given.map(|given| given.slot)
    }

    /// The peers, but for those that are about to go.
    fn peer_contents(&self) -> Contents {
        let mut common = Common::default();
        for GivenPeer { slot, addresses, .. } in self.ways.values().filter(|given| given.wanted) {
            for address in addresses {
                let vtep = (*address).into();
                common.members.insert(vtep, *slot);
                common.tags.insert(tag_of(vtep), *slot);
            }
            common.peers.extend(addresses.first().map(|address| (*slot, (*address).into())));
        }
        Contents { common, ..Contents::default() }
    }

    /// The maps hold the ways that they are to hold. Fragments for whose next tables there was no room take the ways
    /// `taken`: the slots of those that went stay given, since the tables that are there may name them.
    fn settle_ways(&mut self, taken: &BTreeSet<PeerKey>) {
        for key in std::mem::take(&mut self.moved) {
            match self.ways.get_mut(&key) {
                Some(given) if given.wanted => given.held = true,
                Some(given) if taken.contains(&key) => {
                    given.held = false;
                    self.moved.insert(key);
                }
                Some(GivenPeer { slot, .. }) => {
                    self.peers.give_back(*slot);
                    self.ways.remove(&key);
                }
                None => {}
            }
        }
    }

    /// Puts a table to a free range of places.
    fn place(&mut self, table: &[u32]) -> Result<u32, TooMany> {
        let start = self.ranges.allocate(table.len() as u32);
        let start = start.map_err(|Exhausted| too_many("places in Maglev tables", PLACES_MAX))?;
        self.unwritten.insert(start, table);
        Ok(start)
    }

    /// Lets go of what a layout lacks, once the programs have.
    fn retire(&mut self, retired: Retired) {
        let Retired { services, backends, ranges } = retired;
        for start in &ranges {
            self.unwritten.remove(*start);
        }
        self.retired.services.extend(services);
        self.retired.backends.extend(backends);
        self.retired.ranges.extend(ranges);
    }

    fn give_back(&mut self, retired: Retired) {
        let Retired { services, backends, ranges } = retired;
        for slot in services {
            self.services.give_back(slot);
        }
        for slot in backends {
            self.backends.give_back(slot);
        }
        for start in ranges {
            self.unwritten.remove(start);
            self.ranges.free(start);
        }
    }
}

fn emit_local(plan: &LocalPlan, contents: &mut Contents) {
    fn emit<A: Address>(plan: &LocalFamily<A>, family: &mut Family<A>) {
        let LocalFamily { addresses, ifaces, aliases } = plan;
        family.locals.extend(addresses.iter().map(|addr| (*addr, 1)));
        family.ifaces.extend(ifaces);
        family.aliases.extend(aliases);
    }
    emit(&plan.v4, &mut contents.v4);
    emit(&plan.v6, &mut contents.v6);
}

fn too_many(what: &'static str, max: u32) -> TooMany {
    TooMany { what, max }
}
