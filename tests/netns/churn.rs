//! Tasks that come and go, each with an address that another had before: nothing meant for one reaches another, and
//! nothing of them stays.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::client;
use crate::dns::{self, NO_ERROR, NO_SUCH_NAME};
use crate::engine::{self, Task};
use crate::figure;
use crate::lab::{self, BINARY, Lab, Node, until, within};
use crate::overlay::{ENCRYPTED, create_network};
use crate::receiver;

/// Tasks made a minute; as many are removed.
const RATE: u32 = 200;
/// How many of them there are at a time.
const ALIVE: u32 = 8;
/// Small enough that addresses are used again: it takes some 10 s until all have been used once.
const SUBNET: &str = "10.92.0.0/26";
/// How many addresses tasks and services can have in it: all but the first and the last, and the gateway.
const ADDRESSES: u8 = 61;
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 92, 0, 1);
/// How often a sender sends to all that it knows.
const ROUND: Duration = Duration::from_millis(50);
/// How long a name server may take; a question more is asked then.
const PATIENCE: Duration = Duration::from_secs(2);

pub(crate) fn addresses_used_again_get_nothing_of_their_former_tasks(lab: &Lab) -> Result<()> {
    churn(lab, &[], 20)
}

pub(crate) fn addresses_used_again_get_nothing_on_an_encrypted_network(lab: &Lab) -> Result<()> {
    churn(lab, ENCRYPTED, 15)
}

/// What all senders know: the services that there are, and whether it goes on.
#[derive(Default)]
struct Stage {
    services: Mutex<BTreeSet<String>>,
    ends: AtomicBool,
}

