//! The node's network interfaces, by netlink: the VXLAN device, the host's own pair, the tasks' pairs, what the
//! uplinks look like; and the sysctls and netfilter rules that go with them.
//!
//! Loads no BPF program and knows nothing of services: `dataplane` does the forwarding between what is made here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use futures::TryStreamExt as _;
use netlink_packet_route::address::AddressHeaderFlags;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec};

use crate::sys::netns::Netns;

mod devices;
mod egress;
mod endpoint;
mod facts;
mod nft;
mod routes;
pub mod sysctl;
mod watch;
mod wireguard;

pub use devices::{HostPair, VXLAN_MTU};
pub use egress::Egress;
pub use endpoint::{DefaultRoute, EndpointLink, SubnetRoute, TaskAddress, TaskNetwork, host_link_name, mac};
pub use facts::{Facts, LinkFact};
pub use nft::{Loss, losses};
pub use watch::Watch;
pub use wireguard::{WIREGUARD_LINKS, WIREGUARD_TABLES, WireguardWay};

/// The name of Shoal's netfilter tables.
const RULES_TABLE: &str = "shoal";
/// The VXLAN device's name.
pub const VXLAN_LINK: &str = "shoal-vxlan";
/// The host's side of the host's own pair.
pub const HOST_LINK: &str = "shoal0";
/// The BPF side of the host's own pair.
pub const HOST_PEER_LINK: &str = "shoal0p";
/// The host's address on [`HOST_LINK`]: where DNS listens, and what gateways translate to.
pub const HOST_ADDR: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 1);
/// The prefix length of the node-local range that [`HOST_ADDR`] and the endpoints' aliases are from.
pub const HOST_PREFIX: u8 = 18;
/// What local clients' sockets are sent to when they dial a published port: an address of that range that is no
/// endpoint's alias and no interface's.
pub const MESH_ADDR: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 2);
/// As [`HOST_ADDR`], in IPv6. An endpoint's IPv6 alias is in the same subnet, with its IPv4 alias as the lowest 32 bits.
pub const HOST_ADDR6: Ipv6Addr = Ipv6Addr::new(0xfd73, 0x686f, 0x616c, 1, 0, 0, 0, 1);
/// The host's link-local address on [`HOST_LINK`]: what the kernel asks from for the endpoint that a packet which it forwards
/// is for. Without one it does not ask.
pub const HOST_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The prefix length of [`HOST_ADDR6`]'s subnet, and of the link-local one.
pub const HOST_PREFIX6: u8 = 64;
/// The least MTU of a link with IPv6 (RFC 8200), bytes: below it, the kernel takes IPv6 off an interface.
pub const IPV6_MTU_MIN: u32 = 1280;

/// What VXLAN adds to a packet on an underlay of `vtep`'s family: outer Ethernet, IP, UDP and VXLAN headers, bytes.
pub const fn vxlan_overhead(vtep: IpAddr) -> u32 {
    match vtep {
        IpAddr::V4(_) => 50,
        IpAddr::V6(_) => 70,
    }
}

/// Whether links of this MTU can have IPv6: the kernel has it, and it fits.
pub(crate) fn has_ipv6(mtu: u32) -> bool {
    mtu >= IPV6_MTU_MIN && sysctl::has_ipv6()
}

