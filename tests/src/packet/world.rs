//! What the tables of the fixtures' node hold, and the names of what is in them.
//!
//! The node is n1 (198.18.0.11); n2 and n3 are its peers. Two networks: `ingress` (VNI 4096, 10.0.0.0/24) and `back`
//! (VNI 4097, 10.0.1.0/24). Interfaces 2 and 3 exist in the test's network namespace.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use mesh_agent::dataplane::layout::Contents;
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{
    AddrKey, Alias, BACKEND_DRAINING, Backend, Config, Endpoint, Flow, FlowKey, IFACE_INTERNAL, Iface,
    PROTO_TCP, PROTO_UDP, Peer, Port, PortKey, Service,
};

/// The interface that BPF_PROG_TEST_RUN uses unless told otherwise.
pub const LOOPBACK: u32 = 1;
/// Host side of the task on `ingress`.
pub const WEB_IFINDEX: u32 = 2;
/// Host side of the task on `back`.
pub const BACK_IFINDEX: u32 = 3;

/// This node's underlay address.
pub const N1: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 11);
/// The first peer's.
pub const N2: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 12);
/// The second peer's.
pub const N3: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 13);
/// A client outside the cluster.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 100);
/// An address that is no node's.
pub const STRANGER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

/// VNI of `ingress`.
pub const INGRESS: u32 = 4096;
/// VNI of `back`.
pub const BACK: u32 = 4097;

/// Task of this node on `ingress`, and its incarnation.
pub const WEB: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
/// Task of n2 on `ingress`.
pub const WEB_ON_N2: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 6);
/// Gateway of `ingress`.
pub const INGRESS_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

/// Task of this node on `back`.
pub const APP: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 5);
/// Task of n2 on `back`.
pub const APP_ON_N2: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 6);
/// Gateway of `back`.
pub const BACK_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 1);
/// VIP on `back` whose only backend is [`APP_ON_N2`].
pub const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 2);
/// VIP on `back` whose only backend is [`APP`].
pub const VIP_OF_APP: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 3);
/// VIP on `back` without a backend.
pub const VIP_OF_NOBODY: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 4);

/// Published: a service whose task is here, listening on 80 (tcp) and 53 (udp).
pub const PORT_HERE: u16 = 8080;
/// Published: a service whose task is on n2, listening on 80 (tcp and udp).
pub const PORT_THERE: u16 = 8081;
/// Published: a service without a task.
pub const PORT_NOBODY: u16 = 8082;

/// `shoal0`'s address.
pub const HOST: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 1);
/// Alias of [`WEB`].
pub const WEB_ALIAS: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 2);
/// Alias of [`APP`].
pub const APP_ALIAS: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 3);

/// Slots and incarnations of the backends.
pub const WEB_SLOT: u32 = 1;
/// See [`WEB_SLOT`].
pub const WEB_ON_N2_SLOT: u32 = 2;
/// See [`WEB_SLOT`].
pub const APP_ON_N2_SLOT: u32 = 3;
/// See [`WEB_SLOT`].
pub const APP_SLOT: u32 = 4;
/// Incarnation of the backend in a slot.
pub const fn incarnation(slot: u32) -> u32 {
    700 + slot
}

/// Ethernet addresses of the next hop towards peers, and of the uplink.
pub const NEXT_HOP: [u8; 6] = [2, 0, 0, 0, 0, 0x12];
/// See [`NEXT_HOP`].
pub const UPLINK: [u8; 6] = [2, 0, 0, 0, 0, 0x11];

/// The way from this node to [`CLIENT`] by the routes and neighbours of the kernel's namespace.
pub const CLIENT_ROUTE: ClientRoute =
    ClientRoute { next_hop: [2, 0, 0, 0, 0, 0x64], source: UPLINK, mtu: 1500 };

