//! Addresses, subnets and VXLAN identifiers.
//!
//! Addresses go round: after the last one given out comes the next, so that a freed address is the last to be given
//! out again, and whatever still remembers its former tenant has the longest time to forget.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use mesh_api::id::NetworkId;

use super::Draft;
use crate::model::network::{VNI_MAX, VNI_MIN};
use crate::model::{IpamConfig, Network, State, Subnet};
use crate::refusal::Refusal;

/// Subnets that no network can have: this host, loopback, the nodes' own aliases for endpoints, multicast and above.
const UNUSABLE: [Ipv4Net; 4] = [
    Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 8),
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 64, 0), 18),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3),
];

/// Longest prefix of a subnet: a gateway and a task.
const PREFIX_LEN_MAX: u8 = 30;
/// Shortest prefix of a subnet.
const PREFIX_LEN_MIN: u8 = 8;

/// The addresses of a subnet that tasks and services can have, as first and last; the gateway may be among them.
fn bounds(subnet: &Subnet) -> (u32, u32) {
    let first = u32::from(subnet.cidr.network()) + 1;
    let last = u32::from(subnet.cidr.broadcast()) - 1;
    (first.max(subnet.range.network().into()), last.min(subnet.range.broadcast().into()))
}

/// How many addresses a network has for tasks and services.
pub fn address_capacity(network: &Network) -> usize {
    let capacity = |subnet: &Subnet| {
        let (first, last) = bounds(subnet);
        let gateway = (first..=last).contains(&subnet.gateway.into());
        (last + 1).saturating_sub(first) as usize - usize::from(gateway)
    };
    network.subnets.iter().map(capacity).sum()
}

/// Whether a network has a free address.
pub fn has_free_address(state: &State, network: &NetworkId) -> bool {
    let taken = state.lookup.addresses.get(network).map_or(0, imbl::OrdSet::len);
    state.networks.get(network).is_some_and(|network| taken < address_capacity(network))
}

impl Draft {
    /// Gives out an address; whoever puts it into a task or service takes it. `None` if there is none.
    pub(super) fn take_address(&mut self, id: &NetworkId) -> Option<Ipv4Addr> {
        if !has_free_address(&self.state, id) {
            return None;
        }
        let network = self.state.networks.get(id)?;
        let free = |subnet: &Subnet| {
            let (first, last) = bounds(subnet);
            let count = last.checked_sub(first)? + 1;
            (1..=count)
                .map(|step| (subnet.cursor + step) % count)
                .map(|offset| (offset, Ipv4Addr::from(first + offset)))
                .find(|(_, addr)| *addr != subnet.gateway && !self.state.lookup.is_taken(id, *addr))
        };
        let found = network.subnets.iter().enumerate().find_map(|(at, subnet)| Some((at, free(subnet)?)));
        let (at, (cursor, addr)) = found?;
        let mut network = Network::clone(network);
        network.subnets[at].cursor = cursor;
        self.put_network(network);
        Some(addr)
    }

    /// The next free VXLAN identifier.
    pub(super) fn take_vni(&mut self) -> Result<u32, Refusal> {
        let count = VNI_MAX - VNI_MIN + 1;
        let last = self.state.counters.vni;
        let start = if last < VNI_MIN { 0 } else { last - VNI_MIN + 1 };
        let is_free = |vni: &u32| self.state.networks.values().all(|network| network.vni != *vni);
        let vni = (0..count).map(|step| VNI_MIN + (start + step) % count).find(is_free);
        let vni = vni.ok_or(Refusal::VnisExhausted)?;
        self.state.counters.vni = vni;
        Ok(vni)
    }

