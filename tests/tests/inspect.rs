//! Looking at a live dataplane: what the commands of the `shoal` binary show is what the programs did, and looking changes
//! nothing.

#![expect(clippy::unwrap_used, reason = "a test that can't set itself up has failed")]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use aya::programs::xdp::XdpMode;
use mesh_agent::dataplane::attach::{Links, TcHook};
use mesh_agent::dataplane::contents::{Changes, Contents};
use mesh_agent::dataplane::inspect::drops::{Counts, Events};
use mesh_agent::dataplane::inspect::explain::{At, Explanation, Question, Segment, explain};
use mesh_agent::dataplane::inspect::flows::{FlowFilter, FlowRow, FlowStage, Kind, Seen, TCP};
use mesh_agent::dataplane::inspect::status::{WhichNode, status, which_node};
use mesh_agent::dataplane::inspect::{InspectError, Live};
use mesh_agent::dataplane::maps::Maps;
use mesh_agent::dataplane::object::{self, Programs};
use mesh_agent::dataplane::pins;
use mesh_agent::sys::test_run;
use mesh_common::map::{FlowKind, Peer};
use shoal_tests::packet::family::{Family, Socket};
use shoal_tests::packet::frames::{ACK, SYN, SYN_ACK};
use shoal_tests::packet::kernel::enter_namespaces;
use shoal_tests::packet::world::{
    APP, APP_ON_N2, BACK_GATEWAY, BACK_IFINDEX, CLIENT, INGRESS_GATEWAY, LOOPBACK, MTU, N1, N2, N3,
    PORT_HERE, PORT_NOBODY, PORT_THERE, STRANGER, TARGET, TARGET_UDP, VIP, WEB, WEB_IFINDEX, WEB_ON_N2,
    WEB_ON_N2_SLOT, World, incarnation,
};

const FLOWS_MAX: u32 = 1024;
/// The node's uplink: the interface that its peers' next hops are behind.
const UPLINK: u32 = LOOPBACK;
const UPLINK_NAME: &str = "lo";
/// What the interfaces of the tasks are called.
const WEB_NAME: &str = "three";
const BACK_NAME: &str = "two";
/// How a packet ends that a task sent in another's name.
const SPOOFED: &str = "drop_spoofed_source";
/// A port that is not published.
const UNPUBLISHED: u16 = 9;

/// A node whose maps hold a world, with its programs attached.
struct Node {
    programs: Programs,
    live: Live,
    pins: PathBuf,
}

impl Node {
    fn new(pins: &Path) -> Self {
        let folder = pins::pin_folder(pins).unwrap();
        let mut programs = Programs::load(&folder, FLOWS_MAX).unwrap_or_else(|error| panic!("{error:?}"));
        let world = World::default();
        let maps = Maps::open(&folder).unwrap();
        maps.write(&Changes::between(Contents::default(), world.contents()), &world.places).unwrap();
        maps.configure(&world.config()).unwrap();
        let peers = MapData::from_pin(folder.join("shoal_peers")).unwrap();
        let mut peers: Array<MapData, Peer> = Map::Array(peers).try_into().unwrap();
        for (slot, peer) in world.peers() {
            peers.set(slot, peer, 0).unwrap();
        }
        let links = Links::open(pins::links_folder(pins).unwrap(), TcHook::Tcx).unwrap();
        for (name, ifindex) in [
            (object::UPLINK_INGRESS, UPLINK),
            (object::FROM_TASK, WEB_IFINDEX),
            (object::FROM_TASK, BACK_IFINDEX),
            (object::FROM_OVERLAY, WEB_IFINDEX),
        ] {
            links.attach_tc(name, programs.classifier(name).unwrap(), ifindex).unwrap();
        }
        links.attach_xdp(object::UPLINK_XDP, programs.xdp().unwrap(), UPLINK, XdpMode::Skb).unwrap();
        Self { programs, live: Live::open(pins).unwrap(), pins: pins.to_owned() }
    }

