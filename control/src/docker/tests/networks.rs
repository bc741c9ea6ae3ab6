//! Networks as users of the `docker` command line see them.

use std::time::Duration;

use super::docker::{Docker, text};
use super::host::FakeHost;
use crate::docker::local::LocalNode as _;

#[tokio::test(flavor = "multi_thread")]
async fn networks_are_made_shown_and_removed() {
    let Some(docker) = Docker::swarm().await else { return };
    docker.shows("network ls", &["ingress", "overlay", "swarm"]).await;
    docker.ok("network create -d overlay front").await;
    docker.ok("network create -d overlay --subnet 10.77.0.0/24 --gateway 10.77.0.254 --internal --attachable --label a=b back").await;
    docker
        .shows(
            "network inspect front",
            &["\"Subnet\": \"10.0.1.0/24\"", "\"Gateway\": \"10.0.1.1\"", "vxlanid_list\": \"4097\""],
        )
        .await;
    docker
        .shows(
            "network inspect back",
            &["10.77.0.254", "\"Internal\": true", "\"Attachable\": true", "\"a\": \"b\""],
        )
        .await;
    docker.shows("network ls --filter label=a=b -q", &[]).await;
    docker.ok("service create -d -q --name web --mode global --network front shoal/whoami").await;
    docker.fails("network rm front", &["is in use by service"]).await;
    docker.comes_to_show("network inspect -f {{json·.Containers}} front", "\"web.").await;
    docker
        .shows(
            "network inspect -v front",
            &["\"web\"", "\"Peers\"", "\"IPv4Address\": \"10.0.1.", "02:42:0a:00:01:"],
        )
        .await;
    docker.shows("network prune -f", &["back"]).await;
    docker.fails("network inspect back", &["network back not found"]).await;
    docker.ok("service rm web").await;
    // Docker, too, has a network in use until its last task is gone.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !docker.run("network rm front").await.status.success() {
        assert!(tokio::time::Instant::now() < deadline, "the network of a removed service can't be removed");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_and_tasks_have_both_families() {
    let Some(docker) = Docker::swarm().await else { return };
    docker.ok("network create -d overlay --ipv6 auto").await;
    docker
        .ok("network create -d overlay --ipv6 --subnet 10.66.0.0/24 --subnet fd00:6::/64 --gateway fd00:6::1 six")
        .await;
    docker.shows("network inspect auto", &["\"EnableIPv6\": true", "::/64\"", "::a00:101\""]).await;
    docker
        .shows(
            "network inspect six",
            &["\"EnableIPv6\": true", "\"Subnet\": \"fd00:6::/64\"", "\"Gateway\": \"fd00:6::1\""],
        )
        .await;
    docker.ok("service create -d -q --name web --mode global --network six shoal/whoami").await;
    docker
        .comes_to_show("network inspect -f {{json·.Containers}} six", "\"IPv6Address\":\"fd00:6::a42:")
        .await;
    let task = docker.ok("service ps -q web").await;
    let task = task.lines().next().unwrap();
    docker
        .shows(
            &format!("inspect -f {{{{range·.NetworksAttachments}}}}{{{{.Addresses}}}}{{{{end}}}} {task}"),
            &["[10.66.0.", "/24 fd00:6::a42:", "/64]"],
        )
        .await;
    docker.fails("network create -d overlay --subnet fd00:7::/64 x", &["add --ipv6"]).await;
    docker.fails("network create -d overlay --ipv6 --subnet fd00:6::/80 x", &["overlaps fd00:6::/64"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_of_a_networks_addresses_is_kept_to_and_shown() {
    let Some(docker) = Docker::swarm().await else { return };
    docker
        .ok("network create -d overlay --subnet 10.66.0.0/24 --ip-range 10.66.0.64/29 --gateway 10.66.0.65 \
             --aux-address router=10.66.0.66 --aux-address outside=10.66.0.9 --subnet 10.67.0.0/30 --attachable --label a=b \
             --opt com.docker.network.driver.mtu=1400 --opt encrypted=false plan")
        .await;
    docker
        .shows(
            "network inspect plan",
            &[
                "\"Subnet\": \"10.66.0.0/24\"",
                "\"IPRange\": \"10.66.0.64/29\"",
                "\"Gateway\": \"10.66.0.65\"",
                "\"outside\": \"10.66.0.9\"",
                "\"router\": \"10.66.0.66\"",
                "\"Subnet\": \"10.67.0.0/30\"",
                "\"Gateway\": \"10.67.0.1\"",
                "\"com.docker.network.driver.mtu\": \"1400\"",
                "vxlanid_list\": \"4097\"",
            ],
        )
        .await;
    // Six in the range and one in the second subnet, without gateways and auxiliary addresses: a VIP, and for six tasks.
    docker.ok("service create -d -q --name web --network plan --replicas 7 shoal/whoami").await;
    docker.comes_to_show("service ls", "6/7").await;
    let tasks = docker.ok("service ps -q --no-trunc web").await;
    let tasks = tasks.split_whitespace().collect::<Vec<_>>().join(" ");
    let addresses = "{{range·.NetworksAttachments}}{{.Addresses}}{{end}}";
    let addresses = docker.ok(&format!("inspect -f {addresses} {tasks}")).await;
    // The command line sends the subnets in any order.
    let vip = docker.ok("service inspect -f {{(index·.Endpoint.VirtualIPs·0).Addr}} web").await;
    let vip = format!("[{}]", vip.trim());
    let mut addresses: Vec<&str> = addresses.split_whitespace().chain([vip.as_str()]).collect();
    addresses.sort_unstable();
    let mut expected: Vec<String> = [64, 67, 68, 69, 70, 71].map(|end| format!("[10.66.0.{end}/24]")).into();
    expected.extend(["[10.67.0.2/30]".into(), "[]".into()]);
    assert_eq!(addresses, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn encrypted_networks_are_made_and_shown() {
    let Some(docker) = Docker::swarm().await else { return };
    docker
        .ok("network create -d overlay --opt encrypted --opt com.docker.network.driver.mtu=1400 secret")
        .await;
    docker
        .ok("network create -d overlay --opt com.docker.network.driver.overlay.encrypted=true --ipv6 other")
        .await;
    docker.ok("network create -d overlay --opt encrypted=false plain").await;
    let options = "network inspect -f {{json·.Options}}";
    docker
        .shows(
            &format!("{options} secret"),
            &["\"encrypted\":\"\"", "\"com.docker.network.driver.mtu\":\"1400\"", "vxlanid_list"],
        )
        .await;
    docker
        .shows(
            &format!("{options} other"),
            &["\"com.docker.network.driver.overlay.encrypted\":\"true\"", "vxlanid_list"],
        )
        .await;
    docker.shows(&format!("{options} plain"), &["\"encrypted\":\"false\""]).await;
    docker.shows("network ls --filter driver=overlay", &["secret", "other", "plain"]).await;
    let state = docker.host.cluster().unwrap().state();
    let encrypted =
        ["secret", "other", "plain"].map(|name| state.network_by_name(name).unwrap().is_encrypted());
    assert_eq!(encrypted, [true, true, false]);

    // No node of these has keys.
    docker.ok("service create -d -q --name web --network secret shoal/whoami").await;
    docker
        .comes_to_show(
            "service ps --no-trunc web",
            "no suitable node (encryption of its networks not available on 2 nodes)",
        )
        .await;
    docker.ok("service rm web").await;
    docker.answer("network rm ingress", "y\n").await;
    docker.ok("network create -d overlay --ingress --opt encrypted mesh").await;
    docker.shows(&format!("{options} mesh"), &["\"encrypted\":\"\""]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_are_listed_by_filters_and_pruned() {
    let Some(docker) = Docker::swarm().await else { return };
    docker.ok("network create -d overlay --label tier=front front").await;
    docker.ok("network create -d overlay --label tier=back --label keep=yes frontier").await;
    docker.ok("service create -d -q --name web --network front shoal/whoami").await;
    let front = docker.ok("network ls -q --no-trunc --filter name=^front$").await;
    let by_id = format!("id={}", front.trim());
    for (filters, expected) in [
        ("name=front", "front frontier"),
        ("name=^front$", "front"),
        ("name=ier$", "frontier"),
        (by_id.as_str(), "front"),
        ("driver=overlay", "front frontier ingress"),
        ("driver=bridge", ""),
        ("label=tier", "front frontier"),
        ("label=tier=back", "frontier"),
        ("scope=swarm", "front frontier ingress"),
        ("scope=local", ""),
        ("type=custom", "front frontier ingress"),
        ("type=builtin", ""),
        ("dangling=true", "frontier ingress"),
        ("dangling=false", "front"),
        ("name=front --filter label=keep", "frontier"),
    ] {
        let out = docker.ok(&format!("network ls --format {{{{.Name}}}} --filter {filters}")).await;
        let mut names: Vec<&str> = out.split_whitespace().collect();
        names.sort_unstable();
        assert_eq!(names.join(" "), expected, "{filters}");
    }
    docker.fails("network ls --filter type=mine", &["expected custom or builtin"]).await;
    docker.fails("network ls --filter colour=red", &["invalid filter 'colour'"]).await;
    for (filters, expected) in [
        ("--filter until=1h", ""),
        ("--filter label=tier=front", ""),
        ("--filter label!=keep", ""),
        ("--filter label=keep --filter until=1ms", "frontier"),
        ("", ""),
    ] {
        let out = docker.ok(&format!("network prune -f {filters}")).await;
        assert_eq!(out.contains("frontier"), !expected.is_empty(), "{filters}: {out}");
        assert!(!out.contains("ingress"), "{out}");
    }
    docker.shows("network ls", &["front", "ingress"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_services_networks_are_changed() {
    let Some(docker) = Docker::swarm().await else { return };
    for name in ["front", "back"] {
        docker.ok(&format!("network create -d overlay {name}")).await;
    }
    docker.ok("service create -d -q --name web --network front --update-monitor 0s shoal/whoami").await;
    docker.comes_to_show("service ls", "1/1").await;
    let vips = "service inspect -f {{range·.Endpoint.VirtualIPs}}{{.Addr}}·{{end}} web";
    docker.shows(vips, &["10.0.1.2/24"]).await;
    docker.ok("service update -q --network-add name=back,alias=api web").await;
    docker.shows(vips, &["10.0.1.2/24", "10.0.2.2/24"]).await;
    docker.shows("network inspect -v -f {{json·.Services}} back", &["\"web\"", "\"web.1."]).await;
    docker.fails("service update -d --network-add back web", &["already"]).await;
    docker.fails("network rm back", &["is in use by service"]).await;
    docker.ok("service update -q --network-rm front web").await;
    let out = docker.shows(vips, &["10.0.2.2/24"]).await;
    assert!(!out.contains("10.0.1."), "{out}");
    docker.ok("network rm front").await;
    docker.fails("service update -d --network-add nowhere web", &["network nowhere not found"]).await;
    docker.fails("service update -d --network-add ingress web", &["ingress network"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ingress_network_is_replaced() {
    let Some(docker) = Docker::swarm().await else { return };
    docker.ok("network create -d overlay app").await;
    docker.ok("service create -d -q --name web --network app --publish 8080:80 shoal/whoami").await;
    docker
        .fails("network create -d overlay --ingress mesh", &["ingress network", "is already present"])
        .await;
    // The command line asks whether that is meant.
    let refused = docker.answer("network rm ingress", "y\n").await;
    let text = text(&refused.stderr);
    assert!(text.contains("ingress network cannot be removed because service"), "{text}");
    docker.ok("service update -d -q --publish-rm 80 web").await;
    assert!(docker.answer("network rm ingress", "y\n").await.status.success());
    docker
        .fails(
            "service update -d --publish-add 8080:80 web",
            &["there is none", "docker network create --driver overlay --ingress"],
        )
        .await;
    docker.fails("service create -d shoal/whoami", &["needs the ingress network"]).await;
    docker.fails("network create -d overlay --ingress --attachable mesh", &["cannot be attachable"]).await;
    docker.ok("network create -d overlay --ingress --subnet 10.11.0.0/16 --gateway 10.11.0.2 mesh").await;
    docker
        .shows("network inspect mesh", &["\"Ingress\": true", "10.11.0.2", "vxlanid_list\": \"4098\""])
        .await;
    docker.ok("service update -d -q --publish-add 8080:80 web").await;
    docker.shows("service inspect -f {{json·.Endpoint.VirtualIPs}} web", &["10.11.0.3/16"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_without_free_addresses_shows_on_the_tasks_and_heals() {
    let Some(docker) = Docker::swarm().await else { return };
    docker.ok("network create -d overlay --subnet 192.0.2.64/29 small").await;
    docker.ok("service create -d -q --name web --network small --replicas 3 shoal/whoami").await;
    docker.comes_to_show("service ls", "3/3").await;
    let create = docker.run("service create -d -q --name db --network small --replicas 2 shoal/whoami").await;
    assert!(create.status.success());
    docker.comes_to_show("service ps --no-trunc db", "network small has no free address").await;
    docker.shows("service ls", &["0/2"]).await;
    docker.ok("service scale -d web=0").await;
    docker.comes_to_show("service ls", "2/2").await;
    let out = docker.ok("service ps --no-trunc db").await;
    assert!(!out.contains("no free address"), "{out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_come_from_the_swarms_own_pools() {
    let Some(docker) = Docker::of(FakeHost::new()).await else { return };
    for (line, part) in [
        ("--default-addr-pool 10.20.0.0/16 --default-addr-pool-mask-length 30", "between 1 and 29"),
        (
            "--default-addr-pool 10.20.0.0/24 --default-addr-pool-mask-length 20",
            "is smaller than one subnet of /20",
        ),
        ("--default-addr-pool 10.20.0.0/16 --default-addr-pool 10.20.1.0/24", "overlaps"),
        ("--default-addr-pool fd00::/48", "is IPv6"),
    ] {
        docker.fails(&format!("swarm init {line}"), &[part]).await;
    }
    docker
        .ok("swarm init --default-addr-pool 10.20.0.0/27 --default-addr-pool 10.30.0.0/27 --default-addr-pool-mask-length 28")
        .await;
    docker.shows("info", &["Default Address Pool: 10.20.0.0/27", "SubnetSize: 28"]).await;
    for name in ["a", "b", "c"] {
        docker.ok(&format!("network create -d overlay {name}")).await;
    }
    for (name, subnet) in
        [("ingress", "10.20.0.0"), ("a", "10.20.0.16"), ("b", "10.30.0.0"), ("c", "10.30.0.16")]
    {
        docker.shows(&format!("network inspect {name}"), &[&format!("\"{subnet}/28\"")]).await;
    }
    docker.fails("network create -d overlay d", &["could not find an available", "--subnet"]).await;
    docker.ok("network create -d overlay --subnet 10.40.0.0/24 d").await;
}
