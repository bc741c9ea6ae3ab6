//! That a table followed change by change leads where the whole of it does, on maps in memory.

use std::net::{IpAddr, Ipv4Addr};

use mesh_api::table::{Change, Delta, NodeRecord, NodeState, ServiceRecord, TaskRecord};
use mesh_api::wireguard::WireguardIdentity;
use mesh_common::addr::Address as _;
use mesh_common::be::Be16;
use mesh_common::map::{BACKEND_ENCRYPTED, SERVICE_ENCRYPTED};
use proptest::prelude::*;
use proptest::sample::select;

use super::super::super::layout::tests::{encrypted_beside_another, remove_another};
use super::*;

/// Maps in memory.
#[derive(Default)]
struct Memory {
    contents: Contents,
    places: std::collections::HashMap<u32, u32>,
    /// Whether writing fails, half-way.
    fails: bool,
}

impl Backing for Memory {
    fn read(&self) -> Result<Contents, DataplaneError> {
        Ok(self.contents.clone())
    }

    fn read_places(&self, services: &BTreeMap<u32, Service>) -> Result<Places, DataplaneError> {
        Ok(services.values().map(|service| (service.start, self.places_of(service))).collect())
    }

    fn write(&mut self, changes: &Changes, places: &Places) -> Result<(), DataplaneError> {
        for (start, range) in places.iter() {
            self.places.extend((start..).zip(range.iter().copied()));
        }
        if self.fails {
            let set = Contents { v4: changes.set.v4.clone(), ..Contents::default() };
            self.contents.follow(&Changes { set, removed: Contents::default() });
            let source = std::io::Error::other("as it is to be");
            return Err(DataplaneError::PinFolder { path: "memory".into(), source });
        }
        self.contents.follow(changes);
        Ok(())
    }

    fn configure(&mut self, _: &Config) -> Result<(), DataplaneError> {
        Ok(())
    }
}

/// A service as programs find it: its record without numbers, the incarnations in its table, the nodes behind.
type Found = (u32, u32, Vec<u32>, Vec<Option<Ip6>>);

/// A backend likewise: its incarnation, interface and flags, and where it is.
type Behind = (u32, u32, u32, Option<Ip6>);

/// What programs find, whatever its numbers are.
#[derive(Debug, PartialEq)]
struct Meaning {
    vips: BTreeMap<(u32, Be32), Found>,
    ports: BTreeMap<PortKey, (Be16, Found)>,
    endpoints: BTreeMap<(u32, Be32), Behind>,
    tasks: BTreeMap<(u32, u32), (Be32, Behind, Option<Found>)>,
    members: BTreeMap<Ip6, Option<Ip6>>,
    counts: [usize; 6],
}

impl Memory {
    fn places_of(&self, service: &Service) -> Vec<u32> {
        let range = service.start..service.start + service.len + service.nodes;
        range.map(|place| self.places[&place]).collect()
    }

    /// The VTEP of a peer; `None` for this node.
    fn peer(&self, slot: u32) -> Option<Ip6> {
        (slot > 0).then(|| self.contents.common.peers[&slot])
    }

    fn found(&self, slot: u32) -> Found {
        let service = &self.contents.common.services[&slot];
        let places = self.places_of(service);
        let (table, nodes) = places.split_at(service.len as usize);
        let incarnation = |slot: &u32| {
            let backend = self.contents.v4.backends[slot];
            assert_eq!(backend.vni, service.vni);
            backend.incarnation
        };
        let nodes = nodes.iter().map(|slot| self.peer(*slot)).collect();
        (service.vni, service.flags, table.iter().map(incarnation).collect(), nodes)
    }

