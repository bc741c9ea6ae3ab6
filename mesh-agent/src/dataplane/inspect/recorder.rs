//! The live maps as the packet library's tables: read by lookup, each lookup written down in words, and nothing written.
//!
//! What the library would write is kept beside the maps, so that what it looks up afterwards is as it would be.

use std::any::Any;
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use aya::Pod;
use mesh_common::addr::Ip6;
use mesh_common::be::Be32;
use mesh_common::map::{
    AddrKey, Alias, BUDGET_ERRORS, Backend, Config, Endpoint, Flow, FlowKey, FragmentKey, FragmentPorts,
    Iface, Peer, Port, PortKey, RuleKey, Sent, Service, TaskKey, TaskSlots,
};
use mesh_datapath::tables::{AddrTables, Stage, Tables};
use serde::Serialize;

use super::{Live, Side, interface_name, words};
use crate::dataplane::error::DataplaneError;
use crate::dataplane::map::PinnedMap;
use crate::sys::bpf::Prefix;
use crate::sys::clock::monotonic;

/// One lookup, or one thing that would be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What was asked: the map's name without its prefix and family.
    pub table: &'static str,
    /// What it came to.
    pub words: String,
}

/// What is kept beside a table: what was looked at, and what would be there after.
#[derive(Debug)]
pub(super) struct Beside<K, V> {
    pub(super) touched: BTreeSet<K>,
    written: BTreeMap<K, Option<V>>,
}

impl<K, V> Default for Beside<K, V> {
    fn default() -> Self {
        Self { touched: BTreeSet::new(), written: BTreeMap::new() }
    }
}

impl<K: Ord + Copy, V: Copy> Beside<K, V> {
    fn write(&mut self, key: K, value: Option<V>) {
        self.touched.insert(key);
        self.written.insert(key, value);
    }
}

/// What a walk would have written to the tables of one family.
#[derive(Debug)]
pub(super) struct Written<A> {
    pub(super) sent: Beside<FlowKey<A>, Sent>,
    pub(super) opening: Beside<FlowKey<A>, Flow<A>>,
    pub(super) flows: Beside<FlowKey<A>, Flow<A>>,
    pub(super) fragments: Beside<FragmentKey<A>, FragmentPorts>,
}

impl<A> Default for Written<A> {
    fn default() -> Self {
        Self {
            sent: Beside::default(),
            opening: Beside::default(),
            flows: Beside::default(),
            fragments: Beside::default(),
        }
    }
}

impl<A> Written<A> {
    fn of(&mut self, stage: Stage) -> &mut Beside<FlowKey<A>, Flow<A>> {
        match stage {
            Stage::Opening => &mut self.opening,
            Stage::Established => &mut self.flows,
        }
    }
}

/// Values that were read, for as long as the recorder lives: the library wants them by reference.
#[derive(Debug, Default)]
struct Shelf {
    first: OnceCell<Box<Shelved>>,
}

#[derive(Debug)]
struct Shelved {
    value: Box<dyn Any>,
    next: OnceCell<Box<Shelved>>,
}

impl Shelf {
    fn keep<T: Any>(&self, value: T) -> Option<&T> {
        let mut place = &self.first;
        while let Some(shelved) = place.get() {
            place = &shelved.next;
        }
        let shelved =
            place.get_or_init(|| Box::new(Shelved { value: Box::new(value), next: OnceCell::new() }));
        shelved.value.downcast_ref()
    }
}

/// The live maps, and what was asked of them.
#[derive(Debug)]
pub(super) struct Recorder<'l> {
    pub(super) live: &'l Live,
    now_ns: u64,
    shelf: Shelf,
    steps: RefCell<Vec<Step>>,
    failed: RefCell<Option<DataplaneError>>,
    /// The service that was last asked for: it says what a place is for.
    service: Cell<Option<Service>>,
    pub(super) written4: RefCell<Written<Be32>>,
    pub(super) written6: RefCell<Written<Ip6>>,
}

impl<'l> Recorder<'l> {
    pub(super) fn new(live: &'l Live) -> Self {
        Self {
            live,
            now_ns: u64::try_from(monotonic().as_nanos()).unwrap_or(u64::MAX),
            shelf: Shelf::default(),
            steps: RefCell::default(),
            failed: RefCell::default(),
            service: Cell::default(),
            written4: RefCell::default(),
            written6: RefCell::default(),
        }
    }

    /// What was asked since the last time; or the first lookup that failed.
    pub(super) fn take_steps(&self) -> Result<Vec<Step>, DataplaneError> {
        match self.failed.take() {
            Some(error) => Err(error),
            None => Ok(self.steps.take()),
        }
    }

    /// Writes a step down, unless it is there.
    pub(super) fn note(&self, table: &'static str, words: String) {
        let step = Step { table, words };
        let mut steps = self.steps.borrow_mut();
        if !steps.contains(&step) {
            steps.push(step);
        }
    }

    fn get<K: Pod, V: Pod + Default>(&self, map: &PinnedMap, key: &K) -> Option<V> {
        map.get(key).unwrap_or_else(|error| {
            self.failed.borrow_mut().get_or_insert(error);
            None
        })
    }

