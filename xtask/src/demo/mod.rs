//! `cargo xtask demo`: a swarm on this machine, driven by the docker command line, and what Shoal promises of it.
//!
//! Prints what it does; everything it claims, it has checked. Anything that is not so ends it with a failure.

mod client;
mod stage;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use self::client::{Answer, Stream};
use self::stage::{Stage, command, docker, say};
use crate::lab::{self, Host, Lab, Xdp};
use crate::{bounded, sys};

/// How long a service may take until its tasks run, and a dead task until it is replaced.
const TASKS_LIMIT: Duration = Duration::from_secs(30);
/// Requests to each node when shares are shown.
const REQUESTS: usize = 30;
/// What the second service does all day.
const CALLER: &str = "while :; do curl -s -m 2 http://web/; sleep 0.2; done";

/// How to show it.
#[derive(Args)]
pub(crate) struct Options {
    /// How the agents attach XDP to their uplink
    #[arg(long, value_enum, default_value_t = Xdp::Auto)]
    xdp: Xdp,
    /// Leaves the lab up at the end
    #[arg(long)]
    keep: bool,
}

/// `cargo xtask demo`.
pub(crate) fn run(options: &Options) -> Result<()> {
    println!("Shoal: a swarm of three hosts and a client, on this machine");
    lab::require_root()?;
    let _claim = lab::claim()?;
    let lab = lab::up(&lab::Up {
        nodes: 3,
        xdp: options.xdp,
        mtu: 1500,
        underlay: lab::Underlay::Ipv4,
        swarm: false,
        managers: 1,
        binary: None,
    })?;
    let mut stage = Stage::new();
    let played = play(&mut stage, &lab);
    if played.is_err() && !sys::interrupted() {
        lab::print_log_ends(&lab, 15);
    }
    sys::forget_interrupt();
    if options.keep {
        println!("\nThe lab stays up: cargo xtask lab status, and at last cargo xtask lab down");
    } else {
        stage.heading("Cleaning up");
        command("cargo xtask lab down");
        let removed = lab::down()?;
        if played.is_ok() {
            let text = format!(
                "nothing is left: {} processes, {} namespaces and {} mounts are gone",
                removed.processes, removed.namespaces, removed.mounts
            );
            stage.claim(removed.processes > 0, &text)?;
        }
    }
    played?;
    stage.close();
    Ok(())
}

fn play(stage: &mut Stage, lab: &Lab) -> Result<()> {
    let nodes = lab.nodes();
    make_swarm(stage, &nodes)?;
    make_services(stage, &nodes)?;
    ask_every_node(stage, &nodes)?;
    follow_the_caller(stage, &nodes)?;
    kill_a_task(stage, &nodes)?;
    kill_an_agent(stage, lab, &nodes)
}

fn make_swarm(stage: &mut Stage, nodes: &[Host]) -> Result<()> {
    stage.heading("A swarm");
    let manager = &nodes[0];
    let address = manager.address.to_string();
    docker(manager, &["swarm", "init", "--advertise-addr", &address])?;
    let token = docker(manager, &["swarm", "join-token", "--quiet", "worker"])?;
    for worker in &nodes[1..] {
        // The token itself would fill the line twice.
        command(&format!("docker -H {} swarm join --token SWMTKN-1-… {address}:2377", worker.name));
        lab::docker(worker, &["swarm", "join", "--token", &token, &format!("{address}:2377")])?;
    }
    say(&docker(manager, &["node", "ls"])?);
    let ready = ready_nodes(manager)?;
    stage.claim(ready == nodes.len(), &format!("{ready} of {} nodes are ready", nodes.len()))
}

