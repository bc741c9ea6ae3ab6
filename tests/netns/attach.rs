//! What runs on a node without Shoal, attached to a network by `shoal attach`.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::curl::{self, curl_within};
use crate::engine::{self, Task};
use crate::figure;
use crate::lab::{self, BINARY, Lab, Node, until};
use crate::overlay::{create_idle, create_network};

/// For what is expected to fail: how long it is tried, s.
const PATIENCE_S: u8 = 1;
/// How long the nodes may take to know of a change.
const LIMIT: Duration = Duration::from_secs(10);

/// A web server on port 80 in a network namespace of its own, which nothing of the lab's knows of.
struct Foreign(Child);

impl Foreign {
    fn start() -> Result<Self> {
        let mut server = Command::new("unshare");
        server.args(["--net", "python3", "-m", "http.server", "80"]);
        let child = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let foreign = Self(child);
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net"));
        until("the server listens", LIMIT, || {
            // Before it has left this one, it is asked about in here.
            if namespace(&foreign.pid())? == namespace("self")? {
                return Ok(None);
            }
            let mut listening = foreign.command("ss");
            listening.args(["--no-header", "--listening", "--tcp", "sport = :80"]);
            Ok((lab::output(&mut listening)?.lines().count() == 1).then_some(()))
        })?;
        Ok(foreign)
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }

