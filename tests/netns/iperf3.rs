//! iperf3: servers that tasks run, and what clients report of their runs.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::engine::{self, Task};
use crate::lab::{Lab, slowness, until};
use crate::ways::Family;

/// What has a task run a server.
pub(crate) const SERVER: [&str; 3] = ["shoal/exec", "iperf3", "-s"];
/// The port that it listens on.
pub(crate) const PORT: u16 = 5201;
/// How long a run may take, s.
const LIMIT_S: u32 = 40;
/// How long a server may be busy with the run before.
const BUSY: Duration = Duration::from_secs(10);
/// How long it may take until it listens.
const STARTED: Duration = Duration::from_secs(5);

/// What a client with these options reports. `timeout` is the command of that name where the client is to run.
pub(crate) fn run(mut timeout: Command, options: &[&str]) -> Result<Value> {
    timeout.arg((LIMIT_S * slowness()).to_string()).args(["iperf3", "-J"]).args(options);
    let what = format!("iperf3 {}", options.join(" "));
    // The server takes one run at a time, and may not be done with the one before.
    until("iperf3's server is free", BUSY, || {
        let output = timeout.output()?;
        let report: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("{what}: {}", String::from_utf8_lossy(&output.stderr)))?;
        match report["error"].as_str() {
            Some(error) if error.contains("busy") => Ok(None),
            Some(error) => bail!("{what}: {error}"),
            None => Ok(Some(report)),
        }
    })
}

/// Makes the service `server`, whose one task runs a server on `node` in `network`.
pub(crate) fn serve(lab: &Lab, network: &str, node: &str) -> Result<()> {
    let at = format!("node.hostname=={node}");
    let place = ["--network", network, "--constraint", &at];
    engine::create(lab, "server", 1, &[&place[..], &SERVER].concat()).map(drop)
}

/// What a run from a task against the service `server` reports.
pub(crate) fn ask(caller: &Task, family: Family, options: &[&str]) -> Result<Value> {
    run(caller.command("timeout"), &[&[family.flag(), "-c", "server"], options].concat())
}

/// Waits until the service `server` answers a task.
pub(crate) fn until_served(caller: &Task, family: Family) -> Result<()> {
    until(&format!("the server listens, {family}"), STARTED, || Ok(ask(caller, family, &["-n", "1K"]).ok()))
        .map(drop)
}

/// The part of a report about the whole run: what the receiver got of a stream, what was sent of datagrams.
fn sum(report: &Value) -> &Value {
    let datagrams = report["start"]["test_start"]["protocol"] == "UDP";
    &report["end"][if datagrams { "sum" } else { "sum_received" }]
}

/// The run's rate, Mbit/s.
pub(crate) fn megabits(report: &Value) -> Result<f64> {
    Ok(sum(report)["bits_per_second"].as_f64().context("a report without a rate")? / 1e6)
}

/// How many datagrams were sent, and how many percent of them were lost.
pub(crate) fn lost(report: &Value) -> Result<(u64, f64)> {
    let sum = sum(report);
    let packets = sum["packets"].as_u64().context("a report without a count of datagrams")?;
    Ok((packets, sum["lost_percent"].as_f64().context("a report without a count of lost datagrams")?))
}
