//! Networks that are encrypted between nodes: how keys change, and what comes without encryption.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_agent::dataplane::Counter;

use crate::cleartext::{
    Attack, Count, FRAMES, Forgery, by_socket, datagram, every_header, fragments, from_underlay, heard,
    tagged,
};
use crate::curl;
use crate::engine::{self, Task};
use crate::figure;
use crate::lab::{self, BINARY, Lab, Node, until};
use crate::mesh::PORT;
use crate::overlay::{ENCRYPTED, create_idle, create_network};
use crate::ways::Family;

/// The network's subnets.
const SUBNET: &str = "10.95.0.0/24";
const SUBNET6: &str = "fd00:95::/64";
/// That of the network with one task.
const ALONE: &str = "10.96.0.0/24";
/// An address of it that nobody has.
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 77);
/// How long a node may take until its keys are changed: 10 s are for what is on its way.
const CHANGED_LIMIT: Duration = Duration::from_secs(30);
/// How long an agent may take to put its netfilter rules back.
const RULES_LIMIT: Duration = Duration::from_secs(15);

/// A network with these options, `web` on every node of the lab, published, and a task on the first that does nothing.
pub(crate) fn create(lab: &Lab, options: &[&str]) -> Result<(Vec<Task>, Task)> {
    let subnets = ["--ipv6", "--subnet", SUBNET, "--subnet", SUBNET6];
    create_network(lab, "ledger", &[&subnets, options].concat())?;
    let published = format!("{PORT}:80");
    let arguments = ["--mode", "global", "--network", "ledger", "--publish", &published, "shoal/whoami"];
    let web = engine::create(lab, "web", lab.nodes.len(), &arguments)?;
    let caller = create_idle(lab, "caller", &["--network", "ledger", "--constraint", "node.hostname==n1"])?;
    Ok((web, caller))
}

/// Has every node replace its key, and waits until they have.
pub(crate) fn rotate(lab: &Lab) -> Result<()> {
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
pub(crate) fn addresses(node: &Node) -> Result<Vec<IpAddr>> {
    let shown =
        lab::output(node.command("ip").args(["-6", "-oneline", "address", "show", "scope", "global"]))?;
    let of_wireguard = shown.lines().filter(|line| line.contains(" shoal-wg"));
    let words = of_wireguard.filter_map(|line| line.split_whitespace().nth(3)?.split('/').next());
    words.map(|word| Ok(word.parse()?)).collect()
}

pub(crate) fn change_of_keys_loses_no_packet(lab: &Lab) -> Result<()> {
    let (web, caller) = create(lab, ENCRYPTED)?;
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

/// Frames to tasks of encrypted networks that went through no WireGuard: from hosts of the underlay, from nodes, and from
/// processes and tasks of these, in both families. The victims' node has no netfilter rules when they come.
pub(crate) fn what_comes_in_cleartext_reaches_no_task(lab: &Lab) -> Result<()> {
    let (first, second) = (&lab.nodes[0], &lab.nodes[1]);
    // Without encryption a node is known by its address alone, and who forges that is believed.
    let (web, _) = create(lab, &[])?;
    let forgery = Forgery::new(on(&web, second)?, on(&web, first)?.address()?)?;
    for family in Family::ALL {
        let packet = datagram(first.address, second.address, &forgery.vxlan(family)?)?;
        let came = heard(&forgery.victim, || from_underlay(&vec![packet; FRAMES as usize], second.address))?;
        figure!(
            "a network that is not encrypted, {family}: of {FRAMES} frames under a node's address {came} reached a task"
        );
        ensure!(came > FRAMES / 2, "the attack does not work where it should");
    }
    lab.reset()?;
    let (web, caller) = create(lab, ENCRYPTED)?;
    let forgery = Forgery::new(on(&web, second)?, on(&web, first)?.address()?)?;
    for attack in attacks(lab, &forgery, &caller)? {
        // Whatever drops these frames, it is no firewall.
        lab::output(second.command("nft").args(["flush", "ruleset"]))?;
        attack.run(&forgery.victim)?;
    }
    let all = every_header(&forgery)?.into_iter();
    let all =
        all.map(|payload| datagram(first.address, second.address, &payload)).collect::<Result<Vec<_>>>()?;
    let came = heard(&forgery.victim, || from_underlay(&all, second.address))?;
    figure!(
        "a host of the underlay, as a node, all flags in 5 networks: {came} of {} reached a task",
        all.len()
    );
    ensure!(came == 0, "{came} frames came");
    create_network(lab, "alone", &[&["--subnet", ALONE], ENCRYPTED].concat())?;
    let lone = ["--network", "alone", "--constraint", "node.hostname==n2", "shoal/whoami"];
    let lone = engine::create(lab, "lone", 1, &lone)?;
    let forgery = Forgery::new(on(&lone, second)?, NOBODY)?;
    let packet = datagram(first.address, second.address, &forgery.vxlan(Family::V4)?)?;
    let count = Count::Of(second, Counter::DropForeignSource);
    let who = "a host of the underlay, as a node, to the one task of a network";
    lab::output(second.command("nft").args(["flush", "ruleset"]))?;
    Attack::new(who, count, || from_underlay(&vec![packet.clone(); FRAMES as usize], second.address))
        .run(&forgery.victim)?;
    until("the rules are back", RULES_LIMIT, || {
        let listed = |family| lab::output(second.command("nft").args(["list", "table", family, "shoal"]));
        Ok((listed("ip").is_ok() && listed("ip6").is_ok()).then_some(()))
    })?;
    curl::answering(caller.command("curl"), "http://web/", 20).map(drop)
}

/// The task on a node.
fn on<'t>(tasks: &'t [Task], node: &Node) -> Result<&'t Task> {
    tasks.iter().find(|task| task.node == *node).context("no task there")
}

