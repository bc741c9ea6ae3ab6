//! The `shoal` binary: the agent, and the programs that it runs inside tasks.

mod agent;
mod args;
mod drops;
mod facts;
mod host;
mod interfaces;
mod internal;
mod manager;
mod preflight;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // Before anything starts a thread: what runs in a task changes its namespaces.
    if let Some(code) = internal::dispatch() {
        return code;
    }
    let result = match args::Args::parse().command {
        args::Command::Agent(args) => agent::run(&args),
        args::Command::Drops(args) => drops::run(&args),
        args::Command::Version => {
            println!("shoal {}", facts::version_line());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shoal: {error:#}");
            ExitCode::FAILURE
        }
    }
}
