//! Negative acknowledgements: a node tells the one that sent it an overlay packet that the packet's task is not here.
//!
//! What is told is the packet itself, cut to its headers, with an EtherType of its own and the Ethernet addresses that
//! name the task. It goes back the way that the packet came, in the same network, so it is as hard to forge as the
//! packet was: whoever hears one believes it of a task alone that it would have sent to that same node.

use mesh_common::addr::{Ip6, backend_of};
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::map::{AddrKey, Nack};

use crate::family::Family;
use crate::header::{ETHERTYPE_NACK, Ethernet, IP_OFFSET, Tcp};
use crate::overlay::Arrival;
use crate::packet::{Fault, Packet, Reuse};
use crate::parse::{Parsed, parse_ethernet};
use crate::tables::AddrTables;

/// How much of layer 4 is kept, bytes: the kernel cuts off no checksum that is yet to be filled in.
const L4_KEPT: usize = Tcp::LEN;

/// Turns a packet into the negative acknowledgement of itself.
#[inline(always)]
pub fn make<A: Family, P: Reuse>(packet: &mut P, parsed: &Parsed<A>) -> Result<bool, Fault> {
    let ethernet = parse_ethernet(packet).map_err(|_| Fault)?;
    let kept = (parsed.l4_offset + L4_KEPT) as u32;
    if packet.len() > kept {
        packet.set_len(kept)?;
    }
    packet.store(0, &Ethernet { ethertype: ETHERTYPE_NACK, ..ethernet })?;
    Ok(true)
}

/// What a negative acknowledgement says, or why nothing is made of it.
#[inline(always)]
pub fn hear(
    packet: &impl Packet,
    tables: &(impl AddrTables<Be32> + AddrTables<Ip6>),
    arrival: &Arrival,
) -> Result<Nack, Counter> {
    let version: u8 = packet.load(IP_OFFSET).ok_or(Counter::DropMalformed)?;
    match version >> 4 {
        4 => hear_of::<Be32>(packet, tables, arrival),
        6 => hear_of::<Ip6>(packet, tables, arrival),
        _ => Err(Counter::DropMalformed),
    }
}

#[inline(always)]
fn hear_of<A: Family>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    arrival: &Arrival,
) -> Result<Nack, Counter> {
    let Arrival { vni, vtep } = *arrival;
    let peer = tables.member(&vtep).ok_or(Counter::DropNotMember)?;
    let ethernet = parse_ethernet(packet).map_err(|_| Counter::DropMalformed)?;
    let addr: A = packet.load(IP_OFFSET + A::DST_OFFSET).ok_or(Counter::DropMalformed)?;
    let incarnation = backend_of(ethernet.dst).ok_or(Counter::DropMalformed)?;
    let endpoint = tables.endpoint(&AddrKey { vni, addr });
    // Corrected already, or never so.
    let is_so = endpoint.is_some_and(|known| known.peer == peer && known.incarnation == incarnation);
    if is_so { Ok(Nack { incarnation, vni }) } else { Err(Counter::DropUnrelated) }
}
