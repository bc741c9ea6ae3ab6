//! Several managers: nodes that become managers and cease to be, and leaders that die.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::engine;
use crate::figure;
use crate::lab::{self, Lab, Node, until};
use crate::mesh::create_web;
use crate::writes;

/// How long roles may take to change.
pub(crate) const CHANGED: Duration = Duration::from_secs(30);
/// How long leaders are killed one after another, s; the variable of the environment that says otherwise.
const KILLS_S: u64 = 15;
const KILLS_S_BY: &str = "SHOAL_LEADER_KILLS_S";
/// Between two kills.
const BETWEEN_KILLS: Duration = Duration::from_secs(5);

/// All nodes are managers until this is dropped.
pub(crate) struct Promoted<'l>(&'l Lab);

impl<'l> Promoted<'l> {
    pub(crate) fn all(lab: &'l Lab) -> Result<Self> {
        let promoted = Self(lab);
        for node in &lab.nodes[1..] {
            set_role(lab.manager(), "promote", node)?;
        }
        until("all nodes are managers", CHANGED, || {
            let statuses = statuses(lab.manager())?;
            let count = |wanted: &str| statuses.values().filter(|status| *status == wanted).count();
            Ok((count("Leader") == 1 && count("Reachable") == lab.nodes.len() - 1).then_some(()))
        })?;
        Ok(promoted)
    }

    fn undo(&self) -> Result<()> {
        for node in &self.0.nodes {
            if engine::get(node, "/_ping").is_err() {
                self.0.xtask(&["start", &node.name])?;
            }
        }
        let manager = self.0.manager();
        for node in &self.0.nodes[1..] {
            until(&format!("{node} is demoted"), CHANGED, || {
                let demoted = engine::docker(manager, &["node", "demote", &node.name])?;
                Ok((demoted.status.success() && !is_manager(node)?).then_some(()))
            })?;
        }
        until("the first is the only manager", CHANGED, || {
            Ok(statuses(manager).is_ok_and(|all| all[&manager.name] == "Leader").then_some(()))
        })
    }
}

impl Drop for Promoted<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            println!("    not undone: {error:#}");
        }
    }
}

/// `docker node ls`: the nodes' names with their MANAGER STATUS.
pub(crate) fn statuses(node: &Node) -> Result<BTreeMap<String, String>> {
    let format = ["node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}"];
    let lines = engine::names(node, &format)?;
    let parts = lines.iter().filter_map(|line| line.split_once(' '));
    Ok(parts.map(|(name, status)| (name.to_owned(), status.to_owned())).collect())
}

/// Waits until all managers are up; which of them leads.
pub(crate) fn leader(lab: &Lab) -> Result<&Node> {
    let leader = until("there is a leader, and all managers are up", CHANGED, || {
        let Ok(statuses) = statuses(lab.manager()) else { return Ok(None) };
        let all = statuses.values().all(|status| status == "Leader" || status == "Reachable");
        Ok(statuses.into_iter().find(|(_, status)| all && status == "Leader").map(|(name, _)| name))
    })?;
    lab.node(&leader)
}

/// Whether a node serves the swarm's state, as it says itself.
pub(crate) fn is_manager(node: &Node) -> Result<bool> {
    let info: Value = serde_json::from_str(&engine::get(node, "/info")?)?;
    Ok(info["Swarm"]["ControlAvailable"] == true)
}

/// `docker node promote` or `demote`.
pub(crate) fn set_role(manager: &Node, role: &str, node: &Node) -> Result<()> {
    engine::docker_ok(manager, &["node", role, &node.name]).map(drop)
}

/// Whether a manager runs on a node, whatever it says.
pub(crate) fn is_listening(node: &Node) -> Result<bool> {
    let sockets = lab::output(node.command("ss").args(["--no-header", "--listening", "--tcp", "--numeric"]))?;
    Ok(sockets.contains(":2377 "))
}

