//! Frames that a task sends to be taken for somebody else, or to be heard where it has no business.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, IpFragOffset, IpNumber, Ipv4Header, Ipv4Options,
    PacketBuilder,
};

use crate::ways::Family;

/// Somebody in a network, as frames have it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Spot {
    pub(crate) mac: [u8; 6],
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
    /// The network's identifier.
    pub(crate) vni: u32,
    /// What answers for the way out of the network.
    pub(crate) gateway_mac: [u8; 6],
    pub(crate) gateway4: Ipv4Addr,
    pub(crate) gateway6: Ipv6Addr,
    /// Its node on the underlay.
    pub(crate) node4: Ipv4Addr,
    pub(crate) node6: Ipv6Addr,
}

impl Spot {
    pub(crate) fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    fn node(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.node4.into(),
            Family::V6 => self.node6.into(),
        }
    }

    fn gateway(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.gateway4.into(),
            Family::V6 => self.gateway6.into(),
        }
    }
}

/// Whom a forgery is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cast {
    pub(crate) attacker: Spot,
    /// Of the attacker's network: who is to hear it.
    pub(crate) victim: Spot,
    /// Of the attacker's network: who is to be taken for the sender.
    pub(crate) neighbour: Spot,
    /// Of another network: who is to hear what is tunnelled.
    pub(crate) stranger: Spot,
    /// Of that network: who is to be taken for its sender.
    pub(crate) insider: Spot,
}

/// What is wrong with a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Forgery {
    /// Nothing: a datagram to the victim.
    Honest(Family),
    /// Nothing but where it goes: to the stranger, by the way out.
    Foreign(Family),
    /// The neighbour's address as its source.
    Source(Family),
    /// An address of another network as its source.
    ForeignSource(Family),
    /// The neighbour's MAC as its source.
    Mac(Family),
    /// The neighbour's address as its source, behind a VLAN tag.
    TaggedSource,
    /// The same behind two tags.
    TwiceTaggedSource,
    /// An ARP reply to the victim: the neighbour's address is at the attacker.
    ArpReply,
    /// The same as an announcement to all.
    ArpAnnouncement,
    /// An ARP request for the victim that has the neighbour's address at the attacker.
    ArpRequest,
    /// A neighbour advertisement to the victim: the neighbour's address is at the attacker.
    Advertisement,
    /// A neighbour solicitation for the victim that has the neighbour's address at the attacker.
    Solicitation,
    /// The attacker as everybody's router.
    RouterAdvertisement,
    /// The attacker as everybody's DHCP server.
    DhcpOffer,
    /// A datagram to all.
    Multicast(Family),
    /// VXLAN to the stranger's node: a frame of the stranger's network.
    Vxlan(Family),
    /// The same, its IPv4 header with options.
    VxlanWithOptions,
    /// The same, behind an IPv6 extension header.
    VxlanBehindExtension,
    /// The first fragment of such.
    VxlanFirstFragment,
    /// A later fragment of such.
    VxlanLaterFragment,
    /// VXLAN to the node itself, by the gateway's address.
    VxlanToGateway(Family),
    /// VXLAN to the node itself, by its node-local address.
    VxlanToAlias(Family),
    /// Other tunnels to the stranger's node: GRE with a frame, IP in IP, GENEVE, and VXLAN to the port that Linux had.
    Gre(Family),
    IpInIp(Family),
    Geneve(Family),
    OldVxlan(Family),
}

impl fmt::Display for Forgery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// The node's own address in the node-local ranges.
const ALIAS: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 1);
const ALIAS6: Ipv6Addr = Ipv6Addr::new(0xfd73, 0x686f, 0x616c, 1, 0, 0, 0, 1);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const EVERYBODY: [u8; 6] = [0xff; 6];
const VXLAN: u16 = 4789;
const OLD_VXLAN: u16 = 8472;
const GENEVE: u16 = 6081;
/// Of datagrams that are no tunnel's.
const PORT: u16 = 4000;

/// Source and destination of an Ethernet frame.
#[derive(Clone, Copy)]
struct Link([u8; 6], [u8; 6]);

