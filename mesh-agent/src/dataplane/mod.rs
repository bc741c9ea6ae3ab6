//! The dataplane of a node: BPF programs on its interfaces, and maps that follow the table.
//!
//! [`plan`] says what the maps are to mean, [`layout`] what they are to hold, [`maps`] writes the difference; a change
//! of one service is planned, laid out and written without the others. Everything is pinned: attachments and maps
//! outlive the agent, and the next one takes them over.

pub mod attach;
pub mod cgroup;
pub mod contents;
mod counters;
mod error;
mod garbage;
mod hooks;
pub mod inspect;
pub mod layout;
pub mod maglev;
mod map;
pub mod maps;
mod nacks;
pub mod numbers;
pub mod object;
pub mod pins;
pub mod places;
pub mod plan;
mod sorted;
pub mod tables;
mod touched;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use mesh_api::table::Table;
use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
pub use mesh_common::counter::Counter;
use mesh_common::map::{Config, Host, tag_of};
use mesh_common::vxlan::mtu_overhead_bytes;
use tokio::sync::mpsc;

use self::attach::{Links, TcHook};
pub use self::counters::read_counters;
pub use self::error::DataplaneError;
use self::garbage::Collector;
pub use self::object::Programs;
use self::pins::Inheritance;
use self::plan::ALIAS6_NET;
pub use self::plan::{AttachmentKey, Local, LocalEndpoint};
use self::tables::Tables;
pub use self::touched::Touched;
use crate::config::XdpMode;
use crate::links::IPV6_MTU_MIN;

/// How the dataplane is set up on this host.
#[derive(Debug, Clone)]
pub struct DataplaneConfig {
    /// A folder on a BPF file system.
    pub pin_dir: PathBuf,
    /// Whether and how XDP runs on the uplinks.
    pub xdp: XdpMode,
    /// Capacity of the flow tables.
    pub flows_max: u32,
    /// The VXLAN device.
    pub vxlan_ifindex: u32,
    /// `shoal0`.
    pub host_ifindex: u32,
    /// `shoal0p`.
    pub host_peer_ifindex: u32,
    /// Address of `shoal0`; the next one is where local clients' sockets are sent.
    pub host_addr: Ipv4Addr,
    /// The aliases' subnet.
    pub alias_net: ipnet::Ipv4Net,
    /// The interfaces towards the underlay.
    pub uplinks: Vec<Uplink>,
}

/// An interface towards the underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// Its index.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// Whether it is one end of a veth pair: native XDP there costs more than it gains.
    pub is_veth: bool,
    /// Whether it is a VLAN on another interface: TC does all of it.
    pub is_vlan: bool,
}

/// A node's dataplane.
pub struct Dataplane {
    config: DataplaneConfig,
    programs: Programs,
    tables: Tables,
    links: Links,
    attachment: Attachment,
    collector: Collector,
}

/// Whether the interfaces have this agent's programs.
enum Attachment {
    /// They have.
    Done,
    /// Another version's programs run on maps of their own, until this one's maps hold the table.
    Waiting {
        /// Where their flows come from, if they mean the same here.
        flows: Option<Inheritance>,
        /// Tasks' interfaces that are to be attached to.
        endpoints: Vec<u32>,
    },
}

impl Dataplane {
    /// Loads the programs, takes over the pinned maps, and attaches to the uplinks, the VXLAN device and `shoal0p`.
    /// Where another version of the programs is attached, it stays so until the first [`Dataplane::change`].
    pub fn open(config: DataplaneConfig) -> Result<Self, DataplaneError> {
        let folder = pins::pin_folder(&config.pin_dir)?;
        let mut programs = Programs::load(&folder, config.flows_max)?;
        let tables = Tables::open(&folder)?;
        let links = Links::open(pins::links_folder(&config.pin_dir)?, TcHook::of_this_kernel())?;
        let former = pins::former_version(&config.pin_dir);
        let attachment = if tables.are_filled()? || (former.is_none() && links.is_empty()) {
            hooks::attach_all(&config, &mut programs, &links)?;
            // An agent may have been killed before it came to that.
            pins::remove_other_versions(&config.pin_dir)?;
            Attachment::Done
        } else {
            Attachment::Waiting { flows: inherit(former, &folder)?, endpoints: Vec::new() }
        };
        let collector = Collector::start(&folder)?;
        Ok(Self { config, programs, tables, links, attachment, collector })
    }

