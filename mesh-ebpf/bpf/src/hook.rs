//! The TC programs: which of the packet logic's functions gets a frame.
//!
//! Each family is a function of its own in the kernel. Their stacks are not added up then, and neither pays for what the
//! other needs.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::programs::TcContext;
use mesh_common::addr::Ip6;
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::vxlan::VNI_MESH_REQUEST;
use mesh_datapath::family::Family;
use mesh_datapath::header::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_NACK};
use mesh_datapath::hook::is_known_to_host;
use mesh_datapath::host::from_host;
use mesh_datapath::overlay::{Arrival, from_backend, from_ingress};
use mesh_datapath::parse::parse_ethernet;
use mesh_datapath::related::Quote;
use mesh_datapath::tables::{AddrTables, Tables as _};
use mesh_datapath::task::{self, Sent, answer_arp, answer_discovery, from_task};
use mesh_datapath::translation::{self, Work};
use mesh_datapath::uplink::{claims_wireguard, from_uplink};
use mesh_datapath::verdict::{Action, Verdict};
use mesh_datapath::{answer, arp, mesh, nack, neighbor, refuse};

use crate::act::{carry_out, send_on};
use crate::maps::{Desk as _, Maps, count, tell_nack};
use crate::next_hop::Routed;
use crate::tc::Skb;

/// What these functions return: the desk is ready for the next one; or there is nothing on it to go on with.
const READY: u64 = 0;
const NOT: u64 = 1;

/// Declares functions of the kernel's own, for each step of the way that a packet takes: the packet is the one of the
/// program's context, the work is what lies on the family's desk.
macro_rules! steps {
    ($(fn $name:ident<$addr:ty>($packet:ident, $work:ident $(, $argument:ident: $type:ty)*) $body:block)*) => {$(
        #[inline(never)]
        fn $name(skb: *mut __sk_buff $(, $argument: $type)*) -> u64 {
            let mut packet = Skb::again(skb);
            let $packet = &mut packet;
            let Some($work) = <$addr>::desk() else { return NOT };
            // SAFETY: No other program runs on this CPU until this one ends. All-zero bytes, which the place begins with,
            // are a value, and whoever wrote it since wrote values.
            let $work = unsafe { &mut *$work };
            $body
        }
    )*};
}

steps! {
    fn read_ipv4<Be32>(packet, work, vni: u32, passes: u32) { read(packet, work, vni, passes) }
    fn read_ipv6<Ip6>(packet, work, vni: u32, passes: u32) { read(packet, work, vni, passes) }
    fn uplink_ipv4<Be32>(packet, work) { ready(from_uplink(packet, &Maps, work)) }
    fn uplink_ipv6<Ip6>(packet, work) { ready(from_uplink(packet, &Maps, work)) }
    fn task_ipv4<Be32>(packet, work, ifindex: u32) { ready(from_task(packet, &Maps, ifindex, work)) }
    fn task_ipv6<Ip6>(packet, work, ifindex: u32) { ready(from_task(packet, &Maps, ifindex, work)) }
    fn dial_ipv4<Be32>(packet, work, ifindex: u32) { ready(mesh::dial(packet, &Maps, ifindex, work)) }
    fn dial_ipv6<Ip6>(packet, work, ifindex: u32) { ready(mesh::dial(packet, &Maps, ifindex, work)) }
    fn ingress_ipv4<Be32>(packet, work, arrival: &Arrival) { ready(from_ingress(packet, &Maps, arrival, work)) }
    fn ingress_ipv6<Ip6>(packet, work, arrival: &Arrival) { ready(from_ingress(packet, &Maps, arrival, work)) }
    fn backend_ipv4<Be32>(packet, work, arrival: &Arrival) { ready(from_backend(packet, &Maps, arrival, work)) }
    fn backend_ipv6<Ip6>(packet, work, arrival: &Arrival) { ready(from_backend(packet, &Maps, arrival, work)) }
    fn host_ipv4<Be32>(packet, work) { ready(from_host(packet, &Maps, work)) }
    fn host_ipv6<Ip6>(packet, work) { ready(from_host(packet, &Maps, work)) }
    fn write_ipv4<Be32>(packet, work) { write(packet, work) }
    fn write_ipv6<Ip6>(packet, work) { write(packet, work) }
    fn answer_ipv4<Be32>(packet, work) { answer(packet, work) }
    fn answer_ipv6<Ip6>(packet, work) { answer(packet, work) }
    fn act_ipv4<Be32>(packet, work) { act(packet, work) }
    fn act_ipv6<Ip6>(packet, work) { act(packet, work) }
}

#[inline(always)]
fn ready((): ()) -> u64 {
    READY
}

/// Reads a packet of the network `vni`, which passes or is dropped if it can't be read.
#[inline(always)]
fn read<A: Quote>(packet: &Skb, work: &mut Work<A>, vni: u32, passes: u32) -> u64
where
    Maps: AddrTables<A>,
{
    let otherwise = if passes == 0 { Verdict::drop(Counter::DropMalformed) } else { Verdict::PASS };
    match work.read(packet, &Maps, vni, otherwise) {
        Ok(()) => READY,
        Err(_) => NOT,
    }
}

