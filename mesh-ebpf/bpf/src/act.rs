//! Carrying out a verdict in TC.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh};
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer};
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_datapath::tables::Tables as _;
use mesh_datapath::verdict::{Action, Verdict};

use crate::maps::{Maps, count};
use crate::next_hop::{self, AF_INET};
use crate::tc::Skb;

/// A packet on the VXLAN device without tunnel metadata: not from the tunnel.
pub const NO_TUNNEL: Verdict = Verdict::drop(Counter::DropNotMember);

/// Does what a verdict says, and counts it. A redirect that can't be made is counted as the drop that it is.
#[inline(always)]
pub fn carry_out(packet: &mut Skb, verdict: Verdict) -> i32 {
    let done = match verdict.action {
        Action::Pass => Ok(TC_ACT_UNSPEC),
        Action::Drop => Ok(TC_ACT_SHOT),
        Action::Deliver { ifindex } => {
            packet.claim();
            // SAFETY: A plain helper call.
            Ok(unsafe { bpf_redirect_peer(ifindex, 0) } as i32)
        }
        Action::Reflect => {
            // SAFETY: A plain helper call.
            Ok(unsafe { bpf_redirect(packet.ifindex(), 0) } as i32)
        }
        Action::Host => enter_host(),
        Action::Tunnel { vni, vtep, tos } => tunnel(packet, vni, vtep, tos),
        Action::Route { src, dst } => route(packet, src, dst),
    };
    match done {
        Ok(code) => {
            count(verdict.counter);
            code
        }
        Err(reason) => {
            count(reason);
            TC_ACT_SHOT
        }
    }
}

#[inline(always)]
fn enter_host() -> Result<i32, Counter> {
    let config = Maps.config().ok_or(Counter::DropNotReady)?;
    // SAFETY: A plain helper call.
    Ok(unsafe { bpf_redirect(config.host_ifindex, u64::from(BPF_F_INGRESS)) } as i32)
}

#[inline(always)]
fn tunnel(packet: &mut Skb, vni: u32, vtep: Be32, tos: u8) -> Result<i32, Counter> {
    let config = Maps.config().ok_or(Counter::DropNotReady)?;
    packet.set_tunnel(vni, config.vtep, vtep, tos).map_err(|_| Counter::DropRewriteFailed)?;
    // SAFETY: A plain helper call.
    Ok(unsafe { bpf_redirect(config.vxlan_ifindex, 0) } as i32)
}

#[inline(always)]
fn route(packet: &mut Skb, src: Be32, dst: Be32) -> Result<i32, Counter> {
    let route =
        next_hop::route(packet.ctx.as_ptr(), packet.ifindex(), src, dst).ok_or(Counter::DropNoRoute)?;
    // SAFETY: All-zero bytes are a value of this C struct.
    let mut params: bpf_redir_neigh = unsafe { core::mem::zeroed() };
    params.nh_family = u32::from(AF_INET);
    params.__bindgen_anon_1.ipv4_nh = route.next_hop.raw();
    let size = size_of::<bpf_redir_neigh>() as i32;
    // SAFETY: The parameters outlive the call, which copies them.
    Ok(unsafe { bpf_redirect_neigh(route.ifindex, &raw mut params, size, 0) } as i32)
}
