//! What plans hold, on a small table that the layout's tests share.

use std::net::Ipv6Addr;

use mesh_api::table::{
    Affinity, BalancingRecord, ClusterRecord, EndpointMode, EndpointRecord, NetworkRecord, NodeRecord,
    NodeState, PortRecord, Protocol, PublishMode, ReturnPath, Role, SourceRule, Subnet6Record, SubnetRecord,
    TaskRecord, TaskState, VipRecord, WEIGHT_MAX,
};
use mesh_common::map::{
    IFACE_INTERNAL, PROTO_TCP, RULE_ALLOW, RULE_DENY, SERVICE_ADDRESSES, SERVICE_AFFINITY, SERVICE_DIRECT,
    SERVICE_SOURCES,
};

use super::*;

pub(crate) fn node(id: &str, last: u8) -> NodeRecord {
    NodeRecord {
        id: id.into(),
        hostname: id.to_owned(),
        role: Role::Worker,
        vtep: Ipv4Addr::new(198, 18, 0, last).into(),
        state: NodeState::Ready,
        wireguard: Vec::new(),
        manager: None,
    }
}

fn network(id: &str, vni: u32, third: u8) -> NetworkRecord {
    let cidr = format!("10.0.{third}.0/24").parse().unwrap();
    let subnet6 = (id == "ingress").then(|| Subnet6Record {
        cidr: "fd00:7::/64".parse().unwrap(),
        gateway: "fd00:7::a00:1".parse().unwrap(),
    });
    NetworkRecord {
        id: id.into(),
        name: id.to_owned(),
        vni,
        subnets: vec![SubnetRecord { cidr, gateway: Ipv4Addr::new(10, 0, third, 1) }],
        subnet6,
        internal: false,
        ingress: id == "ingress",
        mtu: None,
        encrypted: false,
    }
}

pub(crate) fn task(number: u32, node: &str, observed: TaskState) -> TaskRecord {
    let last = 10 + number as u8;
    let endpoint = |network: &str, third| EndpointRecord {
        network: network.into(),
        addr: Ipv4Addr::new(10, 0, third, last),
    };
    TaskRecord {
        id: format!("t{number}").as_str().into(),
        name: format!("web.{number}").into(),
        service: "web".into(),
        slot: u64::from(number),
        node: node.into(),
        incarnation: number,
        desired: TaskState::Running,
        observed,
        weight: WEIGHT_MAX,
        endpoints: Box::new([endpoint("ingress", 0), endpoint("back", 1)]),
        spec: None,
    }
}

/// Two nodes; the service `web` on `ingress`, of both families, and `back`, published as 8080 on every node and as 9090
/// on its own tasks' nodes; task 1 on n1, tasks 2 and 3 on n2.
pub(crate) fn table() -> Table {
    let (data_path_port, return_path) = (4789, ReturnPath::Tunnel);
    let cluster = ClusterRecord { id: "c".into(), hash_seed: 1, data_path_port, return_path, key_epoch: 0 };
    let mut table = Table::new(cluster);
    let port = |mode, published| PortRecord {
        name: "".into(),
        protocol: Protocol::Tcp,
        target: 80,
        published,
        mode,
    };
    let vip = |network: &str, addr| VipRecord { network: network.into(), addr: Some(addr), aliases: vec![] };
    let service = ServiceRecord {
        id: "web".into(),
        name: "web".to_owned(),
        stack: "".into(),
        endpoint_mode: EndpointMode::Vip,
        vips: vec![vip("ingress", Ipv4Addr::new(10, 0, 0, 2)), vip("back", Ipv4Addr::new(10, 0, 1, 2))],
        ports: vec![port(PublishMode::Ingress, 8080), port(PublishMode::Host, 9090)],
        balancing: BalancingRecord::default(),
    };
    table.services.insert(service.id.clone(), service);
    for node in [node("n1", 11), node("n2", 12)] {
        table.nodes.insert(node.id.clone(), node);
    }
    for network in [network("ingress", 4096, 0), network("back", 4097, 1)] {
        table.networks.insert(network.id.clone(), network);
    }
    for (number, node) in [(1, "n1"), (2, "n2"), (3, "n2")] {
        let task = task(number, node, TaskState::Running);
        table.tasks.insert(task.id.clone(), task);
    }
    table
}