impl Stage {
    fn services(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.services.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// What a sender has found.
#[derive(Default, Debug)]
struct Found {
    sent: u64,
    /// Datagrams and connections that the right service answered.
    answered: u64,
    /// Of those, connections.
    connected: u64,
    /// The services that answered.
    services: BTreeSet<String>,
    /// What others answered.
    wrong: Vec<String>,
    /// How many services had each address.
    tenants: BTreeMap<IpAddr, BTreeSet<String>>,
}

/// Tasks come and go on a network with these options, for so many seconds unless `SHOAL_CHURN_S` says otherwise.
fn churn(lab: &Lab, options: &[&str], duration_s: u64) -> Result<()> {
    let duration = match std::env::var("SHOAL_CHURN_S") {
        Ok(text) => Duration::from_secs(text.parse().context("SHOAL_CHURN_S")?),
        Err(_) => Duration::from_secs(duration_s),
    };
    create_network(lab, "churn", &[&["--subnet", SUBNET], options].concat())?;
    let senders = ["--mode", "global", "--endpoint-mode", "dnsrr", "--network", "churn"];
    let senders = [&senders[..], &["shoal/exec", "sleep", "1000000"]].concat();
    let senders = engine::create(lab, "sender", lab.nodes.len(), &senders)?;
    let before = leftovers(lab)?;
    let strays = std::env::temp_dir().join(format!("shoal-strays-{}", std::process::id()));
    let stage = Stage::default();
    let ((made, seconds), found) = std::thread::scope(|scope| {
        let threads: Vec<_> =
            senders.iter().map(|task| scope.spawn(|| inside(task, || send(&stage)))).collect();
        let made = make_and_remove(lab, &stage, &strays, duration);
        stage.ends.store(true, Ordering::Relaxed);
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Found>>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        let found: Result<Vec<Found>> = threads.into_iter().map(join).collect();
        anyhow::Ok((made?, found?))
    })?;
    let received = fs::read_to_string(&strays).unwrap_or_default();
    // There is none if nothing strayed.
    let _ = fs::remove_file(&strays);
    tell(&found, made, seconds)?;
    let wrong: Vec<&str> = received
        .lines()
        .chain(found.iter().flat_map(|found| found.wrong.iter().map(String::as_str)))
        .collect();
    figure!("delivered to a task that it was not meant for: {}", wrong.len());
    ensure!(wrong.is_empty(), "{}", wrong[..wrong.len().min(10)].join("\n    "));
    let names = (0..made).map(|number| format!("tasks.{}", name(number)));
    nothing_resolves(&senders[0], names)?;
    is_gone(lab, &before)?;
    every_address_is_free(lab)
}

fn inside<T: Send>(task: &Task, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    within(&PathBuf::from(format!("/proc/{}/ns/net", task.pid)), work)
}

fn name(number: u32) -> String {
    format!("c{number}")
}

/// Makes a service with a task at a time, and removes the oldest; gives how many it made in how many seconds.
fn make_and_remove(
    lab: &Lab,
    stage: &Stage,
    strays: &std::path::Path,
    duration: Duration,
) -> Result<(u32, f64)> {
    let (manager, program) = (lab.manager(), receiver::command(strays)?);
    let started = Instant::now();
    let mut made = 0;
    while started.elapsed() < duration {
        let service = json!({
            "Name": name(made),
            "TaskTemplate": {
                "ContainerSpec": { "Image": "shoal/exec", "Args": program },
                "Networks": [{ "Target": "churn" }],
            },
            "Mode": { "Replicated": { "Replicas": 1 } },
            "EndpointSpec": { "Mode": if made % 2 == 0 { "vip" } else { "dnsrr" } },
        });
        let answer = engine::call(manager, "POST", "/services/create", &service.to_string())?;
        ensure!(answer.status == 201, "{}", answer.body);
        stage.services().insert(name(made));
        made += 1;
        if let Some(oldest) = made.checked_sub(ALIVE + 1) {
            remove(manager, stage, &name(oldest))?;
        }
        let due = Duration::from_mins(1) / RATE * made;
        std::thread::sleep(due.saturating_sub(started.elapsed()));
    }
    let seconds = started.elapsed().as_secs_f64();
    for number in made.saturating_sub(ALIVE)..made {
        remove(manager, stage, &name(number))?;
    }
    Ok((made, seconds))
}

fn remove(manager: &Node, stage: &Stage, name: &str) -> Result<()> {
    stage.services().remove(name);
    let answer = engine::call(manager, "DELETE", &format!("/services/{name}"), "")?;
    ensure!(answer.status == 200, "{}", answer.body);
    Ok(())
}

/// Sends to all services by their names, at the addresses that they had for as long as the answers hold: past the
/// service's end, if it comes to that. Always from the same port: who gets an address gets all flows to it.
fn send(stage: &Stage) -> Result<Found> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_nonblocking(true)?;
    let mut found = Found::default();
    // By name: addresses, and until when.
    let mut held: BTreeMap<String, (Vec<IpAddr>, Instant)> = BTreeMap::new();
    let mut rounds = 0_usize;
    while !stage.ends.load(Ordering::Relaxed) || !held.is_empty() {
        let round = Instant::now();
        let services = stage.services().clone();
        held.retain(|_, (_, until)| *until > round);
        for service in &services {
            let tasks = format!("tasks.{service}");
            if !held.contains_key(&tasks)
                && let Some(answer) = resolve(&tasks)?
            {
                held.insert(tasks, answer);
                // The service's own name is asked of others as long as there is no such service.
                held.extend(resolve(service)?.map(|answer| (service.clone(), answer)));
            }
        }
        for (at, (name, (addresses, _))) in held.iter().enumerate() {
            let service = name.trim_start_matches("tasks.");
            for address in addresses {
                found.tenants.entry(*address).or_default().insert(service.to_owned());
                let to = SocketAddr::new(*address, receiver::PORT);
                // A connection now and then: those to tasks that are gone take their time.
                if (at + rounds).is_multiple_of(40)
                    && let Ok(answer) = connect(to, service)
                {
                    found.connected += 1;
                    found.take(&answer);
                }
                // It fails after an ICMP message about an earlier one.
                found.sent += u64::from(socket.send_to(service.as_bytes(), to).is_ok());
            }
        }
        rounds += 1;
        loop {
            let mut data = [0; 512];
            match socket.recv_from(&mut data) {
                Ok((len, _)) => found.take(&String::from_utf8_lossy(&data[..len])),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(_) => {}
            }
        }
        std::thread::sleep(ROUND.saturating_sub(round.elapsed()));
    }
    Ok(found)
}

impl Found {
    /// Takes an answer: who it is from, and whom it was meant for.
    fn take(&mut self, answer: &str) {
        match answer.trim_end().split_once(' ') {
            Some((is, meant)) if is == meant => {
                self.answered += 1;
                self.services.insert(is.to_owned());
            }
            _ => self.wrong.push(format!("answered: {answer:?}")),
        }
    }
}

/// The addresses of a name, and until when they may be used; nothing while there is no such name.
fn resolve(name: &str) -> Result<Option<(Vec<IpAddr>, Instant)>> {
    let asked = Instant::now();
    let answer = dns::ask(GATEWAY.into(), name, dns::A, PATIENCE)?;
    if answer.code != NO_ERROR || answer.records.is_empty() {
        return Ok(None);
    }
    let ttl = answer.records.iter().map(|record| record.ttl).min().unwrap_or_default();
    let addresses = answer.records.iter().map(|record| record.address().context("not an address"));
    Ok(Some((addresses.collect::<Result<_>>()?, asked + ttl)))
}

/// A connection: a line there, and one back.
fn connect(to: SocketAddr, service: &str) -> Result<String> {
    let mut stream = client::connect_within(client::anywhere(to), to, Duration::from_millis(100))?;
    stream.write_all(format!("{service}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    ensure!(line.ends_with('\n'), "half an answer");
    Ok(line)
}

fn tell(found: &[Found], made: u32, seconds: f64) -> Result<()> {
    let sum = |part: fn(&Found) -> u64| found.iter().map(part).sum::<u64>();
    let (sent, answered) = (sum(|found| found.sent), sum(|found| found.answered));
    let reached: BTreeSet<&String> = found.iter().flat_map(|found| &found.services).collect();
    let mut tenants: BTreeMap<IpAddr, BTreeSet<&String>> = BTreeMap::new();
    for (address, services) in found.iter().flat_map(|found| &found.tenants) {
        tenants.entry(*address).or_default().extend(services);
    }
    let most = tenants.values().map(BTreeSet::len).max().unwrap_or_default();
    let again = tenants.values().filter(|services| services.len() > 1).count();
    figure!(
        "{made} services with a task each made and removed in {seconds:.0} s, {:.0} a minute; {} of them answered",
        60.0 * f64::from(made) / seconds,
        reached.len()
    );
    figure!(
        "{} addresses, {again} of them used again, by up to {} services; {sent} datagrams, {answered} answers, {} of them by TCP",
        tenants.len(),
        most,
        sum(|found| found.connected)
    );
    ensure!(reached.len() * 10 >= made as usize * 9, "{} of {made} services ever answered", reached.len());
    ensure!(again > 0, "no address was used again: this says nothing");
    Ok(())
}

/// None of the names that there were resolves, and no address but those of the senders has a name.
fn nothing_resolves(sender: &Task, names: impl Iterator<Item = String>) -> Result<()> {
    let names: Vec<String> = names.collect();
    inside(sender, || {
        for name in &names {
            until(&format!("{name} is forgotten"), Duration::from_secs(20), || {
                let answer = dns::ask(GATEWAY.into(), name, dns::A, PATIENCE)?;
                Ok((answer.code == NO_SUCH_NAME).then_some(()))
            })?;
        }
        let mut have_names = 0;
        for last in 2..=ADDRESSES + 1 {
            let address = Ipv4Addr::new(10, 92, 0, last);
            let answer = dns::ask(GATEWAY.into(), &dns::reverse(address.into()), dns::PTR, PATIENCE)?;
            have_names += usize::from(answer.code == NO_ERROR);
        }
        figure!("none of {} names resolves, and {have_names} of {ADDRESSES} addresses have one", names.len());
        ensure!(have_names == 3, "the three senders' addresses have names");
        Ok(())
    })
}

/// What there is on the nodes, by what it is: entries of maps, links, files, processes, namespaces that are held.
fn leftovers(lab: &Lab) -> Result<BTreeMap<String, u64>> {
    let mut all = BTreeMap::new();
    all.insert("links and processes of tasks".to_owned(), lab.leftovers()?.len() as u64);
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    all.insert(
        "mounts of namespaces".to_owned(),
        mounts.lines().filter(|line| line.contains(" nsfs ")).count() as u64,
    );
    for node in &lab.nodes {
        let (state, bpffs) = (node.state_dir(), node.run_dir().join("bpf"));
        let mut command = node.command(BINARY);
        command.args(["status", "--json", "--state-dir"]).arg(&state).arg("--bpffs").arg(bpffs);
        let status: Value = serde_json::from_str(&lab::output(&mut command)?)?;
        let counts = status["dataplane"]["counts"].as_object().context("a status without counts")?;
        for (name, count) in counts.iter().filter_map(|(name, count)| Some((name, count.as_u64()?))) {
            all.insert(format!("{name} in the maps of {node}"), count);
        }
        let hooks = status["dataplane"]["hooks"].as_array().context("a status without hooks")?;
        all.insert(format!("attached programs of {node}"), hooks.len() as u64);
        let folders = fs::read_dir(state.join("tasks")).into_iter().flatten().count();
        all.insert(format!("folders of tasks of {node}"), folders as u64);
        let files = fs::read_dir(format!("/proc/{}/fd", node.agent()?))?.flatten();
        let links = files.filter_map(|file| fs::read_link(file.path()).ok());
        let namespaces = links.filter(|link| link.to_string_lossy().starts_with("net:[")).count();
        all.insert(format!("namespaces held by the agent of {node}"), namespaces as u64);
    }
    Ok(all)
}

/// Waits until there is what there was.
fn is_gone(lab: &Lab, before: &BTreeMap<String, u64>) -> Result<()> {
    let mut after = BTreeMap::new();
    let gone = until("nothing is left", Duration::from_secs(30), || {
        after = leftovers(lab)?;
        Ok((after == *before).then_some(()))
    });
    let grown = after.iter().filter(|(what, count)| before.get(*what) != Some(count));
    let grown: Vec<String> =
        grown.map(|(what, count)| format!("{count} {what}, before {:?}", before.get(what))).collect();
    gone.with_context(|| grown.join("\n    "))?;
    figure!("{} kinds of things are as many as before", before.len());
    Ok(())
}

/// As many tasks as the subnet has addresses get one each, at once.
fn every_address_is_free(lab: &Lab) -> Result<()> {
    let manager = lab.manager();
    engine::docker_ok(manager, &["service", "rm", "sender"])?;
    let count = ADDRESSES.to_string();
    let fill = ["--replicas", &count, "--endpoint-mode", "dnsrr", "--network", "churn"];
    let fill = [&fill[..], &["shoal/exec", "sleep", "1000000"]].concat();
    let tasks = engine::create(lab, "fill", ADDRESSES.into(), &fill)?;
    let taken: BTreeSet<Ipv4Addr> = tasks.iter().map(Task::address).collect::<Result<_>>()?;
    figure!("then {} tasks have all {ADDRESSES} addresses of the subnet", tasks.len());
    ensure!(taken.len() == usize::from(ADDRESSES), "{taken:?}");
    Ok(())
}
