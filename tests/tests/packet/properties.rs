//! What holds for every packet, on the host library.

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use mesh_common::addr::{Ip6, backend_mac};
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::map::{PROTO_TCP, PROTO_UDP};
use mesh_common::vxlan::VNI_MESH_REQUEST;
use mesh_datapath::bytes::Bytes;
use mesh_datapath::encap::decapsulate;
use mesh_datapath::packet::Packet as _;
use mesh_datapath::verdict::Action;
use proptest::prelude::*;
use proptest::sample::Index;
use shoal_tests::packet::family::Family;
use shoal_tests::packet::fixtures::{self, Dial, Mesh};
use shoal_tests::packet::frames::{self, Segment};
use shoal_tests::packet::host;
use shoal_tests::packet::world::{
    APP_SLOT, BACK_IFINDEX, N2, PEER_N2, PORT_THERE, WEB_IFINDEX, WEB_SLOT, World, incarnation,
};
use shoal_tests::packet::{End, Fixture, Hook, Outcome};

/// Cases of each property.
const CASES: u32 = 2_048;

fn family() -> impl Strategy<Value = Family> {
    prop_oneof![Just(Family::V4), Just(Family::V6)]
}

/// A client that is no node's, in no network, and its port.
fn client() -> impl Strategy<Value = (std::net::Ipv4Addr, u16)> {
    (0x0b00_0000_u32..0xa000_0000, 1..=u16::MAX).prop_map(|(addr, port)| (addr.into(), port))
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..200)
}

/// The world after what a packet did to it.
fn after(mut world: World, outcome: &Outcome) -> World {
    for (place, held) in &outcome.changes {
        match held {
            Some(held) => drop(world.known.insert(*place, *held)),
            None => drop(world.known.remove(place)),
        }
    }
    world
}

/// Ends, protocol, ports and payload of a frame whose checksums are all right.
#[derive(Debug, PartialEq, Eq)]
struct Read {
    ends: (std::net::IpAddr, std::net::IpAddr),
    protocol: u8,
    ports: (u16, u16),
    payload: Vec<u8>,
}

#[expect(clippy::expect_used, reason = "of a test: what isn't there fails it")]
fn read(frame: &[u8]) -> Read {
    let packet = SlicedPacket::from_ethernet(frame).expect("a packet");
    let transport = packet.transport.expect("layer 4");
    let (ends, sums): ((std::net::IpAddr, std::net::IpAddr), _) = match packet.net.expect("layer 3") {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            let (src, dst) = (header.source(), header.destination());
            let sums = match &transport {
                TransportSlice::Tcp(tcp) => {
                    (tcp.checksum(), tcp.calc_checksum_ipv4(src, dst).expect("a sum"))
                }
                TransportSlice::Udp(udp) => {
                    let sum = udp.to_header().calc_checksum_ipv4_raw(src, dst, udp.payload()).expect("a sum");
                    (udp.checksum(), sum)
                }
                other => panic!("{other:?}"),
            };
            ((src.into(), dst.into()), sums)
        }
        NetSlice::Ipv6(ip) => {
            let (src, dst) = (ip.header().source(), ip.header().destination());
            let sums = match &transport {
                TransportSlice::Tcp(tcp) => {
                    (tcp.checksum(), tcp.calc_checksum_ipv6(src, dst).expect("a sum"))
                }
                TransportSlice::Udp(udp) => {
                    let sum = udp.to_header().calc_checksum_ipv6_raw(src, dst, udp.payload()).expect("a sum");
                    (udp.checksum(), sum)
                }
                other => panic!("{other:?}"),
            };
            ((src.into(), dst.into()), sums)
        }
        NetSlice::Arp(_) => panic!("ARP"),
    };
    assert_eq!(sums.0, sums.1, "layer 4's checksum");
    let (protocol, ports, payload) = match transport {
        TransportSlice::Tcp(tcp) => {
            (PROTO_TCP, (tcp.source_port(), tcp.destination_port()), tcp.payload().to_vec())
        }
        TransportSlice::Udp(udp) => {
            (PROTO_UDP, (udp.source_port(), udp.destination_port()), udp.payload().to_vec())
        }
        other => panic!("{other:?}"),
    };
    Read { ends, protocol, ports, payload }
}

