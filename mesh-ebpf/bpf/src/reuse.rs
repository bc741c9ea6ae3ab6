//! The TC context as a packet that becomes the answer to itself.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::helpers::bpf_skb_change_tail;
use mesh_common::be::Be16;
use mesh_datapath::packet::{Fault, Packet as _, Reuse, Store as _};

use crate::tc::Skb;

impl Reuse for Skb {
    /// Makes all of the packet readable at once, too.
    #[inline(always)]
    fn set_len(&mut self, len: u32) -> Result<(), Fault> {
        // What a driver summed over the former bytes (`CHECKSUM_COMPLETE`) is forgotten when the length changes, and
        // would be wrong: so it changes.
        if self.len() == len {
            self.change_tail(len + 1)?;
        }
        self.change_tail(len)
    }

    /// Without `BPF_F_PSEUDO_HDR`, the kernel leaves a checksum alone that is yet to be filled in
    /// (`CHECKSUM_PARTIAL`), and changes any other: `inet_proto_csum_replace4`.
    #[inline(always)]
    fn is_checksum_deferred(&mut self, offset: usize) -> bool {
        // What fails here fails whatever comes next as well.
        let Some(before) = self.load::<Be16>(offset) else {
            return false;
        };
        if self.ctx.l4_csum_replace(offset, 0, 1, 2).is_err() {
            return false;
        }
        let deferred = self.load(offset) == Some(before);
        deferred || self.store(offset, &before).is_err()
    }

    /// Needs a packet that the kernel knows as IPv4 or IPv6, and [`Reuse::set_len`] before if it is to be segmented.
    #[inline(always)]
    fn insert_header(&mut self, bytes: u32) -> Result<(), Fault> {
        self.ctx.adjust_room(bytes as i32, BPF_ADJ_ROOM_MAC, 0).map_err(|_| Fault)
    }
}

impl Skb {
    #[inline(always)]
    fn change_tail(&mut self, len: u32) -> Result<(), Fault> {
        // SAFETY: The context is the program's own.
        match unsafe { bpf_skb_change_tail(self.raw(), len, 0) } {
            0 => Ok(()),
            _ => Err(Fault),
        }
    }
}