impl Forgery {
    /// All but [`Forgery::Honest`].
    pub(crate) const ALL: &[Self] = &[
        Self::Foreign(Family::V4),
        Self::Foreign(Family::V6),
        Self::Source(Family::V4),
        Self::Source(Family::V6),
        Self::ForeignSource(Family::V4),
        Self::ForeignSource(Family::V6),
        Self::Mac(Family::V4),
        Self::Mac(Family::V6),
        Self::TaggedSource,
        Self::TwiceTaggedSource,
        Self::ArpReply,
        Self::ArpAnnouncement,
        Self::ArpRequest,
        Self::Advertisement,
        Self::Solicitation,
        Self::RouterAdvertisement,
        Self::DhcpOffer,
        Self::Multicast(Family::V4),
        Self::Multicast(Family::V6),
        Self::Vxlan(Family::V4),
        Self::Vxlan(Family::V6),
        Self::VxlanWithOptions,
        Self::VxlanBehindExtension,
        Self::VxlanFirstFragment,
        Self::VxlanLaterFragment,
        Self::VxlanToGateway(Family::V4),
        Self::VxlanToGateway(Family::V6),
        Self::VxlanToAlias(Family::V4),
        Self::VxlanToAlias(Family::V6),
        Self::Gre(Family::V4),
        Self::Gre(Family::V6),
        Self::IpInIp(Family::V4),
        Self::IpInIp(Family::V6),
        Self::Geneve(Family::V4),
        Self::Geneve(Family::V6),
        Self::OldVxlan(Family::V4),
        Self::OldVxlan(Family::V6),
    ];

    /// Whether the kernel's own networks fall for it.
    pub(crate) fn works_on_rivals(self) -> bool {
        match self {
            // Their underlay and their masquerading are of IPv4.
            Self::Foreign(family) | Self::Vxlan(family) => family == Family::V4,
            Self::VxlanBehindExtension
            | Self::VxlanToGateway(_)
            | Self::VxlanToAlias(_)
            | Self::VxlanFirstFragment
            | Self::VxlanLaterFragment
            | Self::Gre(_)
            | Self::IpInIp(_)
            | Self::Geneve(_)
            | Self::OldVxlan(_) => false,
            _ => true,
        }
    }

    /// What goes in frames of this forgery by attacker number so and so: no more than 24 bytes.
    pub(crate) fn mark(self, attacker: usize) -> Vec<u8> {
        [self.common_mark(), format!("{attacker:02}|").into_bytes()].concat()
    }

    /// The part of it that all attackers have in common.
    pub(crate) fn common_mark(self) -> Vec<u8> {
        let number = Self::ALL.iter().position(|other| *other == self);
        format!("forged {:02}|", number.unwrap_or(99)).into_bytes()
    }