/// n1, with its task attached.
pub(crate) fn local() -> Local {
    let endpoint = |network: &str, third, ifindex, alias| LocalEndpoint {
        task: "t1".into(),
        network: network.into(),
        addr: Ipv4Addr::new(10, 0, third, 11),
        ifindex,
        alias: Ipv4Addr::new(169, 254, 64, alias),
    };
    Local {
        node: "n1".into(),
        vtep: Ipv4Addr::new(198, 18, 0, 11).into(),
        wireguard: None,
        addresses: vec![Ipv4Addr::new(198, 18, 0, 11).into(), "2001:db8::11".parse().unwrap()],
        endpoints: vec![endpoint("ingress", 0, 7, 3), endpoint("back", 1, 8, 4)],
        absent: BTreeSet::new(),
        silent: BTreeSet::new(),
        answering: BTreeSet::new(),
    }
}

fn web(table: &Table, local: &Local) -> Fragment {
    plan(table, local).fragments[&"web".into()].clone()
}

fn balancing(change: impl FnOnce(&mut BalancingRecord)) -> Table {
    let mut table = table();
    change(&mut table.services.get_mut(&"web".into()).unwrap().balancing);
    table
}

fn cluster(vni: u32) -> BalancerKey {
    BalancerKey { vni, scope: PublishScope::Cluster }
}

const NODE: BalancerKey = BalancerKey { vni: 4096, scope: PublishScope::Node };

fn port<A: mesh_common::addr::Address>(published: u16) -> PortKey {
    PortKey::new::<A>(PROTO_TCP, Be16::new(published))
}

fn incarnations(fragment: &Fragment, key: BalancerKey) -> Vec<u32> {
    fragment.serving(key).map(|(backend, ..)| backend.incarnation).collect()
}

fn attachment(fragment: &Fragment, incarnation: u32, vni: u32) -> Option<Attachment> {
    fragment.attachments.get(&AttachmentKey { incarnation, vni }).copied()
}

#[test]
fn running_tasks_of_all_nodes_serve_a_published_port() {
    let plan = plan(&table(), &local());
    let web = &plan.fragments[&"web".into()];
    let balancer = &web.balancers[&cluster(4096)];
    assert_eq!(balancer.ports[&port::<Be32>(8080)].get(), 80);
    assert_eq!(incarnations(web, cluster(4096)), [1, 2, 3]);
    let there = Ipv4Addr::new(198, 18, 0, 12).into();
    assert_eq!(attachment(web, 2, 4096).unwrap().place, Place::There(there));
    assert_eq!(plan.peers, [(PeerKey { vtep: there, encrypted: false }, vec![there])].into());
}

#[test]
fn a_network_of_both_families_answers_in_both() {
    let web = web(&table(), &local());
    let ip6 = |text: &str| Some(Ip6::from(text.parse::<Ipv6Addr>().unwrap()));
    let (ingress, back) = (&web.balancers[&cluster(4096)], &web.balancers[&cluster(4097)]);
    assert_eq!([ingress.vip6, back.vip6], [ip6("fd00:7::a00:2"), None]);
    assert_eq!([ingress.ports.len(), back.ports.len()], [2, 0]);
    assert_eq!(ingress.ports[&port::<Ip6>(8080)].get(), 80);
    assert_eq!(web.balancers[&NODE].ports[&port::<Ip6>(9090)].get(), 80);
    assert_eq!(attachment(&web, 2, 4096).unwrap().addr6, ip6("fd00:7::a00:c"));
    assert_eq!(attachment(&web, 2, 4097).unwrap().addr6, None);
}

#[test]
fn a_service_to_which_nothing_leads_takes_no_balancer() {
    let mut table = table();
    let service = table.services.get_mut(&"web".into()).unwrap();
    service.ports.clear();
    assert_eq!(web(&table, &local()).balancers.len(), 2);
    table.services.get_mut(&"web".into()).unwrap().endpoint_mode = EndpointMode::Dnsrr;
    let web = web(&table, &local());
    assert_eq!((web.balancers.len(), web.attachments.len()), (0, 6));
}

#[test]
fn a_port_in_host_mode_leads_to_this_nodes_tasks_alone() {
    let web = web(&table(), &local());
    assert_eq!(web.balancers[&NODE].ports[&port::<Be32>(9090)].get(), 80);
    assert_eq!(incarnations(&web, NODE), [1]);
}

