//! Where a local process's socket leads that dials a published port on its own node.
//!
//! At a loopback address, or one of the node's own, the host's stack would answer, and no packet would pass any
//! interface with a program on it. So the socket is led to the mesh address instead ([`redirect`]): its packets leave by
//! `shoal0` and are balanced like those from an uplink. The process is told the address that it dialled
//! ([`dialled`]), remembered by socket and port.
//!
//! Left alone are sockets of other network namespaces, to which this node's addresses aren't local, and sockets that
//! their process has bound to an interface, or to an address that isn't `shoal0`'s: answers would not come back to them.
//! A published port goes before a local process that listens on the same one. An unconnected socket that sends to one
//! port at two of the node's addresses gets all answers from the address that it used last. A Multipath TCP socket is
//! led to the mesh but told the mesh address: the kernel connects it in the name of another socket.

use mesh_common::addr::{Address, Ip6};
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{Dialled, Host, PROTO_TCP, PROTO_UDP, PortKey};
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// What is known of the node, and of its sockets.
pub trait Sockets {
    /// Cookie of the node's network namespace; 0 until the agent has written it, which is no namespace's.
    fn netns(&self) -> u64;
    /// Whether a port is published.
    fn is_published(&self, key: &PortKey) -> bool;
    /// What a socket dialled.
    fn dialled(&self, key: &DialledKey) -> Option<Dialled>;
    /// Remembers it.
    fn insert_dialled(&self, key: &DialledKey, dialled: &Dialled);
}

/// What is known of the node in one family.
pub trait SocketAddrs<A>: Sockets {
    /// Whether an address is the node's own.
    fn is_local(&self, addr: &A) -> bool;
    /// The node-local addresses; `None` until the agent has written them.
    fn host(&self) -> Option<&Host<A>>;
}

/// An address as sockets name it.
pub trait SocketAddress: Address {
    /// What connecting to the unspecified address means.
    const LOOPBACK: Self;

    /// Whether it never leaves the host.
    fn is_loopback(self) -> bool;
    /// The address of this family that [`Address::to_ip6`] made.
    fn from_ip6(addr: Ip6) -> Option<Self>;
}

impl SocketAddress for Be32 {
    const LOOPBACK: Self = Self::ipv4(127, 0, 0, 1);

    #[inline(always)]
    fn is_loopback(self) -> bool {
        self.is_in(Self::ipv4(127, 0, 0, 0), Self::ipv4(255, 0, 0, 0))
    }

    #[inline(always)]
    fn from_ip6(addr: Ip6) -> Option<Self> {
        addr.to_mapped()
    }
}

impl SocketAddress for Ip6 {
    const LOOPBACK: Self = Self::from_groups([0, 0, 0, 0, 0, 0, 0, 1]);

    #[inline(always)]
    fn is_loopback(self) -> bool {
        self == Self::LOOPBACK
    }

    #[inline(always)]
    fn from_ip6(addr: Ip6) -> Option<Self> {
        addr.to_mapped().is_none().then_some(addr)
    }
}

/// Key of `shoal_dialled`: a socket, and what of the mesh address it was led to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DialledKey {
    /// The socket's cookie.
    pub cookie: u64,
    /// The port.
    pub port: PortKey,
    /// Zero.
    pub reserved: u32,
}

/// A socket.
#[derive(Clone, Copy, Debug)]
pub struct Socket {
    /// Cookie of its network namespace.
    pub netns: u64,
    /// Its own cookie.
    pub cookie: u64,
    /// Its IP protocol.
    pub protocol: u8,
}

/// Where a socket's packets come from.
#[derive(Clone, Copy, Debug)]
pub struct Bound<A> {
    /// The address; unspecified if the kernel is to choose.
    pub addr: A,
    /// The interface; 0: any.
    pub ifindex: u32,
}

/// What a process names in a system call, or is told by one.
#[derive(Clone, Copy, Debug)]
pub struct Name<A> {
    /// The address.
    pub addr: A,
    /// The port.
    pub port: Be16,
}

