//! The mesh beside plain routing, nftables and haproxy, from a client by one host in the middle to servers on three.
//!
//! All ways share the client, the switch, the programs and the kind of links; what differs is what the host in the
//! middle does, and that the mesh's servers are tasks, one veth further away than the others' servers, which run on
//! their hosts. Nothing of Shoal is on the other ways.
//!
//! Once with TC alone on links as veth makes them, and again with segmentation and checksums done before a link as for
//! a network card without offloads; once with native XDP, where all links carry an XDP program, the other ways' too,
//! because it takes a veth's offloads away from whatever passes.

use anyhow::Result;

use super::figures::{Case, Goal, Unit, show, show_goals};
use super::load::Load;
use super::place::Place;
use super::stage::{self, Offloads, Stage};
use super::ways::{MIDDLE, Others, SERVERS, Way};
use super::{Scale, shoal};
use crate::lab::{Host, Lab, Xdp};
use crate::sys;

/// What is measured of each way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Figure {
    Connections,
    Requests,
    Up,
    Down,
    P50,
    P99,
    WireUp,
    WireDown,
}

impl Figure {
    const ALL: [Self; 8] = [
        Self::Connections,
        Self::Requests,
        Self::Up,
        Self::Down,
        Self::P50,
        Self::P99,
        Self::WireUp,
        Self::WireDown,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Requests => "requests",
            Self::Up => "iperf3_up",
            Self::Down => "iperf3_down",
            Self::P50 => "request_p50",
            Self::P99 => "request_p99",
            Self::WireUp => "wire_iperf3_up",
            Self::WireDown => "wire_iperf3_down",
        }
    }

    fn unit(self) -> Unit {
        match self {
            Self::Connections | Self::Requests => Unit::PerS,
            Self::Up | Self::Down | Self::WireUp | Self::WireDown => Unit::GbitS,
            Self::P50 | Self::P99 => Unit::Us,
        }
    }

    /// What the mesh is to reach of plain routing.
    fn goal(self) -> Option<Goal> {
        match self {
            Self::Connections | Self::Up | Self::Down | Self::WireUp | Self::WireDown => {
                Some(Goal::AtLeast(0.9))
            }
            Self::P99 => Some(Goal::AtMost(1.3)),
            Self::Requests | Self::P50 => None,
        }
    }

    /// What the mesh is to reach of a way that it is to be ahead of.
    fn ahead(self) -> Goal {
        match self.unit() {
            Unit::Us => Goal::AtMost(1.0),
            _ => Goal::AtLeast(1.0),
        }
    }
}

/// A way, and what was measured of it, in the order of [`Figure::ALL`].
struct Measured {
    way: Way,
    cases: Vec<Case>,
}

impl Measured {
    fn new(links: &str, way: Way) -> Self {
        let name = |figure: Figure| format!("netns_{links}_{}_{}", figure.name(), way.name);
        let cases = Figure::ALL.into_iter().map(|figure| Case::new(name(figure), figure.unit())).collect();
        Self { way, cases }
    }

    fn case(&self, figure: Figure) -> &Case {
        &self.cases[figure as usize]
    }

    fn push(&mut self, figure: Figure, sample: f64) {
        self.cases[figure as usize].push(sample);
    }

    /// A figure over that of another way, with the goal that the mesh has of it.
    fn over(&self, other: &Self, figure: Figure) -> Case {
        let case = self.case(figure);
        case.over(other.case(figure), format!("{}_of_{}", case.name, other.way.name))
    }
}

