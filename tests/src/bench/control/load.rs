//! The services of the benchmark, and their changes.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context as _, Result};
use control::cluster::Cluster;
use control::command::{Action, Command};
use control::model::{
    ContainerSpec, EndpointSpec, Mode, NetworkAttachment, NetworkSpec, PortConfig, ServiceSpec, TaskTemplate,
    UpdateConfig,
};
use mesh_api::id::{NetworkId, ServiceId};
use mesh_api::table::{Protocol, PublishMode};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::words::{Done, now_ns};

/// Networks that the services are spread over; each is on one.
const NETWORKS: u32 = 20;
/// Of so many services, one publishes a port.
pub(super) const PUBLISHED: u32 = 4;
/// Commands under way at once while the cluster is filled.
const AT_ONCE: usize = 200;
/// The first of the ports that services publish at first.
const FIRST_PORT: u16 = 20_000;
/// As many as there are at most, and how far the port of a change is from the one before.
pub(super) const SERVICES_MAX: u16 = 20_000;

/// What the cluster is filled with.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Load {
    pub(super) services: u32,
    /// Of all services.
    pub(super) tasks: u32,
}

impl Load {
    /// How many tasks the first services have.
    pub(super) fn tasks_of(self, services: u32) -> u32 {
        let tasks = u64::from(services) * u64::from(self.tasks) / u64::from(self.services);
        // No more than all have.
        tasks as u32
    }
}

/// Makes those of the services, and the networks before the first.
pub(super) async fn fill(cluster: &Cluster, numbers: Range<u32>, load: Load) -> Result<Done> {
    let proposed_ns = now_ns()?;
    if numbers.start == 0 {
        for number in 0..NETWORKS {
            let action = Action::CreateNetwork { id: network_id(number), spec: network(number) };
            cluster.propose(Command::now(action)).await?;
        }
    }
    let mut under_way = JoinSet::new();
    let mut index = 0;
    for number in numbers {
        let replicas = load.tasks_of(number + 1) - load.tasks_of(number);
        let spec = Box::new(service(number, replicas.into())?);
        let action = Action::CreateService { id: service_id(number), spec };
        let cluster = cluster.clone();
        under_way.spawn(async move { cluster.propose(Command::now(action)).await });
        while under_way.len() >= AT_ONCE
            && let Some(reply) = under_way.join_next().await
        {
            index = index.max(reply??.index);
        }
    }
    while let Some(reply) = under_way.join_next().await {
        index = index.max(reply??.index);
    }
    Ok(Done { proposed_ns, answered_ns: now_ns()?, index })
}

/// Has a service that publishes a port publish another one.
pub(super) async fn change(cluster: &Cluster, number: u32) -> Result<Done> {
    let id = service_id(number);
    let state = cluster.state();
    let service = state.services.get(&id).with_context(|| format!("no service {id}"))?;
    let mut spec = service.spec.clone();
    let port = spec.endpoint.ports.first_mut().with_context(|| format!("service {id} publishes no port"))?;
    let is_first = port.published < FIRST_PORT + SERVICES_MAX;
    port.published = if is_first { port.published + SERVICES_MAX } else { port.published - SERVICES_MAX };
    let action = Action::UpdateService { id, version: service.meta.version, spec: Box::new(spec) };
    drop(state);
    let proposed_ns = now_ns()?;
    let reply = cluster.propose(Command::now(action)).await?;
    Ok(Done { proposed_ns, answered_ns: now_ns()?, index: reply.index })
}

fn network_id(number: u32) -> NetworkId {
    NetworkId::from(format!("{number:0>25}"))
}

fn service_id(number: u32) -> ServiceId {
    ServiceId::from(format!("{number:0>25}"))
}

fn network(number: u32) -> NetworkSpec {
    NetworkSpec { name: format!("network-{number}"), ..NetworkSpec::default() }
}

fn service(number: u32, replicas: u64) -> Result<ServiceSpec> {
    let port = || -> Result<PortConfig> {
        Ok(PortConfig {
            name: String::new(),
            protocol: Protocol::Tcp,
            target: 80,
            published: FIRST_PORT + u16::try_from(number)?,
            mode: PublishMode::Ingress,
        })
    };
    let ports = if number.is_multiple_of(PUBLISHED) { vec![port()?] } else { Vec::new() };
    let (target, aliases, options) = (network_id(number % NETWORKS), Vec::new(), BTreeMap::new());
    let container = ContainerSpec {
        image: "shoal/whoami".to_owned(),
        env: vec![format!("SERVICE={number}")],
        ..ContainerSpec::default()
    };
    Ok(ServiceSpec {
        name: format!("service-{number}"),
        labels: BTreeMap::new(),
        task: TaskTemplate {
            container,
            networks: vec![NetworkAttachment { target, aliases, options }],
            ..TaskTemplate::default()
        },
        mode: Mode::Replicated { replicas },
        update: UpdateConfig::default(),
        rollback: UpdateConfig::default(),
        endpoint: EndpointSpec { ports, ..EndpointSpec::default() },
    })
}