impl DialledKey {
    #[inline(always)]
    fn new<A: Address>(socket: &Socket, port: Be16) -> Self {
        Self { cookie: socket.cookie, port: PortKey::new::<A>(socket.protocol, port), reserved: 0 }
    }
}

/// The address that a socket is to use instead of the one that its process dials or sends to; `None`: the same.
#[inline(always)]
pub fn redirect<A: SocketAddress>(
    tables: &impl SocketAddrs<A>,
    socket: &Socket,
    bound: &Bound<A>,
    name: &Name<A>,
) -> Option<A> {
    if socket.netns != tables.netns() || !matches!(socket.protocol, PROTO_TCP | PROTO_UDP) {
        return None;
    }
    let key = DialledKey::new::<A>(socket, name.port);
    if !tables.is_published(&key.port) {
        return None;
    }
    let addr = if name.addr == A::default() { A::LOOPBACK } else { name.addr };
    if !addr.is_loopback() && !tables.is_local(&addr) {
        return None;
    }
    let host = tables.host()?;
    // A socket that was connected before has the address that the kernel chose then.
    if (bound.addr != A::default() && bound.addr != host.addr) || bound.ifindex != 0 {
        return None;
    }
    let dialled = Dialled { addr: addr.to_ip6(), port: name.port, reserved: 0 };
    // A socket that sends often mostly sends to the same address.
    if tables.dialled(&key) != Some(dialled) {
        tables.insert_dialled(&key, &dialled);
    }
    Some(host.mesh)
}

/// [`redirect`] of an IPv6 socket, which dials IPv4 addresses in their mapped form.
#[inline(always)]
pub fn redirect6<T: SocketAddrs<Be32> + SocketAddrs<Ip6>>(
    tables: &T,
    socket: &Socket,
    bound: &Bound<Ip6>,
    name: &Name<Ip6>,
) -> Option<Ip6> {
    // One that is bound to an address of the other family has no way there; the kernel will say so.
    let from = bound.addr.to_mapped();
    match name.addr.to_mapped() {
        Some(addr) if from.is_some() || bound.addr == Ip6::default() => {
            let bound = Bound { addr: from.unwrap_or_default(), ifindex: bound.ifindex };
            redirect(tables, socket, &bound, &Name { addr, port: name.port }).map(Ip6::mapped)
        }
        None if from.is_none() => redirect(tables, socket, bound, name),
        _ => None,
    }
}

/// The address that a process is to be told instead of its socket's peer, or of a packet's sender; `None`: the same.
#[inline(always)]
pub fn dialled<A: SocketAddress>(tables: &impl SocketAddrs<A>, socket: &Socket, name: &Name<A>) -> Option<A> {
    if tables.host()?.mesh != name.addr {
        return None;
    }
    // In another network namespace, this node's mesh address may be anybody's; no socket there was led to it.
    A::from_ip6(tables.dialled(&DialledKey::new::<A>(socket, name.port))?.addr)
}

/// [`dialled`] of an IPv6 socket.
#[inline(always)]
pub fn dialled6<T: SocketAddrs<Be32> + SocketAddrs<Ip6>>(
    tables: &T,
    socket: &Socket,
    name: &Name<Ip6>,
) -> Option<Ip6> {
    match name.addr.to_mapped() {
        Some(addr) => dialled(tables, socket, &Name { addr, port: name.port }).map(Ip6::mapped),
        None => dialled(tables, socket, name),
    }
}

#[cfg(test)]
mod tests {
    use core::net::{IpAddr, Ipv6Addr};
    use std::cell::RefCell;
    use std::collections::HashMap;

    use mesh_common::map::PROTO_ICMP;

    use super::*;

    const NETNS: u64 = 7;
    const HOST: &str = "169.254.64.1";
    const HOST6: &str = "fd73:686f:616c:1::1";
    const MESH: &str = "169.254.64.2";
    const MESH6: &str = "fd73:686f:616c:1::2";

    /// A node at 192.0.2.1 and 2001:db8::1 that publishes 8080 for both protocols and families, and IPv4's 53 for UDP.
    struct Node {
        host4: Host<Be32>,
        host6: Host<Ip6>,
        dialled: RefCell<HashMap<DialledKey, Dialled>>,
        unready: bool,
    }

