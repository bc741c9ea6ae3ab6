//! `cargo xtask test`: every suite, with one closing line of counts.
//!
//! A suite is bounded in time, and what it could not run counts as skipped, which CI takes for a failure.

use std::fmt;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::lab::{self, Xdp};
use crate::{run, setup, sys, tidy, workspace};

/// The first build of everything, on a slow machine.
const BUILD_LIMIT: Duration = Duration::from_mins(40);
const UNIT_LIMIT: Duration = Duration::from_mins(10);
const INTEGRATION_LIMIT: Duration = Duration::from_mins(10);
const NETNS_LIMIT: Duration = Duration::from_mins(20);

/// The one test program that needs a lab.
const NETNS: &str = "netns";

/// The lab's profile: a fresh machine builds the dependencies once, not once for tests and once for the lab.
const CARGO_OPTIONS: [&str; 4] = ["--locked", "--quiet", "--profile", lab::PROFILE];

/// What to test.
#[derive(Args)]
pub(crate) struct Options {
    /// How the agents of the netns suite attach XDP; each way is a run of its own
    #[arg(long, value_enum, default_values_t = [Xdp::Native, Xdp::Off], value_delimiter = ',')]
    xdp: Vec<Xdp>,
    /// Leaves out the suites that run on a lab
    #[arg(long)]
    skip_netns: bool,
    /// Leaves the lab up after a failure, to look into it
    #[arg(long)]
    keep: bool,
    /// Runs only the tests whose names contain this
    filter: Option<String>,
}

/// How many tests ended which way.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Counts {
    const PASSED: Self = Self { passed: 1, failed: 0, skipped: 0 };
    const FAILED: Self = Self { passed: 0, failed: 1, skipped: 0 };
    const SKIPPED: Self = Self { passed: 0, failed: 0, skipped: 1 };

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// `cargo xtask test`.
pub(crate) fn run(options: &Options) -> ExitCode {
    sys::catch_interrupts();
    let mut report = Report::default();
    if let Err(error) = suites(options, &mut report) {
        eprintln!("error: {error:#}");
        report.total.add(Counts::FAILED);
    }
    println!("\n{}\n{}", report.lines.join("\n"), report.total);
    let skips_count = std::env::var("CI").is_ok_and(|value| !value.is_empty() && value != "false");
    let Counts { failed, skipped, .. } = report.total;
    if failed > 0 || (skipped > 0 && skips_count) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// The counts so far, and a line for each suite.
#[derive(Default)]
struct Report {
    total: Counts,
    lines: Vec<String>,
}

impl Report {
    /// Runs a suite and takes its counts; an error of the suite itself is a failed test.
    fn suite(&mut self, name: &str, work: impl FnOnce() -> Result<Counts>) -> Result<()> {
        println!("\n=== {name}");
        let started = Instant::now();
        let counts = work().unwrap_or_else(|error| {
            println!("{name}: {error:#}");
            Counts::FAILED
        });
        self.total.add(counts);
        let seconds = started.elapsed().as_secs_f32();
        self.lines.push(format!("{name}: {counts} ({seconds:.1} s)"));
        if sys::interrupted() {
            bail!("interrupted");
        }
        Ok(())
    }

    fn skip(&mut self, name: &str, reason: &str) {
        println!("\n=== {name}: skipped: {reason}");
        self.total.add(Counts::SKIPPED);
        self.lines.push(format!("{name}: skipped: {reason}"));
    }
}

fn suites(options: &Options, report: &mut Report) -> Result<()> {
    setup::ensure()?;
    let filter: Vec<&str> = options.filter.iter().map(String::as_str).collect();
    if filter.is_empty() {
        report.suite("tidy", || tidy::run(&tidy::Options::default()).map(|()| Counts::PASSED))?;
    }
    println!("\n=== build");
    build()?;
    report.suite("unit", || {
        let mut counts = counted(cargo_test(&["--lib", "--bins"]).arg("--").args(&filter), UNIT_LIMIT)?;
        counts.add(counted(cargo_test(&["--doc"]).arg("--").args(&filter), UNIT_LIMIT)?);
        Ok(counts)
    })?;
    report.suite("integration", || {
        let mut command = cargo_test(&[]);
        for name in workspace::test_programs()?.iter().filter(|name| *name != NETNS) {
            command.args(["--test", name]);
        }
        // The figures of the verifier, and why something was skipped.
        counted(command.args(["--", "--show-output"]).args(&filter), INTEGRATION_LIMIT)
    })?;
    if options.skip_netns {
        report.skip("netns", "asked for by --skip-netns");
        return Ok(());
    }
    if !lab::is_root() {
        report.skip("netns", "needs root: sudo env \"PATH=$PATH\" cargo xtask test");
        return Ok(());
    }
    if options.xdp.iter().all(|xdp| *xdp == Xdp::Off) {
        report.skip("netns, the control plane", "its cases run once, on a lab with XDP");
    }
    for xdp in &options.xdp {
        report.suite(&format!("netns, xdp {xdp}"), || netns(*xdp, &filter, options.keep))?;
    }
    Ok(())
}

/// One run of the netns suite on a lab of its own. That the lab goes without a trace is a test like the others.
fn netns(xdp: Xdp, filter: &[&str], keep: bool) -> Result<Counts> {
    let _claim = lab::claim()?;
    let lab = lab::up(&lab::Up {
        nodes: 3,
        xdp,
        mtu: 1500,
        underlay: lab::Underlay::Ipv4,
        swarm: true,
        managers: 1,
        binary: None,
    })?;
    let mut command = cargo_test(&["--test", NETNS]);
    command.arg("--").args(filter).env("SHOAL_XTASK", std::env::current_exe()?);
    let result = counted(&mut command, NETNS_LIMIT);
    let failed = result.as_ref().map_or(true, |counts| counts.failed > 0);
    if failed {
        lab::print_log_ends(&lab, 30);
    }
    if failed && keep {
        println!("the lab stays up: cargo xtask lab status, and at last cargo xtask lab down");
        return result;
    }
    let interrupted = sys::interrupted();
    sys::forget_interrupt();
    let gone = match lab::down() {
        Ok(_) => Counts::PASSED,
        Err(error) => {
            println!("{error:#}");
            Counts::FAILED
        }
    };
    println!("test lab_down_leaves_nothing … {}", if gone == Counts::PASSED { "ok" } else { "FAILED" });
    if interrupted {
        bail!("interrupted");
    }
    let mut counts = result?;
    counts.add(gone);
    Ok(counts)
}

/// Builds all tests and the lab's binary: what takes long shows, and counts for no suite's time.
fn build() -> Result<()> {
    let mut command = workspace::cargo();
    command.args(["test", "--workspace", "--no-run"]).args(CARGO_OPTIONS).process_group(0);
    let mut child = command.spawn().with_context(|| format!("could not start {}", run::line(&command)))?;
    let status = wait(&mut child, BUILD_LIMIT)?;
    if !status.success() {
        bail!("the tests do not build: {} ended with {status}", run::line(&command));
    }
    if lab::is_root() { lab::build().map(drop) } else { Ok(()) }
}

/// Always with the whole workspace: a part of it has other features in common, and cargo would build everything again.
fn cargo_test(targets: &[&str]) -> Command {
    let mut command = workspace::cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]).args(CARGO_OPTIONS).args(targets);
    command
}