    /// Attaches to the interfaces of `config`, which says nothing else than the one before. What the maps hold of them
    /// follows with the next [`Dataplane::change`].
    pub fn reattach(&mut self, config: DataplaneConfig) -> Result<(), DataplaneError> {
        if let Attachment::Done = self.attachment {
            hooks::attach_all(&config, &mut self.programs, &self.links)?;
        }
        self.config = config;
        Ok(())
    }

    /// Brings the maps to what `touched` names of `table`, and to `local`, given that they hold all the rest; the first
    /// time, and after a failure, to all of it, whatever they hold.
    pub fn change(&mut self, table: &Table, touched: &Touched, local: &Local) -> Result<(), DataplaneError> {
        let config = self.node_config(table, local);
        self.tables.change(table, touched, local, &config)?;
        self.collector.avoid(self.tables.avoided());
        self.take_over()
    }

    /// Swaps the programs in, now that the maps hold the table, and removes what is left of another version.
    fn take_over(&mut self) -> Result<(), DataplaneError> {
        let Attachment::Waiting { flows, endpoints } = &mut self.attachment else { return Ok(()) };
        if let Some(flows) = flows {
            let flows = flows.flows()?;
            tracing::info!(flows, "took over the flows of another version's maps");
        } else {
            tracing::warn!("another version's flows can't be taken over: flows start empty");
        }
        hooks::attach_all(&self.config, &mut self.programs, &self.links)?;
        for ifindex in std::mem::take(endpoints) {
            let program = self.programs.classifier(object::FROM_TASK)?;
            if let Err(error) = self.links.attach_tc(object::FROM_TASK, program, ifindex) {
                // It may have gone meanwhile; one that is there is attached again when the node looks at its tasks.
                tracing::warn!(ifindex, %error, "can't attach to a task's interface");
            }
        }
        self.attachment = Attachment::Done;
        pins::remove_other_versions(&self.config.pin_dir)
    }

    /// Attaches to the host side of a task's interface.
    pub fn attach_endpoint(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        match &mut self.attachment {
            Attachment::Waiting { endpoints, .. } => {
                endpoints.push(ifindex);
                Ok(())
            }
            Attachment::Done => {
                let program = self.programs.classifier(object::FROM_TASK)?;
                self.links.attach_tc(object::FROM_TASK, program, ifindex)
            }
        }
    }

    /// Forgets the attachment to a task's interface, which may be gone already.
    pub fn detach_endpoint(&mut self, ifindex: u32) {
        if let Attachment::Waiting { endpoints, .. } = &mut self.attachment {
            endpoints.retain(|waiting| *waiting != ifindex);
        }
        if let Err(error) = self.links.detach_tc(object::FROM_TASK, ifindex) {
            tracing::warn!(ifindex, %error, "can't detach from a task's interface");
        }
    }

    /// What other nodes say of tasks that are not there. It has one reader, for as long as it is kept. To be called inside
    /// a tokio runtime.
    pub fn nacks(&self) -> Result<mpsc::Receiver<AttachmentKey>, DataplaneError> {
        nacks::follow(&pins::pin_folder(&self.config.pin_dir)?)
    }

    /// How each uplink is attached: its name, and `xdp-native`, `xdp-generic` or `tc`.
    pub fn modes(&self) -> Vec<(String, &'static str)> {
        hooks::modes(&self.config, &self.links)
    }

