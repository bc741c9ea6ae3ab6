//! Networks that are encrypted between nodes: what the underlay sees of them, and what comes without encryption.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etherparse::PacketBuilder;
use mesh_agent::dataplane::Counter;
use mesh_common::addr::{backend_mac, mac_of};
use mesh_common::be::Be32;
use mesh_common::vxlan::VNI_MESH_REQUEST;

use crate::capture::Capture;
use crate::client;
use crate::curl;
use crate::engine::{self, Task};
use crate::figure;
use crate::intruders::backends;
use crate::lab::{self, BINARY, Lab, Node, as_client, until, within};
use crate::mesh::{PORT, any};
use crate::overlay::{create_idle, create_network};
use crate::raw::Sender;
use crate::wire::{Wire, holds};

/// How long the underlay is listened to, s; the variable of the environment that says otherwise.
const LISTEN_S: u64 = 12;
const LISTEN_S_BY: &str = "SHOAL_ENCRYPTED_S";
/// Frames of a kind.
const FRAMES: u64 = 50;
/// What forged frames carry.
const MARK: &[u8] = b"shoal: in cleartext";
/// How long a node may take until its keys are changed: 10 s are for what is on its way.
const CHANGED_LIMIT: Duration = Duration::from_secs(30);

/// An encrypted network, `web` on every node of the lab, published, and a task that does nothing.
fn create(lab: &Lab, options: &[&str]) -> Result<(Vec<Task>, Task)> {
    create_network(lab, "ledger", &[&["--ipv6"], options].concat())?;
    let published = format!("{PORT}:80");
    let arguments = ["--mode", "global", "--network", "ledger", "--publish", &published, "shoal/whoami"];
    let web = engine::create(lab, "web", lab.nodes.len(), &arguments)?;
    let caller = create_idle(lab, "caller", &["--network", "ledger", "--constraint", "node.hostname==n1"])?;
    Ok((web, caller))
}

/// Has every node replace its key, and waits until they have.
fn rotate(lab: &Lab) -> Result<()> {
    let before = lab.nodes.iter().map(addresses).collect::<Result<Vec<_>>>()?;
    let mut rotate = std::process::Command::new(BINARY);
    lab::output(rotate.args(["network", "rotate-keys", "--run-dir"]).arg(lab.manager().run_dir()))?;
    until("every node has one key, and another one", CHANGED_LIMIT, || {
        let now = lab.nodes.iter().map(addresses).collect::<Result<Vec<_>>>()?;
        let changed = |(before, now): (&Vec<IpAddr>, &Vec<IpAddr>)| now.len() == 1 && before != now;
        Ok(before.iter().zip(&now).all(changed).then_some(()))
    })
}

/// A node's addresses in WireGuard.
fn addresses(node: &Node) -> Result<Vec<IpAddr>> {
    let shown =
        lab::output(node.command("ip").args(["-6", "-oneline", "address", "show", "scope", "global"]))?;
    let of_wireguard = shown.lines().filter(|line| line.contains(" shoal-wg"));
    let words = of_wireguard.filter_map(|line| line.split_whitespace().nth(3)?.split('/').next());
    words.map(|word| Ok(word.parse()?)).collect()
}

/// What every node does to the others, seen by the underlay: nothing but WireGuard, whatever happens meanwhile.
pub(crate) fn underlay_sees_nothing_of_an_encrypted_network(lab: &Lab) -> Result<()> {
    let (_, caller) = create(lab, &["--opt", "encrypted"])?;
    let seconds = std::env::var(LISTEN_S_BY).ok().and_then(|text| text.parse().ok()).unwrap_or(LISTEN_S);
    let captures = lab
        .nodes
        .iter()
        .map(|node| Capture::start(node.command("tcpdump"), "eth0", &["udp", "port", "4789"]));
    let captures = captures.collect::<Result<Vec<_>>>()?;
    let over = AtomicBool::new(false);
    let (asked, answered) = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let (mut asked, mut answered) = (0, 0);
            while !over.load(Ordering::Relaxed) {
                asked += 10;
                // While a node is away, not every request is answered.
                answered +=
                    curl::answering(caller.command("curl"), "http://web/", 5).map_or(0, |all| all.len());
                let targets = lab.nodes.iter().cycle().take(5);
                for node in targets {
                    let to = SocketAddrV4::new(node.address, PORT);
                    answered += usize::from(as_client(|| client::http(any(lab::CLIENT), to, "/")).is_ok());
                }
            }
            (asked, answered)
        });
        let events = disturb(lab, Duration::from_secs(seconds));
        over.store(true, Ordering::Relaxed);
        let load = load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        events.map(|()| load)
    })?;
    let mut seen = String::new();
    for capture in captures {
        seen.push_str(&capture.finish(&[])?);
    }
    figure!(
        "{answered} of {asked} requests answered in {seconds} s and more, with keys changed, an agent killed, a node cut off"
    );
    ensure!(answered * 2 > asked, "too few answers to say anything: {answered} of {asked}");
    ensure!(seen.trim().is_empty(), "VXLAN on the underlay: {seen}");
    curl::answering(caller.command("curl"), "http://web/", 20).map(drop)
}

