//! Fixed egress addresses, on the wire. No program translates here: a task's alias is a host's address, and the test sends
//! under it.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::links::{Loss, losses};

const FIXED: [&str; 2] = ["192.0.2.7", "2001:db8::7"];
/// Where the test sends to: nobody answers there.
const OUTSIDE: [&str; 2] = ["192.0.2.2", "2001:db8::2"];

/// The aliases of the first task's and of the second's only endpoint.
const ALIASES: [Ipv4Addr; 2] = [Ipv4Addr::new(169, 254, 64, 3), Ipv4Addr::new(169, 254, 64, 4)];

fn alias6(alias: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits(0xfd73_686f_616c_0001 << 64 | u128::from(alias.to_bits()))
}

/// A host with an outside, where sources are noted, the fixed addresses, and the aliases.
fn host(tasks: [TaskRecord; 2]) -> Host {
    let host = Host::new(with(tasks));
    for addr in ["2001:db8::1"].iter().chain(&FIXED) {
        has(addr);
    }
    for addr in OUTSIDE {
        run(&format!("ip neigh add {addr} lladdr 02:00:00:00:00:02 dev up0"));
    }
    for alias in ALIASES {
        run(&format!("ip address add {alias}/32 dev lo"));
        run(&format!("ip address add {}/128 dev lo nodad", alias6(alias)));
    }
    let rules = host.folder.path().join("wire.nft");
    let text = "table netdev wire {\n\
        set seen4 { type ipv4_addr; flags dynamic; }\n\
        set seen6 { type ipv6_addr; flags dynamic; }\n\
        chain in {\n\
        type filter hook ingress device \"up1\" priority 0; policy accept;\n\
        udp dport 9 add @seen4 { ip saddr }\n\
        udp dport 9 add @seen6 { ip6 saddr }\n\
        }\n}\n";
    std::fs::write(&rules, text).unwrap();
    run(&format!("nft -f {}", rules.display()));
    host
}

fn has(addr: &str) {
    let (prefix, nodad) = if addr.contains(':') { (64, " nodad") } else { (24, "") };
    run(&format!("ip address add {addr}/{prefix} dev up0{nodad}"));
}

fn lacks(addr: &str) {
    let prefix = if addr.contains(':') { 64 } else { 24 };
    run(&format!("ip address del {addr}/{prefix} dev up0"));
}

/// A task's socket in each family.
fn sockets(alias: Ipv4Addr) -> [UdpSocket; 2] {
    [IpAddr::from(alias), alias6(alias).into()].map(|alias| UdpSocket::bind((alias, 0)).unwrap())
}

/// Sends to the outside. What is dropped on its way out is an error to a process of the host.
fn send(sockets: &[UdpSocket; 2]) {
    for (socket, to) in sockets.iter().zip(OUTSIDE) {
        let _ = socket.send_to(b"hello", (to.parse::<IpAddr>().unwrap(), 9));
    }
}

/// The sources of what was sent to the outside since the last look.
fn seen() -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    for set in ["seen4", "seen6"] {
        let listed = run(&format!("nft list set netdev wire {set}"));
        run(&format!("nft flush set netdev wire {set}"));
        let elements = listed.split_once("elements = {").and_then(|(_, rest)| rest.split_once('}'));
        seen.extend(elements.iter().flat_map(|(all, _)| all.split(',')).map(|addr| addr.trim().to_owned()));
    }
    seen
}

fn of(addresses: &[&str]) -> BTreeSet<String> {
    addresses.iter().map(|addr| (*addr).to_owned()).collect()
}

fn lost() -> u64 {
    losses().unwrap().into_iter().find(|(loss, _)| *loss == Loss::NoAddress).unwrap().1
}

fn fixed(id: &str, addresses: &[&str]) -> TaskRecord {
    let mut task = task(id, "shoal/exec", &["sleep", "1000"], &["front"]);
    let egress = addresses.iter().map(|addr| addr.parse().unwrap()).collect();
    task.spec.as_mut().unwrap().egress = egress;
    task
}

