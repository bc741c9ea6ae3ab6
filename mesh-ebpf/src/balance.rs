//! Choosing a backend by a service's Maglev table, and what its rules say of a client.

use mesh_common::hash::{Tuple, client_hash, flow_hash, place};
use mesh_common::map::{
    Backend, RULE_ALLOW, RuleKey, SERVICE_ADDRESSES, SERVICE_AFFINITY, SERVICE_SOURCES, Service,
};

use crate::family::Family;
use crate::tables::AddrTables;

/// A backend and its slot.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'t, A> {
    /// Its slot.
    pub slot: u32,
    /// The backend.
    pub backend: &'t Backend<A>,
}

/// The backend that `service`'s table gives the flow `tuple`; `None` if the service has none.
#[inline(always)]
pub fn choose<'t, A: Family>(
    tables: &'t impl AddrTables<A>,
    service: &Service,
    tuple: &Tuple<A>,
    seed: u64,
) -> Option<Chosen<'t, A>> {
    if service.len == 0 {
        return None;
    }
    let hash =
        if service.flags & SERVICE_AFFINITY == 0 { flow_hash(tuple, seed) } else { client_hash(tuple, seed) };
    let slot = tables.place(service.start.wrapping_add(place(hash, service.len)))?;
    let backend = tables.backend(slot)?;
    // An empty slot: the table is being replaced, and the flow gets its backend at the next packet.
    (backend.incarnation != 0).then_some(Chosen { slot, backend })
}

/// The backend in `slot`; `None` if its incarnation is another by now.
#[inline(always)]
pub fn bound<A: Family>(tables: &impl AddrTables<A>, slot: u32, incarnation: u32) -> Option<Chosen<'_, A>> {
    let backend = tables.backend(slot)?;
    (backend.incarnation == incarnation && incarnation != 0).then_some(Chosen { slot, backend })
}

/// What a service's rules say of a client and of the address that it dialled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admission {
    /// Let in.
    Admitted,
    /// The client is not let in.
    Refused,
    /// The service doesn't answer on the address.
    NotHere,
}

/// What the rules of the service in `slot` say of `tuple`.
#[inline(always)]
pub fn admit<A: Family>(
    tables: &impl AddrTables<A>,
    slot: u32,
    service: &Service,
    tuple: &Tuple<A>,
) -> Admission {
    let allowed = |key| tables.rule(&key) == Some(RULE_ALLOW);
    if service.flags & SERVICE_ADDRESSES != 0 && !allowed(RuleKey::dialled(slot, tuple.dst)) {
        Admission::NotHere
    } else if service.flags & SERVICE_SOURCES != 0 && !allowed(RuleKey::source(slot, tuple.src)) {
        Admission::Refused
    } else {
        Admission::Admitted
    }
}
