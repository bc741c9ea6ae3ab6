//! The table of fixtures: for each way that a packet can end, at least one packet that ends so.

use std::net::Ipv4Addr;

use etherparse::ArpOperation;
use mesh_common::be::{Be16, Be32};
use mesh_common::counter::Counter;
use mesh_common::hash::{Tuple, flow_hash};
use mesh_common::map::{Flow, FlowKey, FlowKind, PROTO_TCP, PROTO_UDP};
use mesh_common::vxlan::{VNI_MESH_REPLY, VNI_MESH_REQUEST};
use mesh_datapath::overlay::Arrival;
use mesh_datapath::verdict::Action;

use super::frames::{self, End as Socket, Outer, Segment, echo, mac, readdressed, tcp, tcp_between, udp};
use super::world::{
    APP, APP_ALIAS, APP_ON_N2, APP_ON_N2_SLOT, APP_SLOT, BACK, BACK_GATEWAY, BACK_IFINDEX, CLIENT, HOST,
    INGRESS, N1, N2, N3, NEXT_HOP, PORT_HERE, PORT_NOBODY, PORT_THERE, STRANGER, UPLINK, VIP, VIP_OF_APP,
    VIP_OF_NOBODY, WEB, WEB_IFINDEX, WEB_ON_N2, WEB_ON_N2_SLOT, WEB_SLOT, World, incarnation,
};
use super::{End, Fixture, Hook, Outcome};

/// The client's end in most fixtures.
const DIALLER: Socket = (CLIENT, 40_000);
/// What it dials where the task is here.
const HERE: Socket = (N1, PORT_HERE);
/// What it dials where the task is on n2.
const THERE: Socket = (N1, PORT_THERE);

/// All of them.
pub fn all() -> Vec<Fixture> {
    let mut all = uplink();
    all.extend(xdp());
    all.extend(mesh_requests());
    all.extend(mesh_replies());
    all.extend(overlay());
    all.extend(task_neighbours());
    all.extend(task_to_task());
    all.extend(vips());
    all.extend(task_to_outside());
    all.extend(host());
    all.extend(unconfigured());
    all
}

