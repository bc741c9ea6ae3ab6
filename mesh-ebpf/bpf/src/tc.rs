//! The TC context as a packet.

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_ZERO_CSUM_TX, bpf_tunnel_key,
};
use aya_ebpf::helpers::{bpf_skb_get_tunnel_key, bpf_skb_set_tunnel_key};
use aya_ebpf::programs::TcContext;
use mesh_common::be::Be32;
use mesh_datapath::overlay::Arrival;
use mesh_datapath::packet::{Fault, Field, Packet, Rewrite};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::bounds;

/// How much of a packet's front must be readable at once: Ethernet, the longest IPv4 header, TCP's.
const HEADERS_MAX: u32 = 14 + 60 + 20;
/// `PACKET_HOST`: addressed to the host that has it.
const PACKET_HOST: u32 = 0;
/// Hop limit of outer headers.
const TUNNEL_TTL: u8 = 64;

/// A packet in a socket buffer.
pub struct Skb {
    pub ctx: TcContext,
}

impl Skb {
    /// The packet of a program's context, its headers made readable.
    #[inline(always)]
    pub fn new(ctx: TcContext) -> Self {
        let skb = Self { ctx };
        let readable = (skb.ctx.data_end() - skb.ctx.data()) as u32;
        let wanted = if skb.ctx.len() < HEADERS_MAX { skb.ctx.len() } else { HEADERS_MAX };
        if readable < wanted {
            // A failure shows at the first load.
            let _ = skb.ctx.pull_data(wanted);
        }
        skb
    }

    /// The interface that the program runs on.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: The context is valid while the program runs.
        unsafe { (*self.raw()).ifindex }
    }

    /// Tunnel metadata of a packet from the VXLAN device.
    #[inline(always)]
    pub fn arrival(&self) -> Option<Arrival> {
        // SAFETY: All-zero bytes are a value of this C struct.
        let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
        let size = size_of::<bpf_tunnel_key>() as u32;
        // SAFETY: The context is the program's own, and the key outlives the call.
        if unsafe { bpf_skb_get_tunnel_key(self.raw(), &raw mut key, size, 0) } != 0 {
            return None;
        }
        // SAFETY: Every bit pattern is an address.
        let vtep = Be32::new(unsafe { key.__bindgen_anon_1.remote_ipv4 });
        Some(Arrival { vni: key.tunnel_id, vtep })
    }

    /// Sets where the VXLAN device is to send the packet.
    #[inline(always)]
    pub fn set_tunnel(&mut self, vni: u32, local: Be32, remote: Be32, tos: u8) -> Result<(), Fault> {
        // SAFETY: All-zero bytes are a value of this C struct.
        let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
        key.tunnel_id = vni;
        key.tunnel_ttl = TUNNEL_TTL;
        key.tunnel_tos = tos;
        key.__bindgen_anon_1.remote_ipv4 = remote.get();
        key.__bindgen_anon_3.local_ipv4 = local.get();
        let size = size_of::<bpf_tunnel_key>() as u32;
        let flags = u64::from(BPF_F_ZERO_CSUM_TX);
        // SAFETY: The context is the program's own, and the key outlives the call.
        match unsafe { bpf_skb_set_tunnel_key(self.raw(), &raw mut key, size, flags) } {
            0 => Ok(()),
            _ => Err(Fault),
        }
    }

    /// Makes the packet one that the stack behind the next interface takes as its own.
    #[inline(always)]
    pub fn claim(&self) {
        // SAFETY: The context is valid while the program runs.
        if unsafe { (*self.raw()).pkt_type } != PACKET_HOST {
            let _ = self.ctx.change_type(PACKET_HOST);
        }
    }

    #[inline(always)]
    fn raw(&self) -> *mut __sk_buff {
        self.ctx.skb.skb
    }
}

impl Packet for Skb {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.ctx.len()
    }

    #[inline(always)]
    fn load<T: FromBytes + Immutable + KnownLayout + Copy>(&self, offset: usize) -> Option<T> {
        let at = bounds::at::<T>(self.ctx.data(), self.ctx.data_end(), offset)?;
        // SAFETY: The bytes are inside the packet's readable part, and any bytes are a `T`.
        Some(unsafe { at.read_unaligned() })
    }
}

impl Rewrite for Skb {
    #[inline(always)]
    fn store<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Result<(), Fault> {
        // The checksums are patched beside, so the helper needn't.
        self.ctx.store(offset, value, 0).map_err(|_| Fault)
    }

    #[inline(always)]
    fn patch_ip_checksum(&mut self, offset: usize, from: u32, to: u32) -> Result<(), Fault> {
        self.ctx.l3_csum_replace(offset, u64::from(from), u64::from(to), 4).map_err(|_| Fault)
    }

    #[inline(always)]
    fn patch_l4_checksum(
        &mut self,
        offset: usize,
        from: u32,
        to: u32,
        field: Field,
        udp: bool,
    ) -> Result<(), Fault> {
        let mut flags = match field {
            Field::Address => u64::from(BPF_F_PSEUDO_HDR) | 4,
            Field::Port => 2,
        };
        if udp {
            flags |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        self.ctx.l4_csum_replace(offset, u64::from(from), u64::from(to), flags).map_err(|_| Fault)
    }
}