    /// The subnets for what was asked: as asked, or one from the pools.
    pub(super) fn choose_subnets(&self, ipam: &[IpamConfig]) -> Result<Vec<Subnet>, Refusal> {
        let mut taken: Vec<Ipv4Net> = self
            .state
            .networks
            .values()
            .flat_map(|network| &network.subnets)
            .map(|subnet| subnet.cidr)
            .collect();
        let automatic = [IpamConfig { subnet: None, range: None, gateway: None }];
        let ipam = if ipam.is_empty() { &automatic[..] } else { ipam };
        let mut subnets = Vec::with_capacity(ipam.len());
        for config in ipam {
            let cidr = match config.subnet {
                Some(subnet) => checked_subnet(subnet, &taken)?,
                None => self.automatic_subnet(&taken)?,
            };
            taken.push(cidr);
            subnets.push(subnet(cidr, config)?);
        }
        Ok(subnets)
    }

    fn automatic_subnet(&self, taken: &[Ipv4Net]) -> Result<Ipv4Net, Refusal> {
        let cluster = self.cluster()?;
        let blocked = taken.iter().chain(&cluster.avoid).chain(&UNUSABLE);
        let mut blocked: Vec<(u32, u32)> =
            blocked.map(|net| (net.network().into(), net.broadcast().into())).collect();
        blocked.sort_unstable();
        let mut gaps =
            cluster.address_pools.iter().filter_map(|pool| first_gap(*pool, cluster.subnet_size, &blocked));
        gaps.next().ok_or(Refusal::SubnetsExhausted)
    }
}

/// The first subnet of a pool that overlaps none of the blocked ranges, which are in order of their starts.
fn first_gap(pool: Ipv4Net, prefix_len: u8, blocked: &[(u32, u32)]) -> Option<Ipv4Net> {
    let size = 1_u64 << (32 - prefix_len);
    let mut start = u64::from(u32::from(pool.network()));
    for (first, last) in blocked.iter().map(|(first, last)| (u64::from(*first), u64::from(*last))) {
        if first >= start + size {
            break;
        }
        if last >= start {
            start = (last + 1).next_multiple_of(size);
        }
    }
    let start = u32::try_from(start).ok().map(Ipv4Addr::from)?;
    Ipv4Net::new(start, prefix_len).ok().filter(|subnet| pool.contains(subnet))
}

fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

fn checked_subnet(subnet: Ipv4Net, taken: &[Ipv4Net]) -> Result<Ipv4Net, Refusal> {
    let cidr = subnet.trunc();
    if !(PREFIX_LEN_MIN..=PREFIX_LEN_MAX).contains(&cidr.prefix_len()) {
        let problem = format!("{subnet}: the prefix must be /{PREFIX_LEN_MIN} to /{PREFIX_LEN_MAX}");
        return Err(Refusal::invalid("IPAM.Config.Subnet", problem));
    }
    if UNUSABLE.iter().any(|unusable| overlap(cidr, *unusable)) {
        return Err(Refusal::invalid("IPAM.Config.Subnet", format!("{subnet} is reserved")));
    }
    match taken.iter().find(|other| overlap(cidr, **other)) {
        Some(other) => Err(Refusal::SubnetOverlaps { subnet: cidr.into(), other: (*other).into() }),
        None => Ok(cidr),
    }
}

fn subnet(cidr: Ipv4Net, config: &IpamConfig) -> Result<Subnet, Refusal> {
    let first = Ipv4Addr::from(u32::from(cidr.network()) + 1);
    let gateway = config.gateway.unwrap_or(first);
    if !cidr.contains(&gateway) || gateway == cidr.network() || gateway == cidr.broadcast() {
        let problem = format!("{gateway} is not a host address of {cidr}");
        return Err(Refusal::invalid("IPAM.Config.Gateway", problem));
    }
    let range = config.range.map_or(cidr, |range| range.trunc());
    if !cidr.contains(&range) {
        let problem = format!("{range} is not part of {cidr}");
        return Err(Refusal::invalid("IPAM.Config.IPRange", problem));
    }
    Ok(Subnet { cidr, gateway, range, cursor: 0 })
}
