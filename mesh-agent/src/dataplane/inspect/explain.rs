//! What becomes of a packet, and why: decided by the packet library over the live maps, step by step, and by the programs
//! that are attached, which are run on it without anything going out.
//!
//! A run is counted like any packet, and may leave an example of a drop. What it changes in the tables of flows is put
//! back.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::str::FromStr;

use aya::Pod;
use mesh_common::addr::{Ip6, mac_of};
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::map::{Backend, Flow, FlowKey, FlowKind, Iface};
use serde::Serialize;

use super::decode::Decoded;
pub use super::packet::Segment;
use super::packet::build;
use super::programs::{self, Attached};
pub use super::recorder::Step;
use super::recorder::{Recorder, Written};
use super::walk::{self, TC_REDIRECT, TC_SHOT, TC_UNSPEC, Walked, XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX};
use super::{InspectError, Live, Side, interface_name, words};
use crate::dataplane::counters::read_counters;
use crate::dataplane::error::DataplaneError;
use crate::dataplane::map::PinnedMap;
use crate::dataplane::object;
use crate::sys::test_run::{self, Ran};

/// The Ethernet address that a packet from outside comes from.
const NEIGHBOUR: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];

/// Where a packet comes in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    /// By an uplink, by its name if there are several.
    Uplink(Option<String>),
    /// From a task, by its address or its interface.
    Task(String),
}

/// What is no [`At`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no place for a packet to come in: use uplink, uplink:INTERFACE, task:ADDRESS or task:INTERFACE"
)]
pub struct Nowhere(String);

impl FromStr for At {
    type Err = Nowhere;

    fn from_str(text: &str) -> Result<Self, Nowhere> {
        match text.split_once(':') {
            None if text == "uplink" => Ok(Self::Uplink(None)),
            Some(("uplink", name)) if !name.is_empty() => Ok(Self::Uplink(Some(name.to_owned()))),
            Some(("task", task)) if !task.is_empty() => Ok(Self::Task(task.to_owned())),
            _ => Err(Nowhere(text.to_owned())),
        }
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uplink(None) => f.write_str("uplink"),
            Self::Uplink(Some(name)) => write!(f, "uplink:{name}"),
            Self::Task(task) => write!(f, "task:{task}"),
        }
    }
}

/// A packet that is to be explained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Its source.
    pub from: SocketAddr,
    /// Its destination.
    pub to: SocketAddr,
    /// What it is.
    pub segment: Segment,
    /// Where it comes in.
    pub at: At,
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The packet.
    pub packet: Decoded,
    /// The interface that it comes in by.
    pub interface: String,
    /// The programs that see it, in their order.
    pub programs: Vec<Explained>,
    /// What was put back in the tables of flows.
    pub put_back: Vec<String>,
}

/// What one program does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explained {
    /// The program.
    pub program: &'static str,
    /// What the packet library decides over the live maps; `None` if it doesn't come to that.
    pub decided: Option<Decided>,
    /// What the attached program did; `None` if it didn't come to that.
    pub ran: Option<RunOutcome>,
    /// Where the two differ.
    pub differences: Vec<String>,
}

/// What the packet library decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Decided {
    /// Each lookup, and each thing that would be written.
    pub steps: Vec<Step>,
    /// Where the packet goes.
    pub verdict: String,
    /// What would be counted.
    pub counters: Vec<&'static str>,
    /// The packet afterwards.
    pub packet: Decoded,
}

/// What a program did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RunOutcome {
    /// The program's id.
    pub program_id: u32,
    /// What it returned.
    pub code: u32,
    /// The same, in words.
    pub returned: &'static str,
    /// The packet afterwards.
    pub packet: Decoded,
    /// Counters that moved meanwhile: this packet's, and those of packets that came at the same moment.
    pub counted: Vec<(&'static str, u64)>,
    /// What makes the run differ from a packet's; empty mostly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<&'static str>,
}

impl Explanation {
    /// Whether library and programs agree.
    pub fn agrees(&self) -> bool {
        self.programs.iter().all(|program| program.differences.is_empty())
    }
}

