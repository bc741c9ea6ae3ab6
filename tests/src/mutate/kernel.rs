//! The same packets in the kernel, by BPF_PROG_TEST_RUN, beside the host library: both must return and write the same.
//!
//! The maps are set up once a round, so that a million packets take minutes.

use std::fmt;
use std::net::IpAddr;

use anyhow::{Context, Result};
use mesh_datapath::bytes::Bytes;
use mesh_datapath::verdict::Action;

use super::layout::{ETHERNET, Layout, word};
use super::rounds::{Ends, hex, name, packets};
use super::starts::Starts;
use crate::packet::family::Family;
use crate::packet::frames::octets6;
use crate::packet::host::{Ended, Node};
pub use crate::packet::kernel::Kernel;
use crate::packet::world::CLIENT;
use crate::packet::{End, Hook};

/// How often a round with a difference is run anew: a second may have begun amid it, which only the kernel notices.
const ATTEMPTS: usize = 3;

/// What many rounds came to.
#[derive(Debug, Default)]
pub struct Total {
    /// Packets that both have run.
    pub packets: u64,
    /// Packets that the kernel's test runs don't take: they end within the IP header.
    pub not_taken: u64,
    /// Packets that go by the host's routes, which the host library takes to lead everywhere.
    pub no_way: u64,
    /// How they ended.
    pub ends: Ends,
    /// Where kernel and host library differ.
    pub differences: Vec<Difference>,
}

/// A packet of which kernel and host library make different things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What all packets come from.
    pub seed: u64,
    /// The round.
    pub round: u64,
    /// The packet's number in the round.
    pub packet: usize,
    /// Where it came in.
    pub hook: Hook,
    /// Its bytes.
    pub input: Vec<u8>,
    /// What the kernel returned, and the bytes then.
    pub kernel: (u32, Vec<u8>),
    /// What the host library made of it.
    pub host: (Ended, Vec<u8>),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, round, packet, hook, input, kernel, host } = self;
        writeln!(f, "packet {packet} of round {round} of seed {seed}, at {hook:?}")?;
        writeln!(f, "  in     {}", hex(input))?;
        writeln!(f, "  kernel {} ({})", hex(&kernel.1), kernel.0.cast_signed())?;
        write!(f, "  host   {} ({}, {:?})", hex(&host.1), host.0.end.code().cast_signed(), host.0)
    }
}

impl Kernel {
    /// Runs a round in the kernel and on the host library.
    pub fn round(&mut self, starts: &Starts, seed: u64, round: u64, total: &mut Total) -> Result<()> {
        for attempt in 1.. {
            let mut found = Total::default();
            self.attempt(starts, seed, round, &mut found)?;
            if found.differences.is_empty() || attempt == ATTEMPTS {
                total.packets += found.packets;
                total.not_taken += found.not_taken;
                total.no_way += found.no_way;
                total.differences.extend(found.differences);
                for (name, count) in found.ends {
                    *total.ends.entry(name).or_default() += count;
                }
                return Ok(());
            }
        }
        Ok(())
    }

    /// Ends at the first difference: the tables may differ from there on.
    fn attempt(&mut self, starts: &Starts, seed: u64, round: u64, total: &mut Total) -> Result<()> {
        let (stand, packets) = packets(starts, seed, round);
        self.set_up(stand.world)?;
        let node = Node::new(stand.world, stand.hook);
        for (packet, input) in packets.enumerate() {
            if !is_taken(stand.hook, &input) {
                total.not_taken += 1;
                continue;
            }
            if stand.world.next_hop_mtu == 0 {
                // The kernel looks for the next hops, and may find them; the host library doesn't.
                self.set_peers(stand.world)?;
            }
            let kernel = self.run(stand.hook, stand.world, stand.segment_len, &input).with_context(|| {
                format!("packet {packet} of round {round} of seed {seed}: {}", hex(&input))
            })?;
            let mut bytes = Bytes { segment_len: stand.segment_len, ..Bytes::new(input.clone()) };
            let ended = node.run(&mut bytes);
            let host = (ended, bytes.bytes);
            total.packets += 1;
            if kernel.0 == ended.end.code() && kernel.1 == host.1 {
                *total.ends.entry(name(ended.end)).or_default() += 1;
            } else if has_no_way(&kernel, &host) {
                total.no_way += 1;
            } else {
                let hook = stand.hook;
                total.differences.push(Difference { seed, round, packet, hook, input, kernel, host });
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Whether the kernel's test runs take a packet.
fn is_taken(hook: Hook, frame: &[u8]) -> bool {
    let header = match word(frame, 12) {
        Some(0x0800) if hook != Hook::UplinkXdp => Family::V4.header_len(),
        Some(0x86dd) if hook != Hook::UplinkXdp => Family::V6.header_len(),
        _ => 0,
    };
    frame.len() >= ETHERNET + header
}

/// Whether kernel and host library differ in nothing but that the kernel's routes don't lead to the packet's destination,
/// which isn't `CLIENT`: the host library has packets go by routes without looking for them.
fn has_no_way(kernel: &(u32, Vec<u8>), host: &(Ended, Vec<u8>)) -> bool {
    let (ended, output) = host;
    let to_client = Layout::read_ip(output, 0).is_none_or(|layout| {
        let addresses = &output[layout.addresses()];
        match layout.family.addr(CLIENT) {
            IpAddr::V4(client) => addresses.ends_with(&client.octets()),
            client @ IpAddr::V6(_) => addresses.ends_with(&octets6(client)),
        }
    });
    let dropped = *kernel == (End::Tc(Action::Drop).code(), output.clone());
    ended.end == End::Tc(Action::Route) && dropped && !to_client
}
