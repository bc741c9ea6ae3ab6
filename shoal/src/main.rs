//! The `shoal` binary: the agent, the programs that it runs inside tasks, and commands that look at a node.

mod agent;
mod api;
mod args;
mod attach;
mod attachments;
mod backup;
mod drops;
mod explain;
mod facts;
mod flows;
mod host;
mod interfaces;
mod internal;
mod manager;
mod network;
mod node;
mod preflight;
mod print;
mod problems;
mod status;
mod token;
mod watch;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // Before anything starts a thread: what runs in a task changes its namespaces.
    if let Some(code) = internal::dispatch() {
        return code;
    }
    let result = match args::Args::parse().command {
        args::Command::Agent(args) => agent::run(&args),
        args::Command::Status(args) => status::run(&args),
        args::Command::Watch(args) => watch::run(&args),
        args::Command::Flows(args) => flows::run(&args),
        args::Command::Drops(args) => drops::run(&args),
        args::Command::Explain(args) => explain::run(&args),
        args::Command::Network(args) => network::run(&args),
        args::Command::Token(args) => token::run(&args),
        args::Command::Node(args) => node::run(&args),
        args::Command::Backup(args) => backup::backup(&args),
        args::Command::Restore(args) => backup::restore(&args),
        args::Command::Attach(args) => attach::attach(&args),
        args::Command::Detach(args) => attach::detach(&args),
        args::Command::Attachments(args) => attach::list(&args),
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