/// Changes keys, kills and starts an agent, cuts a node off and heals it; takes as long as it is told to, at least.
fn disturb(lab: &Lab, least: Duration) -> Result<()> {
    let started = Instant::now();
    rotate(lab)?;
    loop {
        let (second, third) = (&lab.nodes[1].name, &lab.nodes[2].name);
        lab.xtask(&["kill", second])?;
        std::thread::sleep(Duration::from_secs(1));
        lab.xtask(&["start", second])?;
        lab.xtask(&["cut", third])?;
        std::thread::sleep(Duration::from_secs(1));
        lab.xtask(&["heal", third])?;
        lab.until_ready(lab.nodes.len())?;
        if started.elapsed() > least {
            return Ok(());
        }
        rotate(lab)?;
    }
}

pub(crate) fn change_of_keys_loses_no_packet(lab: &Lab) -> Result<()> {
    let (web, caller) = create(lab, &["--opt", "encrypted"])?;
    let far = web.iter().find(|task| task.node != caller.node).context("no task on another node")?;
    let to = far.address()?.to_string();
    let mut ping = caller.command("ping");
    ping.args(["-q", "-i", "0.01", &to]).stdout(Stdio::piped());
    let ping = ping.spawn()?;
    rotate(lab)?;
    rotate(lab)?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(ping.id().try_into()?),
        nix::sys::signal::Signal::SIGINT,
    )?;
    let said = String::from_utf8(ping.wait_with_output()?.stdout)?;
    let line = said.lines().find(|line| line.contains("packets transmitted")).context(said.clone())?;
    figure!("{line}, while every node changed its key twice");
    let count = |at| -> Option<u32> { line.split_whitespace().nth(at)?.parse().ok() };
    let (sent, received) = count(0).zip(count(3)).context(said.clone())?;
    // The last one may have been on its way when ping was told to end.
    ensure!(sent > 500 && sent - received <= 1, "{said}");
    Ok(())
}

/// A victim, whom frames are to reach, and the task that they claim to be from.
struct Forgery {
    /// The network.
    vni: u32,
    /// The victim's incarnation.
    incarnation: u32,
    victim: Ipv4Addr,
    /// A task of another node.
    source: Ipv4Addr,
}

impl Forgery {
    fn new(web: &[Task], victim: &Node, source: &Node) -> Result<Self> {
        let on = |node: &Node| web.iter().find(|task| task.node == *node).context("no task there")?.address();
        let (to, from) = (on(victim)?, on(source)?);
        let known = backends(victim)?.into_iter().find(|backend| backend.addr == Be32::from(to));
        let known = known.context("the victim is no backend")?;
        Ok(Self { vni: known.vni, incarnation: known.incarnation, victim: to, source: from })
    }

    /// VXLAN's payload: a frame from the one to the other, as nodes send each other.
    fn vxlan(&self) -> Result<Vec<u8>> {
        let builder =
            PacketBuilder::ethernet2(mac_of(Be32::from(self.source)), backend_mac(self.incarnation));
        let builder = builder.ipv4(self.source.octets(), self.victim.octets(), 64).udp(7_777, 7_777);
        let mut vxlan = vec![8, 0, 0, 0];
        vxlan.extend((self.vni << 8).to_be_bytes());
        builder.write(&mut vxlan, MARK)?;
        Ok(vxlan)
    }

