//! Nanoseconds per packet of the XDP program, by BPF_PROG_TEST_RUN.
//!
//! Each round runs every case once, so that all see the same moods of the machine. A forwarded packet grows by its
//! encapsulation, which the probe takes off again before the next run: the cost of that pair of calls alone is
//! `floor_adjust`.
//!
//! The maps are those of a node under a table of one service, and of another under 10,000, as the agent fills them. All
//! tasks are on other nodes, whose next hop is known.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Result, ensure};
use etherparse::{Ethernet2Header, PacketBuilder, PacketBuilderStep, TcpHeader};
use mesh_agent::dataplane::Touched;

use super::cluster::{self, ADDRESS, ADDRESS6, FIRST_PORT};
use super::node::{Node, Probe};
use super::{Case, Unit};
use crate::packet::kernel::enter_namespaces;

/// Rounds, and packets in each.
const ROUNDS: usize = 15;
const PACKETS: u32 = 500_000;
/// Packets that open the flows of the working set: each of the 65,536 some eight times.
const OPENING: u32 = 1 << 19;

const XDP_DROP: u32 = 1;
const XDP_TX: u32 = 3;

const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 100);
const CLIENT6: &str = "2001:db8::100";
const CLIENT_PORT: u16 = 40_000;

/// What is measured: a program on a node, on the packet of a family.
struct Run {
    case: Case,
    program: &'static str,
    node: usize,
    frames: usize,
    /// What opens the flows that the program's packets belong to.
    opening: Option<u32>,
    /// Which of the frames is measured.
    frame: fn(&Frames) -> &[u8],
    /// What the program must return.
    code: u32,
}

/// Packets of one flow to the first service.
struct Frames {
    syn: Vec<u8>,
    ack: Vec<u8>,
}

impl Frames {
    fn of(frame: impl Fn(TcpHeader) -> Result<Vec<u8>>) -> Result<Self> {
        let header = TcpHeader::new(CLIENT_PORT, FIRST_PORT, 1_000, 64_000);
        let syn = TcpHeader { syn: true, ..header.clone() };
        Ok(Self { syn: frame(syn)?, ack: frame(TcpHeader { ack: true, ..header })? })
    }

    fn syn(&self) -> &[u8] {
        &self.syn
    }

    fn ack(&self) -> &[u8] {
        &self.ack
    }
}

/// Nodes and frames, by their places in [`run`].
const ONE: usize = 0;
const MANY: usize = 1;
const V4: usize = 0;
const V6: usize = 1;

/// Measures all cases.
pub fn run() -> Result<Vec<Case>> {
    let folder = enter_namespaces()?;
    let mut nodes = Vec::new();
    for (name, services) in [("one", 1), ("many", 10_000)] {
        let pins = folder.join(name);
        let mut node = Node::open(&pins)?;
        let table = cluster::table(services, 10)?;
        node.dataplane.change(&table, &Touched::all(), &cluster::local()?)?;
        let probe = Probe::load(&pins)?;
        probe.make_peers_known()?;
        nodes.push((node, probe));
    }
    let frames = [frames4()?, frames6()?];
    let mut runs = runs();
    for round in 0..=ROUNDS {
        for run in &mut runs {
            let (_, probe) = &mut nodes[run.node];
            let frames = &frames[run.frames];
            if let Some(packets) = run.opening {
                probe.repeat(run.program, &frames.syn, packets)?;
            }
            let (code, ns) = probe.repeat(run.program, (run.frame)(frames), PACKETS)?;
            let name = run.case.name;
            ensure!(code == run.code, "{name}: {} returned {code} instead of {}", run.program, run.code);
            // The first round warms up.
            if round > 0 {
                run.case.samples.push(ns);
            }
        }
    }
    Ok(runs.into_iter().map(|run| run.case).collect())
}

/// All cases, in the order in which they are run.
fn runs() -> Vec<Run> {
    let run = |name, program, node, frames| Run {
        case: Case::new(name, Unit::Ns),
        program,
        node,
        frames,
        opening: None,
        frame: Frames::ack,
        code: XDP_TX,
    };
    let hit = |name, node, frames| Run { opening: Some(1), ..run(name, "forward_hit", node, frames) };
    let wset = |name, node, frames| Run { opening: Some(OPENING), ..run(name, "forward_wset", node, frames) };
    let new = |name, node, frames| Run { frame: Frames::syn, ..run(name, "forward_new", node, frames) };
    vec![
        Run { code: XDP_DROP, ..run("floor_drop", "floor_drop", ONE, V4) },
        run("floor_tx", "floor_tx", ONE, V4),
        run("floor_adjust", "floor_adjust", ONE, V4),
        hit("forward_hit_v4", ONE, V4),
        hit("forward_hit_v6", ONE, V6),
        hit("forward_hit_10000_services", MANY, V4),
        wset("forward_wset_v4", ONE, V4),
        wset("forward_wset_v6", ONE, V6),
        wset("forward_wset_10000_services", MANY, V4),
        new("forward_new_v4", ONE, V4),
        new("forward_new_v6", ONE, V6),
        new("forward_new_10000_services", MANY, V4),
    ]
}

fn frames4() -> Result<Frames> {
    Frames::of(|header| {
        let builder = ethernet().ipv4(CLIENT.octets(), ADDRESS.octets(), 63).tcp_header(header);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, &[])?;
        Ok(bytes)
    })
}

fn frames6() -> Result<Frames> {
    let [client, node]: [Ipv6Addr; 2] = [CLIENT6.parse()?, ADDRESS6.parse()?];
    Frames::of(|header| {
        let builder = ethernet().ipv6(client.octets(), node.octets(), 63).tcp_header(header);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, &[])?;
        Ok(bytes)
    })
}

fn ethernet() -> PacketBuilderStep<Ethernet2Header> {
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
}
