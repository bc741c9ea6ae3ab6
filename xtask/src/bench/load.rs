//! The programs that measure: wrk, iperf3, and [`probe`](super::probe) for latencies.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::place::Place;
use super::probe::Latencies;
use super::stage::Stage;
use crate::bounded;

/// Past the end of a measurement.
const SLACK: Duration = Duration::from_secs(20);
/// For servers to answer.
const READY_LIMIT: Duration = Duration::from_secs(40);

/// Gives wrk's threads the servers' addresses in turns, from the environment.
const SPREAD: &str = r#"local addresses, next = {}, 0
for address in os.getenv("SERVERS"):gmatch("%S+") do addresses[#addresses + 1] = address end
function setup(thread)
    thread.addr = wrk.lookup(addresses[next % #addresses + 1], wrk.port)[1]
    next = next + 1
end
"#;

/// The CPU that latencies are measured from.
const CLIENT_CPU: &str = "0";

/// What measures, from one place.
#[derive(Debug)]
pub(super) struct Load {
    client: Place,
    seconds: u32,
    script: PathBuf,
}

impl Load {
    /// Measures from `client`, `seconds` at a time.
    pub(super) fn new(client: Place, seconds: u32, stage: &Stage) -> Result<Self> {
        Ok(Self { client, seconds, script: stage.write("spread.lua", SPREAD)? })
    }

    /// The command lines, for people.
    pub(super) fn commands(&self) -> String {
        let seconds = self.seconds;
        format!(
            "  connections  wrk -t3 -c15 -d{seconds}s -H 'Connection: close' http://ADDRESS/, a thread for each server\n  \
               requests     the same without the header: connections are kept\n  \
               iperf3       iperf3 -t {seconds} -c ADDRESS, one stream; down: with -R; to one server\n  \
               request      taskset -c {CLIENT_CPU}: connect, request, read to the end, one after another for {seconds} s"
        )
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.seconds.into()) + SLACK
    }

    /// Requests a second, each by a connection of its own if `closed`.
    pub(super) fn requests(&self, servers: &[SocketAddrV4], closed: bool) -> Result<f64> {
        let first = servers.first().context("no server")?;
        let addresses: Vec<String> = servers.iter().map(|server| server.ip().to_string()).collect();
        let mut wrk = self.client.command("wrk");
        wrk.args(["-t3", "-c15", &format!("-d{}s", self.seconds), "-s"]).arg(&self.script);
        wrk.env("SERVERS", addresses.join(" "));
        if closed {
            wrk.args(["-H", "Connection: close"]);
        }
        let printed = bounded::output(wrk.arg(format!("http://{first}/")), self.limit())?;
        let rate = printed.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
        rate.and_then(|rate| rate.trim().parse().ok()).with_context(|| format!("wrk printed: {printed}"))
    }

    /// Throughput of one TCP stream, towards the server or from it, Gb/s.
    pub(super) fn gigabits(&self, server: SocketAddrV4, down: bool) -> Result<f64> {
        let mut iperf = self.iperf3(server);
        iperf.args(["-J", "-t", &self.seconds.to_string()]);
        if down {
            iperf.arg("-R");
        }
        bounded::until(&format!("an iperf3 server at {server} that is free"), READY_LIMIT, || {
            let finished = bounded::run(&mut iperf, self.limit())?;
            let report: serde_json::Value =
                serde_json::from_str(&finished.stdout).with_context(|| finished.said())?;
            // The server takes a while to notice that the last test has ended.
            if report["error"].as_str().is_some_and(|error| error.contains("busy")) {
                return Ok(None);
            }
            let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
            bits.map(|bits| Some(bits / 1e9)).with_context(|| finished.said())
        })
    }

    /// How long a connection with one request takes to its end, one after another.
    pub(super) fn request_latencies(&self, servers: &[SocketAddrV4]) -> Result<Latencies> {
        self.probe("requests", servers)
    }

    /// How long an answer of a few bytes takes on a connection that is kept.
    pub(super) fn round_trip_latencies(&self, server: SocketAddrV4) -> Result<Latencies> {
        self.probe("round-trips", &[server])
    }

    fn probe(&self, what: &str, servers: &[SocketAddrV4]) -> Result<Latencies> {
        let mut command = self.client.command("taskset");
        command.args(["-c", CLIENT_CPU]).arg(own_program()?).args(["bench", "probe", what, "--seconds"]);
        command.arg(self.seconds.to_string()).args(servers.iter().map(ToString::to_string));
        let printed = bounded::output(&mut command, self.limit())?;
        serde_json::from_str(&printed).with_context(|| format!("the probe printed: {printed}"))
    }

    /// Waits until each of `names` has answered.
    pub(super) fn await_servers(&self, way: &str, servers: &[SocketAddrV4], names: &[&str]) -> Result<()> {
        let mut seen = std::collections::BTreeSet::new();
        bounded::until(&format!("answers of {} by way of {way}", names.join(", ")), READY_LIMIT, || {
            let mut curl = self.client.command("curl");
            curl.args(["-s", "-m", "2", "-H", "Connection: close"]);
            curl.args(servers.iter().map(|server| format!("http://{server}/")));
            let answer = bounded::run(&mut curl, SLACK)?.stdout;
            seen.extend(answer.lines().filter_map(|line| line.strip_prefix("node: ")).map(str::to_owned));
            Ok(names.iter().all(|name| seen.contains(*name)).then_some(()))
        })
    }

    /// Waits until an iperf3 server takes a test.
    pub(super) fn await_iperf3(&self, way: &str, server: SocketAddrV4) -> Result<()> {
        bounded::until(&format!("an iperf3 server by way of {way}"), READY_LIMIT, || {
            let finished = bounded::run(self.iperf3(server).args(["-n", "64K"]), SLACK)?;
            Ok(finished.status.success().then_some(()))
        })
    }

    fn iperf3(&self, server: SocketAddrV4) -> Command {
        let mut iperf = self.client.command("iperf3");
        iperf.args(["-c", &server.ip().to_string(), "-p", &server.port().to_string()]);
        iperf
    }
}

/// An HTTP server like those of tasks of `shoal/whoami`, in the stage's place for them.
pub(super) fn whoami(place: &Place, binary: &str, name: &str, port: u16) -> Command {
    let mut command = place.server(binary);
    command.args(["internal", "whoami", "--port", &port.to_string()]).env("SHOAL_NODE", name);
    command
}

/// An iperf3 server.
pub(super) fn iperf3_server(place: &Place, port: u16) -> Command {
    let mut command = place.server("iperf3");
    command.args(["-s", "-p", &port.to_string()]);
    command
}

/// A server that returns what it gets.
pub(super) fn echo_server(place: &Place, port: u16) -> Result<Command> {
    let mut command = place.server(&own_program()?.display().to_string());
    command.args(["bench", "probe", "echo", &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port).to_string()]);
    Ok(command)
}

/// This program, which is also what measures latencies.
fn own_program() -> Result<PathBuf> {
    std::env::current_exe().context("no path to this program")
}