fn uplink() -> Vec<Fixture> {
    let syn_here = tcp(DIALLER, HERE, Segment::Syn, b"");
    let delivered = readdressed(tcp(DIALLER, (WEB, 80), Segment::Syn, b""), CLIENT, WEB);
    let at = |name, world, input, outcome| Fixture { name, hook: Hook::Uplink, world, input, outcome };
    let deliver = Action::Deliver { ifindex: WEB_IFINDEX };
    let tunnel = Action::Tunnel { vni: VNI_MESH_REQUEST, vtep: N2.into(), tos: 0 };
    let known =
        [forward(PROTO_TCP, DIALLER, HERE, WEB_SLOT, 80, None), mesh_reply(PROTO_TCP, WEB, 80, HERE, None)];
    let udp_flows = vec![
        forward(PROTO_UDP, DIALLER, HERE, WEB_SLOT, 53, None),
        mesh_reply(PROTO_UDP, WEB, 53, HERE, None),
    ];
    let mut fragment = udp(DIALLER, HERE, &[7; 64]);
    fragment[20] = 0x20;
    let mut zero_checksum = udp(DIALLER, HERE, b"query");
    zero_checksum[40..42].fill(0);
    let mut zero_delivered = udp(DIALLER, (WEB, 53), b"query");
    zero_delivered[40..42].fill(0);
    vec![
        at(
            "a SYN to a port whose task is here is delivered and both directions are remembered",
            World::default(),
            syn_here.clone(),
            tc(deliver, delivered.clone(), Counter::MeshDelivered, known.to_vec()),
        ),
        at(
            "a segment of a known flow is delivered without touching the flow table",
            World::with_flows(known),
            tcp(DIALLER, HERE, Segment::Ack, b"GET"),
            tc(deliver, tcp(DIALLER, (WEB, 80), Segment::Ack, b"GET"), Counter::MeshDelivered, vec![]),
        ),
        at(
            "a datagram to a port whose task is here is delivered",
            World::default(),
            udp(DIALLER, HERE, b"query"),
            tc(deliver, udp(DIALLER, (WEB, 53), b"query"), Counter::MeshDelivered, udp_flows.clone()),
        ),
        at(
            "a datagram without checksum stays without",
            World::default(),
            zero_checksum,
            tc(deliver, zero_delivered, Counter::MeshDelivered, udp_flows),
        ),
        at(
            "a SYN to a port whose task is on another node goes there, unchanged from its IP header on",
            World::default(),
            tcp(DIALLER, THERE, Segment::Syn, b""),
            tc(
                tunnel,
                readdressed(tcp(DIALLER, THERE, Segment::Syn, b""), N1, WEB_ON_N2),
                Counter::MeshForwarded,
                vec![forward(PROTO_TCP, DIALLER, THERE, WEB_ON_N2_SLOT, 80, None)],
            ),
        ),
        at(
            "a flow whose backend drains keeps it",
            World::draining(WEB_SLOT, known),
            tcp(DIALLER, HERE, Segment::Ack, b"more"),
            tc(deliver, tcp(DIALLER, (WEB, 80), Segment::Ack, b"more"), Counter::MeshDelivered, vec![]),
        ),
        at(
            "a connection opened anew on a draining backend's flow finds no other backend",
            World::draining(WEB_SLOT, known),
            syn_here.clone(),
            dropped(syn_here.clone(), Counter::DropNoBackend),
        ),
        at(
            "a flow whose backend is gone is balanced anew",
            World::with_flows([(known[0].0, Flow { incarnation: 1, ..known[0].1 })]),
            syn_here.clone(),
            tc(deliver, delivered, Counter::MeshDelivered, known.to_vec()),
        ),
        at(
            "a SYN to a service without a task is dropped",
            World::default(),
            tcp(DIALLER, (N1, PORT_NOBODY), Segment::Syn, b""),
            dropped(tcp(DIALLER, (N1, PORT_NOBODY), Segment::Syn, b""), Counter::DropNoBackend),
        ),
        passed("a SYN to an unpublished port passes to the stack", tcp(DIALLER, (N1, 22), Segment::Syn, b"")),
        passed(
            "a SYN to a published port of an address that is not the node's passes",
            tcp(DIALLER, (STRANGER, PORT_HERE), Segment::Syn, b""),
        ),
        passed("an echo request to the node passes", echo(CLIENT, N1, true, b"ping")),
        passed("a fragment to a published port passes", fragment),
        passed("a truncated TCP header passes", syn_here[..40].to_vec()),
        passed("an ARP request passes", frames::arp(ArpOperation::REQUEST, CLIENT, N1)),
        passed(
            "VXLAN from a node passes to the VXLAN device",
            udp((N2, 5_000), (N1, 4789), &[8, 0, 0, 0, 0, 16, 1, 0]),
        ),
        at(
            "VXLAN from an address that is no node's is dropped",
            World::default(),
            udp((STRANGER, 5_000), (N1, 4789), &[8, 0, 0, 0, 0, 16, 1, 0]),
            dropped(udp((STRANGER, 5_000), (N1, 4789), &[8, 0, 0, 0, 0, 16, 1, 0]), Counter::DropNotMember),
        ),
    ]
}

fn xdp() -> Vec<Fixture> {
    let at = |name, world, input: Vec<u8>, end, output: Vec<u8>, counter, flows| Fixture {
        name,
        hook: Hook::UplinkXdp,
        world,
        input,
        outcome: Outcome { end, output, counter, flows },
    };
    let syn = tcp(DIALLER, THERE, Segment::Syn, b"");
    let flow = forward(PROTO_TCP, DIALLER, THERE, WEB_ON_N2_SLOT, 80, None);
    let forwarded = encapsulated(DIALLER, THERE, syn.clone());
    let known = || World::with_flows([flow]);
    // The longest frame that still fits an underlay of 1500 bytes, and the shortest that doesn't.
    let fits = tcp(DIALLER, THERE, Segment::Ack, &[1; 1500 - 50 - 40]);
    let exceeds = tcp(DIALLER, THERE, Segment::Ack, &[1; 1500 - 50 - 40 + 1]);
    let guard = udp((STRANGER, 5_000), (N1, 4789), b"12345678");
    let here = tcp(DIALLER, HERE, Segment::Syn, b"");
    vec![
        at(
            "XDP encapsulates and sends back what goes to another node",
            World::default(),
            syn.clone(),
            End::XdpTx,
            forwarded.clone(),
            Some(Counter::MeshForwarded),
            vec![flow],
        ),
        at(
            "XDP forwards a known flow",
            known(),
            syn.clone(),
            End::XdpTx,
            forwarded.clone(),
            Some(Counter::MeshForwarded),
            vec![],
        ),
        at(
            "XDP redirects where the peer is behind another interface",
            World { next_hop_ifindex: BACK_IFINDEX, ..known() },
            syn.clone(),
            End::XdpRedirect,
            forwarded,
            Some(Counter::MeshForwarded),
            vec![],
        ),
        at(
            "XDP forwards the longest frame that fits",
            known(),
            fits.clone(),
            End::XdpTx,
            encapsulated(DIALLER, THERE, fits),
            Some(Counter::MeshForwarded),
            vec![],
        ),
        at(
            "XDP leaves a frame that would not fit to TC",
            known(),
            exceeds.clone(),
            End::XdpPass,
            exceeds,
            None,
            vec![],
        ),
        at(
            "XDP leaves a frame to TC while the next hop is unresolved",
            World { next_hop_mtu: 0, ..known() },
            syn.clone(),
            End::XdpPass,
            syn,
            None,
            vec![],
        ),
        at("XDP leaves delivery to TC", World::default(), here.clone(), End::XdpPass, here, None, vec![]),
        at(
            "XDP drops VXLAN from an address that is no node's",
            World::default(),
            guard.clone(),
            End::XdpDrop,
            guard,
            Some(Counter::DropNotMember),
            vec![],
        ),
    ]
}

