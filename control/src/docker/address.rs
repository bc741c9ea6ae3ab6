//! The addresses of a node: which one it advertises, where its manager listens. Pure functions over the host's
//! interfaces, with Docker's rules and texts.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::Ipv4Net;
use mesh_api::session::DEFAULT_PORT;

use super::local::Interface;

/// Why an address can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum AddressError {
    /// The host has several, and none was named.
    #[error(
        "could not choose an IP address to advertise since this system has multiple addresses on {place} ({addrs}) - specify one \
         with --advertise-addr"
    )]
    Several { place: String, addrs: String },
    /// The host has none.
    #[error("could not find the system's IP address - specify one with --advertise-addr")]
    None,
    /// An interface was named that has several.
    #[error("interface {name} has more than one IPv4 address ({addrs}): name one of them with {flag}")]
    SeveralOnInterface { name: String, addrs: String, flag: &'static str },
    /// An interface was named that has none.
    #[error("interface {0} has no usable IPv4 address")]
    NoneOnInterface(String),
    /// Neither an address nor an interface.
    #[error(
        "{flag}: '{text}' is neither a non-zero IPv4 address nor an interface of this host (with optional port number)"
    )]
    Malformed { flag: &'static str, text: String },
    /// An IPv6 address.
    #[error(
        "{flag}: '{text}' is an IPv6 address, and this version of Shoal runs over IPv4: give an IPv4 address"
    )]
    Ipv6 { flag: &'static str, text: String },
    /// An address of somebody else.
    #[error("{flag}: {addr} is not an address of this host ({own}): the others must reach this host by it")]
    Foreign { flag: &'static str, addr: Ipv4Addr, own: String },
}

/// The address that the node advertises, and its port where one is given.
pub(super) fn advertise(
    text: &str,
    interfaces: &[Interface],
) -> Result<(Ipv4Addr, Option<u16>), AddressError> {
    if text.is_empty() {
        return Ok((only(interfaces)?, None));
    }
    named(text, "--advertise-addr", interfaces)
}

/// The node's VXLAN address, where one is given.
pub(super) fn data_path(text: &str, interfaces: &[Interface]) -> Result<Option<Ipv4Addr>, AddressError> {
    if text.is_empty() {
        return Ok(None);
    }
    match named(text, "--data-path-addr", interfaces)? {
        (addr, None) => Ok(Some(addr)),
        (_, Some(_)) => Err(AddressError::Malformed { flag: "--data-path-addr", text: text.to_owned() }),
    }
}

/// Where the manager listens: an interface's address, or any; Docker's default port.
pub(super) fn listen(text: &str, interfaces: &[Interface]) -> Result<SocketAddr, AddressError> {
    const FLAG: &str = "--listen-addr";
    let (host, port) = split(text).ok_or_else(|| malformed(FLAG, text))?;
    let port = port.unwrap_or(DEFAULT_PORT);
    let addr = match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(addr)) => addr,
        Ok(IpAddr::V6(_)) => return Err(AddressError::Ipv6 { flag: FLAG, text: text.to_owned() }),
        Err(_) if host.is_empty() => Ipv4Addr::UNSPECIFIED,
        Err(_) => on_interface(host, FLAG, interfaces)?,
    };
    Ok(SocketAddr::from((addr, port)))
}

/// A manager's address, as `docker swarm join` names it; Docker's default port.
pub(super) fn remote(text: &str) -> Option<SocketAddr> {
    let text = text.strip_prefix("tcp://").unwrap_or(text);
    let (host, port) = split(text)?;
    let addr: IpAddr = host.trim_start_matches('[').trim_end_matches(']').parse().ok()?;
    (!addr.is_unspecified()).then(|| SocketAddr::new(addr, port.unwrap_or(DEFAULT_PORT)))
}

/// The host's only address.
fn only(interfaces: &[Interface]) -> Result<Ipv4Addr, AddressError> {
    let mut found: Option<(&str, Ipv4Addr)> = None;
    for interface in interfaces.iter().filter(|interface| interface.up) {
        for addr in interface.addrs.iter().map(Ipv4Net::addr).filter(|addr| is_global(*addr)) {
            let Some((name, first)) = found else {
                found = Some((&interface.name, addr));
                continue;
            };
            let same = name == interface.name;
            return Err(AddressError::Several {
                place: if same { format!("interface {name}") } else { "different interfaces".to_owned() },
                addrs: if same {
                    format!("{first} and {addr}")
                } else {
                    format!("{first} on {name} and {addr} on {}", interface.name)
                },
            });
        }
    }
    found.map(|(_, addr)| addr).ok_or(AddressError::None)
}

fn named(
    text: &str,
    flag: &'static str,
    interfaces: &[Interface],
) -> Result<(Ipv4Addr, Option<u16>), AddressError> {
    if text.parse::<IpAddr>().is_ok_and(|addr| addr.is_ipv6()) {
        return Err(AddressError::Ipv6 { flag, text: text.to_owned() });
    }
    let (host, port) = split(text).ok_or_else(|| malformed(flag, text))?;
    let addr = match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        Ok(IpAddr::V6(_)) => return Err(AddressError::Ipv6 { flag, text: text.to_owned() }),
        Ok(IpAddr::V4(addr)) if addr.is_unspecified() || addr.is_multicast() || addr.is_broadcast() => {
            return Err(malformed(flag, text));
        }
        Ok(IpAddr::V4(addr)) => addr,
        Err(_) => {
            if !interfaces.iter().any(|interface| interface.name == host) {
                return Err(malformed(flag, text));
            }
            on_interface(host, flag, interfaces)?
        }
    };
    let own: Vec<Ipv4Addr> =
        interfaces.iter().flat_map(|interface| &interface.addrs).map(Ipv4Net::addr).collect();
    if !addr.is_loopback() && !own.contains(&addr) {
        return Err(AddressError::Foreign { flag, addr, own: list(&own) });
    }
    Ok((addr, port))
}

