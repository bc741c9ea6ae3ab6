//! WireGuard between nodes, below the VXLAN of encrypted networks: the node's keys, its devices, and their peers.
//!
//! Every node has one identity, or two while it changes keys, and for each a link of its own with all identities of all
//! other nodes as peers: whatever key of whatever node is used, it is known. What is sent there, and what must not be, is
//! the dataplane's.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_api::error::chain;
use mesh_api::health::{WireguardHealth, WireguardKind};
use mesh_api::id::NodeId;
use mesh_api::table::Table;
use mesh_api::wireguard::{WireguardIdentity, WireguardKey};
use serde::Serialize;
use tokio::time::Instant;
use tracing::{info, warn};

mod device;
mod kernel;
mod keys;
mod peers;
mod rotation;
mod tun;
mod userspace;

use device::{Device, Opened};
use kernel::KernelDevice;
use keys::{Identity, Keyring};
use peers::{Peers, difference, peers};
use rotation::{Phase, Rotation, Seen, Step};
use userspace::UserSpaceDevice;

use crate::dataplane::inspect::drops::as_ms;
use crate::health::ns_since_epoch;
use crate::links::{IPV6_MTU_MIN, LinkError, Links, WIREGUARD_LINKS, WireguardWay, sysctl, vxlan_overhead};

/// How long a key is used unless the configuration says otherwise.
pub const KEY_ROTATION: Duration = Duration::from_hours(12);

/// How long a device that can't be made is left at that: each attempt is a change of the host's links, which has the host
/// looked at again.
const RETRY: Duration = Duration::from_secs(5);

/// The largest MTU of a device, bytes: what an IPv4 packet has room for.
const MTU_MAX: u32 = 65_475;

/// Where WireGuard runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EncryptionKind {
    /// In the kernel.
    Kernel,
    /// In this process, since the kernel has none.
    UserSpace,
}

impl EncryptionKind {
    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::UserSpace => "user-space",
        }
    }
}

/// One of a node's keys for encrypted networks, and the link that it is used by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeyStatus {
    /// The public key.
    pub public_key: WireguardKey,
    /// When it was made, ms since the epoch in JSON.
    #[serde(serialize_with = "as_ms")]
    pub made: SystemTime,
    /// The link.
    pub link: &'static str,
    /// Where WireGuard runs for it; `None` where there is no such link.
    pub kind: Option<EncryptionKind>,
    /// The UDP port that is listened to.
    pub port: u16,
}

/// The keys that the state folder has, the one that is sent by first, and the links of this host. Asks the kernel of the
/// calling thread's network namespace, whether an agent runs or not; to be called inside a tokio runtime.
pub async fn encryption_status(state_dir: &Path) -> Result<Vec<KeyStatus>, EncryptionError> {
    let keyring = Keyring::load(state_dir);
    let keyring = keyring.map_err(|source| EncryptionError::Keys { dir: state_dir.to_owned(), source })?;
    let links = Links::open()?;
    let mut keys = Vec::new();
    for identity in keyring.identities() {
        let WireguardIdentity { public_key, port } = identity.told();
        let (slot, made) = (identity.slot(), identity.made());
        let kind = |is_kernel_s| if is_kernel_s { EncryptionKind::Kernel } else { EncryptionKind::UserSpace };
        let kind = links.wireguard(slot).await?.map(|(_, is_kernel_s)| kind(is_kernel_s));
        keys.push(KeyStatus { public_key, made, link: WIREGUARD_LINKS[slot], kind, port });
    }
    Ok(keys)
}

/// What WireGuard adds to a packet on an underlay of `vtep`'s family: outer IP and UDP headers and its own, bytes.
const fn wireguard_overhead(vtep: IpAddr) -> u32 {
    match vtep {
        IpAddr::V4(_) => 60,
        IpAddr::V6(_) => 80,
    }
}

/// How much less than in other networks a task's link carries in an encrypted one, on an underlay of `vtep`'s family,
/// bytes: what WireGuard adds, and that VXLAN goes over IPv6 within.
const fn overhead_on(vtep: IpAddr) -> u32 {
    wireguard_overhead(vtep) + vxlan_overhead(IpAddr::V6(Ipv6Addr::UNSPECIFIED)) - vxlan_overhead(vtep)
}

