//! The other nodes as WireGuard's peers: who they are by the table, and what a device lacks of it.

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv6Net};
use mesh_api::id::NodeId;
use mesh_api::table::{NodeState, Table};
use mesh_api::wireguard::WireguardKey;

/// The peers that a device is to have, by their keys.
pub(super) type Peers = BTreeMap<WireguardKey, Peer>;

/// Another node's identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer {
    /// Where the node listens for it.
    pub(super) endpoint: SocketAddr,
    /// What it may send from, and is sent to, and nothing else.
    pub(super) addr: Ipv6Addr,
    /// Whether the node lives, and this is the identity to send to.
    pub(super) in_use: bool,
}

impl Peer {
    pub(super) fn allowed(&self) -> IpNet {
        Ipv6Net::from(self.addr).into()
    }
}

/// A peer that a device has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Present {
    /// Where it was heard from, or is thought to be.
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) allowed: Vec<IpNet>,
}

/// What a device is to do about a peer. None of it but the removal ends a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Remove(WireguardKey),
    Add(WireguardKey, Peer),
    /// Send to this endpoint.
    Move(WireguardKey, SocketAddr),
    /// Replace what it may send from.
    Allow(WireguardKey, IpNet),
}

/// All identities of all nodes but this one. A key is the node's that comes first, should two claim it.
pub(super) fn peers(table: &Table, own: &NodeId) -> Peers {
    let mut peers = Peers::new();
    for node in table.nodes.values().filter(|node| node.id != *own) {
        for (place, identity) in node.wireguard.iter().enumerate() {
            let peer = Peer {
                endpoint: SocketAddr::new(node.vtep, identity.port),
                addr: identity.address(),
                in_use: place == 0 && node.state == NodeState::Ready,
            };
            peers.entry(identity.public_key).or_insert(peer);
        }
    }
    peers
}

/// What makes a device's peers the wanted ones; what is right is left alone.
pub(super) fn difference(wanted: &Peers, present: &BTreeMap<WireguardKey, Present>) -> Vec<Change> {
    let gone = present.keys().filter(|key| !wanted.contains_key(key));
    let mut changes: Vec<_> = gone.copied().map(Change::Remove).collect();
    for (key, peer) in wanted {
        let Some(Present { endpoint, allowed }) = present.get(key) else {
            changes.push(Change::Add(*key, *peer));
            continue;
        };
        let is_there = |at: SocketAddr| (at.ip(), at.port()) == (peer.endpoint.ip(), peer.endpoint.port());
        if !endpoint.is_some_and(is_there) {
            changes.push(Change::Move(*key, peer.endpoint));
        }
        if *allowed != [peer.allowed()] {
            changes.push(Change::Allow(*key, peer.allowed()));
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use mesh_api::table::{ClusterRecord, NodeRecord, ReturnPath, Role};
    use mesh_api::wireguard::WireguardIdentity;

    use super::*;

    fn identity(byte: u8, port: u16) -> WireguardIdentity {
        WireguardIdentity { public_key: [byte; 32].into(), port }
    }

    fn node(id: &str, vtep: &str, state: NodeState, wireguard: Vec<WireguardIdentity>) -> NodeRecord {
        let (hostname, vtep) = (id.to_owned(), vtep.parse().unwrap());
        NodeRecord { id: id.into(), hostname, role: Role::Worker, vtep, state, wireguard, manager: None }
    }

    #[test]
    fn peers_are_all_identities_of_all_other_nodes() {
        let cluster = ClusterRecord {
            id: "c".into(),
            hash_seed: 1,
            data_path_port: 4789,
            return_path: ReturnPath::Tunnel,
            key_epoch: 0,
        };
        let mut table = Table::new(cluster);
        for record in [
            node("own", "192.0.2.1", NodeState::Ready, vec![identity(1, 51820)]),
            node("a", "192.0.2.2", NodeState::Ready, vec![identity(3, 51821), identity(2, 51820)]),
            node("b", "2001:db8::3", NodeState::Down, vec![identity(4, 51820)]),
            node("old", "192.0.2.4", NodeState::Ready, Vec::new()),
            node("thief", "192.0.2.66", NodeState::Ready, vec![identity(3, 1)]),
        ] {
            table.nodes.insert(record.id.clone(), record);
        }
        let found = peers(&table, &"own".into());
        let shown: Vec<_> = found.values().map(|peer| (peer.endpoint.to_string(), peer.in_use)).collect();
        let expected =
            [("192.0.2.2:51820", false), ("192.0.2.2:51821", true), ("[2001:db8::3]:51820", false)];
        assert_eq!(shown, expected.map(|(endpoint, in_use)| (endpoint.to_owned(), in_use)));
        let addr = found[&[3; 32].into()].allowed().to_string();
        assert_eq!(addr, "fd73:686f:616c:2:303:303:303:303/128");
    }

    #[test]
    fn what_is_right_is_left_alone() {
        let peer = |host: u8| Peer {
            endpoint: SocketAddr::from(([192, 0, 2, host], 51820)),
            addr: Ipv6Addr::from_bits(u128::from(host)),
            in_use: true,
        };
        let present = |peer: Peer| Present { endpoint: Some(peer.endpoint), allowed: vec![peer.allowed()] };
        let key = |byte: u8| WireguardKey::from([byte; 32]);
        let wanted: Peers = [1, 2, 3, 4, 5].map(|host| (key(host), peer(host))).into();
        let roamed = Present { endpoint: Some(SocketAddr::from(([192, 0, 2, 66], 9))), ..present(peer(3)) };
        let unheard = Present { endpoint: None, ..present(peer(4)) };
        let greedy =
            Present { allowed: vec![peer(5).allowed(), "::/0".parse().unwrap()], ..present(peer(5)) };
        let there = [
            (key(1), present(peer(1))),
            (key(3), roamed),
            (key(4), unheard),
            (key(5), greedy),
            (key(9), present(peer(9))),
        ]
        .into();
        let expected = [
            Change::Remove(key(9)),
            Change::Add(key(2), peer(2)),
            Change::Move(key(3), peer(3).endpoint),
            Change::Move(key(4), peer(4).endpoint),
            Change::Allow(key(5), peer(5).allowed()),
        ];
        assert_eq!(difference(&wanted, &there), expected);
        let all = wanted.iter().map(|(key, peer)| (*key, present(*peer))).collect();
        assert_eq!(difference(&wanted, &all), []);
    }
}
