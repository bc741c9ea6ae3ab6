//! Where a packet goes next: the host's routes and neighbours; for another node, asked once a second.

use core::ffi::c_void;
use core::mem::MaybeUninit;

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup, bpf_redir_neigh,
};
use aya_ebpf::helpers::generated;
use mesh_common::addr::{Address, Ip6};
use mesh_common::be::Be32;
use mesh_common::map::{NEXT_HOP_TTL_NS, Peer};
use mesh_datapath::tables::Tables as _;

use crate::maps::{Maps, now_ns, update_peer};

/// Any length that surely fits: it makes the kernel report the route's MTU.
const SHORT: u16 = 20;

/// What the host's routes say of a destination.
pub struct Route<A> {
    /// The interface.
    pub ifindex: u32,
    /// The next hop's address: the destination itself, or a gateway.
    pub next_hop: A,
    /// The next hop's and the interface's Ethernet addresses, if the neighbour is resolved.
    pub frame: Option<Frame>,
    /// MTU of the route, bytes; meaningless while the neighbour is unresolved.
    pub mtu: u16,
}

/// The Ethernet addresses of a next hop and of the interface that leads there.
type Frame = ([u8; 6], [u8; 6]);

/// A family as the kernel's route helpers take it.
pub trait Routed: Address {
    /// `AF_INET` or `AF_INET6`.
    const AF: u8;

    /// Writes the ends of a packet.
    fn ask(params: &mut bpf_fib_lookup, src: Self, dst: Self);
    /// Reads the next hop.
    fn answer(params: &bpf_fib_lookup) -> Self;
    /// Writes the next hop of a redirect.
    fn redirect(params: &mut bpf_redir_neigh, next_hop: Self);
}

impl Routed for Be32 {
    const AF: u8 = 2;

    #[inline(always)]
    fn ask(params: &mut bpf_fib_lookup, src: Self, dst: Self) {
        params.__bindgen_anon_3.ipv4_src = src.raw();
        params.__bindgen_anon_4.ipv4_dst = dst.raw();
    }

    #[inline(always)]
    fn answer(params: &bpf_fib_lookup) -> Self {
        // SAFETY: Every bit pattern is an address.
        Self::from_bytes(unsafe { params.__bindgen_anon_4.ipv4_dst }.to_ne_bytes())
    }

    #[inline(always)]
    fn redirect(params: &mut bpf_redir_neigh, next_hop: Self) {
        params.__bindgen_anon_1.ipv4_nh = next_hop.raw();
    }
}

impl Routed for Ip6 {
    const AF: u8 = 10;

    #[inline(always)]
    fn ask(params: &mut bpf_fib_lookup, src: Self, dst: Self) {
        params.__bindgen_anon_3.ipv6_src = src.0.map(Be32::raw);
        params.__bindgen_anon_4.ipv6_dst = dst.0.map(Be32::raw);
    }

    #[inline(always)]
    fn answer(params: &bpf_fib_lookup) -> Self {
        // SAFETY: Every bit pattern is an address.
        let words = unsafe { params.__bindgen_anon_4.ipv6_dst };
        Self(words.map(|word| Be32::from_bytes(word.to_ne_bytes())))
    }

    #[inline(always)]
    fn redirect(params: &mut bpf_redir_neigh, next_hop: Self) {
        params.__bindgen_anon_1.ipv6_nh = next_hop.0.map(Be32::raw);
    }
}

/// A question to the host's routes, yet without ends.
#[inline(always)]
fn blank(params: &mut MaybeUninit<bpf_fib_lookup>, ifindex: u32) -> &mut bpf_fib_lookup {
    const WORDS: usize = size_of::<bpf_fib_lookup>() / size_of::<u32>();
    let words: *mut u32 = params.as_mut_ptr().cast();
    for word in 0..WORDS {
        // Volatile: LLVM would make it a call of `memset`, which takes of the stack as any other.
        // SAFETY: The struct consists of as many words.
        unsafe { words.add(word).write_volatile(0) };
    }
    // SAFETY: All-zero bytes are a value of this C struct.
    let params = unsafe { params.assume_init_mut() };
    params.ifindex = ifindex;
    params.__bindgen_anon_1.tot_len = SHORT;
    params
}

