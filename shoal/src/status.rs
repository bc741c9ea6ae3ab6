//! `shoal status`: this node at a glance.

mod all;

use std::net::IpAddr;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use mesh_agent::dataplane::inspect::drops::{Counts, Ended};
use mesh_agent::dataplane::inspect::programs::Hook;
use mesh_agent::dataplane::inspect::status::{
    Counted, EgressStatus, Member, PeerStatus, Plane, SilentStatus, Status, status,
};
use mesh_agent::dataplane::inspect::{InspectError, Live};
use mesh_agent::links::{Facts, Links};
use mesh_agent::{EncryptionError, EncryptionKind, KeyStatus, encryption_status};
use mesh_api::error::chain;
use serde::Serialize;

use crate::args::StatusArgs;
use crate::facts;
use crate::print;

/// What rates are measured over.
const PERIOD: Duration = Duration::from_secs(1);
/// How much of a key is shown, characters.
const KEY_SHOWN: usize = 8;
/// How many reasons of drops are shown.
const PROBLEMS_MAX: usize = 5;

/// All that is shown.
#[derive(Debug, Serialize)]
struct Shown {
    version: String,
    kernel: String,
    #[serde(flatten)]
    status: Status,
    /// The node's keys for encrypted networks, the one that is sent by first.
    encryption: Vec<KeyStatus>,
    /// Drops with the highest rates, then with the highest counts.
    problems: Vec<Ended>,
}

/// Prints what this node is and does, or how all nodes are.
pub(crate) fn run(args: &StatusArgs) -> Result<()> {
    if args.all {
        return all::run(&args.socket.run_dir, args.json);
    }
    let (bpffs, state_dir) = (&args.pins.bpffs, &args.state.state_dir);
    let (facts, keys) = look(state_dir)?;
    let mut status = status(state_dir, bpffs, &facts)?;
    let encryption = keys.unwrap_or_else(|error| {
        status.troubles.push(chain(&error));
        Vec::new()
    });
    let problems = match Live::open(bpffs) {
        Ok(live) => problems(&live)?,
        Err(InspectError::NotRoot) => return Err(InspectError::NotRoot.into()),
        // Said in the status.
        Err(_) => Vec::new(),
    };
    let (version, kernel) = (facts::version_line(), facts::kernel_release());
    let shown = Shown { version, kernel, status, encryption, problems };
    print::line(&if args.json { serde_json::to_string_pretty(&shown)? } else { told(&shown) })?;
    Ok(())
}

/// The host's interfaces, and the node's keys.
fn look(state_dir: &Path) -> Result<(Facts, Result<Vec<KeyStatus>, EncryptionError>)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    runtime.block_on(async { Ok((Links::open()?.facts().await?, encryption_status(state_dir).await)) })
}

fn problems(live: &Live) -> Result<Vec<Ended>> {
    let before = Counts::now(live)?;
    sleep(PERIOD);
    let mut drops = Counts::now(live)?.since(&before, live)?;
    drops.retain(|ended| ended.drop);
    drops.sort_by(|a, b| b.rate.total_cmp(&a.rate).then(b.packets.cmp(&a.packets)));
    drops.truncate(PROBLEMS_MAX);
    Ok(drops)
}

