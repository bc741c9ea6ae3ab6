//! This node at a glance: from its state folder, its pins and the kernel, whether or not its agent runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};

use aya::Pod;
use aya::maps::MapData;
use mesh_api::error::chain;
use mesh_api::table::{NodeRecord, NodeState, Role, Table};
use mesh_common::ABI_VERSION;
use mesh_common::addr::{Address as _, Ip6};
use mesh_common::be::Be32;
use mesh_common::map::{AddrKey, Backend, Endpoint, Flow, FlowKey, Peer, Port, PortKey, Sent, Service};
use serde::Serialize;

use super::flows::FlowStage;
use super::programs::{Hook, hooks};
use super::{InspectError, Live, Side, interface_name};
use crate::claim;
use crate::dataplane::attach::TcHook;
use crate::dataplane::cgroup;
use crate::dataplane::error::DataplaneError;
use crate::dataplane::map::PinnedMap;
use crate::dataplane::object;
use crate::dataplane::pins::version_folder;
use crate::links::Facts;
use crate::node::silent;
use crate::session::{Store, expired};
use crate::sys::clock::monotonic;

/// A node, or a host that is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Whether an agent runs in this network namespace.
    pub agent_runs: bool,
    /// The node's place in its cluster; `None` if the host is in none, or its state folder can't be read.
    pub member: Option<Member>,
    /// Version of the maps' layout that this binary speaks.
    pub abi_version: u32,
    /// What this node's tasks send to the outside under, of services with fixed egress addresses.
    pub egress: Vec<EgressStatus>,
    /// Nodes that don't answer this one: where others serve, their tasks get no new flows from here.
    pub silent: Vec<SilentStatus>,
    /// The dataplane; `None` where none is set up.
    pub dataplane: Option<Plane>,
    /// What keeps this from being all, in words.
    pub troubles: Vec<String>,
}

/// A node's place in its cluster, as its state folder has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Member {
    /// The node's id.
    pub node_id: String,
    /// The cluster's.
    pub cluster_id: String,
    /// Its host name, as the managers have it; empty until they do.
    pub hostname: String,
    /// Manager or worker.
    pub role: Role,
    /// The address that it advertises.
    pub advertise: IpAddr,
    /// Its VXLAN address.
    pub vtep: IpAddr,
    /// Index of the last table that it got.
    pub table_index: Option<u64>,
}

/// What tasks of a service with fixed egress addresses send under on this node, in one family.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct EgressStatus {
    /// The service's name.
    pub service: String,
    /// The addresses listed, in order.
    pub listed: Vec<IpAddr>,
    /// The first of them that the node has; `None` if what the tasks send is dropped.
    pub addr: Option<IpAddr>,
}

/// A node that doesn't answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SilentStatus {
    /// Its VXLAN address.
    pub vtep: IpAddr,
    /// Its host name; empty if the last table doesn't have it.
    pub hostname: String,
    /// Whether the managers have given it up as well.
    pub down: bool,
}

/// A live dataplane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plane {
    /// Whether its agent has told it of its node: before, it forwards nothing.
    pub configured: bool,
    /// The node's VXLAN address, as the programs have it.
    pub vtep: Option<IpAddr>,
    /// UDP port of VXLAN.
    pub vxlan_port: Option<u16>,
    /// The uplinks.
    pub uplinks: Vec<UplinkStatus>,
    /// The other nodes.
    pub peers: Vec<PeerStatus>,
    /// What is attached.
    pub hooks: Vec<Hook>,
    /// What should be attached, and isn't.
    pub missing_hooks: Vec<String>,
    /// Why the node's own processes don't reach published ports at its addresses; `None` if they do.
    pub local_clients_trouble: Option<String>,
    /// How much is in the maps.
    pub counts: Counted,
    /// What each map takes of the kernel's memory, bytes, by its name.
    pub map_bytes: BTreeMap<String, u64>,
}

/// An interface towards the underlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UplinkStatus {
    /// Its name.
    pub name: String,
    /// Its MTU, bytes; 0 if it is gone.
    pub mtu: u32,
    /// `xdp-native`, `xdp-generic` or `tc`.
    pub mode: &'static str,
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PeerStatus {
    /// Its slot.
    pub slot: u32,
    /// Where it is sent VXLAN.
    pub vtep: IpAddr,
    /// Whether that goes through WireGuard.
    pub encrypted: bool,
    /// Its host name; empty if the last table doesn't have it.
    pub hostname: String,
    /// Whether the next hop towards it has ever been found.
    pub resolved: bool,
    /// Whether that was within the last second or so: it is asked for by packets.
    pub fresh: bool,
    /// The interface towards it.
    pub interface: Option<String>,
    /// MTU towards it, bytes.
    pub mtu: Option<u16>,
}

