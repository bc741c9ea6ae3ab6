//! The real `docker` command line against the API, on a socket: what it makes of the answers, as users see it.

use std::io::Write as _;
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::table::Role;
use tokio::process::Command;
use tokio::task::JoinHandle;

use super::host::FakeHost;
use crate::docker::local::LocalNode;
use crate::docker::{bind, router, serve};

/// A host's API on a socket, and `docker` pointed at it.
struct Docker {
    host: Arc<FakeHost>,
    dir: tempfile::TempDir,
    server: JoinHandle<()>,
}

impl Drop for Docker {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Docker {
    /// `None`, with a word on why, where there is no `docker` to drive.
    async fn of(host: FakeHost) -> Option<Self> {
        if std::process::Command::new("docker").arg("--version").output().is_err() {
            // Not by a print macro, whose output libtest keeps to itself: `cargo xtask test` counts this line.
            let _ = std::io::stdout().write_all(b"\nSKIP: there is no `docker` command on this machine\n");
            return None;
        }
        let host = Arc::new(host);
        let dir = tempfile::tempdir().unwrap();
        let listener = bind(&dir.path().join("docker.sock")).await.unwrap();
        let api = router(Arc::clone(&host) as Arc<dyn LocalNode>);
        let server = tokio::spawn(serve(listener, api, std::future::pending()));
        Some(Self { host, dir, server })
    }

    /// A manager, `n1`, with a worker, `n2`.
    async fn swarm() -> Option<Self> {
        let docker = Self::of(FakeHost::that_runs_tasks()).await?;
        docker.ok("swarm init").await;
        docker.host.add_node("n2", Role::Worker).await;
        Some(docker)
    }

    /// Runs `docker` with `line`, split at spaces (`·` stands for a space within an argument).
    async fn run(&self, line: &str) -> Output {
        let command = Command::new("docker")
            .args(line.split(' ').filter(|part| !part.is_empty()).map(|part| part.replace('·', " ")))
            .env_clear()
            .env("PATH", std::env::var("PATH").unwrap_or_default())
            .env("HOME", self.dir.path())
            .env("DOCKER_HOST", format!("unix://{}", self.dir.path().join("docker.sock").display()))
            .kill_on_drop(true)
            .output();
        let output =
            tokio::time::timeout(Duration::from_mins(1), command).await.expect("docker hangs").unwrap();
        if std::env::var_os("SHOW_DOCKER").is_some() {
            eprintln!("$ docker {line}\n{}{}", text(&output.stdout), text(&output.stderr));
        }
        output
    }

    /// Expects success without a word on standard error, and answers standard output.
    async fn ok(&self, line: &str) -> String {
        let output = self.run(line).await;
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "docker {line}: {out}{err}");
        assert_eq!(err, "", "docker {line}");
        out
    }

    /// Expects success and all of `parts` in the output.
    async fn shows(&self, line: &str, parts: &[&str]) -> String {
        let out = self.ok(line).await;
        for part in parts {
            assert!(out.contains(part), "docker {line} does not show {part:?}:\n{out}");
        }
        out
    }

    /// Expects failure and all of `parts` on standard error.
    async fn fails(&self, line: &str, parts: &[&str]) {
        let output = self.run(line).await;
        let err = text(&output.stderr);
        assert!(!output.status.success(), "docker {line} succeeds");
        for part in parts {
            assert!(err.contains(part), "docker {line} does not say {part:?}:\n{err}");
        }
    }

    /// Runs `line` until it shows `part`.
    async fn comes_to_show(&self, line: &str, part: &str) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            let out = self.ok(line).await;
            if out.contains(part) {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "docker {line} never shows {part:?}:\n{out}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

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
        ("node promote n2", "one manager"),
        ("network create -d overlay --opt encrypted x", "Options.encrypted"),
        ("network create x", "--driver overlay"),
        ("network create -d overlay --subnet 10.0.0.0/24 x", "overlaps"),
        ("secret create s /proc/version", "--env"),
        ("run shoal/whoami", "docker service create"),
        ("swarm update --autolock", "--autolock"),
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