    /// The value of a key by reference.
    fn find<K: Pod, V: Pod + Default + Any>(&self, map: &PinnedMap, key: &K) -> Option<&V> {
        let value: V = self.get(map, key)?;
        self.shelf.keep(value)
    }

    /// What is, or would be, in a table.
    fn held<K: Pod + Ord, V: Pod + Default>(
        &self,
        map: &PinnedMap,
        beside: &mut Beside<K, V>,
        key: &K,
    ) -> Option<V> {
        beside.touched.insert(*key);
        match beside.written.get(key) {
            Some(written) => *written,
            None => self.get(map, key),
        }
    }

    /// A node by its peer's slot, in words.
    pub(super) fn node(&self, slot: u32) -> String {
        let peer: Option<Peer> = self.get(&self.live.peers, &slot).filter(|_| slot != 0);
        words::node(peer.map(|peer| peer.vtep.into()))
    }
}

impl Tables for Recorder<'_> {
    fn config(&self) -> Option<&Config> {
        let found: Option<&Config> = self.find(&self.live.config, &0_u32);
        let found = found.filter(|config| config.vtep != Ip6::default());
        if found.is_none() {
            self.note("config", "the agent has not told the programs of their node yet".to_owned());
        }
        found
    }

    fn port(&self, key: &PortKey) -> Option<&Port> {
        let found = self.find(&self.live.ports, key);
        self.note("ports", words::port(*key, found));
        found
    }

    fn service(&self, slot: u32) -> Option<&Service> {
        let found = self.find(&self.live.services, &slot);
        self.service.set(found.copied());
        self.note("services", words::service(slot, found));
        found
    }

    fn place(&self, place: u32) -> Option<u32> {
        let found = self.get(&self.live.places, &place);
        self.note("places", words::place(place, found, self.service.get().as_ref()));
        found
    }

    fn member(&self, vtep: &Ip6) -> Option<u32> {
        let found = self.get(&self.live.members, vtep);
        let is = if found.is_some() { "is" } else { "is not" };
        self.note("members", format!("{} {is} a node of the cluster", std::net::IpAddr::from(*vtep)));
        found
    }

    fn tagged(&self, tag: u32) -> Option<u32> {
        let found = self.get(&self.live.tags, &tag);
        self.note(
            "tags",
            found.map_or_else(|| format!("no node has the tag {tag:#x}"), |slot| self.node(slot)),
        );
        found
    }

    fn peer(&self, slot: u32) -> Option<&Peer> {
        let found = self.find(&self.live.peers, &slot);
        self.note("peers", words::peer(slot, found, self.now_ns));
        found
    }

    fn now_s(&self) -> u32 {
        (self.now_ns / 1_000_000_000) as u32
    }

    fn spend(&self, budget: u32) -> bool {
        let what = if budget == BUDGET_ERRORS { "errors to senders" } else { "searches for a flow's node" };
        self.note("budgets", format!("this would take one of this second's {what}"));
        true
    }
}