/// Measures on a lab of four nodes that is up.
pub(super) fn run(lab: &Lab, scale: Scale) -> Result<Vec<Case>> {
    let native = lab.xdp == Xdp::Native;
    let links = if native { "xdp" } else { "tc" };
    let client = Place::of_host(&Host::client());
    let n1 = lab.node("n1")?;
    let mut stage = Stage::new()?;
    let others = Others::set_up(&mut stage, &client)?;
    shoal::ensure_attached(lab, if native { "xdp-native" } else { "tc" })?;
    let mesh = shoal::publish(&n1)?;
    if native {
        let pin = n1.bpffs().join("bench_pass");
        sys::bpf::pin_xdp_pass(&pin)?;
        for host in [MIDDLE].into_iter().chain(SERVERS.map(|(name, _, _)| name)) {
            stage::pass_by_xdp(host, &pin)?;
        }
    }

    let load = Load::new(client, scale.seconds, &stage)?;
    let mut ways = vec![Measured::new(links, Others::plain()), Measured::new(links, mesh)];
    if scale.all_ways {
        ways.extend([Others::nftables(), Others::haproxy()].map(|way| Measured::new(links, way)));
    }
    for Measured { way, .. } in &ways {
        let names = if way.name == "shoal" { ["n2", "n3", "n4"] } else { ["s1", "s2", "s3"] };
        load.await_servers(way.name, &way.http, &names)?;
        load.await_iperf3(way.name, way.iperf3)?;
    }
    println!(
        "netns, {links}: client -> switch -> middle -> switch -> 3 servers; {} rounds, the ways in turns\n{}",
        scale.rounds,
        load.commands()
    );
    let nodes = lab.nodes();
    let places: Vec<Place> = nodes.iter().map(Place::of_host).collect();
    let mut hosts: Vec<(&Place, String)> =
        places.iter().zip(nodes.iter().map(|node| node.name.clone())).collect();
    hosts.push((&others.middle, format!("shb-{MIDDLE}")));
    hosts.extend(others.servers.iter().zip(SERVERS.map(|(name, _, _)| format!("shb-{name}"))));
    let hosts: Vec<(&Place, &str)> = hosts.iter().map(|(place, port)| (*place, port.as_str())).collect();
    for turns in scale.turns(ways.len()) {
        if !native {
            stage::set_offloads(&hosts, Offloads::On)?;
        }
        for &way in &turns {
            measure(&mut ways[way], &load)?;
        }
        if !native && scale.all_ways {
            stage::set_offloads(&hosts, Offloads::Off)?;
            for &way in &turns {
                let measured = &mut ways[way];
                measured.push(Figure::WireUp, load.gigabits(measured.way.iperf3, false)?);
                measured.push(Figure::WireDown, load.gigabits(measured.way.iperf3, true)?);
            }
        }
    }
    Ok(report(&ways))
}

fn measure(measured: &mut Measured, load: &Load) -> Result<()> {
    measured.push(Figure::Connections, load.requests(&measured.way.http, true)?);
    measured.push(Figure::Requests, load.requests(&measured.way.http, false)?);
    measured.push(Figure::Up, load.gigabits(measured.way.iperf3, false)?);
    measured.push(Figure::Down, load.gigabits(measured.way.iperf3, true)?);
    let latencies = load.request_latencies(&measured.way.http)?;
    measured.push(Figure::P50, latencies.p50_us);
    measured.push(Figure::P99, latencies.p99_us);
    Ok(())
}

/// Shows the figures, the ratios and the goals; gives figures and ratios.
fn report(ways: &[Measured]) -> Vec<Case> {
    let [plain, mesh, others @ ..] = ways else { return Vec::new() };
    let figures: Vec<Figure> =
        Figure::ALL.into_iter().filter(|figure| plain.case(*figure).is_measured()).collect();
    let mut cases = Vec::new();
    for &figure in &figures {
        cases.extend(ways.iter().map(|measured| measured.case(figure).clone()));
    }
    show(&cases);
    let (mut ratios, mut goals) = (Vec::new(), Vec::new());
    for figure in figures {
        ratios.extend(ways[1..].iter().map(|measured| measured.over(plain, figure)));
        goals.extend(figure.goal().map(|goal| (mesh.over(plain, figure), goal)));
        for other in others {
            let goal = match (other.way.name, figure) {
                ("nftables", figure) => figure.ahead(),
                ("haproxy", Figure::Connections) => Goal::AtLeast(2.0),
                _ => continue,
            };
            let over = mesh.over(other, figure);
            ratios.push(over.clone());
            goals.push((over, goal));
        }
    }
    show(&ratios);
    show_goals(&goals);
    cases.extend(ratios);
    cases
}
