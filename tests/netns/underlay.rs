//! What somebody on the underlay sees of an encrypted network, whatever happens to the nodes, and what comes of sending it
//! again.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_agent::links::{WIREGUARD_LINKS, WIREGUARD_TABLES};
use mesh_api::wireguard::WIREGUARD_PORTS;

use crate::capture::Capture;
use crate::client;
use crate::curl;
use crate::encryption::{addresses, create, rotate};
use crate::engine;
use crate::figure;
use crate::lab::{self, CLIENT, CLIENT6, Lab, Node, as_client, as_host, command_in, until, within};
use crate::mesh;
use crate::overlay::ENCRYPTED;
use crate::raw::Sender;
use crate::wire::{Wire, holds};

/// How long the underlay is listened to, s; the variable of the environment that says otherwise.
const LISTEN_S: u64 = 12;
const LISTEN_S_BY: &str = "SHOAL_ENCRYPTED_S";
/// How long something is gone or broken before it is mended.
const AWAY: Duration = Duration::from_secs(1);
/// How long an agent may take to mend what somebody else broke.
const MENDED: Duration = Duration::from_secs(20);
/// How long until everybody reaches everybody again: WireGuard gives a session up that the other side has lost after 15 s
/// without an answer, if the greeting of who lost it was lost as well.
const AGAIN: Duration = Duration::from_secs(30);
/// Where the datagrams go that end the captures: nobody listens there.
const END: u16 = 9;
/// How many packets are recorded, and how often each is sent again.
const RECORDED: usize = 100;
const TIMES: usize = 10;
/// What the recorded packets carry.
const MARK: &[u8] = b"shoal: recorded";
/// How long packets may be on their way.
const LATER: Duration = Duration::from_millis(100);

/// What the switch sees of the nodes beside WireGuard, clients' packets, the sessions with the manager, multicast, discovery
/// of neighbours, whether another node is there (ADR 8), and that a node does not listen to WireGuard at the moment.
fn anything_else() -> String {
    let [first, last] = WIREGUARD_PORTS;
    format!(
        "(ip or ip6) and not multicast and not (udp portrange {first}-{last}) and not (tcp port 2377) \
         and not icmp6 and not (icmp[icmptype] == icmp-unreach) \
         and not ((icmp[icmptype] == icmp-echo or icmp[icmptype] == icmp-echoreply) and ip[2:2] == 36) \
         and not host {CLIENT} and not host {CLIENT6}"
    )
}

/// What nodes do to each other on an encrypted network, seen by the switch between them: nothing but WireGuard, whatever
/// happens meanwhile.
pub(crate) fn nothing_of_an_encrypted_network_is_seen(lab: &Lab) -> Result<()> {
    let (_, caller) = create(lab, ENCRYPTED)?;
    let seconds = std::env::var(LISTEN_S_BY).ok().and_then(|text| text.parse().ok()).unwrap_or(LISTEN_S);
    let filter = anything_else();
    let listen = |node: &Node| Capture::start(command_in("sw", "tcpdump"), &node.name, &[&filter]);
    let captures = lab.nodes.iter().map(listen).collect::<Result<Vec<_>>>()?;
    let began = Instant::now();
    let over = AtomicBool::new(false);
    let (asked, answered, events) = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let (mut asked, mut answered) = (0, 0);
            while !over.load(Ordering::Relaxed) {
                asked += 10;
                // While a node is away, not every request is answered.
                answered +=
                    curl::answering(caller.command("curl"), "http://web/", 5).map_or(0, |all| all.len());
                for to in mesh::targets(lab).into_iter().cycle().take(5) {
                    let answer = as_client(|| client::http(mesh::any(CLIENT), to, "/"));
                    answered += usize::from(answer.is_ok());
                }
            }
            (asked, answered)
        });
        let events = disturb(lab, Duration::from_secs(seconds));
        over.store(true, Ordering::Relaxed);
        let (asked, answered) = load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        events.map(|events| (asked, answered, events))
    })?;
    let mut seen = Vec::new();
    for (node, capture) in lab.nodes.iter().zip(captures) {
        // Who sees this one has listened to the end.
        let other = lab.nodes.iter().find(|other| *other != node).context("a node alone")?;
        let end = SocketAddr::from((other.address, END));
        as_host(&node.name, || Ok(UdpSocket::bind((node.address, 0))?.send_to(b"end", end)?))?;
        let pattern = format!("> {}.{END}: ", other.address);
        let text = capture.finish(std::slice::from_ref(&pattern))?;
        seen.extend(packets(&text).into_iter().filter(|packet| !packet.contains(&format!(".{END}: "))));
    }
    figure!("{answered} of {asked} requests answered within {:.0} s, while", began.elapsed().as_secs_f32());
    figure!("{events}");
    figure!("packets between nodes that were not WireGuard's: {}", seen.len());
    ensure!(answered * 2 > asked, "too few answers to say anything: {answered} of {asked}");
    ensure!(seen.is_empty(), "{}", seen[..seen.len().min(5)].join("\n    "));
    let again = Instant::now();
    until("all is answered again", AGAIN, || {
        Ok(curl::answering(caller.command("curl"), "http://web/", 20).ok().map(drop))
    })?;
    figure!("all is answered again after {:.1} s", again.elapsed().as_secs_f32());
    Ok(())
}

/// What tcpdump printed, by packets: each begins at the margin.
fn packets(text: &str) -> Vec<String> {
    let mut packets: Vec<String> = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        match packets.last_mut() {
            Some(packet) if line.starts_with(char::is_whitespace) => packet.push_str(line),
            _ => packets.push(line.to_owned()),
        }
    }
    packets
}

