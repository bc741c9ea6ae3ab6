//! The only way to change the state: a pure function of a state and a command.
//!
//! It reads no clock, draws no random number and does no I/O; all of that comes in the command. So a log of commands
//! leads every manager, and every restart, to the same state.

mod address;
mod alloc;
mod alloc6;
mod attachment;
mod draft;
mod network;
mod node;
mod ports;
mod service;
mod step;
mod task;
mod token;
mod validate;

#[cfg(test)]
mod tests;

use mesh_api::id::NetworkId;
use mesh_api::seal::UnlockKey;
use mesh_api::tls::KeyId;
use serde::{Deserialize, Serialize};

use crate::command::{Action, Command, Genesis};
use crate::model::network::INGRESS_NAME;
use crate::model::{ClusterObject, ClusterSpec, Ipam6Config, JoinSecrets, Lock, NetworkSpec, State, labels};
use crate::pki::{CERT_EXPIRY_MIN_NS, Rotation};
use crate::refusal::Refusal;

pub use address::{address_capacity, has_free_address};
pub(crate) use address::{awaits, has_room};
pub(crate) use alloc::network_on_route;
pub(crate) use draft::Draft;
pub(crate) use service::{lacks_vip, publishes_in_ingress};
pub(crate) use task::report_changes;

const ROTATING: &str = "the root certificate is being rotated already: that is complete when every node has renewed its certificate \
     (`docker node rm` removes one that does not come back)";

/// What an accepted command answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The table index at which the command is in effect.
    pub index: u64,
    /// What the operator should know (`docker` prints them).
    pub warnings: Vec<String>,
}

/// Applies `command`, leading to the table index `index`. A command that changes nothing leaves the state at its index.
pub fn apply(state: &State, index: u64, command: &Command) -> Result<(State, Reply), Refusal> {
    if state.cluster.is_some() == matches!(command.action, Action::Initialize(_)) {
        return Err(Refusal::NotInitialized);
    }
    let mut draft = Draft::new(state.clone(), index, command.at_ns);
    match &command.action {
        Action::Initialize(genesis) => initialize(&mut draft, genesis)?,
        Action::UpdateCluster { version, spec, worker_secret, manager_secret, rotation, unlock_key } => {
            let secrets = [*worker_secret, *manager_secret];
            update_cluster(&mut draft, *version, spec, secrets, rotation.as_deref(), unlock_key.as_ref())?;
        }
        Action::FinishRotation { root, join_secrets } => finish_rotation(&mut draft, *root, join_secrets)?,
        Action::AddNode { id, role, description, issuer, token } => {
            node::add(&mut draft, id, *role, description, *issuer)?;
            if let Some(token) = token {
                token::take(&mut draft, token, *role)?;
            }
        }
        Action::CreateToken { id, role, secret_digest, life_ns, uses } => {
            token::create(&mut draft, id, *role, *secret_digest, *life_ns, *uses)?;
        }
        Action::RemoveToken { id } => token::remove(&mut draft, id)?,
        Action::DropTokens => token::drop_forgotten(&mut draft),
        Action::NoteAsking { id } => node::note_asking(&mut draft, id)?,
        Action::ApproveNode { id } => node::approve(&mut draft, id)?,
        Action::ReadmitNode { id } => node::readmit(&mut draft, id)?,
        Action::SetNodeIssuer { id, issuer } => node::set_issuer(&mut draft, id, *issuer)?,
        Action::SetNodeStatus { id, state, message, description } => {
            node::set_status(&mut draft, id, *state, message, description.as_ref())?;
        }
        Action::UpdateNode { id, version, spec } => node::update(&mut draft, id, *version, spec)?,
        Action::RemoveNode { id, force } => node::remove(&mut draft, id, *force)?,
        Action::CreateNetwork { id, spec } => network::create(&mut draft, id, spec)?,
        Action::AddSubnet { network, config } => network::add_subnet(&mut draft, network, config)?,
        Action::RotateKeys => rotate_keys(&mut draft)?,
        Action::RemoveNetwork { id } => network::remove(&mut draft, id)?,
        Action::CreateService { id, spec } => service::create(&mut draft, id, spec)?,
        Action::UpdateService { id, version, spec } => service::update(&mut draft, id, *version, spec)?,
        Action::RollbackService { id, version } => service::rollback(&mut draft, id, *version)?,
        Action::RemoveService { id } => service::remove(&mut draft, id)?,
        Action::ReportTasks { node, statuses } => task::report(&mut draft, node, statuses),
        Action::Acknowledge { index } => address::acknowledge(&mut draft, *index),
        Action::Attach { id, node, spec } => attachment::attach(&mut draft, id, node, spec)?,
        Action::Orchestrate { steps } => {
            for step in steps {
                draft.step(step);
            }
        }
    }
    let Draft { state: next, warnings, .. } = draft;
    let index = if next.shares_all_with(state) { state.index } else { index };
    Ok((State { index, ..next }, Reply { index, warnings }))
}

