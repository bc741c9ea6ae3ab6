//! Why a command is refused, in SwarmKit's words, with SwarmKit's codes.

use std::borrow::Cow;

use ipnet::IpNet;
use mesh_api::id::{NetworkId, NodeId, ServiceId, TokenId};
use serde::{Deserialize, Serialize};

use crate::model::labels::LabelError;
use crate::model::token::TOKENS_MAX;

/// SwarmKit's (gRPC's) code of a refusal, which Docker turns into an HTTP status and a prefix of the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// 400 `InvalidArgument`.
    InvalidArgument,
    /// 404 `NotFound`.
    NotFound,
    /// 409 `AlreadyExists`.
    AlreadyExists,
    /// 400 `FailedPrecondition`.
    FailedPrecondition,
    /// 500 `Unknown`: Docker's answer to an update that is based on an old version.
    Unknown,
    /// 501 `Unimplemented`.
    Unimplemented,
}

/// Why a command is refused. It travels from the leader to whoever proposed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The cluster has not been initialised, or already has.
    #[error("the cluster's first command must be its initialisation, and only that")]
    NotInitialized,
    /// The update is based on an old version.
    #[error("update out of sequence")]
    OutOfSequence,
    /// No such node.
    #[error("node {0} not found")]
    NodeNotFound(NodeId),
    /// No such join token.
    #[error("token {0} not found")]
    TokenNotFound(TokenId),
    /// No such network.
    #[error("network {0} not found")]
    NetworkNotFound(NetworkId),
    /// No network of this id or name.
    #[error("network: there is no network {0}: `docker network ls` on a manager shows those that there are")]
    NoSuchNetwork(String),
    /// No such service.
    #[error("service {0} not found")]
    ServiceNotFound(ServiceId),
    /// An object of this kind and name exists.
    #[error("name conflicts with an existing object: {kind} {name} already exists")]
    NameTaken {
        /// `service`, `network`.
        kind: Cow<'static, str>,
        /// The name.
        name: String,
    },
    /// What is asked for is another's.
    #[error("{field}: {problem}")]
    Conflict {
        /// The field, in the API's words.
        field: Cow<'static, str>,
        /// Who has it, and what to do.
        problem: String,
    },
    /// An object has this id.
    #[error("an object with id {0} already exists")]
    IdTaken(String),
    /// A field's value can't be.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field, in the API's words.
        field: Cow<'static, str>,
        /// What is wrong with it.
        problem: String,
    },
    /// A label of Shoal's own can't be.
    #[error("{field}: {problem}")]
    Label {
        /// The field that holds it, in the API's words.
        field: Cow<'static, str>,
        /// What is wrong with it.
        problem: LabelError,
    },
    /// Another service publishes the port.
    #[error("port '{port}' is already in use by service '{name}' ({service}) as {}", as_published(*.host))]
    PortInUse {
        /// The port.
        port: u16,
        /// The service's name.
        name: String,
        /// The service.
        service: ServiceId,
        /// That service publishes it in host mode.
        host: bool,
    },
    /// The cluster itself answers on the port.
    #[error("port '{port}/{protocol}' is reserved for {owner}")]
    PortReserved {
        /// The port.
        port: u16,
        /// `tcp`, `udp`.
        protocol: Cow<'static, str>,
        /// Who needs it.
        owner: Cow<'static, str>,
    },
    /// No automatic port is left.
    #[error("no published port is free between 30000 and 32767")]
    PortsExhausted,
    /// No automatic subnet is left.
    #[error(
        "could not find an available, non-overlapping IPv4 address pool among the defaults to assign to the network: what the \
         pools have is taken, or nodes have routes to it. Name a subnet with --subnet, or at `docker swarm init` another pool \
         with --default-addr-pool"
    )]
    SubnetsExhausted,
    /// No automatic IPv6 subnet is left.
    #[error("the cluster has given out all of its IPv6 subnets: name one with --subnet")]
    Subnets6Exhausted,
    /// No VNI is left.
    #[error("no VXLAN identifier is free")]
    VnisExhausted,
    /// A subnet overlaps one that exists.
    #[error(
        "invalid pool request: Pool overlaps with other one on this address space: {subnet} overlaps {other}"
    )]
    SubnetOverlaps {
        /// The subnet asked for.
        subnet: IpNet,
        /// The one that exists.
        other: IpNet,
    },
    /// A service uses the network.
    #[error("network {network} is in use by service {service}")]
    NetworkUsedByService {
        /// The network.
        network: NetworkId,
        /// The service.
        service: ServiceId,
    },
    /// A task uses the network.
    #[error("network {network} is in use by task {task}")]
    NetworkUsedByTask {
        /// The network.
        network: NetworkId,
        /// The task.
        task: mesh_api::id::TaskId,
    },
    /// There is one ingress network.
    #[error("ingress network ({0}) is already present")]
    IngressExists(NetworkId),
    /// The ingress network can't go.
    #[error(
        "ingress network cannot be removed because service {0} depends on it: it publishes ports there, or has no other \
         network"
    )]
    IngressNeeded(ServiceId),
    /// There is no ingress network.
    #[error(
        "the service needs the ingress network (it publishes ports there, or has no other network), and there is none: make \
         one with `docker network create --driver overlay --ingress NAME`"
    )]
    NoIngress,
    /// A service can't be attached to the ingress network.
    #[error("Service cannot be explicitly attached to the ingress network \"{0}\"")]
    ExplicitIngress(String),
    /// A manager can't be removed.
    #[error(
        "node {0} is a cluster manager and is a member of the raft cluster. It must be demoted to worker before removal"
    )]
    NodeIsManager(NodeId),
    /// A live node can't be removed.
    #[error("node {0} is not down and can't be removed")]
    NodeNotDown(NodeId),
    /// A node that the managers hear from needs nobody's approval.
    #[error("node {0} is ready: its certificate is valid, and there is nothing to approve")]
    NodeIsReady(NodeId),
    /// A node whose certificate has expired may not have another.
    #[error("this node's certificate has expired: `shoal node approve {0}` on a manager lets it come back")]
    NotApproved(NodeId),
    /// The join token's time is over.
    #[error("invalid join token: it has expired; `shoal token create` on a manager makes another")]
    TokenExpired,
    /// The join token was for fewer nodes.
    #[error(
        "invalid join token: as many nodes have joined by it as it was made for; `shoal token create` on a manager makes another"
    )]
    TokenUsedUp,
    /// There are too many join tokens.
    #[error(
        "there are {TOKENS_MAX} tokens already: remove some that are not needed any longer (`shoal token rm`)"
    )]
    TokensExhausted,
    /// The last manager can't be demoted.
    #[error("attempting to demote the last manager of the swarm")]
    LastManager,
    /// Services keep their names.
    #[error("renaming services is not supported")]
    Rename,
    /// Services keep their modes.
    #[error("service mode change is not allowed")]
    ModeChange,
    /// The service has no specification to return to.
    #[error("service {0} does not have a previous spec")]
    NoPreviousSpec(ServiceId),
    /// Shoal does not do this (yet), and must not pretend to.
    #[error("{0}")]
    Unsupported(Cow<'static, str>),
}