    /// A frame comes in by an interface.
    fn receive(&mut self, program: &'static str, ifindex: u32, frame: &[u8]) {
        let program = self.programs.classifier(program).unwrap();
        test_run::run_tc(program.fd().unwrap().as_fd(), frame, ifindex).unwrap();
    }

    fn uplink(&mut self, frame: &[u8]) {
        self.receive(object::UPLINK_INGRESS, UPLINK, frame);
    }

    /// A client connects to the task of this node.
    fn connect(&mut self, f: Family, client: Socket) {
        self.uplink(&f.tcp(client, (N1, PORT_HERE), SYN, b"").bytes());
        let reply = f.tcp((WEB, TARGET), client, SYN_ACK, b"").via(WEB, INGRESS_GATEWAY).bytes();
        self.receive(object::FROM_TASK, WEB_IFINDEX, &reply);
        self.uplink(&f.tcp(client, (N1, PORT_HERE), ACK, b"").bytes());
    }

    fn flows(&self, filter: &FlowFilter) -> Vec<FlowRow> {
        let mut rows = Vec::new();
        let seen = self.live.flows(filter, u64::MAX, |row| rows.push(row)).unwrap();
        assert_eq!(seen, Seen { matching: rows.len() as u64, shown: rows.len() as u64 });
        rows
    }

    /// All entries, for comparison.
    fn entries(&self) -> BTreeSet<String> {
        self.flows(&FlowFilter::default())
            .iter()
            .map(|row| serde_json::to_string(&FlowRow { idle_s: None, ..row.clone() }).unwrap())
            .collect()
    }

    /// Explains a packet, and makes sure that nothing of it is left.
    fn explain(&self, from: SocketAddr, to: SocketAddr, segment: Segment, at: At) -> Explanation {
        let before = self.entries();
        let question = Question { from, to, segment, at };
        let explanation = explain(&self.live, &question).unwrap_or_else(|error| panic!("{error:?}"));
        assert_eq!(self.entries(), before, "{question:?}");
        assert!(explanation.agrees(), "{explanation:#?}");
        explanation
    }

    fn packets(&self, reason: &str) -> u64 {
        let counts = Counts::now(&self.live).unwrap();
        let ended = counts.since(&counts, &self.live).unwrap();
        ended.iter().find(|ended| ended.name == reason).map_or(0, |ended| ended.packets)
    }
}

/// Runs `test` on a node in namespaces of its own; without root, says so.
fn on_a_node(test: impl FnOnce(Node) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: a dataplane needs root");
        return;
    }
    if TcHook::of_this_kernel() == TcHook::Classic {
        println!("SKIP: this kernel has no TCX, and so no links to look at");
        return;
    }
    let thread = std::thread::spawn(move || test(Node::new(&enter_namespaces().unwrap())));
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn end(f: Family, (addr, port): Socket) -> SocketAddr {
    SocketAddr::new(f.addr(addr), port)
}

fn at_stage(stage: FlowStage) -> FlowFilter {
    FlowFilter { stage: Some(stage), ..FlowFilter::default() }
}

fn steps(explanation: &Explanation) -> String {
    let decided = explanation.programs.iter().filter_map(|program| program.decided.as_ref());
    let words: Vec<&str> = decided.flat_map(|decided| &decided.steps).map(|step| &*step.words).collect();
    words.join("\n")
}

