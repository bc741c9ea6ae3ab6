//! Attachments: what runs on the node already gets a link, and is watched.

use std::process::{Child, Command as Process};

use super::*;
use crate::node::attach::Expected;
use mesh_api::attachment::AttachTarget;

use crate::runtime::guest::Guest;

/// A process in a network namespace of its own.
struct Foreign(Child);

impl Foreign {
    async fn start() -> Self {
        let child = Process::new("unshare").args(["--net", "sleep", "600"]).spawn().unwrap();
        let target = AttachTarget::Process(child.id());
        let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).unwrap();
        let (pid, own) = (child.id().to_string(), namespace("thread-self"));
        until("it has its namespace", || namespace(&pid) != own && Guest::find(&target).is_ok()).await;
        Self(child)
    }

    fn guest(&self) -> Guest {
        Guest::find(&AttachTarget::Process(self.0.id())).unwrap()
    }

    fn run(&self, line: &str) -> String {
        run(&format!("nsenter --net=/proc/{}/ns/net {line}", self.0.id()))
    }

    fn end(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // After `end` it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A network namespace with a name.
struct Named(String);

impl Named {
    fn new(name: &str) -> Self {
        let name = format!("att-{name}-{}", std::process::id());
        run(&format!("ip netns add {name}"));
        Self(name)
    }

    fn run(&self, line: &str) -> String {
        run(&format!("ip netns exec {} {line}", self.0))
    }

    fn delete(&self) {
        run(&format!("ip netns delete {}", self.0));
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        // After `delete` it is gone already.
        let _ = Process::new("ip")
            .args(["netns", "delete", &self.0])
            .stderr(std::process::Stdio::null())
            .status();
    }
}

/// What is attached, as the managers' table has it.
fn attachment(id: &str, network: &str) -> TaskRecord {
    let mut record = task(id, "", &[], &[network]);
    record.name = "db".into();
    record.service = id.into();
    record
}

impl Host {
    /// Has the node expect an attachment, puts it into the table, and answers what is told of it.
    async fn attach(
        &self,
        node: &Node,
        id: &str,
        network: &str,
        guest: Guest,
        interface: &str,
    ) -> Result<(), String> {
        let (attached, told) = oneshot::channel();
        let (name, aliases) = ("db".to_owned(), vec!["store".to_owned()]);
        let expected = Expected { guest, interface: interface.to_owned(), name, aliases, attached };
        assert!(node.attachments().expect(&id.into(), expected).await);
        self.change(|table| drop(table.tasks.insert(id.into(), attachment(id, network))));
        let told = tokio::time::timeout(Duration::from_secs(15), told).await;
        told.unwrap_or_else(|_| panic!("{id} is {:?}", self.status(id))).unwrap()
    }

    fn guests(&self) -> crate::runtime::guest::Guests {
        Runtime::new(self.folder.path().join("tasks"), program()).guests().clone()
    }

    fn endpoints(&self) -> Vec<LocalEndpoint> {
        self.notes().local.map(|local| local.endpoints).unwrap_or_default()
    }
}

#[test]
fn a_process_is_attached_until_it_ends_whoever_is_the_agent() {
    in_netns(|| async {
        let host = Host::new(table());
        let node = host.start().await.unwrap();
        let mut foreign = Foreign::start().await;
        // What it has stays: another interface, its own way out, what its namespace is set to.
        foreign.run("ip link add eth0 type veth peer name peer");
        foreign.run("ip link set peer up");
        foreign.run("ip link set eth0 up");
        foreign.run("ip address add 198.51.100.7/24 dev eth0");
        foreign.run("ip route add default via 198.51.100.1");
        let set = |foreign: &Foreign| {
            foreign.run("sysctl -n net.ipv4.ip_unprivileged_port_start net.ipv4.conf.all.rp_filter")
        };
        let before = set(&foreign);
        assert_eq!(host.attach(&node, T1, "ingress", foreign.guest(), "net1").await, Ok(()));
        let status = host.reaches(T1, TaskState::Running).await;
        assert_eq!(status.pid, Some(foreign.0.id()));
        let addresses = foreign.run("ip -o address show dev net1");
        assert!(addresses.contains("10.0.0.5/24") && addresses.contains("fd00:1::a00:5/64"), "{addresses}");
        let routes = foreign.run("ip route show default");
        assert_eq!(routes.trim(), "default via 198.51.100.1 dev eth0");
        let routes = foreign.run("ip -6 route show default");
        assert!(routes.contains("via fd00:1::1 dev net1"), "{routes}");
        assert_eq!(set(&foreign), before);
        let link = foreign.run("ip link show net1");
        assert!(link.contains("mtu 1450") && link.contains("02:42:0a:00:00:05"), "{link}");

        let file = host.guests().list().unwrap().remove(0);
        let known = &file.attachment;
        assert_eq!((known.id.as_str(), known.interface.as_str(), known.name.as_str()), (T1, "net1", "db"));
        assert_eq!(known.name_server, Ipv4Addr::new(10, 0, 0, 1));
        let addresses: Vec<_> = known.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.0.0.5/24", "fd00:1::a00:5/64"]);
        let made = host.endpoints();
        assert_eq!(made.len(), 1);

        // Another agent finds it, and follows its network's changes.
        drop(node);
        host.statuses.send_replace(Statuses::new());
        let node = host.start().await.unwrap();
        host.reaches(T1, TaskState::Running).await;
        assert_eq!(host.endpoints(), made);
        host.change(|table| table.networks.get_mut(&"ingress".into()).unwrap().mtu = Some(1400));
        until("the MTU is the network's", || foreign.run("ip link show net1").contains("mtu 1400")).await;

        foreign.end();
        let status = host.reaches(T1, TaskState::Complete).await;
        assert_eq!((status.message.as_str(), status.err.as_str()), ("finished", ""));
        until("it is out of the maps", || host.endpoints().is_empty()).await;
        assert!(host.notes().attached.is_empty() && !links().contains("sht1aaaaaaaa"));
        assert_eq!(host.guests().list().unwrap(), []);
        host.change(|table| drop(table.tasks.remove(&TaskId::from(T1))));
        until("it is forgotten", || host.status(T1).is_none()).await;
        drop(node);
    });
}

#[test]
fn a_namespace_is_attached_until_it_is_gone_or_detached() {
    in_netns(|| async {
        let host = Host::new(table());
        let node = host.start().await.unwrap();
        let named = Named::new("named");
        let guest = || Guest::find(&AttachTarget::Netns(format!("/run/netns/{}", named.0).into())).unwrap();
        assert_eq!(host.attach(&node, T1, "front", guest(), "eth0").await, Ok(()));
        assert_eq!(host.reaches(T1, TaskState::Running).await.pid, None);
        assert!(named.run("ip route").contains("default via 10.0.1.1 dev eth0"));
        // A second one, in an internal network.
        assert_eq!(host.attach(&node, T2, "back", guest(), "eth1").await, Ok(()));
        assert!(named.run("ip -o address").contains("10.0.2.5/24"));
        let taken = host.attach(&node, T3, "front", guest(), "eth1").await;
        let why = taken.unwrap_err();
        assert!(why.contains("File exists"), "{why}");
        assert_eq!(host.reaches(T3, TaskState::Failed).await.err, why);

        node.attachments().detach(&T1.into()).await;
        assert_eq!(host.status(T1).unwrap().state, TaskState::Shutdown);
        let left = named.run("ip -o link");
        assert!(!left.contains("eth0") && left.contains("eth1"), "{left}");
        // What does not exist is gone.
        node.attachments().detach(&T1.into()).await;
        node.attachments().detach(&"nothing".into()).await;
        named.delete();
        host.reaches(T2, TaskState::Complete).await;
        assert_eq!(host.guests().list().unwrap(), []);
        assert!(host.notes().attached.is_empty());
        until("it is out of the maps", || host.endpoints().is_empty()).await;
    });
}

#[test]
fn what_is_not_there_any_more_is_ended() {
    in_netns(|| async {
        // Nobody has asked for it in this run of the agent.
        let host = Host::new(with([attachment(T1, "front")]));
        let node = host.start().await.unwrap();
        let status = host.reaches(T1, TaskState::Failed).await;
        assert!(status.err.contains("the agent was restarted before"), "{}", status.err);
        // The process ends while there is no agent.
        let mut foreign = Foreign::start().await;
        assert_eq!(host.attach(&node, T2, "front", foreign.guest(), "eth0").await, Ok(()));
        drop(node);
        foreign.end();
        let node = host.start().await.unwrap();
        host.reaches(T2, TaskState::Complete).await;
        assert_eq!(host.guests().list().unwrap(), []);
        // Its link is removed within the namespace.
        let other = Foreign::start().await;
        assert_eq!(host.attach(&node, T3, "front", other.guest(), "eth0").await, Ok(()));
        other.run("ip link delete eth0");
        let status = host.reaches(T3, TaskState::Failed).await;
        assert!(status.err.contains("link was removed"), "{}", status.err);
        // The managers take it back: its node is to leave it alone.
        host.change(|table| table.tasks.clear());
        let last = "t4aaaaaaaaaaaaaaaaaaaaaaa";
        assert_eq!(host.attach(&node, last, "front", other.guest(), "eth0").await, Ok(()));
        host.change(|table| {
            let record = table.tasks.get_mut(&TaskId::from(last)).unwrap();
            (record.desired, record.observed) = (TaskState::Remove, TaskState::Running);
        });
        host.settled.send_replace(u64::MAX);
        host.reaches(last, TaskState::Shutdown).await;
        assert!(!other.run("ip -o link").contains("eth0"));
        // Leaving the swarm takes all of it along.
        host.change(|table| table.tasks.clear());
        let last = "t5aaaaaaaaaaaaaaaaaaaaaaa";
        assert_eq!(host.attach(&node, last, "front", other.guest(), "eth0").await, Ok(()));
        assert_eq!(node.tear_down().await, Vec::<String>::new());
        assert!(!other.run("ip -o link").contains("eth0"));
        assert_eq!(host.guests().list().unwrap(), []);
    });
}
