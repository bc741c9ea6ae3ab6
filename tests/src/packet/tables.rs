//! A world as the packet library's tables, on maps of the standard library.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fmt;

use mesh_agent::dataplane::contents::Contents;
use mesh_agent::sys::bpf::Prefix;
use mesh_common::addr::Ip6;
use mesh_common::map::{
    AddrKey, Alias, Backend, Config, Endpoint, Flow, FlowKey, FragmentKey, FragmentPorts, Iface, Peer, Port,
    PortKey, RuleKey, Sent, Service, TaskKey, TaskSlots,
};
use mesh_datapath::tables::{AddrTables, Stage, Tables};

use super::entries::{Entries, Held, NOW_S, Place, lift_flow, lift_fragment, lift_key, lower_flow};
use super::family::Side;
use super::world::World;

/// The tables of a world.
#[derive(Debug)]
pub struct HostTables {
    config: Config,
    contents: Contents,
    places: HashMap<u32, u32>,
    peers: BTreeMap<u32, Peer>,
    spent: Vec<u32>,
    entries: RefCell<Entries>,
    meanwhile: RefCell<Option<Meanwhile>>,
}

/// What another CPU does while a packet is looked at.
pub struct Meanwhile {
    /// How often the packet's own CPU has used what the programs keep before that.
    pub uses: usize,
    /// What is done.
    pub done: Box<dyn FnOnce(&HostTables)>,
}

impl fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meanwhile").field("uses", &self.uses).finish_non_exhaustive()
    }
}

impl HostTables {
    /// The tables of `world`.
    pub fn new(world: &World) -> Self {
        let places = |(start, range): (u32, &[u32])| (start..).zip(range.to_vec()).collect::<Vec<_>>();
        Self {
            config: world.config(),
            contents: world.contents(),
            places: world.places.iter().flat_map(places).collect(),
            peers: world.peers(),
            spent: world.spent.clone(),
            entries: RefCell::new(world.known.clone()),
            meanwhile: RefCell::new(None),
        }
    }

    /// Has something done by another CPU between two uses of the entries by the next packet.
    pub fn set_meanwhile(&self, meanwhile: Meanwhile) {
        self.meanwhile.replace(Some(meanwhile));
    }

    /// What the programs' tables hold.
    pub fn entries(&self) -> Entries {
        self.entries.borrow().clone()
    }

    /// The entries, before one of them is used.
    fn used(&self) -> &RefCell<Entries> {
        let due = match &mut *self.meanwhile.borrow_mut() {
            Some(Meanwhile { uses: 0, .. }) => true,
            Some(Meanwhile { uses, .. }) => {
                *uses -= 1;
                false
            }
            None => false,
        };
        if due && let Some(meanwhile) = self.meanwhile.take() {
            (meanwhile.done)(self);
        }
        &self.entries
    }

    fn held(&self, place: Place) -> Option<Held> {
        self.used().borrow().get(&place).copied()
    }

    fn insert(&self, place: Place, held: Held) {
        self.used().borrow_mut().insert(place, held);
    }

    fn remove(&self, place: Place) {
        self.used().borrow_mut().remove(&place);
    }
}

fn flow_place<A: Side>(key: &FlowKey<A>, stage: Stage) -> Place {
    let key = lift_key(key);
    match stage {
        Stage::Opening => Place::Opening(key),
        Stage::Established => Place::Established(key),
    }
}

impl Tables for HostTables {
    fn config(&self) -> Option<&Config> {
        Some(&self.config).filter(|config| config.vtep != Ip6::default())
    }

    fn port(&self, key: &PortKey) -> Option<&Port> {
        self.contents.common.ports.get(key)
    }

    fn service(&self, slot: u32) -> Option<&Service> {
        self.contents.common.services.get(&slot)
    }

    fn place(&self, place: u32) -> Option<u32> {
        self.places.get(&place).copied()
    }

    fn member(&self, vtep: &Ip6) -> Option<u32> {
        self.contents.common.members.get(vtep).copied()
    }

    fn tagged(&self, tag: u32) -> Option<u32> {
        self.contents.common.tags.get(&tag).copied()
    }

