//! Who reaches whom: exactly those who are on a network together, whatever else they send.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_agent::dataplane::{Counter, read_counters};
use serde_json::Value;

use crate::dial::{Protocol, Target, dial};
use crate::engine;
use crate::figure;
use crate::forgery::{Cast, Forgery};
use crate::lab::{self, BINARY, Lab, until};
use crate::members::{self, INTERNAL, Member, NETWORKS, SERVICES};
use crate::overlay::{ENCRYPTED, create_network};
use crate::rivals::Rivals;
use crate::ways::Family;
use crate::wire::{Wire, holds};

/// How long packets may take until the programs have counted them.
const COUNTED: Duration = Duration::from_secs(2);
/// How much later than that one is heard that should not be.
const LATER: Duration = Duration::from_millis(30);

pub(crate) fn tasks_reach_exactly_those_on_their_networks(lab: &Lab) -> Result<()> {
    reach(lab, &[])
}

pub(crate) fn forged_frames_reach_nobody_and_are_counted(lab: &Lab) -> Result<()> {
    forge(lab, &[])
}

pub(crate) fn forged_frames_reach_nobody_while_agents_and_networks_change(lab: &Lab) -> Result<()> {
    change(lab, &[])
}

pub(crate) fn tasks_reach_exactly_those_on_their_encrypted_networks(lab: &Lab) -> Result<()> {
    reach(lab, ENCRYPTED)
}

pub(crate) fn forged_frames_reach_nobody_on_encrypted_networks(lab: &Lab) -> Result<()> {
    forge(lab, ENCRYPTED)
}

/// The matrix, for networks with these options.
fn reach(lab: &Lab, options: &[&str]) -> Result<()> {
    let members = members::create(lab, lab.nodes.len(), options)?;
    let twin = ["network", "create", "--driver", "overlay", "--subnet", &members::subnet(0), "twin"];
    let refused = engine::docker(lab.manager(), &twin)?;
    ensure!(!refused.status.success(), "two networks have the subnet {}", members::subnet(0));
    figure!("a second network with the subnet {}: {}", members::subnet(0), refused.stderr.trim());
    let cells = std::thread::scope(|scope| {
        let members = &members;
        let ask = |from: usize| scope.spawn(move || members[from].inside(|| ask_all(members, from)));
        let threads: Vec<_> = (0..members.len()).map(ask).collect();
        let mut cells: BTreeMap<(usize, usize), (usize, usize)> = BTreeMap::new();
        for (thread, member) in threads.into_iter().zip(members) {
            let cell = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            for (network, (answered, asked)) in cell {
                let cell = cells.entry((member.service, network)).or_default();
                *cell = (cell.0 + answered, cell.1 + asked);
            }
        }
        anyhow::Ok(cells)
    })?;
    figure!("{:>12} {}", "", NETWORKS.map(|network| format!("{network:>8}")).concat());
    for (service, (name, _)) in SERVICES.iter().enumerate() {
        let cell =
            |network| cells.get(&(service, network)).map(|(answered, asked)| format!("{answered}/{asked}"));
        let row = (0..NETWORKS.len()).map(|network| format!("{:>8}", cell(network).unwrap_or_default()));
        figure!("{name:>12} {}", row.collect::<String>());
    }
    Ok(())
}

/// Asks every endpoint of every other task, by each protocol and family; gives how many answered of how many, by network.
fn ask_all(members: &[Member], from: usize) -> Result<BTreeMap<usize, (usize, usize)>> {
    let mut cells: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
    for family in Family::ALL {
        let (mut networks, mut targets) = (Vec::new(), Vec::new());
        for other in members.iter().enumerate().filter(|(at, _)| *at != from).map(|(_, other)| other) {
            for (network, spot) in &other.spots {
                networks.push(*network);
                let (address, task) = (spot.address(family), other.task.id.clone());
                targets.push(Target { address, task, allowed: members[from].is_on(*network) });
            }
        }
        for protocol in Protocol::ALL {
            let own = SERVICES[members[from].service].0;
            let answered = dial(protocol, family, &targets).with_context(|| {
                format!("{protocol}, {family}, a task of {own} on {}", members[from].task.node)
            })?;
            for ((network, target), answered) in networks.iter().zip(&targets).zip(answered) {
                let what = if answered { "reaches" } else { "does not reach" };
                ensure!(
                    answered == target.allowed,
                    "{protocol}: a task of {own} on {} {what} {} of {}",
                    members[from].task.node,
                    target.address,
                    NETWORKS[*network]
                );
                let cell = cells.entry(*network).or_default();
                *cell = (cell.0 + usize::from(answered), cell.1 + 1);
            }
        }
    }
    Ok(cells)
}

