//! Nanoseconds per packet of the XDP program, by BPF_PROG_TEST_RUN.
//!
//! Each round runs every case once, so that all see the same moods of the machine; figures are medians over the
//! rounds. A forwarded packet grows by its encapsulation, which the probe takes off again before the next run: the
//! cost of that pair of calls alone is `floor_adjust`, and `net` figures have it subtracted.

use anyhow::{Result, ensure};

use super::Case;
use crate::packet::frames::{Segment, tcp};
use crate::packet::kernel::Kernel;
use crate::packet::world::{CLIENT, N1, PORT_THERE, World};

/// Rounds, and packets in each.
const ROUNDS: usize = 15;
const PACKETS: u32 = 500_000;
const XDP_DROP: u32 = 1;
const XDP_TX: u32 = 3;

/// The programs measured, and what they must return.
const CASES: [(&str, u32); 6] = [
    ("floor_drop", XDP_DROP),
    ("floor_tx", XDP_TX),
    ("floor_adjust", XDP_TX),
    ("forward_hit", XDP_TX),
    ("forward_wset", XDP_TX),
    ("forward_new", XDP_TX),
];

/// Measures all cases.
pub fn run() -> Result<Vec<Case>> {
    let mut kernel = Kernel::new()?;
    kernel.set_up(&World::default())?;
    let packet = tcp((CLIENT, 40_000), (N1, PORT_THERE), Segment::Ack, b"");
    let mut samples = vec![Vec::with_capacity(ROUNDS); CASES.len()];
    for round in 0..=ROUNDS {
        for ((name, code), samples) in CASES.into_iter().zip(&mut samples) {
            let run = kernel.repeat(name, &packet, PACKETS)?;
            ensure!(run.code == code, "{name} returned {} instead of {code}", run.code);
            // The first round fills the caches and the flow table.
            if round > 0 {
                samples.push(f64::from(run.ns));
            }
        }
    }
    Ok(CASES.into_iter().zip(samples).map(|((name, _), samples)| Case::new(name, "ns", samples)).collect())
}