/// What can go wrong with links, sysctls and netfilter rules.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No netlink socket.
    #[error("cannot open a netlink socket")]
    Socket(#[source] io::Error),
    /// The kernel refused.
    #[error("cannot {operation} {link}")]
    Netlink {
        /// What was tried.
        operation: &'static str,
        /// The interface, or what else it was tried on.
        link: String,
        /// The kernel's answer.
        source: NetlinkError,
    },
    /// An interface that has to be there is not.
    #[error("there is no network interface {0}")]
    Missing(String),
    /// A network namespace can't be opened or entered.
    #[error("cannot enter the network namespace of process {pid}")]
    Netns {
        /// Whose namespace.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// A sysctl can't be written.
    #[error("cannot write {}", path.display())]
    Sysctl {
        /// The file below /proc/sys.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `nft` is not installed.
    #[error("the program nft is not on the PATH: install it (Debian, Ubuntu, Fedora: package nftables)")]
    NftMissing,
    /// `nft` can't be run.
    #[error("cannot run nft")]
    NftRun(#[source] io::Error),
    /// `nft` refused the rules.
    #[error("nft refused Shoal's rules (does the kernel have nf_tables with nat?): {stderr}")]
    NftRefused {
        /// What it said.
        stderr: String,
    },
}

/// The kernel's answer to a netlink request.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// An error number.
    #[error(transparent)]
    Kernel(io::Error),
    /// Anything else: an answer that does not decode, a closed socket.
    #[error(transparent)]
    Protocol(rtnetlink::Error),
}

impl From<rtnetlink::Error> for NetlinkError {
    fn from(error: rtnetlink::Error) -> Self {
        match error {
            rtnetlink::Error::NetlinkError(message) => Self::Kernel(message.to_io()),
            other => Self::Protocol(other),
        }
    }
}

impl NetlinkError {
    fn is(&self, number: i32) -> bool {
        matches!(self, Self::Kernel(error) if error.raw_os_error() == Some(number))
    }
}

impl LinkError {
    fn netlink(operation: &'static str, link: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let link = link.into();
        move |error| Self::Netlink { operation, link, source: error.into() }
    }

    /// Whether the kernel answered with this error number.
    fn is(&self, number: i32) -> bool {
        matches!(self, Self::Netlink { source, .. } if source.is(number))
    }
}

/// The links of one network namespace, over a netlink socket opened in it.
#[derive(Debug, Clone)]
pub struct Links {
    handle: Handle,
}

impl Links {
    /// The links of the calling thread's namespace. To be called inside a tokio runtime.
    pub fn open() -> Result<Self, LinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(LinkError::Socket)?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// The links of another namespace. To be called inside a tokio runtime.
    pub fn open_in(netns: &Netns) -> Result<Self, LinkError> {
        let runtime = tokio::runtime::Handle::current();
        netns
            .run(|| {
                // The socket belongs to the namespace of the thread that opens it, for good.
                let _inside = runtime.enter();
                let (connection, handle, _) = rtnetlink::new_connection()?;
                runtime.spawn(connection);
                Ok(Self { handle })
            })
            .map_err(LinkError::Socket)
    }

    /// The index of the interface called `name`, if there is one.
    pub async fn index(&self, name: &str) -> Result<Option<u32>, LinkError> {
        Ok(self.get(name).await?.map(|link| link.header.index))
    }

    async fn get(&self, name: &str) -> Result<Option<LinkMessage>, LinkError> {
        let mut answers = self.handle.link().get().match_name(name.to_owned()).execute();
        match answers.try_next().await.map_err(LinkError::netlink("look up", name)) {
            Ok(link) => Ok(link),
            Err(error) if error.is(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn require(&self, name: &str) -> Result<u32, LinkError> {
        self.index(name).await?.ok_or_else(|| LinkError::Missing(name.to_owned()))
    }

    /// Removes an interface by its index, and with a pair the other side; one that is gone is no error.
    pub async fn remove(&self, index: u32) -> Result<(), LinkError> {
        let removed = self.handle.link().del(index).execute().await;
        ignore(libc::ENODEV, removed.map_err(LinkError::netlink("remove", format!("interface {index}"))))
    }

    /// Removes the interface called `name`; one that is not there is no error.
    pub async fn remove_named(&self, name: &str) -> Result<(), LinkError> {
        match self.index(name).await? {
            Some(index) => self.remove(index).await,
            None => Ok(()),
        }
    }

    async fn set(
        &self,
        operation: &'static str,
        link: &str,
        message: LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), LinkError> {
        let set = self.handle.link().set(message.build()).execute().await;
        set.map_err(LinkError::netlink(operation, link))
    }

    /// Sets an interface's MTU, bytes.
    pub async fn set_mtu(&self, index: u32, mtu: u32) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu);
        self.set("set the MTU of", &format!("interface {index}"), message).await
    }

    async fn add_address(&self, index: u32, addr: IpAddr, prefix: u8) -> Result<(), LinkError> {
        let mut request = self.handle.address().add(index, addr, prefix);
        if addr.is_ipv6() {
            // Nobody else can have it, and until that had been found out it could not be used.
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        let error = LinkError::netlink("set the address of", format!("interface {index}: {addr}/{prefix}"));
        ignore(libc::EEXIST, request.execute().await.map_err(error))
    }
}

fn ignore(number: i32, result: Result<(), LinkError>) -> Result<(), LinkError> {
    match result {
        Err(error) if error.is(number) => Ok(()),
        other => other,
    }
}

fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn is_up(link: &LinkMessage) -> bool {
    link.header.flags.contains(LinkFlags::Up)
}

fn mtu_of(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    })
}