/// Explains what becomes of a packet on this node.
pub fn explain(live: &Live, question: &Question) -> Result<Explanation, InspectError> {
    let Question { from, to, segment, at } = question;
    let Some(config) = live.config()? else {
        return Err(InspectError::NotConfigured { path: live.pin_dir().to_owned() });
    };
    if !live.is_here() {
        return Err(InspectError::OtherNetns { path: live.pin_dir().to_owned() });
    }
    let place = Place::find(live, at)?;
    let frame = build(*from, *to, *segment, place.src, place.dst)
        .ok_or(InspectError::Families { from: from.ip(), to: to.ip() })?;
    let vxlan_port = config.vxlan_port.get();
    let recorder = Recorder::new(live);
    let walked = walk_through(&recorder, &place, &frame)?;
    let before = Kept::before(live, &recorder)?;
    let ran = run_through(live, &place, &frame);
    // Also where a program could not be run: another may have been.
    let put_back = before.put_back(live)?;
    let programs = compare(walked, ran?, vxlan_port);
    let packet = Decoded::read(&frame, frame.len() as u32, vxlan_port);
    Ok(Explanation { packet, interface: interface_name(place.ifindex), programs, put_back })
}

/// Where a packet comes in: an interface, and the frame's addresses there.
#[derive(Debug)]
struct Place {
    ifindex: u32,
    is_task: bool,
    has_xdp: bool,
    src: [u8; 6],
    dst: [u8; 6],
}

impl Place {
    fn find(live: &Live, at: &At) -> Result<Self, InspectError> {
        match at {
            At::Uplink(name) => Self::uplink(live, name.as_deref()),
            At::Task(task) => Self::task(live, task),
        }
    }

    fn uplink(live: &Live, name: Option<&str>) -> Result<Self, InspectError> {
        let pin_dir = live.pin_dir();
        let uplinks = programs::uplinks(pin_dir);
        let ifindex = match name {
            None => uplinks.first().map(|(ifindex, _)| *ifindex).ok_or(InspectError::NoUplink)?,
            Some(name) => {
                let known: Vec<&str> = uplinks.iter().map(|(_, name)| name.as_str()).collect();
                let index = programs::index_of(name)
                    .filter(|index| programs::attached(pin_dir, object::UPLINK_INGRESS, *index).is_some());
                index.ok_or_else(|| InspectError::UnknownUplink {
                    name: name.to_owned(),
                    known: known.join(", "),
                })?
            }
        };
        let has_xdp = programs::attached(pin_dir, object::UPLINK_XDP, ifindex).is_some();
        let dst = mac_of_interface(&interface_name(ifindex));
        Ok(Self { ifindex, is_task: false, has_xdp, src: NEIGHBOUR, dst })
    }

    fn task(live: &Live, task: &str) -> Result<Self, InspectError> {
        let by_addr = task.parse::<IpAddr>().ok();
        let by_name = by_addr.is_none().then(|| programs::index_of(task)).flatten();
        let mut found: Vec<(u32, Iface<Be32>)> = Vec::new();
        live.v4.ifaces.read(|ifindex: u32, iface: Iface<Be32>| {
            if by_name == Some(ifindex) || by_addr == Some(iface.addr.ip()) {
                found.push((ifindex, iface));
            }
        })?;
        // An endpoint has its IPv4 address as the lowest bits of its IPv6 address, and its frame by that.
        let mut found6 = BTreeSet::new();
        live.v6.ifaces.read(|ifindex: u32, iface: Iface<Ip6>| {
            if by_addr == Some(iface.addr.ip()) {
                found6.insert(ifindex);
            }
        })?;
        for ifindex in found6 {
            let iface: Option<Iface<Be32>> = live.v4.ifaces.get(&ifindex)?;
            found.extend(iface.map(|iface| (ifindex, iface)));
        }
        match &found[..] {
            [] => Err(InspectError::UnknownTask { task: task.to_owned() }),
            [(ifindex, iface)] => Ok(Self {
                ifindex: *ifindex,
                is_task: true,
                has_xdp: false,
                src: mac_of(iface.addr),
                dst: mac_of(iface.gateway),
            }),
            several => {
                let interfaces: Vec<String> =
                    several.iter().map(|(ifindex, _)| interface_name(*ifindex)).collect();
                Err(InspectError::AmbiguousTask { task: task.to_owned(), interfaces: interfaces.join(", ") })
            }
        }
    }
}

/// The Ethernet address of an interface; that of nobody if it has none.
fn mac_of_interface(name: &str) -> [u8; 6] {
    let mut addresses =
        nix::ifaddrs::getifaddrs().into_iter().flatten().filter(|address| address.interface_name == name);
    let mac = |address: nix::ifaddrs::InterfaceAddress| address.address?.as_link_addr()?.addr();
    addresses.find_map(mac).unwrap_or_default()
}

