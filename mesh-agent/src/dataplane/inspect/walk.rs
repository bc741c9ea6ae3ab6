//! The packet library over the live maps: what each program would do with a packet, called as the programs call it.

use std::net::IpAddr;

use mesh_common::addr::Ip6;
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::vxlan::VNI_MESH_REQUEST;
use mesh_datapath::encap::{encapsulate, fits};
use mesh_datapath::header::{ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use mesh_datapath::packet::{Fault, Packet as _};
use mesh_datapath::parse::{Fragment, parse_ethernet};
use mesh_datapath::tables::{AddrTables, Tables as _};
use mesh_datapath::translation::Work;
use mesh_datapath::uplink::{Decision, Remote, decide};
use mesh_datapath::verdict::{Action, Verdict};
use mesh_datapath::{answer, mesh, task, translation, uplink};

use super::packet::Bytes;
use super::recorder::{Recorder, Step};
use super::{Side, interface_name, words};
use crate::dataplane::error::DataplaneError;
use crate::dataplane::object;

/// `TC_ACT_UNSPEC`: on to the next program, and then to the stack.
pub(super) const TC_UNSPEC: u32 = u32::MAX;
/// `TC_ACT_SHOT`.
pub(super) const TC_SHOT: u32 = 2;
/// `TC_ACT_REDIRECT`.
pub(super) const TC_REDIRECT: u32 = 7;
/// `XDP_DROP`.
pub(super) const XDP_DROP: u32 = 1;
/// `XDP_PASS`.
pub(super) const XDP_PASS: u32 = 2;
/// `XDP_TX`.
pub(super) const XDP_TX: u32 = 3;
/// `XDP_REDIRECT`.
pub(super) const XDP_REDIRECT: u32 = 4;

/// What one program would do.
#[derive(Debug)]
pub(super) struct Walked {
    pub(super) program: &'static str,
    pub(super) steps: Vec<Step>,
    /// Where the packet goes, in words.
    pub(super) verdict: String,
    /// What the program would return.
    pub(super) code: u32,
    /// What it would count.
    pub(super) counters: Vec<Counter>,
    /// The packet afterwards.
    pub(super) output: Vec<u8>,
}

/// A packet that came in by an uplink with the index `ifindex`, as the XDP program sees it.
pub(super) fn on_uplink_xdp(
    recorder: &Recorder<'_>,
    bytes: &[u8],
    ifindex: u32,
) -> Result<Walked, DataplaneError> {
    let mut packet = Bytes(bytes.to_vec());
    let left = (XDP_PASS, None, "XDP leaves it to TC".to_owned());
    let (code, counter, verdict) = match parse_ethernet(&packet).map(|ethernet| ethernet.ethertype) {
        Ok(ETHERTYPE_IPV4) => xdp::<Be32>(recorder, &mut packet, ifindex).unwrap_or(left),
        Ok(ETHERTYPE_IPV6) => xdp::<Ip6>(recorder, &mut packet, ifindex).unwrap_or(left),
        _ => left,
    };
    Ok(Walked {
        program: object::UPLINK_XDP,
        steps: recorder.take_steps()?,
        verdict,
        code,
        counters: counter.into_iter().collect(),
        output: packet.0,
    })
}

/// A packet that came in by an uplink, as the TC program sees it.
pub(super) fn on_uplink(recorder: &Recorder<'_>, bytes: &[u8]) -> Result<Walked, DataplaneError> {
    let mut packet = Bytes(bytes.to_vec());
    let verdict = match parse_ethernet(&packet).map(|ethernet| ethernet.ethertype) {
        Ok(ETHERTYPE_IPV4) => tc::<Be32>(recorder, &mut packet, None),
        Ok(ETHERTYPE_IPV6) => tc::<Ip6>(recorder, &mut packet, None),
        _ => Verdict::PASS,
    };
    ended(recorder, object::UPLINK_INGRESS, verdict, packet)
}

/// A packet that a task sent by the interface whose host side is `ifindex`.
pub(super) fn on_task(recorder: &Recorder<'_>, bytes: &[u8], ifindex: u32) -> Result<Walked, DataplaneError> {
    let mut packet = Bytes(bytes.to_vec());
    let verdict = match task::classify(&packet, recorder, ifindex) {
        task::Sent::Ipv4 => tc::<Be32>(recorder, &mut packet, Some(ifindex)),
        task::Sent::Ipv6 => task::answer_discovery(&mut packet, recorder, ifindex)
            .unwrap_or_else(|| tc::<Ip6>(recorder, &mut packet, Some(ifindex))),
        task::Sent::Arp => task::answer_arp(&mut packet, recorder, ifindex),
        task::Sent::Refused(reason) => Verdict::drop(reason),
    };
    ended(recorder, object::FROM_TASK, verdict, packet)
}

fn ended(
    recorder: &Recorder<'_>,
    program: &'static str,
    verdict: Verdict,
    packet: Bytes,
) -> Result<Walked, DataplaneError> {
    let words = told(recorder, &verdict);
    let code = match verdict.action() {
        Action::Pass => TC_UNSPEC,
        Action::Drop | Action::Echo | Action::Answer(_) | Action::Dial => TC_SHOT,
        Action::Deliver { .. } | Action::Tunnel { .. } | Action::Route | Action::Reflect | Action::Host => {
            TC_REDIRECT
        }
    };
    let counters = [verdict.counter].into_iter().chain(verdict.made()).collect();
    Ok(Walked { program, steps: recorder.take_steps()?, verdict: words, code, counters, output: packet.0 })
}

/// Reads an IP packet, decides on it, and does that: of a task with this interface, or from an uplink.
fn tc<A: Side>(recorder: &Recorder<'_>, packet: &mut Bytes, ifindex: Option<u32>) -> Verdict {
    let (vni, otherwise) = match ifindex {
        None => (VNI_MESH_REQUEST, Verdict::PASS),
        Some(ifindex) => {
            let iface = AddrTables::<Be32>::iface(recorder, ifindex);
            (iface.map_or(0, |iface| iface.vni), Verdict::drop(Counter::DropMalformed))
        }
    };
    let Ok(parsed) = A::parse(packet) else { return otherwise };
    let mut work = Work::new(parsed);
    if work.read(packet, recorder, vni, otherwise).is_ok() {
        match ifindex {
            None => uplink::from_uplink(packet, recorder, &mut work),
            Some(ifindex) => task::from_task(packet, recorder, ifindex, &mut work),
        }
    }
    let mut verdict = translation::apply(packet, &work);
    if let (Action::Dial, Some(ifindex)) = (verdict.action(), ifindex) {
        recorder.note("ports", "the task dialled a published port by an address of this node".to_owned());
        mesh::dial(packet, recorder, ifindex, &mut work);
        verdict = translation::apply(packet, &work);
    }
    match verdict.action() {
        Action::Answer(answer) => answer::make::<A, _>(packet, recorder, verdict.counter, answer),
        _ => verdict,
    }
}

/// What the XDP program does: code, counter, words; `None`: it leaves the packet to TC.
fn xdp<A: Side>(
    recorder: &Recorder<'_>,
    packet: &mut Bytes,
    ifindex: u32,
) -> Option<(u32, Option<Counter>, String)> {
    let config = recorder.config()?;
    let parsed = A::parse(packet).ok()?;
    let tuple = parsed.tuple().filter(|_| parsed.fragment == Fragment::Whole)?;
    match decide::<A>(recorder, config, &parsed, &tuple) {
        Decision::Remote(remote) => forward::<A>(recorder, packet, &remote, ifindex),
        Decision::Refuse(reason @ (Counter::DropNotMember | Counter::DropSourceRefused)) => {
            Some((XDP_DROP, Some(reason), dropped(reason)))
        }
        Decision::Pass
        | Decision::Tunnel
        | Decision::Local(_)
        | Decision::Search(_)
        | Decision::Refuse(_) => None,
    }
}

fn forward<A: Side>(
    recorder: &Recorder<'_>,
    packet: &mut Bytes,
    remote: &Remote,
    ifindex: u32,
) -> Option<(u32, Option<Counter>, String)> {
    let (config, peer) = (recorder.config()?, recorder.peer(remote.peer)?);
    let family = if peer.vtep.to_mapped().is_some() { 4 } else { 6 };
    if peer.expires_ns == 0 || !fits(packet.len(), peer.mtu, family) {
        return None;
    }
    if encapsulate::<A, _>(packet, config, peer, remote) == Err(Fault) {
        let reason = Counter::DropRewriteFailed;
        return Some((XDP_DROP, Some(reason), dropped(reason)));
    }
    let code = if peer.ifindex == ifindex { XDP_TX } else { XDP_REDIRECT };
    let out = interface_name(peer.ifindex);
    let words = format!("sent to node {} in VXLAN {VNI_MESH_REQUEST}, out of {out}", IpAddr::from(peer.vtep));
    Some((code, Some(Counter::MeshForwarded), words))
}

/// A verdict in words.
fn told(recorder: &Recorder<'_>, verdict: &Verdict) -> String {
    let words = match verdict.action() {
        Action::Pass => "left to the host's stack".to_owned(),
        Action::Drop | Action::Answer(_) | Action::Dial | Action::Echo => dropped(verdict.counter),
        Action::Deliver { ifindex } => format!("delivered to the task behind {}", interface_name(ifindex)),
        Action::Tunnel { vni, peer, .. } => {
            format!("sent to {} in VXLAN {vni} ({})", recorder.node(peer), words::vni(vni))
        }
        Action::Route => "put on the wire by the host's routes".to_owned(),
        Action::Reflect => "sent back out of the interface that it came in by".to_owned(),
        Action::Host => "handed to the host's stack by shoal0".to_owned(),
    };
    match verdict.made() {
        Some(made) => {
            let answer = made.name().trim_end_matches("_sent").replace('_', " ");
            format!("{}; its sender is told by a {answer}, {words}", dropped(verdict.counter))
        }
        None => words,
    }
}

fn dropped(reason: Counter) -> String {
    format!("dropped as {}: {}", reason.name(), reason.description())
}