    /// A program in its network namespace.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.0.id())).arg("--").arg(program);
        command
    }

    fn end(&mut self) -> Result<()> {
        self.0.kill()?;
        ensure!(self.0.wait()?.signal() == Some(9), "the server ended by itself");
        Ok(())
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // After `end` it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A network namespace that `ip netns` knows.
struct Named(&'static str);

impl Named {
    fn new(name: &'static str) -> Result<Self> {
        lab::output(Command::new("ip").args(["netns", "add", name]))?;
        Ok(Self(name))
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(self.0)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        // A case may have deleted it.
        let _ = Command::new("ip").args(["netns", "delete", self.0]).stderr(Stdio::null()).status();
    }
}

/// `shoal VERB` for a node.
fn shoal(node: &Node, verb: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.arg(verb).arg("--run-dir").arg(node.run_dir()).args(arguments);
    command
}

/// Attaches, and gives what the agent says of it.
fn attach(node: &Node, arguments: &[&str]) -> Result<Value> {
    let printed = lab::output(shoal(node, "attach", arguments).arg("--json"))?;
    serde_json::from_str(&printed).context(printed)
}

fn attachments(node: &Node) -> Result<Vec<Value>> {
    let printed = lab::output(&mut shoal(node, "attachments", &["--json"]))?;
    serde_json::from_str(&printed).context(printed)
}

/// The IPv4 address of an attachment.
fn address(attachment: &Value) -> Result<Ipv4Addr> {
    let text = attachment["Addresses"][0].as_str().and_then(|text| text.split('/').next());
    text.and_then(|text| text.parse().ok()).with_context(|| attachment.to_string())
}

/// How many endpoints and services each node's maps hold.
fn in_maps(lab: &Lab) -> Result<Vec<Value>> {
    let counts = |node: &Node| {
        let folder = node.run_dir();
        let mut status = node.command(BINARY);
        status.args(["status", "--json", "--bpffs"]).arg(folder.join("bpf"));
        let status: Value =
            serde_json::from_str(&lab::output(status.arg("--state-dir").arg(folder.join("state")))?)?;
        let counts = &status["dataplane"]["counts"];
        Ok(Value::from(vec![counts["endpoints"].clone(), counts["services"].clone()]))
    };
    lab.nodes.iter().map(counts).collect()
}

fn resolve(task: &Task, name: &str) -> Result<BTreeSet<Ipv4Addr>> {
    let printed = lab::output(task.command("dig").args(["+short", "+time=2", "+tries=2", name, "A"]))?;
    printed.lines().map(|line| line.parse().with_context(|| format!("dig {name}: {line}"))).collect()
}

/// Fetches a page.
fn fetch(program: Command, url: &str) -> Result<()> {
    lab::output(curl_within(program, PATIENCE_S).args(["--output", "/dev/null", url])).map(drop)
}

pub(crate) fn process_is_on_its_network_until_it_ends(lab: &Lab) -> Result<()> {
    let node = lab.node("n2")?;
    create_network(lab, "blue", &["--attachable"])?;
    create_network(lab, "red", &["--attachable"])?;
    engine::create(lab, "web", 3, &["--replicas", "3", "--network", "blue", "shoal/whoami"])?;
    let mut callers = Vec::new();
    for other in &lab.nodes {
        let place = format!("node.hostname=={other}");
        let name = format!("caller-{other}");
        callers.push(create_idle(lab, &name, &["--network", "blue", "--constraint", &place])?);
    }
    let stranger = create_idle(lab, "stranger", &["--network", "red"])?;
    let before = in_maps(lab)?;

    let mut foreign = Foreign::start()?;
    let started = Instant::now();
    let arguments = ["--network", "blue", "--name", "db", "--alias", "store", "--pid", &foreign.pid()];
    let made = attach(node, &arguments)?;
    figure!("attached within {} ms: {made}", started.elapsed().as_millis());
    let addr = address(&made)?;
    let link = format!("sh{:.10}", made["ID"].as_str().context("no id")?);
    // Every node knows it by then.
    for caller in &callers {
        for name in ["db", "store", "db.blue", "tasks.db"] {
            let found = resolve(caller, name)?;
            ensure!(found == BTreeSet::from([addr]), "{name} on {} is {found:?}", caller.node);
        }
        for url in ["http://db/".to_owned(), format!("http://{addr}/")] {
            fetch(caller.command("curl"), &url).with_context(|| format!("from {}", caller.node))?;
        }
        let named = lab::output(caller.command("dig").args(["+short", "-x", &addr.to_string()]))?;
        ensure!(named.trim() == "db.blue.", "{addr} is called {named}");
    }
    // It reaches a VIP with every task behind it, and tasks by their names, which it asks its gateway for.
    let vip = engine::vips(lab, "web")?[0];
    let answered = curl::answering(foreign.command("curl"), &format!("http://{vip}/"), 60)?;
    let distinct: BTreeSet<&String> = answered.iter().collect();
    ensure!(distinct.len() == 3, "{distinct:?}");
    let server = made["NameServer"].as_str().context("no name server")?;
    for (name, expected) in [("web", vip), ("caller-n3", engine::vips(lab, "caller-n3")?[0])] {
        let found = lab::output(foreign.command("dig").args(["+short", &format!("@{server}"), name]))?;
        ensure!(found.trim() == expected.to_string(), "{name} is {found}");
    }
    for caller in &callers {
        let to = caller.address()?.to_string();
        let ping = lab::output(foreign.command("ping").args(["-c", "2", "-i", "0.2", "-W", "2", &to]))?;
        ensure!(ping.contains(" 2 received"), "{ping}");
    }
    // Another network's tasks don't reach it, nor it them.
    ensure!(resolve(&stranger, "db")?.is_empty(), "a name of another network");
    let reached = fetch(stranger.command("curl"), &format!("http://{addr}/"));
    ensure!(reached.is_err(), "reached from another network");
    let to = stranger.address()?.to_string();
    ensure!(
        !foreign.command("ping").args(["-c", "1", "-W", "1", &to]).stdout(Stdio::null()).status()?.success()
    );

    // Its agent may be killed: it goes on meanwhile, and the next one takes it on.
    lab.xtask(&["kill", &node.name])?;
    fetch(callers[0].command("curl"), &format!("http://{addr}/")).context("without its agent")?;
    // The killed one's last thread may hold its folder for a moment.
    until("another agent starts", LIMIT, || Ok(lab.xtask(&["start", &node.name]).ok()))?;
    lab.until_ready(lab.nodes.len())?;
    ensure!(attachments(node)? == [made], "{:?}", attachments(node)?);
    fetch(callers[2].command("curl"), "http://db/").context("with another agent")?;

    foreign.end()?;
    until("it is gone from its node", LIMIT, || Ok(attachments(node)?.is_empty().then_some(())))?;
    for caller in &callers {
        // What nothing is called is asked of the host's own servers, which a lab does not reach; this is nobody else's.
        until("its name is gone", LIMIT, || Ok(resolve(caller, "tasks.db")?.is_empty().then_some(())))?;
    }
    until("it is gone from the maps", LIMIT, || Ok((in_maps(lab)? == before).then_some(())))?;
    let links = lab::output(node.command("ip").args(["-oneline", "link", "show", "type", "veth"]))?;
    ensure!(!links.contains(&link), "{links}");
    Ok(())
}

pub(crate) fn namespaces_and_programs_are_attached_and_refusals_say_why(lab: &Lab) -> Result<()> {
    let node = lab.node("n2")?;
    create_network(lab, "blue", &["--attachable", "--subnet", "10.77.0.0/24"])?;
    create_network(lab, "closed", &[])?;
    engine::create(lab, "web", 1, &["--network", "blue", "shoal/whoami"])?;
    let named = Named::new("att-named")?;
    let path = named.path().display().to_string();
    let made = attach(node, &["--network", "blue", "--name", "box", "--ip", "10.77.0.99", "--netns", &path])?;
    ensure!(address(&made)? == Ipv4Addr::new(10, 77, 0, 99) && made["Interface"] == "eth0", "{made}");
    let tasks =
        curl::answering(named.command("curl"), &format!("http://{}/", engine::vips(lab, "web")?[0]), 3)?;
    ensure!(tasks.len() == 3);
    for (arguments, part) in [
        (&["--network", "nowhere", "--netns", &path][..], "network: there is no network nowhere"),
        (&["--network", "closed", "--netns", &path], "network: closed is not attachable"),
        (&["--network", "ingress", "--netns", &path], "network: ingress is not attachable"),
        (&["--network", "blue", "--name", "box", "--netns", &path], "name: another attachment"),
        (&["--network", "blue", "--name", "web", "--netns", &path], "name: a service on network blue"),
        (&["--network", "blue", "--ip", "10.77.0.99", "--netns", &path], "ip: 10.77.0.99 is another's"),
        (
            &["--network", "blue", "--ip", "10.78.0.9", "--netns", &path],
            "ip: 10.78.0.9 is not in network blue",
        ),
        (&["--network", "blue", "--interface", "eth0", "--netns", &path], "interface: "),
        (&["--network", "blue", "--netns", "/run/netns/att-missing"], "netns: there is no file"),
        (
            &["--network", "blue", "--netns", "/run/netns/shoal-n2"],
            "netns: /run/netns/shoal-n2 is the node's own",
        ),
        (&["--network", "blue", "--pid", "4194304"], "pid: there is no process"),
    ] {
        let ended = shoal(node, "attach", arguments).output()?;
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure!(!ended.status.success() && said.contains(part), "{arguments:?}: {said}");
    }
    // A program gets the network's names as well, and leaves nothing.
    let run = ["--network", "blue", "--", "curl", "--silent", "--max-time", "3", "http://web/"];
    let page = lab::output(&mut shoal(node, "attach", &run))?;
    ensure!(page.contains("task: web.1."), "{page}");
    until("the program's attachment is gone", LIMIT, || Ok((attachments(node)?.len() == 1).then_some(())))?;

    lab::output(&mut shoal(node, "detach", &["box"]))?;
    ensure!(attachments(node)?.is_empty());
    let links = lab::output(named.command("ip").args(["-oneline", "link"]))?;
    ensure!(!links.contains("eth0"), "{links}");
    // Once the nodes have forgotten it, the address is free for another.
    until("the address can be had again", LIMIT, || {
        let again = ["--network", "blue", "--name", "box", "--ip", "10.77.0.99", "--netns", &path];
        Ok(shoal(node, "attach", &again).output()?.status.success().then_some(()))
    })?;
    // It goes with its namespace.
    drop(named);
    until("it went with its namespace", LIMIT, || Ok(attachments(node)?.is_empty().then_some(())))
}
