//! Addresses of tasks and services.
//!
//! An address that was never given out comes first, round the subnet; a freed one rests at the end of a queue, and is
//! given out again only when there is no other, the one that has rested longest first. None leaves the queue before
//! every live node has applied the table that frees it: until then a node may still send to its former tenant by it.

use std::net::Ipv4Addr;

use imbl::OrdSet;
use mesh_api::id::NetworkId;

use super::Draft;
use super::alloc::subnet;
use crate::model::{Freed, IpamConfig, Network, State, Subnet};
use crate::refusal::Refusal;

/// Addresses that rest in a network at most once every node has let go of them: a bound on what churn in a large subnet
/// leaves in the state.
const RESTING_MAX: usize = 4096;

/// The addresses of a subnet that tasks and services can have, as first and last; the gateway and reserved ones may be
/// among them.
fn bounds(subnet: &Subnet) -> (u32, u32) {
    let first = u32::from(subnet.cidr.network()) + 1;
    let last = u32::from(subnet.cidr.broadcast()) - 1;
    (first.max(subnet.range.network().into()), last.min(subnet.range.broadcast().into()))
}

fn subnet_capacity(subnet: &Subnet) -> usize {
    let (first, last) = bounds(subnet);
    let kept = subnet.reserved.iter().chain([&subnet.gateway]);
    let kept = kept.filter(|addr| (first..=last).contains(&u32::from(**addr))).count();
    ((last + 1).saturating_sub(first) as usize).saturating_sub(kept)
}

/// How many addresses a network has for tasks and services.
pub fn address_capacity(network: &Network) -> usize {
    network.subnets.iter().map(subnet_capacity).sum()
}

/// Whether a configuration leaves addresses for tasks and services, as far as it says.
pub(crate) fn has_room(config: &IpamConfig) -> bool {
    config.subnet.is_none_or(|cidr| match subnet(cidr, config) {
        Ok(subnet) => subnet_capacity(&subnet) > 0,
        // It is refused for another reason.
        Err(_) => true,
    })
}

/// Whether a network can give out an address.
pub fn has_free_address(state: &State, network: &NetworkId) -> bool {
    state.counters.know_all_addresses()
        && (has_unused_address(state, network) || rested(state, network).is_some())
}

/// Whether a network has an address that neither is taken nor rests.
fn has_unused_address(state: &State, id: &NetworkId) -> bool {
    let taken = state.lookup.addresses.get(id).map_or(0, OrdSet::len);
    let resting = state.freed.get(id).map_or(0, OrdSet::len);
    state.networks.get(id).is_some_and(|network| taken + resting < address_capacity(network))
}

/// The address that has rested longest, if no live node holds it any longer.
fn rested(state: &State, network: &NetworkId) -> Option<Freed> {
    let first = *state.freed.get(network)?.get_min()?;
    (first.index <= state.counters.acknowledged).then_some(first)
}

/// Whether an address rests only until it is known that every live node has applied the table up to `index`; all of them do
/// after a backup was restored.
pub(crate) fn awaits(state: &State, index: u64) -> bool {
    if !state.counters.know_all_addresses() && state.counters.restored <= index {
        return true;
    }
    let unspecified = Ipv4Addr::UNSPECIFIED;
    let next = Freed { index: state.counters.acknowledged.saturating_add(1), addr: unspecified };
    let awaited = |resting: &OrdSet<Freed>| resting.range(next..).next().is_some_and(|it| it.index <= index);
    state.freed.values().any(awaited)
}

/// Every live node has applied the table up to `index`.
pub(super) fn acknowledge(draft: &mut Draft, index: u64) {
    let acknowledged = draft.state.counters.acknowledged.max(index.min(draft.state.index));
    draft.state.counters.acknowledged = acknowledged;
    let crowded = draft.state.freed.iter().filter(|(_, resting)| resting.len() > RESTING_MAX);
    for network in crowded.map(|(network, _)| network.clone()).collect::<Vec<_>>() {
        while draft.state.freed.get(&network).is_some_and(|resting| resting.len() > RESTING_MAX)
            && let Some(freed) = rested(&draft.state, &network)
        {
            draft.end_rest(&network, freed);
        }
    }
}

