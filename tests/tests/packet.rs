//! Every packet fixture, on the host library and in the kernel, and what the verifier walks.

use std::collections::BTreeSet;

use mesh_common::counter::Counter;
use shoal_tests::packet::fixtures;
use shoal_tests::packet::host::{self, Bytes};
use shoal_tests::packet::kernel::{Kernel, KernelOutcome};
use shoal_tests::packet::world::{APP, APP_ON_N2, BACK_IFINDEX, World};
use shoal_tests::packet::{End, Hook, frames};

/// The kernel's own limit is a million; these are what the programs need, and a quarter more.
const VERIFIED_INSTRUCTIONS_MAX: [(&str, u32); 5] = [
    ("uplink_xdp", 3_500),
    ("uplink_ingress", 5_000),
    ("from_task", 17_000),
    ("from_overlay", 9_500),
    ("from_host", 1_000),
];

#[test]
fn every_fixture_ends_as_expected_on_the_host() {
    let mut failures = Vec::new();
    let fixtures = fixtures::all();
    for fixture in &fixtures {
        let outcome = host::run(fixture.hook, &fixture.world, Bytes::new(fixture.input.clone()));
        if outcome != fixture.outcome {
            failures.push(format!("{}:\n   got {outcome:x?}\nwanted {:x?}", fixture.name, fixture.outcome));
        }
    }
    println!("{} fixtures", fixtures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_fixture_ends_as_expected_in_the_kernel() {
    let Some(mut kernel) = kernel() else { return };
    let mut failures = Vec::new();
    for fixture in fixtures::all() {
        let (code, outcome) = kernel.run(fixture.hook, &fixture.world, &fixture.input).expect(fixture.name);
        let expected = KernelOutcome::expected(&fixture.outcome);
        if code != fixture.outcome.end.code() || outcome != expected {
            let wanted = fixture.outcome.end.code();
            failures.push(format!(
                "{}:\n   got {code} {outcome:x?}\nwanted {wanted} {expected:x?}",
                fixture.name
            ));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_way_to_end_has_a_fixture() {
    // A store is refused only by a kernel that can't make the packet writable, a route only by the host's routes.
    let elsewhere = [Counter::DropRewriteFailed, Counter::DropNoRoute];
    let fixtures = fixtures::all();
    let covered: BTreeSet<Counter> =
        fixtures.iter().filter_map(|fixture| fixture.outcome.counter).chain(elsewhere).collect();
    let missing: Vec<&Counter> = Counter::ALL.iter().filter(|counter| !covered.contains(counter)).collect();
    assert!(missing.is_empty(), "no fixture ends as {missing:?}");
    let names: BTreeSet<&str> = fixtures.iter().map(|fixture| fixture.name).collect();
    assert_eq!(names.len(), fixtures.len(), "two fixtures have the same name");
}

#[test]
fn every_way_to_end_stands_in_the_documentation() {
    let page = include_str!("../../docs/drops.md");
    for counter in Counter::ALL {
        let row = format!("| {} | `{}` | {} |", *counter as u32, counter.name(), counter.description());
        assert!(page.contains(&row), "docs/drops.md lacks: {row}");
    }
}

#[test]
fn a_packet_that_cannot_be_written_is_dropped_and_counted() {
    let hello = frames::udp((APP, 9), (APP_ON_N2, 7), b"hello");
    let mut packet = Bytes::new(hello);
    packet.read_only = true;
    let outcome = host::run(Hook::Task(BACK_IFINDEX), &World::default(), packet);
    assert_eq!(outcome.counter, Some(Counter::DropRewriteFailed));
    assert_eq!(outcome.end.code(), End::Tc(mesh_datapath::verdict::Action::Drop).code());
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

/// The kernel's side; `None`, and a line that `cargo xtask test` counts as a skip, where this user may not load programs.
fn kernel() -> Option<Kernel> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: loading BPF programs needs root");
        return None;
    }
    Some(Kernel::new().unwrap_or_else(|error| panic!("{error:?}")))
}
