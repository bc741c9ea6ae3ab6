//! What a lab consists of: hosts, names, addresses, files. Nothing here touches the system, but for the lab's record.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Everything of a lab is below; an agent that the machine itself runs has files of its own beside it.
pub(crate) const RUN_DIR: &str = "/run/shoal";
/// The binary that the lab runs. A copy: the next build doesn't disturb a running lab.
pub(crate) const BINARY: &str = "/run/shoal/bin/shoal";
/// Start of the names of the lab's namespaces.
pub(crate) const NETNS_PREFIX: &str = "shoal-";
/// The bridge that stands for the switch, in the switch's namespace.
pub(crate) const BRIDGE: &str = "br0";
/// The switch's own address: the hosts' default gateway.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// The same, IPv6.
pub(crate) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xc6, 0, 0, 0, 0, 0, 1);
/// Of the underlay. The range is RFC 2544's, for tests of networks.
pub(crate) const PREFIX: u8 = 24;
/// The same, IPv6. The range is one of RFC 4193's.
pub(crate) const PREFIX6: u8 = 64;
/// An address of the client that hosts reach only by the gateway.
pub(crate) const ROUTED_CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 1, 100);
/// The same, IPv6.
pub(crate) const ROUTED_CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xc7, 0, 0, 0, 0, 0, 0x100);
/// The addresses up to .99 are the nodes'.
pub(crate) const NODES_MAX: usize = 80;

/// How agents attach XDP to the uplink.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Xdp {
    /// What suits the link
    Auto,
    /// In the driver
    Native,
    /// In the kernel's generic hook
    Generic,
    /// Not at all: TC alone
    Off,
}

impl fmt::Display for Xdp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Off => "off",
        })
    }
}

/// The family that the nodes speak among themselves.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Underlay {
    /// IPv4
    #[default]
    Ipv4,
    /// IPv6
    Ipv6,
}

impl fmt::Display for Underlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        })
    }
}

/// A lab, as it was asked for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Lab {
    pub(crate) nodes: usize,
    pub(crate) xdp: Xdp,
    pub(crate) mtu: u32,
    pub(crate) underlay: Underlay,
}

impl Lab {
    /// The lab that is up, if one is, or that was not brought up to its end.
    pub(crate) fn recorded() -> Result<Option<Self>> {
        match std::fs::read(record()) {
            Ok(bytes) => {
                let lab = serde_json::from_slice(&bytes).with_context(|| record().display().to_string())?;
                Ok(Some(lab))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| record().display().to_string()),
        }
    }

    /// The lab that is up; an error that says the remedy without one.
    pub(crate) fn current() -> Result<Self> {
        Self::recorded()?.context("no lab is up: cargo xtask lab up")
    }

    /// Leaves word for the commands to come.
    pub(crate) fn write(&self) -> Result<()> {
        let path = record();
        std::fs::write(&path, serde_json::to_vec(self)?).with_context(|| path.display().to_string())
    }

    pub(crate) fn node(&self, name: &str) -> Result<Host> {
        let nodes = self.nodes();
        match nodes.into_iter().find(|node| node.name == name) {
            Some(node) => Ok(node),
            None => bail!("no node {name:?} in this lab: it has n1 to n{}", self.nodes),
        }
    }

    pub(crate) fn nodes(&self) -> Vec<Host> {
        (1..=self.nodes).map(Host::node).collect()
    }
}

/// A host: a network namespace with one link to the switch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Host {
    /// `n1`…, `client`; also the name of its port on the switch.
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    /// Ends in the same digits.
    pub(crate) address6: Ipv6Addr,
}

impl Host {
    pub(crate) fn node(number: usize) -> Self {
        let last = u8::try_from(10 + number).unwrap_or(u8::MAX);
        let digits = u16::from(last / 10) << 4 | u16::from(last % 10);
        Self {
            name: format!("n{number}"),
            address: Ipv4Addr::new(198, 18, 0, last),
            address6: Ipv6Addr::new(0xfd00, 0xc6, 0, 0, 0, 0, 0, digits),
        }
    }

    pub(crate) fn client() -> Self {
        Self {
            name: "client".to_owned(),
            address: Ipv4Addr::new(198, 18, 0, 100),
            address6: Ipv6Addr::new(0xfd00, 0xc6, 0, 0, 0, 0, 0, 0x100),
        }
    }

    /// Its address in the family that nodes speak among themselves.
    pub(crate) fn underlay(&self, underlay: Underlay) -> IpAddr {
        match underlay {
            Underlay::Ipv4 => self.address.into(),
            Underlay::Ipv6 => self.address6.into(),
        }
    }

    pub(crate) fn netns(&self) -> String {
        netns(&self.name)
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        Path::new(RUN_DIR).join(&self.name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.run_dir().join("docker.sock")
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.run_dir().join("state")
    }

    pub(crate) fn bpffs(&self) -> PathBuf {
        self.run_dir().join("bpf")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.run_dir().join("agent.log")
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        self.run_dir().join("agent.pid")
    }

    /// For `docker -H`.
    pub(crate) fn docker_host(&self) -> String {
        format!("unix://{}", self.socket().display())
    }
}

/// The namespace of a host, or of the switch (`sw`).
pub(crate) fn netns(name: &str) -> String {
    format!("{NETNS_PREFIX}{name}")
}

/// Where `ip netns` names a namespace.
pub(crate) fn netns_path(netns: &str) -> PathBuf {
    Path::new("/run/netns").join(netns)
}

/// Whether a namespace's name is one that labs give.
pub(crate) fn is_lab_netns(name: &str) -> bool {
    name.strip_prefix(NETNS_PREFIX).is_some_and(|host| host == "sw" || host == "client" || is_node(host))
}

/// Whether a name is a node's: `n` and a number.
pub(crate) fn is_node(name: &str) -> bool {
    name.strip_prefix('n').is_some_and(|number| number.parse::<usize>().is_ok_and(|number| number > 0))
}

/// Where the lab's record is.
pub(crate) fn record() -> PathBuf {
    Path::new(RUN_DIR).join("lab.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_labs_own_namespaces_are_taken_for_the_labs() {
        for own in ["shoal-sw", "shoal-client", "shoal-n1", "shoal-n12"] {
            assert!(is_lab_netns(own), "{own}");
        }
        for other in ["shoal", "shoal-", "shoal-n", "shoal-n0", "shoal-nx", "shoal-prod", "n1", "blue"] {
            assert!(!is_lab_netns(other), "{other}");
        }
    }

    #[test]
    fn every_host_has_an_address_of_its_own_in_the_underlay() {
        let mut addresses: Vec<_> = (1..=NODES_MAX).map(|number| Host::node(number).address).collect();
        addresses.extend([Host::client().address, GATEWAY]);
        assert!(addresses.iter().all(|address| address.octets()[..3] == GATEWAY.octets()[..3]));
        let mut addresses6: Vec<_> = (1..=NODES_MAX).map(|number| Host::node(number).address6).collect();
        addresses6.extend([Host::client().address6, GATEWAY6]);
        let count = addresses.len() + addresses6.len();
        addresses.sort_unstable();
        addresses.dedup();
        addresses6.sort_unstable();
        addresses6.dedup();
        assert_eq!(addresses.len() + addresses6.len(), count);
        assert_eq!(Host::node(2).address6.to_string(), "fd00:c6::12");
    }
}