impl Draft {
    /// Gives out an address; whoever puts it into a task or service takes it. `None` if there is none.
    pub(super) fn take_address(&mut self, id: &NetworkId) -> Option<Ipv4Addr> {
        if !self.state.counters.know_all_addresses() {
            return None;
        }
        if !has_unused_address(&self.state, id) {
            let freed = rested(&self.state, id)?;
            self.end_rest(id, freed);
            return Some(freed.addr);
        }
        let network = self.state.networks.get(id)?;
        let free = |subnet: &Subnet| {
            let (first, last) = bounds(subnet);
            let count = last.checked_sub(first)? + 1;
            #[cfg(test)]
            if crate::testing::gives_addresses_twice() {
                return Some((1, Ipv4Addr::from(first + 1)));
            }
            let is_free = |addr: Ipv4Addr| {
                addr != subnet.gateway
                    && !subnet.reserved.contains(&addr)
                    && !self.state.lookup.is_taken(id, addr)
                    && !self.state.lookup.is_resting(id, addr)
            };
            (1..=count)
                .map(|step| (subnet.cursor + step) % count)
                .map(|offset| (offset, Ipv4Addr::from(first + offset)))
                .find(|(_, addr)| is_free(*addr))
        };
        let found = network.subnets.iter().enumerate().find_map(|(at, subnet)| Some((at, free(subnet)?)));
        let (at, (cursor, addr)) = found?;
        let mut network = Network::clone(network);
        network.subnets[at].cursor = cursor;
        self.put_network(network);
        Some(addr)
    }

    /// Gives out this address of a network, as [`Self::take_address`] does any.
    pub(super) fn claim_address(&mut self, id: &NetworkId, addr: Ipv4Addr) -> Result<(), Refusal> {
        const FIELD: &str = "ip";
        let network = self.network(id)?;
        let name = &network.spec.name;
        let Some(subnet) = network.subnets.iter().find(|subnet| subnet.cidr.contains(&addr)) else {
            let subnets: Vec<_> = network.subnets.iter().map(|subnet| subnet.cidr.to_string()).collect();
            let problem = format!("{addr} is not in network {name}, which has {}", subnets.join(", "));
            return Err(Refusal::invalid(FIELD, problem));
        };
        let (first, last) = bounds(subnet);
        if !(first..=last).contains(&addr.into()) {
            let (first, last) = (Ipv4Addr::from(first), Ipv4Addr::from(last));
            let problem = format!("network {name} gives out {first} to {last}, and {addr} is not among them");
            return Err(Refusal::invalid(FIELD, problem));
        }
        if addr == subnet.gateway || subnet.reserved.contains(&addr) {
            let problem = format!("{addr} is network {name}'s gateway, or set aside by --aux-address");
            return Err(Refusal::invalid(FIELD, problem));
        }
        if self.state.lookup.is_taken(id, addr) {
            return Err(Refusal::conflict(FIELD, format!("{addr} is another's in network {name}")));
        }
        if !self.state.counters.know_all_addresses() {
            let problem = format!(
                "{addr} may be another's in network {name}, since the swarm was restored from a backup a moment ago: try again \
                 in some seconds"
            );
            return Err(Refusal::conflict(FIELD, problem));
        }
        let resting = self.state.freed.get(id).and_then(|resting| resting.iter().find(|it| it.addr == addr));
        if let Some(freed) = resting.copied() {
            if freed.index > self.state.counters.acknowledged {
                let problem = format!(
                    "{addr} was another's in network {name} a moment ago, and nodes have yet to forget it: try again in some \
                     seconds"
                );
                return Err(Refusal::conflict(FIELD, problem));
            }
            self.end_rest(id, freed);
        }
        Ok(())
    }

    /// Lets addresses rest that nobody holds any longer.
    pub(super) fn rest<'a>(&mut self, held: impl Iterator<Item = (&'a NetworkId, Ipv4Addr)>) {
        let index = self.index;
        for (network, addr) in held {
            let is_known = index <= self.state.counters.acknowledged;
            if is_known
                || self.state.lookup.is_taken(network, addr)
                || !self.state.networks.contains_key(network)
            {
                continue;
            }
            self.state.freed.entry(network.clone()).or_default().insert(Freed { index, addr });
            self.state.lookup.add_resting(network, addr);
        }
    }

    /// Ends an address' rest.
    fn end_rest(&mut self, network: &NetworkId, freed: Freed) {
        if let Some(resting) = self.state.freed.get_mut(network) {
            resting.remove(&freed);
            if resting.is_empty() {
                self.state.freed.remove(network);
            }
        }
        self.state.lookup.remove_resting(network, freed.addr);
    }
}

#[cfg(test)]
mod tests;
