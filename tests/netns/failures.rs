//! What clients notice of changes and failures.

use std::collections::BTreeSet;
use std::net::{SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::{self, Stream};
use crate::curl;
use crate::engine;
use crate::figure;
use crate::lab::{self, CLIENT, Lab, as_client, until};
use crate::load::{Load, Request};
use crate::mesh::{PORT, any, create_web, targets, until_every_node_answers};
use crate::ways::{self, Back, Way};

/// How long a task may take to be replaced.
const REPLACE_LIMIT: Duration = Duration::from_secs(20);
/// How long the load runs undisturbed before and after a change.
const QUIET: Duration = Duration::from_secs(2);

pub(crate) fn scaling_under_load_fails_no_request(lab: &Lab) -> Result<()> {
    create_web(lab, 3, &[])?;
    // Requests that take a while: some are under way whenever a task is stopped.
    let load = Load::start(&targets(lab), "/slow/50");
    let mut changes = Vec::new();
    std::thread::sleep(QUIET);
    for replicas in [6, 2] {
        let began = Instant::now();
        engine::docker_ok(lab.manager(), &["service", "scale", "--detach", &format!("web={replicas}")])?;
        engine::until_running(lab, "web", replicas)?;
        until_every_node_answers(lab)?;
        let ended = Instant::now();
        figure!("scaled to {replicas} in {:.1} s", (ended - began).as_secs_f32());
        changes.push((began, ended));
        std::thread::sleep(QUIET);
    }
    let requests = load.finish()?;
    let in_change = |request: &Request| {
        changes.iter().any(|(began, ended)| request.began < *ended && request.ended > *began)
    };
    let (during, settled): (Vec<&Request>, Vec<&Request>) =
        requests.iter().partition(|request| in_change(request));
    let failed =
        |requests: &[&Request]| -> Vec<String> { requests.iter().filter_map(|r| r.error.clone()).collect() };
    let (failed_during, failed_settled) = (failed(&during), failed(&settled));
    figure!("while settled: {} requests, {} failed", settled.len(), failed_settled.len());
    figure!("while changing: {} requests, {} failed {failed_during:?}", during.len(), failed_during.len());
    ensure!(failed_settled.is_empty(), "{failed_settled:?}");
    ensure!(settled.len() > 200 && during.len() > 10, "too few requests to say anything");
    // The drain waits until every node has confirmed: a change costs nobody a request.
    ensure!(failed_during.is_empty(), "{failed_during:?}");
    Ok(())
}

pub(crate) fn rolling_update_under_load_fails_no_request(lab: &Lab) -> Result<()> {
    let before = create_web(lab, 3, &[])?;
    let load = Load::start(&targets(lab), "/slow/50");
    let began = Instant::now();
    engine::docker_ok(lab.manager(), &["service", "update", "--env-add", "VERSION=2", "web"])?;
    let seconds = began.elapsed().as_secs_f32();
    let requests = load.finish()?;
    let errors: Vec<&String> = requests.iter().filter_map(|request| request.error.as_ref()).collect();
    figure!("updated in {seconds:.1} s: {} requests, {} failed {errors:?}", requests.len(), errors.len());
    let after = engine::until_running(lab, "web", 3)?;
    ensure!(
        after.iter().all(|task| before.iter().all(|old| old.id != task.id)),
        "not all tasks were replaced"
    );
    ensure!(errors.is_empty(), "{errors:?}");
    Ok(())
}

pub(crate) fn killed_task_is_replaced(lab: &Lab) -> Result<()> {
    let before = create_web(lab, 3, &[])?;
    let victim = &before[0];
    let load = Load::start(&targets(lab), "/");
    let began = Instant::now();
    kill(Pid::from_raw(victim.pid.try_into()?), Signal::SIGKILL)?;
    let known: BTreeSet<&str> = before.iter().map(|task| task.id.as_str()).collect();
    let targets = targets(lab);
    let (node, seconds) = until("the replacement answers", REPLACE_LIMIT, || {
        // Only an answer counts; which task gives it, its name ends with.
        let answer = as_client(|| client::http(any(CLIENT), targets[0], "/")).ok();
        let replacement = answer.filter(|answer| !known.iter().any(|id| answer.task.ends_with(id)));
        Ok(replacement.map(|answer| (answer.node, began.elapsed().as_secs_f32())))
    })?;
    engine::until_running(lab, "web", 3)?;
    let requests = load.finish()?;
    let failed: Vec<&Request> = requests.iter().filter(|request| request.error.is_some()).collect();
    let last = failed.iter().map(|request| (request.began - began).as_secs_f32()).fold(0.0, f32::max);
    figure!("killed on {}; the replacement, on {node}, answered after {seconds:.1} s", victim.node);
    figure!(
        "of {} requests {} failed, the last begun {last:.1} s after the kill",
        requests.len(),
        failed.len()
    );
    // What was under way to the task is lost with it; nobody is sent to it afterwards.
    ensure!(last < 1.0, "requests still failed after {last:.1} s: {failed:?}");
    let shown = engine::docker_ok(lab.manager(), &["service", "ps", "web"])?;
    ensure!(shown.contains("Failed"), "the killed task is not in the history:\n{shown}");
    Ok(())
}

pub(crate) fn killed_agent_leaves_connections_and_ports_alone(lab: &Lab) -> Result<()> {
    let before = create_web(lab, 3, &[])?;
    let node = &lab.nodes[1];
    let to = SocketAddrV4::new(node.address, PORT);
    as_client(|| {
        // Several: some of them are with the task on the node itself, some with tasks elsewhere.
        let mut streams = (0..6).map(|_| Stream::open(to)).collect::<Result<Vec<Stream>>>()?;
        lab.xtask(&["kill", &node.name])?;
        ensure!(engine::get(node, "/_ping").is_err(), "the agent still answers");
        let load = Load::start(&[to], "/");
        for stream in &mut streams {
            stream.ticks(2).context("with the agent dead")?;
        }
        let requests = load.finish()?;
        let errors: Vec<&String> = requests.iter().filter_map(|request| request.error.as_ref()).collect();
        figure!(
            "agent of {node} dead: {} connections go on, {} new, {} failed",
            streams.len(),
            requests.len(),
            errors.len()
        );
        ensure!(errors.is_empty() && requests.len() > 100, "{errors:?}");

        let load = Load::start(&[to], "/");
        let began = Instant::now();
        lab.xtask(&["start", &node.name])?;
        lab.until_ready(lab.nodes.len())?;
        figure!("back after {:.1} s", began.elapsed().as_secs_f32());
        for stream in &mut streams {
            stream.ticks(2).context("with the agent back")?;
        }
        let requests = load.finish()?;
        let errors: Vec<&String> = requests.iter().filter_map(|request| request.error.as_ref()).collect();
        figure!("while it came back: {} new connections, {} failed", requests.len(), errors.len());
        ensure!(errors.is_empty(), "{errors:?}");
        Ok(())
    })?;
    let after = engine::until_running(lab, "web", 3)?;
    let ids = |tasks: &[engine::Task]| -> BTreeSet<(String, u32)> {
        tasks.iter().map(|task| (task.id.clone(), task.pid)).collect()
    };
    ensure!(ids(&before) == ids(&after), "tasks changed: {before:?} {after:?}");
    Ok(())
}

pub(crate) fn restarted_agent_still_manages_the_tasks_it_found(lab: &Lab) -> Result<()> {
    create_web(lab, 3, &[])?;
    let node = &lab.nodes[2];
    lab.xtask(&["stop", &node.name])?;
    as_client(|| client::http(any(CLIENT), SocketAddrV4::new(node.address, PORT), "/"))
        .context("with the agent stopped")?;
    lab.xtask(&["start", &node.name])?;
    lab.until_ready(lab.nodes.len())?;
    let tasks = engine::until_running(lab, "web", 3)?;
    let task = tasks.iter().find(|task| task.node == *node).context("no task on the node")?;
    kill(Pid::from_raw(task.pid.try_into()?), Signal::SIGKILL)?;
    until("the task is replaced", REPLACE_LIMIT, || {
        let tasks = engine::running(lab, "web")?;
        Ok((tasks.len() == 3 && tasks.iter().all(|found| found.id != task.id)).then_some(()))
    })
}

pub(crate) fn killed_manager_comes_back_with_everything(lab: &Lab) -> Result<()> {
    let before = create_web(lab, 3, &[])?;
    let load = Load::start(&targets(lab), "/");
    lab.xtask(&["kill", "n1"])?;
    std::thread::sleep(QUIET);
    lab.xtask(&["start", "n1"])?;
    lab.until_ready(lab.nodes.len())?;
    let after = engine::until_running(lab, "web", 3)?;
    let requests = load.finish()?;
    let errors: Vec<&String> = requests.iter().filter_map(|request| request.error.as_ref()).collect();
    figure!("{} requests meanwhile, {} failed", requests.len(), errors.len());
    ensure!(errors.is_empty(), "{errors:?}");
    ensure!(before.iter().zip(&after).all(|(a, b)| a.id == b.id), "tasks changed: {before:?} {after:?}");
    engine::docker_ok(lab.manager(), &["service", "scale", "--detach", "web=4"])?;
    engine::until_running(lab, "web", 4).map(drop)
}

/// A node's own devices go. Its agent makes them anew and has the programs serve on them: the tunnel's on the task's node and on
/// another one, and the host's, by which its own processes dial published ports.
pub(crate) fn deleted_devices_come_back_and_serve(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 1, &["--constraint", "node.hostname==n1"])?;
    let by = &lab.nodes[1];
    let answers = |to: SocketAddr| Ok(as_client(|| client::http(client::anywhere(to), to, "/")).ok());
    for node in &lab.nodes[..2] {
        let of_host = format!("http://127.0.0.1:{}/", Back::Tunnel.port());
        for device in ["shoal-vxlan", "shoal0"] {
            let began = Instant::now();
            lab::output(node.command("ip").args(["link", "del", device]))?;
            for way in Way::all() {
                until(&format!("{way} by {by} without {device} of {node}"), REPLACE_LIMIT, || {
                    answers(way.to(by))
                })?;
            }
            until(&format!("{of_host} on {node} without {device}"), REPLACE_LIMIT, || {
                Ok(curl::peer(node.command("curl"), &of_host).ok())
            })?;
            figure!("{node}: served on a new {device} after {:.1} s", began.elapsed().as_secs_f32());
        }
    }
    Ok(())
}