    fn meaning(&self) -> Meaning {
        let Contents { v4, v6, common } = &self.contents;
        let endpoint =
            |endpoint: &Endpoint| (endpoint.incarnation, endpoint.ifindex, 0, self.peer(endpoint.peer));
        let task = |slots: &TaskSlots| {
            let backend = v4.backends[&slots.backend];
            let service = (slots.service > 0).then(|| self.found(slots.service));
            let is = (backend.incarnation, backend.ifindex, backend.flags, self.peer(backend.peer));
            (backend.addr, is, service)
        };
        Meaning {
            vips: v4.vips.iter().map(|(key, slot)| ((key.vni, key.addr), self.found(*slot))).collect(),
            ports: common
                .ports
                .iter()
                .map(|(key, port)| (*key, (port.target, self.found(port.service))))
                .collect(),
            endpoints: v4.endpoints.iter().map(|(key, one)| ((key.vni, key.addr), endpoint(one))).collect(),
            tasks: v4.tasks.iter().map(|(key, slots)| ((key.incarnation, key.vni), task(slots))).collect(),
            members: common.members.iter().map(|(addr, slot)| (*addr, self.peer(*slot))).collect(),
            counts: [
                v4.backends.len(),
                v6.backends.len(),
                v6.endpoints.len(),
                common.services.len(),
                common.tags.len(),
                common.peers.len(),
            ],
        }
    }
}

impl Memory {
    /// That no slot by which something encrypted is sent is that of a plain peer.
    fn assert_encrypted(&self) {
        let Contents { v4, common, .. } = &self.contents;
        let services = common.services.values();
        // On `ingress`, such a service may have tasks that are not on `back`.
        let encrypted =
            services.filter(|service| service.flags & SERVICE_ENCRYPTED != 0 && service.vni == 4097);
        let nodes = encrypted.flat_map(|service| self.places_of(service).split_off(service.len as usize));
        let backends = v4.backends.values().filter(|backend| backend.flags & BACKEND_ENCRYPTED != 0);
        for slot in nodes.chain(backends.map(|backend| backend.peer)) {
            assert!(common.peers.get(&slot).is_none_or(|vtep| vtep.is_wireguard()), "{slot}");
        }
    }
}

/// Tables on maps in memory, with this much room.
fn limited(peers_max: u32, places_max: u32) -> Tables<Memory> {
    Tables { layout: Layout::limited(peers_max, places_max), ..Tables::over(Memory::default()) }
}

/// All of the table at once, with room for everything.
fn whole(table: &Table, local: &Local) -> Tables<Memory> {
    let mut whole = Tables::over(Memory::default());
    whole.apply(table, local, &config()).unwrap();
    whole
}

/// How many places are in use.
fn used(tables: &Tables<Memory>) -> u32 {
    let services = &tables.maps.contents.common.services;
    services.values().map(|service| service.len + service.nodes).sum()
}

/// Nodes of which the first is this one, and two may share a host.
fn nodes() -> impl Strategy<Value = Change> {
    let id = select(vec!["n1", "n2", "n3", "n4"]);
    let state = select(vec![NodeState::Unknown, NodeState::Ready, NodeState::Down]);
    let identities = proptest::sample::subsequence(vec![1_u8, 2], 0..=2);
    let record = (id.clone(), 0..2_u8, state, identities, any::<bool>());
    let record = record.prop_map(|(id, host, state, identities, manager)| {
        let number = id.as_bytes()[1] - b'0';
        let last = if id == "n1" { 11 } else { 10 + number + host };
        let identity = |byte| WireguardIdentity { public_key: [number * 16 + byte; 32].into(), port: 51820 };
        let wireguard = identities.into_iter().map(identity).collect();
        let manager = manager.then(|| "192.0.2.1:2377".parse().unwrap());
        Change::Node(NodeRecord { state, wireguard, manager, ..node(id, last) })
    });
    prop_oneof![4 => record, 1 => id.prop_map(|id| Change::NodeRemoved(id.into()))]
}

fn tasks() -> impl Strategy<Value = Change> {
    let states = || select(vec![TaskState::Ready, TaskState::Running, TaskState::Shutdown]);
    let record = (1..9_u32, 1..5_u32, states(), states(), 1..3_usize);
    let record = record.prop_map(|(number, node, desired, observed, networks)| {
        let record = task(number, &format!("n{node}"), observed);
        let service = if number < 6 { "web" } else { "other" };
        let endpoints = record.endpoints[..networks].into();
        Change::Task(Box::new(TaskRecord { desired, service: service.into(), endpoints, ..record }))
    });
    prop_oneof![4 => record, 1 => (1..9_u32).prop_map(|number| Change::TaskRemoved(format!("t{number}").into()))]
}

