//! The cluster itself: init, join, leave, inspect, and the rotation of its join tokens.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::{IpNet, Ipv4Net};
use mesh_api::error::chain;
use mesh_api::id::NodeId;
use mesh_api::seal::{MalformedUnlockKey, UnlockKey};
use mesh_api::session::DEFAULT_PORT;
use mesh_api::table::Role;
use mesh_api::token::JoinToken;
use rand::RngExt as _;

use super::address::{self, AddressError};
use super::error::{ApiError, ApiResult};
use super::local::{InitRequest, JoinRequest, Membership, SwarmError};
use super::request::{Body, Params};
use super::time::rfc3339;
use super::wire::answer::Version;
use super::wire::swarm as wire;
use super::{Api, ClusterState, nodes};
use crate::command::{Action, Command};
use crate::model::cluster::{ClusterSpec, DEFAULT_DATA_PATH_PORT, DEFAULT_SUBNET_SIZE};
use crate::model::{Availability, ClusterObject, labels};
use crate::pki::{CERT_EXPIRY_MIN_NS, RootCa};
use crate::raft::Member;

impl From<AddressError> for ApiError {
    fn from(error: AddressError) -> Self {
        Self::invalid(error.to_string())
    }
}

/// `POST /swarm/init`.
pub(super) async fn init(
    State(api): State<Api>,
    Body(request): Body<wire::InitRequest>,
) -> ApiResult<Json<NodeId>> {
    if request.force_new_cluster == Some(true) && api.host.membership() != Membership::Inactive {
        return Ok(Json(api.host.force_new_cluster().await?));
    }
    if api.host.membership() != Membership::Inactive {
        return Err(SwarmError::AlreadyInSwarm.into());
    }
    let spec = request.spec.unwrap_or_default();
    let autolock = request.auto_lock_managers == Some(true) || autolock(&spec);
    let task_history = history(&spec)?;
    check_spec(&spec)?;
    let cert_expiry_ns = spec.ca_config.and_then(|ca| ca.node_cert_expiry).filter(|ns| *ns > 0);
    if cert_expiry_ns.is_some_and(|ns| ns < CERT_EXPIRY_MIN_NS) {
        return Err(ApiError::invalid("CAConfig.NodeCertExpiry: minimum certificate expiry time is 1h0m0s"));
    }
    let labels = spec.labels.unwrap_or_default();
    labels::cluster(&labels).map_err(|error| ApiError::invalid(format!("Spec.Labels: {error}")))?;
    let interfaces = api.host.interfaces();
    let listen = request.listen_addr.filter(|text| !text.is_empty());
    let listen = address::listen(listen.as_deref().unwrap_or("0.0.0.0"), &interfaces)?;
    let (advertise, port) = match address::advertise(&request.advertise_addr.unwrap_or_default(), &interfaces)
    {
        // Where the manager listens on one address, that is the one to advertise.
        Err(AddressError::Several { .. }) if !listen.ip().is_unspecified() => (listen.ip(), None),
        other => other?,
    };
    let listen = address::reachable(listen, advertise)?;
    let data_path = address::data_path(&request.data_path_addr.unwrap_or_default(), &interfaces)?;
    let (address_pools, subnet_size) =
        pools(&request.default_addr_pool.unwrap_or_default(), request.subnet_size.unwrap_or_default())?;
    let request = InitRequest {
        listen,
        advertise,
        advertise_port: port.unwrap_or(listen.port()),
        data_path: data_path.unwrap_or(advertise),
        data_path_port: data_path_port(request.data_path_port.unwrap_or_default())?,
        address_pools,
        subnet_size,
        labels,
        task_history,
        cert_expiry_ns,
        autolock,
        availability: availability(request.availability.as_deref())?,
    };
    Ok(Json(api.host.swarm_init(request).await?))
}

