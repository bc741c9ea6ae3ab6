//! The `docker` command line on a swarm: what it prints, and that it does what it says.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::engine::{self, docker_ok};
use crate::figure;
use crate::lab::{Lab, until};
use crate::managers;

/// How long a node's role may take to change.
const ROLE_LIMIT: Duration = Duration::from_secs(15);

/// What a command has to print, some of it.
fn prints(lab: &Lab, arguments: &[&str], expected: &[&str]) -> Result<String> {
    let printed = docker_ok(lab.manager(), arguments)?;
    for text in expected {
        ensure!(printed.contains(text), "docker {}: no {text:?} in:\n{printed}", arguments.join(" "));
    }
    Ok(printed)
}

pub(crate) fn nodes_and_versions_are_shown(lab: &Lab) -> Result<()> {
    let listed = prints(lab, &["node", "ls"], &["HOSTNAME", "n1", "n2", "n3", "Ready", "Active", "Leader"])?;
    ensure!(listed.lines().count() == lab.nodes.len() + 1, "{listed}");
    prints(lab, &["version"], &["Server:", "Shoal"])?;
    prints(lab, &["info"], &["Swarm: active", "Is Manager: true", "Nodes: 3", "Dataplane"])?;
    let info = docker_ok(&lab.nodes[1], &["info"])?;
    ensure!(info.contains("Swarm: active") && info.contains("Is Manager: false"), "{info}");
    prints(lab, &["node", "inspect", "--pretty", "n2"], &["Hostname:", "n2", "Ready", "198.18.0.12"])?;
    let format = ["node", "inspect", "self", "--format", "{{.Description.Hostname}} {{.Spec.Role}}"];
    prints(lab, &format, &["n1 manager"])?;
    Ok(())
}

/// The commands of the notes that the project was made from, with the built-in image in place of the others.
pub(crate) fn commands_of_the_notes_work(lab: &Lab) -> Result<()> {
    prints(lab, &["info"], &["Swarm: active"])?;
    prints(lab, &["node", "ls"], &["n1"])?;
    prints(lab, &["swarm", "join-token", "manager"], &["docker swarm join --token SWMTKN-1-"])?;
    prints(lab, &["swarm", "join-token", "worker"], &["docker swarm join --token SWMTKN-1-"])?;
    let id =
        docker_ok(lab.manager(), &["service", "create", "--detach", "shoal/exec", "ping", "198.18.0.100"])?;
    let id = id.trim();
    let listed = prints(lab, &["service", "ls"], &["replicated", "1/1", "shoal/exec"]);
    // It takes a moment until the task runs.
    if listed.is_err() {
        engine::until_running(lab, id, 1)?;
        prints(lab, &["service", "ls"], &["replicated", "1/1", "shoal/exec"])?;
    }
    docker_ok(lab.manager(), &["service", "update", "--detach", id, "--replicas", "3"])?;
    engine::until_running(lab, id, 3)?;
    prints(lab, &["service", "ps", id], &["Running"])?;
    prints(lab, &["node", "ps"], &["Running"])?;
    prints(lab, &["node", "ps", "n2"], &["Running", "n2"])?;
    prints(lab, &["service", "scale", "--detach", &format!("{id}=2")], &["scaled to 2"])?;
    engine::until_running(lab, id, 2)?;
    docker_ok(lab.manager(), &["service", "rm", id])?;

    docker_ok(lab.manager(), &["network", "create", "--driver", "overlay", "mydrupal"])?;
    let database = ["--network", "mydrupal", "-e", "POSTGRES_PASSWORD=secret", "shoal/whoami"];
    engine::create(lab, "psql", 1, &database)?;
    engine::create(lab, "drupal", 1, &["--network", "mydrupal", "-p", "8080:80", "shoal/whoami"])?;
    engine::create(lab, "search", 3, &["--replicas", "3", "-p", "9200:80", "shoal/whoami:2"])?;
    prints(
        lab,
        &["service", "ls"],
        &["psql", "drupal", "search", "*:8080->80/tcp", "*:9200->80/tcp", "3/3"],
    )?;

    let second = lab.node("n2")?;
    for (role, is_manager) in [("manager", true), ("worker", false)] {
        engine::docker_ok(lab.manager(), &["node", "update", "--role", role, "n2"])?;
        until(&format!("n2 is a {role}"), ROLE_LIMIT, || {
            Ok((managers::is_manager(second)? == is_manager).then_some(()))
        })?;
    }
    prints(lab, &["node", "inspect", "n2", "--format", "{{.Spec.Role}}"], &["worker"])?;
    Ok(())
}