/// The same, which does not depend on the underlay: an IPv6 header, UDP's, and WireGuard's own.
pub(crate) const ENCRYPTION_OVERHEAD: u32 = overhead_on(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
const _: () = assert!(ENCRYPTION_OVERHEAD == overhead_on(IpAddr::V6(Ipv6Addr::UNSPECIFIED)));

/// Why a node has no encrypted way, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum EncryptionError {
    /// The kernel has no IPv6.
    #[error("the kernel has no IPv6, which encrypted networks are carried in")]
    NoIpv6,
    /// The file of the keys can't be read or written.
    #[error("cannot keep the WireGuard keys in the state folder {}", dir.display())]
    Keys {
        /// The state folder.
        dir: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A link can't be looked at or changed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A device is not as it should be.
    #[error("cannot {operation} the WireGuard device {link}, which listens on UDP port {port}")]
    Device {
        /// What failed.
        operation: &'static str,
        /// Its link.
        link: &'static str,
        /// Its UDP port.
        port: u16,
        /// The cause.
        source: io::Error,
    },
    /// Another rule of routing comes first.
    #[error("what is to be encrypted does not go by {0}: see `ip -6 rule` for a rule before Shoal's")]
    Astray(&'static str),
}

impl EncryptionError {
    fn device(operation: &'static str, identity: &Identity, source: io::Error) -> Self {
        let (link, port) = (WIREGUARD_LINKS[identity.slot()], identity.told().port);
        Self::Device { operation, link, port, source }
    }
}

/// What the host is to be brought to, and when.
#[derive(Debug, Clone)]
pub(crate) struct Situation {
    /// Of the devices, bytes.
    mtu: u32,
    peers: Arc<Peers>,
    key_epoch: u64,
    /// The node's identities, as the table has them.
    shown: Vec<WireguardIdentity>,
    index: u64,
    settled: u64,
    now: Instant,
    today: SystemTime,
}

impl Situation {
    /// By the table and what has settled of it, on uplinks of this MTU, bytes, where the node does VXLAN from `data_path`.
    pub(crate) fn new(table: &Table, own: &NodeId, settled: u64, uplink_mtu: u32, data_path: IpAddr) -> Self {
        Self {
            mtu: device_mtu(uplink_mtu, data_path),
            peers: Arc::new(peers(table, own)),
            key_epoch: table.cluster.key_epoch,
            shown: table.nodes.get(own).map(|node| node.wireguard.clone()).unwrap_or_default(),
            index: table.index,
            settled,
            now: Instant::now(),
            today: SystemTime::now(),
        }
    }
}

/// The MTU of a device on uplinks of this MTU, bytes, where the node does VXLAN from `data_path`.
fn device_mtu(uplink_mtu: u32, data_path: IpAddr) -> u32 {
    uplink_mtu.saturating_sub(wireguard_overhead(data_path)).clamp(IPV6_MTU_MIN, MTU_MAX)
}

/// How closely the host is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// At what the situation changes.
    Changes,
    /// At everything: somebody may have changed the host.
    All,
}

/// A device that is up.
struct Standing {
    device: Device,
    way: WireguardWay,
    /// Its peers, as they were set last.
    peers: Arc<Peers>,
}

/// The node's part in WireGuard.
pub(crate) struct Encryption {
    links: Links,
    state_dir: PathBuf,
    interval: Duration,
    keyring: Keyring,
    /// By slot.
    standing: BTreeMap<usize, Standing>,
    rotation: Rotation,
    /// The slots whose devices can't be made: when that is tried again, and what went wrong.
    held_back: BTreeMap<usize, (Instant, String)>,
    /// Whether what an earlier run left of identities that are no more is gone.
    swept: bool,
    /// What went wrong, as it was told last.
    trouble: Option<String>,
}

impl std::fmt::Debug for Encryption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encryption").field("keyring", &self.keyring).finish_non_exhaustive()
    }
}

/// The identities that an earlier run had: what a node that comes back describes itself with from the start, so that the
/// others go on with it. None where they can't be read.
pub(crate) fn remembered(state_dir: &Path) -> Vec<WireguardIdentity> {
    load(state_dir).told()
}

