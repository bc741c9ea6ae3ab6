//! Overlay networks with IPv6, from inside tasks.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use anyhow::{Context, Result, ensure};

use crate::client;
use crate::engine::{self, Task};
use crate::figure;
use crate::lab::{self, Lab};
use crate::overlay::{create_idle, create_network};

/// The network's IPv6 subnet.
const SUBNET: &str = "fd00:b1::/64";

/// `web` with three replicas, and a caller, on the network `blue`.
fn create(lab: &Lab) -> Result<(Vec<Task>, Task)> {
    create_network(lab, "blue", &["--ipv6", "--subnet", SUBNET])?;
    let web = engine::create(lab, "web", 3, &["--replicas", "3", "--network", "blue", "shoal/whoami"])?;
    let caller = create_idle(lab, "caller", &["--network", "blue"])?;
    Ok((web, caller))
}

/// What a name resolves to, inside a task.
fn resolve(task: &Task, name: &str) -> Result<BTreeSet<Ipv6Addr>> {
    let printed = lab::output(task.command("dig").args(["+short", "+time=2", "+tries=2", name, "AAAA"]))?;
    printed.lines().map(|line| line.parse().with_context(|| format!("dig {name}: {line}"))).collect()
}

pub(crate) fn names_lead_to_every_task(lab: &Lab) -> Result<()> {
    let (web, caller) = create(lab)?;
    let vips = resolve(&caller, "web")?;
    let tasks = resolve(&caller, "tasks.web")?;
    figure!("web is {vips:?}; tasks.web is {tasks:?}");
    ensure!(vips.len() == 1 && tasks.len() == 3, "expected one VIP and three tasks");
    let vip = vips.first().context("no VIP")?;
    for target in ["web".to_owned(), format!("[{vip}]")] {
        let mut command = caller.command("curl");
        command.args(["-6", "--silent", "--show-error", "--max-time", "3", "--noproxy", "*"]);
        let url = format!("http://{target}/");
        let printed = lab::output(command.args(["-H", "Connection: close"]).args(vec![&url[..]; 90]))?;
        let answers: Vec<&str> = printed.lines().filter_map(|line| line.strip_prefix("task: ")).collect();
        let (shares, _) = client::shares(answers.iter().copied());
        figure!("90 requests to {url}: {shares:?}");
        ensure!(answers.len() == 90 && shares.len() == 3, "{} answers, {shares:?}", answers.len());
        let seen = printed.lines().find(|line| line.starts_with("client: ")).unwrap_or_default();
        ensure!(seen.starts_with("client: [fd00:b1::"), "seen as {seen}");
    }
    for task in &web {
        let printed = lab::output(task.command("curl").args([
            "-6",
            "--silent",
            "--show-error",
            "--max-time",
            "3",
            "--noproxy",
            "*",
            "http://web/",
            "http://web/",
            "http://web/",
            "http://web/",
            "http://web/",
            "http://web/",
        ]))?;
        ensure!(printed.matches("task: ").count() == 6, "from web.{}: {printed}", task.slot);
    }
    Ok(())
}

pub(crate) fn vip_tasks_and_gateway_answer_ping(lab: &Lab) -> Result<()> {
    let (_, caller) = create(lab)?;
    let mut targets: Vec<String> = resolve(&caller, "web")?.iter().map(Ipv6Addr::to_string).collect();
    targets.extend(resolve(&caller, "tasks.web")?.iter().map(Ipv6Addr::to_string));
    let routes = lab::output(caller.command("ip").args(["-6", "-oneline", "route", "show", "default"]))?;
    let gateway = routes.split(' ').skip_while(|word| *word != "via").nth(1);
    targets.push(gateway.with_context(|| format!("no gateway: {routes}"))?.to_owned());
    let vips = 1;
    for (at, target) in targets.iter().enumerate() {
        // The second size does not fit one packet, which is too much for who answers for a VIP.
        for size in if at < vips { &["56"][..] } else { &["56", "2000"] } {
            let mut command = caller.command("ping");
            command.args(["-c", "2", "-i", "0.1", "-W", "2", "-s", size, target]);
            let printed = lab::output(&mut command).with_context(|| format!("ping {target}"))?;
            ensure!(printed.contains(" 2 received"), "{printed}");
        }
        figure!("{target} answers pings");
    }
    Ok(())
}

/// Between nodes, both ways; more than a packet holds.
pub(crate) fn big_transfers_between_tasks_on_different_nodes(lab: &Lab) -> Result<()> {
    create_network(lab, "blue", &["--ipv6", "--subnet", SUBNET])?;
    let place = |node: &str| {
        ["--network".to_owned(), "blue".to_owned(), format!("--constraint=node.hostname=={node}")]
    };
    let place = |node: &str| place(node).to_vec();
    let server: Vec<String> = place("n1");
    let server: Vec<&str> = server.iter().map(String::as_str).collect();
    engine::create(lab, "server", 1, &[&server[..], &["shoal/exec", "iperf3", "-s"]].concat())?;
    let caller: Vec<String> = place("n2");
    let caller: Vec<&str> = caller.iter().map(String::as_str).collect();
    let caller = create_idle(lab, "caller", &caller)?;
    lab::until("the server listens", std::time::Duration::from_secs(5), || {
        let mut probe = caller.command("iperf3");
        Ok(lab::output(probe.args(["-6", "-c", "server", "-n", "1K"])).ok())
    })?;
    for flow in [&["-n", "50M"][..], &["-n", "50M", "-R"], &["-u", "-l", "8000", "-b", "50M", "-n", "4M"]] {
        let mut command = caller.command("iperf3");
        let report = command.args(["-6", "-J", "-c", "server"]).args(flow).output()?.stdout;
        let report: serde_json::Value = serde_json::from_slice(&report)?;
        ensure!(report["error"].is_null(), "{}", report["error"]);
        let end = &report["end"];
        let sum = if flow[0] == "-u" { &end["sum"] } else { &end["sum_received"] };
        let megabits = sum["bits_per_second"].as_f64().context("no rate")? / 1e6;
        let lost = sum["lost_percent"].as_f64().unwrap_or_default();
        figure!("iperf3 {}: {megabits:.0} Mbit/s, {lost:.1} % lost", flow.join(" "));
        ensure!(megabits > 20.0 && lost < 5.0, "{report}");
    }
    Ok(())
}