fn told(shown: &Shown) -> String {
    let Shown { version, kernel, status, encryption, problems } = shown;
    let Status { agent_runs, member, abi_version, egress, silent, dataplane, troubles } = status;
    let mut lines = vec![
        field("shoal", &format!("{version}, maps of version {abi_version}, kernel {kernel}")),
        field(
            "agent",
            if *agent_runs {
                "runs"
            } else {
                "does not run in this network namespace: the dataplane goes on without it"
            },
        ),
    ];
    match member {
        Some(member) => lines.extend(member_lines(member)),
        None => lines.push(field("node", "of no cluster, by its state folder")),
    }
    lines.extend(encryption_lines(encryption, member.is_some()));
    lines.extend(silent.iter().map(|status| field("SILENT", &silent_words(status))));
    lines.extend(dataplane.iter().flat_map(plane_lines));
    lines.extend(egress.iter().map(|status| field("egress", &egress_words(status))));
    if problems.is_empty() && dataplane.is_some() {
        lines.push(field("drops", "none"));
    }
    for (index, Ended { name, packets, rate, description, .. }) in problems.iter().enumerate() {
        let text = format!("{name}: {packets}, {rate:.1} a second. {description}");
        lines.push(field(if index == 0 { "drops" } else { "" }, &text));
    }
    lines.extend(troubles.iter().map(|trouble| field("TROUBLE", trouble)));
    lines.join("\n")
}

fn field(name: &str, value: &str) -> String {
    format!("{name:<14}{value}")
}

fn member_lines(member: &Member) -> Vec<String> {
    let Member { node_id, cluster_id, hostname, role, advertise, vtep, table_index } = member;
    let role = format!("{role:?}").to_lowercase();
    let index = table_index.map_or_else(|| "none".to_owned(), |index| index.to_string());
    vec![
        field("node", &format!("{hostname} ({node_id}), {role} of cluster {cluster_id}")),
        field("addresses", &format!("advertises {advertise}, VXLAN {vtep}")),
        field("table index", &index),
    ]
}

fn encryption_lines(keys: &[KeyStatus], is_member: bool) -> Vec<String> {
    if keys.is_empty() && is_member {
        return vec![field("encryption", "no keys: what encrypted networks are sent from here is dropped")];
    }
    let line = |(index, key)| field(if index == 0 { "encryption" } else { "" }, &key_words(key, index == 0));
    keys.iter().enumerate().map(line).collect()
}

fn key_words(key: &KeyStatus, is_first: bool) -> String {
    let KeyStatus { public_key, made, link, kind, port } = key;
    let way = match kind {
        Some(EncryptionKind::Kernel) => format!("{link} of the kernel's WireGuard"),
        Some(EncryptionKind::UserSpace) => format!("{link} of the agent's own WireGuard"),
        None => format!("{link} IS MISSING"),
    };
    let age = SystemTime::now().duration_since(*made).unwrap_or_default();
    let key = &public_key.to_string()[..KEY_SHOWN];
    let state = if is_first { "in use" } else { "listened to beside it" };
    format!("{way}, UDP port {port}, key {key}… made {} ago, {state}", print::duration(age))
}

fn plane_lines(plane: &Plane) -> Vec<String> {
    let Plane {
        configured,
        vtep,
        vxlan_port,
        uplinks,
        peers,
        hooks,
        missing_hooks,
        local_clients_trouble,
        counts,
        map_bytes,
    } = plane;
    let mut lines = Vec::new();
    match (vtep, vxlan_port) {
        (Some(vtep), Some(port)) if *configured => {
            lines.push(field("dataplane", &format!("forwards; VXLAN {vtep}, UDP port {port}")));
        }
        _ => lines.push(field("dataplane", "not configured yet: it forwards nothing")),
    }
    for uplink in uplinks {
        lines.push(field("uplink", &format!("{}: {}, MTU {}", uplink.name, uplink.mode, uplink.mtu)));
    }
    lines.extend(peers.iter().map(|peer| field("peer", &peer_words(peer))));
    lines
        .extend(hooks.iter().filter(|hook| hook.by != "cgroup").map(|hook| field("hook", &hook_words(hook))));
    lines.extend(missing_hooks.iter().map(|hook| field("MISSING", hook)));
    lines.push(field(
        "local clients",
        local_clients_trouble.as_deref().unwrap_or("served by cgroup programs"),
    ));
    let Counted { services, ports, vips, backends, endpoints, ifaces, flows } = counts;
    lines.push(field(
        "tables",
        &format!(
            "{services} services, {ports} published ports, {vips} VIPs, {backends} backends, {endpoints} endpoints, \
             {ifaces} interfaces of tasks"
        ),
    ));
    let flows: Vec<String> = flows.iter().map(|(stage, entries)| format!("{entries} {stage}")).collect();
    lines.push(field("flow entries", &flows.join(", ")));
    let mut largest: Vec<(&String, &u64)> = map_bytes.iter().collect();
    largest.sort_by_key(|(_, bytes)| std::cmp::Reverse(**bytes));
    let total = print::bytes(map_bytes.values().sum());
    let largest: Vec<String> =
        largest.iter().take(3).map(|(name, bytes)| format!("{name} {}", print::bytes(**bytes))).collect();
    lines.push(field("memory", &format!("{total} in {} maps: {}, …", map_bytes.len(), largest.join(", "))));
    lines
}

