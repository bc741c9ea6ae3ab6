//! Where a benchmark's programs run: network namespaces, the lab's and others.

use std::path::PathBuf;
use std::process::Command;

use crate::lab::Host;

/// Start of the names of the namespaces that benchmarks make.
pub(super) const PREFIX: &str = "shb-";

/// A network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    netns: PathBuf,
}

impl Place {
    /// A host of the lab.
    pub(super) fn of_host(host: &Host) -> Self {
        Self::named(&host.netns())
    }

    /// A namespace that `ip netns` knows.
    pub(super) fn named(netns: &str) -> Self {
        Self { netns: PathBuf::from("/run/netns").join(netns) }
    }

    /// The namespace of a task's process.
    pub(super) fn of_process(pid: u32) -> Self {
        Self { netns: PathBuf::from(format!("/proc/{pid}/ns/net")) }
    }

    /// `program`, to be run here.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.netns.display())).arg("--").arg(program);
        command
    }

    /// `program`, to be run here in a session of its own, as tasks are: the scheduler shares the CPUs out by sessions.
    pub(super) fn server(&self, program: &str) -> Command {
        let inside = self.command(program);
        let mut command = Command::new("setsid");
        command.arg(inside.get_program()).args(inside.get_args());
        command
    }
}
