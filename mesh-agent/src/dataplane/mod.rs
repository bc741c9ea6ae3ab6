//! The dataplane of a node: BPF programs on its interfaces, and maps that follow the table.
//!
//! [`plan`] says what the maps are to mean, [`layout`] what they are to hold, [`mirror`] writes the difference.
//! Everything is pinned: programs, attachments and maps outlive the agent, and the next one takes them over.

pub mod attach;
mod counters;
mod error;
pub mod layout;
pub mod maglev;
mod mirror;
pub mod object;
pub mod plan;
pub mod slots;

use std::path::{Path, PathBuf};

use aya::programs::xdp::XdpMode as AyaXdpMode;
use mesh_api::table::Table;
use mesh_common::be::{Be16, Be32};
pub use mesh_common::counter::Counter;
use mesh_common::map::Config;

use self::attach::{Links, TcHook, xdp_pin_name};
pub use self::counters::read_counters;
pub use self::error::DataplaneError;
use self::layout::Layout;
use self::object::Maps;
pub use self::object::Programs;
pub use self::plan::{Local, LocalEndpoint};
use crate::config::XdpMode;

/// How the dataplane is set up on this host.
#[derive(Debug, Clone)]
pub struct DataplaneConfig {
    /// A folder on a BPF file system.
    pub pin_dir: PathBuf,
    /// Whether and how XDP runs on the uplinks.
    pub xdp: XdpMode,
    /// Capacity of the flow table.
    pub flows_max: u32,
    /// The VXLAN device.
    pub vxlan_ifindex: u32,
    /// `shoal0`.
    pub host_ifindex: u32,
    /// `shoal0p`.
    pub host_peer_ifindex: u32,
    /// Address of `shoal0`.
    pub host_addr: std::net::Ipv4Addr,
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
}

/// A node's dataplane.
pub struct Dataplane {
    config: DataplaneConfig,
    programs: Programs,
    maps: Maps,
    links: Links,
    layout: Layout,
    /// Whether the layout has taken over what the kernel held at start.
    adopted: bool,
    mode: &'static str,
}

impl Dataplane {
    /// Loads the programs, takes over the pinned maps, and attaches to the uplinks, the VXLAN device and `shoal0p`.
    pub fn open(config: DataplaneConfig) -> Result<Self, DataplaneError> {
        let folder = object::pin_folder(&config.pin_dir)?;
        let (mut programs, maps) = object::load(&folder, config.flows_max)?;
        object::remove_other_versions(&config.pin_dir)?;
        let links = Links::open(folder.join("links"), TcHook::of_this_kernel())?;
        let mode = attach_all(&config, &mut programs, &links)?;
        Ok(Self { config, programs, maps, links, layout: Layout::default(), adopted: false, mode })
    }

    /// Brings the maps to what `table` and `local` ask for. Additions come before what refers to them, removals after.
    pub fn apply(&mut self, table: &Table, local: &Local) -> Result<(), DataplaneError> {
        let plan = plan::plan(table, local);
        if !self.adopted {
            self.layout.adopt(&self.maps.held(), &plan);
            self.adopted = true;
        }
        let contents = self.layout.lay_out(&plan)?;
        let config = self.node_config(table, local);
        self.maps.write(&config, &contents)?;
        self.layout.written();
        Ok(())
    }

    /// Attaches to the host side of a task's interface.
    pub fn attach_endpoint(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        self.links.attach_tc(object::FROM_TASK, self.programs.classifier(object::FROM_TASK)?, ifindex)
    }

    /// Forgets the attachment to a task's interface, which may be gone already.
    pub fn detach_endpoint(&mut self, ifindex: u32) {
        if let Err(error) = self.links.detach_tc(object::FROM_TASK, ifindex) {
            tracing::warn!(ifindex, %error, "can't detach from a task's interface");
        }
    }