fn mesh_requests() -> Vec<Fixture> {
    let dialled = (N2, PORT_HERE);
    let request = |to: Ipv4Addr| readdressed(tcp(DIALLER, dialled, Segment::Syn, b""), N2, to);
    let delivered = || {
        let output = tcp(DIALLER, (WEB, 80), Segment::Syn, b"");
        let flows = vec![
            forward(PROTO_TCP, DIALLER, dialled, WEB_SLOT, 80, Some(N2)),
            mesh_reply(PROTO_TCP, WEB, 80, dialled, Some(N2)),
        ];
        tc(Action::Deliver { ifindex: WEB_IFINDEX }, output, Counter::MeshDelivered, flows)
    };
    let known = |vtep| {
        [
            forward(PROTO_TCP, DIALLER, dialled, WEB_SLOT, 80, Some(vtep)),
            mesh_reply(PROTO_TCP, WEB, 80, dialled, Some(vtep)),
        ]
    };
    let from = |vtep: Ipv4Addr| Hook::Overlay(Arrival { vni: VNI_MESH_REQUEST, vtep: vtep.into() });
    let at = |name, world, input, outcome| Fixture { name, hook: from(N2), world, input, outcome };
    let foreign = readdressed(tcp(DIALLER, (N2, PORT_THERE), Segment::Syn, b""), N2, WEB_ON_N2);
    let unpublished = readdressed(tcp(DIALLER, (N2, 9), Segment::Syn, b""), N2, WEB);
    let mut fragment = readdressed(udp(DIALLER, dialled, &[0; 32]), N2, WEB);
    fragment[20] = 0x20;
    let protocol = readdressed(echo(CLIENT, N2, true, b"ping"), N2, WEB);
    vec![
        at(
            "a mesh request is delivered to the task that it names",
            World::default(),
            request(WEB),
            delivered(),
        ),
        at(
            "a mesh request of a known flow is delivered",
            World::with_flows(known(N2)),
            request(WEB),
            Outcome { flows: vec![], ..delivered() },
        ),
        at(
            "a flow that moved to another ingress node gets its replies sent there",
            World::with_flows(known(N3)),
            request(WEB),
            delivered(),
        ),
        at(
            "a mesh request that names a task unknown here goes where this node's own table says",
            World::default(),
            request(WEB_ON_N2),
            delivered(),
        ),
        at(
            "a mesh request for a task that isn't here is dropped",
            World::default(),
            foreign.clone(),
            dropped(foreign, Counter::DropBackendGone),
        ),
        at(
            "a mesh request for an unpublished port is dropped",
            World::default(),
            unpublished.clone(),
            dropped(unpublished, Counter::DropNotPublished),
        ),
        at(
            "a fragment of a mesh request is dropped",
            World::default(),
            fragment.clone(),
            dropped(fragment, Counter::DropFragment),
        ),
        at(
            "a mesh request without ports is dropped",
            World::default(),
            protocol.clone(),
            dropped(protocol, Counter::DropProtocol),
        ),
        Fixture {
            name: "a mesh request from an address that is no node's is dropped",
            hook: from(STRANGER),
            world: World::default(),
            input: request(WEB),
            outcome: dropped(request(WEB), Counter::DropNotMember),
        },
    ]
}

