//! Figures: what was measured, its median and spread, ratios of measurements made side by side, and goals.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};

/// What a figure counts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Unit {
    /// Nanoseconds.
    Ns,
    /// Microseconds.
    Us,
    /// Milliseconds.
    Ms,
    /// So many a second.
    PerS,
    /// 10^9 bits a second.
    GbitS,
    /// 10^3 bytes.
    Kb,
    /// 10^6 bytes.
    Mb,
    /// One figure over another.
    Ratio,
}

impl Unit {
    /// For people.
    fn symbol(self) -> &'static str {
        match self {
            Self::Ns => "ns",
            Self::Us => "us",
            Self::Ms => "ms",
            Self::PerS => "1/s",
            Self::GbitS => "Gb/s",
            Self::Kb => "kB",
            Self::Mb => "MB",
            Self::Ratio => "x",
        }
    }

    /// The median's key in JSON.
    fn median_key(self) -> &'static str {
        match self {
            Self::Ns => "ns_median",
            Self::Us => "us_median",
            Self::Ms => "ms_median",
            Self::PerS => "per_s_median",
            Self::GbitS => "gbit_s_median",
            Self::Kb => "kb_median",
            Self::Mb => "mb_median",
            Self::Ratio => "ratio_median",
        }
    }
}

/// The measurements of one case, one a round.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Case {
    #[serde(rename = "case")]
    pub(super) name: String,
    unit: Unit,
    samples: Vec<f64>,
}

impl Case {
    /// Nothing measured yet.
    pub(super) fn new(name: String, unit: Unit) -> Self {
        Self { name, unit, samples: Vec::new() }
    }

    pub(super) fn push(&mut self, sample: f64) {
        self.samples.push(sample);
    }

    /// This case over `other`, round by round: what disturbs a round disturbs both.
    pub(super) fn over(&self, other: &Self, name: String) -> Self {
        let samples = self.samples.iter().zip(&other.samples).map(|(own, other)| own / other).collect();
        Self { name, unit: Unit::Ratio, samples }
    }

    /// This case less `other`, round by round.
    pub(super) fn less(&self, other: &Self, name: String) -> Self {
        let samples = self.samples.iter().zip(&other.samples).map(|(own, other)| own - other).collect();
        Self { name, unit: self.unit, samples }
    }

    /// The measurement that so many percent of them don't exceed.
    pub(super) fn percentile(&self, percent: usize, name: String) -> Self {
        let sorted = self.sorted();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        Self { name, unit: self.unit, samples: sorted.get(rank - 1).copied().into_iter().collect() }
    }

    /// Whether there is a figure.
    pub(super) fn is_measured(&self) -> bool {
        !self.samples.is_empty()
    }

    pub(super) fn median(&self) -> f64 {
        let sorted = self.sorted();
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn min(&self) -> f64 {
        self.sorted().first().copied().unwrap_or(f64::NAN)
    }

    fn max(&self) -> f64 {
        self.sorted().last().copied().unwrap_or(f64::NAN)
    }

    fn sorted(&self) -> Vec<f64> {
        let mut samples = self.samples.clone();
        samples.sort_by(f64::total_cmp);
        samples
    }
}

impl Serialize for Case {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(5))?;
        map.serialize_entry("case", &self.name)?;
        map.serialize_entry(self.unit.median_key(), &self.median())?;
        map.serialize_entry("min", &self.min())?;
        map.serialize_entry("max", &self.max())?;
        map.serialize_entry("runs", &self.samples.len())?;
        map.end()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit, runs) = (&self.name, self.unit.symbol(), self.samples.len());
        let [median, min, max] = [self.median(), self.min(), self.max()].map(rounded);
        write!(f, "{name:<46} {median:>9} {unit:<5} {min:>9} … {max:<9} {runs:>3}")
    }
}

/// Three digits or more of a figure.
fn rounded(figure: f64) -> String {
    let decimals = if figure.abs() >= 100.0 {
        0
    } else if figure.abs() >= 10.0 {
        1
    } else {
        2
    };
    format!("{figure:.decimals$}")
}

