//! The XDP context as a packet, and the program on it.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::helpers::{bpf_redirect, bpf_xdp_adjust_head};
use aya_ebpf::programs::XdpContext;
use mesh_common::be::Be16;
use mesh_common::counter::Counter;
use mesh_datapath::checksum;
use mesh_datapath::encap::{decapsulate, encapsulate, fits, fits_unpacked, mesh_reply};
use mesh_datapath::packet::{Fault, Field, Packet, Resize, Rewrite};
use mesh_datapath::parse::Parsed;
use mesh_datapath::tables::Tables as _;
use mesh_datapath::uplink::{Decision, Remote, decide};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::bounds;
use crate::maps::{Maps, count};
use crate::next_hop;

/// A packet in a driver's buffer.
pub struct Frame {
    ctx: XdpContext,
}

/// Forwards what goes on to another node, and what comes back from one; everything else is for the stack, and so for TC.
#[inline(always)]
pub fn run(ctx: XdpContext) -> u32 {
    let mut frame = Frame::new(ctx);
    match decide(&frame, &Maps) {
        Decision::Pass | Decision::Local(_) => XDP_PASS,
        Decision::Drop(reason) => {
            count(reason);
            XDP_DROP
        }
        Decision::Remote(remote) => forward(&mut frame, &remote),
        Decision::Tunnel(outer) => reply(&mut frame, &outer),
    }
}

/// Sends a mesh reply on to the client.
#[inline(always)]
fn reply(frame: &mut Frame, outer: &Parsed) -> u32 {
    let Some(reply) = mesh_reply(frame, &Maps, outer) else {
        return XDP_PASS;
    };
    let Some(route) = next_hop::route(frame.ctx.as_ptr(), frame.ingress_ifindex(), reply.src, reply.dst)
    else {
        return XDP_PASS;
    };
    // As in `forward`: TC sends what XDP can't.
    let Some((next_hop, source)) = route.frame.filter(|_| fits_unpacked(frame.len(), route.mtu)) else {
        return XDP_PASS;
    };
    if decapsulate(frame, next_hop, source).is_err() {
        count(Counter::DropRewriteFailed);
        return XDP_DROP;
    }
    count(Counter::MeshReplied);
    send(frame, route.ifindex)
}

#[inline(always)]
fn forward(frame: &mut Frame, remote: &Remote) -> u32 {
    let Some(config) = Maps.config() else {
        return XDP_PASS;
    };
    // Without a next hop, TC sends the packet through the VXLAN device, and the kernel finds the neighbour.
    let Some(peer) = next_hop::resolve(frame.ctx.as_ptr(), frame.ingress_ifindex(), remote.peer, config.vtep)
    else {
        return XDP_PASS;
    };
    if !fits(frame.len(), peer.mtu) {
        return XDP_PASS;
    }
    if encapsulate(frame, config, &peer, remote).is_err() {
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

    /// A pointer to a `T` inside the packet.
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        bounds::at(self.ctx.data(), self.ctx.data_end(), offset)
    }

    #[inline(always)]
    fn patch(&mut self, offset: usize, change: impl FnOnce(Be16) -> Be16) -> Result<(), Fault> {
        let checksum = self.load::<Be16>(offset).ok_or(Fault)?;
        self.store(offset, &change(checksum))
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
        self.at::<T>(offset).map(|value| unsafe { value.read_unaligned() })
    }
}

impl Rewrite for Frame {
    #[inline(always)]
    fn store<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Result<(), Fault> {
        let to = self.at::<T>(offset).ok_or(Fault)?;
        // SAFETY: `at` proved that the bytes are inside the packet, which nobody else has while the program runs.
        unsafe { core::ptr::copy_nonoverlapping(value, to, 1) };
        Ok(())
    }

    #[inline(always)]
    fn patch_ip_checksum(&mut self, offset: usize, from: u32, to: u32) -> Result<(), Fault> {
        self.patch(offset, |old| checksum::patch(old, from, to))
    }

    #[inline(always)]
    fn patch_l4_checksum(
        &mut self,
        offset: usize,
        from: u32,
        to: u32,
        _field: Field,
        udp: bool,
    ) -> Result<(), Fault> {
        self.patch(offset, |old| checksum::patch_l4(old, from, to, udp))
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