    /// A mesh request from a client to the victim, likewise.
    fn request(&self, by: &Node) -> Result<Vec<u8>> {
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 0], backend_mac(self.incarnation));
        let builder = builder.ipv4(lab::CLIENT.octets(), by.address.octets(), 60);
        let builder = builder.tcp(40_000, PORT, 1, 65_000).syn();
        let mut vxlan = vec![8, 0, 0, 0];
        vxlan.extend((VNI_MESH_REQUEST << 8).to_be_bytes());
        builder.write(&mut vxlan, MARK)?;
        Ok(vxlan)
    }
}

/// From the client's host, under another one's address.
fn from_underlay(source: IpAddr, to: IpAddr, by: IpAddr, payload: &[u8]) -> Result<()> {
    let mut packet = Vec::new();
    match (source, to) {
        (IpAddr::V4(source), IpAddr::V4(to)) => {
            PacketBuilder::ipv4(source.octets(), to.octets(), 64)
                .udp(50_000, 4789)
                .write(&mut packet, payload)?;
        }
        (IpAddr::V6(source), IpAddr::V6(to)) => {
            PacketBuilder::ipv6(source.octets(), to.octets(), 64)
                .udp(50_000, 4789)
                .write(&mut packet, payload)?;
        }
        _ => anyhow::bail!("two families: {source}, {to}"),
    }
    as_client(|| {
        let sender = Sender::open()?;
        (0..FRAMES).try_for_each(|_| sender.send(&packet, by).map(drop))
    })
}

/// By an ordinary socket in a network namespace; what the kernel refuses to send is not sent.
fn by_socket(namespace: &str, to: IpAddr, payload: &[u8]) -> Result<()> {
    within(Path::new(namespace), || {
        let (any, to) = match to {
            IpAddr::V4(to) => (IpAddr::from([0; 4]), SocketAddrV4::new(to, 4789).into()),
            IpAddr::V6(to) => (IpAddr::from([0; 16]), SocketAddrV6::new(to, 4789, 0, 0).into()),
        };
        let socket = UdpSocket::bind((any, 0))?;
        for _ in 0..FRAMES {
            let to: std::net::SocketAddr = to;
            let _ = socket.send_to(payload, to);
        }
        Ok(())
    })
}

/// Who sends forged frames, what counts them if the programs drop them, and how they are sent.
struct Attack<'a> {
    who: &'static str,
    counted: Option<(&'a Node, Counter)>,
    send: Box<dyn Fn() -> Result<()> + 'a>,
}

