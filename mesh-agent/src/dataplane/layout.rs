//! From a plan to the contents of the maps: numbers for what the maps index, tables for what balances.

use std::collections::{BTreeMap, HashMap};

use mesh_common::be::Be32;
use mesh_common::map::{
    AddrKey, Alias, BACKEND_DRAINING, BACKENDS_MAX, Backend, Endpoint, Iface, MAGLEV_MAX, PEERS_MAX, Port,
    PortKey, SERVICES_MAX, Service,
};

use super::maglev::{self, Candidate};
use super::plan::{BackendKey, BalancerKey, Place, Plan};
use super::slots::{Exhausted, Ranges, Slots};

/// What the maps are to hold.
#[derive(Debug, Default)]
pub struct Contents {
    /// `shoal_locals`.
    pub locals: BTreeMap<Be32, u32>,
    /// `shoal_members`.
    pub members: BTreeMap<Be32, u32>,
    /// `shoal_peers`, by slot: the VTEPs.
    pub peers: BTreeMap<u32, Be32>,
    /// `shoal_backends`.
    pub backends: BTreeMap<u32, Backend>,
    /// What is to be written to `shoal_maglev`: places from the given one on.
    pub maglev: Vec<(u32, Vec<u32>)>,
    /// `shoal_services`.
    pub services: BTreeMap<u32, Service>,
    /// `shoal_ports`.
    pub ports: BTreeMap<PortKey, Port>,
    /// `shoal_vips`.
    pub vips: BTreeMap<AddrKey, u32>,
    /// `shoal_endpts`.
    pub endpoints: BTreeMap<AddrKey, Endpoint>,
    /// `shoal_ifaces`.
    pub ifaces: BTreeMap<u32, Iface>,
    /// `shoal_aliases`.
    pub aliases: BTreeMap<Be32, Alias>,
}

/// A plan that doesn't fit the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the table has more {what} than the {max} that a node's dataplane holds")]
pub struct TooMany {
    /// Of what.
    pub what: &'static str,
    /// How many fit.
    pub max: u32,
}

/// The numbers that are given out.
#[derive(Debug)]
pub struct Layout {
    services: Slots<BalancerKey>,
    backends: Slots<BackendKey>,
    peers: Slots<Be32>,
    ranges: Ranges,
    tables: HashMap<BalancerKey, PlacedTable>,
    /// Ranges that the programs may still read until a layout without them is written.
    retired: Vec<u32>,
    /// Tables that no layout has been written with: they are in every layout until one is.
    unwritten: Vec<(u32, Vec<u32>)>,
    /// Ranges that a former agent's tables lie in.
    adopted: Vec<u32>,
}

/// A Maglev table and where it lies.
#[derive(Debug)]
struct PlacedTable {
    start: u32,
    candidates: Vec<Candidate>,
    len: u32,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            services: Slots::new(SERVICES_MAX),
            backends: Slots::new(BACKENDS_MAX),
            peers: Slots::new(PEERS_MAX),
            ranges: Ranges::new(MAGLEV_MAX),
            tables: HashMap::new(),
            retired: Vec::new(),
            unwritten: Vec::new(),
            adopted: Vec::new(),
        }
    }
}

impl Layout {
    /// Takes over the numbers that the kernel's maps hold, so that flows which refer to them stay valid: backends by
    /// incarnation, peers by address, services by the VIPs and ports that lead to them under `plan`.
    pub fn adopt(&mut self, held: &Contents, plan: &Plan) {
        for (&slot, &vtep) in &held.peers {
            self.peers.adopt(vtep, slot);
        }
        for (&slot, backend) in &held.backends {
            self.backends.adopt(BackendKey { incarnation: backend.incarnation, vni: backend.vni }, slot);
        }
        for (key, balancer) in &plan.vips {
            if let Some(&slot) = held.vips.get(key) {
                self.services.adopt(balancer.clone(), slot);
            }
        }
        for (key, (balancer, _)) in &plan.ports {
            if let Some(port) = held.ports.get(key) {
                self.services.adopt(balancer.clone(), port.service);
            }
        }
        for service in held.services.values() {
            self.ranges.adopt(service.maglev_start, service.maglev_len);
            self.adopted.push(service.maglev_start);
        }
    }