async fn up(host: &Host) -> Node {
    let node = host.start().await.unwrap();
    for id in [T1, T2] {
        host.reaches(id, TaskState::Running).await;
    }
    let endpoints = host.notes().local.unwrap().endpoints;
    let aliases: Vec<_> = endpoints.iter().map(|endpoint| endpoint.alias).collect();
    assert_eq!(aliases, ALIASES);
    node
}

#[test]
fn tasks_send_under_their_services_addresses_and_others_under_the_nodes() {
    in_netns(|| async {
        let host = host([fixed(T1, &FIXED), fixed(T2, &["2001:db8::7"])]);
        let node = up(&host).await;
        send(&sockets(ALIASES[0]));
        assert_eq!(seen(), of(&FIXED));
        send(&sockets(ALIASES[1]));
        assert_eq!(seen(), of(&["192.0.2.1", "2001:db8::7"]), "a family that is not listed leaves as ever");

        // Without the address nothing leaves, of flows that are known or not, and all of it is counted.
        let known = sockets(ALIASES[0]);
        send(&known);
        assert_eq!(seen(), of(&FIXED));
        let before = lost();
        lacks(FIXED[0]);
        until("packets are dropped", || {
            seen();
            send(&known);
            lost() > before
        })
        .await;
        seen();
        let before = lost();
        for _ in 0..10 {
            send(&known);
            send(&sockets(ALIASES[0]));
        }
        assert_eq!((seen(), lost() - before), (of(&[FIXED[1]]), 20));
        send(&sockets(ALIASES[1]));
        assert_eq!(seen(), of(&["192.0.2.1", "2001:db8::7"]), "others go on");
        has(FIXED[0]);
        until("packets leave again", || {
            send(&known);
            seen() == of(&FIXED)
        })
        .await;
        assert!(node.tear_down().await.is_empty());
    });
}

#[test]
fn no_restart_and_no_repair_lets_a_task_send_under_another_address() {
    in_netns(|| async {
        let host = host([fixed(T1, &FIXED), fixed(T2, &[])]);
        let node = up(&host).await;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let sender = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                send(&sockets(ALIASES[0]));
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        // Counts outlast the agent.
        lacks(FIXED[1]);
        until("packets are counted", || lost() > 0).await;
        let counted = lost();
        drop(node);
        for _ in 0..3 {
            seen();
            drop(up(&host).await);
            assert_eq!(seen(), of(&[FIXED[0]]));
        }
        assert!(lost() > counted);

        let node = up(&host).await;
        // While the table is gone nothing is translated: no router takes an address of the link alone.
        for damage in [
            "nft delete table ip shoal",
            "nft flush chain ip shoal postrouting",
            "nft flush set ip shoal sources",
            "nft flush set ip shoal fixed",
            "nft flush map ip shoal egress",
        ] {
            run(damage);
            until("the rules are repaired", || {
                let listed = run("nft list ruleset");
                seen();
                listed.contains("snat to ip saddr map @egress")
                    && listed.contains("elements = { 169.254.64.3 }")
                    && listed.contains("elements = { 169.254.64.3 : 192.0.2.7 }")
                    && listed.contains("elements = { 169.254.64.3 . 192.0.2.7 }")
            })
            .await;
            seen();
            until("packets leave", || seen() == of(&[FIXED[0]])).await;
        }
        stop.store(true, Ordering::Relaxed);
        sender.join().unwrap();

        // What ended has no entry, and its alias is free for others.
        host.change(|table| {
            let record = table.tasks.get_mut(&TaskId::from(T1)).unwrap();
            (record.desired, record.observed) = (TaskState::Shutdown, TaskState::Running);
        });
        host.settled.send_replace(1);
        host.reaches(T1, TaskState::Shutdown).await;
        until("its entries are gone", || !run("nft list table ip shoal").contains("elements")).await;
        assert!(node.tear_down().await.is_empty());
    });
}
