//! Carrying out a verdict in TC.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh};
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer};
use mesh_common::addr::{Address as _, Ip6};
use mesh_common::counter::Counter;
use mesh_common::map::WIREGUARD_MARK;
use mesh_datapath::family::Family;
use mesh_datapath::header::IP_OFFSET;
use mesh_datapath::mesh;
use mesh_datapath::packet::Packet as _;
use mesh_datapath::parse::Parsed;
use mesh_datapath::tables::Tables as _;
use mesh_datapath::verdict::{Action, Verdict};

use crate::maps::{Maps, count};
use crate::next_hop::{self, Route, Routed};
use crate::tc::Skb;

/// Does what a verdict says, and counts it. A redirect that can't be made is counted as the drop that it is. For
/// [`Action::Route`] there is [`send_on`].
#[inline(always)]
pub fn carry_out(packet: &mut Skb, verdict: Verdict) -> i32 {
    let done = match verdict.action() {
        Action::Pass => Ok(TC_ACT_UNSPEC),
        // Those left over are carried out before, or can't be.
        Action::Drop | Action::Answer(_) | Action::Echo | Action::Dial | Action::Route => Ok(TC_ACT_SHOT),
        Action::Deliver { ifindex } => {
            packet.claim();
            // SAFETY: A plain helper call.
            Ok(unsafe { bpf_redirect_peer(ifindex, 0) } as i32)
        }
        Action::Reflect => {
            // SAFETY: A plain helper call.
            Ok(unsafe { bpf_redirect(packet.ifindex(), 0) } as i32)
        }
        Action::Host => enter_host(packet),
        // SAFETY: A plain helper call.
        Action::Arrive { ifindex } => Ok(unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) } as i32),
        Action::Tunnel { vni, peer, tos } => tunnel(packet, vni, peer, tos),
    };
    end(packet, verdict, done)
}

/// Puts a packet on the wire by the host's routes, and counts it as `verdict` says; or tells the verdict that takes its place,
/// where the way does not carry the packet.
#[inline(always)]
pub fn send_on<A: Family + Routed>(
    packet: &mut Skb,
    parsed: &Parsed<A>,
    verdict: Verdict,
) -> Result<i32, Verdict> {
    let route = match route_of::<A>(packet) {
        Ok(route) => route,
        Err(reason) => return Ok(end(packet, verdict, Err(reason))),
    };
    let Route { ifindex, next_hop, frame, mtu } = route;
    // Where the neighbour is unresolved the kernel told no MTU.
    if frame.is_some()
        && let Some(instead) = mesh::too_big_beyond(packet, parsed, (ifindex, mtu), || {
            next_hop::link_mtu(packet.ctx.as_ptr(), ifindex)
        })
    {
        return Err(instead);
    }
    // SAFETY: All-zero bytes are a value of this C struct.
    let mut params: bpf_redir_neigh = unsafe { core::mem::zeroed() };
    params.nh_family = u32::from(A::AF);
    A::redirect(&mut params, next_hop);
    let size = size_of::<bpf_redir_neigh>() as i32;
    // SAFETY: The parameters outlive the call, which copies them.
    let code = unsafe { bpf_redirect_neigh(ifindex, &raw mut params, size, 0) } as i32;
    Ok(end(packet, verdict, Ok(code)))
}

/// Counts a packet whose verdict is carried out, or why it can't be, and gives the program's return value.
#[inline(always)]
fn end(packet: &Skb, verdict: Verdict, done: Result<i32, Counter>) -> i32 {
    let (code, counter) = match done {
        Ok(code) => (code, verdict.counter),
        Err(reason) => (TC_ACT_SHOT, reason),
    };
    count(counter);
    if let Some(made) = verdict.made() {
        count(made);
    } else if counter.is_drop() {
        // What has become an answer is no example of itself any more.
        packet.exemplify(counter);
    }
    code
}

#[inline(always)]
fn enter_host(packet: &Skb) -> Result<i32, Counter> {
    let config = Maps.config().ok_or(Counter::DropNotReady)?;
    packet.claim();
    // SAFETY: A plain helper call.
    Ok(unsafe { bpf_redirect(config.host_ifindex, u64::from(BPF_F_INGRESS)) } as i32)
}

#[inline(always)]
fn tunnel(packet: &mut Skb, vni: u32, slot: u32, tos: u8) -> Result<i32, Counter> {
    let config = Maps.config().ok_or(Counter::DropNotReady)?;
    // Keeps the path's MTU known. The kernel finds the next hop itself.
    let _ = next_hop::resolve(packet.ctx.as_ptr(), packet.ifindex(), slot);
    // A flow may outlive its ingress node's slot for a moment.
    let peer = Maps.peer(slot).filter(|peer| peer.vtep != Ip6::default()).ok_or(Counter::DropNoRoute)?;
    let local = config.vtep_towards(peer);
    packet.set_tunnel(vni, local, peer.vtep, tos).map_err(|_| Counter::DropRewriteFailed)?;
    if peer.vtep.is_wireguard() {
        // What else the host sends into WireGuard's network is dropped there.
        packet.set_mark(WIREGUARD_MARK);
    }
    // SAFETY: A plain helper call.
    Ok(unsafe { bpf_redirect(config.vxlan_ifindex, 0) } as i32)
}

#[inline(always)]
fn route_of<A: Family + Routed>(packet: &Skb) -> Result<Route<A>, Counter> {
    let src: A = packet.load(IP_OFFSET + A::SRC_OFFSET).ok_or(Counter::DropMalformed)?;
    let dst: A = packet.load(IP_OFFSET + A::DST_OFFSET).ok_or(Counter::DropMalformed)?;
    next_hop::route(packet.ctx.as_ptr(), packet.ifindex(), src, dst).ok_or(Counter::DropNoRoute)
}
