//! Choosing a backend: the Maglev table for a new flow, the flow table for a known one.

use mesh_common::hash::{Tuple, flow_hash, place};
use mesh_common::map::{BACKEND_DRAINING, Backend, Flow, FlowKind};

use crate::tables::Tables;

/// A backend and its slot.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'t> {
    /// Its slot.
    pub slot: u32,
    /// The backend.
    pub backend: &'t Backend,
}

/// The backend that `service`'s table gives the flow `tuple`; `None` if the service has none.
#[inline(always)]
pub fn choose<'t>(tables: &'t impl Tables, service: u32, tuple: &Tuple, seed: u64) -> Option<Chosen<'t>> {
    let service = tables.service(service)?;
    if service.maglev_len == 0 {
        return None;
    }
    let at = service.maglev_start.wrapping_add(place(flow_hash(tuple, seed), service.maglev_len));
    let slot = tables.maglev(at)?;
    let backend = tables.backend(slot)?;
    // An empty slot: the table is being replaced, and the flow gets its backend at the next packet.
    (backend.incarnation != 0).then_some(Chosen { slot, backend })
}

/// The backend that `flow` is bound to; `None` if the entry is of another kind or void: its backend is gone, or
/// drains and the packet `opens` a connection.
#[inline(always)]
pub fn bound<'t>(tables: &'t impl Tables, flow: &Flow, opens: bool) -> Option<Chosen<'t>> {
    if flow.kind != FlowKind::TO_BACKEND && flow.kind != FlowKind::TO_SELF {
        return None;
    }
    let backend = tables.backend(flow.backend)?;
    let void = backend.incarnation != flow.incarnation || (opens && backend.flags & BACKEND_DRAINING != 0);
    (!void).then_some(Chosen { slot: flow.backend, backend })
}