/// What [`write`] says is to be done next: to carry the verdict out, or something before. [`act`] says so as well, in place
/// of the program's return value.
const ACT: u64 = 0;
const DIAL: u64 = 2;
const ANSWER: u64 = 3;

/// Writes into the packet what was planned.
#[inline(always)]
fn write<A: Quote>(packet: &mut Skb, work: &mut Work<A>) -> u64 {
    work.plan.verdict = translation::apply(packet, work);
    match work.plan.verdict.action() {
        Action::Dial => DIAL,
        Action::Answer(_) => ANSWER,
        _ => ACT,
    }
}

/// Makes the packet the answer to itself.
#[inline(always)]
fn answer<A: refuse::Answer>(packet: &mut Skb, work: &mut Work<A>) -> u64
where
    Maps: AddrTables<A>,
{
    let verdict = work.plan.verdict;
    if let Action::Answer(answer) = verdict.action() {
        // While it still is what was dropped.
        packet.exemplify(verdict.counter);
        work.plan.verdict = answer::make(packet, &Maps, verdict.counter, answer);
    }
    READY
}

/// Carries the verdict out.
#[inline(always)]
fn act<A: Family + Routed>(packet: &mut Skb, work: &mut Work<A>) -> u64 {
    let verdict = work.plan.verdict;
    if verdict.action() != Action::Route {
        return carry_out(packet, verdict) as u64;
    }
    match send_on(packet, &work.parsed, verdict) {
        Ok(code) => code as u64,
        Err(instead) => {
            work.plan.verdict = instead;
            ANSWER
        }
    }
}

/// A family's functions for all steps but the decision.
struct Steps {
    read: fn(*mut __sk_buff, u32, u32) -> u64,
    write: fn(*mut __sk_buff) -> u64,
    dial: fn(*mut __sk_buff, u32) -> u64,
    answer: fn(*mut __sk_buff) -> u64,
    act: fn(*mut __sk_buff) -> u64,
}

const IPV4: Steps =
    Steps { read: read_ipv4, write: write_ipv4, dial: dial_ipv4, answer: answer_ipv4, act: act_ipv4 };

const IPV6: Steps =
    Steps { read: read_ipv6, write: write_ipv6, dial: dial_ipv6, answer: answer_ipv6, act: act_ipv6 };

/// How a packet comes in.
struct Entry {
    /// The network that its fragments belong to.
    vni: u32,
    /// What can't be read passes.
    passes: bool,
    /// The interface, if it is a task's.
    ifindex: u32,
}

/// Reads a packet, has `decide` decide on it, writes what was planned, and carries that out.
#[inline(always)]
fn run(packet: &Skb, family: &Steps, entry: &Entry, decide: impl FnOnce(*mut __sk_buff) -> u64) -> i32 {
    // What a function returns must be looked at: otherwise LLVM leaves anything there, and the verifier refuses it.
    let skb = packet.raw();
    if (family.read)(skb, entry.vni, u32::from(entry.passes)) == READY && decide(skb) != READY {
        return TC_ACT_SHOT;
    }
    let mut next = (family.write)(skb);
    if next == DIAL {
        if (family.dial)(skb, entry.ifindex) != READY {
            return TC_ACT_SHOT;
        }
        next = (family.write)(skb);
    }
    if next != ANSWER {
        next = (family.act)(skb);
        if next != ANSWER {
            return next as i32;
        }
    }
    if (family.answer)(skb) != READY {
        return TC_ACT_SHOT;
    }
    (family.act)(skb) as i32
}

/// Answers a task's ARP request.
#[inline(never)]
fn task_arp(skb: *mut __sk_buff, ifindex: u32) -> i32 {
    let mut packet = Skb::again(skb);
    let verdict = answer_arp(&mut packet, &Maps, ifindex);
    carry_out(&mut packet, verdict)
}

/// Answers the host's ARP request.
#[inline(never)]
fn host_arp(skb: *mut __sk_buff) -> i32 {
    let mut packet = Skb::again(skb);
    let verdict = arp::answer(&mut packet, |addr| is_known_to_host(&Maps, &addr));
    carry_out(&mut packet, verdict)
}

/// What the functions for neighbour discovery return for any other packet: no program does.
const OTHER: i32 = i32::MIN;

/// Answers a task's neighbour discovery.
#[inline(never)]
fn task_discovery(skb: *mut __sk_buff, ifindex: u32) -> i32 {
    let mut packet = Skb::again(skb);
    match answer_discovery(&mut packet, &Maps, ifindex) {
        Some(verdict) => carry_out(&mut packet, verdict),
        None => OTHER,
    }
}

/// Answers the host's neighbour discovery.
#[inline(never)]
fn host_discovery(skb: *mut __sk_buff) -> i32 {
    let mut packet = Skb::again(skb);
    let Ok(parsed) = Ip6::parse(&packet) else { return OTHER };
    if !neighbor::concerns(&packet, &parsed) {
        return OTHER;
    }
    let verdict =
        neighbor::answer(&mut packet, &parsed, Ip6::default(), |addr| is_known_to_host(&Maps, addr));
    carry_out(&mut packet, verdict)
}