/// Prints cases as a table.
pub(super) fn show<'a>(cases: impl IntoIterator<Item = &'a Case>) {
    println!("{:<46} {:>9} {:<5} {:>9} … {:<9} runs", "case", "median", "unit", "min", "max");
    for case in cases {
        println!("{case}");
    }
    println!();
}

/// What a figure is to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    fn is_met(self, figure: f64) -> bool {
        match self {
            Self::AtLeast(bound) => figure >= bound,
            Self::AtMost(bound) => figure <= bound,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, ">= {bound}"),
            Self::AtMost(bound) => write!(f, "<= {bound}"),
        }
    }
}

/// Prints cases beside what their medians are to reach.
pub(super) fn show_goals(goals: &[(Case, Goal)]) {
    println!("{:<46} {:>9} {:<5} {:<9} result", "goal", "median", "unit", "goal");
    for (case, goal) in goals {
        let (median, unit) = (case.median(), case.unit.symbol());
        let result = if goal.is_met(median) { "met" } else { "missed" };
        println!("{:<46} {:>9} {unit:<5} {:<9} {result}", case.name, rounded(median), goal.to_string());
    }
    println!();
}

/// What a run found, as it is written to a file.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) kernel: String,
    pub(super) cpu: String,
    pub(super) results: Vec<Case>,
}

impl Report {
    /// A report of this machine, without results.
    pub(super) fn of_this_machine() -> Result<Self> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("no kernel release")?;
        let cpus = fs::read_to_string("/proc/cpuinfo").context("no /proc/cpuinfo")?;
        let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
        let model = model.map_or("unknown CPU", |(_, model)| model);
        Ok(Self { kernel: kernel.trim().to_owned(), cpu: format!("{count} x {model}"), results: Vec::new() })
    }

    pub(super) fn write(&self, file: &Path) -> Result<()> {
        let report = serde_json::to_string_pretty(self)?;
        fs::write(file, report).with_context(|| format!("could not write {}", file.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(name: &str, unit: Unit, samples: &[f64]) -> Case {
        Case { name: name.to_owned(), unit, samples: samples.to_vec() }
    }

    #[test]
    fn a_case_is_written_with_its_unit_in_the_key_of_the_median() {
        let written = serde_json::to_value(case("floor_tx", Unit::Ns, &[12.0, 10.0, 17.0])).unwrap();
        let wanted =
            serde_json::json!({"case": "floor_tx", "ns_median": 12.0, "min": 10.0, "max": 17.0, "runs": 3});
        assert_eq!(written, wanted);
        for (unit, key) in [(Unit::PerS, "per_s_median"), (Unit::GbitS, "gbit_s_median")] {
            let written = serde_json::to_value(case("c", unit, &[1.0])).unwrap();
            assert!(written.get(key).is_some(), "{written}");
        }
    }

    #[test]
    fn a_ratio_is_of_measurements_of_the_same_round() {
        let (own, other) =
            (case("a", Unit::PerS, &[10.0, 100.0, 30.0]), case("b", Unit::PerS, &[10.0, 50.0, 30.0]));
        let ratio = own.over(&other, "a_of_b".to_owned());
        assert_eq!(ratio.samples, [1.0, 2.0, 1.0]);
        assert!((ratio.median() - 1.0).abs() < f64::EPSILON);
    }

    #[test]
    fn a_percentile_is_a_measurement() {
        let samples: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        let percentile = |samples: &[f64], percent| {
            case("c", Unit::Ms, samples).percentile(percent, "p".to_owned()).samples
        };
        assert_eq!(percentile(&samples, 99), [198.0]);
        assert_eq!(percentile(&samples, 100), [200.0]);
        assert_eq!(percentile(&[7.0], 99), [7.0]);
        assert!(percentile(&[], 99).is_empty());
    }

    #[test]
    fn goals_include_their_bound() {
        assert!(Goal::AtMost(3.5).is_met(3.5) && !Goal::AtMost(3.5).is_met(3.6));
        assert!(Goal::AtLeast(0.9).is_met(0.9) && !Goal::AtLeast(0.9).is_met(0.89));
        assert!(!Goal::AtLeast(0.9).is_met(f64::NAN) && !Goal::AtMost(0.9).is_met(f64::NAN));
    }
}
