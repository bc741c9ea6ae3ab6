//! What a path tells those who use it: echoes, hops, and how large a packet it carries.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_agent::dataplane::Counter;

use crate::client;
use crate::engine::Task;
use crate::figure;
use crate::lab::{self, Lab, as_client, command_in, on_client};
use crate::mesh::{SINK, python};
use crate::undo::Undo;
use crate::ways::{self, Family, Way};

/// For the one task, on the first node: dialled there it is local, elsewhere remote.
const ON_N1: [&str; 2] = ["--constraint", "node.hostname==n1"];
/// What the narrowed path carries, bytes.
const NARROW: &str = "1400";
const BULK_BYTES: usize = 3_000_000;
/// How long a transfer may stand still when the path narrows: the sender tries again at ever longer intervals, and finds
/// out at the first one after the nodes have.
const STALL_MAX: Duration = Duration::from_secs(8);
/// What a path is said to carry of which nothing is known, bytes.
const LARGE: u32 = 65_535;
/// A datagram that no path here carries in one packet, bytes; how often it is tried, and how long each time.
const DATAGRAM: usize = 8000;
const TRIES: usize = 8;
const PATIENCE: Duration = Duration::from_secs(1);
/// What a narrower link of the client carries, bytes; and a datagram that it carries, whose answer it doesn't and a task's link
/// does.
const CLIENTS_LINK: u32 = 1300;
const WITHIN: usize = 1250;
/// The largest segments that the client asks for all the same, bytes.
const PROMISED: &str = "1380";

pub(crate) fn nodes_answer_ping_beside_their_published_ports(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 1, &ON_N1)?;
    for family in Family::ALL {
        for node in &lab.nodes {
            for size in ["56", "2000"] {
                let target = family.of(node).to_string();
                let mut command = on_client("ping");
                command.args([family.flag(), "-c", "2", "-i", "0.1", "-W", "2", "-s", size, &target]);
                let printed = lab::output(&mut command)?;
                ensure!(printed.contains(" 2 received"), "{printed}");
            }
        }
        figure!("{family}: every node answers pings of 56 and of 2000 bytes");
    }
    Ok(())
}

/// The path MTU that a host, or a task's namespace, has for an address, bytes; [`LARGE`] if it knows of none.
pub(crate) fn path_mtu(mut ip: Command, to: IpAddr) -> Result<u32> {
    let shown = lab::output(ip.args(["route", "get", &to.to_string()]))?;
    let mut words = shown.split_whitespace().skip_while(|word| *word != "mtu").skip(1);
    let mtu = words.find(|word| *word != "lock");
    mtu.map_or(Ok(LARGE), |mtu| mtu.parse().with_context(|| shown.clone()))
}

/// The last hop that a trace prints is the one that it was for.
fn trace(way: Way, to: SocketAddr, program: &str, options: &[&str]) -> Result<()> {
    let mut command = on_client("timeout");
    command.args(["15", program, way.family.flag(), "-n"]).args(options);
    let port = to.port().to_string();
    command.args(["-p", &port, &to.ip().to_string()]);
    let printed = lab::output(&mut command)?;
    let what = format!("{program} {} by {to} ({way})", options.join(" "));
    let hops: Vec<&str> = printed.lines().skip(usize::from(program == "traceroute")).map(str::trim).collect();
    let arrived = match program {
        "traceroute" => hops.last().is_some_and(|hop| hop.split(' ').any(|word| word == to.ip().to_string())),
        // The service answers a datagram itself.
        _ => (printed.contains("reached") || printed.contains("reply received")) && printed.contains("pmtu "),
    };
    figure!("{what}: {}", hops.last().copied().unwrap_or_default());
    ensure!(arrived, "{what}:\n{printed}");
    Ok(())
}

pub(crate) fn traces_arrive_on_every_way(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 1, &ON_N1)?;
    for way in Way::all() {
        for node in &lab.nodes[..2] {
            let to = way.to(node);
            let brief = ["-q", "1", "-w", "2", "-m", "6"];
            trace(way, to, "traceroute", &[&["-T"], &brief[..]].concat())?;
            trace(way, to, "traceroute", &[&["-U"], &brief[..]].concat())?;
            trace(way, to, "tracepath", &["-m", "6"])?;
        }
    }
    Ok(())
}

/// `ip` in the namespace of a host, and what undoes it.
fn change(host: &str, change: &str, back: &str) -> Result<Undo> {
    let ip = |words: &str| {
        let mut command = command_in(host, "ip");
        command.args(words.split(' '));
        command
    };
    lab::output(&mut ip(change))?;
    Ok(Undo::new(ip(back)))
}

