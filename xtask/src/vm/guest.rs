//! What runs inside a guest: the suites of a plan, one after another, with marks around what each prints.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::nics;
use super::suites::{Plan, Programs, Suite, Work};
use crate::lab::{self, Lab, Underlay, Xdp};
use crate::run;

/// Before the first suite.
pub(super) const READY: &str = "@ready";
/// After each suite, with `ok` or `failed` behind it.
pub(super) const END: &str = "@end ";
/// Before the reason why nothing more will come.
pub(super) const FAILED: &str = "@failed ";

/// For the figures of the verifier, and for why something was skipped.
const LIBTEST: [&str; 2] = ["--show-output", "--color=never"];

/// How many times slower than usual cases may be here: what emulation takes.
const SLOWNESS: &str = "4";

/// Runs the suites of the plan in a file.
pub(super) fn run(plan: &Path) -> Result<()> {
    let plan = std::fs::read(plan).with_context(|| plan.display().to_string())?;
    let plan: Plan = serde_json::from_slice(&plan)?;
    say(READY)?;
    for suite in &plan.suites {
        let ended = match run_suite(suite, &plan.programs) {
            Ok(()) => "ok",
            Err(error) => {
                say(&format!("{error:#}"))?;
                "failed"
            }
        };
        say(&format!("{END}{ended}"))?;
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    let mut output = std::io::stdout();
    writeln!(output, "{line}")?;
    Ok(output.flush()?)
}

fn run_suite(suite: &Suite, programs: &Programs) -> Result<()> {
    match &suite.work {
        Work::Packet => inherit(Command::new(&programs.packet).args(LIBTEST)),
        Work::Attach { without } => {
            let mut command = Command::new(&programs.attach);
            command.args(LIBTEST).args(without.iter().flat_map(|part| ["--skip", part]));
            inherit(&mut command)
        }
        Work::Veths { cases } => {
            let options = lab::Up {
                nodes: 3,
                xdp: Xdp::Off,
                mtu: 1500,
                underlay: Underlay::Ipv4,
                swarm: true,
                managers: 1,
                binary: Some(programs.shoal.clone()),
            };
            on_lab(&lab::up(&options)?, cases, programs)
        }
        Work::Nics { cases } => {
            let lab = nics::up(&programs.shoal, Xdp::Native)?;
            let native = nics::check_native(&lab);
            judge("virtio_interfaces_have_native_xdp", native.as_ref().map(drop))?;
            on_lab(&lab, cases, programs)?;
            native
        }
    }
}

/// Runs cases of the netns suite on a lab, and takes it down.
fn on_lab(lab: &Lab, cases: &[String], programs: &Programs) -> Result<()> {
    let mut command = Command::new(&programs.netns);
    command.arg("--exact").args(cases).env("SHOAL_XTASK", std::env::current_exe()?);
    command.env("SHOAL_SLOWNESS", SLOWNESS);
    let passed = inherit(&mut command);
    if passed.is_err() {
        lab::print_log_ends(lab, 30);
    }
    let down = lab::down().map(drop);
    judge("lab_down_leaves_nothing", down.as_ref().map(drop))?;
    passed.and(down)
}

/// Reports on a test of this module's own as test programs do.
fn judge(name: &str, outcome: Result<(), &anyhow::Error>) -> Result<()> {
    match outcome {
        Ok(()) => say(&format!("test {name} … ok\ntest result: ok. 1 passed; 0 failed; 0 ignored")),
        Err(error) => say(&format!(
            "    {error:#}\ntest {name} … FAILED\ntest result: FAILED. 0 passed; 1 failed; 0 ignored"
        )),
    }
}

/// A program that prints to where this one does.
fn inherit(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status();
    let status = status.with_context(|| format!("could not start {}", run::line(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", run::line(command));
    }
    Ok(())
}
