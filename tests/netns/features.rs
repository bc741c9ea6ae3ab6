//! What labels and flags make of a published port.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::client::{self, anywhere};
use crate::engine;
use crate::figure;
use crate::lab::{self, Lab, Node, as_client, until};
use crate::mesh::{PORT, create_web, python};
use crate::undo::Undo;
use crate::ways::{Family, until_answered};

/// How long what is refused is tried.
const PATIENCE: Duration = Duration::from_millis(600);

/// The published port on every node.
fn targets(lab: &Lab, family: Family) -> Vec<SocketAddr> {
    lab.nodes.iter().map(|node| SocketAddr::new(family.of(node), PORT)).collect()
}

/// `web` with so many tasks and a label, answering by every node of `at`.
fn create_labelled(lab: &Lab, replicas: usize, label: &str, at: &[&Node]) -> Result<Vec<engine::Task>> {
    let count = replicas.to_string();
    let publish = ["--replicas", &count, "--publish", "8080:80", "--publish", "8080:80/udp"];
    let arguments = [&publish[..], &["--label", label, "shoal/whoami"]].concat();
    let tasks = engine::create(lab, "web", replicas, &arguments)?;
    for node in at {
        for family in Family::ALL {
            until_answered(SocketAddr::new(family.of(node), PORT))?;
        }
    }
    Ok(tasks)
}

/// Whether a connection comes about, and if not, whether somebody said so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Answered,
    Refused,
    Silence,
}

fn dial(source: SocketAddr, to: SocketAddr) -> Result<Outcome> {
    as_client(|| {
        let started = Instant::now();
        let socket = client::connect_within(source, to, PATIENCE);
        Ok(match socket {
            Ok(_) => Outcome::Answered,
            Err(_) if started.elapsed() < PATIENCE / 2 => Outcome::Refused,
            Err(_) => Outcome::Silence,
        })
    })
}

pub(crate) fn client_with_affinity_stays_with_one_task(lab: &Lab) -> Result<()> {
    let all: Vec<&Node> = lab.nodes.iter().collect();
    create_labelled(lab, 3, "shoal.affinity=client-ip", &all)?;
    for family in Family::ALL {
        let mut of_clients = BTreeMap::new();
        for source in [family.client(), family.routed_client()] {
            let tasks = as_client(|| {
                let ask = |to| client::http(SocketAddr::new(source, 0), to, "/").map(|answer| answer.task);
                let asked = targets(lab, family).into_iter().cycle().take(50).map(ask);
                let echo = |to| client::udp(SocketAddr::new(source, 0), to, b"x").map(|answer| answer.task);
                asked.chain(targets(lab, family).into_iter().map(echo)).collect::<Result<BTreeSet<_>>>()
            })?;
            of_clients.insert(source, tasks);
        }
        figure!("{family}: 50 connections and 3 datagrams each: {of_clients:?}");
        ensure!(of_clients.values().all(|tasks| tasks.len() == 1), "more than one task for a client");
    }
    Ok(())
}

pub(crate) fn rules_let_in_and_keep_out(lab: &Lab) -> Result<()> {
    let all: Vec<&Node> = lab.nodes.iter().collect();
    let labels = [
        // The longest range that holds the client counts; where some are let in, the others are not.
        "shoal.allow=198.18.0.0/24,fd00:c6::/64",
        "shoal.deny=198.18.1.0/24,fd00:c7::/64",
    ];
    for label in labels {
        create_labelled(lab, 2, label, &all)?;
        for family in Family::ALL {
            for to in targets(lab, family) {
                let inside = dial(SocketAddr::new(family.client(), 0), to)?;
                let outside = dial(SocketAddr::new(family.routed_client(), 0), to)?;
                ensure!(inside == Outcome::Answered, "{label}: {to} does not let the client in");
                ensure!(outside != Outcome::Answered, "{label}: {to} lets the routed client in");
            }
        }
        figure!("{label}: the client is let in, the routed client is not");
        engine::docker_ok(lab.manager(), &["service", "rm", "web"])?;
        until_gone(lab, "web")?;
    }
    Ok(())
}

fn until_gone(lab: &Lab, service: &str) -> Result<()> {
    until(&format!("{service} is gone"), Duration::from_secs(20), || {
        let left = engine::get_list(lab.manager(), "/services")?.len() + lab.leftovers()?.len();
        Ok((left == 0).then_some(()))
    })
}

pub(crate) fn ports_answer_on_the_addresses_and_nodes_that_were_chosen(lab: &Lab) -> Result<()> {
    let [n1, n2, ..] = lab.nodes.as_slice() else { return Ok(()) };
    let chosen: [(&str, Vec<SocketAddr>); 2] = [
        (
            "shoal.publish.addresses=198.18.0.11/32,fd00:c6::12/128",
            vec![SocketAddr::new(n1.address.into(), PORT), SocketAddr::new(n2.address6.into(), PORT)],
        ),
        (
            "shoal.publish.nodes=node.hostname==n2",
            Family::ALL.map(|family| SocketAddr::new(family.of(n2), PORT)).to_vec(),
        ),
    ];
    for (label, open) in chosen {
        create_labelled(lab, 2, label, &[])?;
        for to in &open {
            until_answered(*to)?;
        }
        let mut answering = Vec::new();
        for to in Family::ALL.into_iter().flat_map(|family| targets(lab, family)) {
            match dial(anywhere(to), to)? {
                Outcome::Answered => answering.push(to),
                // The port is the host's own there, and nobody listens.
                outcome => ensure!(outcome == Outcome::Refused, "{label}: {outcome:?} from {to}"),
            }
        }
        figure!("{label}: {answering:?} answer, the others refuse");
        let (open, answering): (BTreeSet<_>, BTreeSet<_>) =
            (open.iter().collect(), answering.iter().collect());
        ensure!(open == answering, "{label}: expected {open:?}");
        engine::docker_ok(lab.manager(), &["service", "rm", "web"])?;
        until_gone(lab, "web")?;
    }
    Ok(())
}

