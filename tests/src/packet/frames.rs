//! Building packets, by another library than the one under test: its checksums are summed, not patched.

use std::net::Ipv4Addr;

use etherparse::{ArpEthIpv4Packet, ArpOperation, ArpPacket, EtherType, PacketBuilder, TcpHeader};

/// An endpoint's Ethernet address.
pub fn mac(addr: Ipv4Addr) -> [u8; 6] {
    mesh_common::mac_of(addr.into())
}

/// One end of a flow.
pub type End = (Ipv4Addr, u16);

/// Which TCP segment to build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment {
    /// The first of a connection.
    Syn,
    /// One in the middle.
    Ack,
}

/// A TCP segment in a frame from `macs.0` to `macs.1`.
pub fn tcp_between(
    macs: ([u8; 6], [u8; 6]),
    src: End,
    dst: End,
    segment: Segment,
    payload: &[u8],
) -> Vec<u8> {
    let mut header = TcpHeader::new(src.1, dst.1, 1_000, 64_000);
    header.syn = segment == Segment::Syn;
    header.ack = segment == Segment::Ack;
    let builder =
        PacketBuilder::ethernet2(macs.0, macs.1).ipv4(src.0.octets(), dst.0.octets(), 63).tcp_header(header);
    bytes(builder.size(payload.len()), |to| builder.write(to, payload))
}

/// A TCP segment between the endpoints' own Ethernet addresses.
pub fn tcp(src: End, dst: End, segment: Segment, payload: &[u8]) -> Vec<u8> {
    tcp_between((mac(src.0), mac(dst.0)), src, dst, segment, payload)
}

/// A UDP datagram between the endpoints' own Ethernet addresses.
pub fn udp(src: End, dst: End, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac(src.0), mac(dst.0))
        .ipv4(src.0.octets(), dst.0.octets(), 63)
        .udp(src.1, dst.1);
    bytes(builder.size(payload.len()), |to| builder.write(to, payload))
}

/// An ICMP echo request or reply.
pub fn echo(src: Ipv4Addr, dst: Ipv4Addr, request: bool, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac(src), mac(dst)).ipv4(src.octets(), dst.octets(), 63);
    let builder = if request { builder.icmpv4_echo_request(7, 1) } else { builder.icmpv4_echo_reply(7, 1) };
    bytes(builder.size(payload.len()), |to| builder.write(to, payload))
}

/// An ARP request in a broadcast frame, or the reply to one.
pub fn arp(operation: ArpOperation, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let request = operation == ArpOperation::REQUEST;
    let packet = ArpEthIpv4Packet {
        operation,
        sender_mac: mac(sender),
        sender_ipv4: sender.octets(),
        target_mac: if request { [0; 6] } else { mac(target) },
        target_ipv4: target.octets(),
    };
    let to = if request { [0xff; 6] } else { mac(target) };
    let mut bytes = [&to[..], &mac(sender)[..], &EtherType::ARP.0.to_be_bytes()[..]].concat();
    bytes.extend(ArpPacket::from(packet).to_bytes());
    bytes
}

/// `inner`, its Ethernet addresses replaced, in VXLAN as Shoal's XDP program writes it.
pub fn vxlan(vni: u32, outer: Outer, mut inner: Vec<u8>) -> Vec<u8> {
    inner[..6].copy_from_slice(&outer.inner_macs.1);
    inner[6..12].copy_from_slice(&outer.inner_macs.0);
    let header = [0x08, 0, 0, 0].into_iter().chain((vni << 8).to_be_bytes());
    let payload: Vec<u8> = header.chain(inner).collect();
    let builder = PacketBuilder::ethernet2(outer.macs.0, outer.macs.1)
        .ipv4(outer.src.octets(), outer.dst.octets(), 64)
        .udp(outer.source_port, 4789);
    let mut bytes = bytes(builder.size(payload.len()), |to| builder.write(to, &payload));
    // Shoal sends no outer UDP checksum.
    bytes[40..42].copy_from_slice(&[0, 0]);
    bytes
}

/// The headers around a frame in VXLAN.
#[derive(Debug, Clone, Copy)]
pub struct Outer {
    /// Ethernet source and destination.
    pub macs: ([u8; 6], [u8; 6]),
    /// Source VTEP.
    pub src: Ipv4Addr,
    /// Destination VTEP.
    pub dst: Ipv4Addr,
    /// UDP source port.
    pub source_port: u16,
    /// The inner frame's Ethernet source and destination.
    pub inner_macs: ([u8; 6], [u8; 6]),
}

/// `packet` with its Ethernet addresses replaced by those of the endpoints at `src` and `dst`.
pub fn readdressed(mut packet: Vec<u8>, src: Ipv4Addr, dst: Ipv4Addr) -> Vec<u8> {
    packet[..6].copy_from_slice(&mac(dst));
    packet[6..12].copy_from_slice(&mac(src));
    packet
}

/// What `write` writes; a vector takes everything.
#[expect(
    clippy::expect_used,
    reason = "writing to a vector fails only for a packet longer than its headers can say"
)]
fn bytes<E: std::fmt::Debug>(len: usize, write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    write(&mut bytes).expect("a packet that fits its headers");
    bytes
}