    impl Default for Node {
        fn default() -> Self {
            let ip4 = |text| ip(text).to_mapped().unwrap();
            let host4 = Host { addr: ip4(HOST), mesh: ip4(MESH), ..Host::default() };
            let host6 = Host { addr: ip(HOST6), mesh: ip(MESH6), ..Host::default() };
            Self { host4, host6, dialled: RefCell::default(), unready: false }
        }
    }

    impl Sockets for Node {
        fn netns(&self) -> u64 {
            NETNS
        }

        fn is_published(&self, key: &PortKey) -> bool {
            match key.port.get() {
                8080 => true,
                53 => key.protocol == PROTO_UDP && key.family == 4,
                _ => false,
            }
        }

        fn dialled(&self, key: &DialledKey) -> Option<Dialled> {
            self.dialled.borrow().get(key).copied()
        }

        fn insert_dialled(&self, key: &DialledKey, dialled: &Dialled) {
            self.dialled.borrow_mut().insert(*key, *dialled);
        }
    }

    impl SocketAddrs<Be32> for Node {
        fn is_local(&self, addr: &Be32) -> bool {
            ip("192.0.2.1") == Ip6::mapped(*addr)
        }

        fn host(&self) -> Option<&Host<Be32>> {
            (!self.unready).then_some(&self.host4)
        }
    }

    impl SocketAddrs<Ip6> for Node {
        fn is_local(&self, addr: &Ip6) -> bool {
            ip("2001:db8::1") == *addr
        }

        fn host(&self) -> Option<&Host<Ip6>> {
            (!self.unready).then_some(&self.host6)
        }
    }