/// The answer of whoever got `request`: its ends exchanged.
fn answer(f: Family, request: &Read, payload: &[u8]) -> Vec<u8> {
    let low = |addr| match addr {
        std::net::IpAddr::V4(addr) => addr,
        std::net::IpAddr::V6(addr) => std::net::Ipv4Addr::from_bits(addr.to_bits() as u32),
    };
    let (src, dst) = ((low(request.ends.1), request.ports.1), (low(request.ends.0), request.ports.0));
    match request.protocol {
        PROTO_TCP => f.tcp(src, dst, frames::SYN_ACK, payload).bytes(),
        _ => f.udp(src, dst, payload).bytes(),
    }
}

/// Any, and as often one of the task's first window or behind it.
fn acknowledgement() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), (0..1_u32 << 21).prop_map(|by| (frames::TASK_SEQUENCE + 1).wrapping_add(by))]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_encapsulated_comes_out_as_it_went_in(
        f in family(), underlay in family(), client in client(), payload in payload(), tcp: bool, tos: u8,
    ) {
        let flow = if tcp { Mesh::tcp(f) } else { Mesh::udp(f) };
        let flow = Mesh { dialled: (flow.dialled.0, PORT_THERE), ..flow.of(client) };
        let request = flow.request(frames::SYN, &payload).tos(tos).bytes();
        let world = World::default().on(underlay);
        let outcome = host::run(Hook::UplinkXdp, &world, Bytes::new(request.clone()));
        prop_assert_eq!(outcome.end, End::XdpTx);
        let around = outcome.output.len() - request.len();
        prop_assert_eq!(around, 14 + underlay.header_len() + 16);
        // The outer headers say how long they and the frame are.
        let outer = SlicedPacket::from_ethernet(&outcome.output).expect("a packet");
        let Some(TransportSlice::Udp(udp)) = outer.transport else { panic!("no UDP") };
        prop_assert_eq!(udp.payload().len(), 8 + request.len());
        prop_assert_eq!(udp.payload()[..8].to_vec(), vec![8, 0, 0, 0, 0, 0, VNI_MESH_REQUEST as u8, 0]);
        if let Some(NetSlice::Ipv4(ip)) = outer.net {
            prop_assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
        }
        let mut packet = Bytes::new(outcome.output.clone());
        let (to, from) = ([2; 6], [4; 6]);
        let unpacked = match f {
            Family::V4 => decapsulate::<Be32, _>(&mut packet, around, to, from),
            Family::V6 => decapsulate::<Ip6, _>(&mut packet, around, to, from),
        };
        prop_assert_eq!(unpacked, Ok(()));
        prop_assert_eq!(packet.len() as usize, request.len());
        prop_assert_eq!(&packet.bytes[..12], &[[2; 6], [4; 6]].concat()[..]);
        prop_assert_eq!(&packet.bytes[12..], &request[12..]);
    }

    #[test]
    fn a_client_gets_answers_from_what_it_dialled(
        f in family(), client in client(), asked in payload(), answered in payload(), tcp: bool, elsewhere: bool,
    ) {
        let flow = if tcp { Mesh::tcp(f) } else { Mesh::udp(f) };
        let flow = if elsewhere { flow.by(PEER_N2, N2) } else { flow }.of(client);
        let request = flow.request(frames::SYN, &asked);
        let (hook, request) = if elsewhere {
            let (from, to) = fixtures::errand(WEB_SLOT, 0, World::default().tag(N2));
            (Hook::Overlay { vni: VNI_MESH_REQUEST, from: N2 }, request.between(from, to))
        } else {
            (Hook::Uplink, request)
        };
        let dialled = read(&request.bytes());
        let outcome = host::run(hook, &World::default(), Bytes::new(request.bytes()));
        prop_assert_eq!(outcome.end, End::Tc(Action::Deliver { ifindex: WEB_IFINDEX }));
        let delivered = read(&outcome.output);
        prop_assert_eq!(&delivered.payload, &asked);
        prop_assert_eq!(delivered.ends.0, dialled.ends.0);

        let world = after(World::default(), &outcome);
        let reply = Bytes::new(answer(f, &delivered, &answered));
        let outcome = host::run(Hook::Task(WEB_IFINDEX), &world, reply);
        let returned = read(&outcome.output);
        prop_assert_eq!(returned.ends, (dialled.ends.1, dialled.ends.0));
        prop_assert_eq!(returned.ports, (dialled.ports.1, dialled.ports.0));
        prop_assert_eq!(&returned.payload, &answered);
        let action = if elsewhere { Action::Tunnel { vni: 2, peer: PEER_N2, tos: 0 } } else { Action::Route };
        prop_assert_eq!(outcome.end, End::Tc(action));
    }

    #[test]
    fn a_task_gets_answers_from_the_vip_that_it_dialled(
        f in family(), port in 1..=u16::MAX, asked in payload(), answered in payload(), tcp: bool, itself: bool,
    ) {
        let flow = if itself { Dial::itself(f) } else { Dial::tcp(f) };
        let flow = if tcp { flow } else { Dial { protocol: PROTO_UDP, ..flow } };
        let flow = Dial { caller: (flow.caller.0, port), ..flow };
        let request = flow.request(frames::SYN, &asked).bytes();
        let dialled = read(&request);
        let outcome = host::run(Hook::Task(BACK_IFINDEX), &World::default(), Bytes::new(request));
        let delivered = read(&outcome.output);
        prop_assert_eq!(&delivered.payload, &asked);

        let world = after(World::default(), &outcome);
        let hook = if itself { Hook::Task(BACK_IFINDEX) } else { Hook::Overlay { vni: 4097, from: N2 } };
        let mut reply = answer(f, &delivered, &answered);
        if !itself {
            reply[..6].copy_from_slice(&backend_mac(incarnation(APP_SLOT)));
        }
        let outcome = host::run(hook, &world, Bytes::new(reply));
        prop_assert_eq!(outcome.end, End::Tc(Action::Deliver { ifindex: BACK_IFINDEX }));
        let returned = read(&outcome.output);
        prop_assert_eq!(returned.ends, (dialled.ends.1, dialled.ends.0));
        prop_assert_eq!(returned.ports, (dialled.ports.1, dialled.ports.0));
        prop_assert_eq!(&returned.payload, &answered);
    }

    #[test]
    fn a_connection_is_established_by_its_handshake_alone(
        f in family(), client in client(), acknowledgement in acknowledgement(), flags: u8,
    ) {
        let flow = Mesh::tcp(f).of(client);
        let segment = Segment { flags, acknowledgement, ..frames::ACK };
        let world = World::knowing(flow.answered());
        let outcome = host::run(Hook::Uplink, &world, Bytes::new(flow.request(segment, b"").bytes()));
        let right = acknowledgement.wrapping_sub(frames::TASK_SEQUENCE + 1) < 1 << 20;
        let only_ack = flags & 0x16 == 0x10;
        let established = flow.established_places().iter().all(|place| outcome.changes.contains_key(place));
        prop_assert_eq!(established, right && only_ack, "{:?}", outcome);
    }

    #[test]
    fn whatever_comes_is_survived_and_what_passes_is_left_alone(
        which: Index, at: Index, value: u8, elsewhere: Index, how in 0..3_u8,
    ) {
        FIXTURES.with(|fixtures| {
            let fixture = which.get(fixtures);
            let hook = if how == 2 { elsewhere.get(fixtures).hook } else { fixture.hook };
            let mut input = fixture.input.clone();
            match how {
                0 if !input.is_empty() => {
                    let offset = at.index(input.len().min(HEADERS));
                    input[offset] = value;
                }
                1 => input.truncate(at.index(input.len() + 1)),
                _ => {}
            }
            is_survived(fixture, hook, &input);
        });
    }
}