/// See [`CLIENT_ROUTE`].
#[derive(Debug)]
pub struct ClientRoute {
    /// Ethernet address of the next hop.
    pub next_hop: [u8; 6],
    /// Ethernet address of the interface, which is not the one that packets come in by.
    pub source: [u8; 6],
    /// MTU, bytes.
    pub mtu: u16,
}

/// What the tables hold.
#[derive(Debug)]
pub struct World {
    /// The node's own facts.
    pub config: Config,
    /// What the agent writes.
    pub contents: Contents,
    /// MTU towards the peers, bytes; 0 where their next hop is unknown.
    pub next_hop_mtu: u16,
    /// The interface towards the peers.
    pub next_hop_ifindex: u32,
    /// The flow table.
    pub flows: BTreeMap<FlowKey, Flow>,
}

impl Default for World {
    fn default() -> Self {
        Self {
            config: Config {
                hash_seed: 42,
                vtep: N1.into(),
                vxlan_ifindex: WEB_IFINDEX,
                host_ifindex: BACK_IFINDEX,
                host_addr: HOST.into(),
                alias_net: Be32::ipv4(169, 254, 64, 0),
                alias_mask: Be32::ipv4(255, 255, 192, 0),
                vxlan_port: Be16::new(4789),
                underlay_mtu: 1500,
                reserved: [0; 3],
            },
            contents: contents(),
            next_hop_mtu: 1500,
            next_hop_ifindex: LOOPBACK,
            flows: BTreeMap::new(),
        }
    }
}

impl World {
    /// The world before the agent's first write.
    pub fn unconfigured() -> Self {
        Self { config: Config::default(), ..Self::default() }
    }

    /// The world with flows.
    pub fn with_flows(flows: impl IntoIterator<Item = (FlowKey, Flow)>) -> Self {
        Self { flows: flows.into_iter().collect(), ..Self::default() }
    }

    /// The world after a change of its contents.
    pub fn with(change: impl FnOnce(&mut Self)) -> Self {
        let mut world = Self::default();
        change(&mut world);
        world
    }

    /// The network `back`, internal.
    pub fn internal() -> Self {
        Self::with(|world| {
            if let Some(iface) = world.contents.ifaces.get_mut(&BACK_IFINDEX) {
                iface.flags = IFACE_INTERNAL;
            }
        })
    }

    /// A backend that drains.
    pub fn draining(slot: u32, flows: impl IntoIterator<Item = (FlowKey, Flow)>) -> Self {
        let mut world = Self::with_flows(flows);
        if let Some(backend) = world.contents.backends.get_mut(&slot) {
            backend.flags = BACKEND_DRAINING;
        }
        world.contents.services.insert(1, service(0, 0, INGRESS));
        world
    }

    /// `shoal_peers`, with next hops.
    pub fn peers(&self) -> BTreeMap<u32, Peer> {
        let peer = |vtep: Be32| Peer {
            expires_ns: if self.next_hop_mtu == 0 { 0 } else { u64::MAX },
            vtep,
            ifindex: self.next_hop_ifindex,
            next_hop: NEXT_HOP,
            source: UPLINK,
            mtu: self.next_hop_mtu,
            reserved: 0,
        };
        self.contents.peers.iter().map(|(slot, vtep)| (*slot, peer(*vtep))).collect()
    }
}

