//! What a lookup found, in words.

use std::net::{IpAddr, SocketAddr};

use mesh_common::addr::{Address as _, Ip6};
use mesh_common::be::Be16;
use mesh_common::map::{
    BACKEND_DRAINING, Backend, FLOW_CLOSED, FLOW_DIRECT, FLOW_TEACH, Flow, FlowKey, Peer, Port, PortKey,
    RULE_ALLOW, RULE_DENY, RuleKey, SERVICE_ADDRESSES, SERVICE_AFFINITY, SERVICE_DIRECT, SERVICE_ENCRYPTED,
    SERVICE_SOURCES, Sent, Service,
};
use mesh_common::vxlan::{VNI_MESH_REPLY, VNI_MESH_REQUEST};
use mesh_datapath::tables::Stage;

use super::flows::Kind;
use super::{Side, interface_name, protocol_name};

/// A node, by its VXLAN address; this one without.
pub(super) fn node(vtep: Option<IpAddr>) -> String {
    let through = |vtep| if Ip6::from(vtep).is_wireguard() { " through WireGuard" } else { "" };
    vtep.map_or_else(|| "this node".to_owned(), |vtep| format!("node {vtep}{}", through(vtep)))
}

/// A VXLAN identifier.
pub(super) fn vni(vni: u32) -> String {
    match vni {
        VNI_MESH_REQUEST => "published ports".to_owned(),
        VNI_MESH_REPLY => "replies of published ports".to_owned(),
        vni => format!("network {vni}"),
    }
}

/// A flow.
pub(super) fn flow_key<A: Side>(key: &FlowKey<A>) -> String {
    let end = |addr: A, port: Be16| SocketAddr::new(addr.ip(), port.get());
    let (src, dst) = (end(key.src, key.src_port), end(key.dst, key.dst_port));
    format!("{} {src} > {dst} ({})", protocol_name(key.protocol()), vni(key.vni()))
}

pub(super) fn port(key: PortKey, found: Option<&Port>) -> String {
    let PortKey { port, protocol, family } = key;
    let (port, protocol) = (port.get(), protocol_name(protocol));
    match found {
        Some(Port { service, target, .. }) => format!(
            "port {port}/{protocol} is published on IPv{family}: service slot {service}, whose tasks listen on {}",
            target.get()
        ),
        None => format!("port {port}/{protocol} is not published on IPv{family}"),
    }
}

pub(super) fn service(slot: u32, found: Option<&Service>) -> String {
    match found {
        None => format!("service slot {slot} does not exist"),
        Some(Service { len: 0, .. }) => format!("service slot {slot} has no running task"),
        Some(Service { start, len, nodes, vni: network, flags }) => {
            let places = if *len == 1 { "1 place".to_owned() } else { format!("{len} places") };
            let on = if *nodes == 1 { "1 node".to_owned() } else { format!("{nodes} nodes") };
            let known = [
                (SERVICE_AFFINITY, "affinity by client"),
                (SERVICE_DIRECT, "direct return"),
                (SERVICE_SOURCES, "rules for clients"),
                (SERVICE_ADDRESSES, "rules for dialled addresses"),
                (SERVICE_ENCRYPTED, "encrypted between nodes"),
            ];
            let set = known.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| format!(", {name}"));
            let set: String = set.collect();
            format!("service slot {slot}: {places} from {start} on, tasks on {on}, {}{set}", vni(*network))
        }
    }
}

/// What is at a place, seen by whoever last asked for `service`.
pub(super) fn place(place: u32, found: Option<u32>, service: Option<&Service>) -> String {
    let Some(found) = found else { return format!("place {place} does not exist") };
    match service.map(|service| (place.wrapping_sub(service.start), service)) {
        Some((index, Service { len, .. })) if index < *len => {
            format!("the flow's hash leads to place {index} of {len}: backend slot {found}")
        }
        Some((index, Service { len, nodes, .. })) if index - len < *nodes => {
            format!("the service's node number {}: {}", index - len + 1, peer_slot(found))
        }
        _ => format!("place {place} holds {found}"),
    }
}

fn peer_slot(slot: u32) -> String {
    if slot == 0 { "this node".to_owned() } else { format!("peer slot {slot}") }
}

pub(super) fn backend<A: Side>(slot: u32, found: Option<&Backend<A>>, on: Option<IpAddr>) -> String {
    match found {
        Some(Backend { addr, vni: network, incarnation, ifindex, peer, flags }) if *incarnation != 0 => {
            let draining =
                if flags & BACKEND_DRAINING == 0 { "" } else { ", draining: it gets no new flows" };
            let by = if *peer == 0 { format!(" behind {}", interface_name(*ifindex)) } else { String::new() };
            let (addr, network, on) = (addr.ip(), vni(*network), node(on));
            format!("backend {addr} ({network}, incarnation {incarnation}) on {on}{by}{draining}")
        }
        _ => format!("backend slot {slot} is empty"),
    }
}