fn peer_words(peer: &PeerStatus) -> String {
    let PeerStatus { slot: _, vtep, encrypted, hostname, resolved, fresh, interface, mtu } = peer;
    let through = if *encrypted { " through WireGuard" } else { "" };
    let name = if hostname.is_empty() { vtep.to_string() } else { format!("{hostname} ({vtep})") };
    let name = format!("{name}{through}");
    match (interface, mtu) {
        (Some(interface), Some(mtu)) if *resolved => {
            let fresh = if *fresh { "in use" } else { "not in use lately" };
            format!("{name}: next hop by {interface}, MTU {mtu}, {fresh}")
        }
        _ => format!("{name}: next hop not asked for yet, or not found"),
    }
}

fn silent_words(status: &SilentStatus) -> String {
    let SilentStatus { vtep, hostname, down } = status;
    let name = if hostname.is_empty() { vtep.to_string() } else { format!("{hostname} ({vtep})") };
    let managers = if *down { "is down for the managers, too" } else { "is not down for the managers" };
    format!(
        "{name} doesn't answer this node, and {managers}: its tasks get no new flows from here where others serve"
    )
}

fn egress_words(status: &EgressStatus) -> String {
    let EgressStatus { service, listed, addr } = status;
    if let Some(addr) = addr {
        return format!("tasks of {service} send under {addr}");
    }
    let family = if listed.iter().all(IpAddr::is_ipv4) { "IPv4" } else { "IPv6" };
    let listed: Vec<String> = listed.iter().map(ToString::to_string).collect();
    let listed = listed.join(", ");
    format!(
        "tasks of {service} are to send under {listed}, NOT HERE: what they send to the outside by {family} is dropped"
    )
}

