//! Which addresses are given out, and when a freed one is given out again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use mesh_api::id::ServiceId;
use mesh_api::table::TaskState;
use proptest::prelude::*;

use super::*;
use crate::command::Action;
use crate::model::{Ipam6Config, Mode};
use crate::testing::{World, attachment, network, service};

fn addr(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

fn config(subnet: &str) -> IpamConfig {
    IpamConfig { subnet: Some(subnet.parse().unwrap()), ..IpamConfig::default() }
}

fn world_with(ipam: Vec<IpamConfig>) -> World {
    let mut world = World::new(&["n1"]);
    let mut spec = network("small");
    spec.ipam = ipam;
    world.must(Action::CreateNetwork { id: "small".into(), spec });
    world
}

/// Makes a service of no task, and answers its VIP.
fn take(world: &mut World, name: &str) -> Option<Ipv4Addr> {
    let mut spec = service(name, 0);
    spec.task.networks.push(attachment("small"));
    let id = world.create_service(spec);
    world.state.services[&id].endpoint.vips[0].addr
}

fn free(world: &mut World, name: &str) {
    world.must(Action::RemoveService { id: format!("svc-{name}").as_str().into() });
}

fn last_bytes(addrs: impl IntoIterator<Item = Option<Ipv4Addr>>) -> Vec<u8> {
    addrs.into_iter().map(|addr| addr.unwrap().octets()[3]).collect()
}

#[test]
fn freed_addresses_are_the_last_to_be_given_out_again_and_the_last_of_them_the_very_last() {
    let mut world = world_with(vec![config("192.0.2.0/29")]);
    assert_eq!(last_bytes(["a", "b", "c"].map(|name| take(&mut world, name))), [2, 3, 4]);
    for name in ["c", "a", "b"] {
        free(&mut world, name);
    }
    world.acknowledge();
    assert_eq!(last_bytes(["d", "e", "f", "g", "h"].map(|name| take(&mut world, name))), [5, 6, 4, 2, 3]);
    assert_eq!(take(&mut world, "i"), None);
    world.check_invariants();
}

#[test]
fn a_freed_address_waits_for_all_nodes() {
    let mut world = world_with(vec![config("192.0.2.0/30")]);
    assert_eq!(take(&mut world, "a"), Some(addr("192.0.2.2")));
    free(&mut world, "a");
    let freed_at = world.state.index;
    assert!(!has_free_address(&world.state, &"small".into()));
    assert_eq!(take(&mut world, "b"), None);
    assert!(awaits(&world.state, freed_at) && !awaits(&world.state, freed_at - 1));
    world.must(Action::Acknowledge { index: freed_at - 1 });
    assert!(!has_free_address(&world.state, &"small".into()));
    world.must(Action::Acknowledge { index: u64::MAX });
    assert_eq!(
        world.state.counters.acknowledged,
        world.state.index - 1,
        "nobody has applied what is to come"
    );
    assert!(has_free_address(&world.state, &"small".into()) && !awaits(&world.state, u64::MAX));
    world.must(Action::Acknowledge { index: 0 });
    while world.orchestrate().0 {}
    assert_eq!(
        world.state.services[&ServiceId::from("svc-b")].endpoint.vips[0].addr,
        Some(addr("192.0.2.2"))
    );
    assert!(world.state.freed.is_empty());
    world.check_invariants();
}

#[test]
fn a_network_that_goes_takes_its_resting_addresses_along() {
    let mut world = world_with(vec![config("192.0.2.0/29")]);
    take(&mut world, "a");
    free(&mut world, "a");
    world.must(Action::RemoveNetwork { id: "small".into() });
    assert!(world.state.freed.is_empty() && !awaits(&world.state, u64::MAX));
    world.check_invariants();
}

#[test]
fn ranges_gateways_and_auxiliary_addresses_are_kept_to_over_several_subnets() {
    let mut first = config("192.0.2.0/24");
    first.range = Some("192.0.2.64/29".parse().unwrap());
    first.gateway = Some(addr("192.0.2.66"));
    first.aux.insert("router".into(), addr("192.0.2.65"));
    first.aux.insert("outside".into(), addr("192.0.2.7"));
    let mut world = world_with(vec![first, config("198.51.100.0/30")]);
    assert_eq!(address_capacity(world.state.network_by_name("small").unwrap()), 7);
    let taken: Vec<String> =
        (0..7).map(|at| take(&mut world, &format!("s{at}")).unwrap().to_string()).collect();
    let mut expected: Vec<String> = [67, 68, 69, 70, 71].map(|end| format!("192.0.2.{end}")).into();
    expected.insert(5, "192.0.2.64".into());
    expected.push("198.51.100.2".into());
    assert_eq!(taken, expected);
    assert_eq!(take(&mut world, "more"), None);
    world.check_invariants();
}

#[test]
fn an_auxiliary_ipv6_address_keeps_the_task_that_would_have_it_away() {
    let mut world = World::new(&[]);
    let mut spec = network("small");
    spec.ipam.push(config("10.9.0.0/29"));
    let aux = ["fd00:9::a09:2", "fd00:9::5"].map(|text| (text.to_owned(), text.parse().unwrap()));
    let subnet = Some("fd00:9::/64".parse().unwrap());
    spec.ipam6 = Some(Ipam6Config { subnet, gateway: None, aux: aux.into() });
    let mut foreign = spec.clone();
    foreign.ipam6.as_mut().unwrap().aux.insert("far".into(), "fd00:a::1".parse().unwrap());
    let create = |spec| Action::CreateNetwork { id: "small".into(), spec };
    let refusal = world.try_to(create(foreign)).unwrap_err().to_string();
    assert_eq!(
        refusal,
        "IPAM.Config.AuxiliaryAddresses: fd00:a::1 (far) is not a host address of fd00:9::/64"
    );
    world.must(create(spec));
    assert_eq!(take(&mut world, "a"), Some(addr("10.9.0.3")));
    assert_eq!(address_capacity(world.state.network_by_name("small").unwrap()), 4);
    world.check_invariants();
}

#[test]
fn wrong_auxiliary_addresses_are_refused() {
    for (aux, expected) in [
        ("192.0.2.8", "192.0.2.8 (x) is not a host address of 192.0.2.0/29"),
        ("192.0.2.0", "192.0.2.0 (x) is not a host address of 192.0.2.0/29"),
        ("192.0.2.7", "192.0.2.7 (x) is not a host address of 192.0.2.0/29"),
        ("192.0.2.1", "192.0.2.1 (x) is the gateway, which no task gets"),
    ] {
        let mut config = config("192.0.2.0/29");
        config.aux.insert("x".into(), addr(aux));
        let spec = crate::model::NetworkSpec { ipam: vec![config], ..network("small") };
        let refusal = World::new(&[]).try_to(Action::CreateNetwork { id: "small".into(), spec }).unwrap_err();
        let text = refusal.to_string();
        assert!(text.starts_with(&format!("IPAM.Config.AuxiliaryAddresses: {expected}")), "{text}");
    }
}

#[test]
fn churn_in_a_large_subnet_leaves_a_bounded_number_of_resting_addresses() {
    let mut world = world_with(vec![config("10.64.0.0/16")]);
    let id: NetworkId = "small".into();
    let index = world.state.index;
    let mut draft = Draft::new(world.state.clone(), index + 1, 0);
    for _ in 0..RESTING_MAX + 10 {
        let addr = draft.take_address(&id).unwrap();
        draft.rest([(&id, addr)].into_iter());
    }
    world.state = State { index: index + 1, ..draft.state };
    assert_eq!(world.state.freed[&id].len(), RESTING_MAX + 10, "none is given up before all nodes know");
    world.acknowledge();
    assert_eq!(world.state.freed[&id].len(), RESTING_MAX);
    world.check_invariants();
}

#[test]
fn exhaustion_is_an_error_of_the_task_and_heals_when_addresses_come_free() {
    let mut world = world_with(vec![config("192.0.2.0/29")]);
    let mut web = service("web", 6);
    web.task.networks.push(attachment("small"));
    let id = world.create_service(web);
    let mut other = service("other", 1);
    other.task.networks.push(attachment("small"));
    let warnings = world.must(Action::CreateService { id: "other".into(), spec: Box::new(other) }).warnings;
    assert!(warnings.is_empty(), "{warnings:?}");
    while world.orchestrate().0 {}
    let waiting = |world: &World| {
        let waiting = world.state.tasks.values().filter(|task| task.status.state == TaskState::New);
        waiting.map(|task| task.status.err.clone()).collect::<Vec<_>>()
    };
    let errors = waiting(&world);
    assert_eq!(errors.len(), 4, "five addresses: two VIPs and three tasks");
    assert!(errors.iter().all(|err| err.starts_with("network small has no free address:")), "{errors:?}");
    let late = service("late", 0);
    let mut late = crate::model::ServiceSpec { mode: Mode::Global, ..late };
    late.task.networks.push(attachment("small"));
    let warnings = world.must(Action::CreateService { id: "late".into(), spec: Box::new(late) }).warnings;
    assert!(warnings[0].starts_with("network small has no free address for the service's virtual IP"));

    let gone =
        world.state.tasks.values().find(|task| task.status.state == TaskState::Assigned).cloned().unwrap();
    world.report(&gone, TaskState::Running);
    world.report(&gone, TaskState::Failed);
    while world.orchestrate().0 {}
    assert_eq!(
        waiting(&world).len(),
        6,
        "what was freed waits for the nodes: 4, the failed one's successor, the late one"
    );
    world.acknowledge();
    while world.orchestrate().0 {}
    assert_eq!(waiting(&world).len(), 6, "a VIP comes before tasks");
    let vip = world.state.services[&ServiceId::from("late")].endpoint.vips[0].addr;
    assert_eq!(vip, gone.endpoints[0].addr);

    world.update_service(&id, |spec| spec.mode = Mode::Replicated { replicas: 0 });
    world.orchestrate();
    for task in world.state.tasks.values().cloned().collect::<Vec<_>>() {
        if task.status.state == TaskState::Assigned && task.desired > TaskState::Running {
            world.report(&task, TaskState::Shutdown);
        }
    }
    world.acknowledge();
    while world.orchestrate().0 {}
    assert_eq!(waiting(&world), Vec::<String>::new());
    world.check_invariants();
}

#[test]
fn a_live_network_gets_another_subnet() {
    let mut world = world_with(Vec::new());
    let mut spec = world.state.network_by_name("small").unwrap().spec.clone();
    spec.name = "tiny".into();
    spec.ipam = vec![config("192.0.2.0/30")];
    spec.ipam6 = Some(Ipam6Config { subnet: Some("fd00:9::/64".parse().unwrap()), ..Ipam6Config::default() });
    world.must(Action::CreateNetwork { id: "tiny".into(), spec });
    let mut web = service("web", 2);
    web.task.networks.push(attachment("tiny"));
    world.create_service(web);
    while world.orchestrate().0 {}
    let placed = |world: &World| {
        let placed = world.state.tasks.values().filter(|task| task.status.state == TaskState::Assigned);
        placed.map(|task| task.endpoints[0].addr.unwrap().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(placed(&world).len(), 0);
    let add = |network: &str, config| Action::AddSubnet { network: network.into(), config };
    for (wrong, expected) in [
        ("192.0.2.0/29", "192.0.2.0/29 overlaps 192.0.2.0/30"),
        ("10.0.0.0/25", "10.0.0.0/25 overlaps 10.0.0.0/24"),
    ] {
        let refusal = world.try_to(add("tiny", config(wrong))).unwrap_err();
        assert!(refusal.to_string().contains(expected), "{refusal}");
    }
    assert_eq!(
        world.try_to(add("none", config("10.9.0.0/24"))).unwrap_err().to_string(),
        "network none not found"
    );
    world.must(add("tiny", config("198.51.100.0/30")));
    world.must(add("tiny", IpamConfig::default()));
    while world.orchestrate().0 {}
    assert_eq!(placed(&world), ["198.51.100.2", "10.0.2.2"]);
    world.must(add("small", config("203.0.113.0/24")));
    for name in ["small", "tiny"] {
        let network = world.state.network_by_name(name).unwrap();
        assert_eq!(network.spec.ipam.len(), network.subnets.len());
    }
    world.check_invariants();
}

/// What happens to a network's addresses next.
#[derive(Debug, Clone, Copy)]
enum Move {
    Take,
    Free(usize),
    /// All nodes are as far as the table was so many changes ago.
    Acknowledge(u64),
}

fn a_move() -> impl Strategy<Value = Move> {
    prop_oneof![
        4 => Just(Move::Take),
        3 => any::<usize>().prop_map(Move::Free),
        2 => (0..6_u64).prop_map(Move::Acknowledge),
    ]
}

/// Subnets with random ranges, gateways and auxiliary addresses, and what they have for tasks.
fn subnets() -> impl Strategy<Value = (Vec<IpamConfig>, BTreeSet<Ipv4Addr>)> {
    let one = (26..=30_u8, any::<u8>(), any::<u8>(), 0..4_u8, proptest::collection::vec(any::<u8>(), 0..4));
    proptest::collection::vec(one, 1..4).prop_map(|seeds| {
        let mut assignable = BTreeSet::new();
        let mut configs = Vec::new();
        for (number, (length, gateway, range, narrower, aux)) in (0_u8..).zip(seeds) {
            let cidr: ipnet::Ipv4Net = format!("10.{number}.7.64/{length}").parse().unwrap();
            let cidr = cidr.trunc();
            let hosts: Vec<Ipv4Addr> = cidr.hosts().collect();
            let pick = |seed: u8| hosts[usize::from(seed) % hosts.len()];
            let gateway = pick(gateway);
            let range = ipnet::Ipv4Net::new(pick(range), (length + narrower).min(32)).unwrap().trunc();
            let aux: BTreeMap<String, Ipv4Addr> = aux
                .into_iter()
                .map(pick)
                .filter(|addr| *addr != gateway)
                .map(|addr| (addr.to_string(), addr))
                .collect();
            let kept = |addr: &Ipv4Addr| *addr == gateway || aux.values().any(|other| other == addr);
            assignable.extend(hosts.iter().filter(|addr| range.contains(*addr) && !kept(addr)));
            let (subnet, range, gateway) = (Some(cidr), Some(range), Some(gateway));
            configs.push(IpamConfig { subnet, range, gateway, aux });
        }
        (configs, assignable)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_address_is_given_twice_and_freed_ones_come_last_in_order(
        (configs, assignable) in subnets(),
        moves in proptest::collection::vec(a_move(), 1..150),
    ) {
        let mut world = world_with(configs);
        let mut names = 0..;
        let mut held: Vec<(String, Ipv4Addr)> = Vec::new();
        let mut unused = assignable.clone();
        // Oldest first, with the index of each.
        let mut freed: VecDeque<(u64, Ipv4Addr)> = VecDeque::new();
        let mut acknowledged = 0;
        for a_move in moves {
            match a_move {
                Move::Take => {
                    let name = format!("s{}", names.next().unwrap());
                    let taken = take(&mut world, &name);
                    let rested = freed.front().is_some_and(|(index, _)| *index <= acknowledged);
                    match taken {
                        Some(addr) if unused.remove(&addr) => {}
                        Some(addr) => {
                            prop_assert!(unused.is_empty() && rested, "{addr} is taken from its rest");
                            prop_assert_eq!(freed.pop_front().map(|(_, first)| first), Some(addr));
                        }
                        None => prop_assert!(unused.is_empty() && !rested, "there was a free one"),
                    }
                    match taken {
                        Some(addr) => held.push((name, addr)),
                        None => free(&mut world, &name),
                    }
                }
                Move::Free(at) if !held.is_empty() => {
                    let (name, addr) = held.swap_remove(at % held.len());
                    free(&mut world, &name);
                    freed.push_back((world.state.index, addr));
                }
                Move::Free(_) => {}
                Move::Acknowledge(ago) => {
                    let index = world.state.index.saturating_sub(ago);
                    acknowledged = acknowledged.max(index);
                    world.must(Action::Acknowledge { index });
                }
            }
            world.check_invariants();
            let distinct: BTreeSet<Ipv4Addr> = held.iter().map(|(_, addr)| *addr).collect();
            prop_assert_eq!(distinct.len(), held.len());
            prop_assert!(distinct.is_subset(&assignable), "{:?} of {:?}", distinct, assignable);
        }
        // Whatever happened, all of them can be had again.
        for (name, _) in held {
            free(&mut world, &name);
        }
        world.acknowledge();
        let again: BTreeSet<Ipv4Addr> =
            (0..assignable.len()).map(|at| take(&mut world, &format!("again{at}")).unwrap()).collect();
        prop_assert_eq!(again, assignable);
        prop_assert_eq!(take(&mut world, "surplus"), None);
    }
}
