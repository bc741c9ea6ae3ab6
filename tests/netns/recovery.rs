//! Managers that come back: from a backup where all were lost, with the unlock key where they are locked; and what is on
//! their disks.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use control::backup::Backup;
use mesh_api::seal::UnlockKey;

use crate::engine::{self, Task};
use crate::figure;
use crate::lab::{self, BINARY, Lab, Node, Still, until};
use crate::load::Load;
use crate::managers::{self, CHANGED, Promoted, is_listening, is_manager, set_role, statuses};
use crate::mesh::{PORT, create_web, until_every_node_answers};
use crate::ways::until_answered;
use crate::writes::{self, Write};

/// On the nodes that are not put up anew.
const ON_OTHERS: [&str; 2] = ["--constraint", "node.hostname!=n1"];
/// The published port of a service that is made after a restoration.
const NEXT_PORT: u16 = 8081;
/// How long tasks may take to end or to be started again.
const TASKS_LIMIT: Duration = Duration::from_secs(30);
/// What a locked manager answers (Docker's text).
const LOCKED: &str = "Swarm is encrypted and needs to be unlocked before it can be used. Please use \"docker swarm unlock\" to \
     unlock it.";
/// What it answers to who would leave (Docker's text).
const LOCKED_LEAVES: &str =
    "Swarm is encrypted and locked. Please unlock it first or use `--force` to ignore this message.";
/// What it answers to another key (Docker's text).
const WRONG_KEY: &str = "swarm could not be unlocked: invalid key provided";
/// How often the disks are copied: each time the leader's and another's.
const ROUNDS: usize = 4;
/// Between two copies.
const BETWEEN_COPIES: Duration = Duration::from_millis(500);

/// A folder for backups and copies of disks, which goes when this is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn make() -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("shoal-recovery-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self(folder))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            println!("    not undone: {error:#}");
        }
    }
}

/// `shoal` against a node's agent.
fn shoal(node: &Node, arguments: &[&str]) -> Command {
    let mut command = node.command(BINARY);
    command.args(arguments).arg("--run-dir").arg(node.run_dir());
    command
}

pub(crate) fn workers_follow_the_restored_swarm(lab: &Lab) -> Result<()> {
    let (managers, workers) = lab.nodes.split_at(2);
    restore(lab, managers, workers)
}

pub(crate) fn former_managers_are_workers_of_the_restored_swarm(lab: &Lab) -> Result<()> {
    restore(lab, &lab.nodes, &[])
}

/// Takes a backup of a swarm of three managers, changes the swarm, `workers` into such among the rest, loses `managers`, and
/// restores the backup on a host with the address of the first.
fn restore(lab: &Lab, managers: &[Node], workers: &[Node]) -> Result<()> {
    let [first, others @ ..] = managers else { anyhow::bail!("no managers") };
    let promoted = Promoted::all(lab)?;
    let web = create_web(lab, 4, &ON_OTHERS)?;
    let everywhere =
        engine::create(lab, "everywhere", lab.nodes.len(), &["--mode", "global", "shoal/whoami"])?;
    let early = engine::create(lab, "early", 1, &[&ON_OTHERS[..], &["shoal/whoami"]].concat())?;
    let scratch = Scratch::make()?;
    let file = scratch.path("swarm.shoal").display().to_string();
    // Any manager takes one.
    lab::output(&mut shoal(&lab.nodes[1], &["backup", &file]))?;
    let late = [&["--replicas", "2"], &ON_OTHERS[..], &["shoal/whoami"]].concat();
    let late = engine::create(lab, "late", 2, &late)?;
    engine::docker_ok(first, &["service", "rm", "early"])?;
    engine::docker_ok(first, &["service", "update", "--detach", "--label-add", "since=yes", "web"])?;
    until_ended(&early)?;
    for worker in workers {
        set_role(first, "demote", worker)?;
        until(&format!("{worker} is a worker"), CHANGED, || Ok((!is_listening(worker)?).then_some(())))?;
    }

    let load = Load::start(&published(lab, first), "/");
    let began = lose_and_restore(lab, first, others, &file)?;
    for other in others {
        lab.xtask(&["start", &other.name])?;
    }
    for worker in workers {
        let mut there = late.iter().filter(|task| task.node == *worker).peekable();
        ensure!(there.peek().is_some(), "no task on {worker} that it could stop: {late:?}");
        until_ended(there)?;
        figure!(
            "{worker} has stopped what is not in the backup after {:.1} s",
            began.elapsed().as_secs_f32()
        );
    }
    lab.until_ready(lab.nodes.len())?;
    figure!("all nodes are ready after {:.1} s", began.elapsed().as_secs_f32());
    for other in others {
        until(&format!("{other} is a worker"), CHANGED, || {
            Ok((!is_manager(other)? && !is_listening(other)?).then_some(()))
        })?;
    }
    let left = statuses(first)?;
    ensure!(
        left.len() == lab.nodes.len() && left[&first.name] == "Leader",
        "not the nodes of the backup, led by {first}: {left:?}"
    );
    ensure!(left.values().filter(|status| !status.is_empty()).count() == 1, "managers are left: {left:?}");

    is_as_in_the_backup(lab, first, [&web, &everywhere], &late)?;
    load.finish_unfailed()?;
    figure!("all is as in the backup after {:.1} s", began.elapsed().as_secs_f32());
    let publish = format!("{NEXT_PORT}:80");
    let next = ["--replicas", "3", "--publish", &publish, "shoal/whoami"];
    engine::create(lab, "next", 3, &next)?;
    for node in &lab.nodes {
        until_answered(SocketAddrV4::new(node.address, NEXT_PORT).into())?;
    }
    figure!("another service serves after {:.1} s", began.elapsed().as_secs_f32());
    drop(promoted);
    drop(Promoted::all(lab)?);
    Ok(())
}

