//! The parts of a node that are not tasks: devices, rules, the dataplane, the name server; made once, and kept right.

use std::error::Error;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use ipnet::Ipv4Net;
use mesh_api::error::chain;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::NodeInputs;
use super::assign::LinkPlan;
use super::plane::Plane;
use crate::config::Config;
use crate::dataplane::{DataplaneConfig, Uplink};
use crate::dns::Dns;
use crate::encryption::{self, Encryption};
use crate::links::{
    Egress, Facts, HOST_ADDR, HOST_PREFIX, HostPair, LinkError, LinkFact, Links, has_ipv6, vxlan_overhead,
};
use crate::runtime::Found;
use crate::session::Membership;

/// Where the host's resolvers are named.
pub(super) const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The least MTU that an overlay can work with: what IPv4 asks of every host (RFC 791).
const MTU_MIN: u32 = 576;

/// How often the netfilter rules are looked at when nothing tells of a change: whoever reloads the host's firewall may flush
/// ours with it.
const RULES_AUDIT: Duration = Duration::from_secs(5);

/// How often the host is looked at while its uplinks are waited for.
const UPLINK_POLL: Duration = Duration::from_millis(500);
/// How often it is said that they are waited for.
const UPLINK_SAY: Duration = Duration::from_secs(10);

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
        addr: IpAddr,
    },
    /// A named uplink does not exist.
    #[error("there is no network interface {name}: see `ip link` for the names --uplink can take")]
    UnknownUplink {
        /// The name.
        name: String,
    },
    /// The underlay's packets are too small.
    #[error("the uplink's MTU of {mtu} bytes leaves too little for the overlay: it takes {overhead} of them")]
    SmallMtu {
        /// The uplink's MTU, bytes.
        mtu: u32,
        /// What VXLAN takes, bytes.
        overhead: u32,
    },
    /// The BPF dataplane.
    #[error("cannot start the dataplane")]
    Dataplane(#[source] Box<dyn Error + Send + Sync>),
    /// The BPF dataplane, on other interfaces.
    #[error("cannot attach the dataplane to changed interfaces")]
    Reattach(#[source] Box<dyn Error + Send + Sync>),
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
    pub(super) encryption: Encryption,
    /// MTU of tasks' links, bytes.
    pub(super) mtu: u32,
    vxlan_port: u16,
    /// What the netfilter rules have tasks send under.
    egress: Egress,
    rules_seen: Instant,
}

impl<P: Plane> Setup<P> {
    /// Makes the devices and rules, opens the dataplane and starts the name server. Uplinks that are not there yet, or
    /// have no address, are waited for: at a boot the agent may be there before them.
    pub(super) async fn bring_up(inputs: &NodeInputs, vxlan_port: u16) -> Result<Self, NodeError> {
        let NodeInputs { config, membership, runtime, tables, patience, .. } = inputs;
        let links = Links::open()?;
        let (facts, uplinks) = wait_for_uplinks(&links, &config.uplinks, membership, *patience).await?;
        let mtu = overlay_mtu(&uplinks, membership.data_path)?;
        // Rules that an earlier run left hold for its tasks, all along.
        let found = runtime.find()?;
        let egress = Egress::new(found.iter().flat_map(Found::senders), &facts);
        let (vxlan, pair) = devices(&links, vxlan_port, mtu, &egress).await?;
        let plane_config = plane_config(config, uplinks, vxlan, pair);
        let plane = open::<P>(&plane_config).await?;
        let address = SocketAddr::from((HOST_ADDR, 53));
        let dns = Dns::start(address, Path::new(RESOLV_CONF), tables.clone()).await;
        let dns = dns.map_err(NodeError::Dns)?;
        info!(uplinks = ?plane.modes(), mtu, "dataplane up");
        if !has_ipv6(mtu) {
            info!(mtu, "tasks have no IPv6: the kernel has none, or their links' MTU is too small for it");
        }
        let encryption = Encryption::open(links.clone(), &config.state_dir, config.key_rotation);
        let rules_seen = Instant::now();
        warn_of_missing(&Egress::default(), &egress);
        Ok(Self { links, facts, plane, plane_config, dns, encryption, mtu, vxlan_port, egress, rules_seen })
    }

    /// Looks at the host again, and repairs what drifted or is no more what the cluster has (`vxlan_port`); true if the
    /// dataplane was attached to other interfaces, or the node's addresses or the uplinks' MTU changed.
    pub(super) async fn audit(
        &mut self,
        config: &Config,
        membership: &Membership,
        vxlan_port: Option<u16>,
    ) -> Result<bool, NodeError> {
        let vxlan_port = vxlan_port.unwrap_or(self.vxlan_port);
        let facts = self.links.facts().await?;
        let moved = facts.node_addresses() != self.facts.node_addresses();
        self.facts = facts;
        let uplinks = match uplinks(&self.facts, &config.uplinks, membership) {
            Ok(uplinks) => {
                still_uplinks(&self.facts, &config.uplinks, membership, uplinks, &self.plane_config)
            }
            // An uplink that lost its address for a while is still the one to wait for.
            Err(error) => {
                warn!(%error, "the node has no uplink at the moment");
                self.plane_config.uplinks.clone()
            }
        };
        let mtu = overlay_mtu(&uplinks, membership.data_path)?;
        let intact =
            vxlan_port == self.vxlan_port && self.links.node_devices_are_intact(&self.facts, mtu).await?;
        let (vxlan_ifindex, pair) = if intact {
            (self.plane_config.vxlan_ifindex, self.pair())
        } else {
            info!("repairing the node's network devices");
            devices(&self.links, vxlan_port, mtu, &self.egress).await?
        };
        self.vxlan_port = vxlan_port;
        if self.rules_seen.elapsed() >= RULES_AUDIT {
            self.audit_rules().await?;
        }
        self.mtu = mtu;
        let wanted = plane_config(config, uplinks, vxlan_ifindex, pair);
        let same = wanted.uplinks == self.plane_config.uplinks
            && wanted.vxlan_ifindex == self.plane_config.vxlan_ifindex
            && self.pair() == pair;
        self.encryption.fit(smallest_mtu(&wanted.uplinks), membership.data_path).await;
        if !same {
            info!(uplinks = ?wanted.uplinks, "attaching the dataplane to changed interfaces");
            let reattached = self.plane.reattach(wanted.clone());
            reattached.map_err(|error| NodeError::Reattach(Box::new(error)))?;
            self.plane_config = wanted;
        }
        Ok(moved || !same)
    }

    /// Looks at the netfilter rules, and installs them again if somebody changed them.
    pub(super) async fn audit_rules(&mut self) -> Result<(), LinkError> {
        self.rules_seen = Instant::now();
        if !self.links.rules_are_there(&self.egress).await? {
            warn!("Shoal's netfilter tables were removed or changed; installing them again");
            self.links.ensure_rules(self.vxlan_port, &self.egress).await?;
        }
        Ok(())
    }

    /// Has tasks send to the outside as `egress` says.
    pub(super) async fn send_under(&mut self, egress: Egress) -> Result<(), LinkError> {
        if egress != self.egress {
            self.links.ensure_rules(self.vxlan_port, &egress).await?;
            warn_of_missing(&self.egress, &egress);
            self.egress = egress;
        }
        Ok(())
    }

    /// How tasks' links are made.
    pub(super) fn link_plan(&self) -> LinkPlan {
        LinkPlan { mtu: self.mtu, ipv6: has_ipv6(self.mtu) }
    }

    /// The smallest MTU of the uplinks, bytes.
    pub(super) fn uplink_mtu(&self) -> u32 {
        smallest_mtu(&self.plane_config.uplinks)
    }

    fn pair(&self) -> HostPair {
        HostPair { host: self.plane_config.host_ifindex, peer: self.plane_config.host_peer_ifindex }
    }

    /// Removes it all; goes on past failures and returns them in words.
    pub(super) async fn tear_down(self) -> Vec<String> {
        let Self { links, plane, dns, encryption, .. } = self;
        let mut errors = Vec::new();
        drop(dns);
        if let Err(failures) = plane.uninstall() {
            errors.extend(failures.iter().map(|error| chain(error)));
        }
        errors.extend(encryption.remove().await.iter().map(|error| chain(error)));
        errors.extend(remove_links(&links).await);
        errors
    }
}

/// Removes the tasks' links and the node's own devices and rules.
async fn remove_links(links: &Links) -> Vec<String> {
    let mut errors = Vec::new();
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

/// Removes what a node that did not come up, or an earlier run of the agent, may have left.
pub(super) async fn clear_away<P: Plane>(bpffs: &Path, state_dir: &Path) -> Vec<String> {
    let mut errors = Vec::new();
    if let Err(failures) = P::clear_away(bpffs) {
        errors.extend(failures.iter().map(|error| chain(error)));
    }
    match Links::open() {
        Ok(links) => {
            let removed = encryption::remove(&links, state_dir).await;
            errors.extend(removed.iter().map(|error| chain(error)));
            errors.extend(remove_links(&links).await);
        }
        Err(error) => errors.push(chain(&error)),
    }
    errors
}

/// On a thread of its own: until the kernel has checked the programs, the session and the API go on.
async fn open<P: Plane>(config: &DataplaneConfig) -> Result<P, NodeError> {
    let config = config.clone();
    match tokio::task::spawn_blocking(move || P::open(config)).await {
        Ok(opened) => opened.map_err(|error| NodeError::Dataplane(Box::new(error))),
        Err(error) => Err(NodeError::Dataplane(Box::new(error))),
    }
}

async fn devices(
    links: &Links,
    vxlan_port: u16,
    mtu: u32,
    egress: &Egress,
) -> Result<(u32, HostPair), LinkError> {
    let vxlan = links.ensure_vxlan(vxlan_port).await?;
    let pair = links.ensure_host_pair(mtu).await?;
    links.ensure_rules(vxlan_port, egress).await?;
    Ok((vxlan, pair))
}

/// Says which addresses that tasks are to send under are not here, or are again.
fn warn_of_missing(before: &Egress, after: &Egress) {
    let (lost, found) = (after.missing(), before.missing());
    for addresses in lost.difference(&found) {
        warn!(
            ?addresses,
            "no interface has an egress address of these: what tasks send under them is dropped"
        );
    }
    for listed in found.difference(&lost) {
        if let Some(addr) = after.in_use(listed) {
            info!(%addr, "an interface has the egress address again");
        }
    }
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

/// Looks for the uplinks until they are there; what is missing at the end is the error.
async fn wait_for_uplinks(
    links: &Links,
    names: &[String],
    membership: &Membership,
    patience: Duration,
) -> Result<(Facts, Vec<Uplink>), NodeError> {
    let started = Instant::now();
    let mut said = None::<Instant>;
    loop {
        let facts = links.facts().await?;
        let found = uplinks(&facts, names, membership);
        let addressed = facts.holds(membership.data_path);
        if (found.is_ok() && addressed) || started.elapsed() >= patience {
            if !addressed && found.is_ok() {
                warn!(addr = %membership.data_path, "no interface holds the VXLAN address; going on without it");
            }
            return found.map(|uplinks| (facts, uplinks));
        }
        if said.is_none_or(|said| said.elapsed() >= UPLINK_SAY) {
            said = Some(Instant::now());
            let left_s = patience.saturating_sub(started.elapsed()).as_secs();
            if let Err(error) = &found {
                info!(%error, left_s, "waiting for the uplink");
            } else {
                info!(addr = %membership.data_path, left_s, "waiting for the uplink's address");
            }
        }
        sleep(UPLINK_POLL).await;
    }
}

fn uplinks(facts: &Facts, names: &[String], membership: &Membership) -> Result<Vec<Uplink>, NodeError> {
    let Membership { advertise, data_path, .. } = *membership;
    let found = facts.uplinks(names, &[advertise, data_path]);
    if let Some(name) = names.iter().find(|name| !found.iter().any(|link| link.name == **name)) {
        return Err(NodeError::UnknownUplink { name: name.clone() });
    }
    if names.is_empty() && !facts.holds(data_path) {
        return Err(NodeError::NoUplink { addr: data_path });
    }
    Ok(found.into_iter().map(uplink).collect())
}

fn uplink(link: &LinkFact) -> Uplink {
    Uplink {
        ifindex: link.ifindex,
        name: link.name.clone(),
        mtu: link.mtu,
        is_veth: link.is_veth,
        is_vlan: link.is_vlan,
    }
}

/// The uplinks `found`, and where none was named and the advertised address is nowhere at the moment, those that were
/// uplinks before: one of them is about to have it again.
fn still_uplinks(
    facts: &Facts,
    names: &[String],
    membership: &Membership,
    mut found: Vec<Uplink>,
    before: &DataplaneConfig,
) -> Vec<Uplink> {
    if names.is_empty() && !facts.holds(membership.advertise) {
        let was = |link: &&LinkFact| before.uplinks.iter().any(|uplink| uplink.ifindex == link.ifindex);
        let is = |ifindex| found.iter().any(|uplink: &Uplink| uplink.ifindex == ifindex);
        let lost: Vec<_> =
            facts.links.iter().filter(was).filter(|link| !is(link.ifindex)).map(uplink).collect();
        found.extend(lost);
        found.sort_by_key(|uplink| uplink.ifindex);
    }
    found
}

fn smallest_mtu(uplinks: &[Uplink]) -> u32 {
    uplinks.iter().map(|uplink| uplink.mtu).min().unwrap_or(1500)
}

fn overlay_mtu(uplinks: &[Uplink], vtep: IpAddr) -> Result<u32, NodeError> {
    let mtu = smallest_mtu(uplinks);
    let overhead = vxlan_overhead(vtep);
    match mtu.checked_sub(overhead) {
        Some(overlay) if overlay >= MTU_MIN => Ok(overlay.min(u32::from(u16::MAX))),
        _ => Err(NodeError::SmallMtu { mtu, overhead }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overlays_mtu_is_what_the_smallest_uplink_leaves() {
        let uplink = |mtu| Uplink { ifindex: 1, name: "e".to_owned(), mtu, is_veth: false, is_vlan: false };
        let (v4, v6) = ("192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap());
        assert_eq!(overlay_mtu(&[uplink(9000), uplink(1500)], v4).unwrap(), 1450);
        assert_eq!(overlay_mtu(&[uplink(1500)], v6).unwrap(), 1430);
        assert_eq!(overlay_mtu(&[uplink(65_536)], v4).unwrap(), 65_486);
        assert!(matches!(
            overlay_mtu(&[uplink(600)], v4),
            Err(NodeError::SmallMtu { mtu: 600, overhead: 50 })
        ));
    }
}