#[test]
fn a_task_told_to_stop_drains() {
    let mut table = table();
    table.tasks.get_mut(&"t2".into()).unwrap().desired = TaskState::Shutdown;
    let web = web(&table, &local());
    assert_eq!(incarnations(&web, cluster(4096)), [1, 3]);
    assert_eq!(attachment(&web, 2, 4096).unwrap().part, Part::Draining);
    assert_eq!(web.places(cluster(4096)).count(), 3);
}

#[test]
fn tasks_outlive_their_services_record() {
    let mut table = table();
    table.services.clear();
    table.tasks.values_mut().for_each(|task| task.desired = TaskState::Remove);
    let web = web(&table, &local());
    assert!(web.balancers.is_empty());
    assert_eq!(web.attachments.len(), 6);
    assert!(web.attachments.values().all(|attachment| attachment.part == Part::Draining));
}

#[test]
fn tasks_that_start_or_ended_get_nothing() {
    let mut table = table();
    table.tasks.get_mut(&"t1".into()).unwrap().observed = TaskState::Starting;
    let fragment = web(&table, &local());
    assert_eq!(incarnations(&fragment, cluster(4096)), [2, 3]);
    // The one that starts can be reached by its own address.
    assert_eq!(attachment(&fragment, 1, 4097).unwrap().part, Part::None);
    table.tasks.get_mut(&"t3".into()).unwrap().observed = TaskState::Failed;
    assert_eq!(attachment(&web(&table, &local()), 3, 4097), None);
}

#[test]
fn tasks_of_a_node_that_the_managers_lost_drain_while_its_host_answers() {
    let mut table = table();
    table.nodes.get_mut(&"n2".into()).unwrap().state = NodeState::Down;
    let answering = BTreeSet::from([Ipv4Addr::new(198, 18, 0, 12).into()]);
    let answered = Local { answering, ..local() };
    let parts = |local: &Local| [1, 2, 3].map(|one| attachment(&web(&table, local), one, 4096).unwrap().part);
    let serving = Part::Serving { weight: WEIGHT_MAX };
    assert_eq!(incarnations(&web(&table, &answered), cluster(4096)), [1]);
    assert_eq!(parts(&answered), [serving, Part::Draining, Part::Draining]);
    // Flows to one that doesn't answer end at once, and those to one that never did: its host may be gone as well.
    for unheard in [deaf_to(&[12]), local()] {
        assert_eq!(parts(&unheard), [serving, Part::None, Part::None]);
    }
    // Whether others serve or not.
    table.tasks.remove(&"t1".into());
    assert!(incarnations(&web(&table, &answered), cluster(4096)).is_empty());
}

#[test]
fn a_task_that_is_not_where_the_table_has_it_gets_nothing_in_that_network() {
    let key = AttachmentKey { incarnation: 2, vni: 4097 };
    let local = Local { absent: BTreeSet::from([key]), ..local() };
    let web = web(&table(), &local);
    assert_eq!(attachment(&web, 2, 4097), None);
    assert_eq!(incarnations(&web, cluster(4097)), [1, 3]);
    assert_eq!(incarnations(&web, cluster(4096)), [1, 2, 3]);
}

/// n1, which doesn't hear the nodes with these last numbers of their VTEPs.
fn deaf_to(numbers: &[u8]) -> Local {
    let silent = numbers.iter().map(|last| Ipv4Addr::new(198, 18, 0, *last).into());
    Local { silent: silent.collect(), ..local() }
}

#[test]
fn tasks_of_a_silent_node_keep_what_they_have_and_get_nothing_new_while_others_serve() {
    let mut table = table();
    for (number, node_id) in [(4, "n3"), (5, "n3")] {
        table.tasks.insert(format!("t{number}").as_str().into(), task(number, node_id, TaskState::Running));
    }
    table.nodes.insert("n3".into(), node("n3", 13));
    table.tasks.get_mut(&"t5".into()).unwrap().desired = TaskState::Shutdown;
    let heard = web(&table, &local());
    let deaf = web(&table, &deaf_to(&[13]));
    for vni in [4096, 4097] {
        assert_eq!(incarnations(&heard, cluster(vni)), [1, 2, 3, 4]);
        assert_eq!(incarnations(&deaf, cluster(vni)), [1, 2, 3]);
        assert_eq!(attachment(&deaf, 4, vni).unwrap().part, Part::Serving { weight: WEIGHT_MAX });
        assert_eq!((heard.places(cluster(vni)).count(), deaf.places(cluster(vni)).count()), (5, 3));
    }
    let avoided: Vec<_> = deaf.avoided().map(|key| (key.incarnation, key.vni)).collect();
    assert_eq!(avoided, [(4, 4096), (4, 4097), (5, 4096), (5, 4097)]);
    assert_eq!(heard.avoided().count(), 0);
    assert_eq!(heard.balancers, deaf.balancers);
    assert_eq!(web(&table, &deaf_to(&[])), heard);
}

