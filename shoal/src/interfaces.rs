//! The host's interfaces with their addresses, as far as they may be a node's own.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use control::docker::Interface;
use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::SockaddrStorage;

/// The interfaces, without loopback, Shoal's own devices and a container engine's bridges.
pub(crate) fn interfaces() -> Vec<Interface> {
    let mut interfaces: BTreeMap<String, Interface> = BTreeMap::new();
    for address in getifaddrs().into_iter().flatten() {
        if address.flags.contains(InterfaceFlags::IFF_LOOPBACK) || is_internal(&address.interface_name) {
            continue;
        }
        let up = address.flags.contains(InterfaceFlags::IFF_UP);
        let name = address.interface_name;
        let interface =
            interfaces.entry(name.clone()).or_insert_with(|| Interface { name, up, addrs: Vec::new() });
        let addr = address.address.as_ref().and_then(ip);
        let mask = address.netmask.as_ref().and_then(ip);
        let net = addr.and_then(|addr| match mask {
            Some(mask) => IpNet::with_netmask(addr, mask).ok(),
            None => Some(IpNet::from(addr)),
        });
        interface.addrs.extend(net);
    }
    interfaces.into_values().collect()
}

fn ip(addr: &SockaddrStorage) -> Option<IpAddr> {
    let ipv4 = addr.as_sockaddr_in().map(|addr| IpAddr::V4(addr.ip()));
    ipv4.or_else(|| addr.as_sockaddr_in6().map(|addr| IpAddr::V6(addr.ip())))
}

/// Shoal's own devices, and the bridges of a container engine on the same host.
fn is_internal(name: &str) -> bool {
    let engine_bridge = name
        .strip_prefix("br-")
        .is_some_and(|id| id.len() == 12 && id.bytes().all(|c| c.is_ascii_hexdigit()));
    name.starts_with("shoal") || name == "docker0" || name == "docker_gwbridge" || engine_bridge
}

/// The address that packets to `remote` leave with; nothing is sent.
pub(crate) fn source_towards(remote: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match remote {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(remote).ok()?;
    let addr = socket.local_addr().ok()?.ip();
    (!addr.is_unspecified()).then_some(addr)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_bridges_and_shoals_devices_are_left_out() {
        for name in ["shoal0", "shoal-vxlan", "docker0", "docker_gwbridge", "br-0123456789ab"] {
            assert!(is_internal(name), "{name}");
        }
        for name in ["eth0", "br-lan", "br0", "enp1s0", "docker1"] {
            assert!(!is_internal(name), "{name}");
        }
    }

    #[test]
    fn loopback_is_left_out() {
        assert!(interfaces().iter().all(|interface| interface.name != "lo"));
    }

    #[test]
    fn packets_to_this_host_leave_with_its_own_address() {
        assert_eq!(source_towards("127.0.0.1:2377".parse().unwrap()), Some(Ipv4Addr::LOCALHOST.into()));
        if UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
            assert_eq!(source_towards("[::1]:2377".parse().unwrap()), Some(Ipv6Addr::LOCALHOST.into()));
        }
    }
}
