//! That layouts refer only to what is there, keep numbers, and never rewrite what programs read.

use std::net::Ipv4Addr;

use mesh_api::table::{Table, TaskState};
use mesh_api::wireguard::WireguardIdentity;
use mesh_common::addr::Ip6;
use mesh_common::be::Be32;
use mesh_common::map::{AddrKey, BACKEND_ENCRYPTED, SERVICE_ENCRYPTED, Service, TaskKey};

use super::super::plan::tests::{local, node, table, task};
use super::super::plan::{Local, LocalEndpoint, plan};
use super::*;

/// The kernel's maps, as layouts leave them.
#[derive(Clone, Default)]
struct Kernel {
    contents: Contents,
    places: Vec<u32>,
}

impl Kernel {
    /// Lays out and writes a table, and checks that what is written while programs run does not touch what they read.
    fn apply(&mut self, layout: &mut Layout, table: &Table, local: &Local) -> Changes {
        let mut changes = Changes::default();
        layout.set_all(plan(table, local), Some(&mut changes)).unwrap();
        for (start, places) in layout.places().iter() {
            let new = Service { start, len: places.len() as u32, ..Service::default() };
            assert!(self.contents.common.services.values().all(|old| disjoint(new, *old)));
        }
        self.write(layout, &changes);
        layout.written();
        assert_eq!(self.contents, layout.contents());
        self.assert_sound();
        changes
    }

    fn write(&mut self, layout: &Layout, changes: &Changes) {
        self.contents.follow(changes);
        for (start, places) in layout.places().iter() {
            let end = start as usize + places.len();
            self.places.resize(self.places.len().max(end), 0);
            self.places[start as usize..end].copy_from_slice(places);
        }
    }

    /// Whether everything refers to something that is there.
    fn assert_sound(&self) {
        let Contents { v4, v6, common } = &self.contents;
        for service in common.services.values() {
            let (table, nodes) = self.places(service);
            assert!(table.iter().all(|slot| v4.backends[slot].vni == service.vni));
            assert!(nodes.iter().all(|slot| *slot == 0 || common.peers.contains_key(slot)));
        }
        for port in common.ports.values() {
            assert!(common.services.contains_key(&port.service));
        }
        for (key, slots) in &v4.tasks {
            let backend = v4.backends[&slots.backend];
            assert_eq!((backend.incarnation, backend.vni), (key.incarnation, key.vni));
            assert!(slots.service == 0 || common.services[&slots.service].vni == key.vni);
            assert!(v4.endpoints.contains_key(&AddrKey { vni: key.vni, addr: backend.addr }));
        }
        for (key, slots) in &v6.tasks {
            assert_eq!(v4.tasks[key], *slots, "a task has the same numbers in both families");
            assert!(v6.backends.contains_key(&slots.backend));
        }
        for endpoint in v4.endpoints.values() {
            assert_eq!(endpoint.peer == 0, endpoint.ifindex != 0);
            assert!(endpoint.peer == 0 || common.peers.contains_key(&endpoint.peer));
        }
    }

    /// A service's Maglev table, and its nodes.
    fn places(&self, service: &Service) -> (&[u32], &[u32]) {
        let all = &self.places[service.start as usize..][..(service.len + service.nodes) as usize];
        all.split_at(service.len as usize)
    }

    fn back(&self) -> Service {
        let vip = AddrKey { vni: 4097, addr: Be32::ipv4(10, 0, 1, 2) };
        self.contents.common.services[&self.contents.v4.vips[&vip]]
    }

    /// What an agent reads of it at its start.
    fn adopted(&self) -> Layout {
        let mut layout = Layout::default();
        let services = self.contents.common.services.values();
        let range =
            |service: &Service| (service.start, [self.places(service).0, self.places(service).1].concat());
        layout.adopt(&self.contents, services.map(range).collect());
        layout
    }
}

fn disjoint(a: Service, b: Service) -> bool {
    let end = |service: Service| service.start + service.len + service.nodes;
    a.start >= end(b) || b.start >= end(a) || b.len + b.nodes == 0
}

#[test]
fn both_families_lead_to_one_service_and_its_one_table() {
    let mut kernel = Kernel::default();
    kernel.apply(&mut Layout::default(), &table(), &local());
    let Contents { v4, v6, common } = &kernel.contents;
    let ports: Vec<u32> = common.ports.values().map(|port| port.service).collect();
    assert_eq!(ports.len(), 4, "two ports, in two families each");
    let slots = |vips: Vec<&u32>| vips.into_iter().copied().collect::<Vec<_>>();
    assert!(slots(v4.vips.values().collect()).contains(v6.vips.values().next().unwrap()));
    assert_eq!((v4.backends.len(), v6.backends.len()), (6, 3));
    assert_eq!((v4.endpoints.len(), v6.endpoints.len()), (6, 3));
    assert_eq!(common.tags.values().collect::<Vec<_>>(), common.members.values().collect::<Vec<_>>());
}