/// Narrows the links of all nodes. The client comes to them by the router then, which knows of it.
fn narrow_nodes(lab: &Lab) -> Result<Vec<Undo>> {
    let mut undo = Vec::new();
    for node in &lab.nodes {
        for (host, link) in [(node.name.as_str(), "eth0"), ("sw", node.name.as_str())] {
            let link = format!("link set {link} mtu");
            undo.push(change(host, &format!("{link} {NARROW}"), &format!("{link} 1500"))?);
        }
        for (family, router) in [(Family::V4, "198.18.0.1"), (Family::V6, "fd00:c6::1")] {
            let (flag, address) = (family.flag(), family.of(node));
            let gone = format!("{flag} route del {address}");
            let route = format!("{flag} route add {address}");
            undo.push(change("sw", &format!("{route} dev br0 mtu {NARROW}"), &gone)?);
            undo.push(change("client", &format!("{route} via {router}"), &gone)?);
        }
    }
    Ok(undo)
}

/// Both ways through a router whose next link carries less than the nodes' own: it tells the tasks so.
pub(crate) fn narrow_path_to_the_client_is_found(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 1, &ON_N1)?;
    let mut undo = Vec::new();
    for family in Family::ALL {
        let prefix = if family == Family::V4 { 32 } else { 128 };
        let route = format!("{}/{prefix} via {}", family.routed_client(), family.client());
        let route = format!("{} route replace {route}", family.flag());
        undo.push(change("sw", &format!("{route} mtu {NARROW}"), &route)?);
    }
    for way in Way::all() {
        let source = SocketAddr::new(way.family.routed_client(), 0);
        for node in &lab.nodes[..2] {
            let to = way.to(node);
            as_client(|| client::download_from(source, to, BULK_BYTES, client::LIMIT))
                .with_context(|| format!("{way} by {node}"))?;
            let tries = datagram(source, to, DATAGRAM).with_context(|| format!("{way} by {node}"))?;
            figure!("{way} by {node}: {BULK_BYTES} bytes, and {DATAGRAM} in one datagram at try {tries}");
        }
        // The next way is to find out by itself.
        forget(&task_of(lab, way)?, way.family)?;
    }
    Ok(())
}

/// The one task of a way's service.
fn task_of(lab: &Lab, way: Way) -> Result<Task> {
    crate::engine::running(lab, &way.back.to_string())?.pop().context("no task runs")
}

/// Has a task forget what it knows of paths.
fn forget(task: &Task, family: Family) -> Result<()> {
    lab::output(task.command("ip").args([family.flag(), "route", "flush", "cache"])).map(drop)
}

/// Narrows the client's link. The nodes' routes say so, and nothing else does: no router is on the way.
fn narrow_client(lab: &Lab) -> Result<Vec<Undo>> {
    let narrow = format!("link set eth0 mtu {CLIENTS_LINK}");
    let mut undo = vec![change("client", &narrow, "link set eth0 mtu 1500")?];
    for node in &lab.nodes {
        for family in Family::ALL {
            let route = |to: IpAddr| format!("{} route add {to} dev eth0", family.flag());
            let gone = |to: IpAddr| format!("{} route del {to}", family.flag());
            let (client, address) = (family.client(), family.of(node));
            let narrow = format!("{} mtu lock {CLIENTS_LINK}", route(client));
            undo.push(change(&node.name, &narrow, &gone(client))?);
            undo.push(change("client", &format!("{} advmss {PROMISED}", route(address)), &gone(address))?);
        }
    }
    Ok(undo)
}

/// Tasks' links carry more than the last link to the client does: the node that sends the replies there tells them.
pub(crate) fn narrower_link_to_the_client_is_told_to_tasks(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 1, &ON_N1)?;
    let _narrow = narrow_client(lab)?;
    for way in Way::all() {
        let task = task_of(lab, way)?;
        for node in &lab.nodes[..2] {
            let to = way.to(node);
            let told = || lab.nodes.iter().map(|node| node.count(Counter::TooBigSent)).sum::<Result<u64>>();
            let mut counts = vec![told()?];
            let tries =
                datagram(client::anywhere(to), to, WITHIN).with_context(|| format!("{way} by {node}"))?;
            counts.push(told()?);
            let known = path_mtu(task.command("ip"), way.family.client())?;
            ensure!(known == CLIENTS_LINK, "{way} by {node}: the task believes in {known} bytes");
            let in_pieces = datagram(client::anywhere(to), to, DATAGRAM);
            let in_pieces = in_pieces.with_context(|| format!("{way} by {node}"))?;
            forget(&task, way.family)?;
            as_client(|| client::download(to, BULK_BYTES)).with_context(|| format!("{way} by {node}"))?;
            counts.push(told()?);
            forget(&task, way.family)?;
            let told: Vec<u64> = counts.windows(2).map(|pair| pair[1] - pair[0]).collect();
            figure!(
                "{way} by {node}: a datagram of {WITHIN} bytes and more back at try {tries}, {DATAGRAM} at try {in_pieces}; \
                 {BULK_BYTES} bytes; answers and segments refused as too big: {told:?}"
            );
            ensure!(told.iter().all(|times| *times > 0), "{way} by {node}: nothing was too big");
        }
    }
    Ok(())
}

