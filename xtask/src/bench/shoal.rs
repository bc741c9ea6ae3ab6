//! The mesh's side of comparisons: services on the lab, and where their tasks are.

use std::net::SocketAddrV4;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::place::Place;
use super::ways::Way;
use crate::bounded;
use crate::lab::{self, Host, Lab};

/// The ports that n1 answers on.
const HTTP: u16 = 8081;
const IPERF3: u16 = 5201;
/// For a service's tasks to run.
const TASKS_LIMIT: Duration = Duration::from_mins(1);

/// Publishes three HTTP servers, one each on n2, n3 and n4, and an iperf3 server on n2. The client dials n1.
pub(super) fn publish(manager: &Host) -> Result<Way> {
    let everywhere_else = ["--mode", "global", "--constraint", "node.hostname!=n1"];
    let http = format!("{HTTP}:80");
    create(manager, "bench-http", &[&everywhere_else[..], &["--publish", &http, "shoal/whoami"]].concat())?;
    let iperf3 = format!("{IPERF3}:5201");
    let on_n2 = ["--constraint", "node.hostname==n2", "--publish", &iperf3];
    create(manager, "bench-iperf3", &[&on_n2[..], &["shoal/exec", "iperf3", "-s"]].concat())?;
    let at = |port| SocketAddrV4::new(manager.address, port);
    Ok(Way { name: "shoal", http: vec![at(HTTP)], iperf3: at(IPERF3) })
}

/// Fails unless the nodes attached as the lab was told to: a figure of something else would be worse than none.
pub(super) fn ensure_attached(lab: &Lab, mode: &str) -> Result<()> {
    for node in lab.nodes() {
        let info = lab::get_json(&node, "/info")?;
        let lines = info["DriverStatus"].as_array().map(Vec::as_slice).unwrap_or_default();
        let line = lines
            .iter()
            .find(|line| line[0].as_str().is_some_and(|name| name.eq_ignore_ascii_case("dataplane")));
        let shown = line.and_then(|line| line[1].as_str()).unwrap_or_default();
        let mut words = shown.split(|sign: char| !sign.is_ascii_alphanumeric() && sign != '-');
        ensure!(words.any(|word| word == mode), "{} is attached as {shown:?}, not as {mode}", node.name);
    }
    Ok(())
}

/// A task that does nothing, for programs to run in its namespace.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) place: Place,
    /// In the network of its service.
    pub(super) address: std::net::Ipv4Addr,
}

/// Starts an idle task on a node, in a network.
pub(super) fn idle_task(manager: &Host, node: &str, network: &str) -> Result<Task> {
    let name = format!("{network}-{node}");
    let constraint = format!("node.hostname=={node}");
    let arguments = ["--network", network, "--constraint", &constraint, "shoal/exec", "sleep", "1000000"];
    create(manager, &name, &arguments)?;
    let what = format!("the task of {name} runs");
    let task = bounded::until(&what, TASKS_LIMIT, || {
        let tasks = lab::get_json(manager, &format!("/tasks?filters={{%22service%22:[%22{name}%22]}}"))?;
        let tasks = tasks.as_array().cloned().unwrap_or_default();
        Ok(tasks.into_iter().find(|task| task["Status"]["State"] == "running"))
    })?;
    read(&task).with_context(|| format!("the task of {name}: {task}"))
}

fn read(task: &Value) -> Option<Task> {
    let pid = task["Status"]["ContainerStatus"]["PID"].as_u64()?;
    let address = task["NetworksAttachments"].as_array()?.last()?["Addresses"][0].as_str()?;
    Some(Task {
        place: Place::of_process(u32::try_from(pid).ok()?),
        address: address.split('/').next()?.parse().ok()?,
    })
}

fn create(manager: &Host, name: &str, arguments: &[&str]) -> Result<()> {
    let create = ["service", "create", "--detach", "--name", name];
    let created = lab::docker(manager, &[&create[..], arguments].concat());
    created.map(drop).with_context(|| format!("creating service {name}"))
}
