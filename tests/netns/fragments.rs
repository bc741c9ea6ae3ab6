//! Fragments of datagrams that never become whole.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etherparse::{IpFragOffset, IpNumber, Ipv4Header};

use crate::client;
use crate::figure;
use crate::lab::{CLIENT, Lab, as_client};
use crate::peers::{self, BALANCER, Balancer, Kind};
use crate::raw::Sender;
use crate::ways::{self, Back, Family, Way};

/// Of datagrams without end, to the nodes: more than a hundred times what the table of fragments holds.
const FIRST_FRAGMENTS: u32 = 1_000_000;
/// How many of them make a peer fall.
const FIRST_FRAGMENTS_OF_PEERS: u32 = 20_000;
/// A datagram of six fragments, bytes.
const DATAGRAM: usize = 8000;
/// Tries at it.
const TRIES: usize = 20;
const PATIENCE: Duration = Duration::from_millis(300);

/// The first fragment of a datagram whose others don't come.
fn first_fragment(number: u32, to: SocketAddrV4) -> Result<Vec<u8>> {
    let source = Ipv4Addr::from_bits(u32::from_be_bytes([10, 1, 0, 0]) + number / 4096).octets();
    let data = [0; 64];
    let mut header = Ipv4Header::new(data.len() as u16, 64, IpNumber::UDP, source, to.ip().octets())?;
    header.identification = (number % 4096 + 1) as u16;
    header.more_fragments = true;
    header.fragment_offset = IpFragOffset::ZERO;
    let mut packet = Vec::new();
    header.write(&mut packet)?;
    packet.extend(40_000_u16.to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    packet.extend((DATAGRAM as u16).to_be_bytes());
    packet.extend(&data[6..]);
    Ok(packet)
}

fn flood(count: u32, targets: &[SocketAddrV4]) -> Result<u32> {
    as_client(|| {
        let sender = Sender::open()?;
        let mut sent = 0;
        for (number, to) in (0..count).zip(targets.iter().cycle()) {
            sent += u32::from(sender.send(&first_fragment(number, *to)?, *to.ip())?);
        }
        Ok(sent)
    })
}

/// Whether a datagram of so many bytes comes back.
fn echoed(to: SocketAddr, len: usize) -> bool {
    let payload: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
    as_client(|| client::udp_within(client::anywhere(to), to, &payload, PATIENCE)).is_ok()
}

/// Datagrams in fragments that came back from a service while another one was flooded: how many of how many.
fn echoed_meanwhile(
    targets: &[SocketAddr],
    work: impl FnOnce() -> Result<u32>,
) -> Result<(u32, usize, usize)> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            let (mut tried, mut came) = (0, 0);
            for to in targets.iter().cycle().take_while(|_| !over.load(Ordering::Relaxed)) {
                tried += 1;
                came += usize::from(echoed(*to, DATAGRAM));
            }
            (tried, came)
        });
        let sent = work();
        over.store(true, Ordering::Relaxed);
        let (tried, came) = others.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok((sent?, tried, came))
    })
}

pub(crate) fn fragments_without_end_keep_no_others_out(lab: &Lab) -> Result<()> {
    {
        let _balancer = Balancer::start(Kind::Nftables)?;
        let to = SocketAddrV4::new(BALANCER, peers::PORT);
        let before = echoed(to.into(), DATAGRAM);
        let sent = flood(FIRST_FRAGMENTS_OF_PEERS, &[to])?;
        let came = (0..TRIES / 2).filter(|_| echoed(to.into(), DATAGRAM)).count();
        figure!(
            "nftables, after {sent} first fragments: {came} of {} fragmented datagrams come back",
            TRIES / 2
        );
        ensure!(before && came < TRIES / 4, "the attack does not work on a peer");
    }
    ways::create_web(lab, 2, &[])?;
    let flooded: Vec<SocketAddrV4> =
        lab.nodes.iter().map(|node| SocketAddrV4::new(node.address, Back::Tunnel.port())).collect();
    let other = Way { family: Family::V4, back: Back::Direct };
    let others = other.targets(lab);
    let started = Instant::now();
    let (sent, tried, came) = echoed_meanwhile(&others, || flood(FIRST_FRAGMENTS, &flooded))?;
    let seconds = started.elapsed().as_secs_f32();
    figure!(
        "{sent} first fragments to one service in {seconds:.1} s: meanwhile {came} of {tried} fragmented datagrams came \
         back from another"
    );
    let targets = others.iter().cycle().take(TRIES);
    let after = targets.filter(|to| echoed(**to, DATAGRAM)).count();
    figure!("afterwards {after} of {TRIES}");
    ensure!(after == TRIES, "the other service's fragments are lost");
    ensure!(tried > 10 && came * 10 >= tried * 9, "the other service's fragments are lost meanwhile");
    for to in &flooded {
        let source = SocketAddrV4::new(CLIENT, 0);
        as_client(|| client::http(source, *to, "/"))?;
        ensure!(echoed((*to).into(), 100), "{to} does not answer whole datagrams");
    }
    figure!("the flooded service answers connections and whole datagrams by every node");
    Ok(())
}
