//! `shoal status --all`: every node at a glance, as the managers know it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use hyper::Method;
use serde::Deserialize;

use crate::api;
use crate::print;

/// What a manager answers.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Swarm {
    index: u64,
    leader: Option<String>,
    note: Option<String>,
    nodes: Vec<Node>,
    managers: Vec<Manager>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    hostname: String,
    role: String,
    leader: bool,
    state: String,
    version: String,
    session: Option<Session>,
    uplinks: Vec<Uplink>,
    wire_guard: Option<WireGuard>,
    problem: Option<Problem>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Session {
    open: bool,
    since: String,
    heard: String,
    applied: u64,
    behind: u64,
    behind_ms: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Uplink {
    name: String,
    mode: String,
    #[serde(rename = "MTU")]
    mtu: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WireGuard {
    kind: String,
    key_made: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Problem {
    text: String,
    time: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Manager {
    hostname: String,
    refused: Option<BTreeMap<String, u64>>,
}

/// Asks the agent whose run folder this is, a manager's, and prints what it knows.
pub(super) fn run(run_dir: &Path, json: bool) -> Result<()> {
    let answer = api::send(run_dir, Method::GET, "/shoal/v1/status", "")?;
    let text = if json {
        print::json(&answer)?
    } else {
        let swarm = serde_json::from_slice(&answer).context("the agent's answer does not decode")?;
        told(&swarm, SystemTime::now())
    };
    print::line(&text)?;
    Ok(())
}

fn told(swarm: &Swarm, now: SystemTime) -> String {
    let Swarm { index, leader, note, nodes, managers } = swarm;
    let leading = nodes.iter().find(|node| node.leader).map(|node| &node.hostname);
    let mut lines = vec![match leading.or(leader.as_ref()) {
        Some(leader) => format!("The swarm is at index {index}, led by {leader}."),
        None => format!("This manager is at index {index}."),
    }];
    lines.extend(note.clone());
    let titles = [
        "NODE",
        "ROLE",
        "STATE",
        "SESSION",
        "APPLIED",
        "BEHIND",
        "UPLINKS",
        "WIREGUARD",
        "VERSION",
        "LAST PROBLEM",
    ];
    let rows: Vec<_> = nodes.iter().map(|node| row(node, leader.is_some(), now)).collect();
    lines.push(print::table(titles, &rows));
    lines.extend(managers.iter().map(refused));
    lines.join("\n")
}

fn row(node: &Node, is_led: bool, now: SystemTime) -> [String; 10] {
    let Node { hostname, role, leader, state, version, session, uplinks, wire_guard, problem } = node;
    let unknown = || "unknown".to_owned();
    let ago = |time: &str| print::parsed(time).map_or_else(unknown, |time| ago(time, now));
    let role = if *leader { "leader" } else { role };
    let (session_words, applied, behind) = match session {
        None => (if is_led { "none".to_owned() } else { unknown() }, unknown(), unknown()),
        Some(Session { open, since, heard, applied, behind, behind_ms }) => {
            let is = if *open { "open for" } else { "gone for" };
            let behind = match (behind, behind_ms) {
                (0, _) => "no".to_owned(),
                (1, ms) => format!("1 entry, {}", print::duration(Duration::from_millis(*ms))),
                (behind, ms) => {
                    format!("{behind} entries, {}", print::duration(Duration::from_millis(*ms)))
                }
            };
            (format!("{is} {}, heard {} ago", ago(since), ago(heard)), applied.to_string(), behind)
        }
    };
    let uplink = |Uplink { name, mode, mtu }: &Uplink| {
        let mtu = mtu.map(|mtu| format!(" MTU {mtu}")).unwrap_or_default();
        format!("{name} {mode}{mtu}")
    };
    let uplinks: Vec<String> = uplinks.iter().map(uplink).collect();
    let wireguard = match wire_guard {
        None => unknown(),
        Some(WireGuard { kind, key_made: None }) => kind.clone(),
        Some(WireGuard { kind, key_made: Some(made) }) => format!("{kind}, key of {}", ago(made)),
    };
    let problem = match problem {
        Some(Problem { text, time }) => format!("{} ago: {text}", ago(time)),
        // Who tells of anything tells of this.
        None if wire_guard.is_some() => "none".to_owned(),
        None => unknown(),
    };
    let cells = [
        hostname.clone(),
        role.to_owned(),
        state.clone(),
        session_words,
        applied,
        behind,
        if uplinks.is_empty() { "none".to_owned() } else { uplinks.join(", ") },
        wireguard,
        version.clone(),
        problem,
    ];
    // Some of it is said by the nodes.
    cells.map(|cell| cell.chars().filter(|char| !char.is_control()).collect())
}

fn ago(time: SystemTime, now: SystemTime) -> String {
    print::duration(now.duration_since(time).unwrap_or_default())
}

/// Whom a manager's port turned away.
fn refused(manager: &Manager) -> String {
    let Manager { hostname, refused } = manager;
    let Some(refused) = refused else { return format!("{hostname} does not answer as a manager.") };
    let counts: Vec<String> = refused.iter().map(|(cause, count)| format!("{count} {cause}")).collect();
    let counts = if counts.is_empty() { "nobody".to_owned() } else { counts.join(", ") };
    format!("refused by {hostname}: {counts}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-11-23T02:00:00Z";

    #[test]
    fn three_nodes_are_told_in_a_table() {
        let answer = r#"{
            "Index": 1204, "Leader": "n1-id",
            "Nodes": [
                {"ID": "n1-id", "Hostname": "n1", "Role": "manager", "Leader": true, "State": "ready", "Version": "0.1.0",
                 "Session": {"Open": true, "Since": "2026-11-22T23:00:00Z", "Heard": "2026-11-23T01:59:59.5Z", "Applied": 1204,
                             "Behind": 0, "BehindMs": 0},
                 "Uplinks": [{"Name": "eth0", "Mode": "xdp-native", "MTU": 1500}],
                 "WireGuard": {"Kind": "kernel", "KeyMade": "2026-11-22T22:00:00Z"}, "Problem": null},
                {"ID": "n2-id", "Hostname": "n2", "Role": "manager", "Leader": false, "State": "ready", "Version": "0.1.0",
                 "Session": {"Open": true, "Since": "2026-11-23T01:58:30Z", "Heard": "2026-11-23T01:59:58Z", "Applied": 1190,
                             "Behind": 14, "BehindMs": 340},
                 "Uplinks": [{"Name": "eth0", "Mode": "tc", "MTU": 1500}, {"Name": "eth1", "Mode": "xdp-generic", "MTU": 9000}],
                 "WireGuard": {"Kind": "none"},
                 "Problem": {"Text": "no uplink:\n eth2", "Time": "2026-11-23T01:48:00Z"}},
                {"ID": "n3-id", "Hostname": "n3", "Role": "worker", "Leader": false, "State": "down", "Version": "0.1.0",
                 "Session": null, "Uplinks": [{"Name": "eth0", "Mode": "tc"}], "WireGuard": null, "Problem": null}],
            "Managers": [
                {"ID": "n1-id", "Hostname": "n1", "Answers": true, "Index": 1204, "Refused": {"handshake": 12, "token": 3}},
                {"ID": "n2-id", "Hostname": "n2", "Answers": true, "Index": 1204, "Refused": {}},
                {"ID": "n4-id", "Hostname": "n4", "Answers": false, "Index": null, "Refused": null}]
        }"#;
        let swarm: Swarm = serde_json::from_str(answer).unwrap();
        let expected = "\
The swarm is at index 1204, led by n1.
NODE  ROLE     STATE  SESSION                         APPLIED  BEHIND              UPLINKS                                      \
WIREGUARD           VERSION  LAST PROBLEM
n1    leader   ready  open for 3 h, heard 500 ms ago  1204     no                  eth0 xdp-native MTU 1500                     \
kernel, key of 4 h  0.1.0    none
n2    manager  ready  open for 90 s, heard 2 s ago    1190     14 entries, 340 ms  eth0 tc MTU 1500, eth1 xdp-generic MTU 9000  \
none                0.1.0    12 min ago: no uplink: eth2
n3    worker   down   none                            unknown  unknown             eth0 tc                                      \
unknown             0.1.0    unknown
refused by n1: 12 handshake, 3 token
refused by n2: nobody
n4 does not answer as a manager.";
        assert_eq!(told(&swarm, print::parsed(NOW).unwrap()), expected);
    }

    #[test]
    fn without_a_leader_it_is_said_what_that_means() {
        let answer = r#"{"Index": 7, "Leader": null, "Note": "The swarm does not have a leader.", "Nodes": [
            {"ID": "n1-id", "Hostname": "n1", "Role": "manager", "Leader": false, "State": "ready", "Version": "0.1.0",
             "Session": null, "Uplinks": [], "WireGuard": null, "Problem": null}], "Managers": []}"#;
        let swarm: Swarm = serde_json::from_str(answer).unwrap();
        let expected = "\
This manager is at index 7.
The swarm does not have a leader.
NODE  ROLE     STATE  SESSION  APPLIED  BEHIND   UPLINKS  WIREGUARD  VERSION  LAST PROBLEM
n1    manager  ready  unknown  unknown  unknown  none     unknown    0.1.0    unknown";
        assert_eq!(told(&swarm, SystemTime::now()), expected);
    }
}
