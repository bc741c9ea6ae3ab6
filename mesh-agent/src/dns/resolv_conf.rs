//! resolv.conf(5): which resolvers the host asks, and what its tasks are told instead.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};

use nix::net::if_::if_nametoindex;

use crate::links::HOST_ADDR;

/// How many resolvers are asked, as in resolv.conf(5).
const SERVERS_MAX: usize = 3;

/// The resolvers that a host's file names, but for ourselves.
pub(super) fn resolvers(text: &str) -> Vec<SocketAddr> {
    let servers = lines(text).filter_map(|(keyword, mut values)| match keyword {
        "nameserver" => address(values.next()?),
        _ => None,
    });
    servers.filter(|server| server.ip() != IpAddr::V4(HOST_ADDR)).take(SERVERS_MAX).collect()
}

/// A task's file on a host with the file `host`: one name server, and the host's search domains and options, as Docker
/// has it. Names are taken as they are given first, unless the host says otherwise.
pub(crate) fn for_task(host: &str, name_server: Ipv4Addr) -> String {
    let mut search = Vec::new();
    let mut options = Vec::new();
    for (keyword, values) in lines(host) {
        match keyword {
            // The last one counts.
            "search" | "domain" => search = values.collect(),
            "options" => options.extend(values),
            _ => {}
        }
    }
    if !options.iter().any(|option| option.starts_with("ndots:")) {
        options.push("ndots:0");
    }
    let mut text = format!("nameserver {name_server}\n");
    for (keyword, values) in [("search", search), ("options", options)] {
        if !values.is_empty() {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{keyword} {}", values.join(" "));
        }
    }
    text
}

/// The lines that say something: a keyword, and its values.
fn lines(text: &str) -> impl Iterator<Item = (&str, impl Iterator<Item = &str>)> {
    let is_comment = |word: &&str| word.starts_with(['#', ';']);
    text.lines().filter_map(move |line| {
        let mut words = line.split_whitespace().take_while(move |word| !is_comment(word));
        Some((words.next()?, words))
    })
}

/// A resolver's address; a link-local one names its interface.
fn address(text: &str) -> Option<SocketAddr> {
    match text.split_once('%') {
        None => Some(SocketAddr::new(text.parse().ok()?, 53)),
        Some((addr, link)) => {
            let scope = link.parse().ok().or_else(|| if_nametoindex(link).ok())?;
            Some(SocketAddrV6::new(addr.parse().ok()?, 53, 0, scope).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_up_to_three_resolvers_without_ourselves() {
        let text = "# comment\nsearch x\nnameserver 169.254.64.1\nnameserver 192.0.2.1\n nameserver ::1 # c\n\
                    nameserver nonsense\nnameserver fe80::1%lo\nnameserver 192.0.2.3\n";
        let expected = ["192.0.2.1:53", "[::1]:53", "[fe80::1%1]:53"].map(|text| text.parse().unwrap());
        assert_eq!(resolvers(text), expected);
    }

    #[test]
    fn a_task_has_the_hosts_search_domains_and_options_and_its_own_name_server() {
        let gateway = Ipv4Addr::new(10, 0, 1, 1);
        for (host, expected) in [
            ("", "nameserver 10.0.1.1\noptions ndots:0\n"),
            (
                "nameserver 192.0.2.1\nsearch old.example\nsearch a.example b.example # ours\noptions edns0 trust-ad\n",
                "nameserver 10.0.1.1\nsearch a.example b.example\noptions edns0 trust-ad ndots:0\n",
            ),
            (
                "domain a.example\noptions ndots:2\noptions rotate",
                "nameserver 10.0.1.1\nsearch a.example\noptions ndots:2 rotate\n",
            ),
        ] {
            assert_eq!(for_task(host, gateway), expected, "{host}");
        }
    }
}