fn initialize(draft: &mut Draft, genesis: &Genesis) -> Result<(), Refusal> {
    let Genesis {
        id,
        ca,
        join_secrets,
        unlock_key,
        hash_seed,
        ingress,
        spec,
        data_path_port,
        address_pools,
        subnet_size,
        avoid,
    } = genesis.clone();
    validate::address_pools(&address_pools, subnet_size)?;
    labels::cluster(&spec.labels).map_err(Refusal::label("Spec.Labels"))?;
    cert_expiry(&spec)?;
    let mut lock = Lock::default();
    lock.set(next_unlock_key(&spec, unlock_key.as_ref(), None)?);
    let cluster = ClusterObject {
        id,
        meta: draft.fresh_meta(),
        spec,
        ca,
        join_secrets,
        lock,
        hash_seed,
        data_path_port,
        address_pools,
        subnet_size,
        avoid,
        key_epoch: 0,
        removed: imbl::OrdMap::new(),
    };
    draft.put_cluster(cluster);
    network::create(draft, &ingress, &ingress_spec())
}

fn ingress_spec() -> NetworkSpec {
    NetworkSpec {
        name: INGRESS_NAME.to_owned(),
        ingress: true,
        ipam6: Some(Ipam6Config::default()),
        ..NetworkSpec::default()
    }
}

fn update_cluster(
    draft: &mut Draft,
    version: u64,
    spec: &ClusterSpec,
    [worker_secret, manager_secret]: [Option<[u8; 16]>; 2],
    rotation: Option<&Rotation>,
    unlock_key: Option<&UnlockKey>,
) -> Result<(), Refusal> {
    let mut cluster = draft.cluster()?.clone();
    if cluster.meta.version != version {
        return Err(Refusal::OutOfSequence);
    }
    if cluster.spec.name != spec.name {
        return Err(Refusal::invalid("Name", "swarm spec must be named \"default\""));
    }
    labels::cluster(&spec.labels).map_err(Refusal::label("Labels"))?;
    cert_expiry(spec)?;
    let unlock_key = next_unlock_key(spec, unlock_key, cluster.lock.key.as_ref())?;
    cluster.lock.set(unlock_key);
    cluster.spec = spec.clone();
    if let Some(secret) = worker_secret {
        cluster.join_secrets.worker = secret;
    }
    if let Some(secret) = manager_secret {
        cluster.join_secrets.manager = secret;
    }
    if let Some(rotation) = rotation {
        if cluster.ca.rotation.is_some() {
            return Err(Refusal::invalid("CAConfig.ForceRotate", ROTATING));
        }
        cluster.ca.rotation = Some(rotation.clone());
    }
    draft.touch(&mut cluster.meta);
    draft.put_cluster(cluster);
    Ok(())
}

/// The unlock key that goes with a specification: a new one, where one was given, or the present one.
fn next_unlock_key(
    spec: &ClusterSpec,
    given: Option<&UnlockKey>,
    present: Option<&UnlockKey>,
) -> Result<Option<UnlockKey>, Refusal> {
    match given.or(present) {
        _ if !spec.autolock => Ok(None),
        Some(key) => Ok(Some(key.clone())),
        None => {
            Err(Refusal::invalid("EncryptionConfig.AutoLockManagers", "there is no unlock key to lock with"))
        }
    }
}

fn cert_expiry(spec: &ClusterSpec) -> Result<(), Refusal> {
    if spec.cert_expiry_ns < CERT_EXPIRY_MIN_NS {
        return Err(Refusal::invalid("CAConfig.NodeCertExpiry", "minimum certificate expiry time is 1h0m0s"));
    }
    Ok(())
}

fn finish_rotation(draft: &mut Draft, root: KeyId, join_secrets: &JoinSecrets) -> Result<(), Refusal> {
    let mut cluster = draft.cluster()?.clone();
    let next = cluster.ca.rotation.take().filter(|next| next.root.id == root);
    let complete = draft.state.nodes.values().all(|node| node.issuer == root);
    let Some(Rotation { root, cross: _ }) = next.filter(|_| complete) else {
        return Err(Refusal::OutOfSequence);
    };
    cluster.ca.root = root;
    cluster.join_secrets = join_secrets.clone();
    // They name the former root.
    draft.state.tokens.clear();
    draft.touch(&mut cluster.meta);
    draft.put_cluster(cluster);
    Ok(())
}

fn rotate_keys(draft: &mut Draft) -> Result<(), Refusal> {
    let mut cluster = draft.cluster()?.clone();
    cluster.key_epoch += 1;
    draft.touch(&mut cluster.meta);
    draft.put_cluster(cluster);
    Ok(())
}

/// The networks that a service's tasks are on, in order: the ingress network first where the service publishes a port
/// in it, or where the service has no other network (for the way out).
pub(crate) fn task_networks(
    state: &State,
    template: &crate::model::TaskTemplate,
    endpoint: &crate::model::EndpointSpec,
) -> Vec<(NetworkId, Vec<String>)> {
    let ingress = state
        .ingress()
        .filter(|_| service::needs_ingress(template, endpoint))
        .map(|network| (network.id.clone(), Vec::new()));
    let others = template.networks.iter().map(|network| (network.target.clone(), network.aliases.clone()));
    ingress.into_iter().chain(others).collect()
}
