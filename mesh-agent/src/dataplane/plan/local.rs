//! What is this node's own: its addresses, its tasks' interfaces and their aliases.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use mesh_api::table::Table;
use mesh_common::addr::{Address, Ip6};
use mesh_common::be::Be32;
use mesh_common::map::{Alias, IFACE_INTERNAL, Iface};

use super::{Local, LocalEndpoint};

/// The IPv6 aliases' subnet, of 64 bits: the host is its `::1`, local clients' sockets are sent to its `::2`, an
/// endpoint has its IPv4 alias as the lowest 32 bits.
pub const ALIAS6_NET: Ip6 = Ip6::from_groups([0xfd73, 0x686f, 0x616c, 1, 0, 0, 0, 0]);

/// This node's own part of the plan.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LocalPlan {
    /// IPv4.
    pub v4: LocalFamily<Be32>,
    /// IPv6.
    pub v6: LocalFamily<Ip6>,
}

/// This node's own part of the plan in one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalFamily<A: Ord> {
    /// The node's own addresses.
    pub addresses: BTreeSet<A>,
    /// Interfaces of its tasks, by the index of their host side.
    pub ifaces: BTreeMap<u32, Iface<A>>,
    /// Their aliases.
    pub aliases: BTreeMap<A, Alias<A>>,
}

impl<A: Ord> Default for LocalFamily<A> {
    fn default() -> Self {
        Self { addresses: BTreeSet::new(), ifaces: BTreeMap::new(), aliases: BTreeMap::new() }
    }
}

impl<A: Address> LocalFamily<A> {
    fn add(&mut self, ifindex: u32, iface: Iface<A>) {
        let Iface { addr, gateway, alias, vni, .. } = iface;
        self.ifaces.insert(ifindex, iface);
        self.aliases.insert(alias, Alias { addr, gateway, ifindex, vni });
    }
}

/// This node's own part of the plan.
pub fn plan_local(table: &Table, local: &Local) -> LocalPlan {
    let mut plan = LocalPlan::default();
    for addr in &local.addresses {
        match addr {
            IpAddr::V4(addr) => plan.v4.addresses.insert((*addr).into()),
            IpAddr::V6(addr) => plan.v6.addresses.insert((*addr).into()),
        };
    }
    for endpoint in &local.endpoints {
        plan_endpoint(&mut plan, table, endpoint);
    }
    plan
}

fn plan_endpoint(plan: &mut LocalPlan, table: &Table, endpoint: &LocalEndpoint) {
    let (Some(network), Some(task)) =
        (table.networks.get(&endpoint.network), table.tasks.get(&endpoint.task))
    else {
        return;
    };
    let (vni, incarnation) = (network.vni, task.incarnation);
    let flags = if network.internal { IFACE_INTERNAL } else { 0 };
    let subnet = network.subnets.iter().find(|subnet| subnet.cidr.contains(&endpoint.addr));
    if let Some(subnet) = subnet {
        let iface = Iface {
            addr: endpoint.addr.into(),
            gateway: subnet.gateway.into(),
            mask: subnet.cidr.netmask().into(),
            alias: endpoint.alias.into(),
            vni,
            incarnation,
            flags,
        };
        plan.v4.add(endpoint.ifindex, iface);
    }
    if let Some(subnet) = network.subnet6 {
        let iface = Iface {
            addr: subnet.addr_of(endpoint.addr).into(),
            gateway: subnet.gateway.into(),
            mask: subnet.cidr.netmask().into(),
            alias: alias6(endpoint.alias),
            vni,
            incarnation,
            flags,
        };
        plan.v6.add(endpoint.ifindex, iface);
    }
}

/// The IPv6 form of an endpoint's alias.
fn alias6(alias: Ipv4Addr) -> Ip6 {
    ALIAS6_NET.with_low(alias.into())
}