fn mesh_replies() -> Vec<Fixture> {
    let arrival = Arrival { vni: VNI_MESH_REPLY, vtep: N2.into() };
    let reply = tcp(THERE, DIALLER, Segment::Ack, b"200 OK");
    let foreign = tcp((N2, PORT_THERE), DIALLER, Segment::Ack, b"200 OK");
    let answer = tcp((WEB, 80), DIALLER, Segment::Ack, b"200 OK");
    let (key, flow) = mesh_reply(PROTO_TCP, WEB, 80, HERE, None);
    let void = Flow { incarnation: 1, ..flow };
    let from_web = |name, world, outcome| Fixture {
        name,
        hook: Hook::Task(WEB_IFINDEX),
        world,
        input: answer.clone(),
        outcome,
    };
    let route = Action::Route { src: N1.into(), dst: CLIENT.into() };
    vec![
        Fixture {
            name: "a mesh reply is put on the wire as it is",
            hook: Hook::Overlay(arrival),
            world: World::default(),
            input: reply.clone(),
            outcome: tc(route, reply, Counter::MeshReplied, vec![]),
        },
        Fixture {
            name: "a mesh reply under another node's address is dropped",
            hook: Hook::Overlay(arrival),
            world: World::default(),
            input: foreign.clone(),
            outcome: dropped(foreign, Counter::DropReplyNotLocal),
        },
        from_web(
            "a task's reply to a client that dialled this node goes out under the dialled address",
            World::with_flows([(key, flow)]),
            tc(
                route,
                readdressed(tcp(HERE, DIALLER, Segment::Ack, b"200 OK"), WEB, CLIENT),
                Counter::MeshReplied,
                vec![],
            ),
        ),
        from_web(
            "a task's reply to a client that dialled another node goes back there",
            World::with_flows([mesh_reply(PROTO_TCP, WEB, 80, (N2, PORT_HERE), Some(N2))]),
            tc(
                Action::Tunnel { vni: VNI_MESH_REPLY, vtep: N2.into(), tos: 0 },
                readdressed(tcp((N2, PORT_HERE), DIALLER, Segment::Ack, b"200 OK"), WEB, CLIENT),
                Counter::MeshReturned,
                vec![],
            ),
        ),
        from_web(
            "a flow of the address's former tenant does not apply",
            World::with_flows([(key, void)]),
            tc(
                Action::Host,
                readdressed(
                    tcp((super::world::WEB_ALIAS, 80), DIALLER, Segment::Ack, b"200 OK"),
                    super::world::WEB_ALIAS,
                    HOST,
                ),
                Counter::HostEntered,
                vec![],
            ),
        ),
    ]
}

fn overlay() -> Vec<Fixture> {
    let arrival = |vni| Hook::Overlay(Arrival { vni, vtep: N2.into() });
    let at = |name, hook, world, input, outcome| Fixture { name, hook, world, input, outcome };
    let hello = udp((APP_ON_N2, 7), (APP, 9), b"hello");
    let from_nobody = udp(((Ipv4Addr::new(10, 0, 1, 77)), 7), (APP, 9), b"hello");
    let to_nobody = udp((APP_ON_N2, 7), (Ipv4Addr::new(10, 0, 1, 77), 9), b"hello");
    let answer = tcp((APP_ON_N2, 80), (APP, 40_000), Segment::Ack, b"200 OK");
    let mut short = hello.clone();
    short.truncate(36);
    let deliver = Action::Deliver { ifindex: BACK_IFINDEX };
    vec![
        at(
            "a packet from another node's task is delivered",
            arrival(BACK),
            World::default(),
            hello.clone(),
            tc(deliver, hello.clone(), Counter::OverlayDelivered, vec![]),
        ),
        at(
            "an answer to a flow through a VIP comes from the VIP",
            arrival(BACK),
            World::with_flows([vip_reply((APP_ON_N2, 80), (APP, 40_000), VIP, APP_ON_N2_SLOT)]),
            answer.clone(),
            tc(
                deliver,
                readdressed(tcp((VIP, 80), (APP, 40_000), Segment::Ack, b"200 OK"), VIP, APP),
                Counter::OverlayDelivered,
                vec![],
            ),
        ),
        at(
            "a source that doesn't live on the sending node is dropped",
            arrival(BACK),
            World::default(),
            from_nobody.clone(),
            dropped(from_nobody, Counter::DropForeignSource),
        ),
        at(
            "a source that lives on another node than the sender is dropped",
            Hook::Overlay(Arrival { vni: BACK, vtep: N3.into() }),
            World::default(),
            hello.clone(),
            dropped(hello.clone(), Counter::DropForeignSource),
        ),
        at(
            "the same addresses in another network are other endpoints",
            arrival(INGRESS),
            World::default(),
            hello.clone(),
            dropped(hello.clone(), Counter::DropForeignSource),
        ),
        at(
            "a destination that isn't here is dropped",
            arrival(BACK),
            World::default(),
            to_nobody.clone(),
            dropped(to_nobody, Counter::DropNoEndpoint),
        ),
        at(
            "a reserved VNI is dropped",
            arrival(77),
            World::default(),
            hello.clone(),
            dropped(hello, Counter::DropUnknownVni),
        ),
        at(
            "a packet shorter than it says is dropped",
            arrival(BACK),
            World::default(),
            short.clone(),
            dropped(short, Counter::DropMalformed),
        ),
    ]
}

