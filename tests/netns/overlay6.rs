//! Overlay networks with IPv6, from inside tasks.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::client;
use crate::curl;
use crate::engine::{self, Task};
use crate::figure;
use crate::lab::{self, Lab};
use crate::mtu;
use crate::overlay::{create_idle, create_network};
use crate::ways::Family;

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
        let url = format!("http://{target}/");
        let answers = curl::answering(curl6(&caller), &url, 90)?;
        let (shares, _) = client::shares(answers.iter().map(String::as_str));
        figure!("90 requests to {url}: {shares:?}");
        ensure!(shares.len() == 3, "{shares:?}");
        let printed = lab::output(curl::curl(curl6(&caller)).arg(&url))?;
        let seen = printed.lines().find(|line| line.starts_with("client: ")).unwrap_or_default();
        ensure!(seen.starts_with("client: [fd00:b1::"), "seen as {seen}");
    }
    for task in &web {
        curl::answering(curl6(task), "http://web/", 6).with_context(|| format!("from web.{}", task.slot))?;
    }
    Ok(())
}

/// curl in a task, by IPv6 alone.
fn curl6(task: &Task) -> Command {
    let mut curl = task.command("curl");
    curl.arg("-6");
    curl
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
    mtu::transfer(&mtu::create(lab, &["--subnet", SUBNET], &[Family::V6])?, Family::V6)
}