/// How often packets have ended each way, on all nodes together.
fn counts(lab: &Lab) -> Result<BTreeMap<Counter, u64>> {
    let mut counts = BTreeMap::new();
    for node in &lab.nodes {
        for (counter, packets) in read_counters(&node.run_dir().join("bpf"))? {
            *counts.entry(counter).or_default() += packets;
        }
    }
    Ok(counts)
}

/// The drops of all nodes, as `shoal drops` tells them.
fn drops(lab: &Lab) -> Result<BTreeMap<String, u64>> {
    let mut drops = BTreeMap::new();
    for node in &lab.nodes {
        let bpffs = node.run_dir().join("bpf");
        let mut command = node.command(BINARY);
        let told = lab::output(command.args(["drops", "--json", "--bpffs"]).arg(bpffs))?;
        let told: BTreeMap<String, Value> = serde_json::from_str(&told)?;
        for (reason, ended) in told {
            *drops.entry(reason).or_default() += ended["packets"].as_u64().context("no count")?;
        }
    }
    Ok(drops)
}

/// Somebody who forges: a task, one of its interfaces, and whom that is to deceive.
struct Attacker<'m> {
    member: usize,
    is_internal: bool,
    wire: &'m Wire,
    cast: Cast,
}

fn attackers<'m>(members: &[Member], wires: &'m [Vec<Wire>]) -> Result<Vec<Attacker<'m>>> {
    let nodes: BTreeSet<Ipv4Addr> = members.iter().map(|member| member.task.node.address).collect();
    let mut attackers = Vec::new();
    for (member, from) in members.iter().enumerate() {
        let here = from.task.node.address;
        let after = nodes.iter().find(|node| **node > here).or(nodes.first()).context("no node")?;
        for ((network, attacker), wire) in from.spots.iter().zip(&wires[member]) {
            // Of whichever the attacker is on neither.
            let foreign = (network + 2) % NETWORKS.len();
            ensure!(!from.is_on(foreign), "{} is on {}", SERVICES[from.service].0, NETWORKS[foreign]);
            let find = |network: usize, is_there: &dyn Fn(&Ipv4Addr) -> bool| {
                let others = members
                    .iter()
                    .enumerate()
                    .filter(|(at, other)| *at != member && is_there(&other.task.node.address));
                let mut spots = others.flat_map(|(_, other)| other.spots.iter());
                let spot = spots.find(|(own, _)| *own == network).map(|(_, spot)| *spot);
                spot.with_context(|| format!("nobody else is on {}", NETWORKS[network]))
            };
            let cast = Cast {
                attacker: *attacker,
                victim: find(*network, &|node| *node != here)?,
                neighbour: find(*network, &|node| *node == here)?,
                // Of three nodes, no two send to each other: where there are no ports, a node that masquerades takes what
                // comes for the answer to what left.
                stranger: find(foreign, &|node| node == after)?,
                insider: find(foreign, &|node| *node == here)?,
            };
            attackers.push(Attacker { member, is_internal: *network == INTERNAL, wire, cast });
        }
    }
    Ok(attackers)
}

/// How many frames others than their senders have heard of a forgery.
fn heard(wires: &[Vec<Wire>], forgery: Forgery) -> Result<usize> {
    let common = forgery.common_mark();
    let mut heard = 0;
    for (member, wires) in wires.iter().enumerate() {
        let own = forgery.mark(member);
        for wire in wires {
            heard += wire.heard(|frame| holds(frame, &common) && !holds(frame, &own))?;
        }
    }
    Ok(heard)
}

/// How a forgery is to end: each of these is counted once.
fn ends(forgery: Forgery, is_internal: bool) -> &'static [Counter] {
    match forgery {
        Forgery::Honest(_) => &[Counter::OverlayForwarded, Counter::OverlayDelivered],
        Forgery::Source(_) | Forgery::ForeignSource(_) | Forgery::TaggedSource => {
            &[Counter::DropSpoofedSource]
        }
        Forgery::Mac(_) => &[Counter::DropSpoofedMac],
        Forgery::TwiceTaggedSource => &[Counter::DropProtocol],
        // Solicitations have no such option.
        Forgery::ArpReply | Forgery::Solicitation => &[Counter::DropMalformed],
        Forgery::ArpAnnouncement => &[Counter::DropNoEndpoint],
        // The answer goes to the attacker alone.
        Forgery::ArpRequest => &[Counter::ArpAnswered],
        Forgery::Advertisement
        | Forgery::RouterAdvertisement
        | Forgery::DhcpOffer
        | Forgery::Multicast(_) => &[Counter::DropMulticast],
        // To the node itself, which takes its tasks for no member.
        Forgery::VxlanToGateway(_) => &[Counter::HostEntered, Counter::DropNotMember],
        _ if is_internal => &[Counter::DropInternal],
        Forgery::Vxlan(_)
        | Forgery::VxlanWithOptions
        | Forgery::VxlanBehindExtension
        | Forgery::VxlanFirstFragment => &[Counter::DropTunnelFromTask],
        Forgery::VxlanLaterFragment => &[Counter::DropFragment],
        Forgery::VxlanToAlias(_) => &[Counter::DropLinkLocal],
        // Out, as to any address that is not of the task's networks.
        Forgery::Foreign(_)
        | Forgery::Gre(_)
        | Forgery::IpInIp(_)
        | Forgery::Geneve(_)
        | Forgery::OldVxlan(_) => &[Counter::HostEntered],
    }
}