/// The programs that see a packet, as the library does their work. What XDP sends on, TC doesn't see.
fn walk_through(recorder: &Recorder<'_>, place: &Place, frame: &[u8]) -> Result<Vec<Walked>, DataplaneError> {
    if place.is_task {
        return Ok(vec![walk::on_task(recorder, frame, place.ifindex)?]);
    }
    let mut walked = Vec::new();
    if place.has_xdp {
        walked.push(walk::on_uplink_xdp(recorder, frame, place.ifindex)?);
    }
    if walked.last().is_none_or(|last| last.code == XDP_PASS) {
        walked.push(walk::on_uplink(recorder, frame)?);
    }
    Ok(walked)
}

/// What a program left, before it is put in words.
struct Raw {
    program: &'static str,
    id: u32,
    ran: Ran,
    counted: Vec<(Counter, u64)>,
    note: Option<&'static str>,
}

/// The same by the attached programs.
fn run_through(live: &Live, place: &Place, frame: &[u8]) -> Result<Vec<Raw>, InspectError> {
    if place.is_task {
        return Ok(vec![run(live, object::FROM_TASK, place.ifindex, frame)?]);
    }
    let mut ran = Vec::new();
    if place.has_xdp {
        ran.push(run(live, object::UPLINK_XDP, place.ifindex, frame)?);
    }
    if ran.last().is_none_or(|last: &Raw| last.ran.code == XDP_PASS) {
        ran.push(run(live, object::UPLINK_INGRESS, place.ifindex, frame)?);
    }
    Ok(ran)
}

/// Said of an XDP program that had to be run on another interface.
const BY_LOOPBACK: &str =
    "the kernel ran it as if the packet came in by the loopback, as the uplink has no XDP in its driver";

fn run(live: &Live, name: &'static str, ifindex: u32, frame: &[u8]) -> Result<Raw, InspectError> {
    let Attached { id, fd } =
        programs::attached(live.pin_dir(), name, ifindex).ok_or(InspectError::NoProgram { name })?;
    let failed = |source| InspectError::TestRun { name, source };
    let before = read_counters(live.pin_dir())?;
    let (ran, note) = if name == object::UPLINK_XDP {
        let (ran, by_uplink) = test_run::run_xdp(fd.as_fd(), frame, ifindex).map_err(failed)?;
        (ran, (!by_uplink).then_some(BY_LOOPBACK))
    } else {
        (test_run::run_tc(fd.as_fd(), frame, ifindex).map_err(failed)?, None)
    };
    let after = read_counters(live.pin_dir())?;
    let moved =
        after.into_iter().zip(before).map(|((counter, after), (_, before))| (counter, after - before));
    Ok(Raw { program: name, id, ran, counted: moved.filter(|(_, by)| *by > 0).collect(), note })
}

/// Puts what was decided beside what was done.
fn compare(walked: Vec<Walked>, ran: Vec<Raw>, vxlan_port: u16) -> Vec<Explained> {
    let names = [object::UPLINK_XDP, object::UPLINK_INGRESS, object::FROM_TASK];
    let (mut walked, mut ran) = (walked.into_iter().peekable(), ran.into_iter().peekable());
    let mut programs = Vec::new();
    for name in names {
        let walked = walked.next_if(|walked| walked.program == name);
        let ran = ran.next_if(|ran| ran.program == name);
        if walked.is_none() && ran.is_none() {
            continue;
        }
        let differences = differences(walked.as_ref(), ran.as_ref());
        programs.push(Explained {
            program: name,
            decided: walked.map(|walked| decided(walked, vxlan_port)),
            ran: ran.map(|ran| outcome(ran, name, vxlan_port)),
            differences,
        });
    }
    programs
}

fn decided(walked: Walked, vxlan_port: u16) -> Decided {
    let Walked { program: _, steps, verdict, code: _, counters, output } = walked;
    let packet = Decoded::read(&output, output.len() as u32, vxlan_port);
    Decided { steps, verdict, counters: counters.into_iter().map(Counter::name).collect(), packet }
}

fn outcome(raw: Raw, name: &str, vxlan_port: u16) -> RunOutcome {
    let Raw { program: _, id, ran: Ran { code, output }, counted, note } = raw;
    RunOutcome {
        program_id: id,
        code,
        returned: returned(name, code),
        packet: Decoded::read(&output, output.len() as u32, vxlan_port),
        counted: counted.into_iter().map(|(counter, by)| (counter.name(), by)).collect(),
        note,
    }
}