/// Sends a large datagram and waits for it to come back. Each of the router, the ingress and the task's node may have to
/// tell that its next link is too narrow before one arrives and comes back.
fn datagram(source: SocketAddr, to: SocketAddr, len: usize) -> Result<usize> {
    let payload: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
    let mut last = None;
    for attempt in 1..=TRIES {
        match as_client(|| client::udp_within(source, to, &payload, PATIENCE)) {
            Ok(_) => return Ok(attempt),
            Err(error) => last = Some(error),
        }
    }
    Err(last.context("no attempt")?.context(format!("a datagram of {len} bytes")))
}

/// The path between the nodes narrows under a running transfer.
pub(crate) fn narrower_underlay_is_found_at_run_time(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 1, &ON_N1)?;
    let (task, ingress) = (&lab.nodes[0], &lab.nodes[1]);
    for way in Way::all() {
        let to = way.to(ingress);
        let started = Instant::now();
        let undo = std::thread::scope(|scope| {
            let transfer = scope.spawn(|| {
                let source = client::anywhere(to);
                as_client(|| client::download_from(source, to, 60_000_000, STALL_MAX))
            });
            std::thread::sleep(Duration::from_millis(50));
            let undo = narrow_nodes(lab)?;
            transfer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            anyhow::Ok(undo)
        })
        .with_context(|| way.to_string())?;
        let whole = started.elapsed().as_secs_f32();
        // The next hop is asked for once a second.
        std::thread::sleep(Duration::from_millis(1100));
        let refused = ingress.count(Counter::TooBigSent)? + task.count(Counter::TooBigSent)?;
        as_client(|| client::download(to, BULK_BYTES)).with_context(|| format!("{way}: a download"))?;
        let tries = datagram(client::anywhere(to), to, DATAGRAM).with_context(|| way.to_string())?;
        let refused = ingress.count(Counter::TooBigSent)? + task.count(Counter::TooBigSent)? - refused;
        figure!(
            "{way}: the transfer went on ({whole:.1} s); then {BULK_BYTES} bytes, {refused} packets refused as too big, \
             a datagram of {DATAGRAM} at try {tries}"
        );
        drop(undo);
        std::thread::sleep(Duration::from_millis(1100));
    }
    Ok(())
}

/// Has tasks tell clients that segments may be as large as those of an ordinary link.
fn promise(tasks: &[Task]) -> Result<()> {
    for task in tasks {
        for (family, promise) in [(Family::V4, "1460"), (Family::V6, "1440")] {
            let shown = lab::output(task.command("ip").args([family.flag(), "route", "show", "default"]))?;
            let route = shown.lines().next().context("no default route")?;
            let mut command = task.command("ip");
            command.args([family.flag(), "route", "replace"]).args(route.split_whitespace());
            lab::output(command.args(["advmss", promise]))?;
        }
    }
    Ok(())
}

/// A task that promises more than the way to it carries: its client's segments don't fit the encapsulation.
pub(crate) fn segments_that_do_not_fit_are_refused_and_sent_anew(lab: &Lab) -> Result<()> {
    let tasks = ways::create(lab, 1, 80, &ON_N1, &["shoal/exec", &python()?, "-c", SINK])?;
    let ingress = &lab.nodes[1];
    for way in Way::all() {
        let to = way.to(ingress);
        lab::until(&format!("{to} answers"), Duration::from_secs(10), || {
            Ok(as_client(|| client::upload(to, 0)).ok())
        })?;
        promise(&tasks)?;
        // What the client's host remembers of the path it is to find out anew.
        lab::output(on_client("ip").args([way.family.flag(), "route", "flush", "cache"]))?;
        let mut counts = Vec::new();
        let mut undo = None;
        for narrow in [false, true] {
            if narrow {
                undo = Some(narrow_nodes(lab)?);
                // The next hop is asked for once a second.
                std::thread::sleep(Duration::from_millis(1100));
            }
            let before = ingress.count(Counter::TooBigSent)?;
            let got = as_client(|| client::upload(to, BULK_BYTES)).with_context(|| way.to_string())?;
            ensure!(got == BULK_BYTES.to_string(), "{way}: {got}");
            counts.push(ingress.count(Counter::TooBigSent)? - before);
            // Once narrowed, the client may have been told before its first large segment.
            ensure!(narrow || counts.last() > Some(&0), "{way}: nothing was too big");
        }
        figure!("{way}: {BULK_BYTES} bytes up by {ingress}, segments refused as too big: {counts:?}");
        drop(undo);
        std::thread::sleep(Duration::from_millis(1100));
    }
    Ok(())
}
