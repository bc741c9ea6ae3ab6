//! A process that is a manager: the product's store, raft, port and leader's duties; and what it is told to do.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use control::cluster::{Cluster, InitRequest, Place};
use control::command::{Action, Command};
use control::managers::{self, Wire};
use control::model::{Availability, NodeSpec, Task};
use control::pki::first_manager;
use control::raft;
use mesh_agent::JoinRequest;
use mesh_agent::simulated::Simulated;
use mesh_api::id::NodeId;
use mesh_api::session::{ManagerDescription, NodeDescription};
use mesh_api::table::{NodeState, Role, TaskState};
use mesh_api::tls::{Credential, Identity, Roots, Shared};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpListener;

use super::load;
use super::processes::{die_with_parent, log};
use super::words::{Answer, Begin, ManagerStart, Order, Ready, Stands};

/// Prefix length of the networks' subnets: room for all tasks in any of them.
const SUBNET_SIZE: u8 = 16;

/// Runs until it is killed.
pub fn run(start: &str) -> Result<()> {
    die_with_parent()?;
    log();
    let start = serde_json::from_str(start).context("what the manager is to be")?;
    tokio::runtime::Runtime::new()?.block_on(serve(start))
}

async fn serve(start: ManagerStart) -> Result<()> {
    let (cluster, kept) = begin(start).await?;
    let token = |role| cluster.join_token(role).to_string();
    say(&Answer::Ready(Ready {
        node: kept.node,
        raft: cluster.raft_id(),
        addr: kept.addr,
        worker_token: token(Role::Worker),
        manager_token: token(Role::Manager),
    }))?;
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = orders.next_line().await? {
        say(&obey(&cluster, serde_json::from_str(&line)?).await?)?;
    }
    Ok(())
}

fn say(answer: &Answer) -> Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&line)?;
    Ok(stdout.flush()?)
}

/// What a manager needs to return, beside its store.
#[derive(Serialize, Deserialize)]
struct Kept {
    node: NodeId,
    addr: SocketAddr,
    /// PEM.
    identity: String,
    /// PEM.
    roots: String,
}

impl Kept {
    fn new(node: NodeId, addr: SocketAddr, credential: &Credential) -> Self {
        Self { node, addr, identity: credential.identity.to_pem(), roots: credential.roots.to_pem() }
    }

    fn credential(&self) -> Result<Credential> {
        Ok(Credential { identity: Identity::from_pem(&self.identity)?, roots: Roots::from_pem(&self.roots)? })
    }
}

async fn begin(start: ManagerStart) -> Result<(Cluster, Kept)> {
    let ManagerStart { dir, number, begin } = start;
    fs::create_dir_all(&dir)?;
    let (store, kept_file) = (dir.join("manager"), dir.join("kept.json"));
    let credential = Shared::default();
    let (cluster, kept, listener) = match begin {
        Begin::Found => {
            let (listener, addr) = listen().await?;
            let node = NodeId::from(format!("manager-{number}"));
            let request = InitRequest { subnet_size: SUBNET_SIZE, ..InitRequest::default() };
            let cluster = Cluster::create_at(&store, request, place(&node, addr, &credential)).await?;
            let manager = ManagerDescription { raft: cluster.raft_id(), addr };
            let first = first_manager(&cluster, node.clone(), host(number, manager)).await?;
            credential.set(Some(Arc::new(first.credential.clone())));
            drain(&cluster, &node).await?;
            (cluster, Kept::new(node, addr, &first.credential), listener)
        }
        Begin::Join { remote, token } => {
            let (listener, addr) = listen().await?;
            let advertise = address(number);
            let request =
                JoinRequest { remotes: vec![remote], token: token.parse()?, advertise, data_path: advertise };
            let joined = Simulated::join(&dir, format!("manager-{number}"), request).await?;
            let node = joined.membership().node_id.clone();
            credential.set(Some(Arc::clone(joined.credential())));
            let cluster = Cluster::join(&store, place(&node, addr, &credential)).await?;
            (cluster, Kept::new(node, addr, joined.credential()), listener)
        }
        Begin::Return => {
            let kept: Kept = serde_json::from_slice(&fs::read(&kept_file)?)?;
            credential.set(Some(Arc::new(kept.credential()?)));
            let listener = TcpListener::bind(kept.addr).await?;
            let cluster = Cluster::open_at(&store, Arc::new(Wire::new(credential.clone())), None).await?;
            (cluster, kept, listener)
        }
    };
    fs::write(&kept_file, serde_json::to_vec(&kept)?)?;
    tokio::spawn(managers::serve(cluster.clone(), credential, listener));
    Ok((cluster, kept))
}