/// A program's return value, as linux/bpf.h and linux/pkt_cls.h call it.
fn returned(program: &str, code: u32) -> &'static str {
    match (program == object::UPLINK_XDP, code) {
        (true, XDP_DROP) => "XDP_DROP",
        (true, XDP_PASS) => "XDP_PASS: on to the stack, and so to TC",
        (true, XDP_TX) => "XDP_TX: out of the interface that it came in by",
        (true, XDP_REDIRECT) => "XDP_REDIRECT: out of another interface",
        (true, _) => "XDP_ABORTED",
        (false, TC_UNSPEC) => "TC_ACT_UNSPEC: on to the host's stack",
        (false, TC_SHOT) => "TC_ACT_SHOT: dropped",
        (false, TC_REDIRECT) => "TC_ACT_REDIRECT: to another interface",
        (false, _) => "another code than Shoal's programs have",
    }
}

/// Where what was decided and what was done differ.
fn differences(walked: Option<&Walked>, ran: Option<&Raw>) -> Vec<String> {
    let (walked, raw) = match (walked, ran) {
        (Some(walked), Some(ran)) => (walked, ran),
        (Some(_), None) => {
            return vec!["the attached programs did not let the packet come to this one".to_owned()];
        }
        (None, Some(_)) => return vec!["by the maps, the packet does not come to this program".to_owned()],
        (None, None) => return Vec::new(),
    };
    let name = walked.program;
    let mut differences = Vec::new();
    // Out of the same interface, or another one: which it is depends on where the packet came in.
    let sends = |code| name == object::UPLINK_XDP && matches!(code, XDP_TX | XDP_REDIRECT);
    let same = walked.code == raw.ran.code || raw.note.is_some() && sends(walked.code) && sends(raw.ran.code);
    if !same {
        differences.push(format!(
            "the program returned {}, where {} was expected",
            returned(name, raw.ran.code),
            returned(name, walked.code)
        ));
    }
    // What else was counted may be other packets' doing.
    for counter in &walked.counters {
        if !raw.counted.iter().any(|(counted, _)| counted == counter) {
            let instead: Vec<&str> = raw.counted.iter().map(|(counted, _)| counted.name()).collect();
            let instead = if instead.is_empty() { "nothing".to_owned() } else { instead.join(", ") };
            differences.push(format!("{} was to be counted, and {instead} was", counter.name()));
        }
    }
    if walked.output != raw.ran.output {
        differences.push("the packet that came out is another".to_owned());
    }
    differences
}

/// What the tables of flows held before a run, where it may change them.
struct Kept {
    v4: KeptFamily<Be32>,
    v6: KeptFamily<Ip6>,
}

struct KeptFamily<A> {
    sent: KeptTable<FlowKey<A>, mesh_common::map::Sent>,
    opening: KeptTable<FlowKey<A>, Flow<A>>,
    flows: KeptTable<FlowKey<A>, Flow<A>>,
}

type KeptTable<K, V> = Vec<(K, Option<V>)>;

impl Kept {
    fn before(live: &Live, recorder: &Recorder<'_>) -> Result<Self, DataplaneError> {
        Ok(Self { v4: KeptFamily::before(live, recorder)?, v6: KeptFamily::before(live, recorder)? })
    }

    fn put_back(self, live: &Live) -> Result<Vec<String>, DataplaneError> {
        let mut done = self.v4.put_back(live)?;
        done.extend(self.v6.put_back(live)?);
        Ok(done)
    }
}

impl<A: Side> KeptFamily<A> {
    fn before(live: &Live, recorder: &Recorder<'_>) -> Result<Self, DataplaneError> {
        let maps = A::maps(live);
        let written = A::written(recorder).borrow();
        let Written { sent, opening, flows, fragments: _ } = &*written;
        // An entry that the walk looked for at one stage may be written at the other.
        let both: BTreeSet<_> = opening.touched.union(&flows.touched).copied().collect();
        Ok(Self {
            sent: kept(&maps.sent, &sent.touched)?,
            opening: kept(&maps.opening, &both)?,
            flows: kept(&maps.flows, &both)?,
        })
    }