fn hook_words(hook: &Hook) -> String {
    let Hook { program, interface, ifindex, by, program_id, loaded } = hook;
    let on = interface.clone().unwrap_or_else(|| format!("interface {ifindex}, which is gone"));
    let Some(id) = program_id else { return format!("{program} on {on} ({by}): NOT ATTACHED") };
    let age = loaded.and_then(|loaded| SystemTime::now().duration_since(loaded).ok());
    let age = age.map(|age| format!(", loaded {} ago", print::duration(age))).unwrap_or_default();
    format!("{program} on {on} ({by}), program {id}{age}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn shown(dataplane: Option<Plane>) -> Shown {
        let troubles = if dataplane.is_none() { vec!["no dataplane".to_owned()] } else { vec![] };
        let egress = vec![
            EgressStatus {
                service: "web".to_owned(),
                listed: vec!["192.0.2.8".parse().unwrap(), "192.0.2.7".parse().unwrap()],
                addr: Some("192.0.2.7".parse().unwrap()),
            },
            EgressStatus {
                service: "web".to_owned(),
                listed: vec!["2001:db8::7".parse().unwrap(), "2001:db8::8".parse().unwrap()],
                addr: None,
            },
        ];
        let silent = vec![SilentStatus {
            vtep: "198.18.0.13".parse().unwrap(),
            hostname: "n3".to_owned(),
            down: false,
        }];
        let status =
            Status { agent_runs: false, member: None, abi_version: 2, egress, silent, dataplane, troubles };
        let (version, kernel) = ("0.1.0".to_owned(), "6.18".to_owned());
        Shown { version, kernel, status, encryption: vec![], problems: vec![] }
    }

    #[test]
    fn a_host_without_a_dataplane_says_so() {
        let text = told(&shown(None));
        assert!(text.contains("agent         does not run"), "{text}");
        assert!(text.contains("TROUBLE       no dataplane"), "{text}");
    }

    #[test]
    fn keys_are_told_with_where_they_are_used_and_since_when() {
        let made = SystemTime::now() - Duration::from_hours(3);
        let public_key = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=".parse().unwrap();
        let key = |link, kind, port| KeyStatus { public_key, made, link, kind, port };
        let lines = encryption_lines(
            &[
                key("shoal-wg1", Some(EncryptionKind::Kernel), 51821),
                key("shoal-wg0", Some(EncryptionKind::UserSpace), 51820),
            ],
            true,
        );
        let expected = [
            "encryption    shoal-wg1 of the kernel's WireGuard, UDP port 51821, key hSDwCYkw… made 3 h ago, in use",
            "              shoal-wg0 of the agent's own WireGuard, UDP port 51820, key hSDwCYkw… made 3 h ago, \
             listened to beside it",
        ];
        assert_eq!(lines, expected);
        let missing = encryption_lines(&[key("shoal-wg0", None, 51820)], true);
        assert!(missing[0].contains("shoal-wg0 IS MISSING"), "{missing:?}");
        assert!(encryption_lines(&[], true)[0].contains("no keys"));
        assert!(encryption_lines(&[], false).is_empty(), "a host of no cluster needs none");
        let json = serde_json::to_value(key("shoal-wg0", Some(EncryptionKind::UserSpace), 51820)).unwrap();
        assert_eq!((&json["kind"], &json["port"]), (&"user-space".into(), &51820.into()));
    }

    #[test]
    fn hooks_and_peers_are_told_with_what_is_wrong_with_them() {
        let hook = Hook {
            program: "from_task".to_owned(),
            interface: None,
            ifindex: 9,
            by: "tcx",
            program_id: None,
            loaded: None,
        };
        let peer = PeerStatus {
            slot: 1,
            vtep: "198.18.0.12".parse().unwrap(),
            encrypted: false,
            hostname: "n2".to_owned(),
            resolved: true,
            fresh: false,
            interface: Some("eth0".to_owned()),
            mtu: Some(1500),
        };
        let plane = Plane {
            configured: true,
            vtep: Some("198.18.0.11".parse().unwrap()),
            vxlan_port: Some(4789),
            uplinks: vec![],
            peers: vec![peer],
            hooks: vec![hook],
            missing_hooks: vec!["from_host".to_owned()],
            local_clients_trouble: Some("cgroup v2 is not mounted".to_owned()),
            counts: Counted::default(),
            map_bytes: BTreeMap::from([("shoal_places".to_owned(), 32 << 20)]),
        };
        let text = told(&shown(Some(plane)));
        for line in [
            "peer          n2 (198.18.0.12): next hop by eth0, MTU 1500, not in use lately",
            "hook          from_task on interface 9, which is gone (tcx): NOT ATTACHED",
            "MISSING       from_host",
            "local clients cgroup v2 is not mounted",
            "memory        32.0 MiB in 1 maps: shoal_places 32.0 MiB, …",
            "egress        tasks of web send under 192.0.2.7",
            "egress        tasks of web are to send under 2001:db8::7, 2001:db8::8, NOT HERE: what they send to the outside by \
             IPv6 is dropped",
            "SILENT        n3 (198.18.0.13) doesn't answer this node, and is not down for the managers: its tasks get no new \
             flows from here where others serve",
            "drops         none",
        ] {
            assert!(text.lines().any(|told| told == line), "{line}\n{text}");
        }
    }
}
