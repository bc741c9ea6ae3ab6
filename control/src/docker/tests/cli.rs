//! The API as users of the `docker` command line see it.

use mesh_api::table::Role;

use super::docker::{Docker, text};
use super::host::FakeHost;

#[tokio::test(flavor = "multi_thread")]
async fn a_swarm_is_made_shown_and_left() {
    let Some(docker) = Docker::of(FakeHost::new()).await else { return };
    docker
        .shows(
            "version",
            &[
                "Server: Shoal",
                "API version:      1.50 (minimum version 1.24)",
                "OS/Arch:          linux/amd64",
            ],
        )
        .await;
    docker.shows("info", &["Swarm: inactive", "Server Version: 0.1.0", "Name: n1"]).await;
    docker.shows("ps", &["CONTAINER ID"]).await;
    docker.shows("images", &["REPOSITORY"]).await;
    docker.shows("network ls", &["NETWORK ID"]).await;
    docker.fails("node ls", &["This node is not a swarm manager. Use \"docker swarm init\""]).await;
    let out = docker
        .shows(
            "swarm init --advertise-addr eth0",
            &["Swarm initialized: current node (", ") is now a manager."],
        )
        .await;
    assert!(out.contains("docker swarm join --token SWMTKN-1-") && out.contains(" 192.0.2.7:2377"), "{out}");
    docker.fails("swarm init", &["This node is already part of a swarm."]).await;
    docker
        .shows(
            "info",
            &[
                "Swarm: active",
                "Is Manager: true",
                "Managers: 1",
                "Default Address Pool: 10.0.0.0/8",
                "SubnetSize: 24",
                "Data Path Port: 4789",
                "Node Address: 192.0.2.7",
            ],
        )
        .await;
    let worker = docker.shows("swarm join-token -q worker", &["SWMTKN-1-"]).await;
    let manager = docker.shows("swarm join-token -q manager", &["SWMTKN-1-"]).await;
    assert_ne!(worker, manager);
    docker.shows("swarm join-token --rotate worker", &["Successfully rotated worker join token."]).await;
    assert_ne!(docker.ok("swarm join-token -q worker").await, worker);
    docker.shows("swarm update --task-history-limit 2", &["Swarm updated."]).await;
    docker.shows("info", &["Task History Retention Limit: 2"]).await;
    let unlock = docker.run("swarm unlock-key").await;
    assert!(text(&unlock.stderr).contains("no unlock key is set"));
    docker.host.add_node("n2", Role::Worker).await;
    docker.shows("node ls", &["n1", "Ready", "Active", "Leader", "0.1.0", "n2"]).await;
    docker
        .shows(
            "node inspect --pretty self",
            &["Hostname:", "n1", "State:", "Ready", "Raft Status:", "Reachable"],
        )
        .await;
    docker.shows("node update --availability drain --label-add zone=b n2", &["n2"]).await;
    docker.shows("node inspect n2", &["\"Availability\": \"drain\"", "\"zone\": \"b\""]).await;
    docker.shows("node ls --filter role=worker", &["n2", "Drain"]).await;
    docker.fails("node rm n2", &["is not down and can't be removed"]).await;
    docker.shows("node rm --force n2", &["n2"]).await;
    docker.fails("node rm n1", &["is a cluster manager"]).await;
    docker.fails("swarm leave", &["Use `--force`"]).await;
    docker.shows("swarm leave --force", &["Node left the swarm."]).await;
    docker.shows("info", &["Swarm: inactive"]).await;
    docker.fails("swarm leave", &["This node is not part of a swarm"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swarm_is_made_over_ipv6() {
    let addrs = vec!["192.0.2.7/24".parse().unwrap(), "fd00::7/64".parse().unwrap()];
    let interface = crate::docker::Interface { name: "eth0".into(), up: true, addrs };
    let Some(docker) = Docker::of(FakeHost::with_interfaces(vec![interface])).await else { return };
    docker.fails("swarm init --advertise-addr fd00::8", &["not an address of this host"]).await;
    let out = docker.shows("swarm init --advertise-addr fd00::7", &["Swarm initialized"]).await;
    assert!(out.contains(" [fd00::7]:2377"), "{out}");
    docker.shows("info", &["Node Address: fd00::7"]).await;
    docker.shows("swarm join-token worker", &[" [fd00::7]:2377"]).await;
    let token = docker.ok("swarm join-token -q worker").await;
    for remote in ["[fd00::7]:2377", "[fd00::7]", "fd00::7"] {
        let outside = Docker::of(FakeHost::new()).await.unwrap();
        outside
            .shows(
                &format!("swarm join --token {} {remote}", token.trim()),
                &["This node joined a swarm as a worker."],
            )
            .await;
        outside.shows("info", &[" [fd00::7]:2377"]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_of_shoals_own_are_taken_and_checked() {
    let Some(docker) = Docker::swarm().await else { return };
    docker
        .ok("service create -d -q --name web --label shoal.return=direct --label shoal.slow-start=30s \
             --label shoal.allow=10.0.0.0/8,192.0.2.0/24 --label shoal.publish.nodes=node.labels.edge==yes --publish 8080:80 \
             shoal/whoami")
        .await;
    docker.shows("service inspect --pretty web", &["shoal.return=direct", "shoal.slow-start=30s"]).await;
    docker.ok("node update --label-add shoal.weight=50 n2").await;
    for (line, part) in [
        ("service update -d --label-add shoal.return=back web", "holds 'back': expected direct or tunnel"),
        ("service update -d --label-add shoal.retrun=direct web", "expected shoal.affinity, shoal.allow"),
        ("service create -d --container-label shoal.return=direct shoal/whoami", "it belongs to a service"),
        ("node update --label-add shoal.weight=0 n2", "expected a whole number from 1 to 100"),
        ("node update --label-add shoal.return=direct n2", "it belongs to a service or the cluster"),
        ("network create -d overlay --label shoal.weight=3 x", "it belongs to a node"),
    ] {
        docker.fails(line, &[part]).await;
    }
    docker.ok("service update -d -q --label-rm shoal.return web").await;
    docker.shows("node inspect --pretty n2", &["shoal.weight=50", "eth0=xdp-native", "eth1=tc"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_are_made_scaled_updated_and_removed() {
    let Some(docker) = Docker::swarm().await else { return };
    docker.ok("network create -d overlay front").await;
    let out = docker
        .shows(
            "service create --name web --network front --replicas 3 --publish 8080:80 --publish published=53,target=53,protocol=udp \
             --env A=b --update-monitor 300ms --update-delay 0s --constraint node.role!=nobody shoal/whoami",
            &["overall progress: 3 out of 3 tasks", "verify: Service ", "converged"],
        )
        .await;
    assert!(!out.contains("could not be accessed on a registry"), "{out}");
    docker
        .shows(
            "service ls",
            &["web", "replicated", "3/3", "shoal/whoami:latest", "*:8080->80/tcp, *:53->53/udp"],
        )
        .await;
    docker
        .shows("service ps web", &["web.1", "web.2", "web.3", "shoal/whoami:latest", "Running", "n1", "n2"])
        .await;
    docker.shows("service ps --filter node=n2 web", &["n2"]).await;
    docker.shows("node ps n1", &["web.", "Running"]).await;
    docker
        .shows(
            "service inspect web",
            &["\"Replicas\": 3", "\"VirtualIPs\"", "\"PublishedPort\": 8080", "\"Addr\": \"10.0.1."],
        )
        .await;
    docker
        .shows(
            "service inspect --pretty web",
            &[
                "Service Mode:",
                "Replicated",
                "Replicas:",
                "PublishedPort = 8080",
                "Networks: front",
                "UpdateStatus",
                "Env:",
            ]
            .map(|part| if part == "UpdateStatus" { "UpdateConfig:" } else { part }),
        )
        .await;
    docker
        .shows("service scale web=5", &["web scaled to 5", "overall progress: 5 out of 5 tasks", "converged"])
        .await;
    docker.shows("service ls", &["5/5"]).await;
    docker.shows("service scale -d web=2", &["web scaled to 2"]).await;
    docker.comes_to_show("service ls", "2/2").await;
    docker
        .shows("service update --env-add C=d web", &["overall progress: 2 out of 2 tasks", "converged"])
        .await;
    docker
        .shows(
            "service inspect web",
            &["\"C=d\"", "\"PreviousSpec\"", "\"UpdateStatus\"", "\"State\": \"completed\""],
        )
        .await;
    docker.shows("service ps web", &["Shutdown"]).await;
    docker.shows("service rollback web", &["rolling back update: 2 out of 2 tasks", "converged"]).await;
    let out = docker.ok("service inspect -f {{json·.Spec}} web").await;
    assert!(!out.contains("C=d"), "{out}");
    docker.ok("service update -d --force web").await;
    docker.shows("inspect web", &["\"ForceUpdate\": 1"]).await;
    docker
        .shows(
            "service create --name everywhere --mode global --update-monitor 300ms shoal/exec sleep 1d",
            &["overall progress: 2 out of 2 tasks"],
        )
        .await;
    docker.shows("service ls --filter mode=global", &["everywhere", "global", "2/2"]).await;
    docker
        .fails("service create -d --name web shoal/whoami", &["name conflicts with an existing object"])
        .await;
    docker.shows("service rm web everywhere", &["web", "everywhere"]).await;
    docker.shows("service ls -q", &[]).await;
    docker.fails("service ps web", &["no such service: web"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_gets_an_answer_that_helps() {
    let Some(docker) = Docker::swarm().await else { return };
    docker.ok("service create -d -q --name web --publish 8080:80 shoal/whoami").await;
    let token = docker.ok("swarm join-token -q worker").await;
    for (line, part) in [
        (
            "service create -d --publish 8080:80 shoal/whoami",
            "port '8080' is already in use by service 'web'",
        ),
        ("service create -d --network nowhere shoal/whoami", "network nowhere not found"),
        ("service create -d --name my_ shoal/whoami", "Name 'my_'"),
        ("service create -d --mount type=bind,source=/a,target=/b shoal/whoami", "ContainerSpec.Mounts"),
        ("service create -d --limit-memory 1g shoal/whoami", "Resources.Limits.MemoryBytes"),
        ("service create -d --health-cmd true shoal/whoami", "ContainerSpec.Healthcheck"),
        ("service create -d --constraint node.role=worker shoal/whoami", "Placement.Constraints"),
        ("service create -d --mode replicated-job shoal/whoami", "Mode.ReplicatedJob"),
        ("service create -d --endpoint-mode dnsrr --publish 81:80 shoal/whoami", "dnsrr mode"),
        ("service create -d --publish 81:80/sctp shoal/whoami", "sctp is not supported"),
        ("service create -d --update-failure-action panic shoal/whoami", "UpdateConfig.FailureAction"),
        ("service create -d --stop-signal SIGNOPE shoal/whoami", "ContainerSpec.StopSignal"),
        ("service scale -d web=99999999", "Mode.Replicated.Replicas"),
        ("service rollback -d web", "does not have a previous spec"),
        ("service logs web", "docker service ps"),
        ("service inspect nope", "no such service: nope"),
        ("node update --availability busy n2", "invalid Availability"),
        ("node demote n1", "last manager"),
        ("network create -d overlay --opt encrypted=maybe x", "Options.encrypted: 'maybe'"),
        ("network create x", "--driver overlay"),
        ("network create -d overlay --subnet 10.0.0.0/24 x", "overlaps"),
        ("secret create s /proc/version", "--env"),
        ("run shoal/whoami", "docker service create"),
    ] {
        docker.fails(line, &[part]).await;
    }
    // The token is right, and the node is in a swarm already.
    docker
        .fails(&format!("swarm join --token {} 192.0.2.1:2377", token.trim()), &["already part of a swarm"])
        .await;
    docker.shows("service ls", &["web"]).await;
    let outside = Docker::of(FakeHost::new()).await.unwrap();
    outside.fails("swarm join --token nonsense 192.0.2.1:2377", &["invalid join token"]).await;
    outside
        .fails(&format!("swarm join --token {} 203.0.113.1:2377", token.trim()), &["203.0.113.1:2377"])
        .await;
    outside
        .shows(
            &format!("swarm join --token {} 192.0.2.1:2377", token.trim()),
            &["This node joined a swarm as a worker."],
        )
        .await;
    outside.fails("service ls", &["Worker nodes can't be used to view or modify cluster state."]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stack_is_deployed_and_removed() {
    let Some(docker) = Docker::swarm().await else { return };
    let file = docker.dir.path().join("stack.yml");
    let stack = "services:\n  web:\n    image: shoal/whoami\n    ports: ['8080:80']\n    networks: [front]\n    \
                 deploy: {replicas: 2, update_config: {order: start-first}}\nnetworks:\n  front: {driver: overlay}\n";
    std::fs::write(&file, stack).unwrap();
    let file = file.display();
    let deploy = format!("stack deploy --detach=true -c {file} site");
    docker.shows(&deploy, &["Creating network site_front", "Creating service site_web"]).await;
    docker.comes_to_show("service ls", "2/2").await;
    docker.shows("stack ls", &["site", "1"]).await;
    docker.shows("stack services site", &["site_web", "2/2"]).await;
    docker.shows("stack ps site", &["site_web.1", "site_web.2"]).await;
    docker.shows(&deploy, &["Updating service site_web"]).await;
    docker.run("stack rm site").await;
    docker.shows("service ls -q", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_no_registry_was_asked_for_is_said_so() {
    let Some(docker) = Docker::swarm().await else { return };
    let output = docker.run("service create -d --name other nginx:latest").await;
    assert!(output.status.success());
    assert!(
        text(&output.stderr).contains("nginx:latest could not be accessed on a registry"),
        "{}",
        text(&output.stderr)
    );
}
