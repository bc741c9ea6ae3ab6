//! What the tables of the fixtures' node hold, and the names of what is in them.
//!
//! The node is n1 (198.18.0.11); n2 and n3 are its peers. Two networks: `ingress` (VNI 4096, 10.0.0.0/24) and `back`
//! (VNI 4097, 10.0.1.0/24). Interfaces 2 and 3 exist in the test's network namespace. All of it is written in IPv4; the
//! IPv6 tables are made from it by [`super::family`].

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use mesh_agent::dataplane::contents::{Common, Contents, Family as Tables};
use mesh_agent::dataplane::places::Places;
use mesh_agent::sys::bpf::Prefix;
use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{
    AddrKey, Alias, BACKEND_DRAINING, BACKEND_ENCRYPTED, Backend, Config, Endpoint, Host, IFACE_INTERNAL,
    Iface, PROTO_TCP, PROTO_UDP, Peer, Port, PortKey, RULE_ALLOW, RULE_DENY, RuleKey, SERVICE_ENCRYPTED,
    Service, TaskKey, TaskSlots, tag_of,
};
use mesh_datapath::hook::Way;

use super::entries::Entries;
use super::family::{Family, PREFIX_BITS, WIREGUARD_OCTET, mask6, six};

/// Seed of the flow hash.
pub const SEED: u64 = 42;

/// The interface that BPF_PROG_TEST_RUN uses unless told otherwise.
pub const LOOPBACK: u32 = 1;
/// Host side of the task on `ingress`.
pub const WEB_IFINDEX: u32 = 2;
/// Host side of the task on `back`.
pub const BACK_IFINDEX: u32 = 3;
/// Host side of the other task on `ingress`; no such interface exists.
pub const WEB_TOO_IFINDEX: u32 = 4;

/// This node's underlay address.
pub const N1: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 11);
/// Another address of this node.
pub const N1_TOO: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 21);
/// The first peer's.
pub const N2: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 12);
/// The second peer's.
pub const N3: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 13);
/// Addresses in WireGuard, of the families' common form: this node's.
pub const N1_ENCRYPTED: Ipv4Addr = Ipv4Addr::new(WIREGUARD_OCTET, 0, 0, 11);
/// The first peer's.
pub const N2_ENCRYPTED: Ipv4Addr = Ipv4Addr::new(WIREGUARD_OCTET, 0, 0, 12);
/// The one that the first peer had before, and may still send from.
pub const N2_FORMER: Ipv4Addr = Ipv4Addr::new(WIREGUARD_OCTET, 0, 1, 12);
/// A client outside the cluster.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 100);
/// A router between the client and the node.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// An address that is no node's.
pub const STRANGER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
/// An address that the kernel's namespace has no route to.
pub const NOWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);

/// Slots of the peers: n2, n3.
pub const PEER_N2: u32 = 1;
/// See [`PEER_N2`].
pub const PEER_N3: u32 = 2;

/// Slot of the way to n2 through WireGuard.
pub const PEER_N2_ENCRYPTED: u32 = 3;

/// VNI of `ingress`.
pub const INGRESS: u32 = 4096;
/// VNI of `back`.
pub const BACK: u32 = 4097;

/// Task of this node on `ingress`.
pub const WEB: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
/// Task of n2 on `ingress`.
pub const WEB_ON_N2: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 6);
/// Task of n3 on `ingress`, in no service's table.
pub const WEB_ON_N3: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 7);
/// Another task of this node on `ingress`, of the same service as [`WEB`], but not in its table.
pub const WEB_TOO: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 8);
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
/// An address of `back` that nobody has.
pub const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 77);

/// Published: a service whose task is here, listening on 80 (tcp) and 53 (udp).
pub const PORT_HERE: u16 = 8080;
/// Published: a service whose task is on n2, listening on 80 (tcp and udp).
pub const PORT_THERE: u16 = 8081;
/// Published: a service without a task.
pub const PORT_NOBODY: u16 = 8082;
/// What tasks listen on: tcp.
pub const TARGET: u16 = 80;
/// What the task of [`PORT_HERE`] listens on: udp.
pub const TARGET_UDP: u16 = 53;

/// `shoal0`'s address.
pub const HOST: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 1);
/// Where local processes' sockets are sent.
pub const MESH: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 2);
/// What tasks see such a process under.
pub const HOST_CLIENT: Ipv4Addr = N1;
/// Alias of [`WEB`].
pub const WEB_ALIAS: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 3);
/// Alias of [`APP`].
pub const APP_ALIAS: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 4);
/// An alias of nobody.
pub const NO_ALIAS: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 77);

