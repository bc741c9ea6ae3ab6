//! Attaching programs to interfaces: they outlive the agent, are replaced rather than doubled, and leave when told.

#![expect(clippy::unwrap_used, reason = "a test that can't set itself up has failed")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData};
use aya::programs::xdp::XdpMode;
use aya::programs::{SchedClassifier, TcAttachType};
use mesh_agent::XdpMode as UplinkXdp;
use mesh_agent::dataplane::attach::{Links, TcHook};
use mesh_agent::dataplane::object::{self, Programs};
use mesh_agent::dataplane::{Dataplane, DataplaneConfig, Local, Touched, Uplink, pins};
use mesh_api::table::{ClusterRecord, ReturnPath, Table};
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{Flow, FlowKey, FlowKind};
use shoal_tests::packet::kernel::enter_namespaces;

/// An interface of the test's namespace.
const IFINDEX: u32 = 2;
const INTERFACE: &str = "three";
/// The other one.
const OTHER: u32 = 3;
const FLOWS_MAX: u32 = 1024;

/// The programs as a new agent loads them.
fn load(pins: &Path) -> Programs {
    Programs::load(pins, FLOWS_MAX).unwrap_or_else(|error| panic!("{error:?}"))
}

/// Runs `test` in namespaces of its own, on a thread that takes them along; without root, says so.
fn in_namespaces(test: impl FnOnce(&Path) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: attaching BPF programs needs root");
        return;
    }
    let thread = std::thread::spawn(move || test(&enter_namespaces().unwrap()));
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn attach(links: &Links, programs: &mut Programs) {
    let program = programs.classifier(object::FROM_TASK).unwrap();
    links.attach_tc(object::FROM_TASK, program, IFINDEX).unwrap_or_else(|error| panic!("{error:?}"));
}

/// The programs on the interface's TCX hook, by id.
fn on_tcx() -> Vec<u32> {
    let (_, programs) = SchedClassifier::query_tcx(INTERFACE, TcAttachType::Ingress).unwrap();
    programs.iter().map(aya::programs::ProgramInfo::id).collect()
}