/// Puts a manager's host up anew, has the other managers die too, and restores a backup there once they answer no longer; when
/// that began.
fn lose_and_restore(lab: &Lab, first: &Node, others: &[Node], file: &str) -> Result<Instant> {
    lab.xtask(&["kill", &first.name])?;
    put_up_anew(lab, first)?;
    let address = first.address.to_string();
    let restore = || lab::output(&mut shoal(first, &["restore", file, "--advertise-addr", &address]));
    let refused = restore().err().context("restored while managers answer")?.to_string();
    ensure!(refused.contains("managers of the swarm answer: "), "refused otherwise: {refused}");
    for other in others {
        let answering = format!("{other} at {}:2377", other.address);
        ensure!(refused.contains(&answering), "{answering} is not in: {refused}");
        lab.xtask(&["kill", &other.name])?;
    }
    let began = Instant::now();
    let told = restore()?;
    figure!("restored in {:.1} s", began.elapsed().as_secs_f32());
    ensure!(told.contains(&format!("Removed, since this host has their address: {first}.")), "{told}");
    let demoted = told.lines().find(|line| line.starts_with("Managers then, workers from here on: "));
    for node in lab.nodes.iter().filter(|node| *node != first) {
        ensure!(demoted.is_some_and(|line| line.contains(&node.name)), "{node} is not named: {told}");
    }
    ensure!(!told.contains("The other nodes don't know"), "{told}");
    Ok(began)
}

/// The published port on all nodes but one.
fn published(lab: &Lab, without: &Node) -> Vec<SocketAddrV4> {
    let nodes = lab.nodes.iter().filter(|node| *node != without);
    nodes.map(|node| SocketAddrV4::new(node.address, PORT)).collect()
}

/// Makes of a host that lost its agent one that never was in a swarm, and starts an agent there.
fn put_up_anew(lab: &Lab, node: &Node) -> Result<()> {
    let mut uninstall = shoal(node, &["agent", "--uninstall"]);
    uninstall.arg("--state-dir").arg(node.state_dir()).arg("--bpffs").arg(node.run_dir().join("bpf"));
    lab::output(&mut uninstall)?;
    ensure!(!node.state_dir().join("manager").exists(), "the state of {node} is left");
    lab.xtask(&["start", &node.name])?;
    let info = engine::docker_ok(node, &["info", "--format", "{{.Swarm.LocalNodeState}}"])?;
    ensure!(info.trim() == "inactive", "{node} is {info}");
    Ok(())
}

/// Waits until the processes of tasks have ended.
fn until_ended<'t>(tasks: impl IntoIterator<Item = &'t Task>) -> Result<()> {
    for task in tasks {
        let what = format!("task {} on {} has ended", task.id, task.node);
        until(&what, TASKS_LIMIT, || Ok((!is_alive(task)).then_some(())))?;
    }
    Ok(())
}

