//! The TC context as a packet.

use core::mem::offset_of;

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, bpf_tunnel_key,
};
use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_csum_update, bpf_skb_load_bytes};
use aya_ebpf::helpers::{bpf_skb_get_tunnel_key, bpf_skb_set_tunnel_key};
use aya_ebpf::programs::TcContext;
use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
use mesh_common::counter::Counter;
use mesh_common::map::{EXAMPLE_PERIOD_NS, PROTO_TCP, PROTO_UDP};
use mesh_datapath::header::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, IP_OFFSET, Ipv4, Ipv6, Tcp};
use mesh_datapath::overlay::Arrival;
use mesh_datapath::packet::{Fault, Field, Packet, Rewrite, Store};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::bounds;
use crate::maps;

/// How much of a packet's front must be readable at once: Ethernet, the longest IPv4 header, ICMP's, and as much of the
/// packet that it quotes. (Or Ethernet, IPv6, some extension headers, TCP's.)
const HEADERS_MAX: u32 = 14 + 60 + 8 + 60 + 20;
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
        let headers = skb.headers_len();
        let wanted = if skb.ctx.len() < headers { skb.ctx.len() } else { headers };
        if readable < wanted {
            // A failure shows at the first load.
            let _ = skb.ctx.pull_data(wanted);
        }
        skb
    }

    /// How much of its front is to be readable at once. To make more readable costs a packet that others share, as TCP
    /// does those that it sends, a new head: for nearly all packets what there is suffices.
    #[inline(always)]
    fn headers_len(&self) -> u32 {
        const PLAIN: u8 = 0x45;
        let ports = |offset| matches!(self.load::<u8>(offset), Some(PROTO_TCP | PROTO_UDP));
        match self.load::<Be16>(offset_of!(Ethernet, ethertype)) {
            Some(ETHERTYPE_IPV4)
                if self.load(IP_OFFSET) == Some(PLAIN) && ports(IP_OFFSET + offset_of!(Ipv4, protocol)) =>
            {
                (IP_OFFSET + Ipv4::LEN + Tcp::LEN) as u32
            }
            Some(ETHERTYPE_IPV6) if ports(IP_OFFSET + offset_of!(Ipv6, next_header)) => {
                (IP_OFFSET + Ipv6::LEN + Tcp::LEN) as u32
            }
            _ => HEADERS_MAX,
        }
    }

    /// The packet of a program's context, in another function of the program.
    #[inline(always)]
    pub fn again(skb: *mut __sk_buff) -> Self {
        Self { ctx: TcContext::new(skb) }
    }

    /// The interface that the program runs on.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: The context is valid while the program runs.
        unsafe { (*self.raw()).ifindex }
    }

    /// Tunnel metadata of a packet from the VXLAN device, on an underlay of the family of `vtep`, or from WireGuard.
    #[inline(always)]
    pub fn arrival(&self, vtep: Ip6) -> Option<Arrival> {
        // SAFETY: All-zero bytes are a value of this C struct.
        let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
        let size = size_of::<bpf_tunnel_key>() as u32;
        // SAFETY: The context is the program's own, and the key outlives the call.
        let mut get =
            |flags: u32| unsafe { bpf_skb_get_tunnel_key(self.raw(), &raw mut key, size, u64::from(flags)) };
        let ipv4 = vtep.to_mapped().is_some() && get(0) == 0;
        if !ipv4 && get(BPF_F_TUNINFO_IPV6) != 0 {
            return None;
        }
        // SAFETY: Every bit pattern is an address.
        let vtep = unsafe {
            if ipv4 {
                Ip6::mapped(Be32::new(key.__bindgen_anon_1.remote_ipv4))
            } else {
                Ip6(key.__bindgen_anon_1.remote_ipv6.map(|word| Be32::from_bytes(word.to_ne_bytes())))
            }
        };
        Some(Arrival { vni: key.tunnel_id, vtep })
    }

    /// Sets where the VXLAN device is to send the packet.
    #[inline(always)]
    pub fn set_tunnel(&mut self, vni: u32, local: Ip6, remote: Ip6, tos: u8) -> Result<(), Fault> {
        // SAFETY: All-zero bytes are a value of this C struct.
        let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
        key.tunnel_id = vni;
        key.tunnel_ttl = TUNNEL_TTL;
        key.tunnel_tos = tos;
        let mut flags = u64::from(BPF_F_ZERO_CSUM_TX);
        if let (Some(local), Some(remote)) = (local.to_mapped(), remote.to_mapped()) {
            key.__bindgen_anon_1.remote_ipv4 = remote.get();
            key.__bindgen_anon_3.local_ipv4 = local.get();
        } else {
            key.__bindgen_anon_1.remote_ipv6 = remote.0.map(Be32::raw);
            key.__bindgen_anon_3.local_ipv6 = local.0.map(Be32::raw);
            flags |= u64::from(BPF_F_TUNINFO_IPV6);
        }
        let size = size_of::<bpf_tunnel_key>() as u32;
        // SAFETY: The context is the program's own, and the key outlives the call.
        match unsafe { bpf_skb_set_tunnel_key(self.raw(), &raw mut key, size, flags) } {
            0 => Ok(()),
            _ => Err(Fault),
        }
    }

    /// Marks the packet for what the host does with it.
    #[inline(always)]
    pub fn set_mark(&mut self, mark: u32) {
        self.ctx.set_mark(mark);
    }

    /// Keeps the packet's beginning as the last example of a counter, unless there is a young one.
    #[inline(never)]
    pub fn exemplify(&self, counter: Counter) {
        let Some(example) = maps::example(counter, EXAMPLE_PERIOD_NS) else { return };
        let len = self.ctx.len();
        // Not zero, which the helper doesn't take; Linux 6.1's verifier learns nothing from a comparison with zero itself.
        let head_len = bounds::forgotten(len).clamp(Ethernet::LEN as u32, size_of_val(&example.head) as u32);
        example.counter = counter as u32;
        example.ifindex = self.ifindex();
        example.len = len;
        example.head_len = head_len;
        // SAFETY: `head` has room for `head_len` bytes, and the context is the program's own.
        unsafe {
            bpf_skb_load_bytes(self.raw().cast(), 0, (&raw mut example.head).cast(), head_len);
        }
        maps::tell(example);
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
    pub(crate) fn raw(&self) -> *mut __sk_buff {
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
        Some(unsafe { bounds::read(at) })
    }

    #[inline(always)]
    fn segment_len(&self) -> u32 {
        // SAFETY: The context is valid while the program runs.
        unsafe { (*self.raw()).gso_size }
    }
}