fn load(state_dir: &Path) -> Keyring {
    Keyring::load(state_dir).unwrap_or_else(|error| {
        warn!(%error, "the WireGuard keys can't be read: the node makes others");
        Keyring::default()
    })
}

/// Removes the devices with their rules and routes, and forgets the keys, also where none was up; goes on past failures
/// and returns them all.
pub(crate) async fn remove(links: &Links, state_dir: &Path) -> Vec<EncryptionError> {
    let mut errors = Vec::new();
    for slot in 0..WIREGUARD_LINKS.len() {
        errors.extend(links.remove_wireguard(slot).await.into_iter().map(EncryptionError::from));
    }
    let forgotten = Keyring::forget(state_dir);
    errors.extend(forgotten.err().map(|source| EncryptionError::Keys { dir: state_dir.to_owned(), source }));
    errors
}

impl Encryption {
    /// With the keys of the state folder; nothing is made yet. A key is used for `interval`.
    pub(crate) fn open(links: Links, state_dir: &Path, interval: Duration) -> Self {
        Self {
            links,
            state_dir: state_dir.to_owned(),
            interval,
            keyring: load(state_dir),
            standing: BTreeMap::new(),
            rotation: Rotation::default(),
            held_back: BTreeMap::new(),
            swept: false,
            trouble: None,
        }
    }

    /// Brings devices, peers and keys to what the situation asks for. What goes wrong is told once, and tried again the
    /// next time; what is up stays up meanwhile.
    pub(crate) async fn follow(&mut self, situation: &Situation, look: Look) {
        let errors = self.try_follow(situation, look).await;
        let held_back = self.held_back.values().map(|(_, text)| text.clone());
        let texts: Vec<_> = errors.iter().map(|error| chain(error)).chain(held_back).collect();
        let trouble = (!texts.is_empty()).then(|| texts.join("; "));
        if trouble != self.trouble {
            if let Some(error) = &trouble {
                warn!(error, "encrypted networks can't be kept up on this node");
            } else {
                info!("nothing is in the way of encrypted networks any more");
            }
            self.trouble = trouble;
        }
    }

    /// Whether a change of keys goes on once the other nodes know what this one told: what has settled says so.
    pub(crate) fn waits_for_others(&self) -> bool {
        self.keyring.phase() != Phase::Steady
    }

    /// What others are to reach this node by: the identities whose devices are up.
    pub(crate) fn identities(&self) -> Vec<WireguardIdentity> {
        let identities = self.keyring.identities().iter();
        let up = identities.filter(|identity| self.standing.contains_key(&identity.slot()));
        up.map(Identity::told).collect()
    }

    /// What this node encrypts with; `None` while it has no encrypted way.
    pub(crate) fn health(&self) -> Option<WireguardHealth> {
        let mut identities = self.keyring.identities().iter();
        identities.find_map(|identity| {
            let kind = match self.standing.get(&identity.slot())?.device.kind() {
                EncryptionKind::Kernel => WireguardKind::Kernel,
                EncryptionKind::UserSpace => WireguardKind::UserSpace,
            };
            Some(WireguardHealth { kind, key_made_ns: ns_since_epoch(identity.made()) })
        })
    }

    /// The address that this node sends from; `None` while it has no encrypted way.
    pub(crate) fn own_wireguard_addr(&self) -> Option<Ipv6Addr> {
        self.identities().first().map(WireguardIdentity::address)
    }

    /// Ends and removes everything, the keys as well; goes on past failures and returns them all.
    pub(crate) async fn remove(self) -> Vec<EncryptionError> {
        for standing in self.standing.into_values() {
            standing.device.close().await;
        }
        remove(&self.links, &self.state_dir).await
    }

    /// Has the devices fit uplinks of this MTU, bytes, where the node does VXLAN from `data_path`. What fails is tried again,
    /// and told, when they [follow](Self::follow).
    pub(crate) async fn fit(&mut self, uplink_mtu: u32, data_path: IpAddr) {
        let mtu = device_mtu(uplink_mtu, data_path);
        for standing in self.standing.values_mut().filter(|standing| standing.way.mtu != mtu) {
            let way = WireguardWay { mtu, ..standing.way };
            if self.links.lead(way).await.is_ok() {
                standing.device.set_mtu(mtu);
                standing.way = way;
            }
        }
    }