#[test]
fn flows_of_both_families_and_every_stage_are_told() {
    on_a_node(|mut node| {
        for f in Family::BOTH {
            let client = (CLIENT, 40_000);
            node.connect(f, client);
            node.uplink(&f.udp((CLIENT, 40_001), (N1, PORT_THERE), b"hello").bytes());
            // One that is not answered.
            node.uplink(&f.tcp((CLIENT, 40_002), (N1, PORT_HERE), SYN, b"").bytes());
            let of_client = FlowFilter {
                client: Some(end(f, client).to_string().parse().unwrap()),
                ..at_stage(FlowStage::Established)
            };
            let rows = node.flows(&of_client);
            let kinds: BTreeSet<Kind> = rows.iter().map(|row| row.kind).collect();
            assert_eq!(kinds, [Kind::REQUEST, Kind(FlowKind::MESH_REPLY)].into());
            for row in rows {
                assert_eq!(
                    (row.client, row.dialled, row.task, row.node, row.seen_port),
                    (end(f, client), end(f, (N1, PORT_HERE)), Some(end(f, (WEB, TARGET))), None, None)
                );
                assert!(!row.void && !row.closed && row.protocol == "tcp" && row.idle_s.is_none(), "{row:?}");
            }
            let of_task = FlowFilter {
                task: Some(f.addr(WEB_ON_N2).to_string().parse().unwrap()),
                ..at_stage(FlowStage::Sent)
            };
            let [sent] = &node.flows(&of_task)[..] else { panic!("not one flow") };
            assert_eq!((sent.dialled, sent.node), (end(f, (N1, PORT_THERE)), Some(IpAddr::V4(N2))));
            assert!(sent.idle_s.is_some_and(|idle| idle < 60), "{sent:?}");
        }
        let established = FlowFilter { protocol: Some(TCP), ..at_stage(FlowStage::Established) };
        assert_eq!(node.flows(&established).len(), 4);
        let opening = node.flows(&at_stage(FlowStage::Opening));
        assert_eq!(opening.len(), 4, "each direction of those that are not answered: {opening:?}");
        assert!(opening.iter().all(|row| row.client.port() == 40_002), "{opening:?}");
        let all = node.flows(&FlowFilter::default());
        assert_eq!(all.len(), 10, "each direction once, and two that went on: {all:?}");
        let mut shown = 0;
        let seen = node.live.flows(&established, 3, |_| shown += 1).unwrap();
        assert_eq!((shown, seen), (3, Seen { matching: 4, shown: 3 }));
        assert!(node.flows(&FlowFilter { vni: Some(77), ..FlowFilter::default() }).is_empty());
    });
}

#[test]
fn drops_are_counted_with_the_last_example_and_followed_as_they_come() {
    on_a_node(|mut node| {
        let forged = |f: Family| f.udp((STRANGER, 7), (APP_ON_N2, 8), b"forged");
        let frame = |f: Family| forged(f).via(APP, BACK_GATEWAY).bytes();
        let before = Counts::now(&node.live).unwrap();
        // What was there before is not news.
        node.receive(object::FROM_TASK, BACK_IFINDEX, &frame(Family::V4));
        std::thread::sleep(Duration::from_millis(200));
        let live = Live::open(&node.pins).unwrap();
        let mut events = Events::follow(&live).unwrap();
        node.receive(object::FROM_TASK, BACK_IFINDEX, &frame(Family::V6));

        // The interfaces have packets of the kernel's own, of which none is a forged one.
        let deadline = Instant::now() + Duration::from_secs(10);
        let event = loop {
            assert!(Instant::now() < deadline, "waited in vain");
            let next = events.next(Duration::from_secs(1)).unwrap();
            if let Some(event) = next.into_iter().find(|event| event.reason == SPOOFED) {
                break event;
            }
        };
        assert_eq!((event.reason, &*event.interface), (SPOOFED, BACK_NAME));
        assert_eq!(event.packet.src, Some(Family::V6.addr(STRANGER)));
        assert_eq!((event.packet.src_port, event.packet.dst_port), (Some(7), Some(8)));
        assert_eq!(event.packet.len as usize, frame(Family::V6).len());

        let ended = Counts::now(&node.live).unwrap().since(&before, &node.live).unwrap();
        let dropped = ended.iter().find(|ended| ended.name == SPOOFED).unwrap();
        assert!(dropped.drop && dropped.packets == 2 && dropped.rate > 0.0, "{dropped:?}");
        assert_eq!(dropped.example.as_ref().map(|example| &example.packet), Some(&event.packet));
    });
}

