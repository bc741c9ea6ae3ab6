//! What every asker may know: answers from the table, by an index that follows its changes.
//!
//! Names live in networks: an asker is answered from the networks that its task is on, and from no other. The
//! ingress network has no names, as in Docker: services meet on the networks that they share by intent.
//!
//! The index holds what the table can't be asked for by name or address. It may be a moment behind the table: what it
//! refers to in vain is not there.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mesh_api::id::{NetworkId, ServiceId, TaskId};
use mesh_api::table::{EndpointMode, ServiceRecord, Subnet6Record, Table, TaskRecord, TaskState, VipRecord};

use crate::dataplane::{LocalEndpoint, Touched};
use crate::runtime::SHORT_ID_LEN;

/// Who may ask, and where the table has what they ask for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Zone {
    askers: HashMap<Ipv4Addr, Asker>,
    networks: HashMap<NetworkId, Names>,
    /// What [`Names`] hold of each service, to be taken out again.
    services: HashMap<ServiceId, Listed>,
    /// The tasks of each service.
    tasks: HashMap<ServiceId, BTreeSet<TaskId>>,
}

/// What a task on this node may ask for.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Asker {
    networks: Vec<NetworkId>,
    /// One of its networks has a way out.
    external: bool,
}

/// A network's names. An IPv6 address follows from the IPv4 address, so that only the latter is kept.
#[derive(Debug, Default, PartialEq, Eq)]
struct Names {
    /// Services by their names and aliases here, in lower case. Several may share an alias.
    services: HashMap<String, BTreeSet<ServiceId>>,
    /// Whose an address is: a service's VIP or a running task's. One of a task that is gone stays until it is another's.
    owners: HashMap<Ipv4Addr, Owner>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Owner {
    Service(ServiceId),
    Task(TaskId),
}

/// A service's names and VIPs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Listed {
    names: Vec<(NetworkId, String)>,
    vips: Vec<(NetworkId, Ipv4Addr)>,
}

/// What the zone says to a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The name's addresses, of both families; empty for a name without any at the moment.
    Addresses(Vec<IpAddr>),
    /// The address's name.
    Name(String),
    /// There is no such name.
    NoName,
    /// Not for this zone to say: ask the host's resolvers.
    Forward,
    /// The asker is no task of this node.
    Refused,
}

impl Zone {
    /// Follows the table: what `touched` names of it, given that the rest was followed before; and `endpoints`, those
    /// of this node's tasks.
    pub fn update(&mut self, table: &Table, touched: &Touched, endpoints: &[LocalEndpoint]) {
        if touched.all {
            *self = Self::default();
            for task in table.tasks.values() {
                self.index_task(table, task);
            }
            for service in table.services.values() {
                self.list(table, service);
            }
        } else {
            for (service, tasks) in &touched.tasks {
                for id in tasks.keys() {
                    match table.tasks.get(id) {
                        Some(task) => self.index_task(table, task),
                        None => self.forget_task(service, id),
                    }
                }
            }
            // All out before any is in: an address may pass from one to another.
            for id in &touched.services {
                self.unlist(id);
            }
            for service in touched.services.iter().filter_map(|id| table.services.get(id)) {
                self.list(table, service);
            }
        }
        self.askers = askers(table, endpoints);
    }

    fn index_task(&mut self, table: &Table, task: &TaskRecord) {
        self.tasks.entry(task.service.clone()).or_default().insert(task.id.clone());
        for endpoint in task.endpoints.iter().filter(|endpoint| has_names(table, &endpoint.network)) {
            let owners = &mut self.networks.entry(endpoint.network.clone()).or_default().owners;
            let owner = Owner::Task(task.id.clone());
            if is_running(task) {
                owners.insert(endpoint.addr, owner);
            } else if owners.get(&endpoint.addr) == Some(&owner) {
                owners.remove(&endpoint.addr);
            }
        }
    }

