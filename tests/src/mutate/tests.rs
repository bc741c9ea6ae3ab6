//! A short run of each kind, and the guided fuzzers' corpus once more.

use std::path::Path;

use super::check::check;
use super::kernel::{Kernel, Total};
use super::rounds::{self, run_checked};
use super::starts::Starts;
use super::{ROUND, targets};
use crate::packet::family::Family;
use crate::packet::host::Node;
use crate::packet::world::{CLIENT, N1, PORT_HERE, World};
use crate::packet::{Hook, fixtures, frames};

/// The seed of the short runs; `cargo xtask fuzz` draws others.
const SEED: u64 = 1;
/// Packets of the short run on the host library.
const PACKETS: u64 = 200_000;
/// Packets of the short run in the kernel.
const PACKETS_IN_KERNEL: u64 = 100_000;

#[test]
fn mutated_packets_end_as_every_packet_must() {
    let starts = Starts::of_fixtures();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let total = rounds::all(&starts, SEED, 0..PACKETS.div_ceil(ROUND as u64), threads, 3, |_| {});
    let failures: Vec<String> = total.failures.iter().map(ToString::to_string).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(total.packets >= PACKETS);
    // Enough of them are good enough to go on: at each hook and in each way.
    for end in ["deliver", "tunnel", "route", "reflect", "host", "xdp tx", "xdp redirect", "xdp drop"] {
        assert!(total.ends.get(end).is_some_and(|count| *count > 50), "{end}: {:?}", total.ends);
    }
}

#[test]
fn mutated_packets_end_in_the_kernel_as_on_the_host() {
    // The namespaces are the thread's.
    let thread = std::thread::spawn(|| {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: running BPF programs needs root");
            return;
        }
        let starts = Starts::of_fixtures();
        let mut kernel = Kernel::new().unwrap_or_else(|error| panic!("{error:?}"));
        let mut total = Total::default();
        for round in 0..PACKETS_IN_KERNEL.div_ceil(ROUND as u64) {
            kernel.round(&starts, SEED, round, &mut total).unwrap_or_else(|error| panic!("{error:?}"));
        }
        let differences: Vec<String> = total.differences.iter().map(ToString::to_string).collect();
        assert!(differences.is_empty(), "{}", differences.join("\n"));
        assert!(total.packets > PACKETS_IN_KERNEL / 2, "{} packets", total.packets);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn the_corpus_of_each_target_passes() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, target) in targets::ALL {
        let files: Vec<_> = std::fs::read_dir(corpus.join(name)).unwrap().collect();
        assert!(files.len() >= 20, "{name}: {} files", files.len());
        for file in files {
            target(&std::fs::read(file.unwrap().path()).unwrap());
        }
    }
}

#[test]
fn a_seed_gives_the_same_packets_again() {
    let starts = Starts::of_fixtures();
    let draw = |seed, round| rounds::packets(&starts, seed, round).1.collect::<Vec<_>>();
    assert_eq!(draw(SEED, 7), draw(SEED, 7));
    assert_ne!(draw(SEED, 7), draw(SEED, 8));
    assert_ne!(draw(SEED, 7), draw(SEED + 1, 7));
}

#[test]
fn every_fixture_ends_as_every_packet_must() {
    for fixture in fixtures::all() {
        let node = Node::new(&fixture.world, fixture.hook);
        let (ended, output) = run_checked(&node, fixture.segment_len, &fixture.input)
            .unwrap_or_else(|(what, output)| panic!("{}: {what} {output:02x?}", fixture.name));
        assert_eq!((ended.end, &output), (fixture.outcome.end, &fixture.outcome.output), "{}", fixture.name);
        assert_eq!((ended.counter, ended.made), (fixture.outcome.counter, fixture.outcome.made));
    }
}

#[test]
fn a_packet_that_ends_otherwise_is_found() {
    for f in Family::BOTH {
        let input = f.tcp((CLIENT, 40_000), (N1, PORT_HERE), frames::SYN, b"hello").bytes();
        let node = Node::new(&World::default(), Hook::Uplink);
        let (ended, output) = run_checked(&node, 0, &input).unwrap();
        assert_eq!(check(&node, &input, &output, ended), Ok(()));
        // Each byte counts, but for the Ethernet addresses.
        for at in 14..output.len() {
            let mut damaged = output.clone();
            damaged[at] ^= 1;
            assert!(check(&node, &input, &damaged, ended).is_err(), "byte {at} of {output:02x?}");
        }
        assert!(check(&node, &input, &output[..output.len() - 1], ended).is_err());
        let longer = [&output[..], &[0]].concat();
        assert!(check(&node, &input, &longer, ended).is_err());
        // What is unsound must not go on.
        let cut = &input[..input.len() - 1];
        assert!(check(&node, cut, cut, ended).is_err());
        let passed = run_checked(&node, 0, cut).unwrap().0;
        assert!(check(&node, cut, cut, passed).is_ok());
        assert!(check(&node, cut, &output, passed).is_err(), "a packet that passes is unchanged");
    }
}