fn task_neighbours() -> Vec<Fixture> {
    let at = |name, input: Vec<u8>, outcome| Fixture {
        name,
        hook: Hook::Task(BACK_IFINDEX),
        world: World::default(),
        input,
        outcome,
    };
    let ask = |target| frames::arp(ArpOperation::REQUEST, APP, target);
    let answered = |target| {
        let reply = frames::arp(ArpOperation::REPLY, target, APP);
        tc(Action::Reflect, reply, Counter::ArpAnswered, vec![])
    };
    let spoofed = frames::arp(ArpOperation::REQUEST, APP_ON_N2, BACK_GATEWAY);
    let nobody = Ipv4Addr::new(10, 0, 1, 77);
    vec![
        at("ARP for the gateway is answered", ask(BACK_GATEWAY), answered(BACK_GATEWAY)),
        at("ARP for another node's task is answered", ask(APP_ON_N2), answered(APP_ON_N2)),
        at("ARP for a VIP is answered", ask(VIP), answered(VIP)),
        at("ARP for nobody is not answered", ask(nobody), dropped(ask(nobody), Counter::DropNoEndpoint)),
        at(
            "ARP for the task's own address is not answered",
            ask(APP),
            dropped(ask(APP), Counter::DropNoEndpoint),
        ),
        at(
            "ARP under a false Ethernet address is dropped",
            spoofed.clone(),
            dropped(spoofed, Counter::DropSpoofedMac),
        ),
        at(
            "a truncated ARP request is dropped",
            ask(VIP)[..30].to_vec(),
            dropped(ask(VIP)[..30].to_vec(), Counter::DropMalformed),
        ),
    ]
}

fn task_to_task() -> Vec<Fixture> {
    let at =
        |name, hook, input: Vec<u8>, outcome| Fixture { name, hook, world: World::default(), input, outcome };
    let app = Hook::Task(BACK_IFINDEX);
    let hello = udp((APP, 9), (APP_ON_N2, 7), b"hello");
    let tunnel = Action::Tunnel { vni: BACK, vtep: N2.into(), tos: 0 };
    let mut fragment = hello.clone();
    fragment[21] = 0x05;
    let fragment = with_ip_checksum(fragment);
    let spoofed_mac = readdressed(hello.clone(), APP_ON_N2, APP_ON_N2);
    let spoofed = readdressed(udp((APP_ON_N2, 9), (APP_ON_N2, 7), b"hello"), APP, APP_ON_N2);
    let nobody = udp((APP, 9), (Ipv4Addr::new(10, 0, 1, 77), 7), b"hello");
    let multicast = udp((APP, 9), (Ipv4Addr::new(224, 0, 0, 251), 7), b"hello");
    let broadcast = udp((APP, 9), (Ipv4Addr::new(10, 0, 1, 255), 7), b"hello");
    // As long as an IPv6 header: the kernel's test run takes nothing shorter.
    let mut six = udp((APP, 9), (APP_ON_N2, 7), &[0; 20]);
    six[12..14].copy_from_slice(&[0x86, 0xdd]);
    let mut lying = hello.clone();
    lying[14] = 0x4f;
    vec![
        at(
            "a packet to another node's task goes there",
            app,
            hello.clone(),
            tc(tunnel, hello.clone(), Counter::OverlayForwarded, vec![]),
        ),
        at(
            "a later fragment to another node's task goes there",
            app,
            fragment.clone(),
            tc(tunnel, fragment, Counter::OverlayForwarded, vec![]),
        ),
        at(
            "a false Ethernet source is dropped",
            app,
            spoofed_mac.clone(),
            dropped(spoofed_mac, Counter::DropSpoofedMac),
        ),
        at(
            "a false source address is dropped",
            app,
            spoofed.clone(),
            dropped(spoofed, Counter::DropSpoofedSource),
        ),
        at("a packet to nobody is dropped", app, nobody.clone(), dropped(nobody, Counter::DropNoEndpoint)),
        at(
            "a multicast packet is dropped",
            app,
            multicast.clone(),
            dropped(multicast, Counter::DropMulticast),
        ),
        at(
            "a broadcast packet is dropped",
            app,
            broadcast.clone(),
            dropped(broadcast, Counter::DropMulticast),
        ),
        at("an IPv6 packet is dropped", app, six.clone(), dropped(six, Counter::DropProtocol)),
        at(
            "a header longer than the packet is dropped",
            app,
            lying.clone(),
            dropped(lying, Counter::DropMalformed),
        ),
        at(
            "a packet from an interface that is no task's is dropped",
            Hook::Task(super::world::LOOPBACK),
            hello.clone(),
            dropped(hello, Counter::DropUnknownInterface),
        ),
    ]
}