pub(crate) fn create_and_update_wait_until_it_is_done(lab: &Lab) -> Result<()> {
    let began = Instant::now();
    let create =
        ["service", "create", "--name", "web", "--replicas", "3", "--publish", "published=8080,target=80"];
    let printed =
        prints(lab, &[&create[..], &["shoal/whoami"]].concat(), &["overall progress", "converged"])?;
    figure!("service create waited {:.1} s: {}", began.elapsed().as_secs_f32(), last(&printed));
    ensure!(engine::running(lab, "web")?.len() == 3, "it does not run yet");
    let began = Instant::now();
    let update = ["service", "update", "--env-add", "GREETING=hello", "web"];
    let printed = prints(lab, &update, &["overall progress", "converged"])?;
    figure!("service update waited {:.1} s: {}", began.elapsed().as_secs_f32(), last(&printed));
    let spec = docker_ok(lab.manager(), &["service", "inspect", "web", "--pretty"])?;
    ensure!(spec.contains("GREETING=hello"), "{spec}");
    let tasks = engine::running(lab, "web")?;
    let environment = std::fs::read(format!("/proc/{}/environ", tasks[0].pid))?;
    ensure!(
        String::from_utf8_lossy(&environment).contains("GREETING=hello"),
        "the task has the old environment"
    );
    Ok(())
}

fn last(printed: &str) -> &str {
    printed.trim_end().lines().last().unwrap_or_default().trim()
}

pub(crate) fn networks_are_made_shown_and_removed(lab: &Lab) -> Result<()> {
    let manager = lab.manager();
    let id = docker_ok(manager, &["network", "create", "-d", "overlay", "--subnet", "10.20.0.0/24", "blue"])?;
    prints(lab, &["network", "ls"], &["blue", "overlay", "swarm", "ingress"])?;
    let inspected: Value = serde_json::from_str(&docker_ok(manager, &["network", "inspect", "blue"])?)?;
    ensure!(inspected[0]["Id"].as_str() == Some(id.trim()), "{inspected}");
    ensure!(inspected[0]["IPAM"]["Config"][0]["Subnet"] == "10.20.0.0/24", "{inspected}");
    let tasks = engine::create(lab, "web", 1, &["--network", "blue", "shoal/whoami"])?;
    ensure!(tasks[0].address()?.to_string().starts_with("10.20.0."), "{tasks:?}");
    let refused = engine::docker(manager, &["network", "rm", "blue"])?;
    ensure!(!refused.status.success() && refused.stderr.contains("in use"), "{}", refused.stderr);
    docker_ok(manager, &["service", "rm", "web"])?;
    until("the network can be removed", Duration::from_secs(20), || {
        Ok(engine::docker(manager, &["network", "rm", "blue"])?.status.success().then_some(()))
    })?;
    let listed = docker_ok(manager, &["network", "ls"])?;
    ensure!(!listed.contains("blue"), "{listed}");
    Ok(())
}

pub(crate) fn placement_follows_mode_and_constraints(lab: &Lab) -> Result<()> {
    let everywhere =
        engine::create(lab, "everywhere", lab.nodes.len(), &["--mode", "global", "shoal/whoami"])?;
    let hosts: std::collections::BTreeSet<&str> =
        everywhere.iter().map(|task| task.node.name.as_str()).collect();
    ensure!(hosts.len() == lab.nodes.len(), "{hosts:?}");
    let workers = engine::create(
        lab,
        "workers",
        4,
        &["--replicas", "4", "--constraint", "node.role==worker", "shoal/whoami"],
    )?;
    ensure!(workers.iter().all(|task| task.node != *lab.manager()), "{workers:?}");
    let one = engine::create(
        lab,
        "one",
        2,
        &["--replicas", "2", "--constraint", "node.hostname==n3", "shoal/whoami"],
    )?;
    ensure!(one.iter().all(|task| task.node.name == "n3"), "{one:?}");
    docker_ok(
        lab.manager(),
        &[
            "service",
            "create",
            "--detach",
            "--name",
            "nowhere",
            "--constraint",
            "node.hostname==n9",
            "shoal/whoami",
        ],
    )?;
    until("the task without a place says so", Duration::from_secs(10), || {
        let shown = docker_ok(lab.manager(), &["service", "ps", "--no-trunc", "nowhere"])?;
        Ok((shown.contains("Pending") && shown.contains("no suitable node")).then_some(()))
    })
}

