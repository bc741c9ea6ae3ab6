//! The ways from the client to three servers that the mesh is compared with, without Shoal: one host in the middle that
//! routes, that translates addresses by nftables, or that runs haproxy; behind it three hosts with a server each.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::Result;

use super::load;
use super::place::Place;
use super::stage::{Stage, ip_in, output, sysctl};
use crate::lab::{BINARY, Host};

/// Ports: of the servers, and in the middle of nftables' and of haproxy's balancing.
const HTTP: u16 = 8081;
const IPERF3: u16 = 5201;
const HAPROXY_HTTP: u16 = 9081;
const HAPROXY_IPERF3: u16 = 9201;

/// The host in the middle.
pub(super) const MIDDLE: &str = "mid";
const MIDDLE_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 201);
/// The hosts with servers: name, address on the switch, address that the client reaches by the middle.
pub(super) const SERVERS: [(&str, Ipv4Addr, Ipv4Addr); 3] = [
    ("s1", Ipv4Addr::new(198, 18, 0, 211), Ipv4Addr::new(198, 18, 2, 1)),
    ("s2", Ipv4Addr::new(198, 18, 0, 212), Ipv4Addr::new(198, 18, 2, 2)),
    ("s3", Ipv4Addr::new(198, 18, 0, 213), Ipv4Addr::new(198, 18, 2, 3)),
];
const SERVERS_SUBNET: &str = "198.18.2.0/24";

/// A way from the client to the servers.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) name: &'static str,
    /// Where the client finds the HTTP servers: all of them where nobody balances.
    pub(super) http: Vec<SocketAddrV4>,
    /// Where it finds one iperf3 server.
    pub(super) iperf3: SocketAddrV4,
}

/// What stands on the stage for the ways.
#[derive(Debug)]
pub(super) struct Others {
    pub(super) middle: Place,
    pub(super) servers: Vec<Place>,
}

impl Others {
    /// Sets the stage.
    pub(super) fn set_up(stage: &mut Stage, client: &Place) -> Result<Self> {
        let client_address = Host::client().address;
        let middle = stage.add_host(MIDDLE, MIDDLE_ADDRESS)?;
        // It forwards out of the link that packets came in by, and would tell the client to leave it out.
        sysctl(&middle, &["ip_forward=1", "conf/all/send_redirects=0", "conf/eth0/send_redirects=0"])?;
        ip_in(client, &["route", "replace", SERVERS_SUBNET, "via", &MIDDLE_ADDRESS.to_string()])?;
        let mut servers = Vec::new();
        for (name, address, behind) in SERVERS {
            let server = stage.add_host(name, address)?;
            ip_in(&server, &["address", "add", &format!("{behind}/32"), "dev", "lo"])?;
            let back = format!("{client_address}/32");
            ip_in(&server, &["route", "add", &back, "via", &MIDDLE_ADDRESS.to_string()])?;
            ip_in(&middle, &["route", "add", &behind.to_string(), "via", &address.to_string()])?;
            stage.serve(&mut load::whoami(&server, BINARY, name, HTTP))?;
            stage.serve(&mut load::iperf3_server(&server, IPERF3))?;
            servers.push(server);
        }
        let rules = stage.write("balance.nft", &nftables_rules())?;
        output(middle.command("nft").arg("-f").arg(rules))?;
        let configuration = stage.write("haproxy.cfg", &haproxy_configuration())?;
        stage.serve(middle.server("haproxy").args(["-db", "-f"]).arg(configuration))?;
        Ok(Self { middle, servers })
    }

    /// Plain routing, which balances nothing and is what the others can't be better than.
    pub(super) fn plain() -> Way {
        let http = SERVERS.map(|(_, _, address)| SocketAddrV4::new(address, HTTP));
        Way { name: "plain", http: http.to_vec(), iperf3: SocketAddrV4::new(SERVERS[0].2, IPERF3) }
    }

    /// Destination NAT, the servers in turns.
    pub(super) fn nftables() -> Way {
        Self::balanced("nftables", HTTP, IPERF3)
    }

    /// A balancer in user space, in TCP mode.
    pub(super) fn haproxy() -> Way {
        Self::balanced("haproxy", HAPROXY_HTTP, HAPROXY_IPERF3)
    }

    fn balanced(name: &'static str, http: u16, iperf3: u16) -> Way {
        let at = |port| SocketAddrV4::new(MIDDLE_ADDRESS, port);
        Way { name, http: vec![at(http)], iperf3: at(iperf3) }
    }
}

/// With connection tracking, as every DNAT; for the middle's own address only, so that routed packets are not touched.
fn nftables_rules() -> String {
    let [first, second, third] = SERVERS.map(|(_, _, address)| address);
    format!(
        "table ip shb {{\n  chain balance {{\n    type nat hook prerouting priority dstnat\n    \
         ip daddr {MIDDLE_ADDRESS} tcp dport {HTTP} dnat to numgen inc mod 3 \
         map {{ 0 : {first}, 1 : {second}, 2 : {third} }}\n    \
         ip daddr {MIDDLE_ADDRESS} tcp dport {IPERF3} dnat to {first}\n  }}\n}}\n"
    )
}

fn haproxy_configuration() -> String {
    let servers = SERVERS.map(|(name, _, address)| format!("    server {name} {address}:{HTTP}\n")).concat();
    let (_, _, first) = SERVERS[0];
    format!(
        "global\n    maxconn 4096\ndefaults\n    mode tcp\n    balance roundrobin\n    timeout connect 5s\n    \
         timeout client 1m\n    timeout server 1m\nlisten http\n    bind {MIDDLE_ADDRESS}:{HAPROXY_HTTP}\n{servers}\
         listen iperf3\n    bind {MIDDLE_ADDRESS}:{HAPROXY_IPERF3}\n    server s1 {first}:{IPERF3}\n"
    )
}
