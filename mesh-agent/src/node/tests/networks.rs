//! Networks that change while tasks are on them, and networks' own MTU.

use mesh_api::table::SubnetRecord;

use super::*;

#[test]
fn running_tasks_follow_their_networks() {
    in_netns(|| async {
        let (endless, all) = (["sleep", "1000"], ["ingress", "front"]);
        let mut table =
            with([task(T1, "shoal/exec", &endless, &all), task(T2, "shoal/exec", &endless, &["back"])]);
        let bound = |table: &mut Table, network: &str, mtu| {
            table.networks.get_mut(&network.into()).unwrap().mtu = mtu;
        };
        bound(&mut table, "ingress", Some(1400));
        bound(&mut table, "back", Some(1279));
        let host = Host::new(table);
        let node = host.start().await.unwrap();
        let pids =
            [host.reaches(T1, TaskState::Running).await.pid, host.reaches(T2, TaskState::Running).await.pid];
        let inside = |task: usize, line: &str| {
            run(&format!("nsenter --net=/proc/{}/ns/net {line}", pids[task].unwrap()))
        };
        let mtus = || {
            let sides = [
                inside(0, "ip link show eth0"),
                inside(0, "ip link show eth1"),
                inside(1, "ip link show eth0"),
            ];
            let hosts = ["sht1aaaaaaaa0", "sht1aaaaaaaa1", "sht2aaaaaaaa0"]
                .map(|name| run(&format!("ip link show {name}")));
            sides
                .into_iter()
                .chain(hosts)
                .map(|text| {
                    text.split_whitespace().skip_while(|word| *word != "mtu").nth(1).unwrap().to_owned()
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(mtus(), ["1400", "1450", "1279", "1400", "1450", "1279"]);
        assert_eq!(inside(1, "ip -6 address show eth0"), "");
        let local = host.notes().local;

        // Another subnet.
        host.change(|table| {
            let subnets = &mut table.networks.get_mut(&"front".into()).unwrap().subnets;
            subnets
                .push(SubnetRecord { cidr: "10.21.0.0/16".parse().unwrap(), gateway: [10, 21, 0, 1].into() });
        });
        until("the task has a route to it", || {
            inside(0, "ip route").contains("10.21.0.0/16 dev eth1 proto static scope link")
        })
        .await;
        assert!(inside(0, "ip route get 10.21.3.4").contains("dev eth1 src 10.0.1.5"));
        assert!(!inside(1, "ip route").contains("10.21.0.0/16"), "it is on another network");

        // Another bound, one of the two families' least, and another uplink.
        host.change(|table| bound(table, "back", Some(1280)));
        until("IPv6 is there", || inside(1, "ip -6 address show eth0").contains("fd00:3::a00:205")).await;
        host.change(|table| bound(table, "back", None));
        run("ip link set up0 mtu 1430");
        until("links follow", || mtus() == ["1380", "1380", "1380", "1380", "1380", "1380"]).await;
        assert!(inside(0, "ip route").contains("10.21.0.0/16 dev eth1 proto static scope link"));

        // A task that can't be brought up to date at first.
        inside(1, "ip link set eth0 down");
        inside(1, "ip link set eth0 name away");
        host.change(|table| bound(table, "back", Some(1300)));
        until("it is tried", || run("ip link show sht2aaaaaaaa0").contains("mtu 1300")).await;
        inside(1, "ip link set away name eth0");
        until("it is tried again", || mtus()[2] == "1300").await;
        until("it is whole again", || inside(1, "ip -6 address show eth0").contains("fd00:3::a00:205")).await;
        assert_eq!(host.notes().local, local);
        assert!(node.tear_down().await.is_empty());
    });
}
