//! Names and addresses, as tasks on one node ask for them.

use mesh_api::table::{
    BalancingRecord, Change, ClusterRecord, Delta, EndpointRecord, NetworkRecord, PortRecord, Protocol,
    PublishMode, ReturnPath, Subnet6Record, SubnetRecord, WEIGHT_MAX,
};

use super::*;

/// The network 10.0.`third`.0/24, with an IPv6 subnet if it is internal.
fn network(id: &str, third: u8, internal: bool, ingress: bool) -> NetworkRecord {
    let gateway = Ipv4Addr::new(10, 0, third, 1);
    let subnet = SubnetRecord { cidr: ipnet::Ipv4Net::new_assert(gateway, 24).trunc(), gateway };
    let subnet6 =
        Subnet6Record { cidr: "fd00:2::/64".parse().unwrap(), gateway: "fd00:2::1".parse().unwrap() };
    NetworkRecord {
        id: id.into(),
        name: if id == "front" { "Front".to_owned() } else { id.to_owned() },
        vni: 4097,
        subnets: vec![subnet],
        subnet6: internal.then_some(subnet6),
        internal,
        ingress,
        mtu: None,
        encrypted: false,
    }
}

pub(in crate::dns) fn service(
    id: &str,
    mode: EndpointMode,
    vips: &[(&str, Option<[u8; 4]>)],
) -> ServiceRecord {
    let vips = vips.iter().map(|(network, addr)| VipRecord {
        network: (*network).into(),
        addr: addr.map(Ipv4Addr::from),
        aliases: vec![format!("{id}-alias")],
    });
    ServiceRecord {
        id: id.into(),
        name: id.to_owned(),
        stack: id.split_once('_').map_or("", |(stack, _)| stack).into(),
        endpoint_mode: mode,
        vips: vips.collect(),
        ports: vec![],
        balancing: BalancingRecord::default(),
    }
}

pub(in crate::dns) fn task(
    id: &str,
    service: &str,
    observed: TaskState,
    endpoints: &[(&str, [u8; 4])],
) -> TaskRecord {
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
pub(in crate::dns) const ASKER: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 3);
pub(in crate::dns) const INNER: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 4);

pub(in crate::dns) fn port(name: &str, protocol: Protocol, target: u16) -> PortRecord {
    PortRecord { name: name.into(), protocol, target, published: 30_000 + target, mode: PublishMode::Ingress }
}

pub(in crate::dns) fn local(task: &str, network: &str, alias: Ipv4Addr) -> LocalEndpoint {
    let (task, network, addr) = (task.into(), network.into(), Ipv4Addr::UNSPECIFIED);
    LocalEndpoint { task, network, addr, ifindex: 1, alias }
}

