//! Taking over the numbers that the kernel's maps hold, so that flows which refer to them stay valid.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use mesh_common::addr::Ip6;
use mesh_common::be::Be32;
use mesh_common::map::{AddrKey, PortKey, Service};

use super::super::contents::Contents;
use super::super::places::Places;
use super::super::plan::{AttachmentKey, BalancerPlan};
use super::{Given, Layout};

/// What a former agent gave out: backends by incarnation, peers by address, services by the VIPs and ports that lead to
/// them. All of it counts as given until it is claimed, or released.
#[derive(Debug, Default)]
pub(super) struct Adopted {
    backends: HashMap<AttachmentKey, u32>,
    peers: HashMap<IpAddr, u32>,
    vips4: HashMap<AddrKey<Be32>, u32>,
    vips6: HashMap<AddrKey<Ip6>, u32>,
    ports: HashMap<PortKey, u32>,
    /// The services' slots that nobody has claimed yet.
    services: HashSet<u32>,
    /// What lies in them.
    values: HashMap<u32, Service>,
    /// The ranges of places that nobody has claimed yet.
    ranges: HashSet<u32>,
    /// What they hold.
    places: Places,
    /// Slots of backends that are there twice.
    stray_backends: Vec<u32>,
    /// And of peers.
    stray_peers: Vec<u32>,
}

impl Layout {
    /// Takes over what the kernel's maps hold; `places` are those of the services among it. To be called once, before
    /// anything is laid out.
    pub fn adopt(&mut self, held: &Contents, places: Places) {
        let Self { given, adopted, .. } = self;
        for (slot, vtep) in &held.common.peers {
            if given.peers.reserve(*slot) {
                adopted.stray_peers.extend(adopted.peers.insert((*vtep).into(), *slot));
            }
        }
        let of4 = held.v4.backends.iter().map(|(slot, one)| (*slot, one.incarnation, one.vni));
        let of6 = held.v6.backends.iter().map(|(slot, one)| (*slot, one.incarnation, one.vni));
        for (slot, incarnation, vni) in of4.chain(of6) {
            // Most are in both families.
            if given.backends.reserve(slot) {
                let former = adopted.backends.insert(AttachmentKey { incarnation, vni }, slot);
                adopted.stray_backends.extend(former);
            }
        }
        adopted.adopt_services(given, held, places);
    }
}

impl Adopted {
    fn adopt_services(&mut self, given: &mut Given, held: &Contents, places: Places) {
        self.vips4 = held.v4.vips.iter().map(|(key, slot)| (*key, *slot)).collect();
        self.vips6 = held.v6.vips.iter().map(|(key, slot)| (*key, *slot)).collect();
        self.ports = held.common.ports.iter().map(|(key, port)| (*key, port.service)).collect();
        let named = self.vips4.values().chain(self.vips6.values()).chain(self.ports.values());
        let slots: HashSet<u32> = named.chain(held.common.services.keys()).copied().collect();
        self.services = slots.into_iter().filter(|slot| given.services.reserve(*slot)).collect();
        for (slot, service) in &held.common.services {
            self.values.insert(*slot, *service);
            if given.ranges.adopt(service.start, service.len.saturating_add(service.nodes)) {
                self.ranges.insert(service.start);
            }
        }
        self.places = places;
    }

    /// The slot of a backend, which is then claimed.
    pub(super) fn backend(&mut self, key: AttachmentKey) -> Option<u32> {
        self.backends.remove(&key)
    }

    /// The slot of a peer, likewise.
    pub(super) fn peer(&mut self, vtep: IpAddr) -> Option<u32> {
        self.peers.remove(&vtep)
    }

    /// The slot of a balancer in the network `vni`, likewise.
    pub(super) fn service(&mut self, vni: u32, plan: &BalancerPlan) -> Option<u32> {
        if self.services.is_empty() {
            return None;
        }
        let vip4 = plan.vip4.and_then(|addr| self.vips4.get(&AddrKey { vni, addr }));
        let vip6 = plan.vip6.and_then(|addr| self.vips6.get(&AddrKey { vni, addr }));
        let ports = plan.ports.keys().filter_map(|port| self.ports.get(port));
        let slot = vip4.into_iter().chain(vip6).chain(ports).find(|slot| self.services.contains(slot));
        let slot = *slot?;
        self.services.remove(&slot);
        Some(slot)
    }

    /// The range that the service in `slot` has, if it holds these `places`; it is then claimed.
    pub(super) fn range(&mut self, slot: u32, len: u32, nodes: u32, places: &[u32]) -> Option<u32> {
        let service = self.values.get(&slot)?;
        let same = (service.len, service.nodes) == (len, nodes) && self.places.get(service.start)? == places;
        (same && self.ranges.remove(&service.start)).then_some(service.start)
    }

    /// Lets go of what nobody has claimed.
    pub(super) fn release(&mut self, given: &mut Given) {
        let Self { backends, peers, services, ranges, stray_backends, stray_peers, .. } =
            std::mem::take(self);
        for slot in backends.into_values().chain(stray_backends) {
            given.backends.give_back(slot);
        }
        for slot in peers.into_values().chain(stray_peers) {
            given.peers.give_back(slot);
        }
        for slot in services {
            given.services.give_back(slot);
        }
        for start in ranges {
            given.ranges.free(start);
        }
    }
}