    async fn try_follow(&mut self, situation: &Situation, look: Look) -> Vec<EncryptionError> {
        if !sysctl::has_ipv6() {
            return vec![EncryptionError::NoIpv6];
        }
        let mut errors = Vec::new();
        if self.keyring.identities().is_empty()
            && let Err(error) = self.keep(self.keyring.introduce(situation.key_epoch, situation.today))
        {
            return vec![error];
        }
        let identities = self.keyring.identities().to_vec();
        if !self.swept {
            let is_ours = |slot| identities.iter().any(|identity| identity.slot() == slot);
            for slot in (0..WIREGUARD_LINKS.len()).filter(|slot| !is_ours(*slot)) {
                errors.extend(self.links.remove_wireguard(slot).await.into_iter().map(EncryptionError::from));
            }
            self.swept = errors.is_empty();
        }
        for (place, identity) in identities.iter().enumerate() {
            let (device, met) = (self.link_of(identity), self.peers_of(identity));
            let upheld = match self.uphold(identity, situation, look).await {
                // The others send to the first; it is the one that the node sends from. Another device has met nobody yet.
                Ok(()) if place == 0 => {
                    let before = if self.link_of(identity) == device { met } else { Arc::default() };
                    self.greet(identity, &before).await
                }
                other => other,
            };
            errors.extend(upheld.err());
        }
        if self.standing.len() == identities.len() {
            errors.extend(self.rotate(&identities, situation).await.err());
        }
        errors
    }

    /// The index of an identity's link.
    fn link_of(&self, identity: &Identity) -> Option<u32> {
        self.standing.get(&identity.slot()).map(|standing| standing.way.index)
    }

    fn peers_of(&self, identity: &Identity) -> Arc<Peers> {
        self.standing.get(&identity.slot()).map(|standing| standing.peers.clone()).unwrap_or_default()
    }

    /// Has an identity's device up with the right peers, unless it can't be made at the moment.
    async fn uphold(
        &mut self,
        identity: &Identity,
        situation: &Situation,
        look: Look,
    ) -> Result<(), EncryptionError> {
        let slot = identity.slot();
        if look == Look::All
            && let Some(standing) = self.standing.get_mut(&slot)
        {
            let index = self.links.wireguard(slot).await?.map(|(index, _)| index);
            if index != Some(standing.way.index) || standing.device.has_failed() {
                warn!(link = WIREGUARD_LINKS[slot], "the WireGuard device is gone; making another one");
                self.fall(slot).await;
            }
        }
        if !self.standing.contains_key(&slot) {
            self.try_raise(identity, situation).await;
        }
        let Some(standing) = self.standing.get_mut(&slot) else { return Ok(()) };
        let way = WireguardWay { mtu: situation.mtu, ..standing.way };
        let mut is_led = true;
        if way != standing.way || (look == Look::All && !self.links.is_led(way).await?) {
            self.links.lead(way).await?;
            standing.device.set_mtu(way.mtu);
            standing.way = way;
            is_led = self.links.is_led(way).await?;
        }
        if standing.peers != situation.peers || look == Look::All {
            let failed = |operation| move |source| EncryptionError::device(operation, identity, source);
            let present = standing.device.peers().await.map_err(failed("list the peers of"))?;
            let changes = difference(&situation.peers, &present);
            if !changes.is_empty() {
                standing.device.change(&changes).await.map_err(failed("change the peers of"))?;
            }
            standing.peers = Arc::clone(&situation.peers);
        }
        if is_led { Ok(()) } else { Err(EncryptionError::Astray(WIREGUARD_LINKS[slot])) }
    }

    /// Makes an identity's device, unless that failed a moment ago.
    async fn try_raise(&mut self, identity: &Identity, situation: &Situation) {
        let slot = identity.slot();
        if self.held_back.get(&slot).is_some_and(|(until, _)| situation.now < *until) {
            return;
        }
        match self.raise(identity, situation.mtu).await {
            Ok(()) => drop(self.held_back.remove(&slot)),
            Err(error) => drop(self.held_back.insert(slot, (situation.now + RETRY, chain(&error)))),
        }
    }

