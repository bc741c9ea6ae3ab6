//! Two hosts with devices between them: what comes through, and what does not.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mesh_api::wireguard::WIREGUARD_PORTS;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};

use self::hosts::{Host, IDS, MTU, PORT, Pair, SILENCE, V4, V6, pattern, with_pair};
use super::rotation::GRACE;
use super::*;

mod hosts;

/// The first byte of WireGuard's messages with data.
const DATA: u8 = 4;
/// How long a packet that must come is waited for.
const PATIENCE: Duration = Duration::from_secs(4);

async fn packets_and_streams_come_through(mut pair: Pair, overhead: u32) {
    pair.settle().await;
    assert_eq!([0, 1].map(|which| pair.told(which).len()), [1, 1]);
    // An ICMP echo's headers are 48 bytes.
    let largest = MTU - overhead - 48;
    assert!(pair.pings(0, 56).await && pair.pings(1, largest).await);
    assert!(!pair.ping(0, largest + 1).await, "what does not fit is said to be too big");

    let data = pattern(3 << 20);
    let (from, to) = (SocketAddr::from((pair.addr(0), 0)), SocketAddr::from((pair.addr(1), PORT)));
    let listener = pair.hosts[1].on(move |_| async move { TcpListener::bind(to).await.unwrap() }).await;
    let receive = pair.hosts[1].on(move |_| async move {
        let mut received = Vec::new();
        listener.accept().await.unwrap().0.read_to_end(&mut received).await.unwrap();
        received
    });
    let stream = data.clone();
    let send = pair.hosts[0].on(move |_| async move {
        let socket = TcpSocket::new_v6().unwrap();
        socket.bind(from).unwrap();
        socket.connect(to).await.unwrap().write_all(&stream).await.unwrap();
    });
    let (received, ()) =
        timeout(Duration::from_secs(10), async { futures::join!(receive, send) }).await.unwrap();
    assert!(received == data, "{} of {} bytes", received.len(), data.len());

    // An underlay with larger packets, found while it runs.
    for host in pair.hosts.iter() {
        host.run("ip link set up0 mtu 9000").await;
    }
    for which in [0, 1] {
        pair.follow_table(which, &pair.table, Look::Changes, 9000).await;
    }
    let largest = 9000 - overhead - 48;
    assert!(pair.pings(0, largest).await && !pair.ping(0, largest + 1).await);
    let links = pair.hosts[0].run("ip -d link show dev shoal-wg1").await;
    assert!(links.contains(&format!("mtu {} ", 9000 - overhead)), "{links}");
}

#[test]
fn packets_and_streams_come_through_on_ipv4() {
    with_pair(V4, |pair| packets_and_streams_come_through(pair, 60));
}

#[test]
fn packets_and_streams_come_through_on_ipv6() {
    with_pair(V6, |pair| packets_and_streams_come_through(pair, 80));
}

#[test]
fn who_has_another_key_or_has_left_is_not_heard() {
    with_pair(V4, |mut pair| async move {
        pair.settle().await;
        // The right host knows the left one by another key, though by the same address.
        let mut wrong = pair.table.clone();
        let identity = &mut wrong.nodes.get_mut(&IDS[0].into()).unwrap().wireguard[0];
        let mut key = *identity.public_key.as_bytes();
        key[31] ^= 1;
        identity.public_key = key.into();
        pair.follow_table(1, &wrong, Look::Changes, MTU).await;
        assert!(!pair.is_heard(SILENCE).await, "with another key");
        pair.follow_table(1, &pair.table, Look::Changes, MTU).await;
        // Whoever asks again too soon is not answered; a device that starts anew may.
        pair.hosts[0].run("ip link del shoal-wg1").await;
        pair.follow_table(0, &pair.table, Look::All, MTU).await;
        assert!(pair.is_heard(PATIENCE).await, "with its own");

        let mut left = pair.table.clone();
        left.nodes.remove(&IDS[0].into());
        pair.follow_table(1, &left, Look::Changes, MTU).await;
        assert!(!pair.is_heard(SILENCE).await, "after it left");
    });
}

/// Its peer has a session that it has lost, and would only give that up after 15 s.
#[test]
fn a_device_that_was_lost_is_reached_again_at_once() {
    with_pair(V4, |mut pair| async move {
        pair.settle().await;
        assert!(pair.pings(1, 56).await);
        pair.hosts[0].run("ip link del shoal-wg1").await;
        pair.follow_table(0, &pair.table, Look::All, MTU).await;
        assert!(pair.pings(1, 56).await);
    });
}