#[test]
fn a_service_whose_every_task_is_on_a_silent_node_keeps_them() {
    let mut table = table();
    table.tasks.remove(&"t1".into());
    let deaf = web(&table, &deaf_to(&[12]));
    assert_eq!(incarnations(&deaf, cluster(4096)), [2, 3]);
    assert_eq!((deaf.places(cluster(4096)).count(), deaf.avoided().count()), (2, 0));
    // A task that drains, or starts, is no other.
    table.tasks.insert("t1".into(), task(1, "n1", TaskState::Running));
    table.tasks.get_mut(&"t1".into()).unwrap().desired = TaskState::Shutdown;
    assert_eq!(incarnations(&web(&table, &deaf_to(&[12])), cluster(4096)), [2, 3]);
    table.tasks.insert("t1".into(), task(1, "n1", TaskState::Starting));
    assert_eq!(incarnations(&web(&table, &deaf_to(&[12])), cluster(4096)), [2, 3]);
    // The node's own address says nothing of its own tasks.
    assert_eq!(incarnations(&web(&self::table(), &deaf_to(&[11])), cluster(4096)), [1, 2, 3]);
}

#[test]
fn a_task_of_this_node_without_an_interface_gets_nothing() {
    let plan = plan(&table(), &Local { endpoints: vec![], ..local() });
    assert_eq!(incarnations(&plan.fragments[&"web".into()], cluster(4096)), [2, 3]);
    assert!(plan.local.v4.ifaces.is_empty() && plan.local.v6.aliases.is_empty());
}

#[test]
fn an_interface_knows_its_network() {
    let mut table = table();
    table.networks.get_mut(&"back".into()).unwrap().internal = true;
    let LocalPlan { v4, v6 } = plan(&table, &local()).local;
    let iface = v4.ifaces[&8];
    assert_eq!((iface.vni, iface.flags, iface.incarnation), (4097, IFACE_INTERNAL, 1));
    assert_eq!(iface.gateway, Be32::ipv4(10, 0, 1, 1));
    assert_eq!(iface.mask, Be32::ipv4(255, 255, 255, 0));
    assert_eq!(v4.aliases[&Be32::ipv4(169, 254, 64, 4)].ifindex, 8);
    assert_eq!((v4.addresses.len(), v6.addresses.len()), (1, 1));

    assert_eq!(v6.ifaces.keys().collect::<Vec<_>>(), [&7]);
    let text = |addr: Ip6| Ipv6Addr::from(addr).to_string();
    let iface = v6.ifaces[&7];
    assert_eq!([iface.addr, iface.gateway].map(text), ["fd00:7::a00:b", "fd00:7::a00:1"]);
    assert_eq!([iface.mask, iface.alias].map(text), ["ffff:ffff:ffff:ffff::", "fd73:686f:616c:1::a9fe:4003"]);
    assert_eq!(v6.aliases[&iface.alias].addr, iface.addr);
}

#[test]
fn flags_follow_the_services_record() {
    let table = balancing(|balancing| {
        (balancing.return_path, balancing.affinity) = (ReturnPath::Direct, Affinity::ClientIp);
    });
    let web = web(&table, &local());
    assert!(web.balancers.values().all(|balancer| balancer.flags == SERVICE_AFFINITY | SERVICE_DIRECT));
}

