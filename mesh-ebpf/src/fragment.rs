//! Fragments follow their first fragment, which alone has the ports.
//!
//! Between nodes one may overtake its first: what the underlay carries whole and what it carries in pieces takes different
//! ways through a network card with several queues. So the node that sends it on says its ports in the inner frame's Ethernet
//! source.

use mesh_common::addr::{Address, ports_mac, ports_of};
use mesh_common::be::Be16;
use mesh_common::map::{FRAGMENTS_S, FragmentKey, FragmentPorts};

use crate::packet::Packet;
use crate::parse::{Fragment, Parsed, parse_ethernet};
use crate::tables::AddrTables;

/// Gives a later fragment the ports of its first one, and remembers those of a first one. A later fragment whose first
/// has not been seen stays without.
#[inline(always)]
pub fn follow<A: Address>(tables: &impl AddrTables<A>, parsed: &mut Parsed<A>, vni: u32) {
    if parsed.fragment == Fragment::Whole {
        return;
    }
    let Parsed { src, dst, fragment_id: id, protocol, .. } = *parsed;
    let key = FragmentKey { src, dst, id, scope: vni << 8 | u32::from(protocol) };
    let now_s = tables.now_s();
    match parsed.ports() {
        Some((src_port, dst_port)) => {
            tables.insert_fragment(&key, &FragmentPorts { src_port, dst_port, stamp: now_s });
        }
        None if parsed.fragment == Fragment::Later => {
            // An identification comes again sooner or later: an old entry is another packet's.
            let first = tables.fragment(&key);
            let first = first.filter(|first| now_s.wrapping_sub(first.stamp) <= FRAGMENTS_S);
            parsed.set_ports(first.map(|first| (first.src_port, first.dst_port)));
        }
        None => {}
    }
}

/// Gives a later fragment from another node, whose first has not been seen, the ports that the node says. `true` if it does.
#[inline(always)]
pub fn be_told<A: Address>(packet: &impl Packet, parsed: &mut Parsed<A>) -> bool {
    if parsed.fragment != Fragment::Later || parsed.ports().is_some() {
        return false;
    }
    let told = parse_ethernet(packet).ok().and_then(|ethernet| ports_of(ethernet.src));
    parsed.set_ports(told);
    told.is_some()
}

/// The Ethernet source of a frame to another node: `src`, or what says a later fragment's `ports`, if those are known.
#[inline(always)]
pub fn source<A: Address>(parsed: &Parsed<A>, ports: (Be16, Be16), src: [u8; 6]) -> [u8; 6] {
    if parsed.fragment == Fragment::Later && parsed.ports().is_some() { ports_mac(ports) } else { src }
}