/// All who forge frames from the first node's task to the second's. `caller`: a task of the first node.
fn attacks<'a>(lab: &'a Lab, forgery: &Forgery, caller: &Task) -> Result<Vec<Attack<'a>>> {
    let (first, second, third) = (&lab.nodes[0], &lab.nodes[1], &lab.nodes[2]);
    let own = |node: &Node| addresses(node)?.first().copied().context("no address in WireGuard");
    let (from_wireguard, in_wireguard) = (own(first)?, own(second)?);
    let cleartext = || Count::Of(second, Counter::DropCleartext);
    let stranger = || Count::Of(second, Counter::DropNotMember);
    let vxlan = forgery.vxlan(Family::V4)?;
    let host = |who: &str, count, packet: Vec<u8>, by: IpAddr| {
        let who = format!("a host of the underlay, {who}");
        Attack::new(&who, count, move || from_underlay(&vec![packet.clone(); FRAMES as usize], by))
    };
    let mut attacks = Vec::new();
    let (to4, to6) = (IpAddr::from(second.address), IpAddr::from(second.address6));
    for family in Family::ALL {
        let packet = datagram(first.address, to4, &forgery.vxlan(family)?)?;
        attacks.push(host(&format!("as a node, {family}"), cleartext(), packet, to4));
        let packet = datagram(first.address, to4, &forgery.request(first, family)?)?;
        attacks.push(host(&format!("as a node, a client's request, {family}"), cleartext(), packet, to4));
    }
    let plain = datagram(first.address, to4, &vxlan)?;
    let broken: Vec<Vec<u8>> = (1..=FRAMES as u16).flat_map(|id| fragments(&plain, id)).collect();
    let broken = move || from_underlay(&broken, to4);
    attacks.push(Attack::new("a host of the underlay, as a node, in fragments", cleartext(), broken));
    let tagged = tagged(&plain, second)?;
    attacks.push(Attack::new("a host of the underlay, as a node, tagged", cleartext(), tagged));
    for (who, count, from, to) in [
        ("as a node, by IPv6", stranger(), first.address6.into(), to6),
        ("between addresses in WireGuard", cleartext(), from_wireguard, in_wireguard),
        ("from an address in WireGuard", cleartext(), from_wireguard, to6),
    ] {
        attacks.push(host(who, count, datagram(from, to, &vxlan)?, to6));
    }
    let node_of = |node: &Node| format!("/run/netns/shoal-{node}");
    let task = format!("/proc/{}/ns/net", caller.pid);
    let (any4, any6) = (IpAddr::from([0; 4]), IpAddr::from([0; 16]));
    let from_task = || Count::Of(first, Counter::DropTunnelFromTask);
    for (who, count, namespace, from, to) in [
        ("another node", cleartext(), node_of(third), any4, to4),
        ("another node, by IPv6", stranger(), node_of(third), any6, to6),
        ("a process of the source's node", cleartext(), node_of(first), any4, to4),
        ("a process of the source's node, by IPv6", stranger(), node_of(first), any6, to6),
        (
            "a process of the source's node, into WireGuard",
            Count::ByRule(first),
            node_of(first),
            from_wireguard,
            in_wireguard,
        ),
        ("a task of the source's node", from_task(), task.clone(), any4, to4),
        ("a task of the source's node, by IPv6", from_task(), task.clone(), any6, to6),
        ("a task of the source's node, into WireGuard", from_task(), task.clone(), any6, in_wireguard),
    ] {
        let vxlan = vxlan.clone();
        attacks.push(Attack::new(who, count, move || by_socket(&namespace, from, to, &vxlan)));
    }
    Ok(attacks)
}