    /// Makes an identity's device, or takes it over, and starts it.
    async fn raise(&mut self, identity: &Identity, mtu: u32) -> Result<(), EncryptionError> {
        let slot = identity.slot();
        let Opened { device, index, fresh } = Device::open(&self.links, identity, mtu).await?;
        let way = WireguardWay { slot, index, addr: identity.told().address(), mtu };
        let led = if fresh || !self.links.is_led(way).await? { self.links.lead(way).await } else { Ok(()) };
        if let Err(error) = led {
            device.close().await;
            // What can't be removed either is told by the next attempt.
            self.links.remove_wireguard(slot).await;
            return Err(error.into());
        }
        let (link, port) = (WIREGUARD_LINKS[slot], identity.told().port);
        info!(link, port, mtu, kind = device.kind().name(), fresh, "WireGuard device up");
        self.standing.insert(slot, Standing { device, way, peers: Arc::default() });
        Ok(())
    }

    /// Ends a device. Its link goes by itself, or is taken away by whoever makes another one.
    async fn fall(&mut self, slot: usize) {
        if let Some(standing) = self.standing.remove(&slot) {
            standing.device.close().await;
        }
    }

    /// Agrees on session keys with what the live nodes are to be sent to, but for what they were to be sent to `before`.
    /// Whoever learns of the other last is the one whose greeting is answered.
    async fn greet(&self, identity: &Identity, before: &Peers) -> Result<(), EncryptionError> {
        let Some(standing) = self.standing.get(&identity.slot()) else { return Ok(()) };
        let in_use = standing.peers.iter().filter(|(_, peer)| peer.in_use);
        let unmet = in_use.filter(|(key, _)| !before.get(key).is_some_and(|peer| peer.in_use));
        let keys: Vec<_> = unmet.map(|(key, _)| *key).collect();
        if keys.is_empty() {
            return Ok(());
        }
        let greeted = standing.device.greet(&keys).await;
        greeted.map_err(|source| EncryptionError::device("greet the peers of", identity, source))
    }

    /// Takes the next step of a change of keys, if there is one to be taken.
    async fn rotate(&mut self, held: &[Identity], situation: &Situation) -> Result<(), EncryptionError> {
        let Some(current) = held.first() else { return Ok(()) };
        let seen = Seen {
            phase: self.keyring.phase(),
            due: current.is_due(situation.key_epoch, situation.today, self.interval),
            shown: (situation.shown == self.keyring.told()).then_some(situation.index),
            settled: situation.settled,
            now: situation.now,
        };
        match self.rotation.step(&seen) {
            None => {}
            Some(Step::Introduce) => {
                let next = self.keyring.introduce(situation.key_epoch, situation.today);
                let Some(added) = next.identities().last() else { return Ok(()) };
                // The keys are kept once they have a device, and told once they are kept.
                let upheld = self.uphold(added, situation, Look::Changes).await;
                if !self.standing.contains_key(&added.slot()) {
                    return upheld;
                }
                if let Err(error) = upheld.and_then(|()| self.keep(next.clone())) {
                    self.lower(added.slot()).await;
                    return Err(error);
                }
                info!(key = %added.told().public_key, "changing the WireGuard keys: the next is told");
            }
            Some(Step::Switch) => {
                if let Some(next) = held.last() {
                    self.greet(next, &Peers::new()).await?;
                }
                self.keep(self.keyring.switch())?;
                info!("changing the WireGuard keys: the next is used");
            }
            Some(Step::Retire) => {
                self.keep(self.keyring.retire())?;
                if let Some(former) = held.last() {
                    let errors = self.lower(former.slot()).await;
                    if let Some(error) = errors.into_iter().next() {
                        return Err(error);
                    }
                }
                info!("the WireGuard keys are changed");
            }
        }
        Ok(())
    }

    /// Ends a device that is not to come back, and removes what led there.
    async fn lower(&mut self, slot: usize) -> Vec<EncryptionError> {
        self.fall(slot).await;
        let errors = self.links.remove_wireguard(slot).await;
        // What is left is swept away later.
        self.swept &= errors.is_empty();
        errors.into_iter().map(EncryptionError::from).collect()
    }

    fn keep(&mut self, keyring: Keyring) -> Result<(), EncryptionError> {
        let saved = keyring.save(&self.state_dir);
        saved.map_err(|source| EncryptionError::Keys { dir: self.state_dir.clone(), source })?;
        self.keyring = keyring;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
