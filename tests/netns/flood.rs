//! A flood of packets that open connections and go no further, from more sources than the flow tables hold.

use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};

use crate::figure;
use crate::lab::{self, Lab, as_client};
use crate::steady::{self, Steady};
use crate::ways::{self, Back, Way};

/// Connections that live through it.
const CONNECTIONS: usize = 200;
/// Different sources that SYNs come from.
const TUPLES: u32 = 1_000_000;
/// Of these is the first, and every next one has the next address.
const FIRST_SOURCE: u32 = u32::from_be_bytes([10, 0, 0, 0]);
const THREADS: u32 = 2;
/// An end to the flood, on however slow a machine.
const LIMIT: Duration = Duration::from_secs(40);
/// By how much other work may make a node's table of tracked connections grow.
const TRACKED_MAX: u64 = 32;

/// IPv4 and TCP header of a SYN.
fn syn(src: u32, src_port: u16, to: SocketAddrV4) -> [u8; 40] {
    let mut packet = [0; 40];
    // The kernel fills in the length, the identification and the checksum of the IP header (raw(7)).
    packet[0] = 0x45;
    packet[8] = 64;
    packet[9] = 6;
    packet[12..16].copy_from_slice(&src.to_be_bytes());
    packet[16..20].copy_from_slice(&to.ip().octets());
    packet[20..22].copy_from_slice(&src_port.to_be_bytes());
    packet[22..24].copy_from_slice(&to.port().to_be_bytes());
    packet[24..28].copy_from_slice(&src.rotate_left(7).to_be_bytes());
    packet[32..36].copy_from_slice(&[0x50, 0x02, 0xff, 0xff]);
    // Of the pseudo header: protocol and length; the addresses stand before the TCP header already.
    let words = packet[12..].chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum::<u32>() + 6 + 20;
    let sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[36..38].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// Sends the SYNs of every `THREADS`th source from `first` on; gives how many it sent.
fn flood(first: u32, targets: &[SocketAddrV4]) -> Result<u32> {
    let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
    let started = Instant::now();
    let mut sent = 0;
    for (number, to) in (first..TUPLES).step_by(THREADS as usize).zip(targets.iter().cycle()) {
        let packet = syn(FIRST_SOURCE + number, 1024 + (number % 60_000) as u16, *to);
        match sendto(raw.as_raw_fd(), &packet, &SockaddrIn::from(*to), MsgFlags::empty()) {
            Ok(_) => sent += 1,
            // The queue is full: that one is lost.
            Err(Errno::ENOBUFS) => {}
            Err(error) => return Err(error).context("sending a SYN"),
        }
        if number % 1024 < THREADS && started.elapsed() > LIMIT {
            break;
        }
    }
    Ok(sent)
}

/// Connections that the kernel of a node tracks; none without that module.
fn tracked(lab: &Lab) -> Vec<Option<u64>> {
    let count = |node: &lab::Node| {
        let printed =
            lab::output(node.command("cat").arg("/proc/sys/net/netfilter/nf_conntrack_count")).ok()?;
        printed.trim().parse().ok()
    };
    lab.nodes.iter().map(count).collect()
}

pub(crate) fn flood_of_syns_breaks_no_established_connection(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 3, &[])?;
    let targets: Vec<SocketAddr> = Way::all().flat_map(|way| way.targets(lab)).collect();
    let steady = Steady::start(&targets, CONNECTIONS, Duration::from_millis(100))?;
    let before = tracked(lab);
    let flooded: Vec<SocketAddrV4> =
        lab.nodes.iter().map(|node| SocketAddrV4::new(node.address, Back::Tunnel.port())).collect();
    let started = Instant::now();
    let sent: u32 = as_client(|| {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|first| {
                    scope.spawn({
                        let flooded = &flooded;
                        move || flood(first, flooded)
                    })
                })
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<u32>>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).sum()
        })
    })?;
    let seconds = started.elapsed().as_secs_f64();
    let after = tracked(lab);
    let fates = steady.finish()?;
    let (requests, slowest, broken) = steady::sum(&fates);
    figure!("{sent} SYNs from as many sources in {seconds:.1} s: {:.0} a second", f64::from(sent) / seconds);
    figure!(
        "{} connections, {requests} requests meanwhile, the slowest {} ms; {} broken",
        fates.len(),
        slowest.as_millis(),
        broken.len()
    );
    figure!("connections tracked by the nodes: {before:?}, afterwards {after:?}");
    ensure!(broken.is_empty(), "{broken:#?}");
    ensure!(sent >= TUPLES / 10 * 9, "too few SYNs to say anything");
    for (before, after) in before.iter().zip(&after) {
        let grown = after.unwrap_or_default().saturating_sub(before.unwrap_or_default());
        ensure!(grown <= TRACKED_MAX, "{grown} more connections are tracked");
    }
    Ok(())
}