/// Writes the ends and the family.
#[inline(always)]
fn ask<A: Routed>(params: &mut bpf_fib_lookup, src: A, dst: A) {
    params.family = A::AF;
    A::ask(params, src, dst);
}

/// Has the host's routes answer in place of the question; `None` without a route, and no addresses while the neighbour is
/// unresolved.
#[inline(always)]
fn answer(ctx: *mut c_void, params: &mut bpf_fib_lookup) -> Option<Option<Frame>> {
    let size = size_of::<bpf_fib_lookup>() as i32;
    // SAFETY: The context is the program's own, and the parameters outlive the call.
    let result = unsafe { generated::bpf_fib_lookup(ctx, &raw mut *params, size, 0) };
    match result as u32 {
        BPF_FIB_LKUP_RET_SUCCESS => Some(Some((params.dmac, params.smac))),
        BPF_FIB_LKUP_RET_NO_NEIGH => Some(None),
        _ => None,
    }
}

/// MTU of the route that the host's routes answered with, bytes.
#[inline(always)]
fn mtu(answered: &bpf_fib_lookup) -> u16 {
    // SAFETY: Every bit pattern is a number.
    unsafe { answered.__bindgen_anon_1.mtu_result }
}

/// Asks the host's routes, as for a packet from `src` to `dst` that came in by `ifindex`.
#[inline(always)]
pub fn route<A: Routed>(ctx: *mut c_void, ifindex: u32, src: A, dst: A) -> Option<Route<A>> {
    let mut params = MaybeUninit::uninit();
    let params = blank(&mut params, ifindex);
    ask(params, src, dst);
    let frame = answer(ctx, params)?;
    Some(Route { ifindex: params.ifindex, next_hop: A::answer(params), frame, mtu: mtu(params) })
}

/// MTU of an interface, bytes.
#[inline(always)]
pub fn link_mtu(ctx: *mut c_void, ifindex: u32) -> Option<u32> {
    let mut mtu = 0_u32;
    // SAFETY: The context is the program's own, and the number outlives the call.
    let result = unsafe { generated::bpf_check_mtu(ctx, ifindex, &raw mut mtu, 0, 0) };
    // Above zero: the packet is longer, which is nothing to the question.
    (result >= 0).then_some(mtu)
}

/// The peer in `slot` with its next hop; `None` while the neighbour is unresolved, or without a route.
#[inline(always)]
pub fn resolve(ctx: *mut c_void, ifindex: u32, slot: u32) -> Option<&'static Peer> {
    let peer = Maps.peer(slot)?;
    if now_ns() < peer.expires_ns || ask_again(ctx, ifindex, slot) { Some(peer) } else { None }
}

/// Asks for a peer's next hop, once the former answer has expired; `false` if there is none. A function of its own in the
/// kernel: every other packet of the second has the registers for itself.
#[inline(never)]
fn ask_again(ctx: *mut c_void, ifindex: u32, slot: u32) -> bool {
    let (Some(config), Some(peer)) = (Maps.config(), Maps.peer(slot)) else { return false };
    // Asked in one place, and written in place: on Linux 6.1 this and what calls it only just fit the stack.
    let mut params = MaybeUninit::uninit();
    let params = blank(&mut params, ifindex);
    let encrypted = peer.vtep.is_wireguard();
    match (config.vtep.to_mapped(), peer.vtep.to_mapped()) {
        (Some(src), Some(dst)) => ask(params, src, dst),
        _ => ask(params, config.vtep_towards(peer), peer.vtep),
    }
    let Some(Some((next_hop, source))) = answer(ctx, params) else { return false };
    update_peer(slot, |peer| {
        peer.ifindex = params.ifindex;
        peer.next_hop = next_hop;
        peer.source = source;
        // Nobody outside can tell the kernel anything of the ways through WireGuard.
        peer.mtu = if encrypted { mtu(params) } else { mtu(params).max(config.path_mtu_min) };
        peer.expires_ns = now_ns() + NEXT_HOP_TTL_NS;
    });
    true
}