/// Slots of the backends.
pub const WEB_SLOT: u32 = 1;
/// See [`WEB_SLOT`].
pub const WEB_ON_N2_SLOT: u32 = 2;
/// See [`WEB_SLOT`].
pub const APP_ON_N2_SLOT: u32 = 3;
/// See [`WEB_SLOT`].
pub const APP_SLOT: u32 = 4;
/// See [`WEB_SLOT`].
pub const WEB_ON_N3_SLOT: u32 = 5;
/// See [`WEB_SLOT`].
pub const WEB_TOO_SLOT: u32 = 6;
/// Incarnation of the backend in a slot.
pub const fn incarnation(slot: u32) -> u32 {
    700 + slot
}

/// Slots of the services: of [`PORT_HERE`].
pub const SERVICE_HERE: u32 = 1;
/// Of [`PORT_THERE`].
pub const SERVICE_THERE: u32 = 2;
/// Of [`PORT_NOBODY`].
pub const SERVICE_NOBODY: u32 = 3;

/// Ethernet addresses of the next hop towards peers, and of the uplink.
pub const NEXT_HOP: [u8; 6] = [2, 0, 0, 0, 0, 0x12];
/// See [`NEXT_HOP`].
pub const UPLINK: [u8; 6] = [2, 0, 0, 0, 0, 0x11];

/// MTU of the underlay, bytes.
pub const MTU: u16 = 1500;

/// The way from this node to [`CLIENT`] by the routes and neighbours of the kernel's namespace, out of another interface
/// than packets come in by.
pub const CLIENT_ROUTE: Way =
    Way { ifindex: BACK_IFINDEX, next_hop: [2, 0, 0, 0, 0, 0x64], source: UPLINK, mtu: 1400, link_mtu: MTU };

/// What the tables hold.
#[derive(Debug, Clone)]
pub struct World {
    /// Family of the underlay.
    pub underlay: Family,
    /// Whether the agent has written its configuration.
    pub is_configured: bool,
    /// Whether the networks have IPv6 subnets.
    pub has_ipv6: bool,
    /// Whether both networks are encrypted.
    pub is_encrypted: bool,
    /// The tables of IPv4, of which those of IPv6 are made.
    pub tables: Tables<Be32>,
    /// Published ports: protocol, port, service slot, what tasks listen on.
    pub ports: Vec<(u8, u16, u32, u16)>,
    /// The services.
    pub services: BTreeMap<u32, Service>,
    /// The services' Maglev tables, each with its nodes behind it.
    pub places: Places,
    /// MTU towards the peers, bytes; 0 where their next hop is unknown.
    pub next_hop_mtu: u16,
    /// The interface towards the peers.
    pub next_hop_ifindex: u32,
    /// Budgets that are spent.
    pub spent: Vec<u32>,
    /// What the programs have written before.
    pub known: Entries,
}

impl Default for World {
    fn default() -> Self {
        Self {
            underlay: Family::V4,
            is_configured: true,
            has_ipv6: true,
            is_encrypted: false,
            tables: tables(),
            ports: vec![
                (PROTO_TCP, PORT_HERE, SERVICE_HERE, TARGET),
                (PROTO_UDP, PORT_HERE, SERVICE_HERE, TARGET_UDP),
                (PROTO_TCP, PORT_THERE, SERVICE_THERE, TARGET),
                (PROTO_UDP, PORT_THERE, SERVICE_THERE, TARGET),
                (PROTO_TCP, PORT_NOBODY, SERVICE_NOBODY, TARGET),
                (PROTO_UDP, PORT_NOBODY, SERVICE_NOBODY, TARGET),
            ],
            services: BTreeMap::new(),
            places: Places::default(),
            next_hop_mtu: MTU,
            next_hop_ifindex: LOOPBACK,
            spent: vec![],
            known: Entries::new(),
        }
        .with_service(SERVICE_HERE, INGRESS, &[WEB_SLOT], &[0])
        .with_service(SERVICE_THERE, INGRESS, &[WEB_ON_N2_SLOT], &[PEER_N2])
        .with_service(SERVICE_NOBODY, INGRESS, &[], &[])
        .with_service(4, BACK, &[APP_ON_N2_SLOT], &[PEER_N2])
        .with_service(5, BACK, &[APP_SLOT], &[0])
        .with_service(6, BACK, &[], &[])
    }
}

