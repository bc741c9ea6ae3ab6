//! The mesh beside plain routing: the same client, the same servers, the same number of nodes passed.
//!
//! The client dials n1; the servers run on n2. Through the mesh, n1 is the ingress node of a published port and the
//! servers are tasks of n2. By plain routing, n1 forwards by its routes to an address of n2, where the same programs
//! run beside the tasks, and answers come back by n1 as well.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Case, show};
use crate::bounded;
use crate::lab::{self, BINARY, Host, Lab, ROUTED_CLIENT, Xdp, in_netns};

/// Rounds; each measures every way once.
const ROUNDS: usize = 5;
/// Length of one measurement, s.
const SECONDS: &str = "2";
/// For one measurement.
const LIMIT: Duration = Duration::from_secs(20);
/// For services to serve.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// The address on n2 that plain routing leads to.
const PLAIN: &str = "198.18.2.2";
/// Ports of the servers: published, and on the plain address.
const HTTP: u16 = 8081;
const IPERF: u16 = 5201;

/// One way from the client to the servers.
struct Way {
    name: &'static str,
    address: String,
}

/// Measures on a lab that is up.
pub(super) fn run(lab: &Lab, xdp: Xdp) -> Result<Vec<Case>> {
    let client = Host::client();
    let (n1, n2) = (lab.node("n1")?, lab.node("n2")?);
    publish(&n1)?;
    let servers = PlainServers::start(&n1, &n2, &client)?;
    let ways = [
        Way { name: "plain", address: PLAIN.to_owned() },
        Way { name: "mesh", address: n1.address.to_string() },
    ];
    for way in &ways {
        await_servers(&client, way)?;
    }
    println!(
        "netns, xdp {xdp}: client -> n1 -> n2; wrk -t1 -c16, connections closed and kept; iperf3, one stream"
    );
    let mut samples: Vec<[Vec<f64>; 4]> = ways.iter().map(|_| Default::default()).collect();
    for _ in 0..ROUNDS {
        for (way, samples) in ways.iter().zip(&mut samples) {
            samples[0].push(requests(&client, way, true)?);
            samples[1].push(requests(&client, way, false)?);
            samples[2].push(gigabits(&client, way, false)?);
            samples[3].push(gigabits(&client, way, true)?);
        }
    }
    drop(servers);
    let mut cases = Vec::new();
    for (way, samples) in ways.iter().zip(samples) {
        let figures =
            [("connections", "1/s"), ("requests", "1/s"), ("iperf3 up", "Gb/s"), ("iperf3 down", "Gb/s")];
        for ((figure, unit), samples) in figures.into_iter().zip(samples) {
            cases.push(Case::new(format!("xdp {xdp}: {} {figure}", way.name), unit, samples));
        }
    }
    show(&cases);
    let (plain, mesh) = cases.split_at(4);
    for (plain, mesh) in plain.iter().zip(mesh) {
        println!("{}: {:.2} of plain routing", mesh.name, mesh.median / plain.median);
    }
    println!();
    Ok(cases)
}

/// The services that the mesh leads to, one task each, on n2.
fn publish(manager: &Host) -> Result<()> {
    let create = |name: &str, port: String, image_and_command: &[&str]| {
        let mut arguments = vec![
            "service",
            "create",
            "--name",
            name,
            "--constraint",
            "node.hostname==n2",
            "--publish",
            &port,
        ];
        arguments.extend(image_and_command);
        lab::docker(manager, &arguments).with_context(|| format!("creating service {name}"))
    };
    create("bench-http", format!("{HTTP}:80"), &["shoal/whoami"])?;
    create("bench-iperf", format!("{IPERF}:5201"), &["shoal/exec", "iperf3", "-s"])?;
    Ok(())
}

/// The same servers in n2's own namespace, and the routes to them. They end when this is dropped.
struct PlainServers {
    children: Vec<Child>,
}

impl PlainServers {
    fn start(n1: &Host, n2: &Host, client: &Host) -> Result<Self> {
        let routed = format!("{ROUTED_CLIENT}/32");
        let [n1_address, n2_address, client_address] = [n1, n2, client].map(|host| host.address.to_string());
        ip(client, &["route", "add", PLAIN, "via", &n1_address, "src", &ROUTED_CLIENT.to_string()])?;
        ip(n1, &["route", "add", PLAIN, "via", &n2_address])?;
        ip(n1, &["route", "add", &routed, "via", &client_address])?;
        ip(n2, &["address", "add", &format!("{PLAIN}/32"), "dev", "lo"])?;
        ip(n2, &["route", "add", &routed, "via", &n1_address])?;
        // n1 forwards out of the link that packets came in by, and would tell the client to leave it out.
        for scope in ["all", "eth0"] {
            let script = format!("echo 0 >/proc/sys/net/ipv4/conf/{scope}/send_redirects");
            bounded::output(in_netns(&n1.netns(), "sh").args(["-c", &script]), LIMIT)?;
        }
        let mut servers = Self { children: Vec::new() };
        servers.spawn(in_netns(&n2.netns(), BINARY).args([
            "internal",
            "whoami",
            "--port",
            &HTTP.to_string(),
        ]))?;
        servers.spawn(in_netns(&n2.netns(), "iperf3").args(["-s", "-B", PLAIN, "-p", &IPERF.to_string()]))?;
        Ok(servers)
    }

    fn spawn(&mut self, command: &mut Command) -> Result<()> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.children.push(command.spawn().context("starting a server")?);
        Ok(())
    }
}

impl Drop for PlainServers {
    fn drop(&mut self) {
        for child in &mut self.children {
            // One that has ended by itself is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn ip(host: &Host, arguments: &[&str]) -> Result<()> {
    bounded::output(Command::new("ip").args(["-n", &host.netns()]).args(arguments), LIMIT).map(drop)
}

fn await_servers(client: &Host, way: &Way) -> Result<()> {
    let url = format!("http://{}:{HTTP}/", way.address);
    bounded::until(&format!("an answer by {} way", way.name), READY_LIMIT, || {
        let mut curl = in_netns(&client.netns(), "curl");
        let answered =
            bounded::run(curl.args(["-s", "-m", "2", "-o", "/dev/null", &url]), LIMIT)?.status.success();
        Ok(answered.then_some(()))
    })
}

/// Requests per second, each by a connection of its own if `closed`.
fn requests(client: &Host, way: &Way, closed: bool) -> Result<f64> {
    let mut wrk = in_netns(&client.netns(), "wrk");
    wrk.args(["-t1", "-c16", &format!("-d{SECONDS}s")]);
    if closed {
        wrk.args(["-H", "Connection: close"]);
    }
    let printed = bounded::output(wrk.arg(format!("http://{}:{HTTP}/", way.address)), LIMIT)?;
    let rate = printed.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
    rate.and_then(|rate| rate.trim().parse().ok()).with_context(|| format!("wrk printed: {printed}"))
}

/// Throughput of one TCP stream, towards the server or from it.
fn gigabits(client: &Host, way: &Way, down: bool) -> Result<f64> {
    let mut iperf = in_netns(&client.netns(), "iperf3");
    iperf.args(["-J", "-t", SECONDS, "-c", &way.address, "-p", &IPERF.to_string()]);
    if down {
        iperf.arg("-R");
    }
    let printed = bounded::output(&mut iperf, LIMIT)?;
    let report: serde_json::Value = serde_json::from_str(&printed).context("iperf3's report")?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    bits.map(|bits| bits / 1e9).with_context(|| format!("iperf3 reported: {printed}"))
}