fn as_published(host: bool) -> &'static str {
    if host { "a host-published port" } else { "an ingress port" }
}

impl Refusal {
    /// Shoal's name for a field with a wrong value.
    pub(crate) fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }

    /// A field with what is another's.
    pub(crate) fn conflict(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Conflict { field: field.into(), problem: problem.into() }
    }

    /// A label of Shoal's own in `field` that can't be.
    pub(crate) fn label(field: &'static str) -> impl FnOnce(LabelError) -> Self {
        move |problem| Self::Label { field: field.into(), problem }
    }

    /// SwarmKit's code for the refusal.
    pub fn code(&self) -> Code {
        match self {
            Self::OutOfSequence => Code::Unknown,
            Self::NodeNotFound(_)
            | Self::TokenNotFound(_)
            | Self::NetworkNotFound(_)
            | Self::NoSuchNetwork(_)
            | Self::ServiceNotFound(_) => Code::NotFound,
            Self::NameTaken { .. } | Self::Conflict { .. } | Self::IdTaken(_) | Self::IngressExists(_) => {
                Code::AlreadyExists
            }
            Self::Invalid { .. }
            | Self::Label { .. }
            | Self::PortInUse { .. }
            | Self::PortReserved { .. }
            | Self::SubnetOverlaps { .. }
            | Self::ExplicitIngress(_) => Code::InvalidArgument,
            Self::NotInitialized
            | Self::PortsExhausted
            | Self::SubnetsExhausted
            | Self::Subnets6Exhausted
            | Self::VnisExhausted
            | Self::NetworkUsedByService { .. }
            | Self::NetworkUsedByTask { .. }
            | Self::IngressNeeded(_)
            | Self::NoIngress
            | Self::NodeIsManager(_)
            | Self::NodeNotDown(_)
            | Self::NodeIsReady(_)
            | Self::NotApproved(_)
            | Self::TokenExpired
            | Self::TokenUsedUp
            | Self::TokensExhausted
            | Self::LastManager
            | Self::NoPreviousSpec(_) => Code::FailedPrecondition,
            Self::Rename | Self::ModeChange | Self::Unsupported(_) => Code::Unimplemented,
        }
    }
}