/// The BPF filters on the interface's `clsact` qdisc.
fn filters() -> usize {
    let output = Command::new("tc").args(["filter", "show", "dev", INTERFACE, "ingress"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).matches("direct-action").count()
}

/// Waits for what the kernel does a moment after the last pin of a link is gone.
fn eventually(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_tcx_attachment_outlives_its_agent_and_is_replaced_by_the_next() {
    in_namespaces(|pins| {
        let links = Links::open(pins.join("links"), TcHook::Tcx).unwrap();
        let mut first = load(pins);
        attach(&links, &mut first);
        let before = on_tcx();
        drop(first);
        assert_eq!(on_tcx(), before);

        let mut second = load(pins);
        attach(&links, &mut second);
        drop(second);
        let after = on_tcx();
        assert_eq!(after.len(), 1, "{after:?}");
        assert_ne!(after, before, "the program is the new agent's");

        links.detach_tc(object::FROM_TASK, IFINDEX).unwrap();
        eventually(|| on_tcx().is_empty());
    });
}

#[test]
fn a_classic_attachment_outlives_its_agent_and_is_replaced_by_the_next() {
    in_namespaces(|pins| {
        let links = Links::open(pins.join("links"), TcHook::Classic).unwrap();
        let mut first = load(pins);
        attach(&links, &mut first);
        drop(first);
        assert_eq!(filters(), 1);

        let mut second = load(pins);
        attach(&links, &mut second);
        drop(second);
        assert_eq!(filters(), 1);

        links.detach_tc(object::FROM_TASK, IFINDEX).unwrap();
        assert_eq!(filters(), 0);
    });
}

#[test]
fn xdp_changes_its_mode_without_a_second_program() {
    in_namespaces(|pins| {
        let links = Links::open(pins.join("links"), TcHook::Tcx).unwrap();
        for mode in [XdpMode::Driver, XdpMode::Driver, XdpMode::Skb] {
            let mut programs = load(pins);
            links.attach_xdp(object::UPLINK_XDP, programs.xdp().unwrap(), IFINDEX, mode).unwrap();
            drop(programs);
            let output = Command::new("ip").args(["link", "show", INTERFACE]).output().unwrap();
            let shown = String::from_utf8_lossy(&output.stdout).into_owned();
            let word = if mode == XdpMode::Skb { "xdpgeneric" } else { "xdp" };
            assert!(shown.split_whitespace().any(|shown| shown == word), "{mode:?}: {shown}");
        }
        assert!(links.retain(|_, _| false).is_empty());
        eventually(|| {
            let output = Command::new("ip").args(["link", "show", INTERFACE]).output().unwrap();
            !String::from_utf8_lossy(&output.stdout).contains("xdp")
        });
    });
}

/// The test's interfaces, of which these are uplinks, by TC alone.
fn config(pins: &Path, uplinks: &[&str]) -> DataplaneConfig {
    let uplink = |name: &&str| {
        let ifindex = if *name == INTERFACE { IFINDEX } else { OTHER };
        Uplink { ifindex, name: (*name).to_owned(), mtu: 1500, is_veth: true, is_vlan: false }
    };
    DataplaneConfig {
        pin_dir: pins.to_owned(),
        xdp: UplinkXdp::Auto,
        flows_max: FLOWS_MAX,
        vxlan_ifindex: 1,
        host_ifindex: OTHER,
        host_peer_ifindex: OTHER,
        host_addr: "169.254.64.1".parse().unwrap(),
        alias_net: "169.254.64.0/18".parse().unwrap(),
        uplinks: uplinks.iter().map(uplink).collect(),
    }
}

/// A dataplane with one uplink.
fn open(pins: &Path) -> Dataplane {
    Dataplane::open(config(pins, &[INTERFACE])).unwrap_or_else(|error| panic!("{error:?}"))
}

/// Applies a table that holds nothing.
fn apply(dataplane: &mut Dataplane) {
    let (data_path_port, return_path) = (4789, ReturnPath::Tunnel);
    let cluster = ClusterRecord { id: "c".into(), hash_seed: 1, data_path_port, return_path, key_epoch: 0 };
    let table = Table::new(cluster);
    let vtep = "198.18.0.11".parse().unwrap();
    let addresses = vec![vtep];
    let local = Local {
        node: "n1".into(),
        vtep,
        wireguard: None,
        addresses,
        endpoints: vec![],
        absent: BTreeSet::new(),
        answering: BTreeSet::new(),
        silent: BTreeSet::new(),
    };
    dataplane.change(&table, &Touched::all(), &local).unwrap_or_else(|error| panic!("{error:?}"));
}

fn flows(folder: &Path) -> HashMap<MapData, FlowKey<Be32>, Flow<Be32>> {
    let map = MapData::from_pin(folder.join("shoal_flows4")).unwrap();
    Map::LruHashMap(map).try_into().unwrap()
}

#[test]
fn another_versions_programs_run_on_tcx_until_this_ones_maps_hold_the_table_and_its_flows_go_on() {
    in_namespaces(|pins| {
        // As the first version did, which pinned its links among its maps.
        let former = pins.join("v1");
        std::fs::create_dir(&former).unwrap();
        let links = Links::open(former.join("links"), TcHook::Tcx).unwrap();
        let mut programs = load(&former);
        let program = programs.classifier(object::UPLINK_INGRESS).unwrap();
        links.attach_tc(object::UPLINK_INGRESS, program, IFINDEX).unwrap();
        drop(programs);
        let before = on_tcx();
        assert_eq!(before.len(), 1);
        let key = FlowKey { src: Be32::ipv4(192, 0, 2, 1), src_port: Be16::new(7), ..FlowKey::default() };
        let flow = Flow { kind: FlowKind::TO_BACKEND, backend: 5, incarnation: 9, ..Flow::default() };
        flows(&former).insert(key, flow, 0).unwrap();

        let mut dataplane = open(pins);
        dataplane.attach_endpoint(3).unwrap();
        assert_eq!(on_tcx(), before, "the former program runs on");
        assert!(former.join("shoal_flows4").exists());
        assert!(
            pins.join("links/uplink_ingress-2").exists() && !former.join("links/uplink_ingress-2").exists()
        );

        apply(&mut dataplane);
        let after = on_tcx();
        assert_eq!(after.len(), 1);
        assert_ne!(after, before, "the program is this version's");
        assert!(!former.exists());
        assert_eq!(flows(&pins.join(pins::version_folder())).get(&key, 0).unwrap(), flow);
        assert!(pins.join("links/from_task-3").exists());
        drop(dataplane);

        // With maps that hold a table, the next agent takes over at once.
        let dataplane = open(pins);
        assert_ne!(on_tcx(), after);
        assert_eq!(dataplane.modes(), [(INTERFACE.to_owned(), "tc")]);
        drop(dataplane);
        assert_eq!(on_tcx().len(), 1);
    });
}

#[test]
fn an_agent_that_was_killed_before_it_took_over_tcx_is_followed_by_one_that_does() {
    in_namespaces(|pins| {
        let links = Links::open(pins.join("links"), TcHook::Tcx).unwrap();
        std::fs::create_dir(pins.join("v1")).unwrap();
        let mut programs = load(&pins.join("v1"));
        let program = programs.classifier(object::UPLINK_INGRESS).unwrap();
        links.attach_tc(object::UPLINK_INGRESS, program, IFINDEX).unwrap();
        drop(programs);
        let before = on_tcx();
        drop(open(pins));
        let mut dataplane = open(pins);
        assert_eq!(on_tcx(), before);
        apply(&mut dataplane);
        assert_ne!(on_tcx(), before);
        assert!(!pins.join("v1").exists());
    });
}

#[test]
fn a_dataplane_on_tcx_that_is_uninstalled_leaves_nothing() {
    in_namespaces(|pins| {
        let mut dataplane = open(pins);
        assert_eq!(on_tcx().len(), 1, "a first agent attaches at once");
        apply(&mut dataplane);
        dataplane.attach_endpoint(3).unwrap();
        dataplane.uninstall().unwrap();
        eventually(|| on_tcx().is_empty());
        assert_eq!(std::fs::read_dir(pins).unwrap().count(), 0);
    });
}

#[test]
fn a_dataplane_goes_over_to_another_uplink_with_the_same_programs() {
    in_namespaces(|pins| {
        let mut dataplane = open(pins);
        apply(&mut dataplane);
        let before = on_tcx();
        assert_eq!(before.len(), 1);
        for uplinks in [["three", "two"].as_slice(), &["two"], &["three"]] {
            let (there, before) = (uplinks.contains(&INTERFACE), &before);
            dataplane.reattach(config(pins, uplinks)).unwrap();
            apply(&mut dataplane);
            assert_eq!(dataplane.modes().len(), uplinks.len());
            eventually(|| on_tcx() == if there { before.clone() } else { Vec::new() });
        }
        dataplane.uninstall().unwrap();
        eventually(|| on_tcx().is_empty());
    });
}

#[test]
fn an_interface_that_is_not_there_is_an_error_that_names_it() {
    in_namespaces(|pins| {
        let links = Links::open(pins.join("links"), TcHook::Tcx).unwrap();
        let mut programs = load(pins);
        let program = programs.classifier(object::FROM_TASK).unwrap();
        let error = links.attach_tc(object::FROM_TASK, program, 77).unwrap_err();
        assert_eq!(error.to_string(), "can't attach from_task to interface 77");
    });
}

#[test]
fn a_folder_that_is_not_on_bpffs_is_refused_with_the_remedy() {
    let error = pins::pin_folder(Path::new("/tmp/shoal-no-such-folder")).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("mount -t bpf") && text.contains("--bpffs"), "{text}");
}
