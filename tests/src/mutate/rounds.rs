//! Rounds of mutated packets on the host library.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_datapath::bytes::Bytes;
use mesh_datapath::verdict::Action;

use super::ROUND;
use super::check::check;
use super::mutation;
use super::random::Random;
use super::starts::{Stand, Starts};
use crate::packet::host::{Ended, Node};
use crate::packet::{End, Hook};

/// How many packets ended in which way.
pub type Ends = BTreeMap<&'static str, u64>;

/// A packet that did not end as every packet must.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What all packets come from.
    pub seed: u64,
    /// The round.
    pub round: u64,
    /// The packet's number in the round.
    pub packet: usize,
    /// Where it came in.
    pub hook: Hook,
    /// What is wrong.
    pub what: String,
    /// Its bytes.
    pub input: Vec<u8>,
    /// Its bytes afterwards, if it came to an end.
    pub output: Option<Vec<u8>>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, round, packet, hook, what, input, output } = self;
        writeln!(f, "{what}: packet {packet} of round {round} of seed {seed}, at {hook:?}")?;
        write!(f, "  in  {}", hex(input))?;
        output.as_ref().map_or(Ok(()), |output| write!(f, "\n  out {}", hex(output)))
    }
}

/// Bytes as a person copies them.
pub fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 0xf])
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}

/// The hook, the world and the packets of a round.
pub fn packets(starts: &Starts, seed: u64, round: u64) -> (Stand<'_>, impl Iterator<Item = Vec<u8>>) {
    let mut random = Random::new(seed, round);
    let stand = starts.stand(random.below(starts.len()));
    (stand, (0..ROUND).map(move |_| mutation::frame(&mut random, &stand)))
}

/// What a packet has become, or what is wrong with that, and its bytes if it came to an end.
pub type Checked = Result<(Ended, Vec<u8>), (String, Option<Vec<u8>>)>;

/// Runs a hook on a packet; fails if that panics, or if the packet doesn't end as every packet must.
pub fn run_checked(node: &Node, segment_len: u32, input: &[u8]) -> Checked {
    let mut packet = Bytes { segment_len, ..Bytes::new(input.to_vec()) };
    let run = || {
        let ended = node.run(&mut packet);
        (ended, packet.bytes)
    };
    match catch_unwind(AssertUnwindSafe(run)) {
        Err(_) => Err(("it panics".to_owned(), None)),
        Ok((ended, output)) => match check(node, input, &output, ended) {
            Ok(()) => Ok((ended, output)),
            Err(what) => Err((format!("{what} ({ended:?})"), Some(output))),
        },
    }
}

/// One round.
pub fn round(starts: &Starts, seed: u64, round: u64, ends: &mut Ends) -> Result<(), Box<Failure>> {
    let (stand, packets) = packets(starts, seed, round);
    let node = Node::new(stand.world, stand.hook);
    for (number, input) in packets.enumerate() {
        match run_checked(&node, stand.segment_len, &input) {
            Ok((ended, _)) => *ends.entry(name(ended.end)).or_default() += 1,
            Err((what, output)) => {
                let (packet, hook) = (number, stand.hook);
                return Err(Box::new(Failure { seed, round, packet, hook, what, input, output }));
            }
        }
    }
    Ok(())
}

/// What an end is called.
pub const fn name(end: End) -> &'static str {
    match end {
        End::Tc(Action::Pass) => "pass",
        End::Tc(Action::Drop) => "drop",
        End::Tc(Action::Deliver { .. }) => "deliver",
        End::Tc(Action::Tunnel { .. }) => "tunnel",
        End::Tc(Action::Route) => "route",
        End::Tc(Action::Reflect) => "reflect",
        End::Tc(Action::Host) => "host",
        End::Tc(Action::Arrive { .. }) => "arrive",
        End::Tc(Action::Answer(_) | Action::Echo | Action::Dial) => "unfinished",
        End::XdpPass => "xdp pass",
        End::XdpDrop => "xdp drop",
        End::XdpTx => "xdp tx",
        End::XdpRedirect => "xdp redirect",
    }
}

/// What many rounds came to.
#[derive(Debug, Default)]
pub struct Total {
    /// Packets.
    pub packets: u64,
    /// How they ended.
    pub ends: Ends,
    /// Those that must not end so: of each thread, the first ones.
    pub failures: Vec<Failure>,
}

/// Runs the rounds from `first` to `last`, on so many threads; calls `tell` with the packets so far now and then. After so
/// many failures a thread stops.
pub fn all(
    starts: &Starts,
    seed: u64,
    rounds: std::ops::Range<u64>,
    threads: usize,
    failures_max: usize,
    tell: impl Fn(u64) + Sync,
) -> Total {
    let next = AtomicU64::new(rounds.start);
    let done = AtomicU64::new(0);
    let work = || {
        let mut total = Total::default();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= rounds.end || total.failures.len() >= failures_max {
                return total;
            }
            if let Err(failure) = round(starts, seed, number, &mut total.ends) {
                total.failures.push(*failure);
            }
            total.packets = total.ends.values().sum();
            tell((done.fetch_add(1, Ordering::Relaxed) + 1) * ROUND as u64);
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let mut all = Total::default();
        for thread in threads {
            let Ok(Total { packets, ends, failures }) = thread.join() else { continue };
            all.packets += packets;
            all.failures.extend(failures);
            for (name, count) in ends {
                *all.ends.entry(name).or_default() += count;
            }
        }
        all
    })
}