#[test]
fn source_rules_hold_for_published_ports_with_a_word_on_every_address() {
    let rule = |net: &str, allow| SourceRule { net: net.parse().unwrap(), allow };
    let refused = balancing(|balancing| balancing.sources = vec![rule("192.0.2.0/24", false)]);
    let web4 = web(&refused, &local());
    let v4 = [((0, Be32::default()), RULE_ALLOW), ((24, Be32::ipv4(192, 0, 2, 0)), RULE_DENY)];
    let v6 = [((0, Ip6::default()), RULE_ALLOW)];
    let expected = RulePlan { v4: v4.into_iter().collect(), v6: v6.into_iter().collect() };
    for key in [cluster(4096), NODE] {
        assert_eq!(web4.balancers[&key].sources, expected);
        assert_eq!(web4.balancers[&key].flags, SERVICE_SOURCES);
    }
    assert_eq!(web4.balancers[&cluster(4097)].sources, RulePlan::default());
    assert_eq!(web4.balancers[&cluster(4097)].flags, 0);

    // What is allowed expressly is all that is; what is both, is refused.
    let allowed = balancing(|balancing| {
        balancing.sources =
            vec![rule("2001:db8::/32", true), rule("192.0.2.0/24", false), rule("192.0.2.0/24", true)];
    });
    let sources = &web(&allowed, &local()).balancers[&cluster(4096)].sources;
    assert_eq!(sources.v4[&(0, Be32::default())], RULE_DENY);
    assert_eq!(sources.v4[&(24, Be32::ipv4(192, 0, 2, 0))], RULE_DENY);
    assert_eq!(sources.v6.values().copied().collect::<Vec<_>>(), [RULE_DENY, RULE_ALLOW]);
}

#[test]
fn a_port_answers_on_the_addresses_and_nodes_that_it_is_published_on() {
    let net = "198.18.0.11/32".parse().unwrap();
    let table = balancing(|balancing| {
        balancing.publish_addresses = vec![net];
        balancing.publish_nodes = Some(vec!["n2".into()]);
    });
    let here = web(&table, &local());
    let balancer = &here.balancers[&cluster(4096)];
    assert_eq!(balancer.flags, SERVICE_ADDRESSES);
    assert_eq!(balancer.addresses.v4[&(0, Be32::default())], RULE_DENY);
    assert_eq!(balancer.addresses.v4.values().copied().collect::<Vec<_>>(), [RULE_DENY], "not on n1");
    assert!(!balancer.ports.is_empty(), "n1's tasks serve what comes in by n2");
    assert!(!here.balancers[&NODE].ports.is_empty(), "host mode asks for no node");
    let there = Local { node: "n2".into(), endpoints: vec![], ..local() };
    let balancer = &web(&table, &there).balancers[&cluster(4096)];
    assert_eq!(balancer.addresses.v4[&(32, Be32::ipv4(198, 18, 0, 11))], RULE_ALLOW);
    assert!(!balancer.ports.is_empty());
}

#[test]
fn names_that_lead_nowhere_are_left_out() {
    let mut table = table();
    table.networks.clear();
    let empty = plan(&table, &local());
    assert!(empty.fragments.is_empty());
    assert_eq!((empty.local.v4.ifaces.len(), empty.local.v6.ifaces.len()), (0, 0));
}

#[test]
fn a_fragment_changed_piece_by_piece_is_the_fragment_planned_whole() {
    let mut table = table();
    let local = local();
    let id = ServiceId::from("web");
    let mut fragment = web(&table, &local);
    let steps: [fn(&mut Table); 6] = [
        |table| table.tasks.get_mut(&"t2".into()).unwrap().desired = TaskState::Shutdown,
        |table| drop(table.tasks.remove(&"t3".into())),
        |table| drop(table.tasks.insert("t4".into(), task(4, "n2", TaskState::Running))),
        |table| table.tasks.get_mut(&"t1".into()).unwrap().observed = TaskState::Failed,
        |table| drop(table.services.remove(&"web".into())),
        |table| table.tasks.clear(),
    ];
    for step in steps {
        let before = table.clone();
        step(&mut table);
        let mut touched = Touched::default();
        for task in before.tasks.values().chain(table.tasks.values()) {
            if before.tasks.get(&task.id) != table.tasks.get(&task.id) {
                touched.note_task(task);
            }
        }
        fragment = fragment.changed(&table, &local, &Places::new(&table, &local), &touched, &id);
        let whole = plan(&table, &local).fragments.remove(&id).unwrap_or_default();
        assert_eq!(fragment, whole);
    }
    assert!(fragment.is_empty());
}