    fn peer(&self, slot: u32) -> Option<&Peer> {
        self.peers.get(&slot)
    }

    fn now_s(&self) -> u32 {
        NOW_S
    }

    fn spend(&self, budget: u32) -> bool {
        !self.spent.contains(&budget)
    }
}

impl<A: Side> AddrTables<A> for HostTables {
    fn is_local(&self, addr: &A) -> bool {
        A::tables(&self.contents).locals.contains_key(addr)
    }

    fn rule(&self, key: &RuleKey<A>) -> Option<u32> {
        let rules = A::tables(&self.contents).rules.iter();
        let matching = rules.filter(|(prefix, _)| is_prefix(prefix, key));
        matching.max_by_key(|(prefix, _)| prefix.len).map(|(_, rule)| *rule)
    }

    fn vip(&self, key: &AddrKey<A>) -> Option<u32> {
        A::tables(&self.contents).vips.get(key).copied()
    }

    fn backend(&self, slot: u32) -> Option<&Backend<A>> {
        A::tables(&self.contents).backends.get(&slot)
    }

    fn task(&self, key: &TaskKey) -> Option<&TaskSlots> {
        A::tables(&self.contents).tasks.get(key)
    }

    fn endpoint(&self, key: &AddrKey<A>) -> Option<&Endpoint> {
        A::tables(&self.contents).endpoints.get(key)
    }

    fn iface(&self, ifindex: u32) -> Option<&Iface<A>> {
        A::tables(&self.contents).ifaces.get(&ifindex)
    }

    fn alias(&self, addr: &A) -> Option<&Alias<A>> {
        A::tables(&self.contents).aliases.get(addr)
    }

    fn sent(&self, key: &FlowKey<A>) -> Option<Sent> {
        match self.held(Place::Sent(lift_key(key))) {
            Some(Held::Sent(sent)) => Some(sent),
            _ => None,
        }
    }

    fn insert_sent(&self, key: &FlowKey<A>, sent: &Sent) {
        self.insert(Place::Sent(lift_key(key)), Held::Sent(*sent));
    }

    fn remove_sent(&self, key: &FlowKey<A>) {
        self.remove(Place::Sent(lift_key(key)));
    }

    fn flow(&self, key: &FlowKey<A>, stage: Stage) -> Option<Flow<A>> {
        match self.held(flow_place(key, stage)) {
            Some(Held::Flow(flow)) => Some(lower_flow(&flow)),
            _ => None,
        }
    }

    fn insert_flow(&self, key: &FlowKey<A>, flow: &Flow<A>, stage: Stage) -> bool {
        self.insert(flow_place(key, stage), Held::Flow(lift_flow(flow)));
        true
    }

    fn remove_flow(&self, key: &FlowKey<A>, stage: Stage) {
        self.remove(flow_place(key, stage));
    }

    fn mark_flow(&self, key: &FlowKey<A>, stage: Stage, stamp: u32, flags: u8) {
        if let Some(Held::Flow(flow)) = self.used().borrow_mut().get_mut(&flow_place(key, stage)) {
            flow.stamp = stamp;
            flow.flags |= flags;
        }
    }

    fn fragment(&self, key: &FragmentKey<A>) -> Option<FragmentPorts> {
        match self.held(Place::Fragment(lift_fragment(key))) {
            Some(Held::Fragment(ports)) => Some(ports),
            _ => None,
        }
    }

    fn insert_fragment(&self, key: &FragmentKey<A>, ports: &FragmentPorts) {
        self.insert(Place::Fragment(lift_fragment(key)), Held::Fragment(*ports));
    }
}

/// Whether the bits that count in `prefix` are those of `key`.
fn is_prefix<A: Side>(prefix: &Prefix<RuleKey<A>>, key: &RuleKey<A>) -> bool {
    let bits = |key: &RuleKey<A>| [&key.scope.to_bytes()[..], key.addr.as_bytes()].concat();
    let (ours, theirs) = (bits(&prefix.key), bits(key));
    (0..prefix.len as usize).all(|bit| (ours[bit / 8] ^ theirs[bit / 8]) >> (7 - bit % 8) & 1 == 0)
}