fn services() -> impl Strategy<Value = Change> {
    let id = select(vec!["web", "other"]);
    let record = (id.clone(), 0..3_usize, any::<bool>()).prop_map(|(id, ports, on_ingress)| {
        let table = table();
        let mut record: ServiceRecord = table.services[&"web".into()].clone();
        record.ports.truncate(ports);
        if !on_ingress {
            record.vips.remove(0);
        }
        if id == "other" {
            record.id = id.into();
            for vip in &mut record.vips {
                vip.addr = vip.addr.map(|addr| Ipv4Addr::from_bits(addr.to_bits() + 1));
            }
            record.ports.iter_mut().for_each(|port| port.published += 1);
        }
        Change::Service(record)
    });
    prop_oneof![4 => record, 1 => id.prop_map(|id| Change::ServiceRemoved(id.into()))]
}

fn networks() -> impl Strategy<Value = Change> {
    let id = select(vec!["ingress", "back"]);
    let record = (id.clone(), any::<bool>(), any::<bool>()).prop_map(|(id, encrypted, internal)| {
        let mut record = table().networks[&id.into()].clone();
        (record.encrypted, record.internal) = (encrypted && id == "back", internal);
        Change::Network(record)
    });
    prop_oneof![4 => record, 1 => id.prop_map(|id| Change::NetworkRemoved(id.into()))]
}

/// Changes that come together; and whether they can't be written.
fn deltas() -> impl Strategy<Value = Vec<(Vec<Change>, bool)>> {
    let change = prop_oneof![4 => nodes(), 4 => tasks(), 2 => services(), 1 => networks()];
    let delta = (proptest::collection::vec(change, 1..4), proptest::bool::weighted(0.1));
    proptest::collection::vec(delta, 1..12)
}

proptest! {
    #[test]
    fn a_table_followed_change_by_change_leads_where_the_whole_of_it_does(
        deltas in deltas(),
        peers_max in select(vec![4, 6, PEERS_MAX]),
        places_max in select(vec![800, 1100, 1600, PLACES_MAX]),
    ) {
        let is_roomy = (peers_max, places_max) == (PEERS_MAX, PLACES_MAX);
        let (mut table, local) = (full_table(), local());
        table.networks.get_mut(&"back".into()).unwrap().encrypted = true;
        let mut tables = limited(peers_max, places_max);
        tables.change(&table, &Touched::all(), &local, &config()).unwrap();
        let mut pending = Touched::default();
        for (changes, fails) in deltas {
            for change in &changes {
                pending.note(&table, change);
            }
            let from = table.index;
            table.apply(Delta { from, to: from + 1, changes }).unwrap();
            tables.maps.fails = fails;
            let followed = tables.change(&table, &std::mem::take(&mut pending), &local, &config());
            if fails {
                prop_assert!(followed.is_err());
                continue;
            }
            prop_assert_eq!(&tables.maps.contents, &tables.layout.contents());
            tables.maps.assert_encrypted();
            match followed {
                Ok(()) => prop_assert_eq!(tables.maps.meaning(), whole(&table, &local).maps.meaning()),
                Err(error) => prop_assert!(!is_roomy && matches!(error, DataplaneError::TooMany(_))),
            }
        }
    }
}

#[test]
fn what_has_no_room_after_an_identity_came_or_went_is_tried_until_it_has() {
    for comes in [true, false] {
        let identities = |there: bool| if there { &[1][..] } else { &[] };
        let (before, mut local) = encrypted_beside_another(identities(!comes));
        let (mut table, _) = encrypted_beside_another(identities(comes));
        let mut tables = limited(PEERS_MAX, used(&whole(&before, &local)));
        tables.apply(&before, &local, &config()).unwrap();
        let mut touched = Touched::default();
        touched.note(&before, &Change::Node(table.nodes[&"n2".into()].clone()));
        let mut follow = |table: &Table, local: &Local| {
            let result = tables.change(table, &std::mem::take(&mut touched), local, &config());
            assert_eq!(tables.maps.contents, tables.layout.contents());
            tables.maps.assert_encrypted();
            let endpoint = AddrKey { vni: 4097, addr: Be32::ipv4(10, 0, 1, 12) };
            assert_eq!(tables.maps.contents.v4.endpoints.contains_key(&endpoint), comes);
            result.map(|()| tables.maps.meaning())
        };
        for _ in 0..3 {
            assert!(matches!(follow(&table, &local), Err(DataplaneError::TooMany(_))));
        }
        remove_another(&mut table, &mut local);
        // The room that this makes is there once it is written.
        assert!(matches!(follow(&table, &local), Err(DataplaneError::TooMany(_))));
        for _ in 0..2 {
            assert_eq!(follow(&table, &local).unwrap(), whole(&table, &local).maps.meaning());
        }
    }
}

