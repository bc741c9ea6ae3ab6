//! Benchmarks of what needs the packet harness; `cargo xtask bench` runs them and shows their figures.

pub mod dataplane;

use serde::Serialize;

/// The measurements of one case.
#[derive(Debug, Clone, Serialize)]
pub struct Case {
    /// What was measured.
    #[serde(rename = "case")]
    pub name: String,
    /// The unit of the figures.
    pub unit: &'static str,
    /// Median over the runs.
    pub median: f64,
    /// Least of the runs.
    pub min: f64,
    /// Greatest of the runs.
    pub max: f64,
    /// How many runs.
    pub runs: usize,
}

impl Case {
    /// The figures of `samples`, of which there must be one.
    pub fn new(name: &str, unit: &'static str, mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let runs = samples.len();
        Self {
            name: name.to_owned(),
            unit,
            median: samples[runs / 2],
            min: samples[0],
            max: samples[runs - 1],
            runs,
        }
    }
}
