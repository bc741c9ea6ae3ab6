//! A flood of packets that open connections and go no further, from more sources than the flow tables hold.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use mesh_agent::dataplane::pins::version_folder;
use mesh_common::addr::Ip6;
use mesh_common::be::Be32;
use mesh_common::map::{FlowKey, Sent};

use crate::client;
use crate::figure;
use crate::lab::{self, Lab, as_client};
use crate::load::Load;
use crate::peers::{self, BALANCER, Balancer, Kind};
use crate::raw::{SYN, Sender, segment};
use crate::steady::{self, Connection, Steady};
use crate::undo::Undo;
use crate::ways::{self, Back, Way};

/// Connections under load that live through it.
const CONNECTIONS: usize = 200;
/// Connections that are silent meanwhile.
const IDLE: usize = 800;
/// Different sources that SYNs come from.
const TUPLES: u32 = 1_000_000;
/// How many of them make a peer fall.
const TUPLES_OF_PEERS: u32 = 20_000;
/// Of these is the first, and every next one has the next address.
const FIRST_SOURCE: u32 = u32::from_be_bytes([10, 0, 0, 0]);
const THREADS: u32 = 2;
/// SYNs a second, where new connections are to come about beside them: the rest of the machine is for these.
const PACE: u32 = 60_000;
/// How many of them are sent at that pace.
const TUPLES_AT_PACE: u32 = 200_000;
/// An end to the flood, on however slow a machine.
const LIMIT: Duration = Duration::from_secs(40);
/// By how much other work may make a node's table of tracked connections grow.
const TRACKED_MAX: u64 = 32;

/// Sends the SYNs of every `THREADS`th source of so many from `first` on, if need be not before their time; gives how many
/// it sent.
fn share(first: u32, tuples: u32, pace: Option<u32>, targets: &[SocketAddrV4]) -> Result<u32> {
    let sender = Sender::open()?;
    let started = Instant::now();
    let mut sent = 0;
    for (number, to) in (first..tuples).step_by(THREADS as usize).zip(targets.iter().cycle()) {
        let source = Ipv4Addr::from_bits(FIRST_SOURCE + number);
        let source = SocketAddrV4::new(source, 1024 + (number % 60_000) as u16);
        let packet = segment(SYN, source, *to);
        sent += u32::from(sender.send(&packet, *to.ip())?);
        if number % 256 >= THREADS {
            continue;
        }
        if started.elapsed() > LIMIT {
            break;
        }
        if let Some(pace) = pace {
            let due = Duration::from_secs(1) * number / pace;
            std::thread::sleep(due.saturating_sub(started.elapsed()));
        }
    }
    Ok(sent)
}

/// A flood of SYNs from so many sources, from the client's place, so many a second at most; gives how many it were.
fn flood(tuples: u32, pace: Option<u32>, targets: &[SocketAddrV4]) -> Result<u32> {
    as_client(|| {
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..THREADS).map(|first| scope.spawn(move || share(first, tuples, pace, targets))).collect();
            let shares = threads.into_iter();
            shares.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).sum()
        })
    })
}

/// Connections that the kernels of the nodes track; none without that module.
fn tracked(lab: &Lab) -> Result<Vec<Option<u64>>> {
    lab.nodes.iter().map(|node| peers::tracked(&node.name)).collect()
}

/// Fails if the nodes track more connections than they did `before`.
fn check_tracked(lab: &Lab, before: &[Option<u64>]) -> Result<()> {
    let after = tracked(lab)?;
    figure!("connections tracked by the nodes: {before:?}, afterwards {after:?}");
    for (before, after) in before.iter().zip(&after) {
        let grown = after.unwrap_or_default().saturating_sub(before.unwrap_or_default());
        ensure!(grown <= TRACKED_MAX, "{grown} more connections are tracked");
    }
    Ok(())
}

/// The service with replies by the tunnel, on every node.
fn flooded(lab: &Lab) -> Vec<SocketAddrV4> {
    lab.nodes.iter().map(|node| SocketAddrV4::new(node.address, Back::Tunnel.port())).collect()
}

