//! Where a peer's packets go next: the host's routes and neighbours, asked once a second and peer.

use core::ffi::c_void;

use aya_ebpf::bindings::{BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup};
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::helpers::generated;
use mesh_common::be::Be32;
use mesh_common::map::{NEXT_HOP_TTL_NS, Peer};
use mesh_datapath::tables::Tables as _;

use crate::maps::{Maps, update_peer};

/// `AF_INET`.
pub const AF_INET: u8 = 2;

/// Shortest IPv4 packet, bytes.
const MIN_LEN: u16 = 20;

/// What the host's routes say of a destination.
pub struct Route {
    /// The interface.
    pub ifindex: u32,
    /// The next hop's address: the destination itself, or a gateway.
    pub next_hop: Be32,
    /// The next hop's and the interface's Ethernet addresses, if the neighbour is resolved.
    pub frame: Option<([u8; 6], [u8; 6])>,
    /// MTU of the route, bytes.
    pub mtu: u16,
}

/// Asks the host's routes, as for a packet from `src` to `dst` that came in by `ifindex`.
#[inline(always)]
pub fn route(ctx: *mut c_void, ifindex: u32, src: Be32, dst: Be32) -> Option<Route> {
    // SAFETY: All-zero bytes are a value of this C struct.
    let mut params: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    params.family = AF_INET;
    params.ifindex = ifindex;
    // Any length that surely fits: it makes the kernel report the route's MTU.
    params.__bindgen_anon_1.tot_len = MIN_LEN;
    params.__bindgen_anon_3.ipv4_src = src.raw();
    params.__bindgen_anon_4.ipv4_dst = dst.raw();
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
        // SAFETY: Every bit pattern is an address.
        next_hop: Be32::from_bytes(unsafe { params.__bindgen_anon_4.ipv4_dst }.to_ne_bytes()),
        frame,
        // SAFETY: Every bit pattern is a number.
        mtu: unsafe { params.__bindgen_anon_1.mtu_result },
    })
}

/// The peer in `slot` with its next hop; `None` while the neighbour is unresolved, or without a route.
#[inline(always)]
pub fn resolve(ctx: *mut c_void, ifindex: u32, slot: u32, vtep: Be32) -> Option<Peer> {
    let peer = *Maps.peer(slot)?;
    // SAFETY: A plain helper call.
    let now_ns = unsafe { bpf_ktime_get_coarse_ns() };
    if now_ns < peer.expires_ns {
        return Some(peer);
    }
    let route = route(ctx, ifindex, vtep, peer.vtep)?;
    let (next_hop, source) = route.frame?;
    let peer = Peer {
        expires_ns: now_ns + NEXT_HOP_TTL_NS,
        vtep: peer.vtep,
        ifindex: route.ifindex,
        next_hop,
        source,
        mtu: route.mtu,
        reserved: 0,
    };
    update_peer(slot, &peer);
    Some(peer)
}
