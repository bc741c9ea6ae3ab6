//! The XDP context as a packet, and the program on it.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::generated::bpf_xdp_load_bytes;
use aya_ebpf::helpers::{bpf_redirect, bpf_xdp_adjust_head};
use aya_ebpf::programs::XdpContext;
use mesh_common::addr::{Address as _, Ip6};
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::map::{Config, EXAMPLE_PERIOD_NS};
use mesh_datapath::encap::{Inner, decapsulate, encapsulate, fits, fits_unpacked, mesh_reply, reply_within};
use mesh_datapath::header::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet};
use mesh_datapath::hook::drops_in_xdp;
use mesh_datapath::packet::{Fault, Packet, Resize, Store};
use mesh_datapath::parse::{Fragment, parse_ethernet};
use mesh_datapath::tables::{AddrTables, Tables as _};
use mesh_datapath::uplink::{Decision, Remote, decide};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::bounds;
use crate::maps::{self, Maps, count};
use crate::next_hop::{self, Routed};

/// A packet in a driver's buffer.
pub struct Frame {
    ctx: XdpContext,
}

/// Forwards what goes on to another node, and what comes back from one; everything else is for the stack, and so for TC.
#[inline(always)]
pub fn run(ctx: XdpContext) -> u32 {
    let frame = Frame::new(ctx);
    let ctx = frame.ctx.ctx;
    match parse_ethernet(&frame) {
        Ok(ethernet) if ethernet.ethertype == ETHERTYPE_IPV4 => match run_ipv4(ctx) {
            TUNNEL => reply_ipv4(ctx),
            code => code,
        },
        Ok(ethernet) if ethernet.ethertype == ETHERTYPE_IPV6 => match run_ipv6(ctx) {
            TUNNEL => reply_ipv6(ctx),
            code => code,
        },
        _ => XDP_PASS,
    }
}

/// What [`run_ipv4`] and [`run_ipv6`] return for VXLAN from another node.
const TUNNEL: u32 = u32::MAX;

// Functions of their own in the kernel: their stacks are not added up.

#[inline(never)]
fn run_ipv4(ctx: *mut xdp_md) -> u32 {
    of_family::<Be32>(Frame::new(XdpContext::new(ctx)))
}

#[inline(never)]
fn run_ipv6(ctx: *mut xdp_md) -> u32 {
    of_family::<Ip6>(Frame::new(XdpContext::new(ctx)))
}

#[inline(never)]
fn reply_ipv4(ctx: *mut xdp_md) -> u32 {
    reply::<Be32>(Frame::new(XdpContext::new(ctx)))
}

#[inline(never)]
fn reply_ipv6(ctx: *mut xdp_md) -> u32 {
    reply::<Ip6>(Frame::new(XdpContext::new(ctx)))
}

#[inline(always)]
fn of_family<A: Inner + Routed>(mut frame: Frame) -> u32
where
    Maps: AddrTables<A>,
{
    let Some(config) = Maps.config() else {
        return XDP_PASS;
    };
    let Ok(parsed) = A::parse(&frame) else {
        return XDP_PASS;
    };
    // Fragments are for TC, which knows their ports.
    if parsed.fragment != Fragment::Whole {
        return XDP_PASS;
    }
    let Some(tuple) = parsed.tuple() else {
        return XDP_PASS;
    };
    // What claims to come from WireGuard is for TC to drop.
    if parsed.src.is_wireguard() {
        return XDP_PASS;
    }
    match decide::<A>(&Maps, config, &parsed, &tuple) {
        Decision::Remote(remote) => forward::<A>(&mut frame, config, &remote),
        Decision::Tunnel => TUNNEL,
        Decision::Refuse(reason) if drops_in_xdp(reason) => {
            count(reason);
            frame.exemplify(reason);
            XDP_DROP
        }
        Decision::Pass | Decision::Local(_) | Decision::Search(_) | Decision::Refuse(_) => XDP_PASS,
    }
}

/// Sends the mesh reply that is inside a packet of the family `O`, if it is one, on to the client.
#[inline(always)]
fn reply<O: Inner>(mut frame: Frame) -> u32 {
    let Some(config) = Maps.config() else {
        return XDP_PASS;
    };
    let Ok(outer) = O::parse(&frame) else {
        return XDP_PASS;
    };
    match reply_within(&frame, &outer) {
        Some((ETHERTYPE_IPV4, around)) => reply_of::<Be32>(&mut frame, config, around),
        Some((ETHERTYPE_IPV6, around)) => reply_of::<Ip6>(&mut frame, config, around),
        _ => XDP_PASS,
    }
}

