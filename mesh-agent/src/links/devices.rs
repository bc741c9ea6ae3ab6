//! The node's own devices: the VXLAN device, and the pair by which the host itself is on the overlay.

use std::net::{IpAddr, Ipv6Addr};

use netlink_packet_route::link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{LinkUnspec, LinkVeth, LinkVxlan};
use tracing::info;

use super::{
    Egress, Facts, HOST_ADDR, HOST_ADDR6, HOST_LINK, HOST_LINK_LOCAL, HOST_PEER_LINK, HOST_PREFIX,
    HOST_PREFIX6, LinkError, Links, VXLAN_LINK, has_ipv6, is_up, mac, mtu_of, nft, sysctl,
};

/// The VXLAN device's MTU: what it sends is bounded by the underlay, and by the tasks' own MTU before that.
pub const VXLAN_MTU: u32 = 65_000;

/// The host's IPv6 addresses on [`HOST_LINK`].
const HOST_ADDRS6: [Ipv6Addr; 2] = [HOST_ADDR6, HOST_LINK_LOCAL];

/// Indices of the host's own pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPair {
    /// [`HOST_LINK`].
    pub host: u32,
    /// [`HOST_PEER_LINK`].
    pub peer: u32,
}

impl Links {
    /// Makes the VXLAN device if it is not there as it has to be, and returns its index.
    ///
    /// One device serves every network: VNI and remote come with each packet (`external` in iproute2's words), and it
    /// learns nothing. Where the kernel has IPv6 it serves underlays of both families.
    pub async fn ensure_vxlan(&self, port: u16) -> Result<u32, LinkError> {
        if let Some(link) = self.get(VXLAN_LINK).await?
            && !is_vxlan_on(&link, port)
        {
            info!(link = VXLAN_LINK, port, "replacing a device of another kind or port");
            self.remove(link.header.index).await?;
        }
        if self.index(VXLAN_LINK).await?.is_none() {
            let message = LinkVxlan::new(VXLAN_LINK, 0).port(port).learning(false).collect_metadata(true);
            // What the programs encapsulate themselves has no UDP checksum, as RFC 6935 lets tunnels do in IPv6 too.
            let message = message.udp_zero_csum6_rx(true).udp_zero_csum6_tx(true);
            let added = self.handle.link().add(message.build()).execute().await;
            added.map_err(LinkError::netlink("add", VXLAN_LINK))?;
        }
        let index = self.require(VXLAN_LINK).await?;
        sysctl::disable_ipv6(VXLAN_LINK)?;
        self.set("start", VXLAN_LINK, LinkUnspec::new_with_index(index).mtu(VXLAN_MTU).up()).await?;
        Ok(index)
    }

    /// Makes the host's own pair if it is not there, gives it its addresses and `mtu`, has the host forward, and returns
    /// the pair's indices.
    pub async fn ensure_host_pair(&self, mtu: u32) -> Result<HostPair, LinkError> {
        if self.index(HOST_LINK).await?.is_none() || self.index(HOST_PEER_LINK).await?.is_none() {
            self.remove_named(HOST_LINK).await?;
            self.remove_named(HOST_PEER_LINK).await?;
            let message = LinkVeth::new(HOST_LINK, HOST_PEER_LINK).mtu(mtu);
            let added = self.handle.link().add(message.build()).execute().await;
            added.map_err(LinkError::netlink("add", HOST_LINK))?;
        }
        let pair =
            HostPair { host: self.require(HOST_LINK).await?, peer: self.require(HOST_PEER_LINK).await? };
        let ipv6 = has_ipv6(mtu);
        for (name, index) in [(HOST_LINK, pair.host), (HOST_PEER_LINK, pair.peer)] {
            let mut message = LinkUnspec::new_with_index(index).mtu(mtu);
            if index == pair.host {
                // What the dataplane addresses frames for the host's stack to: it knows the address, not the device.
                message = message.address(mac(HOST_ADDR).to_vec());
            }
            // The MTU first: there are no IPv6 settings to write where it is too small.
            self.set("configure", name, message).await?;
            if ipv6 && index == pair.host {
                sysctl::enable_ipv6(name)?;
            } else {
                sysctl::disable_ipv6(name)?;
            }
            self.set("start", name, LinkUnspec::new_with_index(index).up()).await?;
        }
        // Packets of tasks enter the host's stack here under their aliases, whatever the host's other routes say.
        sysctl::set(&["net", "ipv4", "conf", HOST_LINK, "rp_filter"], "0")?;
        sysctl::set(&["net", "ipv4", "ip_forward"], "1")?;
        self.add_address(pair.host, HOST_ADDR.into(), HOST_PREFIX).await?;
        if ipv6 {
            sysctl::forward_ipv6()?;
            for addr in HOST_ADDRS6 {
                self.add_address(pair.host, addr.into(), HOST_PREFIX6).await?;
            }
        }
        Ok(pair)
    }

