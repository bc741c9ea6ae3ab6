//! The packet library on byte vectors and maps of the standard library.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use mesh_common::be::{Be16, Be32};
use mesh_common::counter::Counter;
use mesh_common::map::{
    AddrKey, Alias, Backend, Config, Endpoint, Flow, FlowKey, Iface, Peer, Port, PortKey, Service,
};
use mesh_datapath::encap::{decapsulate, encapsulate, fits, fits_unpacked, mesh_reply};
use mesh_datapath::packet::{Fault, Field, Packet, Resize, Rewrite};
use mesh_datapath::parse::Parsed;
use mesh_datapath::tables::Tables;
use mesh_datapath::uplink::{Decision, decide};
use mesh_datapath::verdict::Verdict;
use mesh_datapath::{checksum, host, overlay, task, uplink};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::world::{CLIENT_ROUTE, LOOPBACK, World};
use super::{End, Hook, Outcome};

/// A packet in a vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bytes {
    bytes: Vec<u8>,
    /// Refuses every store, as the kernel may.
    pub read_only: bool,
}

impl Bytes {
    /// A packet that can be written.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, read_only: false }
    }

    /// The packet's bytes.
    pub fn into_inner(self) -> Vec<u8> {
        self.bytes
    }

    fn patch(&mut self, offset: usize, change: impl FnOnce(Be16) -> Be16) -> Result<(), Fault> {
        let checksum = self.load::<Be16>(offset).ok_or(Fault)?;
        self.store(offset, &change(checksum))
    }
}

impl Packet for Bytes {
    fn len(&self) -> u32 {
        self.bytes.len() as u32
    }

    fn load<T: FromBytes + Immutable + KnownLayout + Copy>(&self, offset: usize) -> Option<T> {
        T::read_from_prefix(self.bytes.get(offset..)?).ok().map(|(value, _)| value)
    }
}

impl Rewrite for Bytes {
    fn store<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Result<(), Fault> {
        if self.read_only {
            return Err(Fault);
        }
        let to = self.bytes.get_mut(offset..offset + size_of::<T>()).ok_or(Fault)?;
        to.copy_from_slice(value.as_bytes());
        Ok(())
    }

    fn patch_ip_checksum(&mut self, offset: usize, from: u32, to: u32) -> Result<(), Fault> {
        self.patch(offset, |old| checksum::patch(old, from, to))
    }

    fn patch_l4_checksum(
        &mut self,
        offset: usize,
        from: u32,
        to: u32,
        _: Field,
        udp: bool,
    ) -> Result<(), Fault> {
        self.patch(offset, |old| checksum::patch_l4(old, from, to, udp))
    }
}

impl Resize for Bytes {
    fn grow(&mut self, bytes: u32) -> Result<(), Fault> {
        self.bytes.splice(..0, std::iter::repeat_n(0, bytes as usize));
        Ok(())
    }

    fn shrink(&mut self, bytes: u32) -> Result<(), Fault> {
        self.bytes.drain(..bytes as usize);
        Ok(())
    }
}

/// A world as tables.
#[derive(Debug)]
pub struct HostTables<'w> {
    world: &'w World,
    maglev: HashMap<u32, u32>,
    peers: BTreeMap<u32, Peer>,
    flows: RefCell<BTreeMap<FlowKey, Flow>>,
}

impl<'w> HostTables<'w> {
    /// The tables of `world`.
    pub fn new(world: &'w World) -> Self {
        let places = |(start, table): &(u32, Vec<u32>)| (*start..).zip(table.clone()).collect::<Vec<_>>();
        Self {
            world,
            maglev: world.contents.maglev.iter().flat_map(places).collect(),
            peers: world.peers(),
            flows: RefCell::new(world.flows.clone()),
        }
    }

    /// The flow table.
    pub fn flows(&self) -> BTreeMap<FlowKey, Flow> {
        self.flows.borrow().clone()
    }
}

