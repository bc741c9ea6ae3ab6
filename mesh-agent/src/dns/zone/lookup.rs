//! What a name or an address is for one asker.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mesh_api::id::{ID_LEN, TaskId};
use mesh_api::table::{NetworkRecord, PortRecord, Protocol, ServiceRecord, Subnet6Record, Table, TaskRecord};

use super::{Answer, Asker, Owner, Server, Zone, address, is_running, vip};
use crate::runtime::SHORT_ID_LEN;

/// The zone as one asker sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) zone: &'a Zone,
    pub(super) table: &'a Table,
    pub(super) asker: &'a Asker,
}

/// A network to look in, and the name to look for there.
type Place<'a, 'n> = (&'a NetworkRecord, &'n str);

/// A service that a name stands for in a network.
#[derive(Clone, Copy)]
struct Match<'a> {
    network: &'a NetworkRecord,
    service: &'a ServiceRecord,
    /// Its tasks are asked for, whatever its endpoint mode.
    tasks: bool,
}

/// `_PORT._PROTOCOL.SERVICE`, as of RFC 2782, or what is above such names.
struct PortName<'n> {
    port: Option<&'n str>,
    protocol: Protocol,
    service: &'n str,
}

impl<'a> View<'a> {
    /// What `name`, in lower case, stands for.
    pub(super) fn lookup(self, name: &str) -> Answer {
        let readings = self.readings(name);
        if let Some(addresses) = readings.iter().find_map(|places| self.addresses(places)) {
            return Answer::Addresses(addresses.into_iter().collect());
        }
        if let Some(answer) = self.servers(name) {
            return answer;
        }
        let mut names = readings.iter().flatten().map(|(_, name)| *name);
        if self.is_ours(name) || names.any(is_task_or_tasks) {
            return Answer::NoName;
        }
        self.asker.elsewhere()
    }

    /// The name of an address, with its network's, which makes it resolve to the same address again.
    pub(super) fn lookup_reverse(self, addr: IpAddr) -> Answer {
        for network in self.networks() {
            if let Some(name) = self.owner(network, addr) {
                return Answer::Name(format!("{name}.{}", network.name));
            }
        }
        if self.networks().any(|network| contains(network, addr)) {
            Answer::NoName
        } else {
            self.asker.elsewhere()
        }
    }

    fn owner(self, network: &NetworkRecord, addr: IpAddr) -> Option<&'a str> {
        let addr = match addr {
            IpAddr::V4(addr) => addr,
            IpAddr::V6(addr) => embedded(&network.subnet6?, addr)?,
        };
        match self.zone.networks.get(&network.id)?.owners.get(&addr)? {
            Owner::Service(id) => Some(&self.table.services.get(id)?.name),
            Owner::Task(id) => Some(&self.table.tasks.get(id).filter(|task| is_running(task))?.name),
        }
    }

    fn networks(self) -> impl Iterator<Item = &'a NetworkRecord> {
        self.asker.networks.iter().filter_map(move |id| self.table.networks.get(id))
    }

    /// The ways to read a name, the first that stands for something being the right one: as it is, in all networks; and
    /// where it ends in a network's name, without that in that network.
    fn readings<'n>(self, name: &'n str) -> Vec<Vec<Place<'a, 'n>>> {
        let whole = self.networks().map(|network| (network, name)).collect();
        let within = self.networks().filter_map(|network| {
            let (rest, last) = name.split_at_checked(name.len().checked_sub(network.name.len())?)?;
            let rest = rest.strip_suffix('.').filter(|_| last.eq_ignore_ascii_case(&network.name))?;
            Some(vec![(network, rest)])
        });
        std::iter::once(whole).chain(within).collect()
    }

    /// The addresses that a name stands for in all the places; `None` where nothing is called so.
    fn addresses(self, places: &[Place<'a, '_>]) -> Option<BTreeSet<IpAddr>> {
        let mut found = None::<BTreeSet<IpAddr>>;
        for meant in self.matches(places) {
            let addresses = match meant.vip() {
                Some(vip) => vec![vip],
                None => self.running(meant).filter_map(|task| address(task, &meant.network.id)).collect(),
            };
            let found = found.get_or_insert_default();
            found.extend(addresses.into_iter().flat_map(|addr| both(meant.network, addr)));
        }
        for (network, name) in places {
            let own = task_named(self.table, name).and_then(|task| address(task, &network.id));
            if let Some(addr) = own {
                found.get_or_insert_default().extend(both(network, addr));
            }
        }
        found
    }

    /// The services that a name stands for in the places. Where several share it, those of the asker's own stack are
    /// meant, if there are any; services outside of any stack belong together as well.
    fn matches(self, places: &[Place<'a, '_>]) -> Vec<Match<'a>> {
        let mut matches = Vec::new();
        for (network, name) in places {
            let Some(names) = self.zone.networks.get(&network.id) else { continue };
            let called = |name: &str| names.services.get(name).into_iter().flatten();
            let tasks = name.strip_prefix("tasks.").into_iter().flat_map(called).map(|id| (id, true));
            for (id, tasks) in called(name).map(|id| (id, false)).chain(tasks) {
                let service = self.table.services.get(id);
                matches.extend(service.map(|service| Match { network, service, tasks }));
            }
        }
        let own = self.asker.service.as_ref().and_then(|id| self.table.services.get(id));
        let stack = own.map(|service| &*service.stack).unwrap_or_default();
        let is_own = |meant: &Match<'_>| *meant.service.stack == *stack;
        if matches.iter().any(is_own) {
            matches.retain(is_own);
        }
        matches
    }

    fn running(self, meant: Match<'a>) -> impl Iterator<Item = &'a TaskRecord> {
        let ids = self.zone.tasks.get(&meant.service.id).into_iter().flatten();
        ids.filter_map(move |id| self.table.tasks.get(id)).filter(|task| is_running(task))
    }

    /// Where the port of `_PORT._PROTOCOL.SERVICE` is served; `None` if the name is no such one.
    fn servers(self, name: &str) -> Option<Answer> {
        let PortName { port, protocol, service } = PortName::parse(name)?;
        let readings = self.readings(service);
        let matches =
            readings.iter().map(|places| self.matches(places)).find(|matches| !matches.is_empty())?;
        let Some(port) = port else {
            // It has names below it, and nothing else.
            return Some(Answer::Addresses(Vec::new()));
        };
        let (mut servers, mut has_port) = (BTreeSet::new(), false);
        for meant in matches {
            let is_called = |known: &&PortRecord| {
                let has_name = !known.name.is_empty() && known.name.eq_ignore_ascii_case(port);
                has_name || known.target.to_string() == port
            };
            let ports = meant.service.ports.iter().filter(|known| known.protocol == protocol);
            for known in ports.filter(is_called) {
                has_port = true;
                servers.extend(self.serve(meant, known.target));
            }
        }
        Some(if has_port { Answer::Servers(servers.into_iter().collect()) } else { Answer::NoName })
    }

    fn serve(self, meant: Match<'a>, port: u16) -> Vec<Server> {
        let Match { network, service, .. } = meant;
        let server = |name: &str, addr| Server {
            name: format!("{name}.{}", network.name),
            port,
            addresses: both(network, addr).collect(),
        };
        if let Some(vip) = meant.vip() {
            return vec![server(&service.name, vip)];
        }
        let tasks = self.running(meant);
        tasks.filter_map(|task| Some(server(&task.name, address(task, &network.id)?))).collect()
    }

    /// Whether a name that is nothing to the asker is the cluster's all the same, and does not leave it. A name with
    /// dots may be anybody's: that it is some service's alias on another network says nothing.
    fn is_ours(self, name: &str) -> bool {
        let is_service = |name: &str| {
            !name.contains('.') && self.zone.networks.values().any(|names| names.services.contains_key(name))
        };
        is_service(name)
            || is_task_or_tasks(name)
            || task_named(self.table, name).is_some()
            || PortName::parse(name).is_some_and(|name| self.is_ours(name.service))
    }
}