    /// The frame, with `mark` in it.
    pub(crate) fn frame(self, cast: &Cast, mark: &[u8]) -> Result<Vec<u8>> {
        let Cast { attacker, victim, neighbour, stranger, insider } = *cast;
        let near = Link(attacker.mac, victim.mac);
        let out = Link(attacker.mac, attacker.gateway_mac);
        // What the tunnels carry: to the stranger, as from its network.
        let inner = || {
            udp(Link(insider.mac, stranger.mac), insider.v4.into(), stranger.v4.into(), (PORT, PORT), mark)
        };
        let tunnel = |to: IpAddr, port: u16| {
            let own = if to.is_ipv4() { attacker.v4.into() } else { attacker.v6.into() };
            udp(out, own, to, (50_000, port), &vxlan(stranger.vni, &inner()?))
        };
        let spoofed = || udp(near, neighbour.v4.into(), victim.v4.into(), (PORT, PORT), mark);
        let arp = |operation, target: Ipv4Addr, target_mac, to| {
            let arp = ArpPacket::new(
                ArpHardwareId::ETHERNET,
                EtherType::IPV4,
                operation,
                &attacker.mac,
                &neighbour.v4.octets(),
                target_mac,
                &target.octets(),
            )?;
            let mut frame = Vec::new();
            PacketBuilder::ethernet2(attacker.mac, to).arp(arp).write(&mut frame)?;
            // Ethernet's padding.
            frame.extend(mark);
            anyhow::Ok(frame)
        };
        match self {
            Self::Honest(f) => udp(near, attacker.address(f), victim.address(f), (PORT, PORT), mark),
            Self::Foreign(f) => udp(out, attacker.address(f), stranger.address(f), (PORT, PORT), mark),
            Self::Source(f) => udp(near, neighbour.address(f), victim.address(f), (PORT, PORT), mark),
            Self::ForeignSource(f) => udp(near, insider.address(f), victim.address(f), (PORT, PORT), mark),
            Self::Mac(f) => {
                let link = Link(neighbour.mac, victim.mac);
                udp(link, attacker.address(f), victim.address(f), (PORT, PORT), mark)
            }
            Self::TaggedSource => Ok(tagged(&spoofed()?)),
            Self::TwiceTaggedSource => Ok(tagged(&tagged(&spoofed()?))),
            Self::ArpReply => arp(ArpOperation::REPLY, victim.v4, &victim.mac, victim.mac),
            Self::ArpAnnouncement => arp(ArpOperation::REQUEST, neighbour.v4, &[0; 6], EVERYBODY),
            Self::ArpRequest => arp(ArpOperation::REQUEST, victim.v4, &[0; 6], EVERYBODY),
            Self::Advertisement => {
                // Solicited, to override what is known.
                let fields = [&[0x60, 0, 0, 0], &neighbour.v6.octets()[..]].concat();
                discovery(136, &fields, 2, near, neighbour.v6, victim.v6, mark)
            }
            Self::Solicitation => {
                let fields = [&[0; 4], &victim.v6.octets()[..]].concat();
                discovery(135, &fields, 1, near, neighbour.v6, victim.v6, mark)
            }
            Self::RouterAdvertisement => {
                // Hop limit 64, a lifetime of 1800 s.
                let fields = [64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
                let link_local = Ipv6Addr::from_bits(0xfe80 << 112 | attacker.v6.to_bits() & 0xffff_ffff);
                discovery(134, &fields, 1, Link(attacker.mac, ALL_NODES_MAC), link_local, ALL_NODES, mark)
            }
            Self::DhcpOffer => {
                let link = Link(attacker.mac, EVERYBODY);
                udp(
                    link,
                    attacker.v4.into(),
                    Ipv4Addr::BROADCAST.into(),
                    (67, 68),
                    &[&[2, 1, 6, 0], mark].concat(),
                )
            }
            Self::Multicast(Family::V4) => {
                let link = Link(attacker.mac, [1, 0, 0x5e, 0, 0, 251]);
                udp(link, attacker.v4.into(), Ipv4Addr::new(224, 0, 0, 251).into(), (PORT, PORT), mark)
            }
            Self::Multicast(Family::V6) => {
                let link = Link(attacker.mac, ALL_NODES_MAC);
                udp(link, attacker.v6.into(), ALL_NODES.into(), (PORT, PORT), mark)
            }
            Self::Vxlan(f) => tunnel(stranger.node(f), VXLAN),
            Self::VxlanWithOptions => {
                let plain = tunnel(stranger.node4.into(), VXLAN)?;
                let mut header = v4(IpNumber::UDP, attacker.v4, stranger.node4, plain.len() - 34)?;
                // Four times "no operation".
                header.options = Ipv4Options::try_from(&[1; 4][..])?;
                ipv4(out, header, &plain[34..])
            }
            Self::VxlanBehindExtension => {
                let plain = tunnel(stranger.node6.into(), VXLAN)?;
                // Destination options: padding alone, then UDP.
                let behind = [&[17, 0, 1, 4, 0, 0, 0, 0], &plain[54..]].concat();
                ipv6(out, 60, attacker.v6, stranger.node6, &behind)
            }
            Self::VxlanFirstFragment => {
                let plain = tunnel(stranger.node4.into(), VXLAN)?;
                let mut header = v4(IpNumber::UDP, attacker.v4, stranger.node4, 64)?;
                header.more_fragments = true;
                // Whoever hears it hears the mark.
                ipv4(out, header, &[&plain[34..34 + 40], &padded(mark)[..]].concat())
            }
            Self::VxlanLaterFragment => {
                let mut header = v4(IpNumber::UDP, attacker.v4, stranger.node4, 24)?;
                // Of another datagram than the first fragment is of.
                header.identification += 1;
                header.fragment_offset = IpFragOffset::try_new(8)?;
                ipv4(out, header, &padded(mark))
            }
            Self::VxlanToGateway(f) => tunnel(attacker.gateway(f), VXLAN),
            Self::VxlanToAlias(Family::V4) => tunnel(ALIAS.into(), VXLAN),
            Self::VxlanToAlias(Family::V6) => tunnel(ALIAS6.into(), VXLAN),
            // "Transparent Ethernet bridging".
            Self::Gre(f) => raw(out, 47, cast, f, &[&[0, 0, 0x65, 0x58], &inner()?[..]].concat()),
            Self::IpInIp(f) => raw(out, 4, cast, f, &inner()?[14..]),
            Self::Geneve(f) => {
                let mut header = vec![0, 0, 0x65, 0x58];
                header.extend((stranger.vni << 8).to_be_bytes());
                let carried = [&header, &inner()?[..]].concat();
                udp(out, attacker.address(f), stranger.node(f), (50_000, GENEVE), &carried)
            }
            Self::OldVxlan(f) => tunnel(stranger.node(f), OLD_VXLAN),
        }
    }
}

/// As fragments are: a multiple of 8 bytes.
fn padded(mark: &[u8]) -> Vec<u8> {
    let mut data = mark.to_vec();
    data.resize(24, 0);
    data
}

fn vxlan(vni: u32, frame: &[u8]) -> Vec<u8> {
    let mut carried = vec![8, 0, 0, 0];
    carried.extend((vni << 8).to_be_bytes());
    carried.extend(frame);
    carried
}

/// Puts the tag of VLAN 7 into a frame.
fn tagged(frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &[0x81, 0, 0, 7], &frame[12..]].concat()
}