/// `Web` (VIP) on `Front`; `db` (dnsrr) on `Front` and on `back`, which is internal; `cache` (VIP) on `back`. Tasks of
/// `Web` and of `cache` ask.
pub(in crate::dns) fn example() -> (Table, Zone) {
    let mut table = Table::new(ClusterRecord {
        id: "c".into(),
        hash_seed: 0,
        data_path_port: 4789,
        return_path: ReturnPath::Tunnel,
        key_epoch: 0,
    });
    for record in [
        network("ingress", 0, false, true),
        network("front", 1, false, false),
        network("back", 2, true, false),
    ] {
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
    let local = [
        local("abcdefghijklmnop", "ingress", ASKER),
        local("abcdefghijklmnop", "front", Ipv4Addr::new(169, 254, 64, 5)),
        local("c1", "back", INNER),
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

fn forward() -> Answer {
    Answer::Forward("abcdefghijklmnop".into())
}

#[test]
fn names_resolve_within_the_askers_networks() {
    let (table, zone) = example();
    let cases: &[(Ipv4Addr, &str, Answer)] = &[
        (ASKER, "web", addresses(&[WEB_VIP])),
        (ASKER, "WEB", addresses(&[WEB_VIP])),
        (ASKER, "web-alias", addresses(&[WEB_VIP])),
        (ASKER, "tasks.web", addresses(&[[10, 0, 1, 3]])),
        (ASKER, "tasks.web-alias", addresses(&[[10, 0, 1, 3]])),
        (ASKER, "db", addresses(&[[10, 0, 1, 7], [10, 0, 1, 8]])),
        (ASKER, "tasks.db", addresses(&[[10, 0, 1, 7], [10, 0, 1, 8]])),
        (ASKER, "web.1.abcdefghijklmnop", addresses(&[[10, 0, 1, 3]])),
        (ASKER, "abcdefghijkl", addresses(&[[10, 0, 1, 3]])),
        (ASKER, "abcdefghijklmnop", addresses(&[[10, 0, 1, 3]])),
        (INNER, "db", both(&["10.0.2.7", "10.0.2.8", "fd00:2::a00:207", "fd00:2::a00:208"])),
        (INNER, "cache", both(&["10.0.2.9", "fd00:2::a00:209"])),
        // With the network's name.
        (ASKER, "web.front", addresses(&[WEB_VIP])),
        (ASKER, "tasks.db.Front", addresses(&[[10, 0, 1, 7], [10, 0, 1, 8]])),
        (ASKER, "web.1.abcdefghijklmnop.front", addresses(&[[10, 0, 1, 3]])),
        (ASKER, "db.back", forward()),
        (ASKER, "web.xfront", forward()),
        // On no network of the asker.
        (ASKER, "cache", Answer::NoName),
        (INNER, "web", Answer::NoName),
        (INNER, "abcdefghijkl", Answer::NoName),
        (INNER, "web.1.abcdefghijklmnop", Answer::NoName),
        // Gone, or never there.
        (ASKER, "tasks.nothing", Answer::NoName),
        (ASKER, "tasks.nothing.front", Answer::NoName),
        (ASKER, "web.3.0123456789abcdefghijklmno", Answer::NoName),
        (ASKER, "web.3.0123456789abcdefghijklmno.front", Answer::NoName),
        (ASKER, "0123456789abcdefghijklmno", Answer::NoName),
        // Not the cluster's.
        (ASKER, "example.com", forward()),
        (ASKER, "printer", forward()),
        (ASKER, "", forward()),
        (ASKER, ".", forward()),
        (INNER, "example.com", Answer::NoWayOut),
        (Ipv4Addr::new(169, 254, 64, 99), "web", Answer::Refused),
    ];
    for (source, name, expected) in cases {
        assert_eq!(zone.lookup(&table, *source, name), *expected, "{name} from {source}");
    }
}

/// Whoever calls a service like a site of the world doesn't take it from other networks.
#[test]
fn an_alias_with_dots_means_something_in_its_own_networks_alone() {
    let (mut table, mut zone) = example();
    let mut cache = table.services[&"cache".into()].clone();
    cache.vips[0].aliases = vec!["example.com".to_owned()];
    table.services.insert(cache.id.clone(), cache);
    zone.update(&table, &Touched::all(), &[local("d1", "front", ASKER), local("c1", "back", INNER)]);
    assert_eq!(zone.lookup(&table, INNER, "example.com"), both(&["10.0.2.9", "fd00:2::a00:209"]));
    assert_eq!(zone.lookup(&table, ASKER, "example.com"), Answer::Forward("d1".into()));
}

/// Two stacks and a service outside of any share a network, and call their databases the same.
#[test]
fn an_alias_that_several_services_share_means_the_one_of_the_askers_stack() {
    let (mut table, _) = example();
    table.services.remove(&"db".into());
    let names = ["one_db", "two_db", "db", "one_web", "three_web"];
    for (name, last) in names.into_iter().zip(20..) {
        let mut record = service(name, EndpointMode::Vip, &[("front", Some([10, 0, 1, last]))]);
        let short = name.rsplit('_').next().unwrap_or_default();
        record.vips[0].aliases = vec![short.to_owned()];
        table.services.insert(record.id.clone(), record);
    }
    let source = |last| Ipv4Addr::new(169, 254, 64, last);
    let mut locals = Vec::new();
    for (name, last) in [("one_web", 3), ("three_web", 4), ("db", 5)] {
        let record =
            task(&format!("t{last}"), name, TaskState::Running, &[("front", [10, 0, 1, 100 + last])]);
        locals.push(local(record.id.as_str(), "front", source(last)));
        table.tasks.insert(record.id.clone(), record);
    }
    let mut zone = Zone::default();
    zone.update(&table, &Touched::all(), &locals);
    for (from, name, expected) in [
        (3, "db", vec![20]),
        (3, "tasks.web", vec![103]),
        (3, "two_db", vec![21]),
        (4, "db", vec![20, 21, 22]),
        (4, "web.front", vec![24]),
        (5, "db", vec![22]),
        // The example's own, which is outside of any stack as well.
        (5, "web", vec![2]),
    ] {
        let expected: Vec<_> = expected.into_iter().map(|last| [10, 0, 1, last]).collect();
        assert_eq!(zone.lookup(&table, source(from), name), addresses(&expected), "{name} from {from}");
    }
}

#[test]
fn ports_resolve_to_who_serves_them() {
    let (mut table, mut zone) = example();
    for (id, ports) in [
        (
            "Web",
            vec![port("http", Protocol::Tcp, 80), port("", Protocol::Tcp, 8080), port("", Protocol::Udp, 53)],
        ),
        ("db", vec![port("", Protocol::Tcp, 5432)]),
    ] {
        table.services.get_mut(&id.into()).unwrap().ports = ports;
    }
    zone.update(
        &table,
        &Touched::all(),
        &[local("abcdefghijklmnop", "front", ASKER), local("c1", "back", INNER)],
    );
    let servers = |list: &[(&str, u16, &[&str])]| {
        let server = |(name, port, addresses): &(&str, u16, &[&str])| Server {
            name: (*name).to_owned(),
            port: *port,
            addresses: addresses.iter().map(|addr| addr.parse().unwrap()).collect(),
        };
        Answer::Servers(list.iter().map(server).collect())
    };
    let web = |port| servers(&[("Web.Front", port, &["10.0.1.2"])]);
    let db = [("db.1.d1.Front", 5432, &["10.0.1.7"][..]), ("db.1.d2.Front", 5432, &["10.0.1.8"])];
    let inner = [
        ("db.1.d1.back", 5432, &["10.0.2.7", "fd00:2::a00:207"][..]),
        ("db.1.d2.back", 5432, &["10.0.2.8", "fd00:2::a00:208"]),
    ];
    let tasks = servers(&[("Web.1.abcdefghijklmnop.Front", 80, &["10.0.1.3"])]);
    for (source, name, expected) in [
        (ASKER, "_80._tcp.web", web(80)),
        (ASKER, "_HTTP._TCP.WEB", web(80)),
        (ASKER, "_8080._tcp.web-alias", web(8080)),
        (ASKER, "_8080._tcp.web.front", web(8080)),
        (ASKER, "_53._udp.web", web(53)),
        (ASKER, "_http._tcp.tasks.web", tasks),
        (ASKER, "_5432._tcp.db", servers(&db)),
        (INNER, "_5432._tcp.tasks.db", servers(&inner)),
        (ASKER, "_tcp.web", Answer::Addresses(vec![])),
        (ASKER, "_53._tcp.web", Answer::NoName),
        (ASKER, "_https._tcp.web", Answer::NoName),
        (ASKER, "_._tcp.web", Answer::NoName),
        (ASKER, "80._tcp.web", forward()),
        (INNER, "_80._tcp.web", Answer::NoName),
        (INNER, "_tcp.web", Answer::NoName),
        (INNER, "_80._tcp.tasks.web", Answer::NoName),
        (INNER, "_80._tcp.web.1.abcdefghijklmnop", Answer::NoName),
        (ASKER, "_sip._tcp.example.com", forward()),
    ] {
        assert_eq!(zone.lookup(&table, source, name), expected, "{name} from {source}");
    }
}

#[test]
fn addresses_resolve_to_names_within_the_askers_networks() {
    let (table, zone) = example();
    let name = |text: &str| Answer::Name(text.to_owned());
    let cases = [
        (ASKER, "10.0.1.2", name("Web.Front")),
        (ASKER, "10.0.1.3", name("Web.1.abcdefghijklmnop.Front")),
        // The network's, and nobody's.
        (ASKER, "10.0.1.200", Answer::NoName),
        (ASKER, "10.0.1.4", Answer::NoName),
        (INNER, "fd00:2::1:a00:203", Answer::NoName),
        (INNER, "fd00:2::209", Answer::NoName),
        (ASKER, "192.0.2.1", forward()),
        (ASKER, "fd00:2::a00:203", forward()),
        (INNER, "10.0.1.3", Answer::NoWayOut),
        (INNER, "fd00:2::a00:209", name("cache.back")),
        (INNER, "fd00:2::a00:203", name("cache.1.c1.back")),
    ];
    for (source, addr, expected) in cases {
        assert_eq!(
            zone.lookup_reverse(&table, source, addr.parse().unwrap()),
            expected,
            "{addr} from {source}"
        );
        let Answer::Name(name) = expected else { continue };
        let Answer::Addresses(found) = zone.lookup(&table, source, &name) else { panic!("{name}") };
        assert!(found.contains(&addr.parse().unwrap()), "{name} is not {addr} again");
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
    let opened = table.networks[&front.into()].clone();
    let closed = NetworkRecord { internal: true, ..opened.clone() };
    let steps = [
        vec![Change::Task(Box::new(task("starting", "Web", running, &[(front, [10, 0, 1, 4])])))],
        vec![Change::Task(Box::new(task("d1", "db", TaskState::Failed, &[(front, [10, 0, 1, 7])])))],
        vec![Change::TaskRemoved("d2".into())],
        // Addresses pass on, a VIP's within one step.
        vec![Change::Task(Box::new(task("next", "other", running, &[(front, [10, 0, 1, 8])])))],
        vec![Change::ServiceRemoved("Web".into()), Change::Service(other)],
        vec![Change::Service(renamed)],
        vec![Change::Network(closed)],
        vec![Change::NetworkRemoved(front.into())],
        vec![Change::Network(opened)],
    ];
    let local = [local("abcdefghijklmnop", front, ASKER), local("c1", "back", INNER)];
    for (changes, from) in steps.into_iter().zip(table.index..) {
        let mut touched = Touched::default();
        for change in &changes {
            touched.note(&table, change);
        }
        table.apply(Delta { from, to: from + 1, changes }).unwrap();
        zone.update(&table, &touched, &local);
        assert!(zone.networks.keys().all(|id| has_names(&table, id)), "at {from}");
        let mut fresh = Zone::default();
        fresh.update(&table, &Touched::all(), &local);
        let names =
            ["web", "web-alias", "tasks.web", "db", "db-alias", "tasks.db", "base", "other", "tasks.other"];
        let names = names.into_iter().chain(["starting", "d1", "web.1.starting", "other.1.next", "cache"]);
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
    assert_eq!(zone.lookup(&table, ASKER, "web"), forward());
    assert_eq!(zone.lookup(&table, ASKER, "tasks.other"), addresses(&[[10, 0, 1, 8]]));
}