#[test]
fn tries_to_write_what_an_identity_displaced_take_its_places_once() {
    let (before, local) = encrypted_beside_another(&[]);
    let (table, _) = encrypted_beside_another(&[1]);
    let places = used(&whole(&before, &local)) + used(&whole(&table, &local));
    let mut tables = limited(PEERS_MAX, places);
    tables.apply(&before, &local, &config()).unwrap();
    let mut follow = |fails| {
        tables.maps.fails = fails;
        let result = tables.apply(&table, &local, &config());
        (result, tables.layout.places().iter().map(|(start, _)| start).collect::<Vec<_>>())
    };
    let (_, first) = follow(true);
    assert!(!first.is_empty());
    for _ in 0..5 {
        let (result, starts) = follow(true);
        assert!(matches!(result, Err(DataplaneError::PinFolder { .. })));
        assert_eq!(starts, first);
    }
    follow(false).0.unwrap();
    assert_eq!(tables.maps.contents, tables.layout.contents());
    assert_eq!(tables.maps.meaning(), whole(&table, &local).maps.meaning());
}

#[test]
fn of_a_nodes_record_only_what_leads_to_it_and_its_tasks_is_touched() {
    let table = full_table();
    let touched_by = |change: fn(&mut NodeRecord)| {
        let mut record = table.nodes[&"n2".into()].clone();
        change(&mut record);
        let mut touched = Touched::default();
        touched.note(&table, &Change::Node(record));
        let tasks: Vec<String> =
            touched.tasks.values().flat_map(BTreeMap::keys).map(ToString::to_string).collect();
        assert!(!touched.all && touched.services.is_empty());
        (touched.nodes, tasks)
    };
    let its_tasks = vec!["t2".to_owned(), "t3".to_owned()];
    let nothing = (false, Vec::new());
    assert_eq!(touched_by(|node| node.state = NodeState::Unknown), nothing);
    assert_eq!(touched_by(|node| node.manager = Some(([192, 0, 2, 1], 2377).into())), nothing);
    assert_eq!(touched_by(|node| node.state = NodeState::Down), (true, its_tasks.clone()));
    assert_eq!(touched_by(|node| node.vtep = IpAddr::from([198, 18, 0, 99])), (true, its_tasks.clone()));
    let identity = |node: &mut NodeRecord| {
        node.wireguard.push(WireguardIdentity { public_key: [1; 32].into(), port: 51820 });
    };
    assert_eq!(touched_by(identity), (true, Vec::new()));
    let mut touched = Touched::default();
    touched.note(&table, &Change::NodeRemoved("n2".into()));
    assert_eq!((touched.nodes, touched.tasks[&"web".into()].len()), (true, its_tasks.len()));
}

#[test]
fn of_a_network_what_is_on_it_is_touched() {
    let mut table = full_table();
    table.services.get_mut(&"web".into()).unwrap().vips.truncate(1);
    table.tasks.get_mut(&"t3".into()).unwrap().endpoints = Box::default();
    let touched_by = |id: &str| {
        let record =
            mesh_api::table::NetworkRecord { id: id.into(), ..table.networks[&"back".into()].clone() };
        let [mut changed, mut removed] = [Touched::default(), Touched::default()];
        changed.note(&table, &Change::Network(record));
        removed.note(&table, &Change::NetworkRemoved(id.into()));
        assert_eq!(changed, removed);
        assert!(changed.networks && !changed.all && !changed.nodes);
        (changed.services.len(), changed.tasks.values().map(BTreeMap::len).sum::<usize>())
    };
    assert_eq!(["ingress", "back", "another"].map(touched_by), [(1, 2), (0, 2), (0, 0)]);
}