    /// How it is attached to the uplinks: `xdp-native`, `xdp-generic` or `tc`.
    pub fn mode(&self) -> &'static str {
        self.mode
    }

    /// Detaches everything and removes all pins.
    pub fn uninstall(self) -> Result<(), Vec<DataplaneError>> {
        let mut errors = Vec::new();
        let at = |path: &PathBuf, source| DataplaneError::PinFolder { path: path.clone(), source };
        for source in self.links.retain(|_, _| false) {
            errors.push(at(&self.config.pin_dir, source));
        }
        let attached = [
            (object::FROM_OVERLAY, self.config.vxlan_ifindex),
            (object::FROM_HOST, self.config.host_peer_ifindex),
        ];
        let uplinks = self.config.uplinks.iter().map(|uplink| (object::UPLINK_INGRESS, uplink.ifindex));
        for (name, ifindex) in attached.into_iter().chain(uplinks) {
            errors.extend(
                self.links.detach_tc(name, ifindex).err().map(|source| at(&self.config.pin_dir, source)),
            );
        }
        let folder = self.config.pin_dir.join(object::version_folder());
        errors.extend(std::fs::remove_dir_all(&folder).err().map(|source| at(&folder, source)));
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// Removes what [`Dataplane::open`] may have pinned and attached, also where it failed half-way.
    pub fn clear_away(pin_dir: &Path) -> Result<(), Vec<DataplaneError>> {
        let folder = pin_dir.join(object::version_folder());
        let at = |source| DataplaneError::PinFolder { path: folder.clone(), source };
        let mut errors = Vec::new();
        if TcHook::of_this_kernel() == TcHook::Classic {
            attach::detach_classic_everywhere(object::UPLINK_INGRESS);
        }
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => errors.push(at(error)),
            _ => {}
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn node_config(&self, table: &Table, local: &Local) -> Config {
        let mtu = self.config.uplinks.iter().map(|uplink| uplink.mtu).min().unwrap_or(1500);
        Config {
            hash_seed: table.cluster.hash_seed,
            vtep: local.vtep.into(),
            vxlan_ifindex: self.config.vxlan_ifindex,
            host_ifindex: self.config.host_ifindex,
            host_addr: self.config.host_addr.into(),
            alias_net: Be32::from(self.config.alias_net.network()),
            alias_mask: Be32::from(self.config.alias_net.netmask()),
            vxlan_port: Be16::new(table.cluster.data_path_port),
            underlay_mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
            reserved: [0; 3],
        }
    }
}

/// Attaches to everything but tasks' interfaces, and drops attachments to what is gone. Says how XDP runs.
fn attach_all(
    config: &DataplaneConfig,
    programs: &mut Programs,
    links: &Links,
) -> Result<&'static str, DataplaneError> {
    let mode = config.uplinks.iter().try_fold("tc", |mode, uplink| {
        let attached = attach_xdp(config.xdp, uplink, programs, links)?;
        Ok::<_, DataplaneError>(if attached == "tc" { mode } else { attached })
    })?;
    links.attach_tc(
        object::FROM_OVERLAY,
        programs.classifier(object::FROM_OVERLAY)?,
        config.vxlan_ifindex,
    )?;
    links.attach_tc(object::FROM_HOST, programs.classifier(object::FROM_HOST)?, config.host_peer_ifindex)?;
    for uplink in &config.uplinks {
        links.attach_tc(
            object::UPLINK_INGRESS,
            programs.classifier(object::UPLINK_INGRESS)?,
            uplink.ifindex,
        )?;
    }
    let xdp_pin = match mode {
        "xdp-native" => xdp_pin_name(AyaXdpMode::Driver),
        "xdp-generic" => xdp_pin_name(AyaXdpMode::Skb),
        _ => "",
    };
    let is_uplink = |ifindex| config.uplinks.iter().any(|uplink| uplink.ifindex == ifindex);
    let stale = links.retain(|program, ifindex| match program {
        object::UPLINK_INGRESS => is_uplink(ifindex),
        object::FROM_OVERLAY => ifindex == config.vxlan_ifindex,
        object::FROM_HOST => ifindex == config.host_peer_ifindex,
        object::FROM_TASK => nix::net::if_::if_indextoname(ifindex).is_ok(),
        xdp => xdp == xdp_pin && is_uplink(ifindex),
    });
    for error in stale {
        tracing::warn!(%error, "can't remove a stale pin");
    }
    Ok(mode)
}

/// Attaches XDP to one uplink as `mode` asks, and says how it runs.
fn attach_xdp(
    mode: XdpMode,
    uplink: &Uplink,
    programs: &mut Programs,
    links: &Links,
) -> Result<&'static str, DataplaneError> {
    let mut attach = |mode| links.attach_xdp(object::UPLINK_XDP, programs.xdp()?, uplink.ifindex, mode);
    match mode {
        XdpMode::Off => Ok("tc"),
        XdpMode::Native => attach(AyaXdpMode::Driver).map(|()| "xdp-native"),
        XdpMode::Generic => attach(AyaXdpMode::Skb).map(|()| "xdp-generic"),
        XdpMode::Auto if uplink.is_veth => Ok("tc"),
        XdpMode::Auto => match attach(AyaXdpMode::Driver) {
            Ok(()) => Ok("xdp-native"),
            Err(error) => {
                tracing::info!(uplink = uplink.name, %error, "no native XDP; TC does all of it");
                Ok("tc")
            }
        },
    }
}
