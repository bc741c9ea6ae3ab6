//! `cargo xtask bench`: figures with their spread, beside what they are to reach. What is compared comes from the same
//! run, in turns, because the machine's mood changes.

mod control;
mod figures;
mod load;
mod netns;
mod overlay;
mod place;
mod probe;
mod programs;
mod shoal;
mod stage;
mod ways;
mod wireguard;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Subcommand;

use self::figures::{Case, Report};
use crate::lab::{Lab, Xdp};
use crate::{build, lab, setup, sys};

/// What to measure.
#[derive(Subcommand)]
pub(crate) enum Suite {
    /// The first figures in a few minutes: ns per packet, and the mesh beside plain routing
    Quick(Output),
    /// ns per packet of the XDP program, by BPF_PROG_TEST_RUN
    Dataplane(Output),
    /// The mesh beside plain routing, nftables and haproxy, with native XDP and with TC alone
    Netns(Output),
    /// Traffic between tasks beside the kernel's VXLAN, and beside the underlay
    Overlay(Output),
    /// Time, CPU and memory that 10,000 services take to install and to change
    Churn(Output),
    /// What a change takes from the managers to the maps of many agents, and what it costs
    Control(control::Options),
    /// Measures latencies for the others
    #[command(subcommand, hide = true)]
    Probe(probe::Probe),
}

/// Where figures go besides the terminal.
#[derive(clap::Args)]
pub(crate) struct Output {
    /// Also writes the figures to this file, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

/// How much is measured on labs.
#[derive(Debug, Clone, Copy)]
struct Scale {
    /// Rounds; each measures every way once.
    rounds: usize,
    /// Length of one measurement, s.
    seconds: u32,
    /// Not only the mesh and plain routing.
    all_ways: bool,
}

impl Scale {
    /// For each round, the order in which so many ways have their turns: each way is first, second and so on equally often.
    fn turns(self, ways: usize) -> impl Iterator<Item = Vec<usize>> {
        (0..self.rounds).map(move |round| (0..ways).map(|turn| (round + turn) % ways).collect())
    }
}

// Many short measurements rather than a few long ones: what disturbs a round disturbs all that is compared in it.
const FULL: Scale = Scale { rounds: 7, seconds: 1, all_ways: true };
const QUICK: Scale = Scale { rounds: 3, seconds: 1, all_ways: false };

/// Measures the cases of a suite.
type Measure<'a> = Box<dyn Fn() -> Result<Vec<Case>> + 'a>;

/// `cargo xtask bench`.
pub(crate) fn run(suite: &Suite) -> Result<()> {
    let (output, measure): (&Output, Measure<'_>) = match suite {
        Suite::Probe(probe) => return probe::run(probe),
        Suite::Quick(output) => {
            (output, Box::new(|| Ok([programs::dataplane()?, on_labs(&lab::build()?, QUICK)?].concat())))
        }
        Suite::Dataplane(output) => (output, Box::new(programs::dataplane)),
        Suite::Netns(output) => (output, Box::new(|| on_labs(&build::shoal("release")?, FULL))),
        Suite::Overlay(output) => {
            let measure = || on_lab(2, Xdp::Off, &build::shoal("release")?, |lab| overlay::run(lab, FULL));
            (output, Box::new(measure))
        }
        Suite::Churn(output) => (output, Box::new(programs::churn)),
        Suite::Control(options) => (&options.output, Box::new(|| control::run(options))),
    };
    lab::require_root()?;
    setup::ensure_for_benchmarks()?;
    sys::catch_interrupts();
    let mut report = Report::of_this_machine()?;
    println!("kernel {}; {}\n", report.kernel, report.cpu);
    report.results = measure()?;
    match &output.json {
        Some(file) => report.write(file),
        None => Ok(()),
    }
}

fn on_labs(binary: &Path, scale: Scale) -> Result<Vec<Case>> {
    let mut cases = on_lab(4, Xdp::Off, binary, |lab| netns::run(lab, scale))?;
    cases.extend(on_lab(4, Xdp::Native, binary, |lab| netns::run(lab, scale))?);
    Ok(cases)
}

/// Measures on a lab that lives as long as that takes.
fn on_lab(
    nodes: u8,
    xdp: Xdp,
    binary: &Path,
    measure: impl FnOnce(&Lab) -> Result<Vec<Case>>,
) -> Result<Vec<Case>> {
    let up = lab::Up {
        nodes,
        xdp,
        mtu: 1500,
        underlay: lab::Underlay::Ipv4,
        swarm: true,
        managers: 1,
        binary: Some(binary.to_owned()),
    };
    let _claim = lab::claim()?;
    let lab = lab::up(&up)?;
    let measured = measure(&lab);
    sys::forget_interrupt();
    let down = lab::down();
    let cases = measured?;
    down?;
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_has_each_turn_as_often_as_the_others() {
        let turns: Vec<_> = Scale { rounds: 3, ..FULL }.turns(3).collect();
        assert_eq!(turns, [[0, 1, 2], [1, 2, 0], [2, 0, 1]]);
    }
}
