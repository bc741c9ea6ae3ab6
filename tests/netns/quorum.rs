//! A swarm most of whose managers are gone, for a while or for good, and managers that leave without being asked to stay.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::engine;
use crate::figure;
use crate::lab::{Lab, until};
use crate::load::Load;
use crate::managers::{CHANGED, Promoted, is_manager, set_role, statuses};
use crate::mesh::{create_web, targets};

/// What a call for the state answers where no majority of managers is up (Docker's text).
const NO_LEADER: &str = "The swarm does not have a leader. It's possible that too few managers are online.";

pub(crate) fn without_a_majority_traffic_goes_on(lab: &Lab) -> Result<()> {
    let promoted = Promoted::all(lab)?;
    create_web(lab, lab.nodes.len(), &[])?;
    let [first, others @ ..] = lab.nodes.as_slice() else { anyhow::bail!("no nodes") };
    let load = Load::start(&targets(lab), "/");
    for other in others {
        lab.xtask(&["kill", &other.name])?;
    }
    let began = Instant::now();
    let refused = engine::docker(first, &["service", "ls"])?;
    figure!("without a majority, after {:.1} s: {}", began.elapsed().as_secs_f32(), refused.stderr.trim());
    ensure!(!refused.status.success() && refused.stderr.contains(NO_LEADER), "{}", refused.stderr);
    let refused = engine::docker(first, &["service", "scale", "--detach", "web=1"])?;
    ensure!(!refused.status.success() && refused.stderr.contains(NO_LEADER), "{}", refused.stderr);
    // An agent that starts in this time comes up with the table that it had.
    lab.xtask(&["kill", &first.name])?;
    lab.xtask(&["start", &first.name])?;
    std::thread::sleep(Duration::from_secs(2));
    for other in others {
        lab.xtask(&["start", &other.name])?;
    }
    let began = Instant::now();
    until("there is a leader again", CHANGED, || {
        Ok(engine::docker(first, &["service", "ls"])?.status.success().then_some(()))
    })?;
    figure!("with the others back there is a leader after {:.1} s", began.elapsed().as_secs_f32());
    load.finish_unfailed()?;
    engine::until_running(lab, "web", lab.nodes.len())?;
    drop(promoted);
    Ok(())
}

pub(crate) fn forced_new_cluster_goes_on_with_all_it_had(lab: &Lab) -> Result<()> {
    let promoted = Promoted::all(lab)?;
    let before = create_web(lab, lab.nodes.len(), &[])?;
    let [first, others @ ..] = lab.nodes.as_slice() else { anyhow::bail!("no nodes") };
    let load = Load::start(&targets(lab), "/");
    for other in others {
        lab.xtask(&["kill", &other.name])?;
    }
    until("the swarm has no leader", CHANGED, || {
        Ok(engine::docker(first, &["service", "ls"])?.stderr.contains(NO_LEADER).then_some(()))
    })?;
    let began = Instant::now();
    let address = first.address.to_string();
    engine::docker_ok(first, &["swarm", "init", "--force-new-cluster", "--advertise-addr", &address])?;
    let left = until("the first is the only manager", CHANGED, || {
        let Ok(statuses) = statuses(first) else { return Ok(None) };
        let managers = statuses.values().filter(|status| !status.is_empty()).count();
        Ok((managers == 1 && statuses[&first.name] == "Leader").then_some(statuses))
    })?;
    figure!("a new cluster after {:.1} s", began.elapsed().as_secs_f32());
    ensure!(left.len() == lab.nodes.len(), "nodes are missing: {left:?}");
    engine::docker_ok(first, &["service", "update", "--detach", "--label-add", "by=one", "web"])?;
    for other in others {
        lab.xtask(&["start", &other.name])?;
    }
    lab.until_ready(lab.nodes.len())?;
    for other in others {
        until(&format!("{other} is a worker"), CHANGED, || Ok((!is_manager(other)?).then_some(())))?;
    }
    load.finish_unfailed()?;
    let after = engine::until_running(lab, "web", lab.nodes.len())?;
    ensure!(before.iter().zip(&after).all(|(a, b)| a.id == b.id), "tasks changed: {before:?} {after:?}");
    drop(promoted);
    Ok(())
}

pub(crate) fn manager_leaves_by_force_and_the_others_go_on(lab: &Lab) -> Result<()> {
    let promoted = Promoted::all(lab)?;
    let [first, _, third] = lab.nodes.as_slice() else { anyhow::bail!("the case is for three nodes") };
    let refused = engine::docker(third, &["swarm", "leave"])?;
    ensure!(
        !refused.status.success()
            && refused.stderr.contains("You are attempting to leave the swarm on a node"),
        "{}",
        refused.stderr
    );
    let began = Instant::now();
    engine::docker_ok(third, &["swarm", "leave", "--force"])?;
    figure!("left after {:.1} s", began.elapsed().as_secs_f32());
    let info = engine::docker_ok(third, &["info", "--format", "{{.Swarm.LocalNodeState}}"])?;
    ensure!(info.trim() == "inactive", "{info}");
    engine::create(lab, "web", 2, &["--replicas", "2", "shoal/whoami"])?;
    let refused = engine::docker(first, &["node", "rm", "--force", &third.name])?;
    ensure!(!refused.status.success() && refused.stderr.contains("must be demoted"), "{}", refused.stderr);
    set_role(first, "demote", third)?;
    until("the node can be removed", CHANGED, || {
        Ok(engine::docker(first, &["node", "rm", "--force", &third.name])?.status.success().then_some(()))
    })?;
    ensure!(!statuses(first)?.contains_key(&third.name), "the node is still listed");
    engine::join(lab, third)?;
    drop(promoted);
    Ok(())
}