fn is_alive(task: &Task) -> bool {
    // One that has ended, but that nobody has waited for, has no program.
    fs::read_link(format!("/proc/{}/exe", task.pid)).is_ok()
}

/// Which tasks run as which processes, but for those on one node.
fn processes<'t>(tasks: &'t [Task], without: Option<&Node>) -> BTreeSet<(&'t str, u32)> {
    let tasks = tasks.iter().filter(|task| Some(&task.node) != without);
    tasks.map(|task| (task.id.as_str(), task.pid)).collect()
}

/// Waits until all services run as in the backup: `web` and `everywhere` by the same processes as before on all nodes but
/// `anew`, and nothing of `late`, which was made since.
fn is_as_in_the_backup(lab: &Lab, anew: &Node, before: [&[Task]; 2], late: &[Task]) -> Result<()> {
    for (service, before) in ["web", "everywhere"].into_iter().zip(before) {
        let after = engine::until_running(lab, service, before.len())?;
        ensure!(
            processes(before, Some(anew)) == processes(&after, Some(anew)),
            "tasks of {service} changed: {before:?} {after:?}"
        );
    }
    // The restored state has its former process running, until its node says otherwise.
    until("the service that was removed since runs again", TASKS_LIMIT, || {
        let tasks = engine::running(lab, "early").unwrap_or_default();
        Ok((tasks.len() == 1 && tasks.iter().all(is_alive)).then_some(()))
    })?;
    until_ended(late)?;
    until_every_node_answers(lab)?;
    let listed = engine::names(lab.manager(), &["service", "ls", "--format", "{{.Name}}"])?;
    let listed: BTreeSet<&str> = listed.iter().map(String::as_str).collect();
    ensure!(listed == BTreeSet::from(["early", "everywhere", "web"]), "{listed:?}");
    let labels = ["service", "inspect", "--format", "{{.Spec.Labels}}", "web"];
    let labels = engine::docker_ok(lab.manager(), &labels)?;
    ensure!(!labels.contains("since"), "{labels}");
    Ok(())
}

/// Managers that start are locked until this is dropped.
struct Autolock<'l>(&'l Lab);

impl<'l> Autolock<'l> {
    fn on(lab: &'l Lab) -> Result<Self> {
        let autolock = Self(lab);
        until_sealed_anew(lab, || {
            let printed = engine::docker_ok(lab.manager(), &["swarm", "update", "--autolock=true"])?;
            let key = autolock.key()?;
            ensure!(printed.contains(&key), "{key} is not in: {printed}");
            Ok(())
        })?;
        Ok(autolock)
    }

    /// The unlock key.
    fn key(&self) -> Result<String> {
        let printed = engine::docker_ok(self.0.manager(), &["swarm", "unlock-key", "--quiet"])?;
        Ok(printed.trim().to_owned())
    }

    fn off(&self) -> Result<()> {
        for node in &self.0.nodes {
            if engine::get(node, "/_ping").is_ok() && is_locked(node)? {
                unlock(node, &self.key()?)?;
            }
        }
        engine::docker_ok(self.0.manager(), &["swarm", "update", "--autolock=false"]).map(drop)
    }
}

impl Drop for Autolock<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.off() {
            println!("    not undone: {error:#}");
        }
    }
}

/// Changes what managers' files are sealed with, and waits until each has done so.
fn until_sealed_anew<T>(lab: &Lab, change: impl FnOnce() -> Result<T>) -> Result<T> {
    let key = |node: &Node| -> Result<Vec<u8>> { Ok(fs::read(node.state_dir().join("manager/key"))?) };
    let before = lab.nodes.iter().map(key).collect::<Result<Vec<_>>>()?;
    let changed = change()?;
    for (node, before) in lab.nodes.iter().zip(&before) {
        until(&format!("{node} has sealed its key anew"), CHANGED, || {
            Ok((key(node)? != *before).then_some(()))
        })?;
    }
    Ok(changed)
}

fn is_locked(node: &Node) -> Result<bool> {
    let info = engine::docker_ok(node, &["info", "--format", "{{.Swarm.LocalNodeState}}"])?;
    Ok(info.trim() == "locked")
}