    fn forget_task(&mut self, service: &ServiceId, id: &TaskId) {
        if let Some(tasks) = self.tasks.get_mut(service) {
            tasks.remove(id);
            if tasks.is_empty() {
                self.tasks.remove(service);
            }
        }
    }

    fn list(&mut self, table: &Table, service: &ServiceRecord) {
        let mut listed = Listed::default();
        for vip in service.vips.iter().filter(|vip| has_names(table, &vip.network)) {
            let names = self.networks.entry(vip.network.clone()).or_default();
            for name in vip.aliases.iter().chain([&service.name]).map(|name| name.to_ascii_lowercase()) {
                names.services.entry(name.clone()).or_default().insert(service.id.clone());
                listed.names.push((vip.network.clone(), name));
            }
            if let (EndpointMode::Vip, Some(addr)) = (service.endpoint_mode, vip.addr) {
                names.owners.insert(addr, Owner::Service(service.id.clone()));
                listed.vips.push((vip.network.clone(), addr));
            }
        }
        self.services.insert(service.id.clone(), listed);
    }

    fn unlist(&mut self, id: &ServiceId) {
        let Some(Listed { names, vips }) = self.services.remove(id) else { return };
        for (network, name) in names {
            let Some(names) = self.networks.get_mut(&network) else { continue };
            if let Some(services) = names.services.get_mut(&name) {
                services.remove(id);
                if services.is_empty() {
                    names.services.remove(&name);
                }
            }
        }
        for (network, addr) in vips {
            if let Some(names) = self.networks.get_mut(&network)
                && names.owners.get(&addr) == Some(&Owner::Service(id.clone()))
            {
                names.owners.remove(&addr);
            }
        }
    }

    /// The addresses of `name` (without its closing dot) for the asker at `source`.
    pub fn lookup(&self, table: &Table, source: Ipv4Addr, name: &str) -> Answer {
        let Some(asker) = self.askers.get(&source) else { return Answer::Refused };
        let name = name.to_ascii_lowercase();
        let task = task_named(table, &name);
        let mut found = None::<BTreeSet<IpAddr>>;
        for network in &asker.networks {
            let Some(addresses) = self.addresses(table, network, &name, task) else { continue };
            let subnet6 = table.networks.get(network).and_then(|network| network.subnet6);
            let found = found.get_or_insert_default();
            for addr in addresses {
                found.insert(addr.into());
                found.extend(subnet6.map(|subnet| IpAddr::V6(subnet.addr_of(addr))));
            }
        }
        match found {
            Some(addresses) => Answer::Addresses(addresses.into_iter().collect()),
            // Names of this cluster don't leave it, and `tasks.NAME` is nobody else's.
            None if self.knows(table, &name, task) => Answer::NoName,
            None => asker.elsewhere(),
        }
    }

    /// The addresses of `name` in a network; `None` where nothing is called so there.
    fn addresses(
        &self,
        table: &Table,
        network: &NetworkId,
        name: &str,
        task: Option<&TaskRecord>,
    ) -> Option<Vec<Ipv4Addr>> {
        let mut found = None::<Vec<Ipv4Addr>>;
        let names = self.networks.get(network);
        let called = |name: &str| names.and_then(|names| names.services.get(name)).into_iter().flatten();
        for id in called(name) {
            let vip = table.services.get(id).and_then(|service| vip(service, network));
            let addresses = vip.map_or_else(|| self.running(table, id, network), |vip| vec![vip]);
            found.get_or_insert_default().extend(addresses);
        }
        if let Some(name) = tasks_of(name) {
            for id in called(name) {
                found.get_or_insert_default().extend(self.running(table, id, network));
            }
        }
        let own = task.and_then(|task| address(task, network)).filter(|_| has_names(table, network));
        if let Some(addr) = own {
            found.get_or_insert_default().push(addr);
        }
        found
    }