/// How much is in the maps, both families together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Counted {
    /// Services, one for each network that they are in.
    pub services: u64,
    /// Published ports, one for each protocol and family.
    pub ports: u64,
    /// VIPs.
    pub vips: u64,
    /// Backends, here and elsewhere.
    pub backends: u64,
    /// Endpoints, here and elsewhere.
    pub endpoints: u64,
    /// Interfaces of this node's tasks.
    pub ifaces: u64,
    /// Entries of flows, by stage.
    pub flows: BTreeMap<&'static str, u64>,
}

/// Looks at this host: the agent's folders, and what `facts` says of its interfaces.
pub fn status(state_dir: &Path, pin_dir: &Path, facts: &Facts) -> Result<Status, InspectError> {
    let mut troubles = Vec::new();
    let store = Store::new(state_dir);
    let membership = store.load().unwrap_or_else(|error| {
        troubles.push(format!("the state folder {} can't be read: {error}", state_dir.display()));
        None
    });
    let table = membership.as_ref().and_then(|_| store.load_table());
    let live = match Live::open(pin_dir) {
        Ok(live) => Some(live),
        Err(error @ InspectError::NotRoot) => return Err(error),
        Err(error) => {
            troubles.push(chain(&error));
            None
        }
    };
    let member = membership.map(|kept| {
        match kept.peer() {
            Ok(peer) => troubles.extend(expired(&peer)),
            Err(error) => troubles.push(format!("the node's certificate can't be read: {error}")),
        }
        let membership = kept.membership;
        let node = table.as_ref().and_then(|table| table.nodes.get(&membership.node_id));
        Member {
            hostname: node.map(|node| node.hostname.clone()).unwrap_or_default(),
            node_id: membership.node_id.to_string(),
            cluster_id: membership.cluster_id.to_string(),
            role: membership.role,
            advertise: membership.advertise,
            vtep: membership.data_path,
            table_index: table.as_ref().map(|table| table.index),
        }
    });
    if let Some(live) = live.as_ref().filter(|live| !live.is_here()) {
        troubles.push(chain(&InspectError::OtherNetns { path: live.pin_dir().to_owned() }));
    }
    let dataplane = live.map(|live| plane(&live, table.as_ref(), facts)).transpose()?;
    let silent = silent::recorded(state_dir).unwrap_or_else(|error| {
        troubles.push(format!("which nodes are silent can't be read in {}: {error}", state_dir.display()));
        BTreeSet::new()
    });
    let silent = silent.into_iter().map(|vtep| silent_status(vtep, table.as_ref())).collect();
    let agent_runs = claim::is_taken();
    let egress = table.iter().flat_map(|table| egress(table, facts)).collect();
    Ok(Status { agent_runs, member, abi_version: ABI_VERSION, egress, silent, dataplane, troubles })
}

fn silent_status(vtep: IpAddr, table: Option<&Table>) -> SilentStatus {
    // A host that left and joined again has an older record under the same address.
    let nodes = table.iter().flat_map(|table| table.nodes.values()).filter(|node| node.vtep == vtep);
    let node = nodes.min_by_key(|node| node.state == NodeState::Down);
    SilentStatus {
        vtep,
        hostname: node.map(|node| node.hostname.clone()).unwrap_or_default(),
        down: node.is_some_and(|node| node.state == NodeState::Down),
    }
}

/// What the tasks that a node's table has specifications of, its own, send under.
fn egress(table: &Table, facts: &Facts) -> BTreeSet<EgressStatus> {
    let here = facts.egress_addresses();
    let specs = table.tasks.values().filter_map(|task| task.spec.as_deref());
    let by_family = specs.flat_map(|spec| {
        [IpAddr::is_ipv4, IpAddr::is_ipv6].map(|is_of_family| {
            let listed: Vec<IpAddr> = spec.egress.iter().filter(|addr| is_of_family(addr)).copied().collect();
            let addr = listed.iter().find(|addr| here.contains(addr)).copied();
            EgressStatus { service: spec.service_name.clone(), listed, addr }
        })
    });
    by_family.filter(|status| !status.listed.is_empty()).collect()
}

/// The nodes of a node's last table by name, id and VXLAN address: to tell this node from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WhichNode {
    /// This one.
    This,
    /// Another one, with this VXLAN address.
    Other(IpAddr),
    /// None that this node knows.
    Unknown,
}