/// Every task forges every kind of frame, in networks with these options; first on networks of the kernel's.
fn forge(lab: &Lab, options: &[&str]) -> Result<()> {
    let fallen = {
        let rivals = Rivals::start()?;
        let try_out = |forgery: &Forgery| Ok((*forgery, rivals.fall_for(*forgery)?));
        Forgery::ALL.iter().map(try_out).collect::<Result<Vec<_>>>()?
    };
    let members = members::create(lab, lab.nodes.len(), options)?;
    let wires = members.iter().map(Member::wires).collect::<Result<Vec<_>>>()?;
    let attackers = attackers(&members, &wires)?;
    for family in Family::ALL {
        let (sent, heard, told) = send(lab, Forgery::Honest(family), &attackers, &wires)?;
        figure!("{sent} true frames, {family}: {heard} heard; {told}");
        ensure!(heard == sent, "the frames of this test are not good");
    }
    let before = drops(lab)?;
    let mut expected: BTreeMap<String, u64> = BTreeMap::new();
    for (forgery, fell) in fallen {
        let (sent, heard, told) = send(lab, forgery, &attackers, &wires)?;
        let rival = if fell { "; the kernel's VXLAN falls for it" } else { "" };
        figure!("{sent} of {forgery}: {heard} heard; {told}{rival}");
        ensure!(heard == 0, "{heard} were heard");
        ensure!(fell == forgery.works_on_rivals(), "the attack works on the kernel's VXLAN: {fell}");
        for attacker in &attackers {
            for end in ends(forgery, attacker.is_internal).iter().filter(|end| end.is_drop()) {
                *expected.entry(end.name().to_owned()).or_default() += 1;
            }
        }
    }
    let after = drops(lab)?;
    let grown = |reason: &String| after.get(reason).unwrap_or(&0) - before.get(reason).unwrap_or(&0);
    let told: BTreeMap<&String, u64> = expected.keys().map(|reason| (reason, grown(reason))).collect();
    figure!("shoal drops tells of {told:?}");
    for (reason, count) in &expected {
        ensure!(grown(reason) >= *count, "{count} of {reason} are expected");
    }
    Ok(())
}