    /// The addresses in a network of a service's tasks that run.
    fn running(&self, table: &Table, service: &ServiceId, network: &NetworkId) -> Vec<Ipv4Addr> {
        let ids = self.tasks.get(service).into_iter().flatten();
        let tasks = ids.filter_map(|id| table.tasks.get(id)).filter(|task| is_running(task));
        tasks.filter_map(|task| address(task, network)).collect()
    }

    /// Whether a name is the cluster's, on whatever network.
    fn knows(&self, table: &Table, name: &str, task: Option<&TaskRecord>) -> bool {
        tasks_of(name).is_some()
            || self.networks.values().any(|names| names.services.contains_key(name))
            || task
                .is_some_and(|task| task.endpoints.iter().any(|endpoint| has_names(table, &endpoint.network)))
    }

    /// The name of `addr` for the asker at `source`.
    pub fn lookup_reverse(&self, table: &Table, source: Ipv4Addr, addr: IpAddr) -> Answer {
        let Some(asker) = self.askers.get(&source) else { return Answer::Refused };
        match asker.networks.iter().find_map(|network| self.name(table, network, addr)) {
            Some(name) => Answer::Name(name.to_owned()),
            None => asker.elsewhere(),
        }
    }

    fn name<'t>(&self, table: &'t Table, network: &NetworkId, addr: IpAddr) -> Option<&'t str> {
        let addr = match addr {
            IpAddr::V4(addr) => addr,
            IpAddr::V6(addr) => embedded(&table.networks.get(network)?.subnet6?, addr)?,
        };
        match self.networks.get(network)?.owners.get(&addr)? {
            Owner::Service(id) => Some(&table.services.get(id)?.name),
            Owner::Task(id) => Some(&table.tasks.get(id).filter(|task| is_running(task))?.name),
        }
    }

    /// Whether a question of another kind, that the zone has no answer to, may go to the host's resolvers.
    pub fn lookup_other(&self, source: Ipv4Addr) -> Answer {
        self.askers.get(&source).map_or(Answer::Refused, Asker::elsewhere)
    }
}

fn askers(table: &Table, endpoints: &[LocalEndpoint]) -> HashMap<Ipv4Addr, Asker> {
    let mut by_task: BTreeMap<&TaskId, Asker> = BTreeMap::new();
    for endpoint in endpoints {
        let Some(network) = table.networks.get(&endpoint.network) else { continue };
        let asker = by_task.entry(&endpoint.task).or_default();
        asker.external |= !network.internal;
        if !network.ingress {
            asker.networks.push(network.id.clone());
        }
    }
    let asker = |endpoint: &LocalEndpoint| by_task.get(&endpoint.task).cloned().unwrap_or_default();
    endpoints.iter().map(|endpoint| (endpoint.alias, asker(endpoint))).collect()
}

fn has_names(table: &Table, network: &NetworkId) -> bool {
    table.networks.get(network).is_some_and(|network| !network.ingress)
}

/// A task that takes traffic, and is not about to be stopped.
fn is_running(task: &TaskRecord) -> bool {
    task.observed == TaskState::Running && task.desired <= TaskState::Running
}

fn address(task: &TaskRecord, network: &NetworkId) -> Option<Ipv4Addr> {
    task.endpoints.iter().find(|endpoint| endpoint.network == *network).map(|endpoint| endpoint.addr)
}

/// What a service's name stands for in a network, if not for its tasks.
fn vip(service: &ServiceRecord, network: &NetworkId) -> Option<Ipv4Addr> {
    let is_here = |vip: &&VipRecord| vip.network == *network;
    let vip = service.vips.iter().find(is_here)?.addr;
    vip.filter(|_| service.endpoint_mode == EndpointMode::Vip)
}

/// The running task of that name (in lower case), which ends in its id, or of that short id.
fn task_named<'t>(table: &'t Table, name: &str) -> Option<&'t TaskRecord> {
    let id = TaskId::from(name.rsplit_once('.').map_or(name, |(_, id)| id));
    let task = if name.contains('.') {
        table.tasks.get(&id).filter(|task| task.name.eq_ignore_ascii_case(name))
    } else {
        let next = table.tasks.range(id..).next().map(|(_, task)| task);
        next.filter(|task| task.id.as_str().chars().take(SHORT_ID_LEN).eq(name.chars()))
    };
    task.filter(|task| is_running(task))
}