/// Which node a host name, an id or its beginning, or an address means.
pub fn which_node(state_dir: &Path, live: &Live, name: &str) -> Result<WhichNode, InspectError> {
    let own = live.config()?.map(|config| IpAddr::from(config.vtep));
    let store = Store::new(state_dir);
    let membership = store.load().ok().flatten().map(|kept| kept.membership);
    let addr: Option<IpAddr> = name.parse().ok();
    let is_own = |addr| Some(addr) == own || membership.as_ref().is_some_and(|own| own.advertise == addr);
    if addr.is_some_and(is_own) {
        return Ok(WhichNode::This);
    }
    let table = store.load_table();
    let mut nodes = table.iter().flat_map(|table| table.nodes.values());
    let node = nodes.find(|node| {
        node.hostname == name
            || name.len() >= 4 && node.id.as_str().starts_with(name)
            || Some(node.vtep) == addr
    });
    Ok(match node {
        Some(node) if membership.is_some_and(|own| own.node_id == node.id) => WhichNode::This,
        Some(node) => WhichNode::Other(node.vtep),
        None => WhichNode::Unknown,
    })
}

fn plane(live: &Live, table: Option<&Table>, facts: &Facts) -> Result<Plane, DataplaneError> {
    let config = live.config()?;
    let hooks = hooks(live.pin_dir());
    Ok(Plane {
        configured: config.is_some(),
        vtep: config.map(|config| config.vtep.into()),
        vxlan_port: config.map(|config| config.vxlan_port.get()),
        uplinks: uplinks(&hooks, facts),
        peers: peers(live, table)?,
        missing_hooks: missing(&hooks, live)?,
        local_clients_trouble: local_clients_trouble(&hooks),
        hooks,
        counts: counts(live)?,
        map_bytes: map_bytes(live.pin_dir()),
    })
}

fn uplinks(hooks: &[Hook], facts: &Facts) -> Vec<UplinkStatus> {
    let on_uplinks = hooks.iter().filter(|hook| hook.program == object::UPLINK_INGRESS);
    on_uplinks
        .map(|uplink| {
            let xdp = hooks
                .iter()
                .find(|hook| hook.program == object::UPLINK_XDP && hook.ifindex == uplink.ifindex);
            let fact = facts.links.iter().find(|link| link.ifindex == uplink.ifindex);
            UplinkStatus {
                name: interface_name(uplink.ifindex),
                mtu: fact.map_or(0, |link| link.mtu),
                mode: xdp.map_or("tc", |hook| hook.by),
            }
        })
        .collect()
}

fn peers(live: &Live, table: Option<&Table>) -> Result<Vec<PeerStatus>, DataplaneError> {
    let now_ns = u64::try_from(monotonic().as_nanos()).unwrap_or(u64::MAX);
    let mut peers = Vec::new();
    live.peers.read(|slot: u32, peer: Peer| {
        if peer.vtep != Ip6::default() {
            peers.push((slot, peer));
        }
    })?;
    let status = |(slot, peer): (u32, Peer)| {
        let vtep = IpAddr::from(peer.vtep);
        let is_its = |node: &&NodeRecord| {
            node.vtep == vtep
                || node.wireguard.iter().any(|identity| IpAddr::from(identity.address()) == vtep)
        };
        let node = table.and_then(|table| table.nodes.values().find(is_its));
        let resolved = peer.expires_ns != 0;
        PeerStatus {
            slot,
            vtep,
            encrypted: peer.vtep.is_wireguard(),
            hostname: node.map(|node| node.hostname.clone()).unwrap_or_default(),
            resolved,
            fresh: peer.expires_ns > now_ns,
            interface: resolved.then(|| interface_name(peer.ifindex)),
            mtu: resolved.then_some(peer.mtu),
        }
    };
    Ok(peers.into_iter().map(status).collect())
}

/// What should be attached, and isn't: only where attachments are links.
fn missing(hooks: &[Hook], live: &Live) -> Result<Vec<String>, DataplaneError> {
    let mut missing = Vec::new();
    for hook in hooks.iter().filter(|hook| hook.program_id.is_none()) {
        missing.push(format!("{} on {}", hook.program, interface_name(hook.ifindex)));
    }
    if TcHook::of_this_kernel() == TcHook::Classic {
        return Ok(missing);
    }
    for program in [object::UPLINK_INGRESS, object::FROM_OVERLAY, object::FROM_HOST] {
        if !hooks.iter().any(|hook| hook.program == program) {
            missing.push(program.to_owned());
        }
    }
    let mut tasks = Vec::new();
    live.v4.ifaces.read(|ifindex: u32, _: mesh_common::map::Iface<Be32>| tasks.push(ifindex))?;
    for ifindex in tasks {
        if !hooks.iter().any(|hook| hook.program == object::FROM_TASK && hook.ifindex == ifindex) {
            missing.push(format!("{} on {}", object::FROM_TASK, interface_name(ifindex)));
        }
    }
    Ok(missing)
}

