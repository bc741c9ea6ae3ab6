//! WireGuard as the node's loop drives it: from the first key to its change, an agent's restart, and a tear-down.

use std::time::SystemTime;

use mesh_api::table::{NodeRecord, NodeState};
use mesh_api::wireguard::WireguardIdentity;

use super::*;
use crate::health::ns_since_epoch;

#[test]
fn a_node_tells_its_keys_changes_them_and_forgets_them() {
    in_netns(|| async {
        let mut table = table();
        let here = NodeRecord {
            id: "here".into(),
            hostname: "here".to_owned(),
            role: Role::Worker,
            vtep: UPLINK,
            state: NodeState::Ready,
            wireguard: Vec::new(),
            manager: None,
        };
        table.nodes.insert(here.id.clone(), here);
        let host = Host::new(table);
        let told = || host.describe.describe(UPLINK, UPLINK).wireguard;
        let show = |identities: Vec<WireguardIdentity>| {
            host.change(|table| table.nodes.get_mut(&"here".into()).unwrap().wireguard = identities);
        };
        let index = || host.tables.borrow().as_ref().unwrap().index;
        let sent_from = || host.notes().local.unwrap().wireguard;

        let node = host.start().await.unwrap();
        let first = told();
        assert_eq!(first.len(), 1);
        assert_eq!(sent_from(), Some(first[0].address()), "the dataplane sends from it from the start");
        assert_eq!(*host.applied.borrow(), Some(0));
        assert!(run("ip -o address show shoal-wg1").contains(&first[0].address().to_string()));
        let encrypts = || host.describe.health().watch().borrow().wireguard;
        let made_ns = encrypts().expect("the managers are told").key_made_ns;
        assert!(ns_since_epoch(SystemTime::now()) - made_ns < 60_000_000_000, "{made_ns}");
        show(first.clone());

        host.change(|table| table.cluster.key_epoch += 1);
        until("another key is told behind it", || told().len() == 2).await;
        let both = told();
        assert_eq!((both[0], sent_from()), (first[0], Some(first[0].address())));
        show(both.clone());
        until("that is applied", || *host.applied.borrow() == Some(index())).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(told(), both, "not every node has it");
        host.settled.send_replace(index());
        until("the other key is in use", || told() == [both[1], both[0]]).await;
        until("also for the dataplane", || sent_from() == Some(both[1].address())).await;

        // Another agent finds both as they are.
        drop(node);
        let is_kernel_s = run("ip -o link show type wireguard").contains("shoal-wg");
        until("a device of this process is gone", || is_kernel_s || !links().contains("shoal-wg")).await;
        let node = host.start().await.unwrap();
        assert_eq!(told(), [both[1], both[0]]);
        assert_eq!(host.notes().local.unwrap().addresses, [UPLINK]);

        assert_eq!(node.tear_down().await, Vec::<String>::new());
        assert!(!links().contains("shoal-wg") && !run("ip -6 rule").contains("2055"));
        assert!(!host.folder.path().join("wireguard.json").exists());
    });
}

#[test]
fn a_node_without_its_port_works_and_tells_no_key() {
    in_netns(|| async {
        let taken = ["[::]:51820", "[::]:51821"].map(|addr| UdpSocket::bind(addr).unwrap());
        let host = Host::new(table());
        let node = host.start().await.unwrap();
        assert_eq!(host.describe.describe(UPLINK, UPLINK).wireguard, []);
        assert_eq!(host.notes().local.unwrap().wireguard, None);
        assert_eq!(host.describe.health().watch().borrow().wireguard, None);
        assert!(!links().contains("shoal-wg"));
        drop(taken);
        until("the port is free, and a key told", || {
            !host.describe.describe(UPLINK, UPLINK).wireguard.is_empty()
        })
        .await;
        assert_eq!(node.tear_down().await, Vec::<String>::new());
    });
}
