//! The suites: what they run, on which kernels, and the programs for it, built here before any guest runs.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::kernels::Series;
use crate::{lab, run, workspace};

/// What a guest is to do.
#[derive(Serialize, Deserialize, Debug)]
pub(super) struct Plan {
    pub(super) programs: Programs,
    pub(super) suites: Vec<Suite>,
}

/// What runs in guests.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(super) struct Programs {
    pub(super) packet: PathBuf,
    pub(super) attach: PathBuf,
    pub(super) netns: PathBuf,
    pub(super) shoal: PathBuf,
    pub(super) xtask: PathBuf,
}

/// One line of the report for each kernel.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(super) struct Suite {
    pub(super) name: String,
    pub(super) work: Work,
}

/// What a suite runs.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(super) enum Work {
    /// The packet fixtures and the verifier's ceilings.
    Packet,
    /// Attaching, but for what this kernel has not.
    Attach { without: Vec<String> },
    /// Cases of the netns suite on a lab of veths, with TC alone.
    Veths { cases: Vec<String> },
    /// Cases of it on a lab of virtio interfaces, with native XDP.
    Nics { cases: Vec<String> },
}

impl Suite {
    /// How long it may take where nothing else runs and the processor runs the guest's instructions.
    pub(super) fn limit(&self) -> Duration {
        match &self.work {
            Work::Packet | Work::Attach { .. } => Duration::from_secs(30),
            Work::Veths { cases } => Duration::from_mins(1) + Duration::from_secs(30) * cases.len() as u32,
            Work::Nics { .. } => Duration::from_mins(2),
        }
    }

    /// How many tests it consists of at least.
    pub(super) fn tests(&self) -> usize {
        match &self.work {
            Work::Packet | Work::Attach { .. } => 1,
            // That the lab goes without a trace is a test like the others; so is how the interfaces are attached to.
            Work::Veths { cases } => cases.len() + 1,
            Work::Nics { cases } => cases.len() + 2,
        }
    }
}

/// A published port over both families and both ways of replies, by the client behind the router and by the nodes' own
/// processes; an overlay in both families with names, VIPs and borders.
const CASES: [&str; 7] = [
    "matrix::routed_client_is_served_on_every_way",
    "mesh::datagrams_of_every_size_come_back_unchanged",
    "local::processes_of_a_node_reach_its_ports_by_every_address",
    "overlay::names_resolve_to_the_vip_and_to_the_tasks",
    "overlay::task_reaches_every_task_of_its_service_itself_included",
    "overlay::networks_are_kept_apart",
    "overlay6::names_lead_to_every_task",
];
/// The one takes minutes where QEMU emulates both the interfaces and the processor, the other puts a host on the switch.
const CASES_OF_VETHS: [&str; 2] = [
    "mesh::http_reaches_every_task_by_every_node_with_the_clients_address",
    "relay::tunnel_is_no_open_relay",
];
/// Encrypted networks by the kernel's own WireGuard, which the machine that runs the tests may not have; all of their cases but the
/// churn, which is a matter of pace.
const CASES_OF_WIREGUARD: [&str; 9] = [
    "encryption::change_of_keys_loses_no_packet",
    "encryption::what_comes_in_cleartext_reaches_no_task",
    "underlay::nothing_of_an_encrypted_network_is_seen",
    "underlay::packets_sent_again_reach_no_task",
    "isolation::tasks_reach_exactly_those_on_their_encrypted_networks",
    "isolation::forged_frames_reach_nobody_on_encrypted_networks",
    "names::every_kind_of_record_is_answered_on_an_encrypted_network",
    "mtu::tasks_talk_encrypted_whatever_the_underlay_carries",
    "mtu::encrypted_transfers_go_on_when_the_underlay_narrows",
];
/// What lowers a limit of the whole kernel, and attacks what the host's kernel may not have: IPVS.
const CASES_OF_PEERS: [&str; 1] = ["flood::full_table_of_tracked_connections_stops_others_and_not_the_mesh"];