#[inline(always)]
fn reply_of<A: Inner + Routed>(frame: &mut Frame, config: &Config, around: usize) -> u32
where
    Maps: AddrTables<A>,
{
    let Some(reply) = mesh_reply::<A>(frame, &Maps, config, around) else {
        return XDP_PASS;
    };
    let Some(route) = next_hop::route(frame.ctx.as_ptr(), frame.ingress_ifindex(), reply.src, reply.dst)
    else {
        return XDP_PASS;
    };
    // As in `forward`: TC sends what XDP can't.
    let fitting = route.frame.filter(|_| fits_unpacked(frame.len(), around, route.mtu));
    let Some((next_hop, source)) = fitting else {
        return XDP_PASS;
    };
    if decapsulate::<A, _>(frame, around, next_hop, source).is_err() {
        count(Counter::DropRewriteFailed);
        return XDP_DROP;
    }
    count(Counter::MeshReplied);
    send(frame, route.ifindex)
}

#[inline(always)]
fn forward<A: Inner>(frame: &mut Frame, config: &Config, remote: &Remote) -> u32 {
    // Without a next hop, TC sends the packet through the VXLAN device, and the kernel finds the neighbour.
    let ctx = frame.ctx.as_ptr();
    let Some(peer) = next_hop::resolve(ctx, frame.ingress_ifindex(), remote.peer) else {
        return XDP_PASS;
    };
    // TC fragments what is too large, or tells its sender; and has encrypted what is to be.
    if peer.vtep.is_wireguard() || !fits(frame.len(), peer.mtu, config.vtep.family()) {
        return XDP_PASS;
    }
    if encapsulate::<A, _>(frame, config, peer, remote).is_err() {
        count(Counter::DropRewriteFailed);
        return XDP_DROP;
    }
    count(Counter::MeshForwarded);
    send(frame, peer.ifindex)
}

/// Out of the interface that the frame came in by, or of another one.
#[inline(always)]
fn send(frame: &Frame, ifindex: u32) -> u32 {
    if ifindex == frame.ingress_ifindex() {
        return XDP_TX;
    }
    // SAFETY: A plain helper call.
    unsafe { bpf_redirect(ifindex, 0) as u32 }
}

impl Frame {
    /// The packet of a program's context.
    #[inline(always)]
    pub fn new(ctx: XdpContext) -> Self {
        Self { ctx }
    }

    #[inline(always)]
    fn ingress_ifindex(&self) -> u32 {
        self.ctx.ingress_ifindex() as u32
    }

    /// Keeps the packet's beginning as the last example of a counter, unless there is a young one.
    #[inline(never)]
    fn exemplify(&self, counter: Counter) {
        let Some(example) = maps::example(counter, EXAMPLE_PERIOD_NS) else { return };
        let len = self.len();
        // Not zero, which the helper doesn't take; Linux 6.1's verifier learns nothing from a comparison with zero itself.
        let head_len = bounds::forgotten(len).clamp(Ethernet::LEN as u32, size_of_val(&example.head) as u32);
        example.counter = counter as u32;
        example.ifindex = self.ingress_ifindex();
        example.len = len;
        example.head_len = head_len;
        // SAFETY: `head` has room for `head_len` bytes, and the context is the program's own.
        unsafe { bpf_xdp_load_bytes(self.ctx.ctx, 0, (&raw mut example.head).cast(), head_len) };
        maps::tell(example);
    }

    /// A pointer to a `T` inside the packet.
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        bounds::at(self.ctx.data(), self.ctx.data_end(), offset)
    }
}

impl Packet for Frame {
    #[inline(always)]
    fn len(&self) -> u32 {
        (self.ctx.data_end() - self.ctx.data()) as u32
    }

    #[inline(always)]
    fn load<T: FromBytes + Immutable + KnownLayout + Copy>(&self, offset: usize) -> Option<T> {
        // SAFETY: `at` proved that the bytes are inside the packet, and any bytes are a `T`.
        self.at::<T>(offset).map(|value| unsafe { bounds::read(value) })
    }
}

impl Store for Frame {
    #[inline(always)]
    fn store<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Result<(), Fault> {
        let to = self.at::<T>(offset).ok_or(Fault)?;
        // SAFETY: `at` proved that the bytes are inside the packet, which nobody else has while the program runs.
        unsafe { core::ptr::copy_nonoverlapping(value, to, 1) };
        Ok(())
    }
}

impl Resize for Frame {
    #[inline(always)]
    fn grow(&mut self, bytes: u32) -> Result<(), Fault> {
        self.move_front(-(bytes as i32))
    }

    #[inline(always)]
    fn shrink(&mut self, bytes: u32) -> Result<(), Fault> {
        self.move_front(bytes as i32)
    }
}

impl Frame {
    #[inline(always)]
    fn move_front(&mut self, bytes: i32) -> Result<(), Fault> {
        // SAFETY: The context is the program's own.
        match unsafe { bpf_xdp_adjust_head(self.ctx.ctx, bytes) } {
            0 => Ok(()),
            _ => Err(Fault),
        }
    }
}
