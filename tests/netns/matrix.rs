//! What every way through a published port has to do: return path × family × protocol, by every node.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::client::{self, Answer};
use crate::figure;
use crate::iperf3;
use crate::lab::{self, Lab, as_client, command_in, on_client};
use crate::ways::{self, Way};

/// Requests a way and a protocol, over all nodes.
const REQUESTS: u16 = 150;
/// The first of their source ports.
const FIRST_PORT: u16 = 24_000;
const DOWNLOAD_BYTES: u32 = 20_000_000;
/// For the one task, on the first node: dialled there it is local, elsewhere remote.
const ON_N1: [&str; 2] = ["--constraint", "node.hostname==n1"];

type Ask = fn(SocketAddr, SocketAddr) -> Result<Answer>;

pub(crate) fn requests_reach_every_task_by_every_node_with_the_clients_address(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 3, &[])?;
    let protocols: [(&str, Ask); 2] = [
        ("TCP", |source, to| client::http(source, to, "/")),
        ("UDP", |source, to| client::udp(source, to, b"shoal")),
    ];
    for (first, way) in (FIRST_PORT..).step_by(usize::from(REQUESTS)).zip(Way::all()) {
        for (protocol, ask) in protocols {
            let started = Instant::now();
            let mut answers = Vec::new();
            as_client(|| {
                for (port, to) in (first..first + REQUESTS).zip(way.targets(lab).into_iter().cycle()) {
                    let source = SocketAddr::new(way.family.client(), port);
                    let answer = ask(source, to).with_context(|| format!("{way}, {protocol} by {to}"))?;
                    ensure!(answer.client == source.to_string(), "{to} saw {} for {source}", answer.client);
                    answers.push(answer.task);
                }
                Ok(())
            })?;
            let (shares, _) = client::shares(answers.iter().map(String::as_str));
            let seconds = started.elapsed().as_secs_f32();
            figure!("{way}, {protocol}: {REQUESTS} answers in {seconds:.2} s, {shares:?}");
            ensure!(shares.len() == 3, "{} of 3 tasks were reached", shares.len());
        }
    }
    Ok(())
}

pub(crate) fn routed_client_is_served_on_every_way(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 2, &[])?;
    for way in Way::all() {
        let source = SocketAddr::new(way.family.routed_client(), 0);
        for to in way.targets(lab).into_iter().cycle().take(12) {
            let answer = as_client(|| client::http(source, to, "/")).with_context(|| way.to_string())?;
            let seen: SocketAddr = answer.client.parse()?;
            ensure!(seen.ip() == source.ip(), "{way}: {to} saw {seen}");
            let answer = as_client(|| client::udp(source, to, b"routed")).with_context(|| way.to_string())?;
            let seen: SocketAddr = answer.client.parse()?;
            ensure!(seen.ip() == source.ip(), "{way}: {to} saw {seen} (UDP)");
        }
    }
    Ok(())
}

/// Bytes that a node has sent, by the switch's count.
fn sent_bytes(node: &str) -> Result<u64> {
    let shown = lab::output(command_in("sw", "ip").args(["-s", "-j", "link", "show", "dev", node]))?;
    let shown: Value = serde_json::from_str(&shown)?;
    shown[0]["stats64"]["rx"]["bytes"].as_u64().context("no count of bytes")
}

/// Every byte right; and a direct reply does not pass the node that was dialled.
pub(crate) fn downloads_are_intact_and_take_the_way_that_the_service_says(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 1, &ON_N1)?;
    for way in Way::all() {
        for node in &lab.nodes[..2] {
            let (before, started) = (sent_bytes(&node.name)?, Instant::now());
            as_client(|| client::download(way.to(node), DOWNLOAD_BYTES as usize))
                .with_context(|| format!("{way} by {node}"))?;
            let seconds = started.elapsed().as_secs_f64();
            let megabits = f64::from(DOWNLOAD_BYTES) * 8.0 / 1e6 / seconds;
            let sent = sent_bytes(&node.name)? - before;
            figure!("{way} by {node}: {megabits:.0} Mbit/s, {node} sent {sent} bytes");
            let passes = *node == lab.nodes[0] || way.back == ways::Back::Tunnel;
            let whole = u64::from(DOWNLOAD_BYTES);
            ensure!(if passes { sent >= whole } else { sent < whole / 4 }, "{way} by {node}: {sent} bytes");
        }
    }
    Ok(())
}

/// What iperf3 reports of a run from the client.
fn iperf3(way: Way, to: SocketAddr, options: &[&str]) -> Result<Value> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let target = [way.family.flag(), "-c", &ip, "-p", &port];
    iperf3::run(on_client("timeout"), &[&target, options].concat()).with_context(|| way.to_string())
}

fn create_iperf3(lab: &Lab) -> Result<()> {
    ways::create(lab, 1, iperf3::PORT, &ON_N1, &iperf3::SERVER)?;
    for way in Way::all() {
        for to in way.targets(lab) {
            lab::until(&format!("{to} is open"), Duration::from_secs(10), || {
                Ok(as_client(|| client::touch(client::anywhere(to), to)).ok())
            })?;
        }
    }
    Ok(())
}

pub(crate) fn iperf3_runs_up_and_down_on_every_way(lab: &Lab) -> Result<()> {
    create_iperf3(lab)?;
    for way in Way::all() {
        for node in &lab.nodes[..2] {
            let mut rates = Vec::new();
            for direction in [&["-n", "30M"][..], &["-n", "30M", "-R"]] {
                rates.push(iperf3::megabits(&iperf3(way, way.to(node), direction)?)?);
            }
            figure!("{way} by {node}: {:.0} Mbit/s up, {:.0} Mbit/s down", rates[0], rates[1]);
            ensure!(rates.iter().all(|rate| *rate > 20.0), "{way} by {node}: {rates:?} Mbit/s");
        }
    }
    Ok(())
}

/// Datagrams of six fragments each, both ways; what little the receivers' buffers don't hold may be lost.
pub(crate) fn fragmented_datagrams_pass_on_every_way(lab: &Lab) -> Result<()> {
    create_iperf3(lab)?;
    for way in Way::all() {
        for node in &lab.nodes[..2] {
            for direction in [&[][..], &["-R"]] {
                let flow = ["-u", "-l", "8000", "-b", "30M", "-n", "3M"];
                let options = [&flow[..], direction].concat();
                let run = || iperf3(way, way.to(node), &options);
                // A socket fails once when it is told of a smaller path MTU (IPv6), and iperf3 gives up on that.
                let told = |error: &anyhow::Error| format!("{error:#}").contains("Message too long");
                let report = run().or_else(|error| if told(&error) { run() } else { Err(error) })?;
                let (packets, lost) = iperf3::lost(&report)?;
                figure!("{way} by {node}, {direction:?}: {packets} of 8000 bytes, {lost:.1} % lost");
                ensure!(packets > 100 && lost < 10.0, "{way} by {node}: {report}");
            }
        }
    }
    Ok(())
}
