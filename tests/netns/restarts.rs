//! Agents that die, come back and are replaced by newer ones, with connections under way.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use mesh_agent::dataplane::pins::version_folder;
use mesh_common::map::{Port, PortKey};

use crate::client;
use crate::engine;
use crate::figure;
use crate::lab::{BINARY, Lab, as_client, output, until};
use crate::load::Load;
use crate::mesh;
use crate::steady::{self, Connection, Steady};
use crate::watch::{Watch, Watched};
use crate::ways::{self, Way, until_answered};

/// Connections under load.
const CONNECTIONS: usize = 50;
const PAUSE: Duration = Duration::from_millis(20);
const RESTARTS: usize = 10;
const UPGRADES: usize = 3;
/// Connections that a node without an agent carries on with, those of the other nodes included.
const STREAMS: usize = 1000;
/// For how long it is without. (After 15 s its tasks would be others' to run, and end at its return.)
const AWAY: Duration = Duration::from_secs(3);
/// How old the idle connection has to be in the end, s; without it, as old as the restarts take.
const IDLE_VAR: &str = "SHOAL_IDLE_S";

/// Puts a copy of the binary in its own place, as a package's upgrade does: the agent that runs keeps the old one.
fn replace_binary() -> Result<()> {
    let copy = format!("{BINARY}.new");
    fs::copy(BINARY, &copy).with_context(|| copy.clone())?;
    fs::rename(&copy, BINARY).with_context(|| copy.clone())
}

pub(crate) fn restarts_and_upgrades_break_no_connection(lab: &Lab) -> Result<()> {
    let before = ways::create_web(lab, 3, &[])?;
    let targets: Vec<SocketAddr> = Way::all().flat_map(|way| way.targets(lab)).collect();
    let began = Instant::now();
    let mut idle = as_client(|| targets.iter().map(|to| Connection::open(*to)).collect::<Result<Vec<_>>>())?;
    let steady = Steady::start(&targets, CONNECTIONS, PAUSE)?;
    let watches = lab.nodes.iter().map(Watch::start).collect::<Result<Vec<_>>>()?;
    let mut down = Duration::ZERO;
    for (round, node) in lab.nodes.iter().cycle().take(RESTARTS + UPGRADES).enumerate() {
        let stopped = Instant::now();
        if round < RESTARTS {
            lab.xtask(&["kill", &node.name])?;
        } else {
            replace_binary()?;
            lab.xtask(&["stop", &node.name])?;
        }
        lab.xtask(&["start", &node.name])?;
        down += stopped.elapsed();
        // The whole takes part in the next round.
        if node == lab.manager() {
            lab.until_ready(lab.nodes.len())?;
        }
    }
    lab.until_ready(lab.nodes.len())?;
    for watch in watches {
        unbroken(&watch.finish()?)?;
    }
    let fates = steady.finish()?;
    let (requests, slowest, broken) = steady::sum(&fates);
    figure!(
        "{RESTARTS} times killed, {UPGRADES} times upgraded, {:.1} s without an agent: {} connections, {requests} \
         requests, the slowest {} ms; {} broken",
        down.as_secs_f32(),
        fates.len(),
        slowest.as_millis(),
        broken.len()
    );
    ensure!(broken.is_empty(), "{broken:#?}");
    let wanted = std::env::var(IDLE_VAR).ok().and_then(|seconds| seconds.parse().ok()).unwrap_or_default();
    std::thread::sleep(Duration::from_secs(wanted).saturating_sub(began.elapsed()));
    for (connection, _) in &mut idle {
        connection.ask().context("an idle connection")?;
    }
    figure!("{} connections, idle for {:.0} s, go on", idle.len(), began.elapsed().as_secs_f32());
    let mut after = Vec::new();
    for back in ways::Back::ALL {
        after.extend(engine::running(lab, &back.to_string())?);
    }
    let ids =
        |tasks: &[engine::Task]| tasks.iter().map(|task| (task.id.clone(), task.pid)).collect::<Vec<_>>();
    ensure!(ids(&before) == ids(&after), "tasks changed: {before:?} {after:?}");
    Ok(())
}