#[test]
fn a_services_nodes_stand_behind_its_table_in_the_order_of_their_addresses() {
    let mut table = table();
    table.nodes.insert("n0".into(), node("n0", 9));
    table.nodes.insert("n4".into(), node("n4", 200));
    for (number, node) in [(4, "n0"), (5, "n4")] {
        let task = task(number, node, TaskState::Running);
        table.tasks.insert(task.id.clone(), task);
    }
    // One that drains is asked for its flows all the same.
    table.tasks.get_mut(&"t5".into()).unwrap().desired = TaskState::Shutdown;
    let mut kernel = Kernel::default();
    kernel.apply(&mut Layout::default(), &table, &local());
    let vtep = |slot: &u32| {
        let own = IpAddr::from(Ipv4Addr::new(198, 18, 0, 11));
        if *slot == 0 { own } else { kernel.contents.common.peers[slot].into() }
    };
    let service = kernel.back();
    let vteps: Vec<_> = kernel.places(&service).1.iter().map(vtep).collect();
    assert_eq!(vteps, [9, 11, 12, 200].map(|last| IpAddr::from(Ipv4Addr::new(198, 18, 0, last))));
}

#[test]
fn a_service_whose_tasks_all_drain_still_names_their_nodes() {
    let mut table = table();
    table.tasks.values_mut().for_each(|task| task.desired = TaskState::Shutdown);
    let mut kernel = Kernel::default();
    kernel.apply(&mut Layout::default(), &table, &local());
    assert_eq!((kernel.back().len, kernel.back().nodes), (0, 2));
}

#[test]
fn a_removed_service_leaves_its_tasks_their_backends() {
    let mut table = table();
    let (mut kernel, mut layout) = (Kernel::default(), Layout::default());
    kernel.apply(&mut layout, &table, &local());
    let before = kernel.contents.v4.tasks.clone();
    table.services.clear();
    table.tasks.values_mut().for_each(|task| task.desired = TaskState::Remove);
    kernel.apply(&mut layout, &table, &local());
    assert!(kernel.contents.common.ports.is_empty() && kernel.contents.common.services.is_empty());
    for (key, slots) in &kernel.contents.v4.tasks {
        assert_eq!((slots.backend, slots.service), (before[key].backend, 0));
    }
    assert_eq!(kernel.contents.v4.tasks.len(), before.len());
    assert!(kernel.contents.v4.tasks.contains_key(&TaskKey { incarnation: 2, vni: 4097 }));
}

#[test]
fn the_same_plan_again_changes_nothing() {
    let (mut kernel, mut layout) = (Kernel::default(), Layout::default());
    kernel.apply(&mut layout, &table(), &local());
    assert_eq!(kernel.apply(&mut layout, &table(), &local()), Changes::default());
    assert!(layout.places().is_empty());
}

#[test]
fn a_change_of_one_service_writes_what_is_its_own() {
    let mut table = table();
    let mut other = table.services[&"web".into()].clone();
    (other.id, other.ports) = ("other".into(), vec![]);
    other
        .vips
        .iter_mut()
        .for_each(|vip| vip.addr = vip.addr.map(|addr| Ipv4Addr::from_bits(addr.to_bits() + 1)));
    table.services.insert(other.id.clone(), other);
    let (mut kernel, mut layout) = (Kernel::default(), Layout::default());
    kernel.apply(&mut layout, &table, &local());
    table.tasks.remove(&"t3".into());
    let Changes { set, removed } = kernel.apply(&mut layout, &table, &local());
    assert_eq!((set.common.services.len(), set.v4, set.v6), (2, Family::default(), Family::default()));
    assert_eq!([&removed.v4.tasks, &removed.v6.tasks].map(BTreeMap::len), [2, 1]);
    assert_eq!(removed.common, Common::default());
}