/// `docker swarm unlock`; what it said where it was refused.
fn unlock(node: &Node, key: &str) -> Result<Option<String>> {
    let unlocked = engine::docker_fed(node, &["swarm", "unlock"], &format!("{key}\n"))?;
    Ok((!unlocked.status.success()).then_some(unlocked.stderr))
}

pub(crate) fn locked_manager_is_unlocked_and_votes_again(lab: &Lab) -> Result<()> {
    let promoted = Promoted::all(lab)?;
    let before = create_web(lab, lab.nodes.len(), &[])?;
    let [first, second, third] = lab.nodes.as_slice() else { anyhow::bail!("the case is for three nodes") };
    let load = Load::start(&crate::mesh::targets(lab), "/");
    let (writes, autolock) = writes::during(lab, || {
        let autolock = Autolock::on(lab)?;
        let key = autolock.key()?;
        restart_locked(lab, first, third, &UnlockKey::random().to_string(), &key)?;
        let next = until_sealed_anew(lab, || {
            engine::docker_ok(second, &["swarm", "unlock-key", "--rotate", "--quiet"])
        })?;
        ensure!(next.trim() == autolock.key()? && next.trim() != key, "{next} after {key}");
        restart_locked(lab, first, third, &key, next.trim())?;
        Ok(autolock)
    })?;
    drop(autolock);
    writes::settle(lab, &writes)?;
    figure!("{} writes, none was lost", writes.len());
    load.finish_unfailed()?;
    let after = engine::until_running(lab, "web", lab.nodes.len())?;
    ensure!(processes(&before, None) == processes(&after, None), "tasks changed: {before:?} {after:?}");
    drop(promoted);
    Ok(())
}

/// Kills a manager's agent and starts it again, which is locked then: has it refuse the wrong key, and be a voter again by the
/// right one.
fn restart_locked(lab: &Lab, other: &Node, node: &Node, wrong: &str, right: &str) -> Result<()> {
    let began = Instant::now();
    lab.xtask(&["kill", &node.name])?;
    lab.xtask(&["start", &node.name])?;
    ensure!(is_locked(node)?, "{node} is not locked");
    for (arguments, expected) in
        [(&["node", "ls"][..], LOCKED), (&["service", "ls"], LOCKED), (&["swarm", "leave"], LOCKED_LEAVES)]
    {
        let refused = engine::docker(node, arguments)?;
        ensure!(!refused.status.success() && refused.stderr.contains(expected), "{}", refused.stderr);
    }
    status_becomes(other, node, "Unreachable")?;
    let refused = unlock(node, wrong)?.context("unlocked by the wrong key")?;
    ensure!(refused.contains(WRONG_KEY) && is_locked(node)?, "{refused}");
    if let Some(refused) = unlock(node, right)? {
        anyhow::bail!("refused with the right key: {refused}");
    }
    let unlocked = Instant::now();
    status_becomes(other, node, "Reachable")?;
    figure!(
        "{node} was away for {:.1} s; a voter {:.1} s after it was unlocked",
        (unlocked - began).as_secs_f32(),
        unlocked.elapsed().as_secs_f32()
    );
    ensure!(statuses(node)?.len() == lab.nodes.len(), "{node} does not know all nodes");
    Ok(())
}

/// Waits until a manager shows a MANAGER STATUS for a node.
fn status_becomes(manager: &Node, node: &Node, wanted: &str) -> Result<()> {
    until(&format!("{node} is {wanted}"), CHANGED, || {
        // While another is elected, there is no answer.
        Ok(statuses(manager)
            .is_ok_and(|all| all.get(&node.name).is_some_and(|it| it == wanted))
            .then_some(()))
    })
}

/// What the disk of a manager holds, by the backup that was made of it.
struct Disk {
    what: String,
    /// What was acknowledged before must be there.
    began: Instant,
    /// What began later can't be there.
    ended: Instant,
    services: BTreeSet<String>,
}