/// The suites of a kernel whose names contain `filter`.
pub(super) fn of(series: Series, filter: &str) -> VecDeque<Suite> {
    let tcx = series.has_tcx();
    let without = if tcx { Vec::new() } else { vec!["tcx".to_owned()] };
    let named = |cases: &[&str]| cases.iter().map(|case| (*case).to_owned()).collect::<Vec<_>>();
    let hooks = if tcx { "TCX and classic TC" } else { "classic TC" };
    let hook = if tcx { "TCX" } else { "classic TC" };
    let all = [
        ("packet".to_owned(), Work::Packet),
        (format!("attach by {hooks}"), Work::Attach { without }),
        (format!("lab by {hook}"), Work::Veths { cases: [named(&CASES_OF_VETHS), named(&CASES)].concat() }),
        ("lab by native XDP on virtio-net".to_owned(), Work::Nics { cases: named(&CASES) }),
        ("WireGuard of the kernel".to_owned(), Work::Veths { cases: named(&CASES_OF_WIREGUARD) }),
        ("attacks on peers: nftables, IPVS".to_owned(), Work::Veths { cases: named(&CASES_OF_PEERS) }),
    ];
    all.into_iter()
        .filter(|(name, _)| name.contains(filter))
        .map(|(name, work)| Suite { name, work })
        .collect()
}

/// Builds what runs in guests, and puts it into `folder`, smaller by what only a debugger reads.
///
/// The lab's profile: tests, lab and guests share one build.
pub(super) fn build(folder: &Path) -> Result<Programs> {
    fs::create_dir_all(folder).with_context(|| format!("could not create {}", folder.display()))?;
    let tests = test_programs()?;
    let shoal = lab::build()?;
    let place = |name: &str, built: &Path| -> Result<PathBuf> {
        let path = folder.join(name);
        let mut strip = Command::new("strip");
        run::output(strip.arg("-o").arg(&path).arg(built))
            .context("strip is part of the package that brings the linker, binutils")?;
        Ok(path)
    };
    let test = |name: &str| -> Result<PathBuf> {
        let found = tests.iter().find(|(target, _)| target == name);
        place(name, &found.with_context(|| format!("cargo built no test {name}"))?.1)
    };
    Ok(Programs {
        packet: test("packet")?,
        attach: test("attach")?,
        netns: test("netns")?,
        shoal: place("shoal", &shoal)?,
        xtask: place("xtask", &std::env::current_exe()?)?,
    })
}

/// Builds the tests, always of the whole workspace as `cargo xtask test` does, and gives names and files of those that
/// are programs of their own.
fn test_programs() -> Result<Vec<(String, PathBuf)>> {
    let mut command = workspace::cargo();
    command.args(["test", "--workspace", "--no-run", "--locked", "--profile", lab::PROFILE]);
    command.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    let output = command.output().with_context(|| format!("could not start {}", run::line(&command)))?;
    if !output.status.success() {
        bail!("the tests do not build: {} ended with {}", run::line(&command), output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    Ok(messages.lines().filter_map(test_program).collect())
}

/// Name and file of a test program that a message of cargo tells of.
fn test_program(message: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(message).ok()?;
    let target = &message["target"];
    target["kind"].as_array()?.iter().find(|kind| *kind == "test")?;
    Some((target["name"].as_str()?.to_owned(), message["executable"].as_str()?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_tells_where_test_programs_are() {
        let message = r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"packet"},"executable":"/t/packet-1"}"#;
        assert_eq!(test_program(message), Some(("packet".to_owned(), PathBuf::from("/t/packet-1"))));
        let library =
            r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"x"},"executable":null}"#;
        assert_eq!(test_program(library), None);
        assert_eq!(test_program("   Compiling"), None);
    }

    #[test]
    fn a_kernel_without_tcx_is_not_asked_for_it() {
        let names = |series| of(series, "").into_iter().map(|suite| suite.name).collect::<Vec<_>>();
        assert!(names(Series::V6_1).iter().all(|name| !name.contains("TCX")));
        assert_eq!(names(Series::V6_1).len(), names(Series::V7_2).len());
        assert_eq!(of(Series::V6_12, "lab").len(), 2);
    }
}