pub(crate) fn nodes_become_managers_and_cease_to_be(lab: &Lab) -> Result<()> {
    let [first, second, third] = lab.nodes.as_slice() else { anyhow::bail!("the case is for three nodes") };
    let refused = engine::docker(first, &["node", "demote", &first.name])?;
    ensure!(!refused.status.success() && refused.stderr.contains("last manager"), "{}", refused.stderr);
    // Before anything came of it.
    for role in ["promote", "demote", "promote", "demote"] {
        set_role(first, role, third)?;
    }
    until("the third is left alone", CHANGED, || {
        Ok((!is_manager(third)? && !is_listening(third)?).then_some(()))
    })?;
    let began = Instant::now();
    let promoted = Promoted::all(lab)?;
    figure!("three managers after {:.1} s", began.elapsed().as_secs_f32());
    // What one manager is told, each of them knows from then on.
    let idle = ["shoal/exec", "sleep", "1000000"];
    for (number, node) in lab.nodes.iter().enumerate() {
        let name = format!("by-{node}");
        let create = ["service", "create", "--detach", "--replicas", "0", "--name", &name];
        engine::docker_ok(node, &[&create[..], &idle].concat())?;
        for other in &lab.nodes {
            let listed = engine::names(other, &["service", "ls", "--format", "{{.Name}}"])?;
            ensure!(listed.len() == number + 1 && listed.contains(&name), "{other} lists {listed:?}");
        }
    }
    set_role(second, "demote", third)?;
    until("the third is a worker", CHANGED, || Ok((!is_manager(third)?).then_some(())))?;
    let refused = engine::docker(third, &["node", "ls"])?;
    ensure!(refused.stderr.contains("This node is not a swarm manager."), "{}", refused.stderr);
    let left = until("two managers are left", CHANGED, || {
        let statuses = statuses(second)?;
        let managers = statuses.values().filter(|status| !status.is_empty()).count();
        Ok((managers == 2).then_some(statuses))
    })?;
    ensure!(left[&third.name].is_empty(), "{left:?}");
    // The third still has the table, by the managers that are left.
    create_web(lab, lab.nodes.len(), &[])?;
    drop(promoted);
    ensure!(statuses(first)?.values().filter(|status| !status.is_empty()).count() == 1, "managers are left");
    Ok(())
}

pub(crate) fn leaders_that_die_lose_no_write(lab: &Lab) -> Result<()> {
    let promoted = Promoted::all(lab)?;
    let seconds = std::env::var(KILLS_S_BY).ok().and_then(|text| text.parse().ok()).unwrap_or(KILLS_S);
    let (writes, kills) = writes::during(lab, || kill_leaders(lab, Duration::from_secs(seconds)))?;
    // From a kill to the end of the write that waited longest for it.
    let mut outages: Vec<f64> = Vec::new();
    for kill in &kills {
        let during = writes.iter().filter(|write| write.ended > *kill && write.ended < *kill + BETWEEN_KILLS);
        outages.push(during.map(|write| (write.ended - write.began).as_secs_f64()).fold(0.0, f64::max));
    }
    outages.sort_by(f64::total_cmp);
    let at = |percent: usize| outages.get(outages.len() * percent / 100).or(outages.last()).copied();
    figure!("{} leaders killed under {} writes", kills.len(), writes.len());
    figure!(
        "the longest write after a kill: p50 {:.2} s, p99 {:.2} s",
        at(50).context("no leader was killed")?,
        at(99).context("no leader was killed")?
    );
    writes::settle(lab, &writes)?;
    figure!("none was lost, and none took effect twice");
    drop(promoted);
    Ok(())
}

/// Kills the leader every now and then, and starts the one before again; gives when each died.
fn kill_leaders(lab: &Lab, duration: Duration) -> Result<Vec<Instant>> {
    let mut kills = Vec::new();
    let mut dead: Option<&Node> = None;
    let started = Instant::now();
    while started.elapsed() < duration || kills.is_empty() {
        if let Some(dead) = dead {
            lab.xtask(&["start", &dead.name])?;
        }
        std::thread::sleep(
            BETWEEN_KILLS.saturating_sub(kills.last().map_or(Duration::ZERO, Instant::elapsed)),
        );
        let leader = leader(lab)?;
        kills.push(Instant::now());
        lab.xtask(&["kill", &leader.name])?;
        dead = Some(leader);
    }
    if let Some(dead) = dead {
        lab.xtask(&["start", &dead.name])?;
    }
    until("all managers are up", CHANGED, || {
        Ok(statuses(lab.manager()).is_ok_and(|all| all.values().all(|it| it != "Unreachable")).then_some(()))
    })?;
    Ok(kills)
}