    fn put_back(mut self, live: &Live) -> Result<Vec<String>, DataplaneError> {
        let maps = A::maps(live);
        self.expect_replies(live)?;
        let mut done = Vec::new();
        let named =
            |words: &'static str| move |key: &FlowKey<A>| format!("{words}: {}", words::flow_key(key));
        put_back(&maps.sent, self.sent, named("sent"), &mut done)?;
        put_back(&maps.opening, self.opening, named("opening"), &mut done)?;
        put_back(&maps.flows, self.flows, named("established"), &mut done)?;
        Ok(done)
    }

    /// A program may have chosen another backend, or another port for the client, than the walk: adds the replies' entry of
    /// each flow that is there since.
    fn expect_replies(&mut self, live: &Live) -> Result<(), DataplaneError> {
        let maps = A::maps(live);
        for (key, before) in self.opening.clone() {
            let Some(request): Option<Flow<A>> = maps.opening.get(&key)? else { continue };
            if before.is_some() || request.kind != FlowKind::TO_BACKEND {
                continue;
            }
            let Some(backend): Option<Backend<A>> = maps.backends.get(&request.backend)? else { continue };
            let reply_key = FlowKey {
                src: backend.addr,
                dst: key.src,
                src_port: request.port,
                dst_port: request.client_port,
                scope: backend.vni << 8 | u32::from(key.protocol()),
            };
            let reply: Option<Flow<A>> = maps.opening.get(&reply_key)?;
            let is_its =
                reply.is_some_and(|reply| reply.addr == key.dst && reply.client_port == key.src_port);
            if is_its && !self.opening.iter().any(|(known, _)| *known == reply_key) {
                self.opening.push((reply_key, None));
            }
        }
        Ok(())
    }
}

fn kept<K: Pod + Ord, V: Pod + Default>(
    map: &PinnedMap,
    keys: &BTreeSet<K>,
) -> Result<KeptTable<K, V>, DataplaneError> {
    keys.iter().map(|key| Ok((*key, map.get(key)?))).collect()
}

fn put_back<K: Pod, V: Pod + Default + PartialEq>(
    map: &PinnedMap,
    kept: KeptTable<K, V>,
    named: impl Fn(&K) -> String,
    done: &mut Vec<String>,
) -> Result<(), DataplaneError> {
    for (key, before) in kept {
        let now: Option<V> = map.get(&key)?;
        match before {
            _ if now == before => continue,
            Some(before) => map.write(&[(key, before)])?,
            None => map.remove(&[key])?,
        }
        done.push(named(&key));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_read_back_as_written_and_others_are_refused() {
        for text in ["uplink", "uplink:eth0", "task:10.0.0.5", "task:fd00::5", "task:sh0123456789a"] {
            assert_eq!(text.parse::<At>().unwrap().to_string(), text);
        }
        for text in ["", "task", "task:", "uplink:", "eth0", "host:lo"] {
            assert!(text.parse::<At>().unwrap_err().to_string().contains("uplink:INTERFACE"), "{text}");
        }
    }

    fn walked(code: u32, counters: &[Counter]) -> Walked {
        Walked {
            program: object::UPLINK_XDP,
            steps: Vec::new(),
            verdict: String::new(),
            code,
            counters: counters.to_vec(),
            output: vec![1],
        }
    }

    fn raw(code: u32, counted: &[Counter], note: Option<&'static str>) -> Raw {
        let counted = counted.iter().map(|counter| (*counter, 1)).collect();
        Raw { program: object::UPLINK_XDP, id: 7, ran: Ran { code, output: vec![1] }, counted, note }
    }

    #[test]
    fn agreement_is_told_from_differences() {
        let forwarded = [Counter::MeshForwarded];
        let expected = walked(XDP_TX, &forwarded);
        assert!(differences(Some(&expected), Some(&raw(XDP_TX, &forwarded, None))).is_empty());
        assert!(
            differences(Some(&expected), Some(&raw(XDP_REDIRECT, &forwarded, Some(BY_LOOPBACK)))).is_empty(),
            "by the loopback, the way out is another interface"
        );
        let told = differences(Some(&expected), Some(&raw(XDP_PASS, &[Counter::Passed], None)));
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].contains("XDP_PASS") && told[0].contains("XDP_TX"), "{told:?}");
        assert_eq!(differences(Some(&expected), None).len(), 1);
        assert_eq!(differences(None, Some(&raw(XDP_TX, &[], None))).len(), 1);
    }
}