#[test]
fn a_packet_for_a_task_of_this_node_is_explained() {
    on_a_node(|node| {
        for f in Family::BOTH {
            let (from, to) = (end(f, (CLIENT, 40_000)), end(f, (N1, PORT_HERE)));
            let explanation = node.explain(from, to, Segment::Syn, At::Uplink(None));
            assert_eq!(explanation.interface, UPLINK_NAME);
            let programs: Vec<&str> = explanation.programs.iter().map(|program| program.program).collect();
            assert_eq!(programs, [object::UPLINK_XDP, object::UPLINK_INGRESS]);
            assert_eq!(explanation.put_back.len(), 2, "both directions: {:?}", explanation.put_back);
            let steps = steps(&explanation);
            for words in [
                format!("port {PORT_HERE}/tcp is published on {}: service slot 1", f.name()),
                format!(
                    "backend {} (network 4096, incarnation 701) on this node behind {WEB_NAME}",
                    f.addr(WEB)
                ),
                "would be remembered as opening".to_owned(),
            ] {
                assert!(steps.contains(&words), "{words}\n{steps}");
            }
            let [_, tc] = &explanation.programs[..] else { panic!("{explanation:?}") };
            let (decided, ran) = (tc.decided.as_ref().unwrap(), tc.ran.as_ref().unwrap());
            assert_eq!(decided.verdict, format!("delivered to the task behind {WEB_NAME}"));
            assert!(ran.counted.contains(&("mesh_delivered", 1)), "{ran:?}");
            assert_eq!(ran.packet.dst, Some(f.addr(WEB)));
            assert_eq!(ran.packet.dst_port, Some(TARGET));
        }
    });
}

#[test]
fn a_packet_for_another_node_is_explained_with_the_tunnel() {
    on_a_node(|node| {
        for f in Family::BOTH {
            let (from, to) = (end(f, (CLIENT, 40_000)), end(f, (N1, PORT_THERE)));
            let explanation =
                node.explain(from, to, Segment::Datagram, At::Uplink(Some(UPLINK_NAME.to_owned())));
            let [xdp] = &explanation.programs[..] else { panic!("XDP sends it: {explanation:?}") };
            let packet = &xdp.ran.as_ref().unwrap().packet;
            assert_eq!((packet.src, packet.dst, packet.vni), (Some(N1.into()), Some(N2.into()), Some(1)));
            let inner = packet.inner.as_ref().unwrap();
            assert_eq!((inner.src, inner.dst_port), (Some(f.addr(CLIENT)), Some(PORT_THERE)));
            assert_eq!(inner.request.map(|it| it.incarnation), Some(incarnation(WEB_ON_N2_SLOT)));
            assert_eq!(explanation.put_back.len(), 1, "{:?}", explanation.put_back);
            let on_n2 = format!("on node {N2}");
            assert!(steps(&explanation).contains(&on_n2), "{}", steps(&explanation));
        }
    });
}

#[test]
fn what_a_task_sends_is_explained() {
    on_a_node(|node| {
        for f in Family::BOTH {
            let from = end(f, (APP, 40_000));
            let of_app = At::Task(f.addr(APP).to_string());
            let to_vip = node.explain(from, end(f, (VIP, 80)), Segment::Syn, of_app.clone());
            assert_eq!(to_vip.interface, BACK_NAME);
            let ran = to_vip.programs[0].ran.as_ref().unwrap();
            assert_eq!((ran.packet.dst, to_vip.put_back.len()), (Some(f.addr(APP_ON_N2)), 2));
            assert!(
                steps(&to_vip).contains("is a VIP of network 4097: service slot 4"),
                "{}",
                steps(&to_vip)
            );

            let by_name = At::Task(BACK_NAME.to_owned());
            let dialled = node.explain(from, end(f, (N1, PORT_HERE)), Segment::Syn, by_name);
            let decided = dialled.programs[0].decided.as_ref().unwrap();
            assert_eq!(decided.verdict, format!("delivered to the task behind {WEB_NAME}"));

            let forged = node.explain(end(f, (STRANGER, 1)), end(f, (VIP, 80)), Segment::Syn, of_app);
            let decided = forged.programs[0].decided.as_ref().unwrap();
            assert_eq!(decided.counters, [SPOOFED]);
        }
    });
}

