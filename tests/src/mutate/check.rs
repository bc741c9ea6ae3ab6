//! What holds for every packet, whatever is in it.

use mesh_common::counter::Counter;
use mesh_datapath::verdict::Action;

use super::layout::{ETHERNET, Layout, TCP, UDP, word};
use crate::packet::End;
use crate::packet::family::Family;
use crate::packet::host::{Ended, Node};
use crate::packet::world::{BACK_IFINDEX, MTU, WEB_IFINDEX, WEB_TOO_IFINDEX};

/// The VXLAN port, and the header's first half in a valid packet.
const VXLAN_PORT: u16 = 4789;
const VXLAN_VALID: [u8; 4] = [0x08, 0, 0, 0];
/// VNI of mesh replies, as the second half of the header.
const VXLAN_MESH_REPLY: [u8; 4] = (mesh_common::vxlan::VNI_MESH_REPLY << 8).to_be_bytes();
/// Bytes of the ICMP header of an error.
const ICMP_ERROR: usize = 8;
/// Most bytes of layer 4 that an error quotes.
const QUOTED_MAX: usize = 20;

/// Bytes of layer 4 that a negative acknowledgement tells of.
const NACK_KEPT: usize = 20;
/// Its EtherType.
const ETHERTYPE_NACK: u16 = 0x88b5;

/// A packet before and after a hook.
#[derive(Debug, Clone, Copy)]
struct Passage<'p> {
    input: &'p [u8],
    output: &'p [u8],
}

/// Says what is wrong with how a packet ended.
pub fn check(node: &Node, input: &[u8], output: &[u8], ended: Ended) -> Result<(), String> {
    let passage = Passage { input, output };
    let Ended { end, counter, made } = ended;
    if let (Some(counter), End::Tc(_)) = (counter, end) {
        // What another node tells is for this one alone, and goes no further.
        let is_told = counter == Counter::NackHeard && made.is_none();
        let dropped = (end == End::Tc(Action::Drop) && !is_told) || made.is_some();
        ensure(counter.is_drop() == dropped, "the counter is not that of the verdict")?;
        let passed = end == End::Tc(Action::Pass);
        ensure((counter == Counter::Passed) == passed, "the counter is not that of the verdict")?;
    }
    match end {
        End::XdpPass => {
            ensure(counter.is_none(), "XDP counts what it leaves to TC")?;
            passage.unchanged()
        }
        End::XdpDrop | End::Tc(Action::Pass | Action::Drop) => match counter {
            Some(Counter::DropRewriteFailed) => Ok(()),
            // A reply may be too large for the way that it would take as what it has become.
            Some(Counter::DropTooBig) => passage.unchanged().or_else(|_| passage.carried()),
            _ => passage.unchanged(),
        },
        End::XdpTx | End::XdpRedirect => match counter {
            Some(Counter::MeshForwarded) => passage.encapsulated(node),
            Some(Counter::MeshReplied) => passage.decapsulated(),
            _ => Err("XDP sends it and says neither why".to_owned()),
        },
        End::Tc(Action::Deliver { ifindex }) => {
            let known = [WEB_IFINDEX, BACK_IFINDEX, WEB_TOO_IFINDEX].contains(&ifindex);
            ensure(known, "delivered to nobody")?;
            passage.carried()
        }
        End::Tc(Action::Tunnel { peer, vni, .. }) => {
            ensure(node.has_peer(peer), "sent to no node")?;
            ensure(vni != 0 && vni < 1 << 24, "sent under no VNI")?;
            passage.carried_or_answered(made)
        }
        End::Tc(Action::Route | Action::Host) => passage.carried_or_answered(made),
        End::Tc(Action::Arrive { .. }) => match made {
            Some(Counter::TooBigSent) => passage.answered_as_sent(),
            _ => Err("it comes in again, and is no answer".to_owned()),
        },
        End::Tc(Action::Reflect) => match (counter, made) {
            (Some(Counter::ArpAnswered), None) => passage.arp_answered(),
            (Some(Counter::NeighborAnswered), None) => passage.neighbour_answered(),
            (Some(Counter::EchoAnswered), None) => passage.echo_answered(),
            (_, Some(made)) => passage.answered(made),
            _ => Err("sent back, and no answer".to_owned()),
        },
        End::Tc(Action::Echo | Action::Dial | Action::Answer(_)) => {
            Err("it did not come to an end".to_owned())
        }
    }
}

