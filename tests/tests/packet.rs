//! Every packet fixture, on the host library and in the kernel, and what the verifier walks.

#[path = "packet/cpus.rs"]
mod cpus;
#[path = "packet/properties.rs"]
mod properties;

use std::collections::BTreeSet;

use mesh_common::counter::Counter;
use mesh_datapath::bytes::Bytes;
use mesh_datapath::verdict::Action;
use shoal_tests::packet::family::Family;
use shoal_tests::packet::fixtures::{self, Mesh};
use shoal_tests::packet::host;
use shoal_tests::packet::kernel::{Kernel, KernelOutcome};
use shoal_tests::packet::world::{APP, APP_ON_N2, BACK_IFINDEX, N2, NOWHERE, WEB_IFINDEX, World};
use shoal_tests::packet::{End, Fixture, Hook, Outcome, frames};

/// A peer's slot that no node has.
const EMPTY_SLOT: u32 = 77;
/// The kernel's own limit is a million; these are what the programs need, and a quarter more.
const VERIFIED_INSTRUCTIONS_MAX: [(&str, u32); 13] = [
    ("uplink_xdp", 72_000),
    ("uplink_ingress", 350_000),
    ("from_task", 240_000),
    ("from_overlay", 430_000),
    ("from_host", 360_000),
    ("sock_connect4", 300),
    ("sock_connect6", 1_100),
    ("sock_sendmsg4", 300),
    ("sock_sendmsg6", 1_100),
    ("sock_recvmsg4", 100),
    ("sock_recvmsg6", 200),
    ("sock_peername4", 100),
    ("sock_peername6", 200),
];