/// Every attacker sends one; gives how many were sent and heard, and how they ended.
fn send(
    lab: &Lab,
    forgery: Forgery,
    attackers: &[Attacker<'_>],
    wires: &[Vec<Wire>],
) -> Result<(usize, usize, String)> {
    let before = counts(lab)?;
    let mut expected: BTreeMap<Counter, u64> = BTreeMap::new();
    for attacker in attackers {
        let frame = forgery.frame(&attacker.cast, &forgery.mark(attacker.member))?;
        attacker.wire.send(&frame).with_context(|| forgery.to_string())?;
        for end in ends(forgery, attacker.is_internal) {
            *expected.entry(*end).or_default() += 1;
        }
    }
    let mut grown = BTreeMap::new();
    let counted = until(&format!("{forgery} is counted"), COUNTED, || {
        let now = counts(lab)?;
        grown = now.into_iter().map(|(counter, packets)| (counter, packets - before[&counter])).collect();
        Ok(expected.iter().all(|(counter, count)| grown[counter] >= *count).then_some(()))
    });
    std::thread::sleep(LATER);
    let all = grown.iter().filter(|(_, packets)| **packets > 0);
    let told: Vec<String> = all.map(|(counter, packets)| format!("{} {packets}", counter.name())).collect();
    let told = told.join(", ");
    counted.with_context(|| format!("expected {expected:?}: {told}"))?;
    // Victims answer what is true: nobody listens there.
    let is_exact = !matches!(forgery, Forgery::Honest(_));
    for (counter, count) in expected.iter().filter(|_| is_exact) {
        let (grown, name) = (grown[counter], counter.name());
        ensure!(grown == *count, "{forgery}: {grown} instead of {count} times {name}");
    }
    Ok((attackers.len(), heard(wires, forgery)?, told))
}

/// What is forged all the while.
const FORGED: [Forgery; 8] = [
    Forgery::Source(Family::V4),
    Forgery::Source(Family::V6),
    Forgery::ForeignSource(Family::V4),
    Forgery::Mac(Family::V4),
    Forgery::ArpReply,
    Forgery::Advertisement,
    Forgery::Vxlan(Family::V4),
    Forgery::VxlanToGateway(Family::V4),
];
const HONEST: Forgery = Forgery::Honest(Family::V4);
/// A forged frame each, and a true one every tenth time.
const PAUSE: Duration = Duration::from_millis(1);
/// How often what was heard is taken: a socket holds some hundred frames.
const FRAMES_A_LOOK: usize = 64;

/// How many frames were sent and heard.
#[derive(Default)]
struct Heard {
    forged: (usize, usize),
    honest: (usize, usize),
}

/// Forged frames a thousand times a second, in networks with these options, while a node joins, agents are killed, stopped and
/// started, and networks and services come and go.
fn change(lab: &Lab, options: &[&str]) -> Result<()> {
    engine::leave(lab, &lab.nodes[2])?;
    let members = members::create(lab, lab.nodes.len() - 1, options)?;
    let wires = members.iter().map(Member::wires).collect::<Result<Vec<_>>>()?;
    let attackers = attackers(&members, &wires)?;
    let ends = AtomicBool::new(false);
    let heard = std::thread::scope(|scope| {
        let forging = scope.spawn(|| forge_until(&attackers, &wires, &ends));
        let changed = change_all(lab);
        ends.store(true, Ordering::Relaxed);
        let heard = forging.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        changed.map(|()| heard)
    })?;
    let Heard { forged, honest } = heard;
    figure!(
        "{} forged frames meanwhile, {} heard; {} true ones, {} heard",
        forged.0,
        forged.1,
        honest.0,
        honest.1
    );
    ensure!(forged.1 == 0, "{} forged frames were heard", forged.1);
    ensure!(honest.0 == honest.1, "{} of {} true frames were heard", honest.1, honest.0);
    Ok(())
}

fn change_all(lab: &Lab) -> Result<()> {
    let manager = lab.manager();
    engine::join(lab, &lab.nodes[2])?;
    for (name, _) in SERVICES {
        engine::until_running(lab, name, lab.nodes.len())?;
    }
    for (node, how) in [(&lab.nodes[1], "kill"), (&lab.nodes[2], "stop"), (&lab.nodes[0], "kill")] {
        lab.xtask(&[how, &node.name])?;
        lab.xtask(&["start", &node.name])?;
        lab.until_ready(lab.nodes.len())?;
        create_network(lab, "short", &["--ipv6"])?;
        engine::create(lab, "brief", 3, &["--replicas", "3", "--network", "short", "shoal/whoami"])?;
        engine::docker_ok(manager, &["service", "rm", "brief"])?;
        until("the network can be removed", Duration::from_secs(20), || {
            Ok(engine::docker(manager, &["network", "rm", "short"])?.status.success().then_some(()))
        })?;
    }
    Ok(())
}

fn forge_until(attackers: &[Attacker<'_>], wires: &[Vec<Wire>], ends: &AtomicBool) -> Result<Heard> {
    let mut found = Heard::default();
    let look = |found: &mut Heard| -> Result<()> {
        for (member, wires) in wires.iter().enumerate() {
            for wire in wires {
                found.honest.1 += wire.heard(|frame| {
                    let forged = FORGED.iter().filter(|forgery| holds(frame, &forgery.common_mark()));
                    found.forged.1 += forged.filter(|forgery| !holds(frame, &forgery.mark(member))).count();
                    holds(frame, &HONEST.common_mark()) && !holds(frame, &HONEST.mark(member))
                })?;
            }
        }
        Ok(())
    };
    for number in 0.. {
        let attacker = &attackers[number % attackers.len()];
        let forgery = FORGED[number / attackers.len() % FORGED.len()];
        attacker.wire.send(&forgery.frame(&attacker.cast, &forgery.mark(attacker.member))?)?;
        found.forged.0 += 1;
        if number % 10 == 0 {
            attacker.wire.send(&HONEST.frame(&attacker.cast, &HONEST.mark(attacker.member))?)?;
            found.honest.0 += 1;
        }
        if number % FRAMES_A_LOOK == 0 {
            look(&mut found)?;
        }
        if ends.load(Ordering::Relaxed) {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    std::thread::sleep(LATER);
    look(&mut found)?;
    Ok(found)
}
