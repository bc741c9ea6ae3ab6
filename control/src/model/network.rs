//! An overlay network.

use std::collections::BTreeMap;
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

/// One IPv4 entry of a network's IPAM configuration, as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpamConfig {
    /// The subnet; chosen from the pools where absent.
    pub subnet: Option<Ipv4Net>,
    /// The part of the subnet that addresses are taken from; all of it where absent.
    pub range: Option<Ipv4Net>,
    /// The gateway; the first host address where absent.
    pub gateway: Option<Ipv4Addr>,
}

/// A network's IPv6, as asked for (`--ipv6`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipam6Config {
    /// The subnet; made of the cluster's id and the VNI where absent.
    pub subnet: Option<Ipv6Net>,
    /// The gateway; where absent, what the IPv4 gateway becomes in the subnet.
    pub gateway: Option<Ipv6Addr>,
}

/// What an operator asks of a network (`docker network create`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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

/// An IPv4 subnet of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// The subnet, host bits zero.
    pub cidr: Ipv4Net,
    /// The address that every node answers for.
    pub gateway: Ipv4Addr,
    /// The part that addresses are taken from.
    pub range: Ipv4Net,
    /// The last address given out, as an offset in `range`: a freed address comes up again only after the others.
    pub cursor: u32,
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