#[test]
fn what_is_refused_or_not_the_meshs_is_explained() {
    on_a_node(|node| {
        for f in Family::BOTH {
            let from = end(f, (CLIENT, 40_000));
            let nobody = node.explain(from, end(f, (N1, PORT_NOBODY)), Segment::Syn, At::Uplink(None));
            let tc = nobody.programs.last().unwrap();
            assert_eq!(tc.decided.as_ref().unwrap().counters, ["drop_no_backend", "reset_sent"]);
            assert_eq!(tc.ran.as_ref().unwrap().packet.dst, Some(f.addr(CLIENT)), "the reset");
            assert!(steps(&nobody).contains("service slot 3 has no running task"), "{}", steps(&nobody));

            let passed = node.explain(from, end(f, (N1, UNPUBLISHED)), Segment::Ack, At::Uplink(None));
            assert_eq!(passed.programs.last().unwrap().decided.as_ref().unwrap().counters, ["passed"]);
            assert!(passed.put_back.is_empty());
        }
    });
}

#[test]
fn a_live_flow_is_what_it_was_after_it_was_explained() {
    on_a_node(|mut node| {
        for f in Family::BOTH {
            let client = (CLIENT, 40_000);
            node.connect(f, client);
            let (from, to) = (end(f, client), end(f, (N1, PORT_HERE)));
            let again = node.explain(from, to, Segment::Ack, At::Uplink(None));
            assert!(again.put_back.is_empty(), "{:?}", again.put_back);
            assert!(steps(&again).contains("is established: request to backend slot 1"), "{}", steps(&again));
            // Under a connection that the task has not closed, another one does not begin.
            node.explain(from, to, Segment::Syn, At::Uplink(None));

            // A flow that has been silent for a while stays as silent as it was.
            let (from, to) = (end(f, (CLIENT, 40_002)), end(f, (N1, PORT_HERE)));
            node.uplink(&f.udp((CLIENT, 40_002), (N1, PORT_HERE), b"hello").bytes());
            std::thread::sleep(Duration::from_millis(1100));
            let of_client =
                FlowFilter { client: Some(from.to_string().parse().unwrap()), ..FlowFilter::default() };
            let told = node.explain(from, to, Segment::Datagram, At::Uplink(None));
            assert_eq!(told.put_back.len(), 1, "its time: {:?}", told.put_back);
            let rows = node.flows(&of_client);
            let request = rows.iter().find(|row| row.kind == Kind::REQUEST).unwrap();
            assert!(request.idle_s.is_some_and(|idle| idle >= 1), "{request:?}");
            assert_eq!(request.task, Some(end(f, (WEB, TARGET_UDP))));
        }
    });
}

#[test]
fn questions_that_make_no_sense_are_refused_with_the_reason() {
    on_a_node(|node| {
        let ask = |from: &str, to: &str, at: &str| {
            let (from, to, at) = (from.parse().unwrap(), to.parse().unwrap(), at.parse().unwrap());
            explain(&node.live, &Question { from, to, segment: Segment::Syn, at }).unwrap_err().to_string()
        };
        let families = ask("198.18.0.100:1", "[fd00::1]:80", "uplink");
        assert!(families.contains("--from") && families.contains("families"), "{families}");
        let task = ask("10.0.9.9:1", "10.0.1.2:80", "task:10.0.9.9");
        assert!(task.contains("task:10.0.9.9") && task.contains("no task of this node"), "{task}");
        let uplink = ask("198.18.0.100:1", "198.18.0.11:80", "uplink:three");
        assert!(uplink.contains("uplink:three") && uplink.contains(UPLINK_NAME), "{uplink}");
        let netns = MapData::from_pin(node.pins.join(pins::version_folder()).join("shoal_netns")).unwrap();
        let mut netns: Array<MapData, u64> = Map::Array(netns).try_into().unwrap();
        netns.set(0, mesh_agent::sys::netns::cookie().unwrap() + 1, 0).unwrap();
        let elsewhere = ask("198.18.0.100:1", "198.18.0.11:80", "uplink");
        assert!(elsewhere.contains("another network namespace"), "{elsewhere}");
        let status = status(&node.pins, &node.pins, &mesh_agent::links::Facts::default()).unwrap();
        assert!(status.troubles.contains(&elsewhere), "{status:?}");
        assert_eq!(node.packets("passed"), 0, "no program ran");
    });
}

