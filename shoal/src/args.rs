//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use mesh_agent::XdpMode;

/// A routing mesh and overlay network for Docker Swarm's commands, with its dataplane in eBPF.
#[derive(Debug, Parser)]
#[command(name = "shoal", version = crate::facts::VERSION)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs the agent: one on every host, managers and workers alike.
    Agent(Box<AgentArgs>),
    /// Shows how many packets this node dropped, and why.
    Drops(DropsArgs),
    /// Shows the version.
    Version,
}

/// Which counts to show, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct DropsArgs {
    /// The agent's folder on a BPF file system.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/shoal", env = "SHOAL_BPFFS")]
    pub(crate) bpffs: PathBuf,
    /// Shows every way that a packet can end, not drops alone.
    #[arg(long)]
    pub(crate) all: bool,
    /// Prints JSON: `{"<name>": <packets>, …}`.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How the agent runs.
#[derive(Debug, clap::Args)]
pub(crate) struct AgentArgs {
    /// Where the node's place in the cluster is kept, and on a manager the cluster's state.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/shoal", env = "SHOAL_STATE_DIR")]
    pub(crate) state_dir: PathBuf,
    /// Where the Docker-compatible socket is made: `docker.sock` in this folder.
    #[arg(long, value_name = "DIR", default_value = "/run/shoal", env = "SHOAL_RUN_DIR")]
    pub(crate) run_dir: PathBuf,
    /// A folder on a BPF file system, where the dataplane outlives the agent.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/shoal", env = "SHOAL_BPFFS")]
    pub(crate) bpffs: PathBuf,
    /// The node's name; the host's own where not given.
    #[arg(long, value_name = "NAME", env = "SHOAL_HOSTNAME")]
    pub(crate) hostname: Option<String>,
    /// How XDP runs on the uplinks: auto, native, generic or off.
    #[arg(long, value_name = "MODE", default_value_t = XdpMode::Auto, env = "SHOAL_XDP")]
    pub(crate) xdp: XdpMode,
    /// An interface to the other nodes and to clients; those with the advertised address where not given. May
    /// be repeated.
    #[arg(long = "uplink", value_name = "IF", num_args = 1.., env = "SHOAL_UPLINK", value_delimiter = ',')]
    pub(crate) uplinks: Vec<String>,
    /// Flows that the dataplane remembers at once, about 100 bytes each.
    #[arg(long, value_name = "N", default_value_t = 262_144, env = "SHOAL_FLOWS_MAX",
          value_parser = clap::value_parser!(u32).range(1024..=67_108_864))]
    pub(crate) flows_max: u32,
    /// What to log on standard error: error, warn, info, debug or trace, also by module
    /// (`info,mesh_agent=debug`).
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "SHOAL_LOG")]
    pub(crate) log: String,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn flags_are_read() {
        let line = "shoal agent --run-dir /run/shoal/n1 --xdp off --uplink a --uplink b --flows-max 4096 --hostname n1";
        let Command::Agent(args) = Args::parse_from(line.split(' ')).command else { panic!("not the agent") };
        assert_eq!(args.run_dir, PathBuf::from("/run/shoal/n1"));
        assert_eq!((args.xdp, args.flows_max), (XdpMode::Off, 4096));
        assert_eq!(args.uplinks, ["a", "b"]);
        assert_eq!(args.hostname.as_deref(), Some("n1"));
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        for (line, part) in [
            ("shoal agent --xdp sideways", "sideways"),
            ("shoal agent --flows-max 7", "1024"),
            ("shoal agent --state-dir", "--state-dir"),
        ] {
            let error = Args::try_parse_from(line.split(' ')).unwrap_err().to_string();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