pub(crate) fn drained_node_gives_its_tasks_away(lab: &Lab) -> Result<()> {
    engine::create(lab, "web", 3, &["--replicas", "3", "shoal/whoami"])?;
    docker_ok(lab.manager(), &["node", "update", "--availability", "drain", "n3"])?;
    let moved = until("n3 is empty", Duration::from_secs(20), || {
        let tasks = engine::running(lab, "web")?;
        Ok((tasks.len() == 3 && tasks.iter().all(|task| task.node.name != "n3")).then_some(()))
    });
    docker_ok(lab.manager(), &["node", "update", "--availability", "active", "n3"])?;
    moved
}

pub(crate) fn removed_service_leaves_nothing(lab: &Lab) -> Result<()> {
    docker_ok(lab.manager(), &["network", "create", "-d", "overlay", "blue"])?;
    let arguments = ["--replicas", "6", "--network", "blue", "--publish", "8080:80", "shoal/whoami"];
    engine::create(lab, "web", 6, &arguments)?;
    ensure!(!lab.leftovers()?.is_empty(), "nothing is seen of running tasks: this test sees nothing");
    docker_ok(lab.manager(), &["service", "rm", "web"])?;
    let began = Instant::now();
    let mut left = Vec::new();
    let gone = until("everything is gone", Duration::from_secs(20), || {
        left = lab.leftovers()?;
        for node in &lab.nodes {
            let folders = std::fs::read_dir(node.state_dir().join("tasks")).into_iter().flatten().flatten();
            left.extend(folders.map(|entry| format!("folder {}", entry.path().display())));
        }
        Ok(left.is_empty().then_some(()))
    });
    ensure!(gone.is_ok(), "{}", left.join("\n    "));
    figure!(
        "six tasks and all their links, processes and folders are gone after {:.1} s",
        began.elapsed().as_secs_f32()
    );
    let tasks = engine::get_list(lab.manager(), "/tasks")?;
    ensure!(tasks.is_empty(), "the manager still knows {} tasks", tasks.len());
    Ok(())
}

pub(crate) fn failing_tasks_are_restarted_and_say_why(lab: &Lab) -> Result<()> {
    let create =
        ["service", "create", "--detach", "--name", "broken", "--restart-delay", "200ms", "shoal/exec"];
    docker_ok(lab.manager(), &[&create[..], &["sh", "-c", "exit 7"]].concat())?;
    until("it is tried again", Duration::from_secs(20), || {
        let shown = docker_ok(lab.manager(), &["service", "ps", "--no-trunc", "broken"])?;
        Ok((shown.matches("Failed").count() >= 2 && shown.contains("(7)")).then_some(()))
    })?;
    let create = ["service", "create", "--detach", "--name", "unknown", "nginx:latest"];
    docker_ok(lab.manager(), &create)?;
    until("the unknown image is rejected", Duration::from_secs(20), || {
        let shown = docker_ok(lab.manager(), &["service", "ps", "--no-trunc", "unknown"])?;
        Ok((shown.contains("Rejected") && shown.contains("No such image: nginx:latest")).then_some(()))
    })
}

pub(crate) fn node_leaves_and_joins_again(lab: &Lab) -> Result<()> {
    engine::leave(lab, &lab.nodes[2])?;
    engine::join(lab, &lab.nodes[2])?;
    // Its dataplane is whole again: tasks on it are reached.
    engine::create(lab, "web", 3, &["--replicas", "3", "--publish", "8080:80", "shoal/whoami"])?;
    crate::mesh::until_every_node_answers(lab)
}