pub(crate) fn node_cut_off_loses_its_tasks_to_the_others(lab: &Lab) -> Result<()> {
    create_web(lab, 3, &[])?;
    let node = &lab.nodes[2];
    let began = Instant::now();
    lab.xtask(&["cut", &node.name])?;
    // Heartbeats of 5 s, three of which may be missed; then new tasks.
    let moved = until("its tasks run elsewhere", Duration::from_secs(45), || {
        let tasks = engine::running(lab, "web")?;
        Ok((tasks.len() == 3 && tasks.iter().all(|task| task.node != *node)).then_some(()))
    });
    let seconds = began.elapsed().as_secs_f32();
    moved?;
    figure!("{node} cut off; three tasks run on the others after {seconds:.1} s");
    for to in targets(lab).into_iter().take(2).cycle().take(40) {
        as_client(|| client::http(any(CLIENT), to, "/")).context("from the nodes that are left")?;
    }
    lab.xtask(&["heal", &node.name])?;
    lab.until_ready(lab.nodes.len())?;
    until("the task that came back is stopped", REPLACE_LIMIT, || {
        let links = lab::output(node.command("ip").args(["-oneline", "link", "show", "type", "veth"]))?;
        let tasks = links.lines().filter(|line| !line.contains("shoal0") && !line.contains("eth0"));
        Ok((tasks.count() == 0).then_some(()))
    })?;
    let to = SocketAddrV4::new(node.address, PORT);
    until("the node answers again", Duration::from_secs(10), || {
        Ok(as_client(|| client::http(any(CLIENT), to, "/")).ok())
    })
    .map(drop)
}
