//! What every asker may know: a pure function of the table and of the endpoints on this node.
//!
//! Names live in networks: an asker is answered from the networks that its task is on, and from no other. The
//! ingress network has no names, as in Docker: services meet on the networks that they share by intent.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::Ipv4Addr;

use mesh_api::id::{NetworkId, TaskId};
use mesh_api::table::{EndpointMode, Table, TaskRecord, TaskState};

use crate::dataplane::LocalEndpoint;
use crate::runtime::SHORT_ID_LEN;

/// Names and addresses by network, and who may ask for which.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Zone {
    askers: HashMap<Ipv4Addr, Asker>,
    networks: HashMap<NetworkId, Names>,
    /// Names that some network has: an asker who is not on it hears that they don't exist.
    known: HashSet<String>,
}

/// What a task on this node may ask for.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Asker {
    networks: Vec<NetworkId>,
    /// One of its networks has a way out.
    external: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Names {
    forward: HashMap<String, Vec<Ipv4Addr>>,
    reverse: HashMap<Ipv4Addr, String>,
}

/// What the zone says to a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The name's addresses; empty for a name without any at the moment.
    Addresses(Vec<Ipv4Addr>),
    /// The address's name.
    Name(String),
    /// There is no such name.
    NoName,
    /// Not for this zone to say: ask the host's resolvers.
    Forward,
    /// The asker is no task of this node.
    Refused,
}