/// Many connections, old ones and new ones, while a node has no agent.
pub(crate) fn node_without_an_agent_loses_no_connection(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 3, &[])?;
    steady::allow_files()?;
    let targets: Vec<SocketAddr> = Way::all().flat_map(|way| way.targets(lab)).collect();
    let steady = Steady::start(&targets, STREAMS, Duration::from_millis(500))?;
    let node = &lab.nodes[1];
    let watch = Watch::start(node)?;
    let load = Load::start(&mesh::targets(lab), "/");
    let began = Instant::now();
    lab.xtask(&["kill", &node.name])?;
    std::thread::sleep(AWAY);
    lab.xtask(&["start", &node.name])?;
    lab.until_ready(lab.nodes.len())?;
    let opened = load.finish()?;
    let seconds = began.elapsed().as_secs().max(1);
    let failed: Vec<&String> = opened.iter().filter_map(|request| request.error.as_ref()).collect();
    let fates = steady.finish()?;
    let (requests, slowest, broken) = steady::sum(&fates);
    figure!(
        "{} s without an agent on {node}: {} connections, {requests} requests, the slowest {} ms; {} broken",
        AWAY.as_secs(),
        fates.len(),
        slowest.as_millis(),
        broken.len()
    );
    figure!("{} connections opened within {seconds} s, {} failed", opened.len(), failed.len());
    ensure!(broken.is_empty(), "{broken:#?}");
    ensure!(failed.is_empty() && opened.len() > 200, "{failed:?}");
    unbroken(&watch.finish()?)
}

/// Fails if an attachment was gone for a moment.
fn unbroken(watched: &Watched) -> Result<()> {
    let Watched { attachments, looks, programs, gaps } = watched;
    figure!("{attachments} attachments looked at {looks} times: {programs} programs, {} gaps", gaps.len());
    ensure!(gaps.is_empty() && *looks > 100, "{gaps:?}");
    Ok(())
}

/// Maps that somebody emptied while no agent looked are as they have to be once one does.
pub(crate) fn damaged_maps_are_repaired(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 2, &[])?;
    let node = &lab.nodes[1];
    lab.xtask(&["kill", &node.name])?;
    let pin = node.run_dir().join("bpf").join(version_folder()).join("shoal_ports");
    let mut ports: HashMap<MapData, PortKey, Port> = Map::HashMap(MapData::from_pin(pin)?).try_into()?;
    let keys = ports.keys().collect::<Result<Vec<_>, _>>()?;
    for (at, key) in keys.iter().enumerate() {
        // Some lead to nothing, the others are gone.
        if at % 2 == 0 {
            ports.insert(key, Port { service: 30_000, ..Port::default() }, 0)?;
        } else {
            ports.remove(key)?;
        }
    }
    for way in Way::all() {
        let to = way.to(node);
        let answer =
            as_client(|| client::connect_within(client::anywhere(to), to, Duration::from_millis(300)));
        ensure!(answer.is_err(), "{to} answers without its port");
    }
    let began = Instant::now();
    lab.xtask(&["start", &node.name])?;
    for way in Way::all() {
        until_answered(way.to(node))?;
    }
    figure!(
        "{} entries damaged; answered on every way {:.1} s later",
        keys.len(),
        began.elapsed().as_secs_f32()
    );
    Ok(())
}

pub(crate) fn removed_rules_come_back_and_whole_ones_are_left(lab: &Lab) -> Result<()> {
    let node = &lab.nodes[1];
    let listed = || -> Result<String> {
        let list = |family| output(node.command("nft").args(["-a", "list", "table", family, "shoal"]));
        Ok(list("ip")? + &list("ip6")?)
    };
    for family in ["ip", "ip6"] {
        output(node.command("nft").args(["delete", "table", family, "shoal"]))?;
        let back = until("the rules come back", Duration::from_secs(15), || {
            Ok(listed().is_ok_and(|rules| rules.matches("masquerade").count() == 2).then_some(()))
        });
        back.with_context(|| format!("table {family} shoal"))?;
    }
    // Their handles are new if somebody has written them anew.
    let before = listed()?;
    std::thread::sleep(Duration::from_secs(6));
    let after = listed()?;
    ensure!(before == after, "written anew though they were whole:\n{before}{after}");
    Ok(())
}
