//! A WireGuard device of either kind: the kernel's, or this process's where the kernel has none. The two behave alike, but
//! that the kernel's goes on without the agent, and a restarted agent takes it over with its sessions.

use std::collections::BTreeMap;
use std::io;

use mesh_api::wireguard::WireguardKey;

use super::keys::Identity;
use super::peers::{Change, Present};
use super::{EncryptionError, EncryptionKind, KernelDevice, UserSpaceDevice};
use crate::links::{LinkError, Links, WIREGUARD_LINKS};

/// An open device.
pub(super) enum Device {
    Kernel(KernelDevice),
    UserSpace(UserSpaceDevice),
}

/// A device, where it is, and whether it is without sessions.
pub(super) struct Opened {
    pub(super) device: Device,
    pub(super) index: u32,
    pub(super) fresh: bool,
}

impl Device {
    /// Takes over the kernel's device of an identity, or makes one, in place of anything else under its name.
    pub(super) async fn open(
        links: &Links,
        identity: &Identity,
        mtu: u32,
    ) -> Result<Opened, EncryptionError> {
        let slot = identity.slot();
        let failed = |operation| move |source| EncryptionError::device(operation, identity, source);
        if let Some((index, is_kernel_s)) = links.wireguard(slot).await? {
            if is_kernel_s {
                let device = KernelDevice::of(slot).map_err(failed("look at"))?;
                if device.serves(identity).await.map_err(failed("look at"))? {
                    return Ok(Opened { device: Self::Kernel(device), index, fresh: false });
                }
            }
            links.remove(index).await?;
        }
        let device = if links.add_wireguard(slot).await? {
            let device = KernelDevice::of(slot).map_err(failed("configure"))?;
            device.configure(identity).await.map_err(failed("configure"))?;
            Self::Kernel(device)
        } else {
            Self::UserSpace(UserSpaceDevice::open(identity, mtu).await.map_err(failed("make"))?)
        };
        let missing = || LinkError::Missing(WIREGUARD_LINKS[slot].to_owned());
        let (index, _) = links.wireguard(slot).await?.ok_or_else(missing)?;
        Ok(Opened { device, index, fresh: true })
    }

    pub(super) fn kind(&self) -> EncryptionKind {
        match self {
            Self::Kernel(_) => EncryptionKind::Kernel,
            Self::UserSpace(_) => EncryptionKind::UserSpace,
        }
    }

    /// Whether the device has given up, though its link may be there.
    pub(super) fn has_failed(&mut self) -> bool {
        match self {
            Self::Kernel(_) => false,
            Self::UserSpace(device) => device.has_failed(),
        }
    }

    /// Has the device know its link's MTU, bytes.
    pub(super) fn set_mtu(&self, mtu: u32) {
        match self {
            Self::Kernel(_) => {}
            Self::UserSpace(device) => device.set_mtu(mtu),
        }
    }

    pub(super) async fn peers(&self) -> io::Result<BTreeMap<WireguardKey, Present>> {
        match self {
            Self::Kernel(device) => device.peers().await,
            Self::UserSpace(device) => Ok(device.peers().await),
        }
    }

    pub(super) async fn change(&self, changes: &[Change]) -> io::Result<()> {
        match self {
            Self::Kernel(device) => device.change(changes).await,
            Self::UserSpace(device) => device.change(changes).await,
        }
    }

    /// Agrees on session keys with these peers, so that the first packet need not wait. Who does not answer is left.
    pub(super) async fn greet(&self, keys: &[WireguardKey]) -> io::Result<()> {
        match self {
            Self::Kernel(device) => device.greet(keys).await,
            Self::UserSpace(device) => {
                device.greet(keys).await;
                Ok(())
            }
        }
    }

    /// Ends it. The link, if there is one still, is to be removed then.
    pub(super) async fn close(self) {
        match self {
            Self::Kernel(_) => {}
            Self::UserSpace(device) => device.close().await,
        }
    }
}