/// Bytes of a packet's front in which a change may mean something.
const HEADERS: usize = 220;

thread_local! {
    static FIXTURES: Vec<Fixture> = fixtures::all();
}

/// Asserts that a packet of a fixture's world is left as it is if it passes, or is dropped without an answer.
fn is_survived(fixture: &Fixture, hook: Hook, input: &[u8]) {
    let packet = Bytes { segment_len: fixture.segment_len, ..Bytes::new(input.to_vec()) };
    let outcome = host::run(hook, &fixture.world, packet);
    let untouched = match outcome.end {
        // A reply may be too large for the way that it would take as what it has become.
        End::Tc(Action::Drop) if outcome.counter == Some(Counter::DropTooBig) => {
            outcome.output.len() == input.len()
        }
        End::Tc(Action::Pass | Action::Drop) | End::XdpPass | End::XdpDrop => outcome.output == input,
        End::Tc(action) => {
            let vague = [Action::Echo, Action::Dial];
            !vague.contains(&action) && !matches!(action, Action::Answer(_))
        }
        End::XdpTx | End::XdpRedirect => true,
    };
    assert!(untouched, "{} at {hook:?} with {input:x?}: {outcome:x?}", fixture.name);
}

#[test]
fn every_fixture_cut_off_anywhere_is_survived() {
    for fixture in fixtures::all() {
        for len in 0..fixture.input.len().min(HEADERS) {
            is_survived(&fixture, fixture.hook, &fixture.input[..len]);
        }
    }
}