impl Disk {
    /// Fails unless the disk holds all writes that were acknowledged before, and of the later ones the first without a gap.
    fn check(&self, writes: &[Write]) -> Result<()> {
        let Self { what, began, ended, services } = self;
        let held = writes.iter().take_while(|write| services.contains(&write.name)).count();
        let acknowledged = writes.iter().filter(|write| write.ended < *began).count();
        let begun = writes.iter().filter(|write| write.began < *ended).count();
        ensure!(
            services.len() == held && (acknowledged..=begun).contains(&held),
            "{what}: {} services, the first {held} writes without a gap, of {acknowledged} acknowledged before and {begun} \
             begun in all",
            services.len()
        );
        Ok(())
    }
}

pub(crate) fn disks_hold_what_was_acknowledged(lab: &Lab) -> Result<()> {
    let promoted = Promoted::all(lab)?;
    let scratch = Scratch::make()?;
    let (writes, disks) = writes::during(lab, || {
        let mut disks = Vec::new();
        refuses_to_be_read(lab.manager(), &scratch)?;
        for round in 0..ROUNDS {
            for node in leader_and_another(lab, round)? {
                disks.push(copied(node, &scratch)?);
                std::thread::sleep(BETWEEN_COPIES);
            }
        }
        for node in leader_and_another(lab, ROUNDS)? {
            disks.push(killed(lab, node, &scratch)?);
        }
        Ok(disks)
    })?;
    for disk in &disks {
        disk.check(&writes)?;
    }
    figure!("{} writes, of which {} disks held all that were acknowledged", writes.len(), disks.len());
    writes::settle(lab, &writes)?;
    drop(promoted);
    Ok(())
}

/// The leader, and the others in turn.
fn leader_and_another(lab: &Lab, round: usize) -> Result<[&Node; 2]> {
    let leader = managers::leader(lab)?;
    let mut others = lab.nodes.iter().filter(|node| *node != leader).cycle().skip(round);
    Ok([leader, others.next().context("a manager alone")?])
}

/// Waits until a manager has on its disk all that anybody was told of: it answers once it has applied that. Gives the time until
/// which.
fn until_caught_up(node: &Node) -> Result<Instant> {
    until(&format!("{node} answers"), CHANGED, || {
        let began = Instant::now();
        Ok(engine::get(node, "/services").is_ok().then_some(began))
    })
}

/// A copy of the state folder at one moment of a manager's run, as a file system's snapshot has it. (One that is made file by file
/// under writes is of no moment: the log's engine writes over what it has freed.)
fn copied(node: &Node, scratch: &Scratch) -> Result<Disk> {
    let began = until_caught_up(node)?;
    let copy = scratch.path("copy");
    let still = Still::agent(node)?;
    lab::output(Command::new("cp").arg("-r").arg(node.state_dir()).arg(&copy))?;
    let ended = Instant::now();
    drop(still);
    let disk = read(format!("a copy of {node}'s"), &copy, [began, ended], scratch)?;
    fs::remove_dir_all(copy)?;
    Ok(disk)
}

/// The state folder itself of a manager that was killed.
fn killed(lab: &Lab, node: &Node, scratch: &Scratch) -> Result<Disk> {
    let began = until_caught_up(node)?;
    lab.xtask(&["kill", &node.name])?;
    let disk = read(format!("that of {node}, killed"), &node.state_dir(), [began, Instant::now()], scratch);
    lab.xtask(&["start", &node.name])?;
    disk
}

/// Nobody reads a manager's state folder while its agent runs.
fn refuses_to_be_read(node: &Node, scratch: &Scratch) -> Result<()> {
    let refused = offline(&node.state_dir(), scratch).err();
    let refused = refused.context("read while the agent runs")?.to_string();
    ensure!(refused.contains("belongs to a running agent"), "{refused}");
    Ok(())
}

/// `shoal backup --offline` from a state folder.
fn offline(state_dir: &Path, scratch: &Scratch) -> Result<Backup> {
    let file = scratch.path("disk.shoal");
    let mut backup = Command::new(BINARY);
    backup.args(["backup", "--offline", "--force", "--state-dir"]).arg(state_dir).arg(&file);
    lab::output(&mut backup)?;
    Ok(Backup::read(&fs::read(&file)?)?)
}

fn read(what: String, state_dir: &Path, [began, ended]: [Instant; 2], scratch: &Scratch) -> Result<Disk> {
    let Backup { state, .. } = offline(state_dir, scratch).with_context(|| what.clone())?;
    let services = state.services.values().map(|service| service.spec.name.clone()).collect();
    Ok(Disk { what, began, ended, services })
}
