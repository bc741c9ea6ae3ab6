//! An overlay network.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use mesh_api::id::NetworkId;
use mesh_api::table::Subnet6Record;
use serde::{Deserialize, Serialize};

use super::Meta;

/// The name of the routing mesh's own network.
pub const INGRESS_NAME: &str = "ingress";
/// The first VNI given to a network; below are the mesh's own.
pub const VNI_MIN: u32 = 4096;
/// The last VNI.
pub const VNI_MAX: u32 = 0x00ff_ffff;

/// The driver option that bounds a network's MTU.
pub const MTU_OPTION: &str = "com.docker.network.driver.mtu";
/// The driver options that ask for encryption: Docker's own, and the same with the driver's prefix.
pub const ENCRYPTED_OPTIONS: [&str; 2] = ["encrypted", "com.docker.network.driver.overlay.encrypted"];
/// The least MTU of a network, bytes: what every IPv4 host takes (RFC 791, section 3.1).
pub const MTU_MIN: u32 = 576;
/// The least MTU of a network with IPv6, bytes (RFC 8200, section 5).
pub const MTU_MIN_IPV6: u32 = 1280;
/// The greatest MTU of a network, bytes: a packet's greatest length.
pub const MTU_MAX: u32 = 65_535;

/// One IPv4 entry of a network's IPAM configuration, as asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpamConfig {
    /// The subnet; chosen from the pools where absent.
    pub subnet: Option<Ipv4Net>,
    /// The part of the subnet that addresses are taken from; all of it where absent.
    pub range: Option<Ipv4Net>,
    /// The gateway; the first host address where absent.
    pub gateway: Option<Ipv4Addr>,
    /// Addresses that nobody is given, by what they are for.
    #[serde(default)]
    pub aux: BTreeMap<String, Ipv4Addr>,
}

/// A network's IPv6, as asked for (`--ipv6`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipam6Config {
    /// The subnet; made of the cluster's id and the VNI where absent.
    pub subnet: Option<Ipv6Net>,
    /// The gateway; where absent, what the IPv4 gateway becomes in the subnet.
    pub gateway: Option<Ipv6Addr>,
    /// Addresses that nobody is given, by what they are for.
    #[serde(default)]
    pub aux: BTreeMap<String, Ipv6Addr>,
}

/// What an operator asks of a network (`docker network create`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Its name, unique.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Driver options (`--opt`).
    pub options: BTreeMap<String, String>,
    /// No way out of the network.
    pub internal: bool,
    /// Single containers may attach.
    pub attachable: bool,
    /// The routing mesh's own network; there is one.
    pub ingress: bool,
    /// IPv4 subnets, as asked for; empty for one automatic subnet.
    pub ipam: Vec<IpamConfig>,
    /// The IPv6 subnet, as asked for; `None` for a network without IPv6.
    #[serde(default)]
    pub ipam6: Option<Ipam6Config>,
}

impl NetworkSpec {
    /// The bound on its links' MTU that its options ask for, bytes; the text itself where it is none that they can have.
    pub fn mtu(&self) -> Result<Option<u32>, &str> {
        // `false` was let through when there was no such option, and asked for nothing.
        let Some(text) = self.options.get(MTU_OPTION).filter(|text| *text != "false") else {
            return Ok(None);
        };
        text.parse().ok().filter(|mtu| (self.mtu_min()..=MTU_MAX).contains(mtu)).map(Some).ok_or(text)
    }

    /// Whether its options ask for encryption (`--opt encrypted`); the option and its value where that is none. If two ask,
    /// one suffices.
    pub fn encrypted(&self) -> Result<bool, (&'static str, &str)> {
        let mut encrypted = false;
        for option in ENCRYPTED_OPTIONS {
            encrypted |= match self.options.get(option).map(String::as_str) {
                None | Some("0" | "f" | "F" | "false" | "FALSE" | "False") => false,
                Some("" | "1" | "t" | "T" | "true" | "TRUE" | "True") => true,
                Some(other) => return Err((option, other)),
            };
        }
        Ok(encrypted)
    }

    /// The least bound that its options can ask for, bytes.
    pub fn mtu_min(&self) -> u32 {
        if self.ipam6.is_some() { MTU_MIN_IPV6 } else { MTU_MIN }
    }
}

/// An IPv4 subnet of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// The subnet, host bits zero.
    pub cidr: Ipv4Net,
    /// The address that every node answers for.
    pub gateway: Ipv4Addr,
    /// The part that addresses are taken from.
    pub range: Ipv4Net,
    /// Addresses of it that nobody is given (`--aux-address`); the gateway is not among them.
    #[serde(default)]
    pub reserved: BTreeSet<Ipv4Addr>,
    /// The last address given out that was not given out before, counted from the first that tasks can have.
    pub cursor: u32,
}

/// An address that nobody has any longer. The order is that in which they were freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Freed {
    /// The table index at which it was freed.
    pub index: u64,
    /// The address.
    pub addr: Ipv4Addr,
}

/// An overlay network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its id.
    pub id: NetworkId,
    /// Version and times.
    pub meta: Meta,
    /// What was asked for.
    pub spec: NetworkSpec,
    /// Its VXLAN identifier.
    pub vni: u32,
    /// Its IPv4 subnets; never empty.
    pub subnets: Vec<Subnet>,
    /// Its IPv6 subnet, if it has one. Endpoints' addresses in it follow from their IPv4 addresses.
    #[serde(default)]
    pub subnet6: Option<Subnet6Record>,
}

impl Network {
    /// Its packets cross the underlay encrypted alone. Options are checked when they come in; what is none sends no
    /// cleartext.
    pub fn is_encrypted(&self) -> bool {
        self.spec.encrypted().unwrap_or(true)
    }
}