impl Tables for HostTables<'_> {
    fn config(&self) -> Option<&Config> {
        Some(&self.world.config).filter(|config| config.vtep != Be32::default())
    }

    fn is_local(&self, addr: Be32) -> bool {
        self.world.contents.locals.contains_key(&addr)
    }

    fn port(&self, key: &PortKey) -> Option<&Port> {
        self.world.contents.ports.get(key)
    }

    fn vip(&self, key: &AddrKey) -> Option<u32> {
        self.world.contents.vips.get(key).copied()
    }

    fn service(&self, slot: u32) -> Option<&Service> {
        self.world.contents.services.get(&slot)
    }

    fn maglev(&self, place: u32) -> Option<u32> {
        self.maglev.get(&place).copied()
    }

    fn backend(&self, slot: u32) -> Option<&Backend> {
        self.world.contents.backends.get(&slot)
    }

    fn endpoint(&self, key: &AddrKey) -> Option<&Endpoint> {
        self.world.contents.endpoints.get(key)
    }

    fn iface(&self, ifindex: u32) -> Option<&Iface> {
        self.world.contents.ifaces.get(&ifindex)
    }

    fn alias(&self, addr: Be32) -> Option<&Alias> {
        self.world.contents.aliases.get(&addr)
    }

    fn member(&self, vtep: Be32) -> Option<u32> {
        self.world.contents.members.get(&vtep).copied()
    }

    fn peer(&self, slot: u32) -> Option<&Peer> {
        self.peers.get(&slot)
    }

    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        self.flows.borrow().get(key).copied()
    }

    fn insert_flow(&self, key: &FlowKey, flow: &Flow) {
        self.flows.borrow_mut().insert(*key, *flow);
    }
}

/// What the library makes of a packet.
pub fn run(hook: Hook, world: &World, packet: Bytes) -> Outcome {
    let tables = HostTables::new(world);
    let mut packet = packet;
    let (end, counter) = if hook == Hook::UplinkXdp {
        xdp(&mut packet, &tables)
    } else {
        let Verdict { action, counter } = tc(hook, &mut packet, &tables);
        (End::Tc(action), Some(counter))
    };
    let flows = changed(&world.flows, &tables.flows());
    Outcome { end, output: packet.into_inner(), counter, flows }
}

fn tc(hook: Hook, packet: &mut Bytes, tables: &HostTables<'_>) -> Verdict {
    match hook {
        Hook::Uplink | Hook::UplinkXdp => uplink::from_uplink(packet, tables),
        Hook::Task(ifindex) => task::from_task(packet, tables, ifindex),
        Hook::Overlay(arrival) => overlay::from_overlay(packet, tables, arrival),
        Hook::Host => host::from_host(packet, tables),
    }
}

/// What the XDP program does around [`decide`].
fn xdp(packet: &mut Bytes, tables: &HostTables<'_>) -> (End, Option<Counter>) {
    let remote = match decide(packet, tables) {
        Decision::Pass | Decision::Local(_) => return (End::XdpPass, None),
        Decision::Drop(reason) => return (End::XdpDrop, Some(reason)),
        Decision::Tunnel(outer) => return xdp_reply(packet, tables, &outer),
        Decision::Remote(remote) => remote,
    };
    let (Some(config), Some(peer)) = (tables.config(), tables.peer(remote.peer)) else {
        return (End::XdpPass, None);
    };
    if peer.expires_ns == 0 || !fits(packet.len(), peer.mtu) {
        return (End::XdpPass, None);
    }
    match encapsulate(packet, config, peer, &remote) {
        Err(Fault) => (End::XdpDrop, Some(Counter::DropRewriteFailed)),
        Ok(()) if peer.ifindex == LOOPBACK => (End::XdpTx, Some(Counter::MeshForwarded)),
        Ok(()) => (End::XdpRedirect, Some(Counter::MeshForwarded)),
    }
}

/// What the XDP program does with a mesh reply; the way to the client is `world::CLIENT_ROUTE`.
fn xdp_reply(packet: &mut Bytes, tables: &HostTables<'_>, outer: &Parsed) -> (End, Option<Counter>) {
    if mesh_reply(packet, tables, outer).is_none() || !fits_unpacked(packet.len(), CLIENT_ROUTE.mtu) {
        return (End::XdpPass, None);
    }
    match decapsulate(packet, CLIENT_ROUTE.next_hop, CLIENT_ROUTE.source) {
        Err(Fault) => (End::XdpDrop, Some(Counter::DropRewriteFailed)),
        Ok(()) => (End::XdpRedirect, Some(Counter::MeshReplied)),
    }
}

/// The flows that are not, or not so, in `before`.
pub fn changed(before: &BTreeMap<FlowKey, Flow>, after: &BTreeMap<FlowKey, Flow>) -> Vec<(FlowKey, Flow)> {
    after
        .iter()
        .filter(|(key, flow)| before.get(key) != Some(flow))
        .map(|(key, flow)| (*key, *flow))
        .collect()
}
