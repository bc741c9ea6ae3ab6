//! The cluster itself: init, join, and what `docker swarm inspect` and `docker info` show of it.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::answer::Version;
use super::optional_fields;
use super::spec::Labels;

optional_fields! {
    /// `InitRequest`.
    InitRequest {
        listen_addr: String,
        advertise_addr: String,
        data_path_addr: String,
        data_path_port: u32,
        force_new_cluster: bool,
        spec: SpecRequest,
        auto_lock_managers: bool,
        availability: String,
        default_addr_pool: Vec<String>,
        subnet_size: u32,
    }

    /// `JoinRequest`.
    JoinRequest {
        listen_addr: String,
        advertise_addr: String,
        data_path_addr: String,
        remote_addrs: Vec<String>,
        join_token: String,
        availability: String,
    }

    /// `UnlockRequest`.
    UnlockRequest {
        unlock_key: String,
    }

    /// The swarm's `Spec` in a request: the parts that Shoal looks at.
    SpecRequest {
        name: String,
        labels: Labels,
        orchestration: OrchestrationRequest,
        dispatcher: DispatcherRequest,
        encryption_config: EncryptionRequest,
        #[serde(rename = "CAConfig")]
        ca_config: CaRequest,
    }

    /// `OrchestrationConfig` of a request.
    OrchestrationRequest {
        task_history_retention_limit: i64,
    }

    /// `DispatcherConfig` of a request.
    DispatcherRequest {
        heartbeat_period: u64,
    }

    /// `EncryptionConfig` of a request.
    EncryptionRequest {
        auto_lock_managers: bool,
    }

    /// `CAConfig` of a request.
    CaRequest {
        node_cert_expiry: u64,
        #[serde(rename = "ExternalCAs")]
        external_cas: Vec<Value>,
        #[serde(rename = "SigningCACert")]
        signing_ca_cert: String,
        #[serde(rename = "SigningCAKey")]
        signing_ca_key: String,
        force_rotate: u64,
    }

    /// `NodeSpec` in a request.
    NodeSpecRequest {
        name: String,
        labels: Labels,
        role: String,
        availability: String,
    }
}

/// `ClusterInfo`, and with join tokens `Swarm`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Swarm {
    #[serde(rename = "ID")]
    pub(in crate::docker) id: String,
    pub(in crate::docker) version: Version,
    pub(in crate::docker) created_at: String,
    pub(in crate::docker) updated_at: String,
    pub(in crate::docker) spec: Spec,
    #[serde(rename = "TLSInfo")]
    pub(in crate::docker) tls_info: TlsInfo,
    pub(in crate::docker) root_rotation_in_progress: bool,
    pub(in crate::docker) default_addr_pool: Vec<String>,
    pub(in crate::docker) subnet_size: u32,
    pub(in crate::docker) data_path_port: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) join_tokens: Option<JoinTokens>,
}

/// `SwarmUnlockKeyResponse`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct UnlockKey {
    /// Empty without autolock.
    pub(in crate::docker) unlock_key: String,
}

/// `TLSInfo`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct TlsInfo {
    /// PEM.
    pub(in crate::docker) trust_root: String,
    /// DER, in base 64.
    pub(in crate::docker) cert_issuer_subject: String,
    /// DER, in base 64.
    pub(in crate::docker) cert_issuer_public_key: String,
}

/// `JoinTokens`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct JoinTokens {
    pub(in crate::docker) worker: String,
    pub(in crate::docker) manager: String,
}

/// The swarm's `Spec`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Spec {
    pub(in crate::docker) name: &'static str,
    pub(in crate::docker) labels: Labels,
    pub(in crate::docker) orchestration: Orchestration,
    pub(in crate::docker) raft: Raft,
    pub(in crate::docker) dispatcher: Dispatcher,
    #[serde(rename = "CAConfig")]
    pub(in crate::docker) ca_config: CaConfig,
    pub(in crate::docker) task_defaults: BTreeMap<String, String>,
    pub(in crate::docker) encryption_config: EncryptionConfig,
}

/// `OrchestrationConfig`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Orchestration {
    pub(in crate::docker) task_history_retention_limit: i64,
}

/// `RaftConfig`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Raft {
    pub(in crate::docker) snapshot_interval: u64,
    pub(in crate::docker) keep_old_snapshots: u64,
    pub(in crate::docker) log_entries_for_slow_followers: u64,
    pub(in crate::docker) election_tick: u32,
    pub(in crate::docker) heartbeat_tick: u32,
}

/// `DispatcherConfig`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Dispatcher {
    pub(in crate::docker) heartbeat_period: u64,
}

/// `CAConfig`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct CaConfig {
    pub(in crate::docker) node_cert_expiry: u64,
    pub(in crate::docker) force_rotate: u64,
}

/// `EncryptionConfig`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct EncryptionConfig {
    pub(in crate::docker) auto_lock_managers: bool,
}
