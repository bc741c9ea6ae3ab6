//! A node that the managers can't reach goes on by its last table, and learns from the other nodes what is wrong in it.

use std::net::{SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_agent::dataplane::Counter;

use crate::client;
use crate::engine::{self, Task};
use crate::figure;
use crate::lab::{self, Lab, Node, command_in};
use crate::load::Load;
use crate::mesh::{any, create_web, targets};
use crate::overlay::{ENCRYPTED, create_idle, create_network};
use crate::undo::Undo;

/// Requests to a service of whose two tasks one is gone.
const REQUESTS: usize = 60;
/// A request that takes longer has lost its first packet: that is sent again after a second.
const AT_ONCE: Duration = Duration::from_millis(500);
/// How long a node is cut off, s, by which the managers have given it up; the variable of the environment that says otherwise.
const AWAY_S: u64 = 20;
const AWAY_S_BY: &str = "SHOAL_AWAY_S";
/// Between two changes of the table meanwhile.
const BETWEEN_CHANGES: Duration = Duration::from_millis(500);
/// What cuts a node off from the managers, and nothing else.
const CUT: &str = "table inet cut {
    chain in { type filter hook input priority filter; tcp sport 2377 drop; }
    chain out { type filter hook output priority filter; tcp dport 2377 drop; }
}";

fn cut_off(node: &Node) -> Result<Undo> {
    lab::output(command_in(&node.name, "nft").arg(CUT))?;
    let mut undo = command_in(&node.name, "nft");
    undo.args(["delete", "table", "inet", "cut"]);
    Ok(Undo::new(undo))
}

pub(crate) fn node_cut_off_from_managers_learns_which_tasks_are_gone(lab: &Lab) -> Result<()> {
    for (name, options) in [("plain", &[][..]), ("secret", ENCRYPTED)] {
        create_network(lab, name, options)?;
        learns(lab, name).with_context(|| format!("network {name}"))?;
        for service in ["web", "caller"] {
            engine::docker_ok(lab.manager(), &["service", "rm", service])?;
        }
    }
    Ok(())
}

fn learns(lab: &Lab, network: &str) -> Result<()> {
    let (cut, elsewhere) =
        (&lab.nodes[2], ["--constraint", "node.hostname!=n3", "--replicas-max-per-node", "1"]);
    let web = [&elsewhere[..], &["--replicas", "2", "--network", network, "shoal/whoami"]].concat();
    let before = engine::create(lab, "web", 2, &web)?;
    let caller = create_idle(lab, "caller", &["--constraint", "node.hostname==n3", "--network", network])?;
    let to = SocketAddr::new(engine::vips(lab, "web")?[0].into(), 80);
    let ask = || {
        let began = Instant::now();
        client::http(client::anywhere(to), to, "/").map(|answer| (answer.task, began.elapsed()))
    };
    caller.inside(|| (0..REQUESTS).try_for_each(|_| ask().map(drop)))?;

    let undo = cut_off(cut)?;
    engine::docker_ok(lab.manager(), &["service", "scale", "--detach", "web=1"])?;
    let left = engine::until_running(lab, "web", 1)?;
    let gone =
        before.iter().find(|task| left.iter().all(|other| other.id != task.id)).context("none is gone")?;
    let counts = || anyhow::Ok((gone.node.count(Counter::NackSent)?, cut.count(Counter::NackHeard)?));
    let counted = counts()?;
    let answers = caller.inside(|| (0..REQUESTS).map(|_| ask()).collect::<Result<Vec<_>>>())?;
    let late = answers.iter().filter(|(_, took)| *took > AT_ONCE).count();
    let (sent, heard) = counts()?;
    let (sent, heard) = (sent - counted.0, heard - counted.1);
    figure!(
        "{network}: of {REQUESTS} requests 0 failed and {late} had to begin anew; {sent} told, {heard} heard"
    );
    ensure!(answers.iter().all(|(task, _)| !task.ends_with(&gone.id)), "a task that is gone answered");
    ensure!(sent > 0 && heard > 0, "{} told {cut} nothing", gone.node);
    // The first, and one more if the word of the node was forgotten meanwhile.
    ensure!((1..=2).contains(&late), "{late} requests were sent to a task that is gone");

    drop(undo);
    lab.until_ready(lab.nodes.len())?;
    engine::docker_ok(lab.manager(), &["service", "scale", "--detach", "web=2"])?;
    engine::until_running(lab, "web", 2)?;
    caller.inside(|| {
        lab::until("both tasks answer", Duration::from_secs(10), || {
            let answers = (0..20).map(|_| ask()).collect::<Result<Vec<_>>>()?;
            let mut tasks: Vec<_> = answers.into_iter().map(|(task, _)| task).collect();
            tasks.sort();
            tasks.dedup();
            Ok((tasks.len() == 2).then_some(()))
        })
    })
}

