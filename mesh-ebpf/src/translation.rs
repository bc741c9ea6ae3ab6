//! What is to be written into a packet before it goes on: decided first, written once.
//!
//! Reading, deciding and writing are three steps, with [`Work`] between them, because in the kernel each must fit a stack
//! of its own.

use mesh_common::addr::mac_of;
use mesh_common::be::Be16;
use mesh_common::counter::Counter;
use mesh_common::hash::Tuple;

use crate::fragment;
use crate::header::Ethernet;
use crate::icmp;
use crate::nat::{self, End};
use crate::packet::{Fault, Packet, Rewrite};
use crate::parse::{Parsed, QuotedAt, Unparsed};
use crate::related::{self, Quote};
use crate::tables::AddrTables;
use crate::verdict::{Action, Verdict};

/// What each step leaves for the next. As in [`Parsed`], everything has a value.
#[derive(Clone, Copy, Debug)]
pub struct Work<A> {
    /// The packet's facts, or those of the flow that it is about if it is an ICMP error.
    pub parsed: Parsed<A>,
    /// Its own ends: source and destination of its IP header.
    pub ends: (A, A),
    /// Its flow, or the one that it is about, if it has ports.
    tuple: Tuple<A>,
    /// What becomes of it.
    pub plan: Plan<A>,
}

impl<A: Quote> Work<A> {
    /// The work on a packet with these facts.
    pub fn new(parsed: Parsed<A>) -> Self {
        let ends = (parsed.src, parsed.dst);
        let plan = Plan { verdict: Verdict::PASS, translation: Translation::default(), writes: false };
        let mut work = Self { parsed, ends, tuple: tuple_of(&parsed), plan };
        work.plan.begin(&parsed, Verdict::PASS);
        work
    }

    /// Reads a packet of the network `vni`. Fails if it can't be: then it ends by `otherwise`.
    #[inline(always)]
    pub fn read(
        &mut self,
        packet: &impl Packet,
        tables: &impl AddrTables<A>,
        vni: u32,
        otherwise: Verdict,
    ) -> Result<(), Unparsed> {
        self.plan.end(otherwise);
        self.parsed = A::parse(packet)?;
        self.ends = (self.parsed.src, self.parsed.dst);
        related::follow(packet, &mut self.parsed);
        fragment::follow(tables, &mut self.parsed, vni);
        self.tuple = tuple_of(&self.parsed);
        self.plan.begin(&self.parsed, otherwise);
        Ok(())
    }

    /// Has the node that sent the packet say what can't be read of it. See [`fragment::be_told`].
    #[inline(always)]
    pub fn be_told(&mut self, packet: &impl Packet) {
        if fragment::be_told(packet, &mut self.parsed) {
            self.tuple = tuple_of(&self.parsed);
            self.plan.translation.ports = self.parsed.ports().unwrap_or_default();
        }
    }

    /// What a decision reads, and where it writes.
    #[inline(always)]
    pub fn parts(&mut self) -> Parts<'_, A> {
        let Self { parsed, ends, tuple, plan } = self;
        let tuple = parsed.ports().is_some().then_some(&*tuple);
        Parts { parsed, ends, tuple, plan }
    }
}

/// What a decision reads of the [`Work`], and where it writes.
#[derive(Debug)]
pub struct Parts<'w, A> {
    /// [`Work::parsed`].
    pub parsed: &'w Parsed<A>,
    /// [`Work::ends`].
    pub ends: &'w (A, A),
    /// The flow; `None` without ports.
    pub tuple: Option<&'w Tuple<A>>,
    /// [`Work::plan`].
    pub plan: &'w mut Plan<A>,
}

/// The flow of a packet; its ports are zero if it has none.
#[inline(always)]
fn tuple_of<A: Quote>(parsed: &Parsed<A>) -> Tuple<A> {
    let Parsed { src, dst, protocol, .. } = *parsed;
    let (src_port, dst_port) = parsed.ports().unwrap_or_default();
    Tuple { src, dst, src_port, dst_port, protocol }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug)]
pub struct Plan<A> {
    /// Where it goes.
    pub verdict: Verdict,
    /// What is to be written into it before.
    pub translation: Translation<A>,
    /// Whether anything is.
    pub writes: bool,
}

/// The ends that a packet is to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Translation<A> {
    /// Source.
    pub src: A,
    /// Destination.
    pub dst: A,
    /// Ports; meaningless where the packet has none.
    pub ports: (Be16, Be16),
    /// Its Ethernet header.
    pub frame: Frame,
}

/// The Ethernet header that a packet is to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Frame {
    /// Which.
    pub kind: FrameKind,
    /// The header, if it is to be [`FrameKind::Given`].
    pub header: Ethernet,
}

/// Which Ethernet header a packet is to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum FrameKind {
    /// The one that it has.
    #[default]
    Kept,
    /// From the endpoint that its new source is, to the one that its new destination is.
    Endpoints,
    /// A given one.
    Given,
}