/// Keys change, agents restart, nodes are lost, leave and join, and what encrypts is taken away; all of it again until so
/// much time has gone. Gives what happened.
fn disturb(lab: &Lab, least: Duration) -> Result<String> {
    let started = Instant::now();
    let (second, third) = (&lab.nodes[1], &lab.nodes[2]);
    let mut rounds = 0;
    while rounds == 0 || started.elapsed() < least {
        rotate(lab)?;
        // The agent puts its rules back when it starts.
        lab::output(second.command("nft").args(["flush", "ruleset"]))?;
        lab.xtask(&["kill", &second.name])?;
        std::thread::sleep(AWAY);
        lab.xtask(&["start", &second.name])?;
        lab.xtask(&["cut", &third.name])?;
        std::thread::sleep(AWAY);
        lab.xtask(&["heal", &third.name])?;
        lab.until_ready(lab.nodes.len())?;
        engine::leave(lab, third)?;
        std::thread::sleep(AWAY);
        engine::join(lab, third)?;
        engine::until_running(lab, "web", lab.nodes.len())?;
        break_encryption(second)?;
        rounds += 1;
    }
    Ok(format!(
        "{rounds} times keys changed, a node lost its netfilter rules and its agent, a node was cut off, left and joined, a \
         node lost its rule of routing and its link"
    ))
}

/// Takes away what leads into WireGuard, and then WireGuard's link; waits until the agent has mended either.
fn break_encryption(node: &Node) -> Result<()> {
    let has = |what: &[&str], text: &str| -> Result<bool> {
        Ok(lab::output(node.command("ip").args(["-6", "-oneline"]).args(what))?.contains(text))
    };
    for table in WIREGUARD_TABLES.map(|table| table.to_string()) {
        if !has(&["rule", "show"], &format!("lookup {table}"))? {
            continue;
        }
        lab::output(node.command("ip").args(["-6", "rule", "del", "table", &table]))?;
        until("the rule is back", MENDED, || {
            Ok(has(&["rule", "show"], &format!("lookup {table}"))?.then_some(()))
        })?;
    }
    for link in WIREGUARD_LINKS {
        if !has(&["address", "show"], &format!(" {link} "))? {
            continue;
        }
        lab::output(node.command("ip").args(["link", "del", link]))?;
        until("the link is back", MENDED, || Ok((!addresses(node)?.is_empty()).then_some(())))?;
    }
    Ok(())
}

/// What was recorded on the underlay and is sent again: on another network each packet arrives each time, on an encrypted
/// one never.
pub(crate) fn packets_sent_again_reach_no_task(lab: &Lab) -> Result<()> {
    let again = send_again(lab, &[], |datagram| holds(datagram, MARK))?;
    figure!("a network that is not encrypted: {again} of {} packets sent again arrive", RECORDED * TIMES);
    ensure!(again > RECORDED * TIMES / 2, "the attack does not work where it should");
    lab.reset()?;
    // WireGuard's data.
    let again = send_again(lab, ENCRYPTED, |datagram| datagram.get(8) == Some(&4))?;
    figure!("an encrypted one: {again} of {}", RECORDED * TIMES);
    ensure!(again == 0, "{again} packets arrive again");
    Ok(())
}

/// Records what passes to a task of another node, those UDP datagrams that `are_meant`, and has the client send it anew;
/// gives how many packets the task hears again.
fn send_again(lab: &Lab, options: &[&str], are_meant: impl Fn(&[u8]) -> bool) -> Result<usize> {
    let (first, second) = (&lab.nodes[0], &lab.nodes[1]);
    let (web, caller) = create(lab, options)?;
    let task = web.iter().find(|task| task.node == *second).context("no task there")?;
    let victim = Wire::open(&PathBuf::from(format!("/proc/{}/ns/net", task.pid)), task.address()?)?;
    let heard = || victim.heard(|frame| holds(frame, MARK));
    let uplink = Wire::open(&PathBuf::from(format!("/run/netns/shoal-{second}")), second.address)?;
    let to = SocketAddr::from((task.address()?, 7_777));
    within(&PathBuf::from(format!("/proc/{}/ns/net", caller.pid)), || {
        let socket = UdpSocket::bind(("0.0.0.0", 0))?;
        for _ in 0..RECORDED {
            // An ICMP message about an earlier one fails it.
            let _ = socket.send_to(MARK, to).or_else(|_| socket.send_to(MARK, to))?;
            // One by one: no two of them become one packet on the way.
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    })?;
    std::thread::sleep(LATER);
    let once = heard()?;
    let mut recorded = Vec::new();
    uplink.heard(|frame| {
        // IPv4 without options, from the first node, UDP.
        let is_its = frame.get(12..15) == Some(&[8, 0, 0x45]) && frame[26..30] == first.address.octets();
        if is_its && frame[23] == 17 && are_meant(&frame[34..]) {
            let mut packet = frame[14..].to_vec();
            // No checksum: that was left to the hardware.
            packet[26..28].fill(0);
            recorded.push(packet);
        }
        false
    })?;
    ensure!(once == RECORDED && recorded.len() >= RECORDED, "{once} arrived, {} recorded", recorded.len());
    let mut again = 0;
    for _ in 0..TIMES {
        as_client(|| {
            let sender = Sender::open()?;
            recorded.iter().try_for_each(|packet| sender.send(packet, second.address).map(drop))
        })?;
        std::thread::sleep(LATER);
        again += heard()?;
    }
    Ok(again)
}