pub(crate) fn host_mode_answers_on_the_tasks_node_alone(lab: &Lab) -> Result<()> {
    let publish = ["--publish", "mode=host,published=8090,target=80", "--constraint", "node.hostname==n2"];
    engine::create(lab, "web", 1, &[&publish[..], &["shoal/whoami"]].concat())?;
    for family in Family::ALL {
        until_answered(SocketAddr::new(family.of(&lab.nodes[1]), 8090))?;
        for node in &lab.nodes {
            let to = SocketAddr::new(family.of(node), 8090);
            let outcome = dial(anywhere(to), to)?;
            let expected = if node.name == "n2" { Outcome::Answered } else { Outcome::Refused };
            ensure!(outcome == expected, "{to}: {outcome:?}");
        }
    }
    figure!("8090 answers on n2, and refuses on the others");
    Ok(())
}

/// How many of `count` connections over all nodes a task on `node` got, in percent.
fn share_of(lab: &Lab, chosen: impl Fn(&client::Answer) -> bool + Sync, count: usize) -> Result<usize> {
    let targets = targets(lab, Family::V4);
    let hits = as_client(|| {
        let answers = targets.iter().cycle().take(count).map(|to| client::http(anywhere(*to), *to, "/"));
        Ok(answers.collect::<Result<Vec<_>>>()?.into_iter().filter(&chosen).count())
    })?;
    Ok(100 * hits / count)
}

pub(crate) fn light_node_gets_less(lab: &Lab) -> Result<()> {
    engine::docker_ok(lab.manager(), &["node", "update", "--label-add", "shoal.weight=25", "n1"])?;
    let mut back = Command::new("docker");
    back.args(["-H", &format!("unix://{}", lab.manager().socket().display())]);
    back.args(["node", "update", "--label-rm", "shoal.weight", "n1"]);
    let undo = Undo::new(back);
    let tasks = create_web(lab, 3, &[])?;
    ensure!(tasks.iter().filter(|task| task.node.name == "n1").count() == 1, "{tasks:?}");
    let is_light = |answer: &client::Answer| answer.node == "n1";
    let light = share_of(lab, is_light, 1200)?;
    figure!("the task on a node of weight 25 beside two of 100 gets {light} % (expected 11)");
    ensure!((7..=16).contains(&light), "{light} %");
    drop(undo);
    until("it gets its share again", Duration::from_secs(10), || {
        Ok((share_of(lab, is_light, 200)? >= 22).then_some(()))
    })
}

pub(crate) fn share_of_a_new_task_grows(lab: &Lab) -> Result<()> {
    let all: Vec<&Node> = lab.nodes.iter().collect();
    let old = create_labelled(lab, 1, "shoal.slow-start=5s", &all)?;
    // It starts slowly as well.
    std::thread::sleep(Duration::from_millis(5500));
    engine::docker_ok(lab.manager(), &["service", "scale", "--detach", "web=2"])?;
    let is_new = |answer: &client::Answer| !answer.task.ends_with(&old[0].id);
    until("the new task runs", Duration::from_secs(10), || {
        Ok((engine::running(lab, "web")?.len() == 2).then_some(()))
    })?;
    let began = Instant::now();
    let mut shares = Vec::new();
    for at in [0, 2, 4, 6] {
        std::thread::sleep(Duration::from_secs(at).saturating_sub(began.elapsed()));
        shares.push((at, share_of(lab, is_new, 300)?));
    }
    figure!("of the new task, after s: {shares:?} %");
    let (first, last) = (shares[0].1, shares[3].1);
    ensure!(first < 25 && shares[2].1 > first && (38..=62).contains(&last), "{shares:?}");
    Ok(())
}

/// A name server whose answer is 4 KB of text.
const NAME_SERVER: &str = "
import socket, struct
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.bind(('::', 53))
text = b''.join(b'\\xfa' + bytes([97 + part]) * 250 for part in range(16))
while True:
    query, client = server.recvfrom(65535)
    end = 12
    while query[end]:
        end += query[end] + 1
    end += 5
    head = query[:2] + struct.pack('>HHHHH', 0x8580, 1, 1, 0, 0)
    answer = b'\\xc0\\x0c' + struct.pack('>HHIH', 16, 1, 0, len(text)) + text
    server.sendto(head + query[12:end] + answer, client)
";

pub(crate) fn dig_gets_an_answer_of_4_kb(lab: &Lab) -> Result<()> {
    let options = ["--constraint", "node.hostname==n1"];
    crate::ways::create(lab, 1, 53, &options, &["shoal/exec", &python()?, "-c", NAME_SERVER])?;
    for way in crate::ways::Way::all() {
        for node in &lab.nodes[..2] {
            let to = way.to(node);
            let mut command = lab::on_client("dig");
            command.args(["+notcp", "+ignore", "+bufsize=8192", "+tries=1", "+time=2", "-p"]);
            command.args([to.port().to_string(), format!("@{}", to.ip())]).args(["big.example", "TXT"]);
            let printed = until(&format!("{way} by {node}"), Duration::from_secs(10), || {
                Ok(lab::output(&mut command).ok())
            })?;
            let size = printed.lines().find_map(|line| line.split_once("MSG SIZE  rcvd: "));
            let size: usize = size.with_context(|| printed.clone())?.1.trim().parse()?;
            figure!("{way} by {node}: an answer of {size} bytes");
            ensure!(size > 4000 && printed.contains(&"p".repeat(250)), "{printed}");
        }
    }
    Ok(())
}
