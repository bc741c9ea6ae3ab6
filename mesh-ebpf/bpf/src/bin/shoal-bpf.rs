//! Shoal's programs in the kernel, one for each of a node's hooks.
#![no_std]
#![no_main]

use aya_ebpf::macros::{cgroup_sock_addr, classifier, xdp};
use aya_ebpf::programs::{SockAddrContext, TcContext, XdpContext};
use shoal_bpf::socket::{self, PROCEED};
use shoal_bpf::{hook, xdp as frame};

/// On each uplink: guards the VXLAN port, forwards published-port packets whose backend is on another node.
#[xdp]
pub fn uplink_xdp(ctx: XdpContext) -> u32 {
    frame::run(ctx)
}

/// On each uplink, behind [`uplink_xdp`] or instead of it: the same, and delivery to local tasks.
#[classifier]
pub fn uplink_ingress(ctx: TcContext) -> i32 {
    hook::uplink(ctx)
}

/// On the host side of each task's veth.
#[classifier]
pub fn from_task(ctx: TcContext) -> i32 {
    hook::task(ctx)
}

/// On the VXLAN device.
#[classifier]
pub fn from_overlay(ctx: TcContext) -> i32 {
    hook::overlay(ctx)
}

/// On `shoal0p`, the far side of the host's own interface to its tasks.
#[classifier]
pub fn from_host(ctx: TcContext) -> i32 {
    hook::host(ctx)
}

/// On the root of cgroup v2: a local process's `connect` on an IPv4 address.
#[cgroup_sock_addr(connect4)]
pub fn sock_connect4(ctx: SockAddrContext) -> i32 {
    socket::connect4(&ctx);
    PROCEED
}

/// The same, IPv6.
#[cgroup_sock_addr(connect6)]
pub fn sock_connect6(ctx: SockAddrContext) -> i32 {
    socket::connect6(&ctx);
    PROCEED
}

/// A local process's datagram to an IPv4 address.
#[cgroup_sock_addr(sendmsg4)]
pub fn sock_sendmsg4(ctx: SockAddrContext) -> i32 {
    socket::sendmsg4(&ctx);
    PROCEED
}

/// The same, IPv6.
#[cgroup_sock_addr(sendmsg6)]
pub fn sock_sendmsg6(ctx: SockAddrContext) -> i32 {
    socket::sendmsg6(&ctx);
    PROCEED
}

/// Tells a local process where a datagram comes from, IPv4.
#[cgroup_sock_addr(recvmsg4)]
pub fn sock_recvmsg4(ctx: SockAddrContext) -> i32 {
    socket::tell4(&ctx);
    PROCEED
}

/// The same, IPv6.
#[cgroup_sock_addr(recvmsg6)]
pub fn sock_recvmsg6(ctx: SockAddrContext) -> i32 {
    socket::tell6(&ctx);
    PROCEED
}

/// Tells a local process whom its socket is connected to, IPv4.
#[cgroup_sock_addr(getpeername4)]
pub fn sock_peername4(ctx: SockAddrContext) -> i32 {
    socket::tell4(&ctx);
    PROCEED
}

/// The same, IPv6.
#[cgroup_sock_addr(getpeername6)]
pub fn sock_peername6(ctx: SockAddrContext) -> i32 {
    socket::tell6(&ctx);
    PROCEED
}

/// The kernel gives the tracing helpers, and `bpf_skb_*` under some configurations, to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