/// Runs a `cargo test`, passing on what it prints, and adds up its results.
fn counted(command: &mut Command, limit: Duration) -> Result<Counts> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let mut child = command.spawn().with_context(|| format!("could not start {}", run::line(command)))?;
    let output = child.stdout.take().context("a child without an output")?;
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            println!("{line}");
            // Nobody listens any more only past the limit.
            let _ = sender.send(Line::read(&line));
        }
    });
    let status = wait(&mut child, limit)?;
    let mut counts = Counts::default();
    let mut skips = 0;
    // Whoever inherited the pipe may hold it for longer than the suite lived.
    while let Ok(line) = lines.recv_timeout(Duration::from_secs(2)) {
        match line {
            Line::Result(found) => counts.add(found),
            Line::Skip => skips += 1,
            Line::Other => {}
        }
    }
    // libtest has no skips: it counts these among those that passed.
    counts.passed = counts.passed.saturating_sub(skips);
    counts.skipped += skips;
    if !status.success() && counts.failed == 0 {
        // It crashed: no line says so.
        counts.add(Counts::FAILED);
    }
    Ok(counts)
}

/// Waits; past `limit`, or when the user gives up, ends the child with all that it started.
fn wait(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let late = started.elapsed() > limit;
        if late || sys::interrupted() {
            sys::kill_group(child.id())?;
            child.wait()?;
            if late {
                bail!("no end after {} s", limit.as_secs());
            }
            bail!("interrupted");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What a line of a test program tells.
#[derive(PartialEq, Eq, Debug)]
enum Line {
    /// The counts of a program, at its end.
    Result(Counts),
    /// A test could not run here.
    Skip,
    Other,
}

impl Line {
    fn read(line: &str) -> Self {
        if line.starts_with("SKIP: ") {
            return Self::Skip;
        }
        let Some(counts) = line.strip_prefix("test result: ") else { return Self::Other };
        let count = |word: &str| {
            let part = counts.split(['.', ';']).find_map(|part| part.trim().strip_suffix(word));
            part.and_then(|number| number.trim().parse().ok()).unwrap_or_default()
        };
        Self::Result(Counts { passed: count("passed"), failed: count("failed"), skipped: count("ignored") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_test_programs_are_counted_and_others_are_not() {
        let line = "test result: FAILED. 12 passed; 3 failed; 4 ignored; 0 measured; 5 filtered out; finished in 1.20s";
        assert_eq!(Line::read(line), Line::Result(Counts { passed: 12, failed: 3, skipped: 4 }));
        assert_eq!(Line::read("test mesh::tests::x ... ok"), Line::Other);
        assert_eq!(Line::read("SKIP: needs root"), Line::Skip);
    }

    #[test]
    fn the_closing_line_is_plain() {
        assert_eq!(Counts { passed: 3, failed: 0, skipped: 1 }.to_string(), "3 passed, 0 failed, 1 skipped");
    }
}
