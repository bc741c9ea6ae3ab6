//! Tasks on different nodes, whatever the links between these carry.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::engine::Task;
use crate::figure;
use crate::iperf3;
use crate::lab::{self, Lab, command_in, slowness, until};
use crate::overlay::{ENCRYPTED, create_idle, create_network};
use crate::undo::Undo;
use crate::ways::Family;

/// What the lab's links carry, bytes.
const USUAL: u32 = 1500;
const NARROW: u32 = 1400;
/// What those of many data centres carry.
const JUMBO: u32 = 9000;
/// What VXLAN takes of it over IPv4.
const ENCAPSULATION: u32 = 50;
/// What WireGuard takes of it over IPv4, and VXLAN within, which goes over IPv6 there.
const ENCRYPTION: u32 = 60 + 70;
/// Links that carry less have no IPv6 (RFC 8200, section 5).
const IPV6_LEAST: u32 = 1280;
/// How long agents may take to see that links have changed.
const FOLLOWED: Duration = Duration::from_secs(30);
/// Of datagrams: what a starved machine may lose. A path that does not carry them loses all.
const LOST_MAX_PERCENT: f64 = 20.0;
/// How long a transfer goes on whose path changes, and how much of that it may stand still, s.
const TRANSFER_S: u32 = 10;
const STALL_MAX_S: f64 = 7.0;
const INTERVAL_S: f64 = 0.1;
/// How much a bulk transfer is, MB, and how fast it is at least; how fast datagrams are sent; all of it where the machine is
/// no slower than usual.
const BULK_MB: u32 = 50;
const LEAST_MBITS: f64 = 20.0;
const DATAGRAMS_MBITS: u32 = 50;
const TRANSFER_MBITS: u32 = 200;

pub(crate) fn tasks_talk_whatever_the_underlay_carries(lab: &Lab) -> Result<()> {
    talk(lab, &[], ENCAPSULATION)
}

pub(crate) fn tasks_talk_encrypted_whatever_the_underlay_carries(lab: &Lab) -> Result<()> {
    talk(lab, ENCRYPTED, ENCRYPTION)
}

pub(crate) fn transfers_go_on_when_the_underlay_narrows(lab: &Lab) -> Result<()> {
    narrow(lab, &[], ENCAPSULATION, &Family::ALL)
}

pub(crate) fn encrypted_transfers_go_on_when_the_underlay_narrows(lab: &Lab) -> Result<()> {
    narrow(lab, ENCRYPTED, ENCRYPTION, &[Family::V6])
}

/// A server of iperf3 on n1 and a caller on n2, on a dual-stack network with these options.
pub(crate) fn create(lab: &Lab, options: &[&str], families: &[Family]) -> Result<Task> {
    create_network(lab, "blue", &[&["--ipv6"], options].concat())?;
    iperf3::serve(lab, "blue", "n1")?;
    let caller = create_idle(lab, "caller", &["--network", "blue", "--constraint", "node.hostname==n2"])?;
    families.iter().try_for_each(|family| iperf3::until_served(&caller, *family))?;
    Ok(caller)
}

/// Bulk to the server `server` and from it, and datagrams of 8 KB.
pub(crate) fn transfer(caller: &Task, family: Family) -> Result<()> {
    let mut told = Vec::new();
    let (bulk, rate) = (format!("{}M", BULK_MB / slowness()), format!("{}M", DATAGRAMS_MBITS / slowness()));
    let least = LEAST_MBITS / f64::from(slowness());
    for flow in [&["-n", &bulk][..], &["-n", &bulk, "-R"], &["-u", "-l", "8000", "-b", &rate, "-n", "4M"]] {
        let report = iperf3::ask(caller, family, flow)?;
        let megabits = iperf3::megabits(&report)?;
        let lost = if flow[0] == "-u" { iperf3::lost(&report)?.1 } else { 0.0 };
        told.push(format!("{megabits:.0} Mbit/s, {lost:.1} % lost"));
        ensure!(megabits > least && lost < LOST_MAX_PERCENT, "iperf3 {}: {report}", flow.join(" "));
    }
    figure!("{family}: up {}; down {}; datagrams of 8000 bytes {}", told[0], told[1], told[2]);
    Ok(())
}