/// Takes a negative acknowledgement.
#[inline(never)]
fn overlay_nack(skb: *mut __sk_buff, arrival: &Arrival) -> i32 {
    let mut packet = Skb::again(skb);
    let counter = match nack::hear(&packet, &Maps, arrival) {
        Ok(nack) => {
            tell_nack(&nack);
            Counter::NackHeard
        }
        Err(reason) => reason,
    };
    refuse(&mut packet, counter)
}

/// Ends a packet that is of no use.
#[inline(always)]
fn refuse(packet: &mut Skb, reason: Counter) -> i32 {
    carry_out(packet, Verdict::drop(reason))
}

/// What comes in by an uplink. Not all of it is the mesh's.
const UPLINK: Entry = Entry { vni: VNI_MESH_REQUEST, passes: true, ifindex: 0 };
/// What comes from the host: packets to published ports.
const HOST: Entry = Entry { vni: VNI_MESH_REQUEST, passes: false, ifindex: 0 };

/// On an uplink.
#[inline(always)]
pub fn uplink(ctx: TcContext) -> i32 {
    let mut packet = Skb::new(ctx);
    match parse_ethernet(&packet).map(|ethernet| ethernet.ethertype) {
        Ok(ETHERTYPE_IPV4) => run(&packet, &IPV4, &UPLINK, |skb| uplink_ipv4(skb)),
        Ok(ETHERTYPE_IPV6) if claims_wireguard(&packet) => refuse(&mut packet, Counter::DropCleartext),
        Ok(ETHERTYPE_IPV6) => run(&packet, &IPV6, &UPLINK, |skb| uplink_ipv6(skb)),
        _ => {
            count(Counter::Passed);
            TC_ACT_UNSPEC
        }
    }
}

/// On the host side of a task's veth.
#[inline(always)]
pub fn task(ctx: TcContext) -> i32 {
    let mut packet = Skb::new(ctx);
    let ifindex = packet.ifindex();
    // The families of one endpoint are in the same network.
    let vni = AddrTables::<Be32>::iface(&Maps, ifindex).map_or(0, |iface| iface.vni);
    let entry = Entry { vni, passes: false, ifindex };
    match task::classify(&packet, &Maps, ifindex) {
        Sent::Ipv4 => run(&packet, &IPV4, &entry, |skb| task_ipv4(skb, ifindex)),
        Sent::Ipv6 => match task_discovery(packet.raw(), ifindex) {
            OTHER => run(&packet, &IPV6, &entry, |skb| task_ipv6(skb, ifindex)),
            code => code,
        },
        Sent::Arp => task_arp(packet.raw(), ifindex),
        Sent::Refused(reason) => refuse(&mut packet, reason),
    }
}

/// On the VXLAN device.
#[inline(always)]
pub fn overlay(ctx: TcContext) -> i32 {
    let mut packet = Skb::new(ctx);
    let Some(config) = Maps.config() else {
        return refuse(&mut packet, Counter::DropNotReady);
    };
    match packet.arrival(config.vtep) {
        Some(arrival) => arrived(&mut packet, &arrival),
        // Not from the tunnel.
        None => refuse(&mut packet, Counter::DropNotMember),
    }
}

/// A packet from the tunnel, which came as `arrival` says.
#[inline(always)]
pub fn arrived(packet: &mut Skb, arrival: &Arrival) -> i32 {
    let entry = Entry { vni: arrival.vni, passes: false, ifindex: 0 };
    let request = arrival.vni == VNI_MESH_REQUEST;
    match parse_ethernet(packet).map(|ethernet| ethernet.ethertype) {
        Ok(ETHERTYPE_IPV4) => run(packet, &IPV4, &entry, |skb| {
            if request { ingress_ipv4(skb, arrival) } else { backend_ipv4(skb, arrival) }
        }),
        Ok(ETHERTYPE_IPV6) => run(packet, &IPV6, &entry, |skb| {
            if request { ingress_ipv6(skb, arrival) } else { backend_ipv6(skb, arrival) }
        }),
        Ok(ETHERTYPE_NACK) => overlay_nack(packet.raw(), arrival),
        Ok(_) => refuse(packet, Counter::DropProtocol),
        Err(_) => refuse(packet, Counter::DropMalformed),
    }
}

/// On `shoal0p`.
#[inline(always)]
pub fn host(ctx: TcContext) -> i32 {
    let mut packet = Skb::new(ctx);
    match parse_ethernet(&packet).map(|ethernet| ethernet.ethertype) {
        Ok(ETHERTYPE_IPV4) => run(&packet, &IPV4, &HOST, |skb| host_ipv4(skb)),
        Ok(ETHERTYPE_IPV6) => match host_discovery(packet.raw()) {
            OTHER => run(&packet, &IPV6, &HOST, |skb| host_ipv6(skb)),
            code => code,
        },
        Ok(ETHERTYPE_ARP) => host_arp(packet.raw()),
        Ok(_) => refuse(&mut packet, Counter::DropProtocol),
        Err(_) => refuse(&mut packet, Counter::DropMalformed),
    }
}
