//! The second chance: connections whose packets come by another node than before, or after the tables have changed.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_agent::dataplane::Counter;

use crate::engine;
use crate::figure;
use crate::lab::{self, Lab, as_client, on_client, until};
use crate::steady::{self, Connection, Fate, Steady};
use crate::undo::Undo;
use crate::ways::{self, Family, Way, until_answered};

/// Addresses that more than one node answers for.
const SERVICE: Ipv4Addr = Ipv4Addr::new(198, 18, 2, 1);
const SERVICE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xc8, 0, 0, 0, 0, 0, 1);
const CONNECTIONS: usize = 40;
/// Between two requests on a connection.
const PAUSE: Duration = Duration::from_millis(20);
/// How long things are left as they are.
const QUIET: Duration = Duration::from_millis(700);

fn service(family: Family) -> IpAddr {
    match family {
        Family::V4 => SERVICE.into(),
        Family::V6 => SERVICE6.into(),
    }
}

/// Gives every node the service addresses.
fn announce(lab: &Lab) -> Result<Vec<Undo>> {
    let mut undo = Vec::new();
    for node in &lab.nodes {
        let ip = |words: &str| {
            let mut command = node.command("ip");
            command.args(words.split(' '));
            command
        };
        // Not the loopback's: what only the node itself can dial is no address that ports answer on.
        for (address, options) in [(format!("{SERVICE}/32"), ""), (format!("{SERVICE6}/128"), " nodad")] {
            lab::output(&mut ip(&format!("address add {address} dev eth0{options}")))?;
            undo.push(Undo::new(ip(&format!("address del {address} dev eth0"))));
        }
    }
    Ok(undo)
}

/// Leads the client's packets for the service addresses to a node.
fn route(lab: &Lab, node: usize) -> Result<()> {
    for family in Family::ALL {
        let (service, via) = (service(family).to_string(), family.of(&lab.nodes[node]).to_string());
        let mut command = on_client("ip");
        lab::output(command.args([family.flag(), "route", "replace", &service, "via", &via]))?;
    }
    Ok(())
}

/// The service address on every way.
fn targets() -> Vec<SocketAddr> {
    Way::all().map(|way| SocketAddr::new(service(way.family), way.back.port())).collect()
}

fn until_every_node_answers(lab: &Lab) -> Result<()> {
    for node in 0..lab.nodes.len() {
        route(lab, node)?;
        targets().into_iter().try_for_each(until_answered)?;
    }
    Ok(())
}

fn searched(lab: &Lab) -> Result<u64> {
    lab.nodes.iter().map(|node| node.count(Counter::MeshSearched)).sum()
}

fn unbroken(what: &str, fates: &[Fate]) -> Result<()> {
    let (requests, slowest, broken) = steady::sum(fates);
    figure!(
        "{what}: {} connections, {requests} requests, the slowest {} ms; {} broken",
        fates.len(),
        slowest.as_millis(),
        broken.len()
    );
    ensure!(broken.is_empty(), "{} of {} broken: {broken:#?}", broken.len(), fates.len());
    ensure!(fates.iter().all(|fate| fate.requests > 10), "too few requests to say anything");
    Ok(())
}

pub(crate) fn connections_go_on_when_their_route_moves_to_another_node(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 3, &[])?;
    let undo = announce(lab)?;
    until_every_node_answers(lab)?;
    route(lab, 0)?;
    let mut idle = as_client(|| targets().into_iter().map(Connection::open).collect::<Result<Vec<_>>>())?;
    let steady = Steady::start(&targets(), CONNECTIONS, PAUSE)?;
    let before = searched(lab)?;
    for node in [1, 2, 0, 1, 2] {
        route(lab, node)?;
        std::thread::sleep(QUIET);
    }
    unbroken("the route moved 5 times", &steady.finish()?)?;
    for (connection, answer) in &mut idle {
        let after = connection.ask().context("an idle connection")?;
        ensure!(after == *answer, "{after:?} instead of {answer:?}");
    }
    figure!("{} idle connections go on; {} segments searched for", idle.len(), searched(lab)? - before);
    drop(undo);
    Ok(())
}

pub(crate) fn scaling_and_moving_breaks_no_connection_whose_task_lives(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 3, &[])?;
    let undo = announce(lab)?;
    until_every_node_answers(lab)?;
    route(lab, 0)?;
    let before = searched(lab)?;
    let first = Steady::start(&targets(), CONNECTIONS, PAUSE)?;
    scale(lab, 6)?;
    route(lab, 1)?;
    std::thread::sleep(QUIET);
    // With these there are connections of all six.
    let second = Steady::start(&targets(), CONNECTIONS, PAUSE)?;
    scale(lab, 3)?;
    route(lab, 2)?;
    std::thread::sleep(QUIET);
    let mut fates = first.finish()?;
    fates.extend(second.finish()?);
    let mut living = BTreeSet::new();
    for back in ways::Back::ALL {
        living.extend(engine::running(lab, &back.to_string())?.into_iter().map(|task| task.id));
    }
    let lives = |fate: &Fate| living.iter().any(|id| fate.task.ends_with(id.as_str()));
    let (kept, gone): (Vec<Fate>, Vec<Fate>) = fates.into_iter().partition(lives);
    figure!(
        "{} connections were with tasks that ended; {} searched for",
        gone.len(),
        searched(lab)? - before
    );
    unbroken("scaled 3, 6, 3 and moved twice", &kept)?;
    drop(undo);
    Ok(())
}

fn scale(lab: &Lab, replicas: usize) -> Result<()> {
    for back in ways::Back::ALL {
        let wanted = format!("{back}={replicas}");
        engine::docker_ok(lab.manager(), &["service", "scale", "--detach", &wanted])?;
    }
    for back in ways::Back::ALL {
        engine::until_running(lab, &back.to_string(), replicas)?;
    }
    Ok(())
}

/// A node whose cable is pulled, and whose route has moved, takes nothing with it but its own tasks.
pub(crate) fn lost_ingress_node_breaks_no_connection_to_others(lab: &Lab) -> Result<()> {
    let away = ["--constraint", "node.hostname!=n3"];
    ways::create_web(lab, 4, &away)?;
    let undo = announce(lab)?;
    until_every_node_answers(lab)?;
    for to in [0, 1, 0] {
        route(lab, 2)?;
        let steady = Steady::start(&targets(), CONNECTIONS, PAUSE)?;
        lab.xtask(&["cut", "n3"])?;
        route(lab, to)?;
        std::thread::sleep(QUIET);
        let fates = steady.finish()?;
        lab.xtask(&["heal", "n3"])?;
        unbroken(&format!("n3 lost, its route moved to {}", lab.nodes[to]), &fates)?;
        route(lab, 2)?;
        until("n3 answers again", Duration::from_secs(10), || {
            Ok(targets().into_iter().all(|to| until_answered(to).is_ok()).then_some(()))
        })?;
    }
    drop(undo);
    lab.until_ready(lab.nodes.len())
}