/// `POST /swarm/join`.
pub(super) async fn join(
    State(api): State<Api>,
    Body(request): Body<wire::JoinRequest>,
) -> ApiResult<StatusCode> {
    if api.host.membership() != Membership::Inactive {
        return Err(SwarmError::AlreadyInSwarm.into());
    }
    let token: JoinToken = request
        .join_token
        .unwrap_or_default()
        .trim()
        .parse()
        .map_err(|error: mesh_api::token::MalformedToken| ApiError::invalid(error.to_string()))?;
    let names = request.remote_addrs.unwrap_or_default();
    if names.is_empty() {
        return Err(ApiError::invalid("RemoteAddrs: at least 1 RemoteAddr is required to join"));
    }
    let availability = availability(request.availability.as_deref())?;
    if availability != Availability::Active {
        return Err(ApiError::unsupported(
            "Availability: a node joins active in this version: join without --availability, then run `docker node update \
             --availability …` on the manager",
        ));
    }
    let interfaces = api.host.interfaces();
    let listen = request.listen_addr.filter(|text| !text.is_empty());
    let listen = listen.map(|listen| address::listen(&listen, &interfaces)).transpose()?;
    let advertise = match request.advertise_addr.filter(|text| !text.is_empty()) {
        Some(text) => Some(address::advertise(&text, &interfaces)?.0),
        None => None,
    };
    let data_path = address::data_path(&request.data_path_addr.unwrap_or_default(), &interfaces)?;
    let prefers_ipv6 = advertise.is_some_and(|addr| addr.is_ipv6());
    let mut remotes = Vec::with_capacity(names.len());
    for name in &names {
        remotes.push(resolve(name, prefers_ipv6).await?);
    }
    api.host.swarm_join(JoinRequest { remotes, token, listen, advertise, data_path, availability }).await?;
    Ok(StatusCode::OK)
}

/// `POST /swarm/leave`.
pub(super) async fn leave(State(api): State<Api>, params: Params) -> ApiResult<StatusCode> {
    let force = params.boolean("force")?;
    match api.host.membership() {
        Membership::Inactive => return Err(SwarmError::NotInSwarm.into()),
        Membership::Active { role: Role::Manager, .. } if !force => {
            let members = api.host.cluster().map(|cluster| cluster.managers()).unwrap_or_default();
            return Err(SwarmError::ManagerLeaves(what_leaving_costs(&members)).into());
        }
        Membership::Locked { .. } if !force => return Err(SwarmError::LockedLeaves.into()),
        Membership::Active { .. } | Membership::Locked { .. } => {}
    }
    api.host.swarm_leave(force).await?;
    Ok(StatusCode::OK)
}

/// What the others lose with a manager (Docker's texts).
fn what_leaving_costs(managers: &[Member]) -> String {
    let all = managers.iter().filter(|member| member.is_voter).count();
    if all <= 1 {
        return "Removing the last manager erases all current state of the swarm. Use `--force` to ignore this message. "
            .to_owned();
    }
    let reachable =
        managers.iter().filter(|member| member.is_voter && member.is_reachable != Some(false)).count();
    let left = reachable.saturating_sub(1);
    let costs = if left <= all / 2 {
        format!(
            "Removing this node leaves {left} managers out of {all}. Without a Raft quorum your swarm will be inaccessible. "
        )
    } else {
        String::new()
    };
    format!(
        "{costs}The only way to restore a swarm that has lost consensus is to reinitialize it with `--force-new-cluster`. Use \
         `--force` to suppress this message."
    )
}

/// `GET /swarm`.
pub(super) async fn inspect(State(api): State<Api>) -> ApiResult<Json<wire::Swarm>> {
    let state = api.state().await?;
    Ok(Json(show(object(&state)?, true)))
}

/// `POST /swarm/update`.
pub(super) async fn update(
    State(api): State<Api>,
    params: Params,
    Body(spec): Body<wire::SpecRequest>,
) -> ApiResult<StatusCode> {
    let cluster = api.manager()?;
    let version = params.version("swarm")?;
    let rotate_worker = params.boolean("rotateWorkerToken")?;
    let rotate_manager = params.boolean("rotateManagerToken")?;
    let rotate_unlock_key = params.boolean("rotateManagerUnlockKey")?;
    let default = ClusterSpec::default();
    check_spec(&spec)?;
    let task_history = history(&spec)?.unwrap_or(default.task_history);
    let state = cluster.linearizable().await?;
    let present = object(&state)?;
    let autolock = autolock(&spec);
    let ca = spec.ca_config.unwrap_or_default();
    let force_rotate = ca.force_rotate.unwrap_or(present.spec.force_rotate);
    let spec = ClusterSpec {
        name: default.name,
        task_history,
        heartbeat_ns: spec
            .dispatcher
            .and_then(|it| it.heartbeat_period)
            .filter(|ns| *ns > 0)
            .unwrap_or(default.heartbeat_ns),
        cert_expiry_ns: ca.node_cert_expiry.filter(|ns| *ns > 0).unwrap_or(default.cert_expiry_ns),
        force_rotate,
        autolock,
        labels: spec.labels.unwrap_or_default(),
    };
    // As in Docker, a rotation without autolock is none.
    let wants_key = autolock && (rotate_unlock_key || present.lock.key.is_none());
    let unlock_key = wants_key.then(UnlockKey::random);
    let (worker_secret, manager_secret) = {
        let mut rng = rand::rng();
        (rotate_worker.then(|| rng.random()), rotate_manager.then(|| rng.random()))
    };
    let rotation = if spec.force_rotate == present.spec.force_rotate {
        None
    } else {
        let next = present.ca.next(SystemTime::now());
        Some(Box::new(next.map_err(|error| ApiError::internal(chain(&error)))?))
    };
    let action = Action::UpdateCluster { version, spec, worker_secret, manager_secret, rotation, unlock_key };
    cluster.propose(Command::now(action)).await?;
    Ok(StatusCode::OK)
}