fn vips() -> Vec<Fixture> {
    let at =
        |name, world, input, outcome| Fixture { name, hook: Hook::Task(BACK_IFINDEX), world, input, outcome };
    let dialler = (APP, 40_000);
    let forward = vip_forward(dialler, (VIP, 80), APP_ON_N2_SLOT, FlowKind::TO_BACKEND);
    let back = vip_reply((APP_ON_N2, 80), dialler, VIP, APP_ON_N2_SLOT);
    let own = vip_forward(dialler, (VIP_OF_APP, 80), APP_SLOT, FlowKind::TO_SELF);
    let own_back = self_reply((APP, 80), (BACK_GATEWAY, 40_000), VIP_OF_APP, APP_SLOT);
    let tunnel = Action::Tunnel { vni: BACK, vtep: N2.into(), tos: 0 };
    let itself = Action::Deliver { ifindex: BACK_IFINDEX };
    let to_vip = |segment| tcp(dialler, (VIP, 80), segment, b"");
    let to_app_on_n2 = |segment| tcp(dialler, (APP_ON_N2, 80), segment, b"");
    let nobody = tcp(dialler, (VIP_OF_NOBODY, 80), Segment::Syn, b"");
    let mut fragment = udp(dialler, (VIP, 80), &[0; 32]);
    fragment[20] = 0x20;
    let fragment = with_ip_checksum(fragment);
    let reply_to_ping = echo(APP, VIP, false, b"ping");
    vec![
        at(
            "a SYN to a VIP goes to a backend and both directions are remembered",
            World::default(),
            to_vip(Segment::Syn),
            tc(tunnel, to_app_on_n2(Segment::Syn), Counter::OverlayForwarded, vec![forward, back]),
        ),
        at(
            "a segment of a known flow to a VIP goes to its backend",
            World::with_flows([forward, back]),
            to_vip(Segment::Ack),
            tc(tunnel, to_app_on_n2(Segment::Ack), Counter::OverlayForwarded, vec![]),
        ),
        at(
            "a task reaches itself through its own VIP, from the gateway's address",
            World::default(),
            tcp(dialler, (VIP_OF_APP, 80), Segment::Syn, b""),
            tc(
                itself,
                tcp((BACK_GATEWAY, 40_000), (APP, 80), Segment::Syn, b""),
                Counter::OverlayDelivered,
                vec![own, own_back],
            ),
        ),
        at(
            "a task's answer to itself comes from its VIP",
            World::with_flows([own, own_back]),
            tcp((APP, 80), (BACK_GATEWAY, 40_000), Segment::Ack, b"200 OK"),
            tc(
                itself,
                tcp((VIP_OF_APP, 80), dialler, Segment::Ack, b"200 OK"),
                Counter::OverlayDelivered,
                vec![],
            ),
        ),
        at(
            "a SYN to a VIP without a backend is dropped",
            World::default(),
            nobody.clone(),
            dropped(nobody, Counter::DropNoBackend),
        ),
        at(
            "a fragment to a VIP is dropped",
            World::default(),
            fragment.clone(),
            dropped(fragment, Counter::DropFragment),
        ),
        at(
            "an echo request to a VIP is answered",
            World::default(),
            echo(APP, VIP, true, b"ping"),
            tc(Action::Reflect, with_ttl(echo(VIP, APP, false, b"ping"), 63), Counter::EchoAnswered, vec![]),
        ),
        at(
            "an echo reply to a VIP is dropped",
            World::default(),
            reply_to_ping.clone(),
            dropped(reply_to_ping, Counter::DropProtocol),
        ),
    ]
}