#[test]
fn tables_of_a_layout_that_was_not_written_are_written_with_the_next_one() {
    let mut table = table();
    let (mut kernel, mut layout) = (Kernel::default(), Layout::default());
    kernel.apply(&mut layout, &table, &local());
    // However often it fails, what the programs read is not given to others meanwhile.
    for number in [3, 2] {
        table.tasks.remove(&format!("t{number}").as_str().into());
        layout.set_all(plan(&table, &local()), None).unwrap();
        for (start, places) in layout.places().iter() {
            let new = Service { start, len: places.len() as u32, ..Service::default() };
            assert!(kernel.contents.common.services.values().all(|old| disjoint(new, *old)));
        }
    }
    let changes = Changes::between(kernel.contents.clone(), layout.contents());
    kernel.write(&layout, &changes);
    layout.written();
    kernel.assert_sound();
    let service = kernel.back();
    let slot = kernel.contents.v4.tasks[&TaskKey { incarnation: 1, vni: 4097 }].backend;
    assert!(kernel.places(&service).0.iter().all(|place| *place == slot));
}

#[test]
fn numbers_that_came_free_wait_until_that_is_written() {
    let mut table = table();
    let (mut kernel, mut layout) = (Kernel::default(), Layout::default());
    for number in 1..200_u32 {
        let former = table.tasks.pop_first().unwrap().1;
        let next = task(number % 100 + 100, "n2", TaskState::Running);
        table
            .tasks
            .insert(next.id.clone(), mesh_api::table::TaskRecord { incarnation: 1000 + number, ..next });
        let held = kernel.contents.v4.backends.clone();
        kernel.apply(&mut layout, &table, &local());
        let taken = kernel.contents.v4.backends.iter().find(|(_, one)| one.incarnation == 1000 + number);
        assert!(!held.contains_key(taken.unwrap().0), "{former:?}");
    }
}

#[test]
fn a_new_agent_keeps_numbers_and_tables_of_the_one_before() {
    let mut table = table();
    let (mut kernel, mut layout) = (Kernel::default(), Layout::default());
    kernel.apply(&mut layout, &table, &local());
    // A hole in the numbers, which a layout from scratch would not leave.
    table.tasks.remove(&"t1".into());
    let local = Local { endpoints: vec![], ..local() };
    kernel.apply(&mut layout, &table, &local);

    let mut second = kernel.adopted();
    second.set_all(plan(&table, &local), None).unwrap();
    assert_eq!(second.contents(), kernel.contents);
    assert!(second.places().is_empty(), "the tables are the same");
}

#[test]
fn a_new_agent_writes_a_damaged_table_beside_it() {
    let (mut kernel, mut layout) = (Kernel::default(), Layout::default());
    kernel.apply(&mut layout, &table(), &local());
    let damaged = kernel.back();
    kernel.places[damaged.start as usize + 3] = 77;
    let mut second = kernel.adopted();
    second.set_all(plan(&table(), &local()), None).unwrap();
    assert_eq!(second.places().len(), 1);
    let changes = Changes::between(kernel.contents.clone(), second.contents());
    assert_eq!(changes.set.common.services.len(), 1);
    kernel.write(&second, &changes);
    second.written();
    kernel.assert_sound();
    assert_ne!(kernel.back().start, damaged.start);
    // The damaged range is free again.
    assert!(second.given.ranges.adopt(damaged.start, damaged.len + damaged.nodes));
}

#[test]
fn what_nobody_claims_of_a_former_agents_numbers_is_free_again() {
    let (mut kernel, mut layout) = (Kernel::default(), Layout::default());
    kernel.apply(&mut layout, &table(), &local());
    let mut second = kernel.adopted();
    let nothing = Table::new(table().cluster);
    second.set_all(plan(&nothing, &local()), None).unwrap();
    second.written();
    for slot in kernel.contents.v4.backends.keys() {
        assert!(second.given.backends.reserve(*slot));
    }
    for (slot, service) in &kernel.contents.common.services {
        assert!(second.given.services.reserve(*slot));
        assert!(second.given.ranges.adopt(service.start, service.len + service.nodes));
    }
    assert!(kernel.contents.common.peers.keys().all(|slot| second.given.peers.reserve(*slot)));
}

#[test]
fn what_fits_is_laid_out_and_the_rest_once_there_is_room() {
    let (mut kernel, mut layout) = (Kernel::default(), Layout::default());
    layout.given.backends = Numbers::new(7);
    kernel.apply(&mut layout, &table(), &local());
    let mut table = table();
    let mut other = task(4, "n2", TaskState::Running);
    other.service = "another".into();
    table.tasks.insert(other.id.clone(), other);
    let mut changes = Changes::default();
    assert!(layout.set_all(plan(&table, &local()), Some(&mut changes)).is_err());
    assert_eq!(changes, Changes::default());
    // Its slots wait to be given up.
    table.tasks.remove(&"t3".into());
    assert!(layout.set_all(plan(&table, &local()), Some(&mut changes)).is_err());
    kernel.write(&layout, &changes);
    layout.written();
    kernel.apply(&mut layout, &table, &local());
    assert!(kernel.contents.v4.tasks.contains_key(&TaskKey { incarnation: 4, vni: 4097 }));
}

