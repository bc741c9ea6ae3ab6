//! A service's balancers: VIPs, published ports, and whom they let in.

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh_api::table::{
    Affinity, BalancingRecord, EndpointMode, NetworkRecord, PortRecord, Protocol, PublishMode, ReturnPath,
    ServiceRecord, Table, VipRecord,
};
use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{
    PROTO_TCP, PROTO_UDP, PortKey, RULE_ALLOW, RULE_DENY, SERVICE_ADDRESSES, SERVICE_AFFINITY,
    SERVICE_DIRECT, SERVICE_ENCRYPTED, SERVICE_SOURCES,
};

use super::super::sorted::Sorted;
use super::{
    Attachment, AttachmentKey, BalancerKey, BalancerPlan, Local, Part, Place, PublishScope, RulePlan,
    is_encrypted,
};

/// A service's balancers, given its tasks' attachments.
pub(super) fn plan_balancers(
    table: &Table,
    local: &Local,
    service: &ServiceRecord,
    attachments: &Sorted<AttachmentKey, Attachment>,
) -> Sorted<BalancerKey, BalancerPlan> {
    let mut balancers = BTreeMap::new();
    for vip in &service.vips {
        if let Some(network) = table.networks.get(&vip.network) {
            let key = BalancerKey { vni: network.vni, scope: PublishScope::Cluster };
            let mut plan = plan_vip(local, service, network, vip);
            if is_encrypted(table, network, service.vips.iter().map(|vip| &vip.network)) {
                plan.flags |= SERVICE_ENCRYPTED;
            }
            // Nothing leads to one without either: a service in DNS round robin, an attachment.
            if plan.vip4.is_some() || !plan.ports.is_empty() {
                balancers.insert(key, plan);
            }
        }
    }
    // Ports in host mode answer on the task's own node, for its first attachment.
    if service.ports.iter().any(|port| port.mode == PublishMode::Host) {
        for (key, attachment) in attachments.iter() {
            let serves = attachment.first
                && matches!(attachment.place, Place::Here { .. })
                && matches!(attachment.part, Part::Serving { .. });
            if serves {
                let balancer = BalancerKey { vni: key.vni, scope: PublishScope::Node };
                let two_families = attachment.addr6.is_some();
                balancers.entry(balancer).or_insert_with(|| {
                    let ports = ports(service, PublishMode::Host, two_families);
                    published(&service.balancing, BalancerPlan { ports, ..BalancerPlan::default() })
                });
            }
        }
    }
    balancers.into_iter().collect()
}

fn plan_vip(
    local: &Local,
    service: &ServiceRecord,
    network: &NetworkRecord,
    vip: &VipRecord,
) -> BalancerPlan {
    let addr = vip.addr.filter(|_| service.endpoint_mode == EndpointMode::Vip);
    let mut plan = BalancerPlan {
        vip4: addr.map(Be32::from),
        vip6: addr.and_then(|addr| Some(network.subnet6?.addr_of(addr).into())),
        flags: flags(&service.balancing),
        ..BalancerPlan::default()
    };
    let has_ports = service.ports.iter().any(|port| port.mode == PublishMode::Ingress);
    if !network.ingress || !has_ports {
        return plan;
    }
    plan.ports = ports(service, PublishMode::Ingress, network.subnet6.is_some());
    let mut plan = published(&service.balancing, plan);
    let nodes = &service.balancing.publish_nodes;
    if nodes.as_ref().is_some_and(|nodes| !nodes.contains(&local.node)) {
        // Tasks here serve what comes in by the chosen nodes: the ports are known, and answer on no address.
        plan.flags |= SERVICE_ADDRESSES;
        plan.addresses = RulePlan::new(RULE_DENY, []);
    }
    plan
}

/// The ports of one mode, in IPv4 and, where the network has it, in IPv6.
fn ports(service: &ServiceRecord, mode: PublishMode, two_families: bool) -> Sorted<PortKey, Be16> {
    let mut ports = Vec::new();
    for PortRecord { name: _, protocol, target, published, mode: _ } in
        service.ports.iter().filter(|port| port.mode == mode)
    {
        let (protocol, published) = (ip_protocol(*protocol), Be16::new(*published));
        ports.push((PortKey::new::<Be32>(protocol, published), Be16::new(*target)));
        if two_families {
            ports.push((PortKey::new::<Ip6>(protocol, published), Be16::new(*target)));
        }
    }
    ports.into_iter().collect()
}

fn ip_protocol(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => PROTO_TCP,
        Protocol::Udp => PROTO_UDP,
    }
}

fn flags(balancing: &BalancingRecord) -> u32 {
    let affinity = if balancing.affinity == Affinity::ClientIp { SERVICE_AFFINITY } else { 0 };
    let direct = if balancing.return_path == ReturnPath::Direct { SERVICE_DIRECT } else { 0 };
    affinity | direct
}

/// A balancer that ports lead to, with the rules for them.
fn published(balancing: &BalancingRecord, mut plan: BalancerPlan) -> BalancerPlan {
    plan.flags = flags(balancing);
    if !balancing.sources.is_empty() {
        plan.flags |= SERVICE_SOURCES;
        let any_allowed = balancing.sources.iter().any(|rule| rule.allow);
        // The refusals last: what is both let in and refused is refused.
        let rules = [(true, RULE_ALLOW), (false, RULE_DENY)].into_iter().flat_map(|(allow, verdict)| {
            let alike = balancing.sources.iter().filter(move |rule| rule.allow == allow);
            alike.map(move |rule| (rule.net, verdict))
        });
        plan.sources = RulePlan::new(if any_allowed { RULE_DENY } else { RULE_ALLOW }, rules);
    }
    if !balancing.publish_addresses.is_empty() {
        plan.flags |= SERVICE_ADDRESSES;
        let rules = balancing.publish_addresses.iter().map(|net| (*net, RULE_ALLOW));
        plan.addresses = RulePlan::new(RULE_DENY, rules);
    }
    plan
}

impl RulePlan {
    /// Rules of which later ones count, for both families, that say `default` where none matches: a look always finds
    /// a verdict.
    fn new(default: u32, rules: impl IntoIterator<Item = (IpNet, u32)>) -> Self {
        let mut v4 = vec![((0, Be32::default()), default)];
        let mut v6 = vec![((0, Ip6::default()), default)];
        for (net, verdict) in rules {
            match net {
                IpNet::V4(net) => v4.push(((net.prefix_len(), net.network().into()), verdict)),
                IpNet::V6(net) => v6.push(((net.prefix_len(), net.network().into()), verdict)),
            }
        }
        Self { v4: v4.into_iter().collect(), v6: v6.into_iter().collect() }
    }
}
