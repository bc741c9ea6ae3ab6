//! Hosts without Shoal on the lab's switch: what is attacked first, to see that an attack works.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::client;
use crate::lab::{self, BINARY, as_client, command_in, until};
use crate::mesh::python;

/// The balancer's address on the underlay.
pub(crate) const BALANCER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 201);
/// The address of the server behind it, and of the balancer's end of the link there.
pub(crate) const BEHIND: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const BEFORE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The port that is balanced.
pub(crate) const PORT: u16 = 8080;
/// The server's own ports: behind [`PORT`], and one that nobody has published.
pub(crate) const SERVED: [u16; 2] = [80, 81];

/// A host: a network namespace. Gone when this is dropped.
pub(crate) struct Peer {
    pub(crate) name: &'static str,
}

impl Peer {
    pub(crate) fn new(name: &'static str) -> Result<Self> {
        let netns = format!("shoal-{name}");
        // Of a run that was killed.
        let _ = lab::output(Command::new("ip").args(["netns", "delete", &netns]));
        lab::output(Command::new("ip").args(["netns", "add", &netns]))?;
        let peer = Self { name };
        peer.ip("link set lo up")?;
        // As Docker leaves it.
        for setting in ["ip_forward=1", "conf/all/rp_filter=0", "conf/default/rp_filter=0"] {
            peer.set(setting)?;
        }
        Ok(peer)
    }

    /// A router of that name and address on the underlay. What it has no route to it drops.
    pub(crate) fn on_the_switch(name: &'static str, address: Ipv4Addr) -> Result<Self> {
        let peer = Self::new(name)?;
        // The same for every host that has this address, one after another: the client remembers it.
        let [a, b, c, d] = address.octets();
        let mac = format!("02:01:{a:02x}:{b:02x}:{c:02x}:{d:02x}");
        let add = format!("link add {name} type veth peer name eth0 address {mac} netns shoal-{name}");
        for words in [add, format!("link set {name} master br0 up")] {
            lab::output(command_in("sw", "ip").args(words.split(' ')))?;
        }
        peer.ip("link set eth0 up")?;
        peer.ip(&format!("address add {address}/24 dev eth0"))?;
        peer.ip("route add blackhole default")?;
        for setting in ["conf/all/send_redirects=0", "conf/eth0/send_redirects=0"] {
            peer.set(setting)?;
        }
        Ok(peer)
    }

    /// `ip` on this host.
    pub(crate) fn ip(&self, words: &str) -> Result<()> {
        lab::output(command_in(self.name, "ip").args(words.split(' '))).map(drop)
    }

    /// Writes a setting of /proc/sys/net/ipv4, as `path=value`.
    pub(crate) fn set(&self, setting: &str) -> Result<()> {
        let script = r#"echo "${1#*=}" >"/proc/sys/net/ipv4/${1%%=*}""#;
        lab::output(command_in(self.name, "sh").args(["-c", script, "sh", setting])).map(drop)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let mut gone = Command::new("ip");
        if let Err(error) = lab::output(gone.args(["netns", "delete", &format!("shoal-{}", self.name)])) {
            println!("    not undone: {error:#}");
        }
    }
}

/// What a balancer is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Destination NAT by nftables.
    Nftables,
    /// IPVS with masquerading and tracked connections, as Docker Swarm's.
    Ipvs,
}

/// A host that balances to a server behind it, as a host of containers does.
pub(crate) struct Balancer {
    servers: Vec<Child>,
    pub(crate) front: Peer,
    _behind: Peer,
}

/// Tells the kernel of a service and its server by `setsockopt`: IP_VS_SO_SET_ADD and IP_VS_SO_SET_ADDDEST with their
/// structs of linux/ip_vs.h.
const IPVS: &str = "
import socket, struct, sys
service, port, server, server_port = sys.argv[1:]
at = lambda address, port: struct.pack('=4sH', socket.inet_aton(address), socket.htons(int(port)))
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
which = struct.pack('=Hxx6sxxI16sIII', socket.IPPROTO_TCP, at(service, port), 0, b'rr', 0, 0, 0xffffffff)
raw.setsockopt(socket.IPPROTO_IP, 1154, which)
raw.setsockopt(socket.IPPROTO_IP, 1159, which + struct.pack('=6sxxIiII', at(server, server_port), 0, 1, 0, 0))
";

impl Balancer {
    /// Sets it up, and waits until it answers the client.
    pub(crate) fn start(kind: Kind) -> Result<Self> {
        let front = Peer::on_the_switch("peer", BALANCER)?;
        let behind = Peer::new("behind")?;
        front.ip("link add back type veth peer name eth0 netns shoal-behind")?;
        front.ip("link set back up")?;
        front.ip(&format!("address add {BEFORE}/24 dev back"))?;
        behind.ip("link set eth0 up")?;
        behind.ip(&format!("address add {BEHIND}/24 dev eth0"))?;
        behind.ip(&format!("route add default via {BEFORE}"))?;
        let mut balancer = Self { servers: Vec::new(), front, _behind: behind };
        for port in SERVED {
            let mut server = command_in("behind", BINARY);
            server.args(["internal", "whoami", "--port", &port.to_string()]).env("SHOAL_NODE", "behind");
            server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            balancer.servers.push(server.spawn().context("could not start a server")?);
        }
        match kind {
            Kind::Nftables => balancer.nft(&format!(
                "chain dial {{ type nat hook prerouting priority dstnat; \
                 ip daddr {BALANCER} tcp dport {PORT} dnat to {BEHIND}:{}; \
                 ip daddr {BALANCER} udp dport {PORT} dnat to {BEHIND}:{};\n}}\n",
                SERVED[0], SERVED[0]
            ))?,
            Kind::Ipvs => {
                balancer.nft(
                    "chain track { type filter hook forward priority filter; ct state new accept;\n}\n",
                )?;
                let mut ipvs = command_in("peer", &python()?);
                ipvs.args(["-c", IPVS, &BALANCER.to_string(), &PORT.to_string()]);
                lab::output(ipvs.args([BEHIND.to_string(), SERVED[0].to_string()]))?;
                balancer.front.set("vs/conntrack=1")?;
            }
        }
        let to = SocketAddrV4::new(BALANCER, PORT);
        until(&format!("{kind:?} answers"), Duration::from_secs(10), || {
            Ok(as_client(|| client::http(client::anywhere(to.into()), to, "/")).ok())
        })?;
        Ok(balancer)
    }

    fn nft(&self, rules: &str) -> Result<()> {
        lab::output(command_in(self.front.name, "nft").arg(format!("table ip peer {{\n{rules}}}\n")))
            .map(drop)
    }

    /// Connections that its kernel tracks.
    pub(crate) fn tracked(&self) -> Result<u64> {
        tracked(self.front.name)?.context("the balancer tracks no connections")
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        for server in &mut self.servers {
            // It may have ended by itself.
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

/// Connections that the kernel of a host tracks; none without that module.
pub(crate) fn tracked(host: &str) -> Result<Option<u64>> {
    let count = lab::output(command_in(host, "cat").arg("/proc/sys/net/netfilter/nf_conntrack_count")).ok();
    count.map(|count| count.trim().parse().context("no count of connections")).transpose()
}