/// An identity, by the first byte of its key.
fn identity(byte: u8) -> WireguardIdentity {
    WireguardIdentity { public_key: [byte; 32].into(), port: 51820 }
}

/// The table where `back` is encrypted, and n2 has these identities.
fn encrypted(identities: &[u8]) -> Table {
    let mut table = table();
    table.networks.get_mut(&"back".into()).unwrap().encrypted = true;
    table.nodes.get_mut(&"n2".into()).unwrap().wireguard =
        identities.iter().map(|byte| identity(*byte)).collect();
    table
}

#[test]
fn an_encrypted_network_and_what_is_published_of_its_services_go_through_wireguard() {
    let mut kernel = Kernel::default();
    kernel.apply(&mut Layout::default(), &encrypted(&[1, 2]), &local());
    let Contents { v4, common, .. } = &kernel.contents;
    let addresses = [1, 2].map(|byte| Ip6::from(identity(byte).address()));
    let slot = common.members[&addresses[0]];
    assert_eq!(common.peers[&slot], addresses[0], "where it is sent");
    assert_eq!(common.members[&addresses[1]], slot, "where it may come from");
    assert_eq!(addresses.map(|address| common.tags[&tag_of(address)]), [slot; 2]);
    let endpoint = |vni, third| v4.endpoints[&AddrKey { vni, addr: Be32::ipv4(10, 0, third, 12) }].peer;
    assert_eq!(endpoint(4097, 1), slot);
    assert_ne!(endpoint(4096, 0), slot, "`ingress` itself is not encrypted");
    for vni in [4096, 4097] {
        let backend = v4.backends[&v4.tasks[&TaskKey { incarnation: 2, vni }].backend];
        assert_eq!((backend.peer, backend.flags), (slot, BACKEND_ENCRYPTED), "in {vni}");
    }
    assert!(v4.vips.values().all(|slot| common.services[slot].flags & SERVICE_ENCRYPTED != 0));
    assert!(kernel.places(&kernel.back()).1.contains(&slot));
}

#[test]
fn a_nodes_next_identity_takes_the_place_of_its_former_one() {
    let mut kernel = Kernel::default();
    let mut layout = Layout::default();
    let mut slots = Vec::new();
    for identities in [&[1][..], &[1, 2], &[2, 1], &[2]] {
        kernel.apply(&mut layout, &encrypted(identities), &local());
        let common = &kernel.contents.common;
        let address = Ip6::from(identity(identities[0]).address());
        assert_eq!(common.peers[&common.members[&address]], address);
        assert_eq!(common.members.len(), 1 + identities.len());
        slots.push(common.members[&address]);
    }
    assert_eq!(slots, [slots[0]; 4]);
}

#[test]
fn nothing_of_an_encrypted_network_is_sent_to_a_node_without_an_identity() {
    let mut kernel = Kernel::default();
    kernel.apply(&mut Layout::default(), &encrypted(&[]), &local());
    let Contents { v4, common, .. } = &kernel.contents;
    assert_eq!(common.peers.len(), 1);
    assert!(!v4.endpoints.contains_key(&AddrKey { vni: 4097, addr: Be32::ipv4(10, 0, 1, 12) }));
    let own = v4.tasks[&TaskKey { incarnation: 1, vni: 4097 }].backend;
    assert!(kernel.places(&kernel.back()).0.iter().all(|slot| *slot == own));
}

#[test]
fn an_identity_that_comes_late_leads_to_the_nodes_tasks_and_one_that_goes_leads_nowhere() {
    let (mut kernel, mut layout) = (Kernel::default(), Layout::default());
    for identities in [&[][..], &[1], &[], &[], &[2, 1]] {
        kernel.apply(&mut layout, &encrypted(identities), &local());
        let Contents { v4, common, .. } = &kernel.contents;
        let endpoint = v4.endpoints.get(&AddrKey { vni: 4097, addr: Be32::ipv4(10, 0, 1, 12) });
        let peer = endpoint.map(|endpoint| common.peers[&endpoint.peer]);
        assert_eq!(peer, identities.first().map(|byte| Ip6::from(identity(*byte).address())));
        let way = endpoint.map(|endpoint| endpoint.peer);
        assert_eq!(kernel.places(&kernel.back()).1, [0].into_iter().chain(way).collect::<Vec<_>>());
    }
}