/// `GET /swarm/unlockkey`.
pub(super) async fn unlock_key(State(api): State<Api>) -> ApiResult<Json<wire::UnlockKey>> {
    let state = api.state().await?;
    let key = object(&state)?.lock.key.as_ref();
    Ok(Json(wire::UnlockKey { unlock_key: key.map(UnlockKey::to_string).unwrap_or_default() }))
}

/// `POST /swarm/unlock`.
pub(super) async fn unlock(
    State(api): State<Api>,
    Body(request): Body<wire::UnlockRequest>,
) -> ApiResult<StatusCode> {
    if !matches!(api.host.membership(), Membership::Locked { .. }) {
        api.manager()?;
        return Err(SwarmError::NotLocked.into());
    }
    let key = request.unlock_key.unwrap_or_default().trim().parse();
    let key = key.map_err(|error: MalformedUnlockKey| ApiError::invalid(error.to_string()))?;
    api.host.swarm_unlock(key).await?;
    Ok(StatusCode::OK)
}

/// The cluster in the API's words; with its join tokens for `docker swarm join-token`.
pub(super) fn show(cluster: &ClusterObject, with_tokens: bool) -> wire::Swarm {
    let ClusterSpec { name: _, labels, task_history, heartbeat_ns, cert_expiry_ns, force_rotate, autolock } =
        &cluster.spec;
    wire::Swarm {
        id: cluster.id.to_string(),
        version: Version { index: cluster.meta.version },
        created_at: rfc3339(cluster.meta.created_ns),
        updated_at: rfc3339(cluster.meta.updated_ns),
        spec: wire::Spec {
            name: "default",
            labels: labels.clone(),
            orchestration: wire::Orchestration {
                task_history_retention_limit: i64::try_from(*task_history).unwrap_or(i64::MAX),
            },
            raft: wire::Raft {
                snapshot_interval: 10_000,
                keep_old_snapshots: 0,
                log_entries_for_slow_followers: 500,
                election_tick: 10,
                heartbeat_tick: 1,
            },
            dispatcher: wire::Dispatcher { heartbeat_period: *heartbeat_ns },
            ca_config: wire::CaConfig { node_cert_expiry: *cert_expiry_ns, force_rotate: *force_rotate },
            task_defaults: BTreeMap::new(),
            encryption_config: wire::EncryptionConfig { auto_lock_managers: *autolock },
        },
        tls_info: tls_info(cluster.ca.root.certificate.clone(), Some(cluster.ca.signer())),
        root_rotation_in_progress: cluster.ca.rotation.is_some(),
        default_addr_pool: cluster.address_pools.iter().map(Ipv4Net::to_string).collect(),
        subnet_size: u32::from(cluster.subnet_size),
        data_path_port: u32::from(cluster.data_path_port),
        join_tokens: with_tokens.then(|| wire::JoinTokens {
            worker: cluster.join_token(Role::Worker).to_string(),
            manager: cluster.join_token(Role::Manager).to_string(),
        }),
    }
}

/// The roots that are trusted, PEM, and the one that signs, or that signed.
pub(super) fn tls_info(trust_root: String, issuer: Option<&RootCa>) -> wire::TlsInfo {
    let facts = issuer.and_then(|root| root.facts().ok());
    wire::TlsInfo {
        trust_root,
        cert_issuer_subject: facts.as_ref().map(|facts| STANDARD.encode(&facts.subject)).unwrap_or_default(),
        cert_issuer_public_key: facts.map(|facts| STANDARD.encode(&facts.public_key)).unwrap_or_default(),
    }
}

pub(super) fn object(state: &ClusterState) -> ApiResult<&Arc<ClusterObject>> {
    state.cluster.as_ref().ok_or_else(|| ApiError::unavailable("the cluster is being made: try again"))
}

/// Whether managers that start are to be unlocked; not, where nothing is said.
fn autolock(spec: &wire::SpecRequest) -> bool {
    spec.encryption_config.as_ref().is_some_and(|config| config.auto_lock_managers == Some(true))
}