#[test]
fn every_fixture_ends_as_expected_on_the_host() {
    let mut failures = Vec::new();
    let fixtures = fixtures::all();
    for fixture in &fixtures {
        let outcome = on_host(fixture);
        if outcome != fixture.outcome {
            failures.push(format!("{}:\n   got {outcome:x?}\nwanted {:x?}", fixture.name, fixture.outcome));
        }
    }
    println!("{} fixtures", fixtures.len());
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_fixture_ends_as_expected_in_the_kernel() {
    let Some(mut kernel) = kernel() else { return };
    let mut failures = Vec::new();
    for fixture in fixtures::all().iter().filter(|fixture| fixture.in_kernel) {
        let (code, outcome) = kernel.run_fixture(fixture).expect(&fixture.name);
        let expected = KernelOutcome::expected(&fixture.outcome);
        if code != fixture.outcome.end.code() || outcome != expected {
            let wanted = fixture.outcome.end.code();
            failures.push(format!(
                "{}:\n   got {code} {outcome:x?}\nwanted {wanted} {expected:x?}",
                fixture.name
            ));
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_way_to_end_has_a_fixture() {
    // A store is refused only by a kernel that can't make the packet writable, a route only by the host's routes: each
    // has a test below.
    let elsewhere = [Counter::DropRewriteFailed, Counter::DropNoRoute];
    let fixtures = fixtures::all();
    let counted = fixtures.iter().flat_map(|fixture| fixture.outcome.counters());
    let covered: BTreeSet<Counter> = counted.chain(elsewhere).collect();
    let missing: Vec<&Counter> = Counter::ALL.iter().filter(|counter| !covered.contains(counter)).collect();
    assert!(missing.is_empty(), "no fixture ends as {missing:?}");
    let mut names = BTreeSet::new();
    let again: Vec<&str> =
        fixtures.iter().map(|fixture| &*fixture.name).filter(|name| !names.insert(*name)).collect();
    assert!(again.is_empty(), "two fixtures have the name {again:?}");
}

#[test]
fn every_way_to_go_on_has_a_fixture() {
    let fixtures = fixtures::all();
    let has = |wanted: fn(&End) -> bool| fixtures.iter().any(|fixture| wanted(&fixture.outcome.end));
    assert!(has(|end| *end == End::Tc(Action::Pass)));
    assert!(has(|end| *end == End::Tc(Action::Drop)));
    assert!(has(|end| matches!(end, End::Tc(Action::Deliver { .. }))));
    assert!(has(|end| matches!(end, End::Tc(Action::Tunnel { .. }))));
    assert!(has(|end| *end == End::Tc(Action::Route)));
    assert!(has(|end| *end == End::Tc(Action::Reflect)));
    assert!(has(|end| *end == End::Tc(Action::Host)));
    assert!(has(|end| matches!(end, End::Tc(Action::Arrive { .. }))));
    assert!(has(|end| *end == End::XdpPass));
    assert!(has(|end| *end == End::XdpDrop));
    assert!(has(|end| *end == End::XdpTx));
    assert!(has(|end| *end == End::XdpRedirect));
}

#[test]
fn every_way_to_end_stands_in_the_documentation() {
    let page = include_str!("../../docs/drops.md");
    let rows = Counter::ALL
        .iter()
        .map(|counter| format!("| {} | `{}` | {} |", *counter as u32, counter.name(), counter.description()));
    let rows: Vec<String> = rows.collect();
    let table: Vec<&str> = page.lines().filter(|line| line.starts_with("| ") && line.contains('`')).collect();
    assert_eq!(table, rows, "docs/drops.md");
}

#[test]
fn a_packet_that_cannot_be_written_is_dropped_and_counted() {
    for f in Family::BOTH {
        let bytes = f.udp((APP, 9), (APP_ON_N2, 7), b"hello").bytes();
        let packet = Bytes { read_only: true, ..Bytes::new(bytes) };
        let outcome = host::run(Hook::Task(BACK_IFINDEX), &World::default(), packet);
        assert_eq!(outcome.counter, Some(Counter::DropRewriteFailed));
        assert_eq!(outcome.end, End::Tc(Action::Drop));
    }
}

#[test]
fn a_reply_without_a_route_is_dropped_and_counted() {
    let Some(mut kernel) = kernel() else { return };
    // To its client, or to its ingress node, whose slot nobody has.
    let flows = |f| [Mesh::tcp(f).of((NOWHERE, 40_000)), Mesh::tcp(f).by(EMPTY_SLOT, N2)];
    for (f, flow) in Family::BOTH.into_iter().flat_map(|f| flows(f).map(|flow| (f, flow))) {
        let fixture = Fixture {
            name: format!("a reply without a route ({})", f.name()),
            hook: Hook::Task(WEB_IFINDEX),
            world: World::knowing(flow.established()),
            input: flow.reply(frames::TASK_ACK, b"200 OK").bytes(),
            segment_len: 0,
            in_kernel: true,
            outcome: Outcome {
                end: End::Tc(Action::Drop),
                output: flow.returned(frames::TASK_ACK, b"200 OK").bytes(),
                counter: Some(Counter::DropNoRoute),
                made: None,
                changes: [].into(),
            },
        };
        let (code, outcome) = kernel.run_fixture(&fixture).expect("a run");
        assert_eq!(code, fixture.outcome.end.code());
        assert_eq!(outcome, KernelOutcome::expected(&fixture.outcome));
    }
}

#[test]
fn the_verifier_walks_no_more_than_agreed() {
    let Some(mut kernel) = kernel() else { return };
    let verified = kernel.verified_instructions().expect("program information");
    println!("verified instructions: {verified:?}");
    assert_eq!(verified.len(), VERIFIED_INSTRUCTIONS_MAX.len());
    for (name, max) in VERIFIED_INSTRUCTIONS_MAX {
        assert!(verified[name] <= max, "{name}: {} of at most {max}", verified[name]);
    }
}

/// What the library makes of a fixture's packet.
fn on_host(fixture: &Fixture) -> Outcome {
    let packet = Bytes { segment_len: fixture.segment_len, ..Bytes::new(fixture.input.clone()) };
    host::run(fixture.hook, &fixture.world, packet)
}

/// The kernel's side; `None`, and a line that `cargo xtask test` counts as a skip, where this user may not load programs.
fn kernel() -> Option<Kernel> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: loading BPF programs needs root");
        return None;
    }
    Some(Kernel::new().unwrap_or_else(|error| panic!("{error:?}")))
}