/// The encrypted table, with another service that takes more places and has a task on this node; and the node.
pub(crate) fn encrypted_beside_another(identities: &[u8]) -> (Table, Local) {
    let (mut table, mut local) = (encrypted(identities), local());
    let mut other = table.services[&"web".into()].clone();
    other.id = "other".into();
    for vip in &mut other.vips {
        vip.addr = vip.addr.map(|addr| Ipv4Addr::from_bits(addr.to_bits() + 1));
    }
    table.services.get_mut(&"web".into()).unwrap().ports.clear();
    let mut task = task(4, "n1", TaskState::Running);
    task.service = other.id.clone();
    for (ifindex, endpoint) in (9..).zip(&task.endpoints) {
        let (network, addr) = (endpoint.network.clone(), endpoint.addr);
        let alias = Ipv4Addr::new(169, 254, 64, ifindex as u8);
        local.endpoints.push(LocalEndpoint { task: task.id.clone(), network, addr, ifindex, alias });
    }
    table.tasks.insert(task.id.clone(), task);
    table.services.insert(other.id.clone(), other);
    (table, local)
}

/// Takes the other service away again.
pub(crate) fn remove_another(table: &mut Table, local: &mut Local) {
    table.services.remove(&"other".into());
    table.tasks.remove(&"t4".into());
    local.endpoints.retain(|endpoint| endpoint.task != "t4".into());
}

#[test]
fn the_slot_of_a_way_that_went_is_given_to_no_other_while_a_table_names_it() {
    let (table, mut local) = encrypted_beside_another(&[1]);
    let mut kernel = Kernel::default();
    kernel.apply(&mut Layout::default(), &table, &local);
    let used = kernel.contents.common.services.values().map(|service| service.len + service.nodes).sum();

    // Neither nodes nor places are left.
    let (mut kernel, mut layout) = (Kernel::default(), Layout::limited(3, used));
    kernel.apply(&mut layout, &table, &local);
    let slot = kernel.contents.common.members[&identity(1).address().into()];
    let mut apply = |table: &Table, local: &Local| {
        let mut changes = Changes::default();
        let result = layout.set_all(plan(table, local), Some(&mut changes));
        kernel.write(&layout, &changes);
        layout.written();
        assert_eq!(kernel.contents, layout.contents());
        let Contents { v4, common, .. } = &kernel.contents;
        let is_named = kernel.places(&kernel.back()).1.contains(&slot);
        let is_sent_to = v4.endpoints.values().any(|endpoint| endpoint.peer == slot)
            || v4.backends.values().any(|backend| backend.peer == slot);
        (result.map_err(|error| error.what), is_named, is_sent_to, common.peers.get(&slot).copied())
    };
    let (no_places, no_nodes) = (Err("places in Maglev tables"), Err("nodes"));
    let (mut table, _) = encrypted_beside_another(&[]);
    assert_eq!(apply(&table, &local), (no_places, true, false, None), "the identity went");
    table.nodes.insert("n3".into(), node("n3", 13));
    assert_eq!(apply(&table, &local), (no_nodes, true, false, None), "and a node came");
    remove_another(&mut table, &mut local);
    assert_eq!(apply(&table, &local), (no_nodes, true, false, None), "and room for places");
    assert_eq!(apply(&table, &local), (no_nodes, false, false, None), "which are taken");
    let vtep = IpAddr::from(Ipv4Addr::new(198, 18, 0, 13)).into();
    assert_eq!(apply(&table, &local), (Ok(()), false, false, Some(vtep)));
}

#[test]
fn a_way_that_is_back_before_there_is_room_to_do_without_it_has_its_slot() {
    let (mut kernel, mut layout) = (Kernel::default(), Layout::default());
    kernel.apply(&mut layout, &encrypted(&[1]), &local());
    let before = kernel.contents.clone();
    let used = before.common.services.values().map(|service| service.len + service.nodes).sum();
    let (mut kernel, mut layout) = (Kernel::default(), Layout::limited(PEERS_MAX, used));
    kernel.apply(&mut layout, &encrypted(&[1]), &local());
    for (identities, contents) in [(&[][..], None), (&[1], Some(before))] {
        let mut changes = Changes::default();
        assert!(layout.set_all(plan(&encrypted(identities), &local()), Some(&mut changes)).is_err());
        kernel.write(&layout, &changes);
        layout.written();
        assert_eq!(kernel.contents, layout.contents());
        assert!(contents.is_none_or(|contents| contents == kernel.contents));
    }
    kernel.assert_sound();
}