/// Whether a packet that goes on may have another byte there: an end, or a checksum.
fn may_change(before: &Layout, at: usize) -> bool {
    let Layout { family, ip, l4, protocol, is_later, .. } = *before;
    at < ETHERNET
        || before.addresses().contains(&at)
        || family == Family::V4 && (ip + 10..ip + 12).contains(&at)
        || !is_later && matches!(protocol, TCP | UDP) && (l4..l4 + 4).contains(&at)
        || before.checksum().is_some_and(|checksum| (checksum..checksum + 2).contains(&at))
        // What an error quotes.
        || !is_later && protocol == family.icmp_protocol() && at >= l4 + ICMP_ERROR
}

fn ensure(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.to_owned()) }
}

impl Passage<'_> {
    fn unchanged(self) -> Result<(), String> {
        ensure(self.input == self.output, "it is changed")
    }

    /// The headers before, of a sound packet.
    fn before(self) -> Result<Layout, String> {
        Layout::read(self.input, 0).ok_or_else(|| "it goes on though it is unsound".to_owned())
    }

    /// The headers after.
    fn after(self) -> Result<Layout, String> {
        Layout::read(self.output, 0).ok_or_else(|| "it has become unsound".to_owned())
    }

    fn carried_or_answered(self, made: Option<Counter>) -> Result<(), String> {
        match made {
            Some(Counter::NackSent) => self.told_of(),
            Some(made) => self.answered(made),
            None => self.carried(),
        }
    }

    /// A negative acknowledgement: the packet as it came, under an EtherType of its own, and cut off behind its headers.
    fn told_of(self) -> Result<(), String> {
        let Self { input, output } = self;
        let end = input.len().min(self.before()?.l4 + NACK_KEPT);
        ensure(output.len() == end, "it is cut off elsewhere")?;
        ensure(output[ETHERNET - 2..ETHERNET] == ETHERTYPE_NACK.to_be_bytes(), "it is no acknowledgement")?;
        let is_the_packet =
            output[..ETHERNET - 2] == input[..ETHERNET - 2] && output[ETHERNET..] == input[ETHERNET..end];
        ensure(is_the_packet, "it tells of another packet")
    }

    /// Goes on: nothing but Ethernet addresses, ends and checksums is changed, and what was wrong with the checksums is as
    /// wrong as it was.
    fn carried(self) -> Result<(), String> {
        let Self { input, output } = self;
        let (before, after) = (self.before()?, self.after()?);
        ensure(input.len() == output.len(), "its length is changed")?;
        ensure(before == after, "its headers are moved")?;
        ensure(before.ip_residue(input) == after.ip_residue(output), "its IP checksum is wrong")?;
        ensure(before.residue(input) == after.residue(output), "its checksum is wrong")?;
        let changed = (0..input.len()).find(|at| input[*at] != output[*at] && !may_change(&before, *at));
        match changed {
            None => Ok(()),
            Some(at) => Err(format!("its byte {at} is changed")),
        }
    }

    /// In VXLAN, from the IP header on as it was.
    fn encapsulated(self, node: &Node) -> Result<(), String> {
        let Self { input, output } = self;
        let (before, outer) = (self.before()?, self.after()?);
        ensure(!before.is_fragment, "a fragment is in VXLAN")?;
        let vtep = node.config().map(|config| config.vtep).unwrap_or_default();
        let underlay = if vtep.to_mapped().is_some() { Family::V4 } else { Family::V6 };
        let around = outer.l4 + 16;
        let vxlan = outer.family == underlay
            && outer.protocol == UDP
            && outer.l4 == ETHERNET + underlay.header_len()
            && outer.end == output.len()
            && word(output, outer.l4 + 2) == Some(VXLAN_PORT)
            && word(output, outer.l4 + 4).map(usize::from) == Some(output.len() - outer.l4);
        ensure(vxlan, "it is not VXLAN")?;
        ensure(outer.ip_residue(output) == 0, "its outer checksum is wrong")?;
        ensure(output.len() <= ETHERNET + usize::from(MTU), "it is longer than the underlay carries")?;
        ensure(output.get(around + ETHERNET..) == input.get(ETHERNET..), "it is not what was packed")
    }

    /// Out of VXLAN, from the inner IP header on as it was.
    fn decapsulated(self) -> Result<(), String> {
        let Self { input, output } = self;
        let outer = self.before()?;
        let vxlan = outer.protocol == UDP
            && !outer.is_fragment
            && input.get(outer.l4 + 8..outer.l4 + 12) == Some(&VXLAN_VALID)
            && input.get(outer.l4 + 12..outer.l4 + 16) == Some(&VXLAN_MESH_REPLY);
        ensure(vxlan, "it was no mesh reply")?;
        let around = outer.l4 + 16;
        ensure(Layout::read_ip(input, around).is_some(), "it goes on though what is in it is not all there")?;
        ensure(output.get(ETHERNET..) == input.get(around + ETHERNET..), "it is not what was packed")
    }

    /// An echo request has become its reply.
    fn echo_answered(self) -> Result<(), String> {
        let Self { input, output } = self;
        let (before, after) = (self.before()?, self.after()?);
        ensure(input.len() == output.len() && before == after, "its headers are moved")?;
        ensure(before.residue(input) == after.residue(output), "its checksum is wrong")?;
        let kinds = if before.family == Family::V4 { (8, 0) } else { (128, 129) };
        ensure((input[before.l4], output[after.l4]) == kinds, "it is no echo")?;
        ensure(input[before.l4 + 4..] == output[after.l4 + 4..], "its payload is changed")
    }

    fn arp_answered(self) -> Result<(), String> {
        let Self { input, output } = self;
        ensure(input.len() == output.len(), "its length is changed")?;
        ensure((word(input, 20), word(output, 20)) == (Some(1), Some(2)), "it is no request's answer")
    }

    fn neighbour_answered(self) -> Result<(), String> {
        let Self { input, output } = self;
        let after = self.after()?;
        ensure(input.len() == output.len(), "its length is changed")?;
        ensure((input[54], output[54]) == (135, 136), "it is no solicitation's answer")?;
        ensure(after.residue(output) == Some(0), "its checksum is wrong")
    }

    /// A reset, or an ICMP error, has been made of it.
    fn answered(self, made: Counter) -> Result<(), String> {
        let Self { input, output } = self;
        let (before, after) = (self.before()?, self.after()?);
        let half = before.addresses().len() / 2;
        ensure(before.family == after.family, "it answers in the other family")?;
        let (asked, answers) = (&input[before.addresses()], &output[after.addresses()]);
        ensure(asked[..half] == answers[half..], "it goes to somebody else")?;
        if made != Counter::ResetSent {
            return self.complained(|_| false);
        }
        ensure(after.end == output.len(), "it is longer than it says")?;
        ensure(after.ip_residue(output) == 0, "its IP checksum is wrong")?;
        ensure(before.protocol == TCP && after.protocol == TCP, "it resets what is not TCP")?;
        ensure(output.len() <= input.len(), "it has grown")?;
        ensure(after.residue(output) == Some(0), "its checksum is wrong")
    }

    /// An ICMP error has been made of the reply that it was to become, and goes to whom that was from.
    fn answered_as_sent(self) -> Result<(), String> {
        let (before, after) = (self.before()?, self.after()?);
        self.complained(|at| may_change(&before, at))?;
        let half = before.addresses().len() / 2;
        let quoted = &self.output[after.l4 + ICMP_ERROR..][before.addresses().start - ETHERNET..][..half];
        ensure(*quoted == self.output[after.addresses()][half..], "it goes to somebody else")
    }

    /// It has become an ICMP error that quotes it, but for bytes that `may_change`.
    fn complained(self, may_change: impl Fn(usize) -> bool) -> Result<(), String> {
        let Self { input, output } = self;
        let (before, after) = (self.before()?, self.after()?);
        ensure(before.family == after.family, "it answers in the other family")?;
        ensure(after.end == output.len(), "it is longer than it says")?;
        ensure(after.ip_residue(output) == 0, "its IP checksum is wrong")?;
        ensure(after.protocol == after.family.icmp_protocol(), "it is no ICMP error")?;
        let quoted = &output[after.l4 + ICMP_ERROR..];
        ensure(quoted.len() <= before.l4 - ETHERNET + QUOTED_MAX, "it quotes too much")?;
        let is_of_this =
            (ETHERNET..input.len()).zip(quoted).all(|(at, byte)| input[at] == *byte || may_change(at));
        ensure(is_of_this && quoted.len() <= input.len() - ETHERNET, "it quotes another packet")?;
        // About a packet whose own IP checksum is wrong, so may be that of the error.
        let right = after.residue(output) == Some(0) || before.ip_residue(input) != 0;
        ensure(right, "its checksum is wrong")
    }
}
