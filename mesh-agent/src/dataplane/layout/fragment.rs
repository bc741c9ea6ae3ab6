//! What one service contributes, with its numbers.

use std::collections::BTreeSet;

use mesh_common::addr::Address;
use mesh_common::map::{
    AddrKey, BACKEND_DRAINING, BACKEND_ENCRYPTED, BACKENDS_MAX, Backend, Endpoint, Port, RuleKey,
    SERVICES_MAX, Service, TaskKey, TaskSlots,
};

use super::super::contents::{Contents, Family};
use super::super::maglev::{self, Candidate};
use super::super::numbers::Exhausted;
use super::super::plan::{
    Attachment, AttachmentKey, BalancerKey, BalancerPlan, Fragment, Part, PeerKey, Place, PublishScope,
};
use super::super::sorted::Sorted;
use super::adopt::Adopted;
use super::{Avoided, Given, Retired, TooMany, Ways, too_many};
use crate::sys::bpf::Prefix;

/// A fragment, with its numbers.
#[derive(Debug, Default)]
pub(super) struct Laid {
    plan: Fragment,
    /// The backends' slots, in the order of their keys.
    backends: Sorted<AttachmentKey, u32>,
    balancers: Sorted<BalancerKey, LaidBalancer>,
    /// Whether ways that it takes came or went since it was laid out: its tables don't follow from those there are.
    displaced: bool,
}

/// Where a balancer is.
#[derive(Debug, Clone, Copy)]
struct LaidBalancer {
    slot: u32,
    /// Its table, and its nodes behind it.
    start: u32,
    len: u32,
    nodes: u32,
}

/// What a balancer's places follow from.
#[derive(Debug, PartialEq, Eq, Default)]
struct Members {
    candidates: Vec<Candidate>,
    /// Peer slots in the order of the nodes' VTEPs.
    nodes: Vec<u32>,
}

impl Laid {
    /// Lays out `plan`: what it has in common with the `former` one keeps its numbers, what it lacks gives them up.
    pub(super) fn new(
        plan: Fragment,
        former: Option<&Self>,
        given: &mut Given,
        adopted: &mut Adopted,
    ) -> Result<Self, TooMany> {
        let mut laid = Self { plan, ..Self::default() };
        match laid.lay_out(former, given, adopted) {
            Ok(()) => {
                if let Some(former) = former {
                    let retired = former.exclusive(Some(&laid));
                    given.retire(retired);
                }
                Ok(laid)
            }
            Err(error) => {
                given.give_back(laid.exclusive(former));
                Err(error)
            }
        }
    }

    pub(super) fn plan(&self) -> &Fragment {
        &self.plan
    }

    /// Whether it is to be laid out again even if its plan is the same, because of ways that came or went.
    pub(super) fn is_displaced(&self) -> bool {
        self.displaced
    }

    /// Notes that the ways `moved` came or went.
    pub(super) fn displace(&mut self, moved: &BTreeSet<PeerKey>, given: &Given) {
        self.displaced = self.displaced || self.ways(given).any(|way| moved.contains(&way));
    }

    /// The ways that it takes, whether they are there or not.
    pub(super) fn ways(&self, given: &Given) -> impl Iterator<Item = PeerKey> {
        self.plan.attachments.values().flat_map(|attachment| {
            let Attachment { place, encrypted, encrypted_backend, .. } = *attachment;
            [encrypted, encrypted_backend].map(|encrypted| given.peer_of(place, encrypted))
        })
    }

    fn backend(&self, key: AttachmentKey) -> Option<u32> {
        self.backends.get(&key).copied()
    }

    /// The backends that get nothing new, because their nodes don't answer.
    pub(super) fn avoided(&self) -> impl Iterator<Item = Avoided> {
        self.plan.avoided().filter_map(|key| {
            let slot = self.backend(key)?;
            Some(Avoided { slot, incarnation: key.incarnation })
        })
    }

