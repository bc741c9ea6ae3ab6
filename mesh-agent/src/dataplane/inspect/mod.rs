//! Looking at a live dataplane from outside of the agent: its maps by their pins, its programs by their links.
//!
//! Works whether or not the agent runs. Nothing here changes what the agent writes; [`explain`](explain::explain) is the
//! only one that runs a program, and it puts back what that changes in the tables of flows.

pub mod decode;
pub mod drops;
pub mod explain;
pub mod flows;
mod packet;
pub mod programs;
mod recorder;
pub mod status;
mod walk;
mod words;

use std::cell::RefCell;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use aya::Pod;
use mesh_common::addr::{Address, Ip6};
use mesh_common::be::Be32;
use mesh_common::map::{
    AddrKey, Alias, Backend, Config, Endpoint, Example, Flow, FlowKey, FragmentKey, FragmentPorts, Iface,
    Peer, Port, PortKey, RuleKey, Sent, Service, TaskKey, TaskSlots,
};
use mesh_datapath::encap::Inner;
use mesh_datapath::refuse::Answer;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use self::recorder::{Recorder, Written};
use super::error::DataplaneError;
use super::map::PinnedMap;
use super::maps::{NAMES4, NAMES6};
use super::pins::version_folder;
use crate::links::LinkError;
use crate::sys::bpf::Prefix;
use crate::sys::netns;

