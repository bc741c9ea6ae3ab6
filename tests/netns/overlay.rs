//! Overlay networks, from inside tasks.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::client;
use crate::curl::{self, curl_within};
use crate::engine::{self, Task};
use crate::figure;
use crate::iperf3;
use crate::lab::{self, CLIENT, Lab, on_client, until};
use crate::ways::Family;

/// For what is expected to fail: how long a task tries, s.
const PATIENCE_S: u8 = 1;
/// What makes a network an encrypted one.
pub(crate) const ENCRYPTED: &[&str] = &["--opt", "encrypted"];

pub(crate) fn create_network(lab: &Lab, name: &str, arguments: &[&str]) -> Result<()> {
    let create = ["network", "create", "--driver", "overlay"];
    engine::docker_ok(lab.manager(), &[&create[..], arguments, &[name]].concat()).map(drop)
}

/// `web` with three replicas on the network `blue`.
fn create_web(lab: &Lab) -> Result<Vec<Task>> {
    create_network(lab, "blue", &[])?;
    engine::create(lab, "web", 3, &["--replicas", "3", "--network", "blue", "shoal/whoami"])
}

/// A task that does nothing by itself.
pub(crate) fn create_idle(lab: &Lab, name: &str, arguments: &[&str]) -> Result<Task> {
    let idle = ["shoal/exec", "sleep", "1000000"];
    let tasks = engine::create(lab, name, 1, &[arguments, &idle].concat())?;
    tasks.into_iter().next().context("no task")
}

/// What a name resolves to, inside a task.
fn resolve(task: &Task, name: &str) -> Result<BTreeSet<Ipv4Addr>> {
    let printed = lab::output(task.command("dig").args(["+short", "+time=2", "+tries=2", name, "A"]))?;
    printed.lines().map(|line| line.parse().with_context(|| format!("dig {name}: {line}"))).collect()
}

/// The tasks that answered so many requests from inside `task`.
fn fetch(task: &Task, url: &str, count: usize) -> Result<Vec<String>> {
    curl::answering(task.command("curl"), url, count)
}

pub(crate) fn names_resolve_to_the_vip_and_to_the_tasks(lab: &Lab) -> Result<()> {
    let web = create_web(lab)?;
    let caller = create_idle(lab, "caller", &["--network", "blue"])?;
    let vips: BTreeSet<Ipv4Addr> = engine::vips(lab, "web")?.into_iter().collect();
    ensure!(vips.len() == 1, "{vips:?}");
    ensure!(resolve(&caller, "web")? == vips, "web is {:?}, its VIP {vips:?}", resolve(&caller, "web")?);
    let addresses: BTreeSet<Ipv4Addr> = web.iter().map(Task::address).collect::<Result<_>>()?;
    let found = until("tasks.web is complete", Duration::from_secs(5), || {
        let found = resolve(&caller, "tasks.web")?;
        Ok((found == addresses).then_some(found))
    })?;
    figure!("web is {vips:?}; tasks.web is {found:?}");
    // What no service is called is asked of the host's own servers, which a lab does not reach.
    let missing =
        lab::output(caller.command("dig").args(["+time=3", "+tries=1", "tasks.nosuchservice", "A"]))?;
    ensure!(missing.contains("ANSWER: 0"), "{missing}");
    Ok(())
}

pub(crate) fn service_name_leads_to_every_task(lab: &Lab) -> Result<()> {
    create_web(lab)?;
    let caller = create_idle(lab, "caller", &["--network", "blue"])?;
    let tasks = fetch(&caller, "http://web/", 300)?;
    let (shares, spread) = client::shares(tasks.iter().map(String::as_str));
    figure!("300 requests to http://web/: {shares:?}, {spread} % apart");
    ensure!(shares.len() == 3, "{shares:?}");
    Ok(())
}

pub(crate) fn task_reaches_every_task_of_its_service_itself_included(lab: &Lab) -> Result<()> {
    let web = create_web(lab)?;
    for task in &web {
        let tasks = fetch(task, "http://web/", 60)?;
        let (shares, _) = client::shares(tasks.iter().map(String::as_str));
        ensure!(shares.len() == 3, "from web.{}: {shares:?}", task.slot);
        ensure!(shares.contains_key(&format!("web.{}", task.slot)), "not itself: {shares:?}");
    }
    Ok(())
}

pub(crate) fn vip_and_gateway_answer_ping(lab: &Lab) -> Result<()> {
    let web = create_web(lab)?;
    let caller = create_idle(lab, "caller", &["--network", "blue"])?;
    let vip = engine::vips(lab, "web")?[0];
    let mut targets = vec![vip];
    targets.extend(web.iter().map(Task::address).collect::<Result<Vec<_>>>()?);
    for target in targets {
        let ping = lab::output(caller.command("ping").args([
            "-c",
            "2",
            "-i",
            "0.2",
            "-W",
            "2",
            &target.to_string(),
        ]))?;
        ensure!(ping.contains(" 2 received"), "{ping}");
    }
    let routes = lab::output(caller.command("ip").args(["route", "show", "default"]))?;
    let gateway = routes.split_whitespace().nth(2).context("no default route")?;
    let ping = lab::output(caller.command("ping").args(["-c", "1", "-W", "2", gateway]))?;
    ensure!(ping.contains(" 1 received"), "{ping}");
    Ok(())
}