    /// The numbers that `other` doesn't share.
    fn exclusive(&self, other: Option<&Self>) -> Retired {
        let mut retired = Retired::default();
        for (key, slot) in self.backends.iter() {
            if other.is_none_or(|other| other.backend(*key).is_none()) {
                retired.backends.push(*slot);
            }
        }
        for (key, balancer) in self.balancers.iter() {
            let shared = other.and_then(|other| other.balancers.get(key));
            if shared.is_none() {
                retired.services.push(balancer.slot);
            }
            if balancer.has_places() && shared.is_none_or(|shared| !shared.shares_places(balancer)) {
                retired.ranges.push(balancer.start);
            }
        }
        retired
    }

    /// What was given out before an error is noted as well.
    fn lay_out(
        &mut self,
        former: Option<&Self>,
        given: &mut Given,
        adopted: &mut Adopted,
    ) -> Result<(), TooMany> {
        let mut backends = Vec::new();
        let result = self.lay_out_backends(former, given, adopted, &mut backends);
        self.backends = backends.into_iter().collect();
        result?;
        let mut balancers = Vec::new();
        let result = self.lay_out_balancers(former, given, adopted, &mut balancers);
        self.balancers = balancers.into_iter().collect();
        result
    }

    fn lay_out_backends(
        &self,
        former: Option<&Self>,
        given: &mut Given,
        adopted: &mut Adopted,
        backends: &mut Vec<(AttachmentKey, u32)>,
    ) -> Result<(), TooMany> {
        for (key, attachment) in self.plan.attachments.iter() {
            if attachment.part != Part::None {
                let known = former.and_then(|former| former.backend(*key)).or_else(|| adopted.backend(*key));
                let slot = match known {
                    Some(slot) => slot,
                    None => given.backends.take().map_err(|Exhausted| too_many("tasks", BACKENDS_MAX))?,
                };
                backends.push((*key, slot));
            }
        }
        Ok(())
    }

    fn lay_out_balancers(
        &self,
        former: Option<&Self>,
        given: &mut Given,
        adopted: &mut Adopted,
        balancers: &mut Vec<(BalancerKey, LaidBalancer)>,
    ) -> Result<(), TooMany> {
        for (key, plan) in self.plan.balancers.iter() {
            let members = self.members(*key, given);
            let before = former.and_then(|former| Some((former, former.balancers.get(key)?)));
            if let Some((former, before)) = before
                && !former.is_displaced()
                && former.members(*key, given) == members
            {
                balancers.push((*key, *before));
                continue;
            }
            let known = before.map(|(_, before)| before.slot).or_else(|| adopted.service(key.vni, plan));
            let slot = match known {
                Some(slot) => slot,
                None => given.services.take().map_err(|Exhausted| too_many("services", SERVICES_MAX))?,
            };
            // Of two with the same key, the later one counts: without room for places, this one.
            balancers.push((*key, LaidBalancer { slot, start: 0, len: 0, nodes: 0 }));
            balancers.push((*key, members.lay_out(slot, given, adopted)?));
        }
        Ok(())
    }

    fn members(&self, key: BalancerKey, given: &Given) -> Members {
        let serving = self.plan.serving(key).filter_map(|(key, attachment, weight)| {
            given.way_to(attachment.place, attachment.encrypted_backend, Ways::Wanted)?;
            Some(Candidate { incarnation: key.incarnation, slot: self.backend(key)?, weight })
        });
        let peers: BTreeSet<PeerKey> =
            self.plan.places(key).map(|(place, encrypted)| given.peer_of(place, encrypted)).collect();
        Members {
            candidates: serving.collect(),
            nodes: peers.into_iter().filter_map(|peer| given.slot_of(peer, Ways::Wanted)).collect(),
        }
    }

    /// Adds what this contributes to the maps.
    pub(super) fn emit(&self, given: &Given, ways: Ways, contents: &mut Contents) {
        for (key, plan) in self.plan.balancers.iter() {
            if let Some(balancer) = self.balancers.get(key) {
                emit_balancer(*key, plan, *balancer, contents);
            }
        }
        for (key, attachment) in self.plan.attachments.iter() {
            let Attachment { place, encrypted, encrypted_backend, part, .. } = *attachment;
            let ifindex = match place {
                Place::Here { ifindex } => ifindex,
                // An older record of this very host.
                Place::There(vtep) if vtep == given.own => continue,
                Place::There(_) => 0,
            };
            let balancer = BalancerKey { vni: key.vni, scope: PublishScope::Cluster };
            let draining = if part == Part::Draining { BACKEND_DRAINING } else { 0 };
            let emitted = Emitted {
                key: *key,
                // One that can't be reached as it has to be can't be reached.
                endpoint: given.way_to(place, encrypted, ways),
                backend: self.backend(*key).zip(given.way_to(place, encrypted_backend, ways)),
                service: self.balancers.get(&balancer).map_or(0, |balancer| balancer.slot),
                ifindex,
                flags: draining | if encrypted_backend { BACKEND_ENCRYPTED } else { 0 },
            };
            emitted.emit(attachment.addr, &mut contents.v4);
            if let Some(addr) = attachment.addr6 {
                emitted.emit(addr, &mut contents.v6);
            }
        }
    }
}

