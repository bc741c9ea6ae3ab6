//! Benchmarks of what needs the packet harness; `cargo xtask bench` runs them and shows their figures.

pub mod churn;
pub mod cluster;
pub mod control;
pub mod dataplane;
pub mod node;

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// What a figure counts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Nanoseconds.
    Ns,
    /// Milliseconds.
    Ms,
    /// 10^3 bytes.
    Kb,
    /// 10^6 bytes.
    Mb,
}

/// The measurements of one case, one a round.
#[derive(Debug, Clone, Serialize)]
pub struct Case {
    /// What was measured.
    #[serde(rename = "case")]
    pub name: &'static str,
    /// The unit of the samples.
    pub unit: Unit,
    /// The measurements, in the order in which they were made.
    pub samples: Vec<f64>,
}

impl Case {
    /// Nothing measured yet.
    pub fn new(name: &'static str, unit: Unit) -> Self {
        Self { name, unit, samples: Vec::new() }
    }
}

/// CPU time in user and kernel mode that this process or this thread has had.
fn cpu_time(clock: ClockId) -> Result<Duration> {
    Ok(clock_gettime(clock).context("no clock of CPU time")?.into())
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Memory of a process, by its id or `self`, that is in RAM, MB.
fn rss_mb(process: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB"));
    let kib: f64 = kib.context("no VmRSS")?.trim().parse()?;
    Ok(kib * 1.024e-3)
}