fn on_interface(name: &str, flag: &'static str, interfaces: &[Interface]) -> Result<Ipv4Addr, AddressError> {
    let Some(interface) = interfaces.iter().find(|interface| interface.name == name) else {
        return Err(malformed(flag, name));
    };
    match interface.addrs[..] {
        [] => Err(AddressError::NoneOnInterface(name.to_owned())),
        [addr] => Ok(addr.addr()),
        _ => {
            let addrs: Vec<Ipv4Addr> = interface.addrs.iter().map(Ipv4Net::addr).collect();
            Err(AddressError::SeveralOnInterface { name: name.to_owned(), addrs: list(&addrs), flag })
        }
    }
}

/// `host`, `host:port`; not an IPv6 address without brackets.
fn split(text: &str) -> Option<(&str, Option<u16>)> {
    match text.rsplit_once(':') {
        Some((host, port)) => port.parse().ok().filter(|port| *port > 0).map(|port| (host, Some(port))),
        None => Some((text, None)),
    }
}

fn malformed(flag: &'static str, text: &str) -> AddressError {
    AddressError::Malformed { flag, text: text.to_owned() }
}

fn is_global(addr: Ipv4Addr) -> bool {
    !(addr.is_loopback() || addr.is_link_local() || addr.is_unspecified() || addr.is_multicast())
}

fn list(addrs: &[Ipv4Addr]) -> String {
    addrs.iter().map(Ipv4Addr::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, addrs: &[&str]) -> Interface {
        Interface {
            name: name.to_owned(),
            up: true,
            addrs: addrs.iter().map(|addr| addr.parse().unwrap()).collect(),
        }
    }

    fn one() -> Vec<Interface> {
        vec![interface("eth0", &["192.0.2.7/24"])]
    }

    fn two() -> Vec<Interface> {
        vec![interface("eth0", &["192.0.2.7/24"]), interface("eth1", &["198.51.100.7/24"])]
    }

    #[test]
    fn the_only_address_is_advertised() {
        assert_eq!(advertise("", &one()), Ok((Ipv4Addr::new(192, 0, 2, 7), None)));
        assert_eq!(advertise("", &[]), Err(AddressError::None));
        let link_local = vec![interface("eth0", &["169.254.1.1/16", "192.0.2.7/24"])];
        assert_eq!(advertise("", &link_local), Ok((Ipv4Addr::new(192, 0, 2, 7), None)));
        let mut down = two();
        down[1].up = false;
        assert_eq!(advertise("", &down), Ok((Ipv4Addr::new(192, 0, 2, 7), None)));
    }

    #[test]
    fn of_several_addresses_one_must_be_named() {
        assert_eq!(
            advertise("", &two()).unwrap_err().to_string(),
            "could not choose an IP address to advertise since this system has multiple addresses on different interfaces \
             (192.0.2.7 on eth0 and 198.51.100.7 on eth1) - specify one with --advertise-addr"
        );
        let both = vec![interface("eth0", &["192.0.2.7/24", "192.0.2.8/24"])];
        assert!(
            advertise("", &both)
                .unwrap_err()
                .to_string()
                .contains("on interface eth0 (192.0.2.7 and 192.0.2.8)")
        );
    }

    #[test]
    fn advertised_addresses_are_named_in_three_ways() {
        let addr = Ipv4Addr::new(198, 51, 100, 7);
        assert_eq!(advertise("198.51.100.7", &two()), Ok((addr, None)));
        assert_eq!(advertise("198.51.100.7:2400", &two()), Ok((addr, Some(2400))));
        assert_eq!(advertise("eth1", &two()), Ok((addr, None)));
        assert_eq!(advertise("eth1:2400", &two()), Ok((addr, Some(2400))));
    }

    #[test]
    fn wrong_addresses_are_named_with_their_flag() {
        for text in
            ["0.0.0.0", "nonsense", "192.0.2.7:x", "192.0.2.7:0", "2001:db8::1", "203.0.113.9", "224.0.0.1"]
        {
            let error = advertise(text, &one()).unwrap_err().to_string();
            assert!(error.contains("--advertise-addr"), "{text}: {error}");
        }
        assert!(data_path("192.0.2.7:1", &one()).is_err());
        assert_eq!(data_path("eth0", &one()), Ok(Some(Ipv4Addr::new(192, 0, 2, 7))));
        assert!(listen("[::]:2377", &one()).is_err());
    }

    #[test]
    fn listening_and_remote_addresses_have_a_default_port() {
        assert_eq!(listen("0.0.0.0:2377", &one()), Ok("0.0.0.0:2377".parse().unwrap()));
        assert_eq!(listen("eth0", &one()), Ok("192.0.2.7:2377".parse().unwrap()));
        assert_eq!(remote("192.0.2.1"), Some("192.0.2.1:2377".parse().unwrap()));
        assert_eq!(remote("tcp://192.0.2.1:2400"), Some("192.0.2.1:2400".parse().unwrap()));
        assert_eq!(remote("0.0.0.0:2377"), None);
        assert_eq!(remote("manager1:2377"), None);
    }
}