/// Refuses what Shoal would pass over.
pub(super) fn check_spec(spec: &wire::SpecRequest) -> ApiResult<()> {
    if spec.name.as_deref().is_some_and(|name| !name.is_empty() && name != "default") {
        return Err(ApiError::invalid("Name: swarm spec must be named \"default\""));
    }
    let Some(ca) = &spec.ca_config else { return Ok(()) };
    let given = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    let external = ca.external_cas.as_ref().is_some_and(|list| !list.is_empty());
    if external || given(&ca.signing_ca_cert) || given(&ca.signing_ca_key) {
        return Err(ApiError::unsupported(
            "CAConfig: the swarm's certificates come from a CA of its own, which makes its keys itself: leave out --external-ca, \
             --ca-cert, --ca-key (`docker swarm ca --rotate` alone makes a new root)",
        ));
    }
    Ok(())
}

fn history(spec: &wire::SpecRequest) -> ApiResult<Option<u64>> {
    let limit = spec.orchestration.as_ref().and_then(|it| it.task_history_retention_limit);
    let negative = |limit| {
        ApiError::invalid(format!(
            "Orchestration.TaskHistoryRetentionLimit: {limit} cannot be negative (--task-history-limit)"
        ))
    };
    limit.map(|limit| u64::try_from(limit).map_err(|_| negative(limit))).transpose()
}

/// Active where nothing is said.
fn availability(text: Option<&str>) -> ApiResult<Availability> {
    match text {
        None | Some("") => Ok(Availability::Active),
        Some(text) => nodes::availability(text),
    }
}

fn data_path_port(port: u32) -> ApiResult<u16> {
    match u16::try_from(port) {
        Ok(0) => Ok(DEFAULT_DATA_PATH_PORT),
        Ok(port @ 1024..=49151) => Ok(port),
        _ => Err(ApiError::invalid(format!(
            "DataPathPort: the datapath port must be between 1024 and 49151, and {port} is not (--data-path-port)"
        ))),
    }
}

/// The address pools and the prefix length of the subnets taken from them.
fn pools(texts: &[String], size: u32) -> ApiResult<(Vec<Ipv4Net>, u8)> {
    let defaults = crate::cluster::InitRequest::default();
    let size = match u8::try_from(size) {
        Ok(0) => DEFAULT_SUBNET_SIZE,
        Ok(size @ 1..=29) => size,
        _ => {
            return Err(ApiError::invalid(format!(
                "SubnetSize: {size} is not a prefix length between 1 and 29 (--default-addr-pool-mask-length)"
            )));
        }
    };
    let mut pools: Vec<Ipv4Net> = Vec::with_capacity(texts.len());
    for text in texts {
        let pool = match text.parse::<IpNet>() {
            Ok(IpNet::V4(pool)) => pool.trunc(),
            Ok(IpNet::V6(_)) => {
                return Err(ApiError::invalid(format!(
                    "DefaultAddrPool: {text} is IPv6, whose subnets are made from the cluster's id: give an IPv4 pool, such as \
                     10.20.0.0/16"
                )));
            }
            Err(_) => {
                return Err(ApiError::invalid(format!(
                    "DefaultAddrPool: invalid CIDR address {text}: expected one such as 10.20.0.0/16"
                )));
            }
        };
        if pool.prefix_len() > size {
            return Err(ApiError::invalid(format!(
                "DefaultAddrPool: {pool} is smaller than one subnet of /{size}: give a larger pool, or a greater \
                 --default-addr-pool-mask-length"
            )));
        }
        let overlaps = |other: &&Ipv4Net| other.contains(&pool) || pool.contains(*other);
        if let Some(other) = pools.iter().find(overlaps) {
            return Err(ApiError::invalid(format!("DefaultAddrPool: {pool} overlaps {other}")));
        }
        pools.push(pool);
    }
    Ok((if pools.is_empty() { defaults.address_pools } else { pools }, size))
}

/// A manager's address: an IP, or a name that has one. Of a name's addresses the first of the preferred family counts.
async fn resolve(name: &str, prefers_ipv6: bool) -> ApiResult<SocketAddr> {
    if let Some(addr) = address::remote(name) {
        return Ok(addr);
    }
    let invalid = |why: String| {
        ApiError::invalid(format!(
            "RemoteAddrs: invalid remoteAddr \"{name}\": {why}: expected HOST:PORT, as `docker swarm join-token` prints it"
        ))
    };
    let bare = name.strip_prefix("tcp://").unwrap_or(name);
    let host = match bare.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok_and(|port| port > 0) => {
            (host, port.parse().unwrap_or(DEFAULT_PORT))
        }
        Some(_) => return Err(invalid("the part after ':' is not a port".to_owned())),
        None => (bare, DEFAULT_PORT),
    };
    let found = tokio::net::lookup_host(host).await.map_err(|error| invalid(error.to_string()))?;
    let first = found.min_by_key(|addr| addr.is_ipv6() != prefers_ipv6);
    first.ok_or_else(|| invalid("it has no address".to_owned()))
}