pub(crate) fn big_transfers_between_tasks_on_different_nodes(lab: &Lab) -> Result<()> {
    create_network(lab, "blue", &[])?;
    iperf3::serve(lab, "blue", "n1")?;
    for (name, node) in [("same", "node.hostname==n1"), ("other", "node.hostname==n2")] {
        let caller = create_idle(lab, name, &["--network", "blue", "--constraint", node])?;
        iperf3::until_served(&caller, Family::V4)?;
        for (direction, flags) in [("to", &[][..]), ("from", &["-R"])] {
            let report = iperf3::ask(&caller, Family::V4, &[&["-t", "1"], flags].concat())?;
            let megabits = iperf3::megabits(&report)?;
            figure!("{name} node, {direction} the server: {megabits:.0} Mbit/s");
            ensure!(megabits > 50.0, "{report}");
        }
    }
    Ok(())
}

pub(crate) fn networks_are_kept_apart(lab: &Lab) -> Result<()> {
    let web = create_web(lab)?;
    create_network(lab, "red", &[])?;
    let stranger = create_idle(lab, "stranger", &["--network", "red"])?;
    let missing = lab::output(stranger.command("dig").args(["+time=3", "+tries=1", "web", "A"]))?;
    ensure!(missing.contains("ANSWER: 0"), "a name of another network: {missing}");
    let mut targets = vec![engine::vips(lab, "web")?[0]];
    targets.extend(web.iter().map(Task::address).collect::<Result<Vec<_>>>()?);
    for target in targets {
        let url = format!("http://{target}/");
        let reached = lab::output(curl_within(stranger.command("curl"), PATIENCE_S).arg(&url));
        ensure!(reached.is_err(), "{url} was reached from another network");
    }
    // In both networks, both are reached.
    create_idle(lab, "both", &["--network", "red", "--network", "blue"])?;
    let both = engine::running(lab, "both")?;
    fetch(&both[0], "http://web/", 6).map(drop)
}

pub(crate) fn tasks_reach_the_outside_under_their_nodes_address(lab: &Lab) -> Result<()> {
    create_network(lab, "blue", &[])?;
    create_network(lab, "locked", &["--internal"])?;
    let free = create_idle(lab, "free", &["--network", "blue"])?;
    let locked = create_idle(lab, "locked", &["--network", "locked"])?;
    let mut server = Server::start()?;
    let url = format!("http://{CLIENT}:{}/", Server::PORT);
    let fetch = |task: &Task, seconds| lab::output(curl_within(task.command("curl"), seconds).arg(&url));
    until("the client's server answers", Duration::from_secs(10), || Ok(fetch(&free, 2).ok()))?;
    let seen = fetch(&free, 5)?;
    figure!("a task on {} is seen by the outside as {}", free.node, seen.trim());
    ensure!(seen.trim() == free.node.address.to_string(), "seen as {seen:?}");
    ensure!(fetch(&locked, PATIENCE_S).is_err(), "a task of an internal network got out");
    server.stop()
}

/// An HTTP server outside the swarm, that answers with the address it was asked from.
struct Server {
    python: std::process::Child,
}

impl Server {
    const PORT: u16 = 8000;
    const SCRIPT: &str = "
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.client_address[0].encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(('', int(sys.argv[1])), Handler).serve_forever()
";

    fn start() -> Result<Self> {
        let mut python = on_client("python3");
        python.args(["-c", Self::SCRIPT, &Self::PORT.to_string()]).stderr(Stdio::null());
        Ok(Self { python: python.spawn().context("could not start python3")? })
    }

    fn stop(&mut self) -> Result<()> {
        self.python.kill()?;
        self.python.wait()?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After `stop` it has ended already.
        let _ = self.stop();
    }
}

pub(crate) fn names_resolve_by_udp_and_tcp(lab: &Lab) -> Result<()> {
    create_web(lab)?;
    let caller = create_idle(lab, "caller", &["--network", "blue"])?;
    // By TCP as well: long answers need it.
    for options in [&["+notcp"][..], &["+tcp"]] {
        let printed =
            lab::output(caller.command("dig").args(options).args(["+short", "+time=2", "web", "A"]))?;
        ensure!(printed.trim() == engine::vips(lab, "web")?[0].to_string(), "{printed}");
    }
    let resolv = lab::output(caller.command("cat").arg("/etc/resolv.conf"))?;
    ensure!(resolv.contains("ndots:0"), "{resolv}");
    Ok(())
}
