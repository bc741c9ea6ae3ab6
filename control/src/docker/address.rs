//! The addresses of a node: which one it advertises, where its manager listens. Pure functions over the host's
//! interfaces, with Docker's rules and texts. Of both families IPv4 comes first, as in Docker.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
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
    #[error("interface {name} has more than one {family} address ({addrs}): name one of them with {flag}")]
    SeveralOnInterface { name: String, family: &'static str, addrs: String, flag: &'static str },
    /// An interface was named that has none.
    #[error("interface {0} has no usable IPv4 or IPv6 address")]
    NoneOnInterface(String),
    /// Neither an address nor an interface.
    #[error(
        "{flag}: '{text}' is neither a non-zero IP address nor an interface of this host (with optional port number, an IPv6 \
         address before it in brackets: [fd00::1]:2377)"
    )]
    Malformed { flag: &'static str, text: String },
    /// An IPv6 address that means something on one link only.
    #[error("{flag}: {addr} is a link-local address: name one that all nodes reach")]
    LinkLocal { flag: &'static str, addr: Ipv6Addr },
    /// An address of somebody else.
    #[error("{flag}: {addr} is not an address of this host ({own}): the others must reach this host by it")]
    Foreign { flag: &'static str, addr: IpAddr, own: String },
    /// The manager would listen where nobody dials it.
    #[error(
        "--listen-addr: {listen} takes no connections for the advertised address {advertise}: listen on {advertise}, or on \
         [::] for both families"
    )]
    Deaf { listen: SocketAddr, advertise: IpAddr },
}

/// The address that the node advertises, and its port where one is given.
pub(super) fn advertise(text: &str, interfaces: &[Interface]) -> Result<(IpAddr, Option<u16>), AddressError> {
    if text.is_empty() {
        return Ok((only(interfaces)?, None));
    }
    named(text, "--advertise-addr", interfaces)
}

/// The node's VXLAN address, where one is given.
pub(super) fn data_path(text: &str, interfaces: &[Interface]) -> Result<Option<IpAddr>, AddressError> {
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
    let addr = match host.parse::<IpAddr>() {
        Ok(addr) => addr.to_canonical(),
        Err(_) if host.is_empty() => Ipv4Addr::UNSPECIFIED.into(),
        Err(_) => on_interface(host, FLAG, interfaces)?,
    };
    Ok(SocketAddr::new(addr, port.unwrap_or(DEFAULT_PORT)))
}

/// Where a manager listens so that the others reach it at `advertise`. `docker` sends 0.0.0.0 where nothing is said,
/// which stands for all addresses, whatever family they are of.
pub(super) fn reachable(listen: SocketAddr, advertise: IpAddr) -> Result<SocketAddr, AddressError> {
    match (listen.ip(), advertise) {
        (IpAddr::V4(addr), IpAddr::V6(_)) if addr.is_unspecified() => {
            Ok(SocketAddr::from((Ipv6Addr::UNSPECIFIED, listen.port())))
        }
        (IpAddr::V4(_), IpAddr::V6(_)) => Err(AddressError::Deaf { listen, advertise }),
        (IpAddr::V6(addr), IpAddr::V4(_)) if !addr.is_unspecified() => {
            Err(AddressError::Deaf { listen, advertise })
        }
        _ => Ok(listen),
    }
}

/// A manager's address, as `docker swarm join` names it; Docker's default port.
pub(super) fn remote(text: &str) -> Option<SocketAddr> {
    let (host, port) = split(text.strip_prefix("tcp://").unwrap_or(text))?;
    let addr = host.parse::<IpAddr>().ok()?.to_canonical();
    (!addr.is_unspecified()).then(|| SocketAddr::new(addr, port.unwrap_or(DEFAULT_PORT)))
}