impl<'a> Attack<'a> {
    fn new(
        who: &'static str,
        counted: Option<(&'a Node, Counter)>,
        send: impl Fn() -> Result<()> + 'a,
    ) -> Self {
        Self { who, counted, send: Box::new(send) }
    }
}

/// Frames to a task of an encrypted network that went through no WireGuard: from a host of the underlay under a node's
/// address, from a node, from a process and from a task of one, in both families.
pub(crate) fn what_comes_in_cleartext_reaches_no_task(lab: &Lab) -> Result<()> {
    let (first, second, third) = (&lab.nodes[0], &lab.nodes[1], &lab.nodes[2]);
    // Without encryption a node is known by its address alone, and who forges that is believed.
    let (web, _) = create(lab, &[])?;
    let came = forge(&Forgery::new(&web, second, first)?, &web, second, |forgery| {
        from_underlay(first.address.into(), second.address.into(), second.address.into(), &forgery.vxlan()?)
    })?;
    figure!(
        "a network that is not encrypted: of {FRAMES} frames under a node's address {came} reached a task"
    );
    ensure!(came > FRAMES / 2, "the attack does not work where it should");
    lab.reset()?;
    let (web, caller) = create(lab, &["--opt", "encrypted"])?;
    let forgery = Forgery::new(&web, second, first)?;
    let own = |node: &Node| addresses(node)?.first().copied().context("no address in WireGuard");
    let (from_wireguard, in_wireguard) = (own(first)?, own(second)?);
    let node_of = |node: &Node| format!("/run/netns/shoal-{}", node.name);
    let task = format!("/proc/{}/ns/net", caller.pid);
    let (second4, second6) = (IpAddr::from(second.address), IpAddr::from(second.address6));
    let vxlan = forgery.vxlan()?;
    let attacks = [
        Attack::new("a host of the underlay, as a node", Some((second, Counter::DropCleartext)), || {
            from_underlay(first.address.into(), second4, second4, &vxlan)
        }),
        Attack::new(
            "a host of the underlay, as a node, a request from a client",
            Some((second, Counter::DropCleartext)),
            || from_underlay(first.address.into(), second4, second4, &forgery.request(first)?),
        ),
        Attack::new(
            "a host of the underlay, between addresses in WireGuard",
            Some((second, Counter::DropCleartext)),
            || from_underlay(from_wireguard, in_wireguard, second6, &vxlan),
        ),
        Attack::new(
            "a host of the underlay, from an address in WireGuard",
            Some((second, Counter::DropCleartext)),
            || from_underlay(from_wireguard, second6, second6, &vxlan),
        ),
        Attack::new("another node", Some((second, Counter::DropCleartext)), || {
            by_socket(&node_of(third), second4, &vxlan)
        }),
        Attack::new(
            "a process of the node that the source is on",
            Some((second, Counter::DropCleartext)),
            || by_socket(&node_of(first), second4, &vxlan),
        ),
        Attack::new("a process of that node, into WireGuard", None, || {
            by_socket(&node_of(first), in_wireguard, &vxlan)
        }),
        Attack::new(
            "a task of that node, into WireGuard",
            Some((first, Counter::DropTunnelFromTask)),
            || by_socket(&task, in_wireguard, &vxlan),
        ),
    ];
    for Attack { who, counted, send } in attacks {
        let count = || counted.map_or(Ok(0), |(node, counter)| node.count(counter));
        let before = count()?;
        let came = forge(&forgery, &web, second, |_| send())?;
        let counted_now = count()? - before;
        figure!("{who}: {came} of {FRAMES} reached a task, {counted_now} counted");
        ensure!(came == 0, "{who}: {came} frames came");
        ensure!(counted.is_none() || counted_now == FRAMES, "{who}: {counted_now} of {FRAMES} are counted");
    }
    curl::answering(caller.command("curl"), "http://web/", 20).map(drop)
}

/// How many frames of an attack come to the victim, which listens to all of its interfaces.
fn forge(
    forgery: &Forgery,
    web: &[Task],
    on: &Node,
    attack: impl FnOnce(&Forgery) -> Result<()>,
) -> Result<u64> {
    let victim = web.iter().find(|task| task.node == *on).context("no victim")?;
    let namespace = format!("/proc/{}/ns/net", victim.pid);
    let wires = victim.addresses.iter().map(|addr| Wire::open(Path::new(&namespace), *addr));
    let wires = wires.collect::<Result<Vec<_>>>()?;
    attack(forgery)?;
    std::thread::sleep(Duration::from_millis(300));
    let heard = wires.iter().map(|wire| wire.heard(|frame| holds(frame, MARK))).sum::<Result<usize>>()?;
    Ok(heard as u64)
}

/// A node's uplink sees large segments and datagrams of an encrypted network go by, unbroken.
pub(crate) fn transfers_and_datagrams_pass_encrypted(lab: &Lab) -> Result<()> {
    create_network(lab, "ledger", &["--ipv6", "--opt", "encrypted"])?;
    let at = |node| format!("node.hostname=={node}");
    let server = ["--network", "ledger", "--constraint", &at("n2"), "shoal/exec", "iperf3", "-s"];
    engine::create(lab, "server", 1, &server)?;
    let caller = create_idle(lab, "caller", &["--network", "ledger", "--constraint", &at("n1")])?;
    for family in ["-4", "-6"] {
        for flow in [&["-n", "40M"][..], &["-n", "40M", "-R"], &["-u", "-l", "8000", "-b", "30M", "-n", "3M"]]
        {
            let report = until("iperf3's server takes a run", Duration::from_secs(10), || {
                let mut iperf3 = caller.command("timeout");
                let output =
                    iperf3.args(["20", "iperf3", family, "-J", "-c", "server"]).args(flow).output()?;
                let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
                Ok(report["error"].is_null().then_some(report))
            })?;
            let sum = &report["end"][if flow[0] == "-u" { "sum" } else { "sum_received" }];
            let megabits = sum["bits_per_second"].as_f64().unwrap_or_default() / 1e6;
            let lost = sum["lost_percent"].as_f64().unwrap_or_default();
            figure!("iperf3 {family} {}: {megabits:.0} Mbit/s, {lost:.1} % lost", flow.join(" "));
            ensure!(megabits > 10.0 && lost < 10.0, "{report}");
        }
    }
    Ok(())
}