/// A task runs as soon as its program does, which may take a little longer to listen: who asks it meanwhile is refused.
fn until_every_task_answers(lab: &Lab, web: &[Task]) -> Result<()> {
    let mut silent: Vec<&Task> = web.iter().collect();
    lab::until("every task answers", Duration::from_secs(10), || {
        for to in targets(lab) {
            if let Ok(answer) = lab::as_client(|| client::http(any(lab::CLIENT), to, "/")) {
                silent.retain(|task| !answer.task.ends_with(&task.id));
            }
        }
        Ok(silent.is_empty().then_some(()))
    })
}

pub(crate) fn node_cut_off_from_managers_serves_all_the_time_and_catches_up(lab: &Lab) -> Result<()> {
    let web = create_web(lab, lab.nodes.len(), &[])?;
    until_every_task_answers(lab, &web)?;
    let cut = &lab.nodes[2];
    let seconds = std::env::var(AWAY_S_BY).ok().and_then(|text| text.parse().ok()).unwrap_or(AWAY_S);
    let tables = cut.tables()?;
    ensure!(tables > 0, "{cut} does not say in its log that it got the table");
    let load = Load::start(&targets(lab), "/");
    let began = Instant::now();
    let undo = cut_off(cut)?;
    // The table changes all the time, and the managers move the node's task once they give the node up.
    let mut changes = 0;
    while began.elapsed() < Duration::from_secs(seconds) {
        let label = format!("change={changes}");
        engine::docker_ok(lab.manager(), &["service", "update", "--detach", "--label-add", &label, "web"])?;
        changes += 1;
        std::thread::sleep(BETWEEN_CHANGES);
    }
    engine::create(lab, "late", 2, &["--replicas", "2", "--publish", "8081:80", "shoal/whoami"])?;
    drop(undo);
    let healed = Instant::now();
    let to = SocketAddrV4::new(cut.address, 8081);
    lab::until("the node serves what was published meanwhile", Duration::from_secs(30), || {
        Ok(lab::as_client(|| client::http(any(lab::CLIENT), to, "/")).ok())
    })?;
    let caught_up = healed.elapsed().as_secs_f32();
    lab.until_ready(lab.nodes.len())?;
    engine::until_running(lab, "web", web.len())?;
    let requests = load.finish()?;
    let failed = requests.iter().filter_map(|request| Some((request.ended, request.error.as_ref()?)));
    let errors: Vec<String> = failed
        .map(|(ended, error)| match ended.checked_duration_since(healed) {
            Some(later) => format!("{:.3} s after the end: {error}", later.as_secs_f32()),
            None => format!("after {:.3} s: {error}", (ended - began).as_secs_f32()),
        })
        .collect();
    figure!(
        "cut off for {seconds} s and {changes} changes, caught up in {caught_up:.1} s: {} requests, {} failed",
        requests.len(),
        errors.len()
    );
    ensure!(errors.is_empty() && requests.len() > 100, "{errors:?}");
    ensure!(cut.tables()? == tables, "{cut} got the whole table, not what it had missed");
    Ok(())
}