pub(super) fn rule<A: Side>(key: &RuleKey<A>, found: Option<u32>) -> String {
    let (scope, addr) = (key.scope.get(), key.addr.ip());
    let what = if scope & 1 == 0 { format!("client {addr}") } else { format!("dialled address {addr}") };
    let said = match found {
        Some(RULE_ALLOW) => "let in",
        Some(RULE_DENY) => "refused",
        Some(_) => "a rule of another version",
        None => "no rule, and so refused",
    };
    format!("service slot {} about the {what}: {said}", scope >> 1)
}

pub(super) fn peer(slot: u32, found: Option<&Peer>, now_ns: u64) -> String {
    match found {
        None => format!("peer slot {slot} does not exist"),
        Some(Peer { vtep, expires_ns, ifindex, mtu, .. }) => {
            let node = node(Some(IpAddr::from(*vtep)));
            match *expires_ns {
                0 => format!("{node}: its next hop is not known yet"),
                expires => {
                    let age = if expires < now_ns { ", to be asked for again" } else { "" };
                    format!("{node}: next hop by {}, MTU {mtu}{age}", interface_name(*ifindex))
                }
            }
        }
    }
}

pub(super) fn sent<A: Side>(key: &FlowKey<A>, found: Option<&Sent>) -> String {
    let key = flow_key(key);
    match found {
        Some(Sent { backend, incarnation, .. }) => {
            format!("flow {key} was sent to backend slot {backend}, incarnation {incarnation}, before")
        }
        None => format!("flow {key} has not been sent to another node before"),
    }
}

pub(super) fn flow<A: Side>(key: &FlowKey<A>, stage: Stage, found: Option<&Flow<A>>) -> String {
    let key = flow_key(key);
    let stage = match stage {
        Stage::Opening => "opening",
        Stage::Established => "established",
    };
    let Some(Flow { kind, backend, incarnation, flags, .. }) = found else {
        return format!("flow {key} is not among the {stage} ones");
    };
    let known = [(FLOW_CLOSED, ", closed"), (FLOW_DIRECT, ", direct return"), (FLOW_TEACH, ", teaching")];
    let set: String = known.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| *name).collect();
    let slot = if *backend == 0 { String::new() } else { format!(" to backend slot {backend}") };
    format!("flow {key} is {stage}: {}{slot}, incarnation {incarnation}{set}", Kind(*kind).name())
}

#[cfg(test)]
mod tests {
    use mesh_common::be::Be32;
    use mesh_common::map::PROTO_TCP;

    use super::*;

    #[test]
    fn what_a_port_leads_to_is_told() {
        let key = PortKey::new::<Be32>(PROTO_TCP, Be16::new(8080));
        let found = Port { service: 3, target: Be16::new(80), reserved: 0 };
        assert_eq!(
            port(key, Some(&found)),
            "port 8080/tcp is published on IPv4: service slot 3, whose tasks listen on 80"
        );
        assert_eq!(port(key, None), "port 8080/tcp is not published on IPv4");
    }

    #[test]
    fn a_place_is_told_by_what_it_is_for() {
        let found = Service { start: 100, len: 3, nodes: 2, vni: 4096, flags: SERVICE_DIRECT };
        let table =
            "service slot 3: 3 places from 100 on, tasks on 2 nodes, network 4096, direct return".to_owned();
        assert_eq!(service(3, Some(&found)), table);
        assert_eq!(
            place(101, Some(7), Some(&found)),
            "the flow's hash leads to place 1 of 3: backend slot 7"
        );
        assert_eq!(place(103, Some(0), Some(&found)), "the service's node number 1: this node");
        assert_eq!(place(104, Some(2), Some(&found)), "the service's node number 2: peer slot 2");
        assert_eq!(place(9, Some(7), Some(&found)), "place 9 holds 7");
        assert_eq!(service(4, Some(&Service::default())), "service slot 4 has no running task");
    }

    #[test]
    fn a_backend_is_told_with_its_node() {
        let found = Backend {
            addr: Be32::ipv4(10, 0, 0, 6),
            vni: 4096,
            peer: 1,
            ifindex: 0,
            incarnation: 702,
            flags: BACKEND_DRAINING,
        };
        let on = Some("198.18.0.12".parse().unwrap());
        assert_eq!(
            backend(2, Some(&found), on),
            "backend 10.0.0.6 (network 4096, incarnation 702) on node 198.18.0.12, draining: it gets no new flows"
        );
        assert_eq!(backend::<Be32>(2, Some(&Backend::default()), None), "backend slot 2 is empty");
    }

    #[test]
    fn rules_are_told_for_clients_and_for_dialled_addresses() {
        let addr = Be32::ipv4(192, 0, 2, 1);
        assert_eq!(
            rule(&RuleKey::source(3, addr), Some(RULE_DENY)),
            "service slot 3 about the client 192.0.2.1: refused"
        );
        assert_eq!(
            rule(&RuleKey::dialled(3, addr), Some(RULE_ALLOW)),
            "service slot 3 about the dialled address 192.0.2.1: let in"
        );
    }
}