impl World {
    /// The world before the agent's first write.
    pub fn unconfigured() -> Self {
        Self { is_configured: false, ..Self::default() }
    }

    /// The world with entries in the programs' tables.
    pub fn knowing(known: Entries) -> Self {
        Self::default().also_knowing(known)
    }

    /// This world with further entries in the programs' tables.
    #[must_use]
    pub fn also_knowing(mut self, known: Entries) -> Self {
        self.known.extend(known);
        self
    }

    /// This world with another table of a service, and the nodes that have backends of it.
    #[must_use]
    pub fn with_service(mut self, slot: u32, vni: u32, table: &[u32], nodes: &[u32]) -> Self {
        let start = 100 * slot;
        self.places.insert(start, &[table, nodes].concat());
        let flags = self.services.get(&slot).map_or(0, |service| service.flags);
        let service = Service { start, len: table.len() as u32, nodes: nodes.len() as u32, vni, flags };
        self.services.insert(slot, service);
        self
    }

    /// This world where the service of [`PORT_HERE`] has tasks here, on n2 and on n3, though its table leads here.
    #[must_use]
    pub fn spread(self) -> Self {
        self.with_service(SERVICE_HERE, INGRESS, &[WEB_SLOT], &[0, PEER_N2, PEER_N3])
    }

    /// This world where the table of that service leads here and to n2, in equal parts.
    #[must_use]
    pub fn shared(self) -> Self {
        self.with_service(SERVICE_HERE, INGRESS, &[WEB_SLOT, WEB_ON_N2_SLOT], &[0, PEER_N2])
    }

    /// This world where that service has no task that takes new flows.
    #[must_use]
    pub fn draining(mut self) -> Self {
        if let Some(backend) = self.tables.backends.get_mut(&WEB_SLOT) {
            backend.flags = BACKEND_DRAINING;
        }
        self.with_service(SERVICE_HERE, INGRESS, &[], &[0])
    }

    /// This world where services have further `SERVICE_…` flags.
    #[must_use]
    pub fn with_flags(mut self, flags: u32) -> Self {
        for service in self.services.values_mut() {
            service.flags |= flags;
        }
        self
    }

    /// This world with a rule of the service of [`PORT_HERE`] for a prefix of this many bits (as in IPv4) of clients'
    /// addresses, and the opposite rule for all others.
    #[must_use]
    pub fn with_source_rule(self, net: Ipv4Addr, bits: u32, rule: u32) -> Self {
        let others = if rule == RULE_ALLOW { RULE_DENY } else { RULE_ALLOW };
        self.with_rule(RuleKey::source(SERVICE_HERE, net.into()), bits, rule).with_rule(
            RuleKey::source(SERVICE_HERE, Be32::default()),
            0,
            others,
        )
    }

    /// This world where that service answers on one address only.
    #[must_use]
    pub fn answering_on(self, addr: Ipv4Addr) -> Self {
        self.with_rule(RuleKey::dialled(SERVICE_HERE, addr.into()), 32, RULE_ALLOW).with_rule(
            RuleKey::dialled(SERVICE_HERE, Be32::default()),
            0,
            RULE_DENY,
        )
    }

    fn with_rule(mut self, key: RuleKey<Be32>, bits: u32, rule: u32) -> Self {
        self.tables.rules.insert(Prefix { len: RuleKey::<Be32>::SCOPE_BITS + bits, key }, rule);
        self
    }

    /// The world where both networks are encrypted, and n2 has an address in WireGuard. (n3 has none: what it is sent goes
    /// in cleartext, as nothing does where each node has one.)
    pub fn encrypted() -> Self {
        let mut world = Self { is_encrypted: true, ..Self::default() }.with_flags(SERVICE_ENCRYPTED);
        for endpoint in world.tables.endpoints.values_mut().filter(|endpoint| endpoint.peer == PEER_N2) {
            endpoint.peer = PEER_N2_ENCRYPTED;
        }
        for backend in world.tables.backends.values_mut() {
            backend.flags |= BACKEND_ENCRYPTED;
            if backend.peer == PEER_N2 {
                backend.peer = PEER_N2_ENCRYPTED;
            }
        }
        world
    }

    /// The network `back`, internal.
    pub fn internal() -> Self {
        let mut world = Self::default();
        if let Some(iface) = world.tables.ifaces.get_mut(&BACK_IFINDEX) {
            iface.flags = IFACE_INTERNAL;
        }
        world
    }