/// The host's only address; IPv6 counts where it has no IPv4.
fn only(interfaces: &[Interface]) -> Result<IpAddr, AddressError> {
    let up = || interfaces.iter().filter(|interface| interface.up);
    let has_ipv4 = up().any(|interface| usable(interface).any(|addr| addr.is_ipv4()));
    let mut found: Option<(&str, IpAddr)> = None;
    for interface in up() {
        for addr in usable(interface).filter(|addr| addr.is_ipv4() == has_ipv4) {
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
) -> Result<(IpAddr, Option<u16>), AddressError> {
    let (host, port) = split(text).ok_or_else(|| malformed(flag, text))?;
    let addr = match host.parse::<IpAddr>().map(|addr| addr.to_canonical()) {
        Ok(addr) if addr.is_unspecified() || addr.is_multicast() || is_broadcast(addr) => {
            return Err(malformed(flag, text));
        }
        Ok(IpAddr::V6(addr)) if addr.is_unicast_link_local() => {
            return Err(AddressError::LinkLocal { flag, addr });
        }
        Ok(addr) => addr,
        Err(_) => {
            if !interfaces.iter().any(|interface| interface.name == host) {
                return Err(malformed(flag, text));
            }
            on_interface(host, flag, interfaces)?
        }
    };
    let own: Vec<IpAddr> =
        interfaces.iter().flat_map(|interface| &interface.addrs).map(IpNet::addr).collect();
    if !addr.is_loopback() && !own.contains(&addr) {
        let own: Vec<IpAddr> = interfaces.iter().flat_map(usable).collect();
        return Err(AddressError::Foreign { flag, addr, own: list(&own) });
    }
    Ok((addr, port))
}

/// The only IPv4 address of an interface, or else its only IPv6 address.
fn on_interface(name: &str, flag: &'static str, interfaces: &[Interface]) -> Result<IpAddr, AddressError> {
    let Some(interface) = interfaces.iter().find(|interface| interface.name == name) else {
        return Err(malformed(flag, name));
    };
    let is_ipv6_link_local = |addr: &IpAddr| matches!(addr, IpAddr::V6(addr) if addr.is_unicast_link_local());
    let all = interface.addrs.iter().map(IpNet::addr).filter(|addr| !is_ipv6_link_local(addr));
    let (four, six): (Vec<IpAddr>, Vec<IpAddr>) = all.partition(IpAddr::is_ipv4);
    match (four.as_slice(), six.as_slice()) {
        ([], []) => Err(AddressError::NoneOnInterface(name.to_owned())),
        ([addr], _) | ([], [addr]) => Ok(*addr),
        ([], addrs) => Err(several(name, "IPv6", addrs, flag)),
        (addrs, _) => Err(several(name, "IPv4", addrs, flag)),
    }
}

fn several(name: &str, family: &'static str, addrs: &[IpAddr], flag: &'static str) -> AddressError {
    AddressError::SeveralOnInterface { name: name.to_owned(), family, addrs: list(addrs), flag }
}

/// `host`, `host:port`, `[IPv6]:port`, `[IPv6]`, or an IPv6 address alone.
fn split(text: &str) -> Option<(&str, Option<u16>)> {
    let port = |text: &str| text.parse().ok().filter(|port| *port > 0);
    if let Some(inside) = text.strip_prefix('[') {
        let (host, rest) = inside.split_once(']')?;
        host.parse::<Ipv6Addr>().ok()?;
        return match rest.strip_prefix(':') {
            Some(rest) => port(rest).map(|port| (host, Some(port))),
            None => rest.is_empty().then_some((host, None)),
        };
    }
    if text.parse::<Ipv6Addr>().is_ok() {
        return Some((text, None));
    }
    match text.rsplit_once(':') {
        Some((host, _)) if host.contains(':') => None,
        Some((host, rest)) => port(rest).map(|port| (host, Some(port))),
        None => Some((text, None)),
    }
}

fn malformed(flag: &'static str, text: &str) -> AddressError {
    AddressError::Malformed { flag, text: text.to_owned() }
}

/// An interface's addresses that are no matter of one link.
fn usable(interface: &Interface) -> impl Iterator<Item = IpAddr> {
    interface.addrs.iter().map(IpNet::addr).filter(|addr| is_global(*addr))
}

fn is_global(addr: IpAddr) -> bool {
    let link_local = match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    };
    !(link_local || addr.is_loopback() || addr.is_unspecified() || addr.is_multicast())
}

fn is_broadcast(addr: IpAddr) -> bool {
    matches!(addr, IpAddr::V4(addr) if addr.is_broadcast())
}

fn list(addrs: &[IpAddr]) -> String {
    addrs.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ")
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

    fn six() -> Vec<Interface> {
        vec![interface("eth0", &["fe80::1/64", "fd00::7/64"])]
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_only_address_is_advertised() {
        assert_eq!(advertise("", &one()), Ok((ip("192.0.2.7"), None)));
        assert_eq!(advertise("", &[]), Err(AddressError::None));
        let link_local = vec![interface("eth0", &["169.254.1.1/16", "192.0.2.7/24"])];
        assert_eq!(advertise("", &link_local), Ok((ip("192.0.2.7"), None)));
        let mut down = two();
        down[1].up = false;
        assert_eq!(advertise("", &down), Ok((ip("192.0.2.7"), None)));
        assert_eq!(advertise("", &six()), Ok((ip("fd00::7"), None)));
        let both = vec![interface("eth0", &["fd00::7/64"]), interface("eth1", &["192.0.2.7/24"])];
        assert_eq!(advertise("", &both), Ok((ip("192.0.2.7"), None)), "IPv4 comes first");
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
        let six = vec![interface("eth0", &["fd00::7/64", "fd00::8/64"])];
        assert!(advertise("", &six).unwrap_err().to_string().contains("(fd00::7 and fd00::8)"));
        let error = advertise("eth0", &six).unwrap_err().to_string();
        assert!(error.contains("interface eth0 has more than one IPv6 address"), "{error}");
    }

    #[test]
    fn advertised_addresses_are_named_in_three_ways() {
        let addr = ip("198.51.100.7");
        assert_eq!(advertise("198.51.100.7", &two()), Ok((addr, None)));
        assert_eq!(advertise("198.51.100.7:2400", &two()), Ok((addr, Some(2400))));
        assert_eq!(advertise("eth1", &two()), Ok((addr, None)));
        assert_eq!(advertise("eth1:2400", &two()), Ok((addr, Some(2400))));
        for text in ["fd00::7", "[fd00::7]", "eth0"] {
            assert_eq!(advertise(text, &six()), Ok((ip("fd00::7"), None)), "{text}");
        }
        for text in ["[fd00::7]:2400", "eth0:2400"] {
            assert_eq!(advertise(text, &six()), Ok((ip("fd00::7"), Some(2400))), "{text}");
        }
        let both = vec![interface("eth0", &["fd00::7/64", "192.0.2.7/24"])];
        assert_eq!(advertise("eth0", &both), Ok((ip("192.0.2.7"), None)), "IPv4 comes first");
    }

    #[test]
    fn wrong_addresses_are_named_with_their_flag() {
        for text in [
            "0.0.0.0",
            "nonsense",
            "192.0.2.7:x",
            "192.0.2.7:0",
            "2001:db8::1",
            "203.0.113.9",
            "224.0.0.1",
            "::",
            "[::]:2377",
            "ff02::1",
            "fe80::1",
            "[fd00::7",
            "[fd00::7]2377",
            "[192.0.2.7]:2377",
            "fd00:::7",
            "[eth0]",
        ] {
            let error = advertise(text, &one()).unwrap_err().to_string();
            assert!(error.contains("--advertise-addr"), "{text}: {error}");
        }
        assert!(data_path("192.0.2.7:1", &one()).is_err());
        assert!(data_path("[fd00::7]:1", &six()).is_err());
        assert_eq!(data_path("eth0", &one()), Ok(Some(ip("192.0.2.7"))));
        assert_eq!(data_path("fd00::7", &six()), Ok(Some(ip("fd00::7"))));
        let error = advertise("fd00::9", &six()).unwrap_err().to_string();
        assert!(error.contains("fd00::9 is not an address of this host (fd00::7)"), "{error}");
    }

    #[test]
    fn listening_and_remote_addresses_have_a_default_port() {
        assert_eq!(listen("0.0.0.0:2377", &one()), Ok("0.0.0.0:2377".parse().unwrap()));
        assert_eq!(listen("eth0", &one()), Ok("192.0.2.7:2377".parse().unwrap()));
        assert_eq!(listen("[::]:2400", &one()), Ok("[::]:2400".parse().unwrap()));
        assert_eq!(listen("[::]", &one()), Ok("[::]:2377".parse().unwrap()));
        assert_eq!(listen("eth0:2400", &six()), Ok("[fd00::7]:2400".parse().unwrap()));
        assert_eq!(remote("192.0.2.1"), Some("192.0.2.1:2377".parse().unwrap()));
        assert_eq!(remote("tcp://192.0.2.1:2400"), Some("192.0.2.1:2400".parse().unwrap()));
        assert_eq!(remote("fd00::1"), Some("[fd00::1]:2377".parse().unwrap()));
        assert_eq!(remote("tcp://[fd00::1]"), Some("[fd00::1]:2377".parse().unwrap()));
        assert_eq!(remote("[fd00::1]:2400"), Some("[fd00::1]:2400".parse().unwrap()));
        assert_eq!(remote("::ffff:192.0.2.1"), Some("192.0.2.1:2377".parse().unwrap()));
        for text in ["0.0.0.0:2377", "[::]:2377", "manager1:2377", "[fd00::1]:0", "fd00::1:"] {
            assert_eq!(remote(text), None, "{text}");
        }
    }

    #[test]
    fn a_manager_listens_where_it_is_dialled() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        for (listen, advertise, listens) in [
            ("0.0.0.0:2400", "192.0.2.7", "0.0.0.0:2400"),
            ("0.0.0.0:2400", "fd00::7", "[::]:2400"),
            ("[::]:2400", "192.0.2.7", "[::]:2400"),
            ("[fd00::7]:2400", "fd00::7", "[fd00::7]:2400"),
            ("192.0.2.7:2400", "198.51.100.7", "192.0.2.7:2400"),
        ] {
            assert_eq!(reachable(at(listen), ip(advertise)), Ok(at(listens)), "{listen} {advertise}");
        }
        for (listen, advertise) in [("192.0.2.7:2400", "fd00::7"), ("[fd00::7]:2400", "192.0.2.7")] {
            let error = reachable(at(listen), ip(advertise)).unwrap_err().to_string();
            assert!(error.contains("--listen-addr") && error.contains("[::]"), "{error}");
        }
    }
}