    /// The contents of the maps for `plan`. [`Layout::written`] is to be told once the maps hold them.
    pub fn lay_out(&mut self, plan: &Plan) -> Result<Contents, TooMany> {
        // The tables of a former agent are in use until this layout is written.
        self.retired.append(&mut self.adopted);
        self.forget(plan);
        let mut contents = Contents {
            locals: plan.locals.iter().map(|addr| (*addr, 1)).collect(),
            ifaces: plan.ifaces.clone(),
            aliases: plan.aliases.clone(),
            ..Contents::default()
        };
        for vtep in &plan.peers {
            let slot = self.peers.assign(vtep).map_err(|Exhausted| too_many("nodes", PEERS_MAX))?;
            contents.members.insert(*vtep, slot);
            contents.peers.insert(slot, *vtep);
        }
        self.lay_out_backends(plan, &mut contents)?;
        for (balancer, backends) in &plan.balancers {
            let candidates = backends.iter().filter_map(|key| self.candidate(*key)).collect();
            self.lay_out_balancer(balancer, candidates, &mut contents)?;
        }
        for (key, (balancer, target)) in &plan.ports {
            if let Some(service) = self.services.get(balancer) {
                contents.ports.insert(*key, Port { service, target: *target, reserved: 0 });
            }
        }
        for (key, balancer) in &plan.vips {
            contents.vips.extend(self.services.get(balancer).map(|service| (*key, service)));
        }
        self.lay_out_endpoints(plan, &mut contents);
        contents.maglev.clone_from(&self.unwritten);
        Ok(contents)
    }

    /// The maps hold the last layout: no program finds the ranges that it left out any more.
    pub fn written(&mut self) {
        self.unwritten.clear();
        for start in std::mem::take(&mut self.retired) {
            self.ranges.free(start);
        }
    }

    /// Frees the numbers of what the plan doesn't have.
    fn forget(&mut self, plan: &Plan) {
        self.services.retain(|key| plan.balancers.contains_key(key));
        self.backends.retain(|key| plan.backends.contains_key(key));
        self.peers.retain(|vtep| plan.peers.contains(vtep));
        let (retired, unwritten) = (&mut self.retired, &mut self.unwritten);
        self.tables.retain(|key, table| {
            let kept = plan.balancers.contains_key(key);
            if !kept {
                retired.push(table.start);
                unwritten.retain(|(start, _)| *start != table.start);
            }
            kept
        });
    }

    fn candidate(&self, key: BackendKey) -> Option<Candidate> {
        Some(Candidate { incarnation: key.incarnation, slot: self.backends.get(&key)? })
    }

    fn lay_out_backends(&mut self, plan: &Plan, contents: &mut Contents) -> Result<(), TooMany> {
        for (key, backend) in &plan.backends {
            let slot = self.backends.assign(key).map_err(|Exhausted| too_many("tasks", BACKENDS_MAX))?;
            let (peer, ifindex) = match backend.place {
                Place::Here { ifindex } => (0, ifindex),
                // A backend on a node that the table no longer has gets nothing until it is gone as well.
                Place::There(vtep) => match self.peers.get(&vtep) {
                    Some(peer) => (peer, 0),
                    None => continue,
                },
            };
            let flags = if backend.draining { BACKEND_DRAINING } else { 0 };
            let BackendKey { incarnation, vni } = *key;
            contents
                .backends
                .insert(slot, Backend { addr: backend.addr, vni, peer, ifindex, incarnation, flags });
        }
        Ok(())
    }

    fn lay_out_balancer(
        &mut self,
        key: &BalancerKey,
        candidates: Vec<Candidate>,
        contents: &mut Contents,
    ) -> Result<(), TooMany> {
        let slot = self.services.assign(key).map_err(|Exhausted| too_many("services", SERVICES_MAX))?;
        let unchanged = self.tables.get(key).is_some_and(|table| table.candidates == candidates);
        if !unchanged {
            if let Some(former) = self.tables.remove(key) {
                self.retired.push(former.start);
                self.unwritten.retain(|(start, _)| *start != former.start);
            }
            let table = maglev::build(&candidates);
            let len = table.len() as u32;
            if len > 0 {
                let start = self.ranges.allocate(len);
                let start = start.map_err(|Exhausted| too_many("places in Maglev tables", MAGLEV_MAX))?;
                self.unwritten.push((start, table));
                self.tables.insert(key.clone(), PlacedTable { start, candidates, len });
            }
        }
        let (maglev_start, maglev_len) =
            self.tables.get(key).map_or((0, 0), |table| (table.start, table.len));
        contents.services.insert(slot, Service { maglev_start, maglev_len, vni: key.vni, reserved: 0 });
        Ok(())
    }

    fn lay_out_endpoints(&self, plan: &Plan, contents: &mut Contents) {
        for (key, endpoint) in &plan.endpoints {
            let (peer, vtep, ifindex) = match endpoint.place {
                Place::Here { ifindex } => (0, Be32::default(), ifindex),
                Place::There(vtep) => match self.peers.get(&vtep) {
                    Some(peer) => (peer, vtep, 0),
                    None => continue,
                },
            };
            let incarnation = endpoint.incarnation;
            let backend = self.backends.get(&BackendKey { incarnation, vni: key.vni }).unwrap_or(0);
            let service = self.services.get(&endpoint.balancer).unwrap_or(0);
            contents.endpoints.insert(*key, Endpoint { peer, vtep, ifindex, incarnation, service, backend });
        }
    }
}

