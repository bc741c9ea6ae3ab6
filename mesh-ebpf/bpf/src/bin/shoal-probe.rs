//! Programs that tests and benchmarks load beside the agent's, on the same pinned maps.
//!
//! BPF_PROG_TEST_RUN can't give a packet tunnel metadata, and with `repeat` it does not restore the packet between
//! runs; these programs do. None of them is part of the agent.
#![no_std]
#![no_main]

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_TX};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_xdp_adjust_head};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
use mesh_common::vxlan::ENCAPSULATION_BYTES;
use mesh_datapath::header::Ethernet;
use mesh_datapath::overlay::Arrival;
use mesh_datapath::packet::{Packet as _, Store as _};
use shoal_bpf::hook;
use shoal_bpf::tc::Skb;
use shoal_bpf::xdp::{self as frame, Frame};

/// Offset of the source address in an IPv4 packet.
const IP_SRC_OFFSET: usize = 26;
/// Offset of the source port behind an IPv4 header without options.
const SRC_PORT_OFFSET: usize = 34;

/// `from_overlay` with the VNI of `skb->cb[0]` and the VTEP of the other four.
#[classifier]
pub fn probe_overlay(ctx: TcContext) -> i32 {
    let mut packet = Skb::new(ctx);
    let cb = packet.ctx.cb();
    let arrival = Arrival { vni: cb[0], vtep: Ip6([cb[1], cb[2], cb[3], cb[4]].map(Be32::new)) };
    hook::arrived(&mut packet, &arrival)
}

/// The floor: a program that drops.
#[xdp]
pub fn floor_drop(_ctx: XdpContext) -> u32 {
    XDP_DROP
}

/// The floor: a program that sends the frame back with its Ethernet addresses exchanged.
#[xdp]
pub fn floor_tx(ctx: XdpContext) -> u32 {
    let mut frame = Frame::new(ctx);
    let Some(ethernet) = frame.load::<Ethernet>(0) else {
        return XDP_ABORTED;
    };
    let swapped = Ethernet { dst: ethernet.src, src: ethernet.dst, ..ethernet };
    match frame.store(0, &swapped) {
        Ok(()) => XDP_TX,
        Err(_) => XDP_ABORTED,
    }
}

/// What [`forward_hit`] adds to `uplink_xdp`: the encapsulation undone. (Growing first makes it the same pair of calls.)
#[xdp]
pub fn floor_adjust(ctx: XdpContext) -> u32 {
    // SAFETY: The context is the program's own.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(ENCAPSULATION_BYTES as i32)) } != 0 {
        return XDP_ABORTED;
    }
    shrink(&ctx)
}

/// `uplink_xdp` on a frame that is forwarded, which is then as before but for its Ethernet addresses.
#[xdp]
pub fn forward_hit(ctx: XdpContext) -> u32 {
    forward_and_undo(ctx)
}

/// [`forward_hit`], with another client address and port in each run: every packet is a new flow.
#[xdp]
pub fn forward_new(ctx: XdpContext) -> u32 {
    // SAFETY: A plain helper call.
    forward_from(ctx, unsafe { bpf_get_prandom_u32() })
}

/// [`forward_hit`], over 65,536 flows in random order.
#[xdp]
pub fn forward_wset(ctx: XdpContext) -> u32 {
    // SAFETY: A plain helper call.
    let random = unsafe { bpf_get_prandom_u32() };
    forward_from(ctx, random & 0xffff)
}

/// [`forward_hit`] for the flow with a number.
#[inline(always)]
fn forward_from(ctx: XdpContext, number: u32) -> u32 {
    let again = XdpContext::new(ctx.ctx);
    let mut frame = Frame::new(ctx);
    let addr = Be32::new(0x0a00_0000 | (number >> 16));
    let port = Be16::new(number as u16);
    if frame.store(IP_SRC_OFFSET, &addr).is_err() || frame.store(SRC_PORT_OFFSET, &port).is_err() {
        return XDP_ABORTED;
    }
    forward_and_undo(again)
}

#[inline(always)]
fn forward_and_undo(ctx: XdpContext) -> u32 {
    let again = XdpContext::new(ctx.ctx);
    match frame::run(ctx) {
        XDP_TX => shrink(&again),
        other => other,
    }
}

/// Takes the encapsulation off again.
#[inline(always)]
fn shrink(ctx: &XdpContext) -> u32 {
    // SAFETY: The context is the program's own.
    match unsafe { bpf_xdp_adjust_head(ctx.ctx, ENCAPSULATION_BYTES as i32) } {
        0 => XDP_TX,
        _ => XDP_ABORTED,
    }
}

/// As in `shoal-bpf`.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