    /// This world on an underlay of the other family.
    #[must_use]
    pub fn on(self, underlay: Family) -> Self {
        Self { underlay, ..self }
    }

    /// This world with budgets spent.
    #[must_use]
    pub fn spent(self, budgets: &[u32]) -> Self {
        Self { spent: budgets.to_vec(), ..self }
    }

    /// A node's VTEP.
    pub fn vtep(&self, node: Ipv4Addr) -> Ip6 {
        let family = if node.octets()[0] == WIREGUARD_OCTET { Family::V6 } else { self.underlay };
        family.ip6(node)
    }

    /// What stands for a node where there is room for 32 bits only.
    pub fn tag(&self, node: Ipv4Addr) -> u32 {
        tag_of(self.vtep(node))
    }

    /// The node's own facts.
    pub fn config(&self) -> Config {
        if !self.is_configured {
            return Config::default();
        }
        let host4 = Host {
            addr: Be32::from(HOST),
            mesh: MESH.into(),
            client: HOST_CLIENT.into(),
            alias_net: Be32::ipv4(169, 254, 64, 0),
            alias_mask: Be32::ipv4(255, 255, 192, 0),
        };
        let Host { addr, mesh, client, alias_net, alias_mask } = host4;
        Config {
            hash_seed: SEED,
            vtep: self.vtep(N1),
            wireguard: if self.is_encrypted { self.vtep(N1_ENCRYPTED) } else { Ip6::default() },
            host4,
            host6: Host {
                addr: six(addr),
                mesh: six(mesh),
                client: six(client),
                alias_net: six(alias_net),
                alias_mask: mask6(alias_mask),
            },
            vxlan_ifindex: WEB_IFINDEX,
            host_ifindex: BACK_IFINDEX,
            tag: self.tag(N1),
            wireguard_tag: if self.is_encrypted { self.tag(N1_ENCRYPTED) } else { 0 },
            vxlan_port: Be16::new(4789),
            path_mtu_min: 1330,
            reserved: [0; 4],
        }
    }

    /// What the agent writes.
    pub fn contents(&self) -> Contents {
        let encrypted = [(N2_ENCRYPTED, PEER_N2_ENCRYPTED), (N2_FORMER, PEER_N2_ENCRYPTED)];
        let encrypted = encrypted.into_iter().filter(|_| self.is_encrypted);
        let nodes: Vec<_> = [(N2, PEER_N2), (N3, PEER_N3)].into_iter().chain(encrypted).collect();
        let current = nodes.iter().filter(|(node, _)| *node != N2_FORMER);
        let port = |(protocol, published, service, target): &(u8, u16, u32, u16), family| {
            let value = Port { service: *service, target: Be16::new(*target), reserved: 0 };
            (PortKey { port: Be16::new(*published), protocol: *protocol, family }, value)
        };
        Contents {
            v4: self.tables.clone(),
            v6: tables6(&self.tables, self.has_ipv6),
            common: Common {
                ports: self
                    .ports
                    .iter()
                    .flat_map(|published| [4, 6].map(|family| port(published, family)))
                    .collect(),
                services: self.services.clone(),
                members: nodes.iter().map(|(node, slot)| (self.vtep(*node), *slot)).collect(),
                tags: nodes.iter().map(|(node, slot)| (self.tag(*node), *slot)).collect(),
                peers: current.map(|(node, slot)| (*slot, self.vtep(*node))).collect(),
            },
        }
    }

    /// `shoal_peers`, with next hops.
    pub fn peers(&self) -> BTreeMap<u32, Peer> {
        let peer = |vtep: Ip6| Peer {
            expires_ns: if self.next_hop_mtu == 0 { 0 } else { u64::MAX },
            vtep,
            ifindex: self.next_hop_ifindex,
            next_hop: NEXT_HOP,
            source: UPLINK,
            mtu: self.next_hop_mtu,
            reserved: [0; 3],
        };
        self.contents().common.peers.iter().map(|(slot, vtep)| (*slot, peer(*vtep))).collect()
    }
}

