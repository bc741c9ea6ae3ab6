//! The WireGuard device of a kernel without one: GotaTun, in this process, between a TUN device and a UDP socket. It ends
//! with the process.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::join_all;
use gotatun::device::{Device, DeviceBuilder, Error, Peer as DevicePeer};
use gotatun::udp::socket::UdpSocketFactory;
use gotatun::x25519::PublicKey;
use ipnet::IpNet;
use mesh_api::wireguard::WireguardKey;
use tokio::sync::watch;
use tokio::time::timeout;

use super::keys::Identity;
use super::peers::{Change, Present};
use super::tun::Tun;
use crate::links::WIREGUARD_LINKS;

/// What the UDP socket may hold back, bytes, as far as the kernel lets it.
const SOCKET_BUFFER: usize = 4 << 20;
/// How long peers that are greeted have to answer.
const GREETING: Duration = Duration::from_millis(200);

/// A running device.
pub(super) struct UserSpaceDevice {
    device: Device<(UdpSocketFactory, Tun, Tun)>,
    mtu: watch::Sender<u16>,
}

impl UserSpaceDevice {
    /// Makes the link of an identity's slot, and listens on its port of all addresses.
    pub(super) async fn open(identity: &Identity, mtu: u32) -> io::Result<Self> {
        let (mtu, watched) = watch::channel(short(mtu));
        let tun = Tun::open(WIREGUARD_LINKS[identity.slot()], watched).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => io::Error::new(
                io::ErrorKind::NotFound,
                "the kernel has no WireGuard, and there is no /dev/net/tun to do it without (try `modprobe wireguard`)",
            ),
            _ => error,
        })?;
        let builder = DeviceBuilder::new()
            .with_default_udp()
            .udp_recv_buffer_size(SOCKET_BUFFER)
            .udp_send_buffer_size(SOCKET_BUFFER)
            .with_ip(tun)
            .with_private_key(identity.secret().clone());
        let device = builder.build().await.map_err(into_io)?;
        // Only a change of the port has a device listen that has no peers yet.
        device.set_listen_port(identity.told().port).await.map_err(into_io)?;
        Ok(Self { device, mtu })
    }

    /// Whether it stopped for an error: that of its socket, or that its link is gone.
    pub(super) fn has_failed(&mut self) -> bool {
        self.device.wait().now_or_never().is_some()
    }

    /// Packets are padded up to this and no further, bytes.
    pub(super) fn set_mtu(&self, mtu: u32) {
        self.mtu.send_replace(short(mtu));
    }

    pub(super) async fn peers(&self) -> BTreeMap<WireguardKey, Present> {
        let peers = self.device.peers().await.into_iter().map(|found| {
            let DevicePeer { public_key, endpoint, allowed_ips, .. } = found.peer;
            let nets = allowed_ips.iter().filter_map(|net| IpNet::new(net.ip(), net.prefix()).ok());
            (public_key.to_bytes().into(), Present { endpoint, allowed: nets.collect() })
        });
        peers.collect()
    }

    pub(super) async fn change(&self, changes: &[Change]) -> io::Result<()> {
        let applied = self.device.write(async |device| {
            for change in changes {
                match change {
                    Change::Remove(key) => drop(device.remove_peer(&of(key)).await),
                    Change::Add(key, peer) => {
                        let wanted = DevicePeer::new(of(key))
                            .with_endpoint(peer.endpoint)
                            .with_allowed_ip(IpAddr::from(peer.addr).into());
                        device.add_peer(wanted);
                    }
                    Change::Move(key, endpoint) => {
                        let endpoint = Some(*endpoint);
                        device.modify_peer(&of(key), |peer| peer.set_endpoint(endpoint)).await;
                    }
                    Change::Allow(key, allowed) => {
                        let addr = allowed.addr();
                        let replace = |peer: &mut gotatun::device::configure::PeerMut| {
                            peer.clear_allowed_ips();
                            peer.add_allowed_ip(addr);
                        };
                        device.modify_peer(&of(key), replace).await;
                    }
                }
            }
        });
        applied.await.map_err(into_io)
    }

    pub(super) async fn greet(&self, keys: &[WireguardKey]) {
        let keys: Vec<_> = keys.iter().map(of).collect();
        let greetings = join_all(keys.iter().map(|key| self.device.force_handshake(key)));
        // Who is slower than that still gets it.
        let _ = timeout(GREETING, greetings).await;
    }

    /// How long ago each peer and the device agreed on session keys.
    #[cfg(test)]
    pub(super) async fn since_handshakes(&self) -> Vec<Option<Duration>> {
        self.device.peers().await.iter().map(|found| found.stats.last_handshake).collect()
    }

    /// Ends it.
    pub(super) async fn close(self) {
        self.device.stop().await;
    }
}

fn of(key: &WireguardKey) -> PublicKey {
    PublicKey::from(*key.as_bytes())
}

fn short(mtu: u32) -> u16 {
    u16::try_from(mtu).unwrap_or(u16::MAX)
}

fn into_io(error: Error) -> io::Error {
    match error {
        Error::IoError(error) | Error::Bind(error, _) => error,
        other => io::Error::other(other),
    }
}
