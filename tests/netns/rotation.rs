//! Roots and tokens are replaced while everybody works.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::engine;
use crate::figure;
use crate::lab::{Lab, Node};
use crate::load::{Load, beside};
use crate::managers::Promoted;
use crate::mesh::{create_web, targets};

/// How often the root is replaced.
const ROTATIONS: usize = 3;
/// Between two calls of the API.
const BETWEEN_CALLS: Duration = Duration::from_millis(10);

/// Asks the managers in turn to list what there is and to change a service, until told to stop; gives how many calls there
/// were. Each must succeed at once.
fn call(lab: &Lab, stop: &AtomicBool) -> Result<usize> {
    let mut calls = 0;
    for node in lab.nodes.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let nodes = engine::get_list(node, "/nodes")?;
        let away: Vec<_> = nodes.iter().filter(|node| node["Status"]["State"] != "ready").collect();
        ensure!(away.is_empty(), "by {node}: {away:?}");
        let name = format!("r-{calls}");
        let body = format!(
            r#"{{"Name":"{name}","TaskTemplate":{{"ContainerSpec":{{"Image":"shoal/whoami"}}}},"Mode":{{"Replicated":{{"Replicas":0}}}}}}"#
        );
        for (method, path, body, status) in [
            ("POST", "/services/create".to_owned(), body.as_str(), 201),
            ("DELETE", format!("/services/{name}"), "", 200),
        ] {
            let answer = engine::call(node, method, &path, body)?;
            ensure!(answer.status == status, "{method} {path} by {node}: {} {}", answer.status, answer.body);
        }
        calls += 3;
        std::thread::sleep(BETWEEN_CALLS);
    }
    Ok(calls)
}

fn root(node: &Node) -> Result<String> {
    engine::docker_ok(node, &["swarm", "ca"])
}

pub(crate) fn roots_and_tokens_are_replaced_under_load_without_a_failed_request(lab: &Lab) -> Result<()> {
    let promoted = Promoted::all(lab)?;
    let before = create_web(lab, lab.nodes.len(), &[])?;
    let load = Load::start(&targets(lab), "/");
    let (calls, ()) = beside(|stop| call(lab, stop), || rotate(lab))?;
    figure!("{calls} calls of the API, 0 failed");
    load.finish_unfailed()?;
    let after = engine::until_running(lab, "web", lab.nodes.len())?;
    ensure!(before.iter().zip(&after).all(|(a, b)| a.id == b.id), "tasks changed: {before:?} {after:?}");
    drop(promoted);
    Ok(())
}

fn rotate(lab: &Lab) -> Result<()> {
    for node in lab.nodes.iter().cycle().take(ROTATIONS) {
        let before = root(node)?;
        let began = Instant::now();
        engine::docker_ok(node, &["swarm", "ca", "--rotate", "--quiet"])?;
        figure!("the root was replaced by {node} in {:.1} s", began.elapsed().as_secs_f32());
        for other in &lab.nodes {
            ensure!(root(other)? != before, "{other} still shows the root before");
        }
        for role in ["worker", "manager"] {
            let token = |arguments: &[&str]| {
                let token = engine::docker_ok(
                    node,
                    &[&["swarm", "join-token", "--quiet"], arguments, &[role]].concat(),
                )?;
                token.trim().rsplit('-').next().map(str::to_owned).context("no token")
            };
            let before = token(&[])?;
            ensure!(token(&["--rotate"])? != before, "the {role} token is as it was");
        }
    }
    Ok(())
}
