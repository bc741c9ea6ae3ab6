//! `cargo xtask vm-test`: suites on several of Debian's kernels, each in a virtual machine on this host's files.
//!
//! Needs root, to serve the files, and changes nothing on the machine outside the target directory. Every guest runs
//! the same programs, which are built here before the first one starts.

mod console;
mod guest;
mod initrd;
mod kernels;
mod machine;
mod nics;
mod suites;
mod tally;

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;

use self::kernels::Series;
use self::machine::{Accelerator, Machine};
use self::suites::{Plan, Programs, Suite};
use self::tally::{Counting, Tally};
use crate::setup::VmPrograms;
use crate::{lab, setup, sys, workspace};

/// How long a guest may take until its first suite begins, under KVM.
const BOOT_LIMIT: Duration = Duration::from_secs(30);
/// How much longer everything may take without KVM, on a machine that does other things as well.
const TCG_FACTOR: u32 = 8;
/// How often a guest's console is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What to test on.
#[derive(Args)]
pub(crate) struct Options {
    /// Kernels, by the numbers that Debian has them under
    #[arg(long, value_enum, default_values_t = [Series::V6_1, Series::V6_12, Series::V7_2], value_delimiter = ',')]
    kernel: Vec<Series>,
    /// Looks for newer kernels of these numbers than those that were downloaded
    #[arg(long)]
    update: bool,
    /// Debian's archive; without this, the one that the machine's apt uses
    #[arg(long, value_name = "URL")]
    archive: Option<String>,
    /// Runs only the suites whose names contain this
    filter: Option<String>,
    /// In a guest: runs the suites of this plan
    #[arg(long, value_name = "FILE", hide = true)]
    guest: Option<PathBuf>,
}