/// nftables, flooded like that, tracks a connection for each SYN.
fn peer_tracks_every_syn() -> Result<()> {
    let balancer = Balancer::start(Kind::Nftables)?;
    let before = balancer.tracked()?;
    let sent = flood(TUPLES_OF_PEERS, None, &[SocketAddrV4::new(BALANCER, peers::PORT)])?;
    let grown = balancer.tracked()? - before;
    figure!("nftables tracks {grown} connections more after {sent} SYNs");
    ensure!(grown > u64::from(sent) / 2, "the attack does not work on a peer");
    Ok(())
}

/// The flows of a thousand connections and of a flood in one table, of the kind and size of the mesh's own: what a balancer
/// with a single one has of them afterwards. A table that nobody uses here stands in.
fn single_table_forgets(lab: &Lab) -> Result<()> {
    let pin = lab.nodes[2].run_dir().join("bpf").join(version_folder()).join("shoal_sent6");
    let table = MapData::from_pin(pin)?;
    let size = table.info()?.max_entries();
    let mut table: HashMap<MapData, FlowKey<Ip6>, Sent> = Map::LruHashMap(table).try_into()?;
    // Of no protocol: nothing that comes in finds it.
    let key = |number: u32| FlowKey { src: Ip6::mapped(Be32::new(number)), ..FlowKey::default() };
    let live = (CONNECTIONS + IDLE) as u32;
    let all = live + size / 2 * 3;
    for number in 0..all {
        table.insert(key(number), Sent::default(), 0)?;
    }
    let left = (0..live).filter(|number| table.get(&key(*number), 0).is_ok()).count();
    figure!("one table of {size} flows has {left} of {live} after {} others", all - live);
    for number in 0..all {
        // Most of the early ones are forgotten.
        let _ = table.remove(&key(number));
    }
    ensure!(left < live as usize / 2, "the attack does not work on a peer");
    Ok(())
}

pub(crate) fn flood_of_syns_breaks_no_established_connection(lab: &Lab) -> Result<()> {
    single_table_forgets(lab)?;
    peer_tracks_every_syn()?;
    ways::create_web(lab, 3, &[])?;
    steady::allow_files()?;
    let targets: Vec<SocketAddr> = Way::all().flat_map(|way| way.targets(lab)).collect();
    let mut idle = as_client(|| {
        targets.iter().cycle().take(IDLE).map(|to| Connection::open(*to)).collect::<Result<Vec<_>>>()
    })?;
    let steady = Steady::start(&targets, CONNECTIONS, Duration::from_millis(100))?;
    let before = tracked(lab)?;
    let started = Instant::now();
    let sent = flood(TUPLES, None, &flooded(lab))?;
    let seconds = started.elapsed().as_secs_f64();
    let fates = steady.finish()?;
    let (requests, slowest, broken) = steady::sum(&fates);
    figure!("{sent} SYNs from as many sources in {seconds:.1} s: {:.0} a second", f64::from(sent) / seconds);
    figure!(
        "{} connections, {requests} requests meanwhile, the slowest {} ms; {} broken",
        fates.len(),
        slowest.as_millis(),
        broken.len()
    );
    ensure!(broken.is_empty(), "{broken:#?}");
    ensure!(sent >= TUPLES / 10 * 9, "too few SYNs to say anything");
    for (connection, answer) in &mut idle {
        let after = connection.ask().context("a connection that was silent")?;
        ensure!(after == *answer, "{after:?} instead of {answer:?}");
    }
    figure!("{} connections that were silent go on, with the same tasks", idle.len());
    check_tracked(lab, &before)
}

