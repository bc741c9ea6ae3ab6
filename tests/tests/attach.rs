//! Attaching programs to interfaces: they outlive the agent, are replaced rather than doubled, and leave when told.

#![expect(clippy::unwrap_used, reason = "a test that can't set itself up has failed")]

use std::path::Path;
use std::process::Command;

use aya::programs::xdp::XdpMode;
use aya::programs::{SchedClassifier, TcAttachType};
use mesh_agent::dataplane::attach::{Links, TcHook};
use mesh_agent::dataplane::object::{self, Programs};
use shoal_tests::packet::kernel::enter_namespaces;

/// An interface of the test's namespace.
const IFINDEX: u32 = 2;
const INTERFACE: &str = "three";
const FLOWS_MAX: u32 = 1024;

/// The programs as a new agent loads them.
fn load(pins: &Path) -> Programs {
    object::load(pins, FLOWS_MAX).unwrap_or_else(|error| panic!("{error:?}")).0
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
        assert!(on_tcx().is_empty());
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
        let output = Command::new("ip").args(["link", "show", INTERFACE]).output().unwrap();
        assert!(!String::from_utf8_lossy(&output.stdout).contains("xdp"));
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
    let error = object::pin_folder(Path::new("/tmp/shoal-no-such-folder")).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("mount -t bpf") && text.contains("--bpffs"), "{text}");
}
