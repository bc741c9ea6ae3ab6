//! Benchmarks: figures with their spread, every comparison from the same run.

pub mod dataplane;

use std::fmt;

use serde::Serialize;

/// The measurements of one case.
#[derive(Debug, Clone, Serialize)]
pub struct Case {
    /// What was measured.
    pub case: String,
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
    pub fn new(case: &str, unit: &'static str, mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let runs = samples.len();
        Self {
            case: case.to_owned(),
            unit,
            median: samples[runs / 2],
            min: samples[0],
            max: samples[runs - 1],
            runs,
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, unit, median, min, max, runs } = self;
        write!(f, "{case:<28} {median:>12.1} {unit:<7} {min:>12.1} … {max:<12.1} {runs:>4} runs")
    }
}