fn udp(Link(src, dst): Link, from: IpAddr, to: IpAddr, ports: (u16, u16), data: &[u8]) -> Result<Vec<u8>> {
    let builder = PacketBuilder::ethernet2(src, dst);
    let builder = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => builder.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), 64),
        _ => anyhow::bail!("{from} and {to} are of two families"),
    };
    let mut frame = Vec::new();
    builder.udp(ports.0, ports.1).write(&mut frame, data)?;
    Ok(frame)
}

fn v4(protocol: IpNumber, from: Ipv4Addr, to: Ipv4Addr, len: usize) -> Result<Ipv4Header> {
    let mut header = Ipv4Header::new(u16::try_from(len)?, 64, protocol, from.octets(), to.octets())?;
    header.identification = 7;
    Ok(header)
}

fn ipv4(Link(src, dst): Link, mut header: Ipv4Header, data: &[u8]) -> Result<Vec<u8>> {
    header.set_payload_len(data.len())?;
    header.header_checksum = header.calc_header_checksum();
    let mut frame = [&dst[..], &src, &[0x08, 0]].concat();
    header.write(&mut frame)?;
    frame.extend(data);
    Ok(frame)
}

fn ipv6(Link(src, dst): Link, next: u8, from: Ipv6Addr, to: Ipv6Addr, data: &[u8]) -> Result<Vec<u8>> {
    let mut frame = [&dst[..], &src, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    frame.extend(u16::try_from(data.len())?.to_be_bytes());
    frame.extend([next, 64]);
    frame.extend(from.octets());
    frame.extend(to.octets());
    frame.extend(data);
    Ok(frame)
}

/// Any protocol, to the stranger's node.
fn raw(link: Link, protocol: u8, cast: &Cast, family: Family, data: &[u8]) -> Result<Vec<u8>> {
    let Cast { attacker, stranger, .. } = *cast;
    match family {
        Family::V4 => ipv4(link, v4(IpNumber(protocol), attacker.v4, stranger.node4, data.len())?, data),
        Family::V6 => ipv6(link, protocol, attacker.v6, stranger.node6, data),
    }
}

/// Neighbour discovery (RFC 4861): type, the fields behind the checksum, and an option of this kind with the sender's
/// MAC. Behind it one that nobody knows, which holds the mark.
fn discovery(
    kind: u8,
    fields: &[u8],
    option: u8,
    link: Link,
    from: Ipv6Addr,
    to: Ipv6Addr,
    mark: &[u8],
) -> Result<Vec<u8>> {
    let mut message = vec![kind, 0, 0, 0];
    message.extend(fields);
    message.extend([option, 1]);
    message.extend(link.0);
    let mut unknown = [&[253, 0], mark].concat();
    unknown.resize(unknown.len().next_multiple_of(8), 0);
    unknown[1] = u8::try_from(unknown.len() / 8)?;
    message.extend(unknown);
    let len = u32::try_from(message.len())?;
    let pseudo = [&from.octets()[..], &to.octets(), &len.to_be_bytes(), &[0, 0, 0, 58], &message].concat();
    let words = pseudo.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = ipv6(link, 58, from, to, &message)?;
    // Discovery has never passed a router.
    frame[14 + 7] = 255;
    Ok(frame)
}