pub(crate) fn connections_come_about_during_a_flood(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 3, &[])?;
    let flooded = flooded(lab);
    let load = Load::start(&flooded, "/");
    let started = Instant::now();
    let sent = flood(TUPLES_AT_PACE, Some(PACE), &flooded)?;
    let seconds = started.elapsed().as_secs_f64();
    let opened = load.finish()?;
    let failed: Vec<&String> = opened.iter().filter_map(|request| request.error.as_ref()).collect();
    let rate = f64::from(sent) / seconds;
    figure!("beside {rate:.0} SYNs a second: {} connections opened, {} failed", opened.len(), failed.len());
    ensure!(failed.len() * 100 <= opened.len() && opened.len() > 100, "{failed:?}");
    Ok(())
}

/// The machine's limit of tracked connections.
const TRACKED_LIMIT: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// What it is lowered to, so that a short flood reaches it. The table keeps its buckets; in eight of them a kernel at its limit
/// looks for a connection to forget instead of the new one, and hardly finds any.
const TRACKED_FEW: &str = "512";
/// Connections that are tried while the table is full, and how long each may take.
const TRIES: usize = 8;
const PATIENCE: Duration = Duration::from_secs(1);
/// SYNs a second that keep it full: a kernel that is not flooded any more soon makes room.
const PACE_WHEN_FULL: u32 = 2000;

/// How many of [`TRIES`] connections to each of `targets` come about.
fn answered(targets: &[SocketAddrV4]) -> Result<usize> {
    as_client(|| {
        let tries = targets.iter().flat_map(|to| std::iter::repeat_n(SocketAddr::from(*to), TRIES));
        Ok(tries.filter(|to| client::connect_within(client::anywhere(*to), *to, PATIENCE).is_ok()).count())
    })
}

/// The same during a flood that goes on for as long as all tries can take.
fn answered_meanwhile(targets: &[SocketAddrV4]) -> Result<usize> {
    let tuples = PACE_WHEN_FULL * TRIES as u32;
    flood(TUPLES_OF_PEERS, None, targets)?;
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| flood(tuples, Some(PACE_WHEN_FULL), targets));
        let answered = answered(targets);
        flood.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        answered
    })
}

/// Sets the whole kernel, so for a virtual machine alone: few connections can be tracked, and a flood has them all.
pub(crate) fn full_table_of_tracked_connections_stops_others_and_not_the_mesh(lab: &Lab) -> Result<()> {
    lab::output(Command::new("modprobe").args(["-a", "nf_conntrack", "ip_vs", "ip_vs_rr"]))?;
    let former = std::fs::read_to_string(TRACKED_LIMIT).context(TRACKED_LIMIT)?;
    let limit = |value: &str| std::fs::write(TRACKED_LIMIT, value).context(TRACKED_LIMIT);
    let mut back = Command::new("sh");
    back.args(["-c", &format!("echo {} >{TRACKED_LIMIT}", former.trim())]);
    let undo = Undo::new(back);
    for kind in [Kind::Nftables, Kind::Ipvs] {
        limit(former.trim())?;
        let balancer = Balancer::start(kind)?;
        let to = [SocketAddrV4::new(BALANCER, peers::PORT)];
        let before = answered(&to)?;
        limit(TRACKED_FEW)?;
        let during = answered_meanwhile(&to)?;
        let tracked = balancer.tracked()?;
        figure!("{kind:?}: {before} of {TRIES} connections; with {tracked} tracked after a flood, {during}");
        if kind == Kind::Ipvs {
            let table = lab::output(lab::command_in("peer", "cat").arg("/proc/net/ip_vs_conn"))?;
            figure!("{kind:?} has {} connections in its own table", table.lines().count() - 1);
        }
        // The kernel forgets a connection that nobody answered yet where it finds one, so some get through.
        ensure!(before == TRIES && during <= TRIES * 3 / 4, "the attack does not work on a peer");
    }
    ways::create_web(lab, 2, &[])?;
    let before = tracked(lab)?;
    let during = answered_meanwhile(&flooded(lab))?;
    figure!("Shoal: {during} of {} connections during a flood", TRIES * lab.nodes.len());
    ensure!(during == TRIES * lab.nodes.len(), "connections fail");
    check_tracked(lab, &before)?;
    drop(undo);
    Ok(())
}
