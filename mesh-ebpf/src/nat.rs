//! Rewriting addresses and ports, checksums included.

use mesh_common::be::{Be16, Be32};
use mesh_common::mac_of;
use mesh_common::map::{PROTO_TCP, PROTO_UDP};

use crate::header::{Ethernet, IP_CHECKSUM_OFFSET, IP_DST_OFFSET, IP_SRC_OFFSET};
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

/// Rewrites one end of `packet` to `addr`, and to `port` where one is given and the packet has ports; `parsed`
/// follows.
#[inline(always)]
pub fn rewrite<P: Rewrite>(
    packet: &mut P,
    parsed: &mut Parsed,
    end: End,
    addr: Be32,
    port: Option<Be16>,
) -> Result<(), Fault> {
    let (old_addr, addr_offset) = match end {
        End::Src => (parsed.src, IP_SRC_OFFSET),
        End::Dst => (parsed.dst, IP_DST_OFFSET),
    };
    if addr != old_addr {
        if let Some((checksum, udp)) = l4_checksum(parsed) {
            packet.patch_l4_checksum(checksum, old_addr.raw(), addr.raw(), Field::Address, udp)?;
        }
        packet.patch_ip_checksum(IP_CHECKSUM_OFFSET, old_addr.raw(), addr.raw())?;
        packet.store(addr_offset, &addr)?;
    }
    if let (Some((src_port, dst_port)), Some(port)) = (parsed.ports, port) {
        let (old_port, port_offset, ports) = match end {
            End::Src => (src_port, parsed.l4_offset, (port, dst_port)),
            End::Dst => (dst_port, parsed.l4_offset + 2, (src_port, port)),
        };
        if port != old_port {
            if let Some((checksum, udp)) = l4_checksum(parsed) {
                let (from, to) = (u32::from(old_port.raw()), u32::from(port.raw()));
                packet.patch_l4_checksum(checksum, from, to, Field::Port, udp)?;
            }
            packet.store(port_offset, &port)?;
            parsed.ports = Some(ports);
        }
    }
    match end {
        End::Src => parsed.src = addr,
        End::Dst => parsed.dst = addr,
    }
    Ok(())
}

/// Writes the Ethernet addresses that belong to the packet's IPv4 addresses.
#[inline(always)]
pub fn address_frame<P: Rewrite>(packet: &mut P, parsed: &Parsed) -> Result<(), Fault> {
    address_frame_to(packet, parsed.src, parsed.dst)
}

/// Writes the Ethernet addresses of the endpoints at `src` and `dst`.
#[inline(always)]
pub fn address_frame_to<P: Rewrite>(packet: &mut P, src: Be32, dst: Be32) -> Result<(), Fault> {
    packet
        .store(0, &Ethernet { dst: mac_of(dst), src: mac_of(src), ethertype: crate::header::ETHERTYPE_IPV4 })
}

/// Offset of the checksum that covers the addresses, and whether it is UDP's; `None` in a fragment without one.
#[inline(always)]
fn l4_checksum(parsed: &Parsed) -> Option<(usize, bool)> {
    if parsed.fragment == Fragment::Later {
        return None;
    }
    match parsed.protocol {
        PROTO_TCP => Some((parsed.l4_offset + TCP_CHECKSUM_OFFSET, false)),
        PROTO_UDP => Some((parsed.l4_offset + UDP_CHECKSUM_OFFSET, true)),
        _ => None,
    }
}