fn local_clients_trouble(hooks: &[Hook]) -> Option<String> {
    let attached = |name: &str| hooks.iter().any(|hook| hook.program == name && hook.program_id.is_some());
    if cgroup::PROGRAMS.iter().all(|name| attached(name)) {
        return None;
    }
    Some(match cgroup::root() {
        Err(error) => chain(&error),
        Ok(root) => format!(
            "the programs are not attached to the cgroup {}: the agent's log says why",
            root.display()
        ),
    })
}

fn counts(live: &Live) -> Result<Counted, DataplaneError> {
    let mut counted = Counted {
        services: elements::<Service>(&live.services)?,
        ports: entries::<PortKey, Port>(&live.ports)?,
        flows: [FlowStage::Opening, FlowStage::Established, FlowStage::Sent]
            .map(|stage| (stage.name(), 0))
            .into(),
        ..Counted::default()
    };
    add_family::<Be32>(live, &mut counted)?;
    add_family::<Ip6>(live, &mut counted)?;
    Ok(counted)
}

fn add_family<A: Side>(live: &Live, counted: &mut Counted) -> Result<(), DataplaneError> {
    let maps = A::maps(live);
    counted.vips += entries::<AddrKey<A>, u32>(&maps.vips)?;
    counted.backends += elements::<Backend<A>>(&maps.backends)?;
    counted.endpoints += entries::<AddrKey<A>, Endpoint>(&maps.endpoints)?;
    counted.ifaces += entries::<u32, mesh_common::map::Iface<A>>(&maps.ifaces)?;
    for (stage, entries) in [
        (FlowStage::Opening, entries::<FlowKey<A>, Flow<A>>(&maps.opening)?),
        (FlowStage::Established, entries::<FlowKey<A>, Flow<A>>(&maps.flows)?),
        (FlowStage::Sent, entries::<FlowKey<A>, Sent>(&maps.sent)?),
    ] {
        *counted.flows.entry(stage.name()).or_default() += entries;
    }
    Ok(())
}

fn entries<K: Pod, V: Pod>(map: &PinnedMap) -> Result<u64, DataplaneError> {
    let mut count = 0;
    map.read(|_: K, _: V| count += 1)?;
    Ok(count)
}

/// The elements of an array that are in use.
fn elements<V: Pod + Default + PartialEq>(map: &PinnedMap) -> Result<u64, DataplaneError> {
    let mut count = 0;
    map.read(|_: u32, value: V| count += u64::from(value != V::default()))?;
    Ok(count)
}

/// What each pinned map takes of the kernel's memory, as the kernel tells of its descriptor.
fn map_bytes(pin_dir: &Path) -> BTreeMap<String, u64> {
    let pins = fs::read_dir(pin_dir.join(version_folder())).into_iter().flatten().flatten();
    let bytes = |pin: PathBuf| {
        let map = MapData::from_pin(&pin).ok()?;
        let fdinfo = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
        memlock(&fs::read_to_string(fdinfo).ok()?)
    };
    pins.filter_map(|pin| Some((pin.file_name().into_string().ok()?, bytes(pin.path())?))).collect()
}

fn memlock(fdinfo: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix("memlock:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_maps_memory_is_read_from_what_the_kernel_tells_of_its_descriptor() {
        let fdinfo = "pos:\t0\nflags:\t02000002\nmap_type:\t2\nmemlock:\t1049016\nmap_id:\t7\n";
        assert_eq!(memlock(fdinfo), Some(1_049_016));
        assert_eq!(memlock("pos:\t0\n"), None);
    }

    fn hook(program: &str, ifindex: u32, by: &'static str) -> Hook {
        let (program, program_id) = (program.to_owned(), Some(9));
        Hook { program, interface: None, ifindex, by, program_id, loaded: None }
    }

    #[test]
    fn an_uplinks_mode_is_that_of_its_xdp_attachment() {
        let hooks = [
            hook(object::UPLINK_INGRESS, 70_001, "tcx"),
            hook(object::UPLINK_INGRESS, 70_002, "tcx"),
            hook(object::UPLINK_XDP, 70_002, "xdp-generic"),
            hook(object::FROM_HOST, 70_003, "tcx"),
        ];
        let modes: Vec<_> = uplinks(&hooks, &Facts::default()).iter().map(|uplink| uplink.mode).collect();
        assert_eq!(modes, ["tc", "xdp-generic"]);
    }

    #[test]
    fn local_clients_are_served_only_by_all_of_their_programs() {
        let mut hooks: Vec<Hook> = cgroup::PROGRAMS.iter().map(|name| hook(name, 0, "cgroup")).collect();
        assert_eq!(local_clients_trouble(&hooks), None);
        hooks[3].program_id = None;
        assert!(local_clients_trouble(&hooks).is_some());
    }
}