fn too_many(what: &'static str, max: u32) -> TooMany {
    TooMany { what, max }
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::{local, table};
    use super::super::plan::{Plan, plan};
    use super::*;

    /// What the kernel holds after `contents` were written to empty maps.
    fn held(contents: &Contents) -> Contents {
        Contents {
            locals: contents.locals.clone(),
            members: contents.members.clone(),
            peers: contents.peers.clone(),
            backends: contents.backends.clone(),
            maglev: Vec::new(),
            services: contents.services.clone(),
            ports: contents.ports.clone(),
            vips: contents.vips.clone(),
            endpoints: contents.endpoints.clone(),
            ifaces: contents.ifaces.clone(),
            aliases: contents.aliases.clone(),
        }
    }

    fn table_of<'c>(contents: &'c Contents, service: &Service) -> Option<&'c Vec<u32>> {
        let found = contents.maglev.iter().find(|(start, _)| *start == service.maglev_start);
        found.map(|(_, table)| table)
    }

    fn disjoint(a: Service, b: Service) -> bool {
        a.maglev_start >= b.maglev_start + b.maglev_len || b.maglev_start >= a.maglev_start + a.maglev_len
    }

    #[test]
    fn everything_refers_to_something_that_is_there() {
        let contents = Layout::default().lay_out(&plan(&table(), &local())).unwrap();
        for port in contents.ports.values() {
            let service = &contents.services[&port.service];
            let places = table_of(&contents, service).unwrap();
            assert_eq!(places.len(), service.maglev_len as usize);
            assert!(places.iter().all(|slot| contents.backends[slot].vni == service.vni));
        }
        for (key, endpoint) in &contents.endpoints {
            assert_eq!(contents.backends[&endpoint.backend].addr, key.addr);
            assert!(contents.services.contains_key(&endpoint.service));
            assert_eq!(endpoint.peer == 0, endpoint.ifindex != 0);
        }
        assert!(contents.members.values().all(|slot| contents.peers.contains_key(slot)));
    }

    #[test]
    fn the_same_plan_again_writes_no_table() {
        let plan = plan(&table(), &local());
        let mut layout = Layout::default();
        let first = layout.lay_out(&plan).unwrap();
        layout.written();
        let second = layout.lay_out(&plan).unwrap();
        assert!(second.maglev.is_empty());
        assert_eq!(first.services, second.services);
    }

    #[test]
    fn tables_of_a_layout_that_was_not_written_are_in_the_next_one() {
        let mut table = table();
        let mut layout = Layout::default();
        let in_use = layout.lay_out(&plan(&table, &local())).unwrap();
        layout.written();
        table.tasks.remove(&"t3".into());
        let failed = layout.lay_out(&plan(&table, &local())).unwrap();
        assert!(!failed.maglev.is_empty());
        let again = layout.lay_out(&plan(&table, &local())).unwrap();
        assert_eq!(again.maglev, failed.maglev);
        // What the programs still read is not given to others meanwhile, however often it fails.
        for number in [1, 2] {
            table.tasks.remove(&format!("t{number}").as_str().into());
            let next = layout.lay_out(&plan(&table, &local())).unwrap();
            for (start, places) in &next.maglev {
                let new =
                    Service { maglev_start: *start, maglev_len: places.len() as u32, ..Service::default() };
                assert!(in_use.services.values().all(|old| disjoint(new, *old)));
            }
            let named = next.services.values().filter(|service| service.maglev_len > 0);
            assert!(
                named
                    .filter(|new| !in_use.services.values().any(|old| old == *new))
                    .all(|new| table_of(&next, new).is_some())
            );
        }
    }

    #[test]
    fn a_changed_table_lies_elsewhere_than_the_one_in_use() {
        let mut table = table();
        let mut layout = Layout::default();
        let before = layout.lay_out(&plan(&table, &local())).unwrap();
        layout.written();
        table.tasks.remove(&"t3".into());
        let after = layout.lay_out(&plan(&table, &local())).unwrap();
        for (slot, service) in &after.services {
            let old = before.services[slot];
            assert!(service == &old || disjoint(*service, old), "{service:?} {old:?}");
        }
    }

    #[test]
    fn a_new_agent_keeps_the_numbers_of_the_one_before() {
        let mut table = table();
        let mut first = Layout::default();
        first.lay_out(&plan(&table, &local())).unwrap();
        // A hole in the numbers, which a layout from scratch would not leave.
        table.tasks.remove(&"t1".into());
        let local = crate::dataplane::Local { endpoints: vec![], ..local() };
        let before = first.lay_out(&plan(&table, &local)).unwrap();

        let plan: Plan = plan(&table, &local);
        let mut second = Layout::default();
        second.adopt(&held(&before), &plan);
        let after = second.lay_out(&plan).unwrap();
        assert_eq!(after.backends, before.backends);
        assert_eq!(after.peers, before.peers);
        assert_eq!(after.ports, before.ports);
        assert_eq!(after.vips, before.vips);
        assert_eq!(after.endpoints, before.endpoints);
        assert!(after.services.values().all(|new| before.services.values().all(|old| disjoint(*new, *old))));
    }
}