fn make_services(stage: &mut Stage, nodes: &[Host]) -> Result<()> {
    stage.heading("A service of three replicas, published on port 8080; and one that calls it by its name");
    let manager = &nodes[0];
    docker(manager, &["network", "create", "--driver", "overlay", "demo"])?;
    let started = Instant::now();
    docker(
        manager,
        &[
            "service",
            "create",
            "--detach",
            "--name",
            "web",
            "--replicas",
            "3",
            "--publish",
            "8080:80",
            "--network",
            "demo",
            "shoal/whoami",
        ],
    )?;
    let caller = ["service", "create", "--detach", "--name", "caller", "--network", "demo", "shoal/exec"];
    docker(manager, &[&caller[..], &["sh", "-c", CALLER]].concat())?;
    let running = bounded::until("all tasks run", TASKS_LIMIT, || {
        let (web, caller) = (running_tasks(manager, "web")?, running_tasks(manager, "caller")?);
        Ok((web.len() == 3 && caller.len() == 1).then_some(web))
    })?;
    let seconds = started.elapsed().as_secs_f32();
    say(&docker(manager, &["service", "ps", "web"])?);
    let hosts: BTreeSet<&str> = running.iter().map(|task| task.node.as_str()).collect();
    stage.claim(hosts.len() == 3, &format!("three tasks run after {seconds:.1} s, one on each node"))
}

fn ask_every_node(stage: &mut Stage, nodes: &[Host]) -> Result<()> {
    let client = Host::client().address.to_string();
    stage.heading(&format!("From the client {client}, which is not in the swarm"));
    let mut shares: BTreeMap<(String, String), Vec<usize>> = BTreeMap::new();
    let mut answers: Vec<Answer> = Vec::new();
    for (column, node) in nodes.iter().enumerate() {
        command(&format!("curl http://{}:8080/    # {REQUESTS} times, to {}", node.address, node.name));
        for answer in client::ask(node, REQUESTS)? {
            let share =
                shares.entry((answer.slot(), answer.node.clone())).or_insert_with(|| vec![0; nodes.len()]);
            share[column] += 1;
            answers.push(answer);
        }
    }
    let mut rows = vec![["served by", "on", "via n1", "via n2", "via n3"].map(str::to_owned)];
    rows.extend(shares.iter().map(|((task, node), counts)| {
        [task.clone(), node.clone(), counts[0].to_string(), counts[1].to_string(), counts[2].to_string()]
    }));
    say(&lab::table(&rows));
    let asked = REQUESTS * nodes.len();
    let text = format!("every node answers on 8080: {} of {asked} requests answered", answers.len());
    stage.claim(answers.len() == asked, &text)?;
    let everywhere = shares.len() == 3 && shares.values().flatten().all(|count| *count > 0);
    stage.claim(everywhere, "by every node every task is reached")?;
    let seen = answers.iter().all(|answer| answer.client_address() == client);
    stage.claim(seen, &format!("every task saw the client's own address, {client}"))
}

fn follow_the_caller(stage: &mut Stage, nodes: &[Host]) -> Result<()> {
    stage.heading("From inside: the service `caller` runs curl http://web/ in a loop");
    let tasks = running_tasks(&nodes[0], "caller")?;
    let caller = tasks.first().context("caller has no task")?;
    let host = nodes.iter().find(|node| node.name == caller.node).context("caller runs nowhere")?;
    let log = host.state_dir().join("tasks").join(&caller.id).join("log");
    command(&format!("grep ^task: {}", log.display()));
    let answers = bounded::until("the caller reached every task", TASKS_LIMIT, || {
        let text = std::fs::read(&log).unwrap_or_default();
        let answers = Answer::all(&String::from_utf8_lossy(&text));
        let tasks: BTreeSet<String> = answers.iter().map(Answer::slot).collect();
        Ok((tasks.len() == 3).then_some(answers))
    })?;
    let mut shares: BTreeMap<String, usize> = BTreeMap::new();
    for answer in &answers {
        *shares.entry(answer.slot()).or_default() += 1;
    }
    let shares: Vec<String> = shares.iter().map(|(task, count)| format!("{task} {count}")).collect();
    let text =
        format!("it found web by name, and all its tasks: {} answers, {}", answers.len(), shares.join(", "));
    stage.claim(shares.len() == 3, &text)
}