fn task_to_outside() -> Vec<Fixture> {
    let at =
        |name, world, input, outcome| Fixture { name, hook: Hook::Task(BACK_IFINDEX), world, input, outcome };
    let query = udp((APP, 5_353), (BACK_GATEWAY, 53), b"who?");
    let out = tcp((APP, 40_000), (STRANGER, 443), Segment::Syn, b"");
    let alias = udp((APP, 9), (Ipv4Addr::new(169, 254, 64, 9), 9), b"");
    let tunnel = udp((APP, 9), (N2, 4789), &[8, 0, 0, 0, 0, 16, 1, 0]);
    let host = |packet| tc(Action::Host, readdressed(packet, APP_ALIAS, HOST), Counter::HostEntered, vec![]);
    vec![
        at(
            "a packet to the gateway enters the host's stack under the alias",
            World::default(),
            query,
            host(udp((APP_ALIAS, 5_353), (HOST, 53), b"who?")),
        ),
        at(
            "a packet to the outside enters the host's stack under the alias",
            World::default(),
            out.clone(),
            host(tcp((APP_ALIAS, 40_000), (STRANGER, 443), Segment::Syn, b"")),
        ),
        at(
            "an echo request to the gateway enters the host's stack",
            World::default(),
            echo(APP, BACK_GATEWAY, true, b"ping"),
            host(echo(APP_ALIAS, HOST, true, b"ping")),
        ),
        at(
            "nothing leaves an internal network",
            World::internal(),
            out.clone(),
            dropped(out, Counter::DropInternal),
        ),
        at(
            "other tasks' aliases are out of reach",
            World::default(),
            alias.clone(),
            dropped(alias, Counter::DropLinkLocal),
        ),
        at(
            "a task can't send VXLAN to a node",
            World::default(),
            tunnel.clone(),
            dropped(tunnel, Counter::DropTunnelFromTask),
        ),
    ]
}

fn host() -> Vec<Fixture> {
    let at = |name, input: Vec<u8>, outcome| Fixture {
        name,
        hook: Hook::Host,
        world: World::default(),
        input,
        outcome,
    };
    let deliver = Action::Deliver { ifindex: BACK_IFINDEX };
    let unknown = udp((HOST, 53), (Ipv4Addr::new(169, 254, 64, 77), 5_353), b"me");
    let mut six = udp((HOST, 53), (APP_ALIAS, 5_353), &[0; 20]);
    six[12..14].copy_from_slice(&[0x86, 0xdd]);
    let short = unknown[..36].to_vec();
    vec![
        at(
            "an answer of the host comes from the gateway",
            udp((HOST, 53), (APP_ALIAS, 5_353), b"me"),
            tc(deliver, udp((BACK_GATEWAY, 53), (APP, 5_353), b"me"), Counter::HostDelivered, vec![]),
        ),
        at(
            "a reply from the outside comes from where it came from",
            tcp((STRANGER, 443), (APP_ALIAS, 40_000), Segment::Ack, b""),
            tc(
                deliver,
                tcp_between((mac(BACK_GATEWAY), mac(APP)), (STRANGER, 443), (APP, 40_000), Segment::Ack, b""),
                Counter::HostDelivered,
                vec![],
            ),
        ),
        at(
            "the host's ARP for an alias is answered",
            frames::arp(ArpOperation::REQUEST, HOST, APP_ALIAS),
            tc(
                Action::Reflect,
                frames::arp(ArpOperation::REPLY, APP_ALIAS, HOST),
                Counter::ArpAnswered,
                vec![],
            ),
        ),
        at(
            "a packet to an unknown alias is dropped",
            unknown.clone(),
            dropped(unknown, Counter::DropUnknownAlias),
        ),
        at("the host's IPv6 is dropped", six.clone(), dropped(six, Counter::DropProtocol)),
        at(
            "a truncated packet of the host is dropped",
            short.clone(),
            dropped(short, Counter::DropMalformed),
        ),
    ]
}

fn unconfigured() -> Vec<Fixture> {
    let syn = tcp(DIALLER, HERE, Segment::Syn, b"");
    let hello = udp((APP, 9), (APP_ON_N2, 7), b"hello");
    let at =
        |name, hook, input, outcome| Fixture { name, hook, world: World::unconfigured(), input, outcome };
    vec![
        at(
            "before the agent's first write, an uplink passes everything",
            Hook::Uplink,
            syn.clone(),
            tc(Action::Pass, syn, Counter::Passed, vec![]),
        ),
        at(
            "before the agent's first write, a task reaches nothing",
            Hook::Task(BACK_IFINDEX),
            hello.clone(),
            dropped(hello, Counter::DropNotReady),
        ),
    ]
}

