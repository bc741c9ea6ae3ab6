//! The packet library over the live maps: what each program would do with a packet, called as the programs call it.

use std::net::IpAddr;

use mesh_common::addr::Ip6;
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::vxlan::VNI_MESH_REQUEST;
use mesh_datapath::bytes::Bytes;
use mesh_datapath::family::Family as _;
use mesh_datapath::hook::{self, Hook, XdpEnd};
use mesh_datapath::verdict::{Action, Verdict};

use super::recorder::{Recorder, Step};
use super::{interface_name, words};
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
    let mut packet = Bytes::new(bytes.to_vec());
    // What is explained is no mesh reply: no way to a client is asked for.
    let (code, counter, verdict) = match hook::run_xdp(&mut packet, recorder, |_| None) {
        XdpEnd::Left => (XDP_PASS, None, "XDP leaves it to TC".to_owned()),
        XdpEnd::Dropped(reason) => (XDP_DROP, Some(reason), dropped(reason)),
        XdpEnd::Sent { ifindex: out, counter } => {
            let code = if out == ifindex { XDP_TX } else { XDP_REDIRECT };
            (code, Some(counter), forwarded(&packet, out))
        }
    };
    Ok(Walked {
        program: object::UPLINK_XDP,
        steps: recorder.take_steps()?,
        verdict,
        code,
        counters: counter.into_iter().collect(),
        output: packet.bytes,
    })
}

/// A packet that came in by an uplink, as the TC program sees it.
pub(super) fn on_uplink(recorder: &Recorder<'_>, bytes: &[u8]) -> Result<Walked, DataplaneError> {
    in_tc(recorder, object::UPLINK_INGRESS, Hook::Uplink, bytes)
}

/// A packet that a task sent by the interface whose host side is `ifindex`.
pub(super) fn on_task(recorder: &Recorder<'_>, bytes: &[u8], ifindex: u32) -> Result<Walked, DataplaneError> {
    in_tc(recorder, object::FROM_TASK, Hook::Task(ifindex), bytes)
}

fn in_tc(
    recorder: &Recorder<'_>,
    program: &'static str,
    hook: Hook,
    bytes: &[u8],
) -> Result<Walked, DataplaneError> {
    let mut packet = Bytes::new(bytes.to_vec());
    // What is explained is short: every way to a client carries it.
    let dialled = || {
        recorder.note("ports", "the task dialled a published port by an address of this node".to_owned());
    };
    let verdict = hook::run(hook, &mut packet, recorder, |_| None, dialled);
    let words = told(recorder, &verdict);
    let code = match verdict.action() {
        Action::Pass => TC_UNSPEC,
        Action::Drop | Action::Echo | Action::Answer(_) | Action::Dial => TC_SHOT,
        Action::Deliver { .. }
        | Action::Tunnel { .. }
        | Action::Route
        | Action::Reflect
        | Action::Host
        | Action::Arrive { .. } => TC_REDIRECT,
    };
    let counters = [verdict.counter].into_iter().chain(verdict.made()).collect();
    Ok(Walked {
        program,
        steps: recorder.take_steps()?,
        verdict: words,
        code,
        counters,
        output: packet.bytes,
    })
}

/// What was put into VXLAN, in words: the outer header says for which node.
fn forwarded(packet: &Bytes, out: u32) -> String {
    let node = match Be32::parse(packet) {
        Ok(outer) => IpAddr::V4(outer.dst.into()),
        Err(_) => {
            Ip6::parse(packet).map_or(IpAddr::from(Ip6::default()), |outer| IpAddr::V6(outer.dst.into()))
        }
    };
    format!("sent to node {node} in VXLAN {VNI_MESH_REQUEST}, out of {}", interface_name(out))
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
        Action::Arrive { ifindex } => format!("taken as coming in by {}", interface_name(ifindex)),
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