impl LaidBalancer {
    fn has_places(&self) -> bool {
        self.len + self.nodes > 0
    }

    fn shares_places(&self, other: &Self) -> bool {
        self.has_places() && self.start == other.start
    }
}

impl Members {
    /// Finds room for the places of the balancer in `slot`, unless the kernel holds the very same.
    fn lay_out(self, slot: u32, given: &mut Given, adopted: &mut Adopted) -> Result<LaidBalancer, TooMany> {
        let mut places = maglev::build(&self.candidates);
        let len = places.len() as u32;
        let nodes = self.nodes.len() as u32;
        places.extend(self.nodes);
        let start = if places.is_empty() {
            0
        } else {
            match adopted.range(slot, len, nodes, &places) {
                Some(start) => start,
                None => given.place(&places)?,
            }
        };
        Ok(LaidBalancer { slot, start, len, nodes })
    }
}

fn emit_balancer(key: BalancerKey, plan: &BalancerPlan, balancer: LaidBalancer, contents: &mut Contents) {
    let LaidBalancer { slot, start, len, nodes } = balancer;
    let BalancerPlan { vip4, vip6, ports, flags, sources, addresses } = plan;
    let vni = key.vni;
    contents.common.services.insert(slot, Service { start, len, nodes, vni, flags: *flags });
    contents.v4.vips.extend(vip4.map(|addr| (AddrKey { vni, addr }, slot)));
    contents.v6.vips.extend(vip6.map(|addr| (AddrKey { vni, addr }, slot)));
    for (port, target) in ports.iter() {
        contents.common.ports.insert(*port, Port { service: slot, target: *target, reserved: 0 });
    }
    emit_rules(&sources.v4, |addr| RuleKey::source(slot, addr), &mut contents.v4);
    emit_rules(&sources.v6, |addr| RuleKey::source(slot, addr), &mut contents.v6);
    emit_rules(&addresses.v4, |addr| RuleKey::dialled(slot, addr), &mut contents.v4);
    emit_rules(&addresses.v6, |addr| RuleKey::dialled(slot, addr), &mut contents.v6);
}

fn emit_rules<A: Address>(
    rules: &Sorted<(u8, A), u32>,
    key: impl Fn(A) -> RuleKey<A>,
    family: &mut Family<A>,
) {
    for ((len, net), verdict) in rules.iter() {
        let len = RuleKey::<A>::SCOPE_BITS + u32::from(*len);
        family.rules.insert(Prefix { len, key: key(*net) }, *verdict);
    }
}

/// What an attachment has in common in both families.
struct Emitted {
    key: AttachmentKey,
    /// The peer to reach its address by.
    endpoint: Option<u32>,
    /// Its slot as a backend, and the peer to reach that by.
    backend: Option<(u32, u32)>,
    service: u32,
    ifindex: u32,
    flags: u32,
}

impl Emitted {
    fn emit<A: Address>(&self, addr: A, family: &mut Family<A>) {
        let Self { key: AttachmentKey { incarnation, vni }, endpoint, backend, service, ifindex, flags } =
            *self;
        if let Some(peer) = endpoint {
            family.endpoints.insert(AddrKey { vni, addr }, Endpoint { peer, ifindex, incarnation });
        }
        if let Some((slot, peer)) = backend {
            let backend = Backend { addr, vni, peer, ifindex, incarnation, flags };
            family.backends.insert(slot, backend);
            family.tasks.insert(TaskKey { incarnation, vni }, TaskSlots { backend: slot, service });
        }
    }
}