fn tc(action: Action, output: Vec<u8>, counter: Counter, mut flows: Vec<(FlowKey, Flow)>) -> Outcome {
    flows.sort_unstable_by_key(|(key, _)| *key);
    Outcome { end: End::Tc(action), output, counter: Some(counter), flows }
}

fn dropped(input: Vec<u8>, reason: Counter) -> Outcome {
    tc(Action::Drop, input, reason, vec![])
}

fn passed(name: &'static str, input: Vec<u8>) -> Fixture {
    let outcome = tc(Action::Pass, input.clone(), Counter::Passed, vec![]);
    Fixture { name, hook: Hook::Uplink, world: World::default(), input, outcome }
}

fn tuple(protocol: u8, src: Socket, dst: Socket) -> Tuple {
    Tuple {
        src: src.0.into(),
        dst: dst.0.into(),
        src_port: Be16::new(src.1),
        dst_port: Be16::new(dst.1),
        protocol,
    }
}

fn vtep(node: Option<Ipv4Addr>) -> Be32 {
    node.map_or(Be32::default(), Be32::from)
}

/// The flow from a client to a published port.
fn forward(
    protocol: u8,
    client: Socket,
    dialled: Socket,
    slot: u32,
    target: u16,
    ingress: Option<Ipv4Addr>,
) -> (FlowKey, Flow) {
    let flow = Flow {
        backend: slot,
        incarnation: incarnation(slot),
        port: Be16::new(target),
        vtep: vtep(ingress),
        kind: FlowKind::TO_BACKEND,
        ..Flow::default()
    };
    (FlowKey::new(&tuple(protocol, client, dialled), VNI_MESH_REQUEST), flow)
}

/// The flow back from the task on `ingress` to [`DIALLER`].
fn mesh_reply(
    protocol: u8,
    task: Ipv4Addr,
    target: u16,
    dialled: Socket,
    ingress: Option<Ipv4Addr>,
) -> (FlowKey, Flow) {
    let flow = Flow {
        incarnation: incarnation(WEB_SLOT),
        addr: dialled.0.into(),
        port: Be16::new(dialled.1),
        vtep: vtep(ingress),
        kind: FlowKind::MESH_REPLY,
        ..Flow::default()
    };
    (FlowKey::new(&tuple(protocol, (task, target), DIALLER), INGRESS), flow)
}

/// The flow from a task to a VIP.
fn vip_forward(client: Socket, vip: Socket, slot: u32, kind: FlowKind) -> (FlowKey, Flow) {
    let flow = Flow {
        backend: slot,
        incarnation: incarnation(slot),
        port: Be16::new(vip.1),
        kind,
        ..Flow::default()
    };
    (FlowKey::new(&tuple(PROTO_TCP, client, vip), BACK), flow)
}

/// The flow back from a VIP's backend.
fn vip_reply(backend: Socket, client: Socket, vip: Ipv4Addr, slot: u32) -> (FlowKey, Flow) {
    let flow = Flow {
        incarnation: incarnation(slot),
        addr: vip.into(),
        port: Be16::new(backend.1),
        kind: FlowKind::VIP_REPLY,
        ..Flow::default()
    };
    (FlowKey::new(&tuple(PROTO_TCP, backend, client), BACK), flow)
}

/// The flow back from a task that dialled itself by its VIP.
fn self_reply(backend: Socket, client: Socket, vip: Ipv4Addr, slot: u32) -> (FlowKey, Flow) {
    let (key, flow) = vip_reply(backend, client, vip, slot);
    (key, Flow { kind: FlowKind::SELF_REPLY, ..flow })
}

/// What XDP makes of a mesh request to [`WEB_ON_N2`].
fn encapsulated(client: Socket, dialled: Socket, frame: Vec<u8>) -> Vec<u8> {
    let hash = flow_hash(&tuple(PROTO_TCP, client, dialled), 42);
    let outer = Outer {
        macs: (UPLINK, NEXT_HOP),
        src: N1,
        dst: N2,
        source_port: 49_152 | (hash as u16 & 0x3fff),
        inner_macs: (mac(N1), mac(WEB_ON_N2)),
    };
    frames::vxlan(VNI_MESH_REQUEST, outer, frame)
}

/// `packet` with the checksum that belongs to its IPv4 header.
fn with_ip_checksum(mut packet: Vec<u8>) -> Vec<u8> {
    packet[24..26].fill(0);
    let words = packet[14..34].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet
}

/// `packet` with another hop limit.
fn with_ttl(mut packet: Vec<u8>, ttl: u8) -> Vec<u8> {
    packet[22] = ttl;
    with_ip_checksum(packet)
}
