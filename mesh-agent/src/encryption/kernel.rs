//! The kernel's WireGuard device. It is the link; what is done here is its configuration, piece by piece: sessions of peers
//! that stay are never reset.

use std::collections::BTreeMap;
use std::io;

use ipnet::IpNet;
use mesh_api::wireguard::WireguardKey;
use wireguard_control::{
    AllowedIp, Backend, Device, DeviceUpdate, InterfaceName, Key, PeerConfigBuilder, PeerInfo,
};

use super::keys::Identity;
use super::peers::{Change, Present};
use crate::links::WIREGUARD_LINKS;

/// A keepalive interval that is set for a moment: when one is set, the kernel sends a keepalive at once, and for that
/// agrees on session keys.
const KEEPALIVE_S: u16 = 25;

/// A device that is there.
pub(super) struct KernelDevice {
    name: InterfaceName,
}

impl KernelDevice {
    /// This slot's.
    pub(super) fn of(slot: usize) -> io::Result<Self> {
        Ok(Self { name: WIREGUARD_LINKS[slot].parse()? })
    }

    /// Whether it has this identity.
    pub(super) async fn serves(&self, identity: &Identity) -> io::Result<bool> {
        let device = self.get().await?;
        let told = identity.told();
        let key = Key(*told.public_key.as_bytes());
        Ok(device.public_key == Some(key) && device.listen_port == Some(told.port))
    }

    /// Gives it this identity.
    pub(super) async fn configure(&self, identity: &Identity) -> io::Result<()> {
        let update = DeviceUpdate::new()
            .set_private_key(Key(identity.secret().to_bytes()))
            .set_listen_port(identity.told().port);
        self.apply(update).await
    }

    pub(super) async fn peers(&self) -> io::Result<BTreeMap<WireguardKey, Present>> {
        Ok(self.get().await?.peers.into_iter().map(present).collect())
    }

    pub(super) async fn change(&self, changes: &[Change]) -> io::Result<()> {
        let peers: Vec<_> = changes.iter().map(builder).collect();
        self.apply(DeviceUpdate::new().add_peers(&peers)).await
    }

    pub(super) async fn greet(&self, keys: &[WireguardKey]) -> io::Result<()> {
        for interval in [KEEPALIVE_S, 0] {
            let of = |key| PeerConfigBuilder::new(&of(key)).set_persistent_keepalive_interval(interval);
            let peers: Vec<_> = keys.iter().map(of).collect();
            self.apply(DeviceUpdate::new().add_peers(&peers)).await?;
        }
        Ok(())
    }

    async fn get(&self) -> io::Result<Device> {
        let name = self.name;
        blocking(move || Device::get(&name, Backend::Kernel)).await
    }

    async fn apply(&self, update: DeviceUpdate) -> io::Result<()> {
        let name = self.name;
        blocking(move || update.apply(&name, Backend::Kernel)).await
    }
}

/// Runs `work`, which opens netlink sockets, on a thread that may wait; it is in the namespace of those it comes from.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(error.into()))
}

fn of(key: &WireguardKey) -> Key {
    Key(*key.as_bytes())
}

fn present(info: PeerInfo) -> (WireguardKey, Present) {
    let PeerInfo { config, stats: _ } = info;
    let allowed = config.allowed_ips.iter();
    let allowed =
        allowed.filter_map(|AllowedIp { address, cidr }| IpNet::new(*address, *cidr).ok()).collect();
    (config.public_key.0.into(), Present { endpoint: config.endpoint, allowed })
}

fn builder(change: &Change) -> PeerConfigBuilder {
    let allow = |builder: PeerConfigBuilder, allowed: IpNet| {
        builder.replace_allowed_ips().add_allowed_ip(allowed.addr(), allowed.prefix_len())
    };
    match change {
        Change::Remove(key) => PeerConfigBuilder::new(&of(key)).remove(),
        Change::Add(key, peer) => {
            allow(PeerConfigBuilder::new(&of(key)).set_endpoint(peer.endpoint), peer.allowed())
        }
        Change::Move(key, endpoint) => PeerConfigBuilder::new(&of(key)).set_endpoint(*endpoint),
        Change::Allow(key, allowed) => allow(PeerConfigBuilder::new(&of(key)), *allowed),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use wireguard_control::PeerStats;

    use super::super::peers::{Peer, Peers, difference};
    use super::*;

    #[test]
    fn a_peer_that_was_added_reads_back_as_wanted() {
        for endpoint in ["192.0.2.7:51820", "[2001:db8::7]:51821"] {
            let endpoint: SocketAddr = endpoint.parse().unwrap();
            let addr = "fd73:686f:616c:2:707:707:707:707".parse().unwrap();
            let (key, peer) = (WireguardKey::from([7; 32]), Peer { endpoint, addr, in_use: true });
            let config = builder(&Change::Add(key, peer)).into_peer_config();
            let there = BTreeMap::from([present(PeerInfo { config, stats: PeerStats::default() })]);
            let wanted = Peers::from([(key, peer)]);
            assert_eq!(difference(&wanted, &there), []);
        }
    }

    #[test]
    fn a_change_says_no_more_than_what_changes() {
        let key = WireguardKey::from([7; 32]);
        let endpoint = SocketAddr::from(([192, 0, 2, 7], 51820));
        let moved = builder(&Change::Move(key, endpoint));
        assert_eq!(moved, PeerConfigBuilder::new(&of(&key)).set_endpoint(endpoint));
        let allowed = "fd73:686f:616c:2::1/128".parse().unwrap();
        let config = builder(&Change::Allow(key, allowed)).into_peer_config();
        assert_eq!((config.endpoint, config.allowed_ips.len()), (None, 1));
        assert_eq!(builder(&Change::Remove(key)), PeerConfigBuilder::new(&of(&key)).remove());
    }
}