async fn listen() -> Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let addr = listener.local_addr()?;
    Ok((listener, addr))
}

fn place(node: &NodeId, addr: SocketAddr, credential: &Shared) -> Place {
    let transport = Arc::new(Wire::new(credential.clone()));
    Place { manager: raft::Manager { node: node.clone(), addr }, transport, ..Place::default() }
}

/// An address of the node that a manager is on.
fn address(number: u32) -> IpAddr {
    Ipv4Addr::from_bits(Ipv4Addr::new(198, 19, 255, 0).to_bits() + number).into()
}

fn host(number: u32, manager: ManagerDescription) -> NodeDescription {
    NodeDescription {
        hostname: format!("manager-{number}"),
        addr: address(number),
        vtep: address(number),
        os: "linux".to_owned(),
        architecture: std::env::consts::ARCH.to_owned(),
        nano_cpus: 1_000_000_000,
        memory_bytes: 1 << 30,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        labels: Vec::new(),
        dataplane: "none".to_owned(),
        routes: Vec::new(),
        wireguard: Vec::new(),
        addresses: Vec::new(),
        manager: Some(manager),
    }
}

/// Managers' nodes have no agent here, and get no tasks.
async fn drain(cluster: &Cluster, node: &NodeId) -> Result<()> {
    let state = cluster.state();
    let object = state.nodes.get(node).context("the manager is no node")?;
    let spec = NodeSpec { availability: Availability::Drain, ..object.spec.clone() };
    let action = Action::UpdateNode { id: node.clone(), version: object.spec_version, spec };
    cluster.propose(Command::now(action)).await?;
    Ok(())
}

async fn obey(cluster: &Cluster, order: Order) -> Result<Answer> {
    match order {
        Order::Fill { numbers, load } => Ok(Answer::Done(load::fill(cluster, numbers, load).await?)),
        Order::Change { service } => Ok(Answer::Done(load::change(cluster, service).await?)),
        Order::Admit { node, raft, addr } => {
            drain(cluster, &node).await?;
            let state = cluster.state();
            let description = state.nodes[&node].description.clone();
            let manager = Some(ManagerDescription { raft, addr });
            let description = Some(NodeDescription { manager, ..description });
            let (state, message) = (NodeState::Ready, String::new());
            let action = Action::SetNodeStatus { id: node, state, message, description };
            cluster.propose(Command::now(action)).await?;
            stands(cluster)
        }
        Order::Look => stands(cluster),
    }
}

fn stands(cluster: &Cluster) -> Result<Answer> {
    let state = cluster.state();
    let is_up = |task: &Task| (task.status.state, task.desired) == (TaskState::Running, TaskState::Running);
    let running = state.tasks.values().filter(|task| is_up(task)).count();
    let (ready, down): (Vec<_>, Vec<_>) = state
        .nodes
        .values()
        .filter(|node| node.is_ready() || node.is_down())
        .partition(|node| node.is_ready());
    let voters = cluster.managers().iter().filter(|member| member.is_voter).count();
    Ok(Answer::Stands(Stands {
        index: state.index,
        running: u32::try_from(running)?,
        ready: u32::try_from(ready.len())?,
        down: u32::try_from(down.len())?,
        voters: u32::try_from(voters)?,
        leads: cluster.leadership().borrow().is_leader,
    }))
}