/// Why a live dataplane can't be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// Only root may open pins.
    #[error("the dataplane of a node is open to root alone: run this with sudo")]
    NotRoot,
    /// A map.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// The host's netfilter rules.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The agent has pinned its maps, but has not written any.
    #[error("the dataplane under {path} has no table yet: its agent has not heard from a manager")]
    NotConfigured {
        /// The agent's folder.
        path: PathBuf,
    },
    /// The calling thread is in another network namespace.
    #[error(
        "the dataplane under {path} is another network namespace's: run this in that one (`nsenter --net=FILE`, `ip netns exec \
         NAME`)"
    )]
    OtherNetns {
        /// The agent's folder.
        path: PathBuf,
    },
    /// The ends of a packet are of different families.
    #[error("--from {from} and --to {to} are of different families: give two IPv4 or two IPv6 addresses")]
    Families {
        /// Source.
        from: IpAddr,
        /// Destination.
        to: IpAddr,
    },
    /// No program is attached to an uplink.
    #[error(
        "no program is attached to an uplink of this node: is its agent up? (`shoal status` shows the hooks)"
    )]
    NoUplink,
    /// An uplink that isn't one.
    #[error(
        "--at uplink:{name}: no program is attached to an interface of that name; those that have one: {known}"
    )]
    UnknownUplink {
        /// The name.
        name: String,
        /// Those that have one.
        known: String,
    },
    /// A task that isn't there.
    #[error("--at task:{task}: no task of this node has that address or interface")]
    UnknownTask {
        /// What was asked for.
        task: String,
    },
    /// Several tasks have the address, in different networks.
    #[error(
        "--at task:{task}: tasks of several networks have that address; name the interface: {interfaces}"
    )]
    AmbiguousTask {
        /// What was asked for.
        task: String,
        /// Host sides of their interfaces.
        interfaces: String,
    },
    /// A program that is to be run isn't loaded.
    #[error("the program {name} is not attached: is the node's agent up? (`shoal status` shows the hooks)")]
    NoProgram {
        /// The program.
        name: &'static str,
    },
    /// A program can't be run.
    #[error("the kernel did not run {name} on the packet")]
    TestRun {
        /// The program.
        name: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// The ring of events.
    #[error("waiting for events failed")]
    Events(#[source] io::Error),
}

/// The pinned maps of a live dataplane.
#[derive(Debug)]
pub struct Live {
    pin_dir: PathBuf,
    config: PinnedMap,
    ports: PinnedMap,
    services: PinnedMap,
    places: PinnedMap,
    members: PinnedMap,
    tags: PinnedMap,
    peers: PinnedMap,
    examples: PinnedMap,
    v4: FamilyMaps,
    v6: FamilyMaps,
}

/// The maps of one family.
#[derive(Debug)]
struct FamilyMaps {
    locals: PinnedMap,
    rules: PinnedMap,
    vips: PinnedMap,
    backends: PinnedMap,
    tasks: PinnedMap,
    endpoints: PinnedMap,
    ifaces: PinnedMap,
    aliases: PinnedMap,
    sent: PinnedMap,
    opening: PinnedMap,
    flows: PinnedMap,
    fragments: PinnedMap,
}

/// Names of the tables that programs write.
const WRITTEN4: [&str; 4] = ["shoal_sent4", "shoal_opening4", "shoal_flows4", "shoal_frags4"];
/// See [`WRITTEN4`].
const WRITTEN6: [&str; 4] = ["shoal_sent6", "shoal_opening6", "shoal_flows6", "shoal_frags6"];

impl Live {
    /// Opens what is pinned under the agent's folder `pin_dir` on a BPF file system.
    pub fn open(pin_dir: &Path) -> Result<Self, InspectError> {
        let folder = checked_folder(pin_dir)?;
        Ok(Self {
            pin_dir: pin_dir.to_owned(),
            config: PinnedMap::open::<u32, Config>(&folder, "shoal_config")?,
            ports: PinnedMap::open::<PortKey, Port>(&folder, "shoal_ports")?,
            services: PinnedMap::open::<u32, Service>(&folder, "shoal_services")?,
            places: PinnedMap::open::<u32, u32>(&folder, "shoal_places")?,
            members: PinnedMap::open::<Ip6, u32>(&folder, "shoal_members")?,
            tags: PinnedMap::open::<u32, u32>(&folder, "shoal_tags")?,
            peers: PinnedMap::open::<u32, Peer>(&folder, "shoal_peers")?,
            examples: PinnedMap::open::<u32, Example>(&folder, "shoal_examples")?,
            v4: FamilyMaps::open::<Be32>(&folder, NAMES4, WRITTEN4)?,
            v6: FamilyMaps::open::<Ip6>(&folder, NAMES6, WRITTEN6)?,
        })
    }

    /// The agent's folder on a BPF file system.
    pub fn pin_dir(&self) -> &Path {
        &self.pin_dir
    }

    /// The node's own facts; `None` until its agent has written them.
    pub fn config(&self) -> Result<Option<Config>, DataplaneError> {
        let config: Option<Config> = self.config.get(&0_u32)?;
        Ok(config.filter(|config| config.vtep != Ip6::default()))
    }

    /// Whether the calling thread is in the dataplane's network namespace, as far as that can be told: only an agent that serves
    /// local processes has left word of it. Elsewhere, interfaces have other names and routes are others.
    fn is_here(&self) -> bool {
        let folder = self.pin_dir.join(version_folder());
        let Ok(map) = PinnedMap::open::<u32, u64>(&folder, "shoal_netns") else { return true };
        let left: Option<u64> = map.get(&0_u32).ok().flatten().filter(|cookie| *cookie != 0);
        left.is_none() || netns::cookie().is_ok_and(|here| left == Some(here))
    }

    /// The VXLAN address of the node with a peer's slot; `None` for this node (0) and for a slot that is not in use.
    fn node(&self, slot: u32) -> Result<Option<IpAddr>, DataplaneError> {
        if slot == 0 {
            return Ok(None);
        }
        let peer: Option<Peer> = self.peers.get(&slot)?;
        Ok(peer.filter(|peer| peer.vtep != Ip6::default()).map(|peer| peer.vtep.into()))
    }
}

/// The folder of this version's maps, if it can be looked into.
fn checked_folder(pin_dir: &Path) -> Result<PathBuf, InspectError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(InspectError::NotRoot);
    }
    let existing = pin_dir.ancestors().find(|path| path.exists()).unwrap_or(pin_dir);
    match statfs(existing) {
        Ok(stat) if stat.filesystem_type() == BPF_FS_MAGIC => {}
        _ => return Err(DataplaneError::NotBpffs { path: pin_dir.to_owned() }.into()),
    }
    let folder = pin_dir.join(version_folder());
    if folder.join("shoal_config").exists() {
        Ok(folder)
    } else {
        Err(DataplaneError::NotSetUp { path: pin_dir.to_owned() }.into())
    }
}