#[test]
fn a_peer_that_does_not_change_keeps_its_session_and_one_that_moved_is_found() {
    with_pair(V4, |mut pair| async move {
        pair.settle().await;
        assert!(pair.pings(0, 56).await);
        let sessions = async |pair: &Pair| {
            let look = |host: Rc<Host>| async move {
                let encryption = host.encryption.lock().await;
                match &encryption.as_ref().unwrap().standing[&1].device {
                    Device::UserSpace(device) => Some(device.since_handshakes().await),
                    Device::Kernel(_) => None,
                }
            };
            pair.hosts[0].on(look).await
        };
        let before = sessions(&pair).await;
        let mut third = pair.table.nodes[&IDS[1].into()].clone();
        third.id = "third".into();
        third.wireguard = vec![WireguardIdentity { public_key: [9; 32].into(), port: 1 }];
        pair.table.nodes.insert(third.id.clone(), third);
        pair.round(Look::All).await;
        let after = sessions(&pair).await;
        if let (Some(before), Some(after)) = (before, after) {
            assert_eq!((before.len(), after.len()), (1, 2));
            assert!(after.contains(&None) && after.iter().flatten().next() > before[0].as_ref());
        }
        assert!(pair.pings(0, 56).await);

        // The right host's endpoint at the left one was redirected, and is put right by an audit.
        let mut elsewhere = pair.table.clone();
        elsewhere.nodes.get_mut(&IDS[1].into()).unwrap().vtep = "192.0.2.66".parse().unwrap();
        pair.follow_table(0, &elsewhere, Look::Changes, MTU).await;
        assert!(!pair.is_heard(SILENCE).await);
        pair.follow_table(0, &pair.table, Look::All, MTU).await;
        assert!(pair.is_heard(PATIENCE).await);
    });
}