impl Store for Skb {
    #[inline(always)]
    fn store<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Result<(), Fault> {
        // The checksums are patched beside, so the helper needn't.
        self.ctx.store(offset, value, 0).map_err(|_| Fault)
    }
}

impl Rewrite for Skb {
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

    #[inline(always)]
    fn patch_l4_address6(&mut self, offset: usize, from: &Ip6, to: &Ip6, udp: bool) -> Result<(), Fault> {
        let mut flags = u64::from(BPF_F_PSEUDO_HDR);
        if udp {
            flags |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        let difference = difference(from, to);
        self.ctx.l4_csum_replace(offset, 0, u64::from(difference), flags).map_err(|_| Fault)?;
        // The helper takes the difference off the sum that a driver may have given for the whole packet, as if an IPv4
        // header's checksum had changed as well. IPv6 has none, so the sum is what it was.
        // SAFETY: The context is the program's own.
        unsafe { bpf_csum_update(self.raw(), difference) };
        Ok(())
    }

    #[inline(always)]
    fn patch_l4_payload6(&mut self, offset: usize, from: &Ip6, to: &Ip6) -> Result<(), Fault> {
        self.ctx.l4_csum_replace(offset, 0, u64::from(difference(from, to)), 0).map_err(|_| Fault)
    }
}

/// What `to` adds to a checksum beside `from`.
#[inline(always)]
fn difference(from: &Ip6, to: &Ip6) -> u32 {
    let len = size_of::<Ip6>() as u32;
    let (from, to) = ((&raw const *from).cast_mut().cast(), (&raw const *to).cast_mut().cast());
    // SAFETY: The helper reads `len` bytes of both.
    unsafe { bpf_csum_diff(from, len, to, len, 0) as u32 }
}
