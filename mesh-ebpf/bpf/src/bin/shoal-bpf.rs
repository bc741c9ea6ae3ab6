//! Shoal's programs in the kernel, one for each of a node's hooks.
#![no_std]
#![no_main]

use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use mesh_datapath::{host, overlay, task, uplink};

use shoal_bpf::maps::Maps;
use shoal_bpf::tc::Skb;
use shoal_bpf::{act, xdp as frame};

/// On each uplink: guards the VXLAN port, forwards published-port packets whose backend is on another node.
#[xdp]
pub fn uplink_xdp(ctx: XdpContext) -> u32 {
    frame::run(ctx)
}

/// On each uplink, behind [`uplink_xdp`] or instead of it: the same, and delivery to local tasks.
#[classifier]
pub fn uplink_ingress(ctx: TcContext) -> i32 {
    let mut packet = Skb::new(ctx);
    let verdict = uplink::from_uplink(&mut packet, &Maps);
    act::carry_out(&mut packet, verdict)
}

/// On the host side of each task's veth.
#[classifier]
pub fn from_task(ctx: TcContext) -> i32 {
    let mut packet = Skb::new(ctx);
    let ifindex = packet.ifindex();
    let verdict = task::from_task(&mut packet, &Maps, ifindex);
    act::carry_out(&mut packet, verdict)
}

/// On the VXLAN device.
#[classifier]
pub fn from_overlay(ctx: TcContext) -> i32 {
    let mut packet = Skb::new(ctx);
    let verdict = match packet.arrival() {
        Some(arrival) => overlay::from_overlay(&mut packet, &Maps, arrival),
        None => act::NO_TUNNEL,
    };
    act::carry_out(&mut packet, verdict)
}

/// On `shoal0p`, the far side of the host's own interface to its tasks.
#[classifier]
pub fn from_host(ctx: TcContext) -> i32 {
    let mut packet = Skb::new(ctx);
    let verdict = host::from_host(&mut packet, &Maps);
    act::carry_out(&mut packet, verdict)
}

/// The kernel gives the tracing helpers, and `bpf_skb_*` under some configurations, to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
