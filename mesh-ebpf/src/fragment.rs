//! Fragments follow their first fragment, which alone has the ports.

use mesh_common::addr::Address;
use mesh_common::map::{FRAGMENTS_S, FragmentKey, FragmentPorts};

use crate::parse::{Fragment, Parsed};
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