fn tables() -> Tables<Be32> {
    let key = |vni, addr: Ipv4Addr| AddrKey { vni, addr: addr.into() };
    // Slot, address, network, node, interface, service.
    let tasks = [
        (WEB_SLOT, WEB, INGRESS, 0, WEB_IFINDEX, SERVICE_HERE),
        (WEB_TOO_SLOT, WEB_TOO, INGRESS, 0, WEB_TOO_IFINDEX, SERVICE_HERE),
        (WEB_ON_N2_SLOT, WEB_ON_N2, INGRESS, PEER_N2, 0, SERVICE_THERE),
        (WEB_ON_N3_SLOT, WEB_ON_N3, INGRESS, PEER_N3, 0, SERVICE_THERE),
        (APP_ON_N2_SLOT, APP_ON_N2, BACK, PEER_N2, 0, 4),
        (APP_SLOT, APP, BACK, 0, BACK_IFINDEX, 5),
    ];
    let mut tables = Tables {
        locals: [(N1.into(), 1), (N1_TOO.into(), 1)].into(),
        rules: BTreeMap::new(),
        vips: [(key(BACK, VIP), 4), (key(BACK, VIP_OF_APP), 5), (key(BACK, VIP_OF_NOBODY), 6)].into(),
        backends: BTreeMap::new(),
        tasks: BTreeMap::new(),
        endpoints: BTreeMap::new(),
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
    };
    for (slot, addr, vni, peer, ifindex, service) in tasks {
        let incarnation = incarnation(slot);
        let backend = Backend { addr: addr.into(), vni, peer, ifindex, incarnation, flags: 0 };
        tables.backends.insert(slot, backend);
        tables.tasks.insert(TaskKey { incarnation, vni }, TaskSlots { backend: slot, service });
        tables.endpoints.insert(key(vni, addr), Endpoint { peer, ifindex, incarnation });
    }
    tables
}

fn iface(vni: u32, addr: Ipv4Addr, gateway: Ipv4Addr, alias: Ipv4Addr, slot: u32) -> Iface<Be32> {
    Iface {
        addr: addr.into(),
        gateway: gateway.into(),
        mask: Be32::ipv4(255, 255, 255, 0),
        alias: alias.into(),
        vni,
        incarnation: incarnation(slot),
        flags: 0,
    }
}

fn alias(addr: Ipv4Addr, gateway: Ipv4Addr, ifindex: u32, vni: u32) -> Alias<Be32> {
    Alias { addr: addr.into(), gateway: gateway.into(), ifindex, vni }
}

/// The tables of IPv6 that belong to those of IPv4.
fn tables6(tables: &Tables<Be32>, has_networks: bool) -> Tables<Ip6> {
    let Tables { locals, rules, vips, backends, tasks, endpoints, ifaces, aliases } = tables;
    let key = |key: &AddrKey<Be32>| AddrKey { vni: key.vni, addr: six(key.addr) };
    let rule = |prefix: &Prefix<RuleKey<Be32>>| {
        let RuleKey { scope, addr } = prefix.key;
        Prefix { len: prefix.len + PREFIX_BITS, key: RuleKey { scope, addr: six(addr) } }
    };
    let backend = |backend: &Backend<Be32>| {
        let Backend { addr, vni, peer, ifindex, incarnation, flags } = *backend;
        Backend { addr: six(addr), vni, peer, ifindex, incarnation, flags }
    };
    let iface = |iface: &Iface<Be32>| {
        let Iface { addr, gateway, mask, alias, vni, incarnation, flags } = *iface;
        let (addr, gateway, mask, alias) = (six(addr), six(gateway), mask6(mask), six(alias));
        Iface { addr, gateway, mask, alias, vni, incarnation, flags }
    };
    let alias = |alias: &Alias<Be32>| {
        let Alias { addr, gateway, ifindex, vni } = *alias;
        Alias { addr: six(addr), gateway: six(gateway), ifindex, vni }
    };
    let ifaces = ifaces.iter().filter(|_| has_networks);
    Tables {
        locals: locals.iter().map(|(addr, value)| (six(*addr), *value)).collect(),
        rules: rules.iter().map(|(prefix, value)| (rule(prefix), *value)).collect(),
        vips: vips.iter().map(|(vip, slot)| (key(vip), *slot)).collect(),
        backends: backends.iter().map(|(slot, value)| (*slot, backend(value))).collect(),
        tasks: tasks.clone(),
        endpoints: endpoints.iter().map(|(addr, endpoint)| (key(addr), *endpoint)).collect(),
        ifaces: ifaces.map(|(ifindex, value)| (*ifindex, iface(value))).collect(),
        aliases: aliases.iter().map(|(addr, value)| (six(*addr), alias(value))).collect(),
    }
}