impl FamilyMaps {
    fn open<A: Address + Pod>(
        folder: &Path,
        names: [&'static str; 8],
        written: [&'static str; 4],
    ) -> Result<Self, DataplaneError> {
        let [locals, rules, vips, backends, tasks, endpoints, ifaces, aliases] = names;
        let [sent, opening, flows, fragments] = written;
        Ok(Self {
            locals: PinnedMap::open::<A, u32>(folder, locals)?,
            rules: PinnedMap::open::<Prefix<RuleKey<A>>, u32>(folder, rules)?,
            vips: PinnedMap::open::<AddrKey<A>, u32>(folder, vips)?,
            backends: PinnedMap::open::<u32, Backend<A>>(folder, backends)?,
            tasks: PinnedMap::open::<TaskKey, TaskSlots>(folder, tasks)?,
            endpoints: PinnedMap::open::<AddrKey<A>, Endpoint>(folder, endpoints)?,
            ifaces: PinnedMap::open::<u32, Iface<A>>(folder, ifaces)?,
            aliases: PinnedMap::open::<A, Alias<A>>(folder, aliases)?,
            sent: PinnedMap::open::<FlowKey<A>, Sent>(folder, sent)?,
            opening: PinnedMap::open::<FlowKey<A>, Flow<A>>(folder, opening)?,
            flows: PinnedMap::open::<FlowKey<A>, Flow<A>>(folder, flows)?,
            fragments: PinnedMap::open::<FragmentKey<A>, FragmentPorts>(folder, fragments)?,
        })
    }
}

/// A family of addresses, with its maps.
trait Side: Inner + Answer + Pod {
    /// The family's maps.
    fn maps(live: &Live) -> &FamilyMaps;
    /// What a walk over the tables would have written.
    fn written<'r>(recorder: &'r Recorder<'_>) -> &'r RefCell<Written<Self>>;
    /// The address as users write it.
    fn ip(self) -> IpAddr;
}

impl Side for Be32 {
    fn maps(live: &Live) -> &FamilyMaps {
        &live.v4
    }

    fn written<'r>(recorder: &'r Recorder<'_>) -> &'r RefCell<Written<Self>> {
        &recorder.written4
    }

    fn ip(self) -> IpAddr {
        IpAddr::V4(self.into())
    }
}

impl Side for Ip6 {
    fn maps(live: &Live) -> &FamilyMaps {
        &live.v6
    }

    fn written<'r>(recorder: &'r Recorder<'_>) -> &'r RefCell<Written<Self>> {
        &recorder.written6
    }

    fn ip(self) -> IpAddr {
        IpAddr::V6(self.into())
    }
}

/// The name of an interface, or what stands for one that is gone.
pub fn interface_name(ifindex: u32) -> String {
    let name = nix::net::if_::if_indextoname(ifindex).ok().and_then(|name| name.into_string().ok());
    name.unwrap_or_else(|| format!("interface {ifindex}"))
}

/// What an IP protocol is called.
pub fn protocol_name(protocol: u8) -> String {
    use mesh_common::map::{PROTO_ICMP, PROTO_ICMP6, PROTO_TCP, PROTO_UDP};
    match protocol {
        PROTO_TCP => "tcp".to_owned(),
        PROTO_UDP => "udp".to_owned(),
        PROTO_ICMP => "icmp".to_owned(),
        PROTO_ICMP6 => "icmp6".to_owned(),
        other => format!("protocol {other}"),
    }
}