fn contents() -> Contents {
    let key = |vni, addr: Ipv4Addr| AddrKey { vni, addr: addr.into() };
    let port = |protocol, published, service, target| {
        let value = Port { service, target: Be16::new(target), reserved: 0 };
        (PortKey::new(protocol, Be16::new(published)), value)
    };
    let backend = |slot, addr: Ipv4Addr, vni, peer, ifindex| {
        let value =
            Backend { addr: addr.into(), vni, peer, ifindex, incarnation: incarnation(slot), flags: 0 };
        (slot, value)
    };
    let endpoint = |vni, addr: Ipv4Addr, node: Option<Ipv4Addr>, ifindex, service, backend| {
        let vtep = node.map_or(Be32::default(), Be32::from);
        let peer = u32::from(node.is_some());
        (
            key(vni, addr),
            Endpoint { peer, vtep, ifindex, incarnation: incarnation(backend), service, backend },
        )
    };
    Contents {
        locals: [(N1.into(), 1)].into(),
        members: [(N2.into(), 1), (N3.into(), 2)].into(),
        peers: [(1, N2.into()), (2, N3.into())].into(),
        backends: [
            backend(WEB_SLOT, WEB, INGRESS, 0, WEB_IFINDEX),
            backend(WEB_ON_N2_SLOT, WEB_ON_N2, INGRESS, 1, 0),
            backend(APP_ON_N2_SLOT, APP_ON_N2, BACK, 1, 0),
            backend(APP_SLOT, APP, BACK, 0, BACK_IFINDEX),
        ]
        .into(),
        maglev: vec![(0, vec![WEB_SLOT, WEB_ON_N2_SLOT, APP_ON_N2_SLOT, APP_SLOT])],
        services: [
            (1, service(0, 1, INGRESS)),
            (2, service(1, 1, INGRESS)),
            (3, service(0, 0, INGRESS)),
            (4, service(2, 1, BACK)),
            (5, service(3, 1, BACK)),
            (6, service(0, 0, BACK)),
        ]
        .into(),
        ports: [
            port(PROTO_TCP, PORT_HERE, 1, 80),
            port(PROTO_UDP, PORT_HERE, 1, 53),
            port(PROTO_TCP, PORT_THERE, 2, 80),
            port(PROTO_UDP, PORT_THERE, 2, 80),
            port(PROTO_TCP, PORT_NOBODY, 3, 80),
        ]
        .into(),
        vips: [(key(BACK, VIP), 4), (key(BACK, VIP_OF_APP), 5), (key(BACK, VIP_OF_NOBODY), 6)].into(),
        endpoints: [
            endpoint(INGRESS, WEB, None, WEB_IFINDEX, 1, WEB_SLOT),
            endpoint(INGRESS, WEB_ON_N2, Some(N2), 0, 2, WEB_ON_N2_SLOT),
            endpoint(BACK, APP, None, BACK_IFINDEX, 5, APP_SLOT),
            endpoint(BACK, APP_ON_N2, Some(N2), 0, 4, APP_ON_N2_SLOT),
        ]
        .into(),
        ifaces: [
            (WEB_IFINDEX, iface(INGRESS, WEB, INGRESS_GATEWAY, WEB_ALIAS, WEB_SLOT)),
            (BACK_IFINDEX, iface(BACK, APP, BACK_GATEWAY, APP_ALIAS, APP_SLOT)),
        ]
        .into(),
        aliases: [
            (WEB_ALIAS.into(), alias(WEB, INGRESS_GATEWAY, WEB_IFINDEX, INGRESS)),
            (APP_ALIAS.into(), alias(APP, BACK_GATEWAY, BACK_IFINDEX, BACK)),
        ]
        .into(),
    }
}

fn service(maglev_start: u32, maglev_len: u32, vni: u32) -> Service {
    Service { maglev_start, maglev_len, vni, reserved: 0 }
}

fn iface(vni: u32, addr: Ipv4Addr, gateway: Ipv4Addr, alias: Ipv4Addr, slot: u32) -> Iface {
    Iface {
        vni,
        addr: addr.into(),
        gateway: gateway.into(),
        mask: Be32::ipv4(255, 255, 255, 0),
        alias: alias.into(),
        incarnation: incarnation(slot),
        flags: 0,
        reserved: 0,
    }
}

fn alias(addr: Ipv4Addr, gateway: Ipv4Addr, ifindex: u32, vni: u32) -> Alias {
    Alias { addr: addr.into(), gateway: gateway.into(), ifindex, vni }
}
