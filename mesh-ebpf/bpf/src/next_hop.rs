//! Where a packet goes next: the host's routes and neighbours; for another node, asked once a second.

use core::ffi::c_void;

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
    /// MTU of the route, bytes.
    pub mtu: u16,
}

/// The Ethernet addresses of a next hop and of the interface that leads there.
type Frame = ([u8; 6], [u8; 6]);

impl<A> Route<A> {
    /// Interface, Ethernet addresses and MTU, bytes.
    #[inline(always)]
    fn way(self) -> (u32, Option<Frame>, u16) {
        (self.ifindex, self.frame, self.mtu)
    }
}

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

/// Asks the host's routes, as for a packet from `src` to `dst` that came in by `ifindex`.
#[inline(always)]
pub fn route<A: Routed>(ctx: *mut c_void, ifindex: u32, src: A, dst: A) -> Option<Route<A>> {
    // SAFETY: All-zero bytes are a value of this C struct.
    let mut params: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    params.family = A::AF;
    params.ifindex = ifindex;
    params.__bindgen_anon_1.tot_len = SHORT;
    A::ask(&mut params, src, dst);
    let size = size_of::<bpf_fib_lookup>() as i32;
    // SAFETY: The context is the program's own, and the parameters outlive the call.
    let result = unsafe { generated::bpf_fib_lookup(ctx, &raw mut params, size, 0) };
    let frame = match result as u32 {
        BPF_FIB_LKUP_RET_SUCCESS => Some((params.dmac, params.smac)),
        BPF_FIB_LKUP_RET_NO_NEIGH => None,
        _ => return None,
    };
    Some(Route {
        ifindex: params.ifindex,
        next_hop: A::answer(&params),
        frame,
        // SAFETY: Every bit pattern is a number.
        mtu: unsafe { params.__bindgen_anon_1.mtu_result },
    })
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
    let asked = match (config.vtep.to_mapped(), peer.vtep.to_mapped()) {
        (Some(src), Some(dst)) => route(ctx, ifindex, src, dst).map(Route::way),
        _ => route(ctx, ifindex, config.vtep, peer.vtep).map(Route::way),
    };
    let Some((ifindex, Some((next_hop, source)), mtu)) = asked else { return false };
    let expires_ns = now_ns() + NEXT_HOP_TTL_NS;
    let mtu = mtu.max(config.path_mtu_min);
    let peer = Peer { expires_ns, vtep: peer.vtep, ifindex, next_hop, source, mtu, ..Peer::default() };
    update_peer(slot, &peer);
    true
}