/// The service that a name asks for the tasks of.
fn tasks_of(name: &str) -> Option<&str> {
    name.strip_prefix("tasks.").filter(|rest| !rest.contains('.'))
}

/// The IPv4 address that `addr` is made from, if it is one of the subnet's.
fn embedded(subnet: &Subnet6Record, addr: Ipv6Addr) -> Option<Ipv4Addr> {
    let [.., a, b, c, d] = addr.octets();
    let embedded = Ipv4Addr::new(a, b, c, d);
    (subnet.addr_of(embedded) == addr).then_some(embedded)
}

impl Asker {
    /// What lies outside the zone: a task on internal networks alone has no outside.
    fn elsewhere(&self) -> Answer {
        if self.external { Answer::Forward } else { Answer::NoName }
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::table::{
        BalancingRecord, Change, ClusterRecord, Delta, EndpointRecord, NetworkRecord, ReturnPath, WEIGHT_MAX,
    };

    use super::*;

    /// A network, with an IPv6 subnet if it is internal.
    fn network(id: &str, internal: bool, ingress: bool) -> NetworkRecord {
        let subnet6 =
            Subnet6Record { cidr: "fd00:2::/64".parse().unwrap(), gateway: "fd00:2::1".parse().unwrap() };
        NetworkRecord {
            id: id.into(),
            name: id.to_owned(),
            vni: 4097,
            subnets: vec![],
            subnet6: internal.then_some(subnet6),
            internal,
            ingress,
        }
    }

    fn service(id: &str, mode: EndpointMode, vips: &[(&str, Option<[u8; 4]>)]) -> ServiceRecord {
        let vips = vips.iter().map(|(network, addr)| VipRecord {
            network: (*network).into(),
            addr: addr.map(Ipv4Addr::from),
            aliases: vec![format!("{id}-alias")],
        });
        ServiceRecord {
            id: id.into(),
            name: id.to_owned(),
            endpoint_mode: mode,
            vips: vips.collect(),
            ports: vec![],
            balancing: BalancingRecord::default(),
        }
    }

    fn task(id: &str, service: &str, observed: TaskState, endpoints: &[(&str, [u8; 4])]) -> TaskRecord {
        let endpoints = endpoints
            .iter()
            .map(|(network, addr)| EndpointRecord { network: (*network).into(), addr: (*addr).into() });
        TaskRecord {
            id: id.into(),
            name: format!("{service}.1.{id}").into(),
            service: service.into(),
            slot: 1,
            node: "n".into(),
            incarnation: 1,
            desired: TaskState::Running,
            observed,
            weight: WEIGHT_MAX,
            endpoints: endpoints.collect(),
            spec: None,
        }
    }

    const WEB_VIP: [u8; 4] = [10, 0, 1, 2];
    const ASKER: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 3);
    const INNER: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 4);

    /// `web` (VIP) and `db` (dnsrr) on `front`; `db` on `back`, which is internal; tasks of web and of back ask.
    fn example() -> (Table, Zone) {
        let mut table = Table::new(ClusterRecord {
            id: "c".into(),
            hash_seed: 0,
            data_path_port: 4789,
            return_path: ReturnPath::Tunnel,
        });
        for record in
            [network("ingress", false, true), network("front", false, false), network("back", true, false)]
        {
            table.networks.insert(record.id.clone(), record);
        }
        let web =
            service("Web", EndpointMode::Vip, &[("ingress", Some([10, 0, 0, 9])), ("front", Some(WEB_VIP))]);
        let db = service("db", EndpointMode::Dnsrr, &[("front", None), ("back", None)]);
        let cache = service("cache", EndpointMode::Vip, &[("back", Some([10, 0, 2, 9]))]);
        for record in [web, db, cache] {
            table.services.insert(record.id.clone(), record);
        }
        let running = TaskState::Running;
        let mut stopping = task("stopping", "Web", running, &[("front", [10, 0, 1, 5])]);
        stopping.desired = TaskState::Shutdown;
        for record in [
            task("abcdefghijklmnop", "Web", running, &[("ingress", [10, 0, 0, 3]), ("front", [10, 0, 1, 3])]),
            task("starting", "Web", TaskState::Starting, &[("front", [10, 0, 1, 4])]),
            stopping,
            task("d1", "db", running, &[("front", [10, 0, 1, 7]), ("back", [10, 0, 2, 7])]),
            task("d2", "db", running, &[("front", [10, 0, 1, 8]), ("back", [10, 0, 2, 8])]),
            task("c1", "cache", running, &[("back", [10, 0, 2, 3])]),
        ] {
            table.tasks.insert(record.id.clone(), record);
        }
        let endpoint = |task: &str, network: &str, alias| LocalEndpoint {
            task: task.into(),
            network: network.into(),
            addr: Ipv4Addr::UNSPECIFIED,
            ifindex: 1,
            alias,
        };
        let local = [
            endpoint("abcdefghijklmnop", "ingress", ASKER),
            endpoint("abcdefghijklmnop", "front", Ipv4Addr::new(169, 254, 64, 5)),
            endpoint("c1", "back", INNER),
        ];
        let mut zone = Zone::default();
        zone.update(&table, &Touched::all(), &local);
        (table, zone)
    }

    fn addresses(list: &[[u8; 4]]) -> Answer {
        Answer::Addresses(list.iter().map(|bytes| IpAddr::from(*bytes)).collect())
    }

    fn both(list: &[&str]) -> Answer {
        Answer::Addresses(list.iter().map(|addr| addr.parse().unwrap()).collect())
    }

    #[test]
    fn names_resolve_within_the_askers_networks() {
        let (table, zone) = example();
        let cases: &[(Ipv4Addr, &str, Answer)] = &[
            (ASKER, "web", addresses(&[WEB_VIP])),
            (ASKER, "WEB", addresses(&[WEB_VIP])),
            (ASKER, "web-alias", addresses(&[WEB_VIP])),
            (ASKER, "tasks.web", addresses(&[[10, 0, 1, 3]])),
            (ASKER, "db", addresses(&[[10, 0, 1, 7], [10, 0, 1, 8]])),
            (ASKER, "tasks.db", addresses(&[[10, 0, 1, 7], [10, 0, 1, 8]])),
            (ASKER, "web.1.abcdefghijklmnop", addresses(&[[10, 0, 1, 3]])),
            (ASKER, "abcdefghijkl", addresses(&[[10, 0, 1, 3]])),
            (INNER, "db", both(&["10.0.2.7", "10.0.2.8", "fd00:2::a00:207", "fd00:2::a00:208"])),
            (INNER, "cache", both(&["10.0.2.9", "fd00:2::a00:209"])),
            // On no network of the asker.
            (ASKER, "cache", Answer::NoName),
            (INNER, "web", Answer::NoName),
            (ASKER, "tasks.nothing", Answer::NoName),
            // Not the cluster's.
            (ASKER, "example.com", Answer::Forward),
            (ASKER, "printer", Answer::Forward),
            (INNER, "example.com", Answer::NoName),
            (Ipv4Addr::new(169, 254, 64, 99), "web", Answer::Refused),
        ];
        for (source, name, expected) in cases {
            assert_eq!(zone.lookup(&table, *source, name), *expected, "{name} from {source}");
        }
    }

    #[test]
    fn addresses_resolve_to_names_within_the_askers_networks() {
        let (table, zone) = example();
        let name = |text: &str| Answer::Name(text.to_owned());
        let cases = [
            (ASKER, "10.0.1.2", name("Web")),
            (ASKER, "10.0.1.3", name("Web.1.abcdefghijklmnop")),
            (ASKER, "192.0.2.1", Answer::Forward),
            (INNER, "10.0.1.3", Answer::NoName),
            (INNER, "fd00:2::a00:209", name("cache")),
            (INNER, "fd00:2::a00:203", name("cache.1.c1")),
            (INNER, "fd00:2::1:a00:203", Answer::NoName),
            (ASKER, "fd00:2::a00:203", Answer::Forward),
        ];
        for (source, addr, expected) in cases {
            assert_eq!(
                zone.lookup_reverse(&table, source, addr.parse().unwrap()),
                expected,
                "{addr} from {source}"
            );
        }
    }

    #[test]
    fn any_alias_of_a_task_asks_for_all_its_networks() {
        let (table, zone) = example();
        assert_eq!(zone.lookup(&table, Ipv4Addr::new(169, 254, 64, 5), "web"), addresses(&[WEB_VIP]));
    }

    /// Follows one change after the other, and at the end knows what a zone of the last table knows.
    #[test]
    fn a_zone_that_follows_changes_answers_like_one_of_the_whole_table() {
        let (mut table, mut zone) = example();
        let (front, running) = ("front", TaskState::Running);
        let other = service("other", EndpointMode::Vip, &[(front, Some(WEB_VIP))]);
        let mut renamed = service("db", EndpointMode::Vip, &[(front, Some([10, 0, 1, 99]))]);
        renamed.name = "base".to_owned();
        let steps = [
            vec![Change::Task(Box::new(task("starting", "Web", running, &[(front, [10, 0, 1, 4])])))],
            vec![Change::Task(Box::new(task("d1", "db", TaskState::Failed, &[(front, [10, 0, 1, 7])])))],
            vec![Change::TaskRemoved("d2".into())],
            // Addresses pass on, a VIP's within one step.
            vec![Change::Task(Box::new(task("next", "other", running, &[(front, [10, 0, 1, 8])])))],
            vec![Change::ServiceRemoved("Web".into()), Change::Service(other)],
            vec![Change::Service(renamed)],
        ];
        let endpoint = |task: &str, network: &str, alias| LocalEndpoint {
            task: task.into(),
            network: network.into(),
            addr: Ipv4Addr::UNSPECIFIED,
            ifindex: 1,
            alias,
        };
        let local = [endpoint("abcdefghijklmnop", front, ASKER), endpoint("c1", "back", INNER)];
        for (changes, from) in steps.into_iter().zip(table.index..) {
            let mut touched = Touched::default();
            for change in &changes {
                touched.note(&table, change);
            }
            table.apply(Delta { from, to: from + 1, changes }).unwrap();
            zone.update(&table, &touched, &local);
            let mut fresh = Zone::default();
            fresh.update(&table, &Touched::all(), &local);
            let names = [
                "web",
                "web-alias",
                "tasks.web",
                "db",
                "db-alias",
                "tasks.db",
                "base",
                "other",
                "tasks.other",
            ];
            let names =
                names.into_iter().chain(["starting", "d1", "web.1.starting", "other.1.next", "cache"]);
            for (source, name) in names.flat_map(|name| [(ASKER, name), (INNER, name)]) {
                let expected = fresh.lookup(&table, source, name);
                assert_eq!(zone.lookup(&table, source, name), expected, "{name} from {source} at {from}");
            }
            for last in 1..=255 {
                let addr = [10, 0, 1, last].into();
                let expected = fresh.lookup_reverse(&table, ASKER, addr);
                assert_eq!(zone.lookup_reverse(&table, ASKER, addr), expected, "{addr} at {from}");
            }
        }
        assert_eq!(zone.lookup(&table, ASKER, "other"), addresses(&[WEB_VIP]));
        assert_eq!(zone.lookup(&table, ASKER, "web"), Answer::Forward);
        assert_eq!(zone.lookup(&table, ASKER, "tasks.other"), addresses(&[[10, 0, 1, 8]]));
    }
}