/// Builds the zone of this node.
pub fn zone(table: &Table, endpoints: &[LocalEndpoint]) -> Zone {
    let mut zone = Zone { askers: askers(table, endpoints), ..Zone::default() };
    for service in table.services.values() {
        for vip in &service.vips {
            if !has_names(table, &vip.network) {
                continue;
            }
            let running = running_addresses(table, &vip.network, |task| task.service == service.id);
            let addresses = match (service.endpoint_mode, vip.addr) {
                (EndpointMode::Vip, Some(addr)) => vec![addr],
                _ => running.clone(),
            };
            for name in vip.aliases.iter().chain([&service.name]) {
                zone.add(&vip.network, name, &addresses);
                zone.add(&vip.network, &format!("tasks.{name}"), &running);
            }
            if let (EndpointMode::Vip, Some(addr)) = (service.endpoint_mode, vip.addr) {
                zone.add_reverse(&vip.network, addr, &service.name);
            }
        }
    }
    for task in table.tasks.values().filter(|task| is_running(task)) {
        let short_id: String = task.id.as_str().chars().take(SHORT_ID_LEN).collect();
        for endpoint in task.endpoints.iter().filter(|endpoint| has_names(table, &endpoint.network)) {
            for name in [&task.name, &short_id] {
                zone.add(&endpoint.network, name, &[endpoint.addr]);
            }
            zone.add_reverse(&endpoint.network, endpoint.addr, &task.name);
        }
    }
    zone
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

fn running_addresses(
    table: &Table,
    network: &NetworkId,
    wanted: impl Fn(&TaskRecord) -> bool,
) -> Vec<Ipv4Addr> {
    let tasks = table.tasks.values().filter(|task| is_running(task) && wanted(task));
    let endpoints = tasks.flat_map(|task| &task.endpoints);
    endpoints.filter(|endpoint| endpoint.network == *network).map(|endpoint| endpoint.addr).collect()
}

impl Zone {
    fn add(&mut self, network: &NetworkId, name: &str, addresses: &[Ipv4Addr]) {
        let name = name.to_ascii_lowercase();
        let known =
            self.networks.entry(network.clone()).or_default().forward.entry(name.clone()).or_default();
        // A name may stand for several things (an alias that services share): all of them answer.
        known.extend(addresses.iter().copied());
        known.sort_unstable();
        known.dedup();
        self.known.insert(name);
    }

    fn add_reverse(&mut self, network: &NetworkId, addr: Ipv4Addr, name: &str) {
        let names = self.networks.entry(network.clone()).or_default();
        names.reverse.insert(addr, name.to_owned());
    }

    /// The addresses of `name` (without its closing dot) for the asker at `source`.
    pub fn lookup(&self, source: Ipv4Addr, name: &str) -> Answer {
        let Some(asker) = self.askers.get(&source) else { return Answer::Refused };
        let name = name.to_ascii_lowercase();
        let mut found = None::<Vec<Ipv4Addr>>;
        for network in &asker.networks {
            if let Some(addresses) = self.networks.get(network).and_then(|names| names.forward.get(&name)) {
                found.get_or_insert_default().extend(addresses);
            }
        }
        match found {
            Some(addresses) => Answer::Addresses(addresses),
            // Names of this cluster don't leave it, and `tasks.NAME` is nobody else's.
            None if self.known.contains(&name) || is_tasks_name(&name) => Answer::NoName,
            None => asker.elsewhere(),
        }
    }

    /// The name of `addr` for the asker at `source`.
    pub fn lookup_reverse(&self, source: Ipv4Addr, addr: Ipv4Addr) -> Answer {
        let Some(asker) = self.askers.get(&source) else { return Answer::Refused };
        let mut names = asker.networks.iter().filter_map(|network| self.networks.get(network));
        match names.find_map(|names| names.reverse.get(&addr)) {
            Some(name) => Answer::Name(name.clone()),
            None => asker.elsewhere(),
        }
    }

    /// Whether a question of another kind, that the zone has no answer to, may go to the host's resolvers.
    pub fn lookup_other(&self, source: Ipv4Addr) -> Answer {
        self.askers.get(&source).map_or(Answer::Refused, Asker::elsewhere)
    }
}

impl Asker {
    /// What lies outside the zone: a task on internal networks alone has no outside.
    fn elsewhere(&self) -> Answer {
        if self.external { Answer::Forward } else { Answer::NoName }
    }
}

fn is_tasks_name(name: &str) -> bool {
    name.strip_prefix("tasks.").is_some_and(|rest| !rest.contains('.'))
}

#[cfg(test)]
mod tests {
    use mesh_api::table::{ClusterRecord, EndpointRecord, NetworkRecord, ServiceRecord, VipRecord};

    use super::*;

    fn network(id: &str, internal: bool, ingress: bool) -> NetworkRecord {
        NetworkRecord { id: id.into(), name: id.to_owned(), vni: 4097, subnets: vec![], internal, ingress }
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
        }
    }

    fn task(id: &str, service: &str, observed: TaskState, endpoints: &[(&str, [u8; 4])]) -> TaskRecord {
        let endpoints = endpoints
            .iter()
            .map(|(network, addr)| EndpointRecord { network: (*network).into(), addr: (*addr).into() });
        TaskRecord {
            id: id.into(),
            name: format!("{service}.1.{id}"),
            service: service.into(),
            slot: 1,
            node: "n".into(),
            incarnation: 1,
            desired: TaskState::Running,
            observed,
            endpoints: endpoints.collect(),
            spec: None,
        }
    }

    const WEB_VIP: [u8; 4] = [10, 0, 1, 2];
    const ASKER: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 2);
    const INNER: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 3);

    /// `web` (VIP) and `db` (dnsrr) on `front`; `db` on `back`, which is internal; tasks of web and of back ask.
    fn example() -> Zone {
        let mut table = Table::new(ClusterRecord { id: "c".into(), hash_seed: 0, data_path_port: 4789 });
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
            endpoint("abcdefghijklmnop", "front", Ipv4Addr::new(169, 254, 64, 4)),
            endpoint("c1", "back", INNER),
        ];
        zone(&table, &local)
    }

    fn addresses(list: &[[u8; 4]]) -> Answer {
        Answer::Addresses(list.iter().map(|bytes| Ipv4Addr::from(*bytes)).collect())
    }

    #[test]
    fn names_resolve_within_the_askers_networks() {
        let zone = example();
        let cases: &[(Ipv4Addr, &str, Answer)] = &[
            (ASKER, "web", addresses(&[WEB_VIP])),
            (ASKER, "WEB", addresses(&[WEB_VIP])),
            (ASKER, "web-alias", addresses(&[WEB_VIP])),
            (ASKER, "tasks.web", addresses(&[[10, 0, 1, 3]])),
            (ASKER, "db", addresses(&[[10, 0, 1, 7], [10, 0, 1, 8]])),
            (ASKER, "tasks.db", addresses(&[[10, 0, 1, 7], [10, 0, 1, 8]])),
            (ASKER, "web.1.abcdefghijklmnop", addresses(&[[10, 0, 1, 3]])),
            (ASKER, "abcdefghijkl", addresses(&[[10, 0, 1, 3]])),
            (INNER, "db", addresses(&[[10, 0, 2, 7], [10, 0, 2, 8]])),
            (INNER, "cache", addresses(&[[10, 0, 2, 9]])),
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
            assert_eq!(zone.lookup(*source, name), *expected, "{name} from {source}");
        }
    }

    #[test]
    fn addresses_resolve_to_names_within_the_askers_networks() {
        let zone = example();
        let name = |text: &str| Answer::Name(text.to_owned());
        assert_eq!(zone.lookup_reverse(ASKER, WEB_VIP.into()), name("Web"));
        assert_eq!(zone.lookup_reverse(ASKER, [10, 0, 1, 3].into()), name("Web.1.abcdefghijklmnop"));
        assert_eq!(zone.lookup_reverse(INNER, [10, 0, 1, 3].into()), Answer::NoName);
        assert_eq!(zone.lookup_reverse(ASKER, [192, 0, 2, 1].into()), Answer::Forward);
    }

    #[test]
    fn any_alias_of_a_task_asks_for_all_its_networks() {
        assert_eq!(example().lookup(Ipv4Addr::new(169, 254, 64, 4), "web"), addresses(&[WEB_VIP]));
    }
}