    /// Detaches everything and removes all pins.
    pub fn uninstall(self) -> Result<(), Vec<DataplaneError>> {
        let mut errors = Vec::new();
        let at = |source| DataplaneError::PinFolder { path: self.config.pin_dir.clone(), source };
        let fixed = [
            (object::FROM_OVERLAY, self.config.vxlan_ifindex),
            (object::FROM_HOST, self.config.host_peer_ifindex),
        ];
        let uplinks = self.config.uplinks.iter().map(|uplink| (object::UPLINK_INGRESS, uplink.ifindex));
        for (name, ifindex) in fixed.into_iter().chain(uplinks) {
            errors.extend(self.links.detach_tc(name, ifindex).err().map(at));
        }
        errors.extend(self.links.retain(|_, _| false).into_iter().map(at));
        errors.extend(pins::remove_all(&self.config.pin_dir));
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// Removes what [`Dataplane::open`] may have pinned and attached, also where it failed half-way.
    pub fn clear_away(pin_dir: &Path) -> Result<(), Vec<DataplaneError>> {
        if TcHook::of_this_kernel() == TcHook::Classic {
            attach::detach_classic_everywhere(&object::CLASSIFIERS);
        }
        let errors = pins::remove_all(pin_dir);
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn node_config(&self, table: &Table, local: &Local) -> Config {
        let DataplaneConfig { host_addr, alias_net, vxlan_ifindex, host_ifindex, .. } = &self.config;
        let vtep = Ip6::from(local.vtep);
        let wireguard = local.wireguard.map(Ip6::from);
        let low = |number| ALIAS6_NET.with_low(Be32::new(number));
        Config {
            hash_seed: table.cluster.hash_seed,
            vtep,
            wireguard: wireguard.unwrap_or_default(),
            host4: Host {
                addr: (*host_addr).into(),
                mesh: Be32::new(host_addr.to_bits() + 1),
                client: client4(local),
                alias_net: alias_net.network().into(),
                alias_mask: alias_net.netmask().into(),
            },
            host6: Host {
                addr: low(1),
                mesh: low(2),
                client: client6(vtep),
                alias_net: ALIAS6_NET,
                alias_mask: Ipv6Addr::from_bits(u128::MAX << 64).into(),
            },
            vxlan_ifindex: *vxlan_ifindex,
            host_ifindex: *host_ifindex,
            tag: tag_of(vtep),
            wireguard_tag: wireguard.map_or(0, tag_of),
            vxlan_port: Be16::new(table.cluster.data_path_port),
            path_mtu_min: self.path_mtu_min(vtep),
            reserved: [0; 4],
        }
    }

    /// What IPv6 inside of VXLAN needs, bytes, or what the smallest uplink carries: an ICMP error from anybody makes a kernel
    /// believe in paths for 552 bytes.
    fn path_mtu_min(&self, vtep: Ip6) -> u16 {
        let needed = IPV6_MTU_MIN + mtu_overhead_bytes(vtep.family());
        self.config.uplinks.iter().map(|uplink| uplink.mtu).fold(needed, u32::min) as u16
    }
}

/// The IPv4 address that tasks see this node's own processes under: no other node has it.
fn client4(local: &Local) -> Be32 {
    /// Where there is none to be had: this range, with what stands for the VTEP.
    const RANGE: u32 = 0xa9fe_8000;
    let of_node = [local.vtep].into_iter().chain(local.addresses.iter().copied());
    let mut addresses = of_node.filter_map(|addr| match addr {
        IpAddr::V4(addr) => Some(Be32::from(addr)),
        IpAddr::V6(_) => None,
    });
    addresses.next().unwrap_or_else(|| Be32::new(RANGE | tag_of(local.vtep.into()) & 0x7fff))
}

/// The same, IPv6.
fn client6(vtep: Ip6) -> Ip6 {
    const NET: Ip6 = Ip6::from_groups([0xfd73, 0x686f, 0x616c, 2, 0, 0, 0, 0]);
    vtep.to_mapped().map_or(vtep, |addr| NET.with_low(addr))
}

/// Prepares for the flows of a former version, if there is one whose flows mean the same.
fn inherit(former: Option<PathBuf>, folder: &Path) -> Result<Option<Inheritance>, DataplaneError> {
    let flows = former.and_then(|former| Inheritance::between(former, folder.to_owned()));
    if let Some(flows) = &flows {
        flows.numbers()?;
    }
    Ok(flows)
}
