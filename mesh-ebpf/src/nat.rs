//! Rewriting addresses and ports, checksums included.

use mesh_common::be::Be16;
use mesh_common::map::{PROTO_TCP, PROTO_UDP};

use crate::family::Family;
use crate::header::IP_OFFSET;
use crate::packet::{Fault, Field, Rewrite};
use crate::parse::{Fragment, Parsed};

/// Which end of a packet to rewrite.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Source address and port.
    Src,
    /// Destination address and port.
    Dst,
}

/// Offset of UDP's checksum in its header.
const UDP_CHECKSUM_OFFSET: usize = 6;
/// Offset of TCP's checksum in its header.
const TCP_CHECKSUM_OFFSET: usize = 16;
/// Offset of ICMP's checksum in its header.
pub const ICMP_CHECKSUM_OFFSET: usize = 2;

/// Rewrites one end of `packet` to `addr`, and to `port` where the packet has ports.
#[inline(always)]
pub fn rewrite<A: Family, P: Rewrite>(
    packet: &mut P,
    parsed: &Parsed<A>,
    end: End,
    addr: A,
    port: Be16,
) -> Result<(), Fault> {
    let (old_addr, addr_offset) = match end {
        End::Src => (parsed.src, IP_OFFSET + A::SRC_OFFSET),
        End::Dst => (parsed.dst, IP_OFFSET + A::DST_OFFSET),
    };
    if addr != old_addr {
        A::patch_address(packet, l4_checksum(parsed), old_addr, addr)?;
        packet.store(addr_offset, &addr)?;
    }
    // A fragment after the first has its ports from there, and nothing of them in itself.
    if let Some((src_port, dst_port)) = parsed.ports()
        && parsed.fragment != Fragment::Later
    {
        let (old_port, port_offset) = match end {
            End::Src => (src_port, parsed.l4_offset),
            End::Dst => (dst_port, parsed.l4_offset + 2),
        };
        if port != old_port {
            if let Some((checksum, udp)) = l4_checksum(parsed) {
                let (from, to) = (u32::from(old_port.raw()), u32::from(port.raw()));
                packet.patch_l4_checksum(checksum, from, to, Field::Port, udp)?;
            }
            packet.store(port_offset, &port)?;
        }
    }
    Ok(())
}

/// Offset of the checksum that covers the addresses, and whether it is UDP's; `None` in a fragment without one.
#[inline(always)]
fn l4_checksum<A: Family>(parsed: &Parsed<A>) -> Option<(usize, bool)> {
    if parsed.fragment == Fragment::Later {
        return None;
    }
    match parsed.protocol {
        PROTO_TCP => Some((parsed.l4_offset + TCP_CHECKSUM_OFFSET, false)),
        PROTO_UDP => Some((parsed.l4_offset + UDP_CHECKSUM_OFFSET, true)),
        protocol if protocol == A::ICMP && A::ICMP_COVERS_ADDRESSES => {
            Some((parsed.l4_offset + ICMP_CHECKSUM_OFFSET, false))
        }
        _ => None,
    }
}