    /// An address, IPv4 in its mapped form.
    fn ip(text: &str) -> Ip6 {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn socket(protocol: u8) -> Socket {
        Socket { netns: NETNS, cookie: 1, protocol }
    }

    impl Node {
        /// Where an IPv6 socket is led, by text: what [`redirect6`] hands to either family is all that there is.
        fn lead(&self, socket: Socket, from: &str, to: &str, port: u16) -> Option<IpAddr> {
            let bound = Bound { addr: ip(from), ifindex: 0 };
            redirect6(self, &socket, &bound, &Name { addr: ip(to), port: Be16::new(port) }).map(IpAddr::from)
        }

        /// What the socket's process is told of an answer from `from`.
        fn told(&self, socket: Socket, from: &str, port: u16) -> Option<IpAddr> {
            dialled6(self, &socket, &Name { addr: ip(from), port: Be16::new(port) }).map(IpAddr::from)
        }
    }

    #[test]
    fn a_published_port_at_an_address_of_the_node_leads_to_the_mesh_and_back() {
        let cases = [
            ("127.0.0.1", MESH, "127.0.0.1"),
            ("127.8.9.10", MESH, "127.8.9.10"),
            ("192.0.2.1", MESH, "192.0.2.1"),
            ("0.0.0.0", MESH, "127.0.0.1"),
            ("::1", MESH6, "::1"),
            ("2001:db8::1", MESH6, "2001:db8::1"),
            ("::", MESH6, "::1"),
        ];
        for protocol in [PROTO_TCP, PROTO_UDP] {
            for (to, mesh, told) in cases {
                let node = Node::default();
                let socket = socket(protocol);
                assert_eq!(node.lead(socket, "::", to, 8080), Some(mesh.parse().unwrap()), "{to}");
                assert_eq!(node.told(socket, mesh, 8080), Some(told.parse().unwrap()), "{to}");
            }
        }
    }

    #[test]
    fn an_ipv4_socket_is_led_as_an_ipv6_socket_with_a_mapped_address_is() {
        let node = Node::default();
        let name = Name { addr: Be32::LOOPBACK, port: Be16::new(8080) };
        let mesh = ip(MESH).to_mapped();
        let bound = Bound { addr: Be32::default(), ifindex: 0 };
        assert_eq!(redirect(&node, &socket(PROTO_TCP), &bound, &name), mesh);
        let answer = Name { addr: mesh.unwrap(), ..name };
        assert_eq!(dialled(&node, &socket(PROTO_TCP), &answer), Some(Be32::LOOPBACK));
    }

    #[test]
    fn what_is_not_published_on_this_node_is_left_alone() {
        let node = Node::default();
        let tcp = socket(PROTO_TCP);
        for (socket, to, port, why) in [
            (tcp, "127.0.0.1", 8081, "another port"),
            (tcp, "127.0.0.1", 53, "another protocol"),
            (socket(PROTO_UDP), "::1", 53, "another family"),
            (tcp, "192.0.2.2", 8080, "another host"),
            (tcp, "2001:db8::2", 8080, "another host"),
            (tcp, MESH, 8080, "the mesh address itself"),
            (socket(PROTO_ICMP), "127.0.0.1", 8080, "no ports"),
            (Socket { netns: NETNS + 1, ..tcp }, "127.0.0.1", 8080, "another namespace"),
        ] {
            assert_eq!(node.lead(socket, "::", to, port), None, "{why}");
        }
        assert!(node.dialled.borrow().is_empty());
    }

    #[test]
    fn a_socket_that_answers_would_not_come_back_to_is_left_alone() {
        let node = Node::default();
        let tcp = socket(PROTO_TCP);
        for (from, to) in [
            ("127.0.0.1", "127.0.0.1"),
            ("127.0.0.2", "192.0.2.1"),
            ("192.0.2.1", "192.0.2.1"),
            ("::1", "::1"),
            ("2001:db8::1", "::1"),
            ("192.0.2.1", "::1"),
            (HOST, "::1"),
            (HOST6, "127.0.0.1"),
        ] {
            assert_eq!(node.lead(tcp, from, to, 8080), None, "{from} to {to}");
        }
        let name = Name { addr: ip("127.0.0.1"), port: Be16::new(8080) };
        assert_eq!(redirect6(&node, &tcp, &Bound { addr: ip("::"), ifindex: 3 }, &name), None);
        assert_eq!(node.lead(tcp, HOST, "192.0.2.1", 8080), Some(MESH.parse().unwrap()));
        assert_eq!(node.lead(tcp, HOST6, "::1", 8080), Some(MESH6.parse().unwrap()));
    }

    #[test]
    fn until_the_node_is_configured_nothing_is_led_anywhere() {
        let node = Node { unready: true, ..Node::default() };
        assert_eq!(node.lead(socket(PROTO_TCP), "::", "127.0.0.1", 8080), None);
        assert_eq!(node.told(socket(PROTO_TCP), "::", 8080), None);
    }

    #[test]
    fn an_unconnected_socket_is_told_apart_by_port_and_family() {
        let node = Node::default();
        let udp = socket(PROTO_UDP);
        node.lead(udp, "::", "127.0.0.1", 53);
        node.lead(udp, "::", "192.0.2.1", 8080);
        node.lead(udp, "::", "::1", 8080);
        assert_eq!(node.told(udp, MESH, 53), Some("127.0.0.1".parse().unwrap()));
        assert_eq!(node.told(udp, MESH, 8080), Some("192.0.2.1".parse().unwrap()));
        assert_eq!(node.told(udp, MESH6, 8080), Some(Ipv6Addr::LOCALHOST.into()));

        node.lead(udp, "::", "127.0.0.1", 8080);
        assert_eq!(node.told(udp, MESH, 8080), Some("127.0.0.1".parse().unwrap()), "what it used last");
    }

    #[test]
    fn answers_to_other_sockets_and_from_other_addresses_are_told_as_they_are() {
        let node = Node::default();
        let udp = socket(PROTO_UDP);
        node.lead(udp, "::", "127.0.0.1", 8080);
        assert_eq!(node.told(udp, "192.0.2.9", 8080), None);
        assert_eq!(node.told(udp, MESH, 8081), None);
        assert_eq!(node.told(Socket { cookie: 2, ..udp }, MESH, 8080), None);
    }
}
