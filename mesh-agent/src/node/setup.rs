//! The parts of a node that are not tasks: devices, rules, the dataplane, the name server; made once, and kept right.

use std::error::Error;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use mesh_api::error::chain;
use mesh_api::table::Table;
use tracing::{info, warn};

use super::plane::Plane;
use crate::config::Config;
use crate::dataplane::{DataplaneConfig, Uplink};
use crate::dns::Dns;
use crate::links::{Facts, HOST_ADDR, HOST_PREFIX, HostPair, LinkError, Links, VXLAN_OVERHEAD};

/// Where the host's resolvers are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The least MTU that an overlay can work with: what IPv4 asks of every host (RFC 791).
const MTU_MIN: u32 = 576;

/// How often the netfilter rules are looked at: whoever reloads the host's firewall may flush ours with it.
const RULES_AUDIT: Duration = Duration::from_secs(5);

/// Why a node can't be brought up.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A device, sysctl or netfilter rule.
    #[error("cannot set up the node's network devices")]
    Link(#[from] LinkError),
    /// No interface is an uplink.
    #[error(
        "no network interface holds the address {addr}: give one that does, or name the uplink with --uplink"
    )]
    NoUplink {
        /// The VXLAN address.
        addr: Ipv4Addr,
    },
    /// A named uplink does not exist.
    #[error("there is no network interface {name}: see `ip link` for the names --uplink can take")]
    UnknownUplink {
        /// The name.
        name: String,
    },
    /// The underlay's packets are too small.
    #[error(
        "the uplink's MTU of {mtu} bytes leaves too little for the overlay: it takes {VXLAN_OVERHEAD} of them"
    )]
    SmallMtu {
        /// The uplink's MTU, bytes.
        mtu: u32,
    },
    /// The BPF dataplane.
    #[error("cannot start the dataplane")]
    Dataplane(#[source] Box<dyn Error + Send + Sync>),
    /// The name server.
    #[error("cannot serve names on {HOST_ADDR}:53 (does another server listen on port 53 of all addresses?)")]
    Dns(#[source] io::Error),
    /// The tasks' folders.
    #[error("cannot read the tasks' folders")]
    Tasks(#[from] crate::runtime::RuntimeError),
}

/// What stands once a node is up.
#[derive(Debug)]
pub(super) struct Setup<P> {
    pub(super) links: Links,
    pub(super) facts: Facts,
    pub(super) plane: P,
    pub(super) plane_config: DataplaneConfig,
    pub(super) dns: Dns,
    /// MTU of tasks' links, bytes.
    pub(super) mtu: u32,
    vxlan_port: u16,
    rules_seen: Instant,
}

impl<P: Plane> Setup<P> {
    /// Makes the devices and rules, opens the dataplane and starts the name server.
    pub(super) async fn bring_up(config: &Config, vtep: Ipv4Addr, table: &Table) -> Result<Self, NodeError> {
        let links = Links::open()?;
        let facts = links.facts().await?;
        let uplinks = uplinks(&facts, &config.uplinks, vtep)?;
        let mtu = overlay_mtu(&uplinks)?;
        let vxlan_port = table.cluster.data_path_port;
        let (vxlan, pair) = devices(&links, vxlan_port, mtu).await?;
        let plane_config = plane_config(config, uplinks, vxlan, pair);
        let plane = open::<P>(&plane_config)?;
        let address = SocketAddr::from((HOST_ADDR, 53));
        let dns = Dns::start(address, Path::new(RESOLV_CONF)).await.map_err(NodeError::Dns)?;
        info!(mode = plane.mode(), mtu, "dataplane up");
        let rules_seen = Instant::now();
        Ok(Self { links, facts, plane, plane_config, dns, mtu, vxlan_port, rules_seen })
    }

    /// Looks at the host again, and repairs what drifted; true if the dataplane was opened anew, or the node's
    /// addresses or the tasks' MTU changed.
    pub(super) async fn audit(
        &mut self,
        config: &Config,
        vtep: Ipv4Addr,
        table: &Table,
    ) -> Result<bool, NodeError> {
        let facts = self.links.facts().await?;
        let moved = facts.node_addresses() != self.facts.node_addresses();
        self.facts = facts;
        let uplinks = match uplinks(&self.facts, &config.uplinks, vtep) {
            Ok(uplinks) => uplinks,
            // An uplink that lost its address for a while is still the one to wait for.
            Err(error) => {
                warn!(%error, "the node has no uplink at the moment");
                self.plane_config.uplinks.clone()
            }
        };
        let mtu = overlay_mtu(&uplinks)?;
        let vxlan_port = table.cluster.data_path_port;
        let intact = vxlan_port == self.vxlan_port && self.links.node_devices_are_intact(mtu).await?;
        let (vxlan_ifindex, pair) = if intact {
            let HostPair { host, peer } = self.pair();
            (self.plane_config.vxlan_ifindex, HostPair { host, peer })
        } else {
            info!("repairing the node's network devices");
            devices(&self.links, vxlan_port, mtu).await?
        };
        self.vxlan_port = vxlan_port;
        if self.rules_seen.elapsed() >= RULES_AUDIT {
            self.rules_seen = Instant::now();
            if !self.links.rules_are_there().await? {
                warn!("Shoal's netfilter table was removed or changed; installing it again");
                self.links.ensure_rules(vxlan_port).await?;
            }
        }
        let resized = mtu != self.mtu;
        self.mtu = mtu;
        let wanted = plane_config(config, uplinks, vxlan_ifindex, pair);
        let same = wanted.uplinks == self.plane_config.uplinks
            && wanted.vxlan_ifindex == self.plane_config.vxlan_ifindex
            && self.pair() == pair;
        if !same {
            info!(uplinks = ?wanted.uplinks, "attaching the dataplane to changed interfaces");
            self.plane = open::<P>(&wanted)?;
            self.plane_config = wanted;
        }
        Ok(moved || resized || !same)
    }

    fn pair(&self) -> HostPair {
        HostPair { host: self.plane_config.host_ifindex, peer: self.plane_config.host_peer_ifindex }
    }

    /// Removes it all; goes on past failures and returns them in words.
    pub(super) async fn tear_down(self) -> Vec<String> {
        let Self { links, plane, dns, .. } = self;
        let mut errors = Vec::new();
        drop(dns);
        if let Err(failures) = plane.uninstall() {
            errors.extend(failures.iter().map(|error| chain(error)));
        }
        match links.facts().await {
            Ok(facts) => {
                for link in facts.links.iter().filter(|link| link.is_task_link()) {
                    errors.extend(links.remove(link.ifindex).await.err().map(|error| chain(&error)));
                }
            }
            Err(error) => errors.push(chain(&error)),
        }
        errors.extend(links.remove_node_devices().await.iter().map(|error| chain(error)));
        errors
    }
}

/// Removes what a node that did not come up, or an earlier run of the agent, may have left.
pub(super) async fn clear_away<P: Plane>(config: &Config) -> Vec<String> {
    let mut errors = Vec::new();
    if let Err(failures) = P::clear_away(&config.bpffs) {
        errors.extend(failures.iter().map(|error| chain(error)));
    }
    // Tasks' links have gone with the tasks.
    match Links::open() {
        Ok(links) => errors.extend(links.remove_node_devices().await.iter().map(|error| chain(error))),
        Err(error) => errors.push(chain(&error)),
    }
    errors
}

fn open<P: Plane>(config: &DataplaneConfig) -> Result<P, NodeError> {
    P::open(config.clone()).map_err(|error| NodeError::Dataplane(Box::new(error)))
}

async fn devices(links: &Links, vxlan_port: u16, mtu: u32) -> Result<(u32, HostPair), LinkError> {
    let vxlan = links.ensure_vxlan(vxlan_port).await?;
    let pair = links.ensure_host_pair(mtu).await?;
    links.ensure_rules(vxlan_port).await?;
    Ok((vxlan, pair))
}

fn plane_config(config: &Config, uplinks: Vec<Uplink>, vxlan: u32, pair: HostPair) -> DataplaneConfig {
    DataplaneConfig {
        pin_dir: config.bpffs.clone(),
        xdp: config.xdp,
        flows_max: config.flows_max,
        vxlan_ifindex: vxlan,
        host_ifindex: pair.host,
        host_peer_ifindex: pair.peer,
        host_addr: HOST_ADDR,
        alias_net: Ipv4Net::new_assert(HOST_ADDR, HOST_PREFIX).trunc(),
        uplinks,
    }
}

fn uplinks(facts: &Facts, names: &[String], vtep: Ipv4Addr) -> Result<Vec<Uplink>, NodeError> {
    let found = facts.uplinks(names, vtep);
    if let Some(name) = names.iter().find(|name| !found.iter().any(|link| link.name == **name)) {
        return Err(NodeError::UnknownUplink { name: name.clone() });
    }
    if found.is_empty() {
        return Err(NodeError::NoUplink { addr: vtep });
    }
    let uplink = |link: &crate::links::LinkFact| Uplink {
        ifindex: link.ifindex,
        name: link.name.clone(),
        mtu: link.mtu,
        is_veth: link.is_veth,
    };
    Ok(found.into_iter().map(uplink).collect())
}

fn overlay_mtu(uplinks: &[Uplink]) -> Result<u32, NodeError> {
    let mtu = uplinks.iter().map(|uplink| uplink.mtu).min().unwrap_or(1500);
    match mtu.checked_sub(VXLAN_OVERHEAD) {
        Some(overlay) if overlay >= MTU_MIN => Ok(overlay.min(u32::from(u16::MAX))),
        _ => Err(NodeError::SmallMtu { mtu }),
    }
}
