//! Overlay networks of the kernel's own: two hosts with a bridge and VXLAN for each network, as container engines set
//! them up. What is attacked first, to see that an attack works.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::forgery::{Cast, Forgery, Spot};
use crate::lab::{self, command_in};
use crate::peers::Peer;
use crate::wire::{Wire, holds};

/// The hosts, their addresses on the underlay, and the namespaces of their tasks, one for each network.
const HOSTS: [(&str, Ipv4Addr, [&str; 2]); 2] = [
    ("peer", Ipv4Addr::new(198, 18, 0, 201), ["red1", "blue1"]),
    ("other", Ipv4Addr::new(198, 18, 0, 202), ["red2", "blue2"]),
];
/// The networks' identifiers.
const VNIS: [u32; 2] = [101, 102];
/// What a host's end of a network is called.
const BRIDGES: [&str; 2] = ["red", "blue"];

/// The two hosts and their tasks. Gone when this is dropped.
pub(crate) struct Rivals {
    _hosts: Vec<Peer>,
    cast: Cast,
    attacker: Wire,
    victim: Wire,
    stranger: Wire,
}

/// Somebody in `network` on host 1 or 2, or one that is claimed to be there.
fn spot(network: usize, number: u8) -> Spot {
    let group = network as u8;
    let host = HOSTS[usize::from(number > 1)].1;
    let v6 = |last: u16| Ipv6Addr::new(0xfd00, 0xc9, u16::from(group), 0, 0, 0, 0, last);
    let gateway = 250 + number.min(2);
    Spot {
        mac: [2, 0xc9, group, 0, 0, number],
        v4: Ipv4Addr::new(10, 201, group, number),
        v6: v6(number.into()),
        vni: VNIS[network],
        gateway_mac: [2, 0xc9, group, 0, 0, gateway],
        gateway4: Ipv4Addr::new(10, 201, group, gateway),
        gateway6: v6(gateway.into()),
        node4: host,
        node6: host.to_ipv6_mapped(),
    }
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl Rivals {
    /// Sets them up.
    pub(crate) fn start() -> Result<Self> {
        let mut hosts = Vec::new();
        for (number, (name, address, tasks)) in (1..).zip(HOSTS) {
            let host = Peer::on_the_switch(name, address)?;
            let other = HOSTS[usize::from(number == 1)].1;
            for (network, task) in tasks.into_iter().enumerate() {
                let (bridge, vni) = (BRIDGES[network], VNIS[network]);
                let spot = spot(network, number);
                host.ip(&format!("link add {bridge} type bridge"))?;
                host.ip(&format!("link set {bridge} address {} up", text(spot.gateway_mac)))?;
                host.ip(&format!("address add {}/24 dev {bridge}", spot.gateway4))?;
                let vxlan = format!("type vxlan id {vni} dstport 4789 local {address} remote {other}");
                host.ip(&format!("link add vx{vni} {vxlan}"))?;
                host.ip(&format!("link set vx{vni} master {bridge} up"))?;
                let inside = Peer::new(task)?;
                let mac = text(spot.mac);
                host.ip(&format!(
                    "link add {task} type veth peer name eth0 address {mac} netns shoal-{task}"
                ))?;
                host.ip(&format!("link set {task} master {bridge} up"))?;
                inside.ip("link set eth0 up")?;
                inside.ip(&format!("address add {}/24 dev eth0", spot.v4))?;
                inside.ip(&format!("address add {}/64 dev eth0 nodad", spot.v6))?;
                inside.ip(&format!("route add default via {}", spot.gateway4))?;
                hosts.push(inside);
            }
            let masquerade = "table ip peer { chain out { type nat hook postrouting priority srcnat; \
                              oifname eth0 masquerade; }; }";
            lab::output(command_in(name, "nft").arg(masquerade))?;
            hosts.push(host);
        }
        let wire = |(network, number): (usize, u8)| {
            let task = HOSTS[usize::from(number) - 1].2[network];
            let namespace = PathBuf::from(format!("/run/netns/shoal-{task}"));
            Wire::open(&namespace, spot(network, number).v4).with_context(|| task)
        };
        let cast = Cast {
            attacker: spot(0, 1),
            victim: spot(0, 2),
            neighbour: spot(0, 3),
            stranger: spot(1, 2),
            insider: spot(1, 3),
        };
        Ok(Self {
            _hosts: hosts,
            cast,
            attacker: wire((0, 1))?,
            victim: wire((0, 2))?,
            stranger: wire((1, 2))?,
        })
    }

    /// Sends a forgery from the one host's first network to the other host, and tells whether it was heard there.
    pub(crate) fn fall_for(&self, forgery: Forgery) -> Result<bool> {
        let mark = forgery.mark(0);
        self.attacker.send(&forgery.frame(&self.cast, &mark)?)?;
        let mut heard = 0;
        for _ in 0..10 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            heard += self.victim.heard(|frame| holds(frame, &mark))?
                + self.stranger.heard(|frame| holds(frame, &mark))?;
            if heard > 0 {
                break;
            }
        }
        Ok(heard > 0)
    }
}
