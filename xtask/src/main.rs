//! `cargo xtask`: the one tool that developers and CI call. One module a command.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod bounded;
mod build;
mod check;
mod demo;
mod fuzz;
mod lab;
mod run;
mod setup;
mod sys;
mod test;
mod tidy;
mod vm;
mod workspace;

/// Sets up, builds and checks Shoal.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes this machine able to build the BPF side and to run the lab and the tests
    Setup,
    /// Builds the `shoal` binary with the BPF object in it
    Build(build::Options),
    /// A cluster on this machine, its hosts in network namespaces
    #[command(subcommand)]
    Lab(lab::Action),
    /// Shows on this machine what Shoal does, and checks it
    Demo(demo::Options),
    /// Runs all tests, on this machine and on labs
    Test(test::Options),
    /// Runs the tests that depend on the kernel on several kernels, each in a virtual machine
    VmTest(vm::Options),
    /// Measures, and prints figures with their spread
    #[command(subcommand)]
    Bench(bench::Suite),
    /// Runs mutated packets on the host library and in the kernel, and guided fuzzing
    Fuzz(fuzz::Options),
    /// Checks format, lints and the repository's own rules; changes nothing, needs no root
    Check,
    /// Formats, and applies the fixes that clippy is sure of
    Fix,
    /// Checks the repository's own rules
    Tidy(tidy::Options),
}

fn main() -> ExitCode {
    match run_command(Arguments::parse().command) {
        Ok(code) => code,
        // Not by returning it from main: with RUST_BACKTRACE set a page of frames would hide what to do.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_command(command: Command) -> Result<ExitCode> {
    match command {
        Command::Setup => setup::run(),
        Command::Build(options) => build::run(&options),
        Command::Lab(action) => lab::run(&action),
        Command::Demo(options) => demo::run(&options),
        // Its closing line is the last word, for failures too.
        Command::Test(options) => return Ok(test::run(&options)),
        Command::VmTest(options) => return Ok(vm::run(&options)),
        Command::Bench(suite) => bench::run(&suite),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Check => check::run(),
        Command::Fix => check::fix(),
        Command::Tidy(options) => tidy::run(&options),
    }
    .map(|()| ExitCode::SUCCESS)
}
