//! A service's spec, in requests and in answers alike.

use std::collections::BTreeMap;

use serde_json::Value;

use super::optional_fields;

/// Labels, in order.
pub(in crate::docker) type Labels = BTreeMap<String, String>;

optional_fields! {
    /// `ServiceSpec`.
    ServiceSpec {
        name: String,
        labels: Labels,
        task_template: TaskTemplate,
        mode: Mode,
        update_config: UpdateConfig,
        rollback_config: UpdateConfig,
        networks: Vec<NetworkAttachment>,
        endpoint_spec: EndpointSpec,
    }

    /// `TaskSpec`. The fields held as [`Value`] are Docker's that Shoal refuses.
    TaskTemplate {
        container_spec: ContainerSpec,
        plugin_spec: Value,
        network_attachment_spec: Value,
        resources: Resources,
        restart_policy: RestartPolicy,
        placement: Placement,
        networks: Vec<NetworkAttachment>,
        log_driver: Value,
        force_update: u64,
        runtime: String,
    }

    /// `ContainerSpec`. The fields held as [`Value`] are Docker's that the process runtime can't give.
    ContainerSpec {
        image: String,
        labels: Labels,
        command: Vec<String>,
        args: Vec<String>,
        hostname: String,
        env: Vec<String>,
        dir: String,
        user: String,
        groups: Value,
        privileges: Value,
        init: bool,
        stop_signal: String,
        #[serde(rename = "TTY")]
        tty: Value,
        open_stdin: Value,
        read_only: Value,
        mounts: Value,
        stop_grace_period: i64,
        #[serde(alias = "HealthCheck")]
        healthcheck: Value,
        hosts: Value,
        #[serde(rename = "DNSConfig")]
        dns_config: Value,
        secrets: Value,
        configs: Value,
        isolation: String,
        sysctls: Value,
        capability_add: Value,
        capability_drop: Value,
        ulimits: Value,
        oom_score_adj: Value,
    }

    /// `ResourceRequirements`.
    Resources {
        limits: BTreeMap<String, Value>,
        reservations: BTreeMap<String, Value>,
        swap_bytes: Value,
        memory_swappiness: Value,
    }

    /// `RestartPolicy`; times in ns.
    RestartPolicy {
        condition: String,
        delay: i64,
        max_attempts: u64,
        window: i64,
    }

    /// `Placement`.
    Placement {
        constraints: Vec<String>,
        preferences: Vec<Value>,
        max_replicas: u64,
        platforms: Vec<Platform>,
    }

    /// `Platform`.
    Platform {
        architecture: String,
        #[serde(rename = "OS")]
        os: String,
    }

    /// `NetworkAttachmentConfig`.
    NetworkAttachment {
        target: String,
        aliases: Vec<String>,
        driver_opts: BTreeMap<String, String>,
    }

    /// `ServiceMode`. docker-py writes the modes' names in lower case, which Go reads as well.
    Mode {
        #[serde(alias = "replicated")]
        replicated: Replicated,
        #[serde(alias = "global")]
        global: Global,
        replicated_job: Value,
        global_job: Value,
    }

    /// `ReplicatedService`.
    Replicated {
        replicas: u64,
    }

    /// `UpdateConfig`; times in ns.
    UpdateConfig {
        parallelism: u64,
        delay: i64,
        failure_action: String,
        monitor: i64,
        max_failure_ratio: f64,
        order: String,
    }

    /// `EndpointSpec`.
    EndpointSpec {
        mode: String,
        ports: Vec<PortConfig>,
    }

    /// `PortConfig`.
    PortConfig {
        name: String,
        protocol: String,
        target_port: u32,
        published_port: u32,
        publish_mode: String,
    }
}

/// `GlobalService`: an empty object.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub(in crate::docker) struct Global {}