impl Match<'_> {
    fn vip(&self) -> Option<Ipv4Addr> {
        vip(self.service, &self.network.id).filter(|_| !self.tasks)
    }
}

/// An address of a network, in both families where it has both.
fn both(network: &NetworkRecord, addr: Ipv4Addr) -> impl Iterator<Item = IpAddr> + use<> {
    let addr6 = network.subnet6.map(|subnet| IpAddr::V6(subnet.addr_of(addr)));
    std::iter::once(IpAddr::V4(addr)).chain(addr6)
}

fn contains(network: &NetworkRecord, addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => network.subnets.iter().any(|subnet| subnet.cidr.contains(&addr)),
        IpAddr::V6(addr) => network.subnet6.is_some_and(|subnet| subnet.cidr.contains(&addr)),
    }
}

impl<'n> PortName<'n> {
    fn parse(name: &'n str) -> Option<Self> {
        let (first, rest) = name.split_once('.')?;
        if let Some(protocol) = protocol(first) {
            return Some(Self { port: None, protocol, service: rest });
        }
        let port = first.strip_prefix('_')?;
        let (second, service) = rest.split_once('.')?;
        Some(Self { port: Some(port), protocol: protocol(second)?, service })
    }
}

fn protocol(label: &str) -> Option<Protocol> {
    match label {
        "_tcp" => Some(Protocol::Tcp),
        "_udp" => Some(Protocol::Udp),
        _ => None,
    }
}

/// The running task of that name (in lower case), which ends in its id, or of that id, in full or short.
fn task_named<'t>(table: &'t Table, name: &str) -> Option<&'t TaskRecord> {
    let id = TaskId::from(name.rsplit_once('.').map_or(name, |(_, id)| id));
    let task = if name.contains('.') {
        table.tasks.get(&id).filter(|task| task.name.eq_ignore_ascii_case(name))
    } else {
        let next = table.tasks.range(id..).next().map(|(_, task)| task);
        let short = |task: &TaskRecord| task.id.as_str().chars().take(SHORT_ID_LEN).eq(name.chars());
        next.filter(|task| task.id.as_str() == name || short(task))
    };
    task.filter(|task| is_running(task))
}

/// Whether a name is of the form of a task's, or of a service's tasks: nobody else's are.
fn is_task_or_tasks(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    let is_id = last.len() == ID_LEN && last.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_id || name.strip_prefix("tasks.").is_some_and(|service| !service.contains('.'))
}

/// The IPv4 address that `addr` is made from, if it is one of the subnet's.
fn embedded(subnet: &Subnet6Record, addr: Ipv6Addr) -> Option<Ipv4Addr> {
    let [.., a, b, c, d] = addr.octets();
    let embedded = Ipv4Addr::new(a, b, c, d);
    (subnet.addr_of(embedded) == addr).then_some(embedded)
}