/// A wire that repeats data: forwards what comes to it, and keeps copies.
async fn repeat(
    near: UdpSocket,
    far: UdpSocket,
    to: SocketAddr,
    again: Arc<AtomicBool>,
    repeated: Arc<AtomicUsize>,
) {
    let (mut out, mut back, mut copies) = (vec![0; 65_536], vec![0; 65_536], Vec::<Vec<u8>>::new());
    let mut client = None;
    loop {
        tokio::select! {
            came = near.recv_from(&mut out) => {
                let (len, from) = came.unwrap();
                client = Some(from);
                // Keepalives are empty, and say nothing.
                let times = if out[0] == DATA && len > 32 { copies.push(out[..len].to_vec()); 2 } else { 1 };
                for _ in 0..times {
                    far.send_to(&out[..len], to).await.unwrap();
                }
                repeated.fetch_add(times - 1, Ordering::Relaxed);
            }
            came = far.recv(&mut back) => {
                let len = came.unwrap();
                near.send_to(&back[..len], client.unwrap()).await.unwrap();
            }
            () = sleep(Duration::from_millis(5)) => {
                if again.swap(false, Ordering::Relaxed) {
                    for copy in &copies {
                        far.send_to(copy, to).await.unwrap();
                        repeated.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_repeated_on_the_way_is_delivered_once() {
    with_pair(V4, |mut pair| async move {
        pair.settle().await;
        let target = SocketAddr::new(pair.underlay[1], pair.told(1)[0].port);
        let (again, repeated) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (flag, counter) = (Arc::clone(&again), Arc::clone(&repeated));
        let near = pair.underlay[0];
        let wire = move |_| async move {
            let sockets =
                [UdpSocket::bind((near, 7000)).await.unwrap(), UdpSocket::bind((near, 7001)).await.unwrap()];
            let [near, far] = sockets;
            spawn_local(repeat(near, far, target, flag, counter));
        };
        pair.hosts[0].on(wire).await;
        let mut table = pair.table.clone();
        let right = table.nodes.get_mut(&IDS[1].into()).unwrap();
        (right.vtep, right.wireguard[0].port) = (near, 7000);
        pair.follow_table(0, &table, Look::Changes, MTU).await;

        let (from, to) = (SocketAddr::from((pair.addr(0), 0)), SocketAddr::from((pair.addr(1), PORT)));
        let socket = pair.hosts[1].on(move |_| async move { UdpSocket::bind(to).await.unwrap() }).await;
        let receive = pair.hosts[1].on(move |_| async move {
            let mut received = Vec::new();
            let mut buffer = [0; 1];
            while timeout(2 * SILENCE, socket.recv(&mut buffer)).await.is_ok() {
                received.push(buffer[0]);
            }
            received
        });
        let send = pair.hosts[0].on(move |_| async move {
            let socket = UdpSocket::bind(from).await.unwrap();
            for number in 0..30 {
                socket.send_to(&[number], to).await.unwrap();
                sleep(Duration::from_millis(2)).await;
            }
            sleep(SILENCE / 4).await;
            again.store(true, Ordering::Relaxed);
        });
        let (received, ()) = futures::join!(receive, send);
        assert_eq!(received, (0..30).collect::<Vec<_>>());
        assert_eq!(repeated.load(Ordering::Relaxed), 60);
    });
}

/// Has each host send what is for the other's overlay address in VXLAN between their current WireGuard addresses, as the
/// dataplane does.
async fn encapsulate(pair: &Pair) {
    for which in [0, 1] {
        let (own, other, host) = (pair.addr(which), pair.addr(1 - which), 2 - which);
        let encap = format!("encap ip6 id 7 src {own} dst {other} dev vx0 src 10.9.0.{}", which + 1);
        pair.hosts[which].run(format!("ip route replace 10.9.0.{host}/32 {encap}")).await;
    }
}

#[test]
fn keys_change_under_a_stream_and_nothing_is_lost() {
    with_pair(V4, |mut pair| async move {
        pair.settle().await;
        for (number, host) in [1, 2].into_iter().zip(pair.hosts.iter()) {
            let kind = "type vxlan external dstport 4789 udp6zerocsumtx udp6zerocsumrx";
            host.run(format!("ip link add vx0 address 02:42:0a:09:00:0{number} mtu 1370 {kind}")).await;
            host.run(format!("ip address add 10.9.0.{number}/32 dev vx0")).await;
            host.run("ip link set vx0 up").await;
            let other = 3 - number;
            host.run(format!("ip neighbour add 10.9.0.{other} lladdr 02:42:0a:09:00:0{other} dev vx0")).await;
        }
        encapsulate(&pair).await;
        let former = [0, 1].map(|which| pair.told(which)[0]);

        let hosts = Arc::clone(&pair.hosts);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (from, to): (SocketAddr, SocketAddr) =
            ("10.9.0.1:0".parse().unwrap(), "10.9.0.2:7777".parse().unwrap());
        let listener = pair.hosts[1].on(move |_| async move { TcpListener::bind(to).await.unwrap() }).await;
        let datagrams = pair.hosts[1].on(move |_| async move { UdpSocket::bind(to).await.unwrap() }).await;
        let receive = hosts[1].on(move |_| async move {
            let mut received = Vec::new();
            listener.accept().await.unwrap().0.read_to_end(&mut received).await.unwrap();
            let mut numbers = Vec::new();
            let mut buffer = [0; 4];
            while timeout(SILENCE, datagrams.recv(&mut buffer)).await.is_ok() {
                numbers.push(u32::from_be_bytes(buffer));
            }
            (received, numbers)
        });
        let send = hosts[0].on(move |_| async move {
            let mut stream = TcpStream::connect(to).await.unwrap();
            let socket = UdpSocket::bind(from).await.unwrap();
            let (chunk, mut number) = (pattern(4096), 0_u32);
            while !stopped.load(Ordering::Relaxed) {
                stream.write_all(&chunk).await.unwrap();
                socket.send_to(&number.to_be_bytes(), to).await.unwrap();
                number += 1;
                sleep(Duration::from_millis(2)).await;
            }
            number
        });
        let rotate = async {
            sleep(Duration::from_millis(100)).await;
            pair.table.cluster.key_epoch += 1;
            pair.table.index += 1;
            let mut most = 1;
            while [0, 1]
                .into_iter()
                .any(|which| pair.told(which).len() > 1 || pair.told(which)[0] == former[which])
            {
                pair.round(Look::Changes).await;
                encapsulate(&pair).await;
                most = most.max(pair.told(0).len());
                if [0, 1].into_iter().all(|which| pair.told(which)[0] != former[which]) {
                    pair.later += GRACE / 4;
                }
                sleep(Duration::from_millis(20)).await;
            }
            stop.store(true, Ordering::Relaxed);
            most
        };
        let all = async { futures::join!(receive, send, rotate) };
        let ((received, numbers), pieces, most) = timeout(Duration::from_secs(20), all).await.unwrap();
        assert_eq!(most, 2);
        assert!(pieces > 50, "it ran meanwhile: {pieces}");
        assert!(
            received == pattern(4096).repeat(pieces as usize),
            "{} bytes of {pieces} pieces",
            received.len()
        );
        assert_eq!(numbers, (0..pieces).collect::<Vec<_>>());

        for host in pair.hosts.iter() {
            let (links, rules) = (host.run("ip -o link").await, host.run("ip -6 rule").await);
            assert!(links.contains("shoal-wg0") && !links.contains("shoal-wg1"), "{links}");
            assert!(rules.contains("20551") && !rules.contains("20552"), "{rules}");
        }
    });
}

#[test]
fn an_agent_that_restarts_goes_on_with_its_keys_and_one_that_is_removed_leaves_nothing() {
    with_pair(V4, |mut pair| async move {
        let taken = pair.hosts[0]
            .on(|_| async move { UdpSocket::bind(("::", WIREGUARD_PORTS[1])).await.unwrap() })
            .await;
        pair.round(Look::Changes).await;
        assert_eq!((pair.told(0).len(), pair.told(1).len()), (0, 1), "without its port, a node tells no key");
        drop(taken);
        pair.later += RETRY;
        pair.settle().await;
        assert!(pair.pings(0, 56).await);

        let (before, addr) = (pair.told(0).to_vec(), pair.addr(0));
        let end = |host: Rc<Host>| async move {
            drop(host.encryption.lock().await.take());
            remembered(host.folder.path())
        };
        assert_eq!(pair.hosts[0].on(end).await, before);
        if !pair.hosts[0].run("ip -o link show type wireguard").await.contains("shoal-wg") {
            let lookup = format!("ip -6 route get {} from {addr}", pair.addr(1));
            while pair.hosts[0].tries(&lookup).await {
                sleep(Duration::from_millis(5)).await;
            }
            let rules = pair.hosts[0].run("ip -6 rule").await;
            assert!(rules.contains("lookup 20552"), "it has no other way meanwhile: {rules}");
        }
        pair.open(0).await;
        pair.round(Look::Changes).await;
        assert_eq!(pair.told(0), before);
        assert!(pair.pings(1, 56).await, "the other host has learnt of the restart");

        let remove = |host: Rc<Host>| async move {
            let encryption = host.encryption.lock().await.take().unwrap();
            let errors = encryption.remove().await;
            let again = remove(&Links::open().unwrap(), host.folder.path()).await;
            (errors.len() + again.len(), std::fs::read_dir(host.folder.path()).unwrap().count())
        };
        assert_eq!(pair.hosts[0].on(remove).await, (0, 0));
        let (links, rules) = (pair.hosts[0].run("ip -o link").await, pair.hosts[0].run("ip -6 rule").await);
        assert!(!links.contains("shoal-wg") && !rules.contains("2055"), "{links}{rules}");
        assert!(!pair.hosts[0].run("ip -6 route show table all").await.contains("2055"));
    });
}

#[test]
fn a_routing_rule_that_leads_elsewhere_is_told_until_it_is_gone() {
    with_pair(V4, |mut pair| async move {
        pair.settle().await;
        let trouble = |host: Rc<Host>| async move {
            let encryption = host.encryption.lock().await;
            encryption.as_ref().unwrap().trouble.clone().unwrap_or_default()
        };
        pair.hosts[0].run("ip -6 route add unreachable default table 99").await;
        pair.hosts[0].run("ip -6 rule add pref 1 table 99").await;
        pair.follow_table(0, &pair.table, Look::All, MTU).await;
        let said = pair.hosts[0].on(trouble).await;
        assert!(said.contains("does not go by shoal-wg1"), "{said}");
        pair.hosts[0].run("ip -6 rule del pref 1").await;
        pair.follow_table(0, &pair.table, Look::All, MTU).await;
        assert_eq!(pair.hosts[0].on(trouble).await, "");
        assert!(pair.pings(0, 56).await);
    });
}

#[test]
fn the_status_tells_a_node_s_keys_and_where_they_are_used() {
    with_pair(V4, |mut pair| async move {
        pair.settle().await;
        let look = async |pair: &Pair| {
            let look = |host: Rc<Host>| async move {
                let encryption = host.encryption.lock().await;
                let kind =
                    encryption.as_ref().unwrap().standing.get(&1).map(|standing| standing.device.kind());
                (encryption_status(host.folder.path()).await.unwrap(), kind)
            };
            pair.hosts[0].on(look).await
        };
        let (keys, kind) = look(&pair).await;
        let [WireguardIdentity { public_key, port }] = pair.told(0)[..] else { panic!("{keys:?}") };
        let made = keys[0].made;
        assert!(kind.is_some() && made.elapsed().unwrap() < Duration::from_mins(1));
        assert_eq!(keys, [KeyStatus { public_key, made, link: "shoal-wg1", kind, port }]);

        pair.hosts[0].run("ip link del shoal-wg1").await;
        assert_eq!(
            look(&pair).await.0,
            [KeyStatus { public_key, made, link: "shoal-wg1", kind: None, port }]
        );
    });
}