fn kill_a_task(stage: &mut Stage, nodes: &[Host]) -> Result<()> {
    stage.heading("A task dies");
    let manager = &nodes[0];
    let before = running_tasks(manager, "web")?;
    let victim = before.first().context("web has no task")?;
    command(&format!("kill -9 {}    # web.{} on {}", victim.pid, victim.slot, victim.node));
    let started = Instant::now();
    sys::kill(victim.pid, libc::SIGKILL).context("could not kill the task's process")?;
    let known: BTreeSet<&str> = before.iter().map(|task| task.id.as_str()).collect();
    let (mut asked, mut answered) = (0, 0);
    let replacement = bounded::until("the replacement answers", TASKS_LIMIT, || {
        let answers = client::ask(manager, 6)?;
        asked += 6;
        answered += answers.len();
        Ok(answers.into_iter().find(|answer| !known.contains(answer.task_id.as_str())))
    })?;
    let seconds = started.elapsed().as_secs_f32();
    let Answer { node, .. } = &replacement;
    let text =
        format!("{} is replaced, on {node}: it answers {seconds:.1} s after the kill", replacement.slot());
    stage.claim(true, &text)?;
    say(&format!("(meanwhile {answered} of {asked} requests were answered)"));
    say(&docker(manager, &["service", "ps", "web"])?);
    Ok(())
}

fn kill_an_agent(stage: &mut Stage, lab: &Lab, nodes: &[Host]) -> Result<()> {
    stage.heading("A whole agent dies");
    let (manager, node) = (&nodes[0], &nodes[1]);
    let before: BTreeSet<String> = task_ids(manager)?;
    command(&format!("curl http://{}:8080/stream    # stays open: a line a second", node.address));
    let stream = Stream::open(node)?;
    stage.claim(stream.goes_on(), &format!("a connection through {} is established", node.name))?;
    command(&format!("cargo xtask lab kill {}    # kill -9 of its agent", node.name));
    lab::kill_agent(node)?;
    stage.claim(stream.goes_on() && stream.goes_on(), "the connection goes on")?;
    let answered = client::ask(node, REQUESTS)?.len();
    let text = format!("its published port still answers: {answered} of {REQUESTS} new connections");
    stage.claim(answered == REQUESTS, &text)?;
    command(&format!("cargo xtask lab start {}", node.name));
    let started = Instant::now();
    lab::start_agent(lab, node)?;
    bounded::until("the node is back", TASKS_LIMIT, || {
        Ok((ready_nodes(manager)? == nodes.len()).then_some(()))
    })?;
    let seconds = started.elapsed().as_secs_f32();
    stage.claim(
        stream.goes_on(),
        &format!("the agent is back after {seconds:.1} s, and the connection goes on"),
    )?;
    stage.claim(task_ids(manager)? == before, "all tasks are the ones that ran before")
}

/// A running task, as the manager knows it.
struct Task {
    id: String,
    slot: u64,
    /// The node's name.
    node: String,
    pid: u32,
}

fn running_tasks(manager: &Host, service: &str) -> Result<Vec<Task>> {
    let nodes: BTreeMap<String, String> = array(lab::get_json(manager, "/nodes")?)?
        .iter()
        .map(|node| (text(&node["ID"]), text(&node["Description"]["Hostname"])))
        .collect();
    let filters = format!("{{%22service%22:[%22{service}%22],%22desired-state%22:[%22running%22]}}");
    let tasks = array(lab::get_json(manager, &format!("/tasks?filters={filters}"))?)?;
    let running = tasks.iter().filter(|task| task["Status"]["State"] == "running");
    let tasks = running.map(|task| Task {
        id: text(&task["ID"]),
        slot: task["Slot"].as_u64().unwrap_or_default(),
        node: nodes.get(&text(&task["NodeID"])).cloned().unwrap_or_default(),
        pid: task["Status"]["ContainerStatus"]["PID"]
            .as_u64()
            .and_then(|pid| pid.try_into().ok())
            .unwrap_or_default(),
    });
    Ok(tasks.collect())
}

fn task_ids(manager: &Host) -> Result<BTreeSet<String>> {
    let services = ["web", "caller"].map(|service| running_tasks(manager, service));
    let mut ids = BTreeSet::new();
    for tasks in services {
        ids.extend(tasks?.into_iter().map(|task| task.id));
    }
    Ok(ids)
}

fn ready_nodes(manager: &Host) -> Result<usize> {
    let nodes = array(lab::get_json(manager, "/nodes")?)?;
    Ok(nodes.iter().filter(|node| node["Status"]["State"] == "ready").count())
}

fn array(value: Value) -> Result<Vec<Value>> {
    match value {
        Value::Array(values) => Ok(values),
        other => bail!("expected a list, got {other}"),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
