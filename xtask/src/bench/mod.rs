//! `cargo xtask bench`: figures with their spread. What is compared comes from the same run, in turns, because the
//! machine's mood changes.

mod netns;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Subcommand;
use serde::{Deserialize, Serialize};

use crate::lab::Xdp;
use crate::{bounded, lab, setup, sys, workspace};

/// For the dataplane's benchmark once it is built.
const DATAPLANE_LIMIT: Duration = Duration::from_mins(5);

/// What to measure.
#[derive(Subcommand)]
pub(crate) enum Suite {
    /// ns per packet of the XDP program, and the mesh beside plain routing on a lab
    Quick(Output),
    /// ns per packet of the XDP program, by BPF_PROG_TEST_RUN
    Dataplane(Output),
    /// The mesh beside plain routing, on a lab with native XDP and on one with TC alone
    Netns(Output),
}

/// Where figures go besides the terminal.
#[derive(clap::Args)]
pub(crate) struct Output {
    /// Also writes the figures to this file, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

/// The measurements of one case.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Case {
    #[serde(rename = "case")]
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) runs: usize,
}

impl Case {
    /// The figures of `samples`, of which there must be one.
    pub(crate) fn new(name: String, unit: &str, mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let runs = samples.len();
        Self {
            name,
            unit: unit.to_owned(),
            median: samples[runs / 2],
            min: samples[0],
            max: samples[runs - 1],
            runs,
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, unit, median, min, max, runs } = self;
        write!(f, "{name:<34} {median:>10.2} {unit:<6} {min:>10.2} … {max:<10.2} {runs:>3} runs")
    }
}

/// What a run found, as it is written to a file.
#[derive(Serialize)]
struct Report {
    kernel: String,
    cpu: String,
    results: Vec<Case>,
}

/// `cargo xtask bench`.
pub(crate) fn run(suite: &Suite) -> Result<()> {
    lab::require_root()?;
    setup::ensure()?;
    sys::catch_interrupts();
    let (kernel, cpu) = machine()?;
    println!("kernel {kernel}; {cpu}\n");
    let mut results = Vec::new();
    let output = match suite {
        Suite::Quick(output) => {
            results.extend(dataplane()?);
            results.extend(on_labs()?);
            output
        }
        Suite::Dataplane(output) => {
            results.extend(dataplane()?);
            output
        }
        Suite::Netns(output) => {
            results.extend(on_labs()?);
            output
        }
    };
    if let Some(file) = &output.json {
        let report = serde_json::to_string_pretty(&Report { kernel, cpu, results })?;
        fs::write(file, report).with_context(|| format!("could not write {}", file.display()))?;
    }
    Ok(())
}

fn machine() -> Result<(String, String)> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("no kernel release")?;
    let cpus = fs::read_to_string("/proc/cpuinfo").context("no /proc/cpuinfo")?;
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let model = model.map_or("unknown CPU", |(_, model)| model);
    Ok((kernel.trim().to_owned(), format!("{count} x {model}")))
}

fn dataplane() -> Result<Vec<Case>> {
    println!(
        "dataplane: BPF_PROG_TEST_RUN, 500,000 packets a run; forward_* undo the encapsulation after each packet,"
    );
    println!("which floor_adjust measures alone");
    let mut command = workspace::cargo();
    command.args(["run", "--quiet", "--profile", "lab", "--package", "shoal-tests", "--bin", "bench"]);
    // The build is not part of what is bounded tightly.
    let printed = bounded::output(&mut command, DATAPLANE_LIMIT * 4)?;
    let cases: Vec<Case> = serde_json::from_str(printed.trim()).context("the benchmark's output")?;
    show(&cases);
    let median =
        |name: &str| cases.iter().find(|case| case.name == name).map_or(f64::NAN, |case| case.median);
    let floor = median("floor_tx");
    for name in ["forward_hit", "forward_wset", "forward_new"] {
        println!(
            "{name} net of the harness: {:.1} x floor_tx",
            (median(name) - median("floor_adjust")) / floor
        );
    }
    println!();
    Ok(cases)
}

fn on_labs() -> Result<Vec<Case>> {
    let binary = lab::build()?;
    let mut cases = Vec::new();
    for xdp in [Xdp::Native, Xdp::Off] {
        cases.extend(on_lab(&binary, xdp)?);
    }
    Ok(cases)
}

fn on_lab(binary: &Path, xdp: Xdp) -> Result<Vec<Case>> {
    let up = lab::Up { nodes: 3, xdp, mtu: 1500, swarm: true, binary: Some(binary.to_owned()) };
    let _claim = lab::claim()?;
    let lab = lab::up(&up)?;
    let measured = netns::run(&lab, xdp);
    sys::forget_interrupt();
    let down = lab::down();
    let cases = measured?;
    down?;
    Ok(cases)
}

fn show(cases: &[Case]) {
    println!("{:<34} {:>10} {:<6} {:>10} … {:<10}", "case", "median", "unit", "min", "max");
    for case in cases {
        println!("{case}");
    }
}