impl<A: Side> AddrTables<A> for Recorder<'_> {
    fn is_local(&self, addr: &A) -> bool {
        let found: Option<u32> = self.get(&A::maps(self.live).locals, addr);
        let is = if found.is_some() { "is" } else { "is not" };
        self.note("locals", format!("{} {is} an address of this node", addr.ip()));
        found.is_some()
    }

    fn rule(&self, key: &RuleKey<A>) -> Option<u32> {
        let prefix = Prefix { len: 8 * size_of::<RuleKey<A>>() as u32, key: *key };
        let found = self.get(&A::maps(self.live).rules, &prefix);
        self.note("rules", words::rule(key, found));
        found
    }

    fn vip(&self, key: &AddrKey<A>) -> Option<u32> {
        let found = self.get(&A::maps(self.live).vips, key);
        let (addr, network) = (key.addr.ip(), words::vni(key.vni));
        self.note(
            "vips",
            match found {
                Some(slot) => format!("{addr} is a VIP of {network}: service slot {slot}"),
                None => format!("{addr} is no VIP of {network}"),
            },
        );
        found
    }

    fn backend(&self, slot: u32) -> Option<&Backend<A>> {
        let found: Option<&Backend<A>> = self.find(&A::maps(self.live).backends, &slot);
        let node: Option<Peer> = found.and_then(|found| {
            let slot = Some(found.peer).filter(|peer| *peer != 0)?;
            self.get(&self.live.peers, &slot)
        });
        self.note("backends", words::backend(slot, found, node.map(|node| node.vtep.into())));
        found
    }

    fn task(&self, key: &TaskKey) -> Option<&TaskSlots> {
        let found: Option<&TaskSlots> = self.find(&A::maps(self.live).tasks, key);
        let TaskKey { incarnation, vni } = *key;
        let network = words::vni(vni);
        self.note(
            "tasks",
            match found {
                Some(TaskSlots { backend, service }) => format!(
                    "the task with incarnation {incarnation} in {network}: backend slot {backend}, service slot {service}"
                ),
                None => format!("no task in {network} has incarnation {incarnation}"),
            },
        );
        found
    }

    fn endpoint(&self, key: &AddrKey<A>) -> Option<&Endpoint> {
        let found: Option<&Endpoint> = self.find(&A::maps(self.live).endpoints, key);
        let (addr, network) = (key.addr.ip(), words::vni(key.vni));
        self.note(
            "endpoints",
            match found {
                Some(Endpoint { peer: 0, ifindex, .. }) => {
                    format!("{addr} is a task of {network} on this node, behind {}", interface_name(*ifindex))
                }
                Some(Endpoint { peer, .. }) => {
                    format!("{addr} is a task of {network} on {}", self.node(*peer))
                }
                None => format!("{addr} is no task of {network}"),
            },
        );
        found
    }

    fn iface(&self, ifindex: u32) -> Option<&Iface<A>> {
        let found: Option<&Iface<A>> = self.find(&A::maps(self.live).ifaces, &ifindex);
        let name = interface_name(ifindex);
        self.note(
            "ifaces",
            match found {
                Some(Iface { addr, gateway, vni, .. }) => format!(
                    "behind {name} is the task {} of {}, gateway {}",
                    addr.ip(),
                    words::vni(*vni),
                    gateway.ip()
                ),
                None => format!("behind {name} is no task with IPv{}", A::FAMILY),
            },
        );
        found
    }

    fn alias(&self, addr: &A) -> Option<&Alias<A>> {
        let found: Option<&Alias<A>> = self.find(&A::maps(self.live).aliases, addr);
        let alias = addr.ip();
        self.note(
            "aliases",
            match found {
                Some(Alias { addr, vni, .. }) => {
                    format!("{alias} stands for the task {} of {}", addr.ip(), words::vni(*vni))
                }
                None => format!("{alias} stands for no task"),
            },
        );
        found
    }

    fn sent(&self, key: &FlowKey<A>) -> Option<Sent> {
        let found = self.held(&A::maps(self.live).sent, &mut A::written(self).borrow_mut().sent, key);
        self.note("sent", words::sent(key, found.as_ref()));
        found
    }

    fn insert_sent(&self, key: &FlowKey<A>, sent: &Sent) {
        A::written(self).borrow_mut().sent.write(*key, Some(*sent));
        self.note("sent", format!("flow {} would be remembered as sent", words::flow_key(key)));
    }

    fn remove_sent(&self, key: &FlowKey<A>) {
        A::written(self).borrow_mut().sent.write(*key, None);
        self.note("sent", format!("flow {} would be forgotten: it begins anew", words::flow_key(key)));
    }

    fn flow(&self, key: &FlowKey<A>, stage: Stage) -> Option<Flow<A>> {
        let maps = A::maps(self.live);
        let (table, map) = match stage {
            Stage::Opening => ("opening", &maps.opening),
            Stage::Established => ("flows", &maps.flows),
        };
        let found = self.held(map, A::written(self).borrow_mut().of(stage), key);
        self.note(table, words::flow(key, stage, found.as_ref()));
        found
    }

    fn insert_flow(&self, key: &FlowKey<A>, flow: &Flow<A>, stage: Stage) -> bool {
        A::written(self).borrow_mut().of(stage).write(*key, Some(*flow));
        let (table, how) = match stage {
            Stage::Opening => ("opening", "opening"),
            Stage::Established => ("flows", "established"),
        };
        self.note(table, format!("flow {} would be remembered as {how}", words::flow_key(key)));
        true
    }

    fn remove_flow(&self, key: &FlowKey<A>, stage: Stage) {
        A::written(self).borrow_mut().of(stage).write(*key, None);
        self.note("flows", format!("flow {} would be forgotten: it is over", words::flow_key(key)));
    }

    fn mark_flow(&self, key: &FlowKey<A>, stage: Stage, stamp: u32, flags: u8) {
        let held = self.flow(key, stage);
        if let Some(flow) = held {
            let flow = Flow { stamp, flags: flow.flags | flags, ..flow };
            A::written(self).borrow_mut().of(stage).write(*key, Some(flow));
        }
    }

    fn fragment(&self, key: &FragmentKey<A>) -> Option<FragmentPorts> {
        self.held(&A::maps(self.live).fragments, &mut A::written(self).borrow_mut().fragments, key)
    }

    fn insert_fragment(&self, key: &FragmentKey<A>, ports: &FragmentPorts) {
        A::written(self).borrow_mut().fragments.write(*key, Some(*ports));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_the_shelf_stays_there() {
        let shelf = Shelf::default();
        let (first, second) = (shelf.keep(7_u32), shelf.keep("eight".to_owned()));
        for number in 0..100_u64 {
            assert_eq!(shelf.keep(number), Some(&number));
        }
        assert_eq!((first, second.map(String::as_str)), (Some(&7), Some("eight")));
    }

    #[test]
    fn what_would_be_written_comes_before_what_is() {
        let mut beside = Beside::<u32, u32>::default();
        beside.write(1, Some(2));
        beside.write(3, None);
        assert_eq!(beside.written.get(&1), Some(&Some(2)));
        assert_eq!(beside.written.get(&3), Some(&None));
        assert_eq!(beside.touched, [1, 3].into());
    }
}