impl Frame {
    /// As it is.
    pub const KEPT: Self = Self::of(FrameKind::Kept);
    /// From the endpoint that the packet's new source is, to the one that its new destination is.
    pub const ENDPOINTS: Self = Self::of(FrameKind::Endpoints);

    const fn of(kind: FrameKind) -> Self {
        Self { kind, header: Ethernet { dst: [0; 6], src: [0; 6], ethertype: Be16::new(0) } }
    }

    /// This one.
    #[inline(always)]
    pub const fn given(header: Ethernet) -> Self {
        Self { kind: FrameKind::Given, header }
    }
}

impl<A: Quote> Plan<A> {
    /// The plan for a packet that ends so unless something better is found: its ends as they are.
    #[inline(always)]
    fn begin(&mut self, parsed: &Parsed<A>, verdict: Verdict) {
        self.translation.src = parsed.src;
        self.translation.dst = parsed.dst;
        self.translation.ports = parsed.ports().unwrap_or_default();
        self.end(verdict);
    }

    /// Nothing is written; the packet ends so.
    #[inline(always)]
    pub fn end(&mut self, verdict: Verdict) {
        self.writes = false;
        self.verdict = verdict;
    }

    /// The ends of the translation are written, and this frame; then the packet goes so.
    #[inline(always)]
    pub fn go(&mut self, frame: Frame, verdict: Verdict) {
        self.writes = true;
        self.translation.frame = frame;
        self.verdict = verdict;
    }
}

impl<A> Translation<A> {
    /// The source is to be this.
    #[inline(always)]
    pub fn set_src(&mut self, src: A, port: Be16) {
        self.src = src;
        self.ports.0 = port;
    }

    /// The destination is to be this.
    #[inline(always)]
    pub fn set_dst(&mut self, dst: A, port: Be16) {
        self.dst = dst;
        self.ports.1 = port;
    }
}

/// Writes into a packet what was planned for it, and says where it goes.
#[inline(always)]
pub fn apply<A: Quote, P: Rewrite>(packet: &mut P, work: &Work<A>) -> Verdict {
    let Work { parsed, ends, plan: Plan { verdict, translation, writes }, .. } = work;
    if verdict.action() == Action::Echo {
        return icmp::answer_echo(packet, parsed).unwrap_or(Verdict::drop(Counter::DropProtocol));
    }
    if !writes {
        return *verdict;
    }
    let written = match parsed.quoted() {
        None => translate(packet, parsed, translation),
        Some(at) => translate_error(packet, parsed, *ends, at, translation),
    };
    match written.and_then(|()| write_frame(packet, translation)) {
        Ok(()) => *verdict,
        Err(fault) => fault.into(),
    }
}

#[inline(always)]
fn translate<A: Quote, P: Rewrite>(
    packet: &mut P,
    parsed: &Parsed<A>,
    to: &Translation<A>,
) -> Result<(), Fault> {
    nat::rewrite(packet, parsed, End::Src, to.src, to.ports.0)?;
    nat::rewrite(packet, parsed, End::Dst, to.dst, to.ports.1)
}

/// An ICMP error: its destination is the flow's, its source may be a router; the packet that it quotes went the other way.
#[inline(always)]
fn translate_error<A: Quote, P: Rewrite>(
    packet: &mut P,
    parsed: &Parsed<A>,
    (own_src, own_dst): (A, A),
    at: QuotedAt,
    to: &Translation<A>,
) -> Result<(), Fault> {
    let ports = parsed.ports();
    let (src_port, dst_port) = (ports.map(|(port, _)| port), ports.map(|(_, port)| port));
    let (src, dst) = ((parsed.src, src_port), (parsed.dst, dst_port));
    related::rewrite_quoted(packet, parsed.l4_offset, at, End::Src, dst, (to.dst, to.ports.1))?;
    related::rewrite_quoted(packet, parsed.l4_offset, at, End::Dst, src, (to.src, to.ports.0))?;
    // The error's own header: an ICMP packet without ports, whatever it is about.
    let own = parsed.as_icmp(own_src, own_dst, A::ICMP);
    let none = Be16::new(0);
    if own_src == parsed.src {
        nat::rewrite(packet, &own, End::Src, to.src, none)?;
    }
    nat::rewrite(packet, &own, End::Dst, to.dst, none)
}

#[inline(always)]
fn write_frame<A: Quote, P: Rewrite>(packet: &mut P, to: &Translation<A>) -> Result<(), Fault> {
    match to.frame.kind {
        FrameKind::Kept => Ok(()),
        FrameKind::Endpoints => {
            let header = Ethernet { dst: mac_of(to.dst), src: mac_of(to.src), ethertype: A::ETHERTYPE };
            packet.store(0, &header)
        }
        FrameKind::Given => packet.store(0, &to.frame.header),
    }
}