    /// Installs Shoal's netfilter tables: the tasks' way out, masqueraded or under the addresses of `egress`, and no connection
    /// tracking for VXLAN.
    pub async fn ensure_rules(&self, vxlan_port: u16, egress: &Egress) -> Result<(), LinkError> {
        nft::install(vxlan_port, egress).await
    }

    /// Whether Shoal's netfilter tables are there, and have tasks send as `egress` says.
    pub async fn rules_are_there(&self, egress: &Egress) -> Result<bool, LinkError> {
        nft::is_installed(egress).await
    }

    /// The names of Shoal's netfilter tables that are there.
    pub async fn rules(&self) -> Result<Vec<String>, LinkError> {
        nft::installed().await
    }

    /// Removes the node's own devices and the netfilter tables; goes on past failures and returns them all.
    pub async fn remove_node_devices(&self) -> Vec<LinkError> {
        let mut errors = Vec::new();
        for name in [HOST_LINK, HOST_PEER_LINK, VXLAN_LINK] {
            errors.extend(self.remove_named(name).await.err());
        }
        errors.extend(nft::remove().await.err());
        errors
    }

    /// Whether the node's own devices are there, up to their MTU, with the addresses that `facts` know of, and the host
    /// forwards: what an audit looks at.
    pub async fn node_devices_are_intact(&self, facts: &Facts, mtu: u32) -> Result<bool, LinkError> {
        let ipv6 = has_ipv6(mtu);
        let forwards = sysctl::is(&["net", "ipv4", "ip_forward"], "1")
            && (!ipv6 || sysctl::is(&["net", "ipv6", "conf", "all", "forwarding"], "1"));
        let host = facts.links.iter().find(|link| link.name == HOST_LINK);
        let has = |addr: IpAddr| host.is_some_and(|link| link.addresses.contains(&addr));
        if !forwards
            || !has(HOST_ADDR.into())
            || (ipv6 && !HOST_ADDRS6.into_iter().all(|addr| has(addr.into())))
        {
            return Ok(false);
        }
        for (name, mtu) in [(HOST_LINK, mtu), (HOST_PEER_LINK, mtu), (VXLAN_LINK, VXLAN_MTU)] {
            match self.get(name).await? {
                Some(link) if mtu_of(&link) == Some(mtu) && is_up(&link) && has_its_mac(&link, name) => {}
                _ => return Ok(false),
            }
        }
        Ok(true)
    }
}

fn has_its_mac(link: &LinkMessage, name: &str) -> bool {
    let wanted = mac(HOST_ADDR);
    name != HOST_LINK
        || link.attributes.iter().any(|item| matches!(item, LinkAttribute::Address(have) if *have == wanted))
}

fn is_vxlan_on(link: &LinkMessage, port: u16) -> bool {
    let infos = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let Some(infos) = infos else { return false };
    let is_vxlan = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Vxlan)));
    let data = infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
        _ => None,
    });
    let Some(data) = data else { return false };
    is_vxlan
        && data.iter().any(|item| matches!(item, InfoVxlan::Port(on) if *on == port))
        && data.iter().any(|item| matches!(item, InfoVxlan::CollectMetadata(true)))
        && data.iter().any(|item| matches!(item, InfoVxlan::UDPZeroCsumRX(true)))
}