/// Has all nodes' links carry `mtu` bytes, and waits until their agents have followed.
fn resize(lab: &Lab, mtu: u32) -> Result<Vec<Undo>> {
    let mut undo = Vec::new();
    for node in &lab.nodes {
        for (host, link) in [("sw", node.name.as_str()), (node.name.as_str(), "eth0")] {
            let set = |mtu: u32| {
                let mut ip = command_in(host, "ip");
                ip.args(["link", "set", link, "mtu", &mtu.to_string()]);
                ip
            };
            lab::output(&mut set(mtu))?;
            undo.push(Undo::new(set(USUAL)));
        }
    }
    for node in &lab.nodes {
        let expected = format!(" mtu {} ", mtu - ENCAPSULATION);
        until(&format!("{node} follows its link to {mtu} bytes"), FOLLOWED, || {
            let shown = lab::output(node.command("ip").args(["-oneline", "link", "show", "dev", "shoal0"]))?;
            Ok(shown.contains(&expected).then_some(()))
        })?;
    }
    Ok(undo)
}

/// The most that all nodes' links can carry: a program in the driver keeps a veth to a page.
fn largest(lab: &Lab) -> Result<u32> {
    let mut largest = JUMBO;
    for node in &lab.nodes {
        let mut ip = command_in("sw", "ip");
        let shown = lab::output(ip.args(["-details", "-json", "link", "show", "dev", &node.name]))?;
        let shown: Value = serde_json::from_str(&shown)?;
        let most = shown[0]["max_mtu"].as_u64().context("a link without its largest MTU")?;
        largest = largest.min(u32::try_from(most)?);
    }
    Ok(largest)
}

/// At each size, tasks made then have links that fit, and transfers of all kinds pass. `taken`: of each packet, bytes.
fn talk(lab: &Lab, options: &[&str], taken: u32) -> Result<()> {
    for mtu in [USUAL, NARROW, largest(lab)?] {
        let undo = resize(lab, mtu)?;
        let families = if mtu - taken < IPV6_LEAST { &Family::ALL[..1] } else { &Family::ALL };
        let caller = create(lab, options, families)?;
        let shown = lab::output(caller.command("ip").args(["-oneline", "link", "show", "dev", "eth0"]))?;
        ensure!(shown.contains(&format!(" mtu {} ", mtu - taken)), "underlay {mtu}, taken {taken}: {shown}");
        figure!("underlay {mtu}: a task's link carries {} bytes", mtu - taken);
        for family in families {
            transfer(&caller, *family)?;
        }
        lab.reset()?;
        drop(undo);
    }
    resize(lab, USUAL).map(drop)
}

/// The path narrows under a transfer, as far as leaves the tasks IPv6, and all that comes later fits.
fn narrow(lab: &Lab, options: &[&str], taken: u32, families: &[Family]) -> Result<()> {
    let narrow = NARROW.max(IPV6_LEAST + taken);
    let caller = create(lab, options, families)?;
    for family in families.iter().copied() {
        let (undo, report) = std::thread::scope(|scope| {
            let (seconds, interval) = ((TRANSFER_S * slowness()).to_string(), INTERVAL_S.to_string());
            let rate = format!("{}M", TRANSFER_MBITS / slowness());
            let caller = &caller;
            // Slow enough that agents on the same CPUs get their share.
            let transfer =
                move || iperf3::ask(caller, family, &["-t", &seconds, "-i", &interval, "-b", &rate]);
            let transfer = scope.spawn(transfer);
            std::thread::sleep(Duration::from_secs(2));
            let undo = resize(lab, narrow)?;
            anyhow::Ok((undo, transfer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?))
        })?;
        let intervals = report["intervals"].as_array().context("a report without intervals")?;
        let moved = |interval: &&Value| interval["sum"]["bytes"].as_u64().unwrap_or_default() > 0;
        let still = intervals.iter().filter(|interval| !moved(interval)).count();
        let stalled = f64::from(u32::try_from(still)?) * INTERVAL_S;
        let goes_on = intervals.last().as_ref().is_some_and(moved);
        figure!("{family}: from {USUAL} to {narrow} under a transfer: it stood still for {stalled:.1} s");
        ensure!(
            goes_on && stalled < STALL_MAX_S * f64::from(slowness()),
            "{stalled:.1} s; at the end it goes on: {goes_on}"
        );
        transfer(&caller, family)?;
        drop(undo);
        resize(lab, USUAL).map(drop)?;
    }
    Ok(())
}