#[test]
fn the_status_tells_what_is_attached_and_what_is_in_the_tables() {
    on_a_node(|mut node| {
        node.connect(Family::V4, (CLIENT, 40_000));
        let state = node.pins.join("no-such-state");
        let status = status(&state, &node.pins, &mesh_agent::links::Facts::default()).unwrap();
        assert!(!status.agent_runs && status.member.is_none() && status.troubles.is_empty(), "{status:?}");
        let plane = status.dataplane.unwrap();
        assert_eq!((plane.configured, plane.vtep, plane.vxlan_port), (true, Some(N1.into()), Some(4789)));
        let [uplink] = &plane.uplinks[..] else { panic!("{:?}", plane.uplinks) };
        assert_eq!((&*uplink.name, uplink.mode), (UPLINK_NAME, "xdp-generic"));
        let peers: Vec<(IpAddr, bool, Option<u16>)> =
            plane.peers.iter().map(|peer| (peer.vtep, peer.resolved && peer.fresh, peer.mtu)).collect();
        assert_eq!(peers, [(N2.into(), true, Some(MTU)), (N3.into(), true, Some(MTU))]);
        let hooks: Vec<(&str, u32)> =
            plane.hooks.iter().map(|hook| (hook.program.as_str(), hook.ifindex)).collect();
        assert_eq!(
            hooks,
            [
                ("from_overlay", WEB_IFINDEX),
                ("from_task", WEB_IFINDEX),
                ("from_task", BACK_IFINDEX),
                ("uplink_ingress", UPLINK),
                ("uplink_xdp", UPLINK)
            ]
        );
        assert!(plane.hooks.iter().all(|hook| hook.program_id.is_some() && hook.loaded.is_some()));
        assert_eq!(plane.missing_hooks, ["from_host"]);
        assert!(plane.local_clients_trouble.is_some());
        let counts = plane.counts;
        assert_eq!((counts.services, counts.ports, counts.ifaces), (6, 12, 4));
        assert_eq!((counts.flows["opening"], counts.flows["established"], counts.flows["sent"]), (0, 2, 0));
        assert!(plane.map_bytes["shoal_places"] >= 4 << 20, "{:?}", plane.map_bytes);

        let which = |name: &str| which_node(&state, &node.live, name).unwrap();
        assert_eq!(which(&N1.to_string()), WhichNode::This);
        assert_eq!(which("n2"), WhichNode::Unknown);
    });
}

#[test]
fn a_host_without_a_dataplane_says_so() {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: a dataplane needs root");
        return;
    }
    let thread = std::thread::spawn(|| {
        let pins = enter_namespaces().unwrap();
        let error = Live::open(&pins).unwrap_err();
        assert!(error.to_string().contains("--bpffs"), "{error}");
        let elsewhere = Live::open(Path::new("/tmp/shoal-no-such-folder")).unwrap_err();
        assert!(elsewhere.to_string().contains("mount -t bpf"), "{elsewhere}");
        let status = status(Path::new("/nowhere"), &pins, &mesh_agent::links::Facts::default()).unwrap();
        assert!(status.dataplane.is_none() && status.troubles.len() == 1, "{status:?}");
        // Loaded, but never told of its node.
        let folder = pins::pin_folder(&pins).unwrap();
        let _programs = Programs::load(&folder, FLOWS_MAX).unwrap_or_else(|error| panic!("{error:?}"));
        let live = Live::open(&pins).unwrap();
        let (from, to) = ("192.0.2.7:1".parse().unwrap(), "192.0.2.1:80".parse().unwrap());
        let question = Question { from, to, segment: Segment::Syn, at: At::Uplink(None) };
        let error = explain(&live, &question).unwrap_err();
        assert!(matches!(error, InspectError::NotConfigured { .. }), "{error}");
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}