/// `cargo xtask vm-test`.
pub(crate) fn run(options: &Options) -> ExitCode {
    if let Some(plan) = &options.guest {
        return match guest::run(plan) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                println!("{}{error:#}", guest::FAILED);
                ExitCode::FAILURE
            }
        };
    }
    sys::catch_interrupts();
    let started = Instant::now();
    let mut report = Report::default();
    let outcome = test(options, &mut report);
    println!("\n{}\n{} ({:.0} s)", report.lines.join("\n"), report.total, started.elapsed().as_secs_f32());
    match outcome {
        Ok(()) if report.total.is_clean() => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The counts so far, and a line for each kernel and suite.
#[derive(Default)]
struct Report {
    total: Tally,
    lines: Vec<String>,
}

impl Report {
    /// Takes the counts of a suite that has ended, well if it `is_ok`.
    fn suite(&mut self, series: Series, suite: &Suite, counting: &Counting, is_ok: bool, took: Duration) {
        let tally = counting.close(is_ok, suite.tests());
        self.total += tally;
        let line = format!("{} {}: {tally} ({:.1} s)", series.name(), suite.name, took.as_secs_f32());
        println!("{line}");
        self.lines.push(line);
    }
}

/// What all guests have in common.
struct Host {
    folder: PathBuf,
    emulator: VmPrograms,
    programs: Programs,
}

fn test(options: &Options, report: &mut Report) -> Result<()> {
    ensure!(
        lab::is_root(),
        "serving this machine's files to a guest takes root: sudo env \"PATH=$PATH\" cargo xtask vm-test"
    );
    let filter = options.filter.as_deref().unwrap_or_default();
    for series in &options.kernel {
        ensure!(!suites::of(*series, filter).is_empty(), "{} has no suite named {filter:?}", series.name());
    }
    setup::ensure()?;
    let emulator = setup::ensure_vm()?;
    let folder = workspace::target_dir().join("vm");
    let _claim = claim(&folder)?;
    println!("=== build");
    let programs = suites::build(&folder.join("bin"))?;
    let host = Host { folder, emulator, programs };
    let mut accelerator = None;
    for series in &options.kernel {
        let mut left = suites::of(*series, filter);
        let tested = host.test(*series, options, &mut left, &mut accelerator, report);
        ensure!(!sys::interrupted(), "interrupted");
        if let Err(error) = tested {
            println!("{}: {error:#}", series.name());
            for suite in left {
                report.suite(*series, &suite, &Counting::default(), false, Duration::ZERO);
            }
        }
    }
    Ok(())
}

/// One of these at a time works on a target directory.
fn claim(folder: &Path) -> Result<File> {
    let file = File::open(folder).with_context(|| format!("could not open {}", folder.display()))?;
    if file.try_lock().is_err() {
        println!("vm-test: waiting for another one to end");
        file.lock()?;
    }
    Ok(file)
}

impl Host {
    /// One kernel: fetches and boots it, and takes down what its suites say. Those that didn't end stay in `left`.
    fn test(
        &self,
        series: Series,
        options: &Options,
        left: &mut VecDeque<Suite>,
        accelerator: &mut Option<Accelerator>,
        report: &mut Report,
    ) -> Result<()> {
        let kernel = kernels::provide(series, options.update, options.archive.as_deref(), &self.emulator)?;
        let folder = self.folder.join("guests").join(series.name());
        fs::create_dir_all(&folder).with_context(|| format!("could not create {}", folder.display()))?;
        let accelerator = match *accelerator {
            Some(accelerator) => accelerator,
            None => *accelerator.insert(Accelerator::find(&kernel, &folder, &self.emulator)?),
        };
        println!("\n=== {}: {} under {}", series.name(), kernel.release, accelerator.name());
        let initrd = initrd::build(&kernel, &self.command(left, &folder)?, &self.emulator)?;
        let started = Instant::now();
        let machine = Machine::boot(accelerator, &kernel, &initrd, true, &folder, &self.emulator)?;
        let patience = if accelerator == Accelerator::Kvm { 1 } else { TCG_FACTOR };
        wait_for(&machine, guest::READY, patience * BOOT_LIMIT, |line| println!("{line}"))?;
        println!("{}: ready {:.1} s after power-on", series.name(), started.elapsed().as_secs_f32());
        while let Some(suite) = left.front() {
            println!("\n=== {} {}", series.name(), suite.name);
            let started = Instant::now();
            let mut counting = Counting::default();
            let ended = wait_for(&machine, guest::END, patience * suite.limit(), |line| {
                println!("{line}");
                counting.read(line);
            });
            let is_ok = ended.as_ref().is_ok_and(|how| how == "ok");
            report.suite(series, suite, &counting, is_ok, started.elapsed());
            left.pop_front();
            ended?;
        }
        Ok(())
    }

    /// The shell command that runs `suites` in a guest.
    fn command(&self, suites: &VecDeque<Suite>, folder: &Path) -> Result<String> {
        let variable = |name: &str| std::env::var(name).unwrap_or_default();
        let plan = Plan { programs: self.programs.clone(), suites: suites.iter().cloned().collect() };
        let path = folder.join("plan.json");
        fs::write(&path, serde_json::to_vec(&plan)?)?;
        let environment = [
            ("PATH", variable("PATH")),
            ("HOME", variable("HOME")),
            ("CARGO_TARGET_DIR", workspace::target_dir().display().to_string()),
            // A guest builds nothing.
            (ebpf_build::SKIP_VAR, "1".to_owned()),
            ("RUST_BACKTRACE", "1".to_owned()),
        ];
        let quoted = |word: &str| initrd::quoted(word);
        let exports = environment.map(|(name, value)| format!("export {name}={}; ", quoted(&value))).concat();
        let xtask = quoted(&self.programs.xtask.display().to_string());
        Ok(format!("{exports}cd /; {xtask} vm-test --guest {}", quoted(&path.display().to_string())))
    }
}

/// Passes a guest's lines on until one that starts with `mark`, and gives the rest of that one. Fails, with the end of
/// what the guest's kernel said, when the guest is lost, past `limit`, and when the user gives up.
fn wait_for(machine: &Machine, mark: &str, limit: Duration, mut pass_on: impl FnMut(&str)) -> Result<String> {
    let started = Instant::now();
    let lost = |why: String| anyhow!("{why}; the guest's console ends:\n{}", console::tail(&machine.console));
    loop {
        match machine.output.recv_timeout(LOOK) {
            Ok(line) => match (line.strip_prefix(mark), line.strip_prefix(guest::FAILED)) {
                (Some(rest), _) => return Ok(rest.to_owned()),
                (_, Some(why)) => return Err(lost(why.to_owned())),
                _ => pass_on(&line),
            },
            Err(RecvTimeoutError::Disconnected) => return Err(lost(machine.why_it_ended())),
            Err(RecvTimeoutError::Timeout) => {}
        }
        ensure!(!sys::interrupted(), "interrupted");
        if let Some(complaint) = machine.complaint() {
            return Err(lost(complaint));
        }
        if started.elapsed() > limit {
            return Err(lost(format!("no end after {} s", limit.as_secs())));
        }
    }
}
