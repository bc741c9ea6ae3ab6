//! A service's spec in the API's words.

use std::collections::BTreeMap;

use mesh_api::table::{EndpointMode, Protocol, PublishMode};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::docker::wire::spec as wire;
use crate::model;

/// A service's spec.
pub(in crate::docker) fn service_spec(spec: &model::ServiceSpec) -> wire::ServiceSpec {
    let model::ServiceSpec { name, labels, task, mode, update, rollback, endpoint } = spec;
    wire::ServiceSpec {
        name: Some(name.clone()),
        labels: Some(labels.clone()),
        task_template: Some(task_template(task)),
        mode: Some(self::mode(*mode)),
        update_config: Some(update_config(update)),
        rollback_config: Some(update_config(rollback)),
        networks: None,
        endpoint_spec: Some(endpoint_spec(endpoint)),
    }
}

/// What each task of a service is.
pub(in crate::docker) fn task_template(template: &model::TaskTemplate) -> wire::TaskTemplate {
    let model::TaskTemplate { container, resources: _, restart, placement, networks, force_update, other: _ } =
        template;
    wire::TaskTemplate {
        container_spec: Some(container_spec(container)),
        plugin_spec: None,
        network_attachment_spec: None,
        resources: Some(wire::Resources {
            limits: Some(BTreeMap::new()),
            reservations: Some(BTreeMap::new()),
            swap_bytes: None,
            memory_swappiness: None,
        }),
        restart_policy: Some(restart_policy(restart)),
        placement: Some(self::placement(placement)),
        networks: filled(networks.iter().map(attachment).collect()),
        log_driver: None,
        force_update: Some(*force_update),
        runtime: Some("container".to_owned()),
    }
}

fn container_spec(spec: &model::ContainerSpec) -> wire::ContainerSpec {
    let model::ContainerSpec {
        image,
        labels,
        command,
        args,
        env,
        dir,
        user,
        hostname,
        stop_signal,
        stop_grace_ns,
        other,
    } = spec;
    let text = |text: &String| (!text.is_empty()).then(|| text.clone());
    wire::ContainerSpec {
        image: Some(image.clone()),
        labels: (!labels.is_empty()).then(|| labels.clone()),
        command: filled(command.clone()),
        args: filled(args.clone()),
        hostname: text(hostname),
        env: filled(env.clone()),
        dir: text(dir),
        user: text(user),
        stop_signal: text(stop_signal),
        stop_grace_period: stop_grace_ns.map(clamped),
        init: other.get("Init").and_then(Value::as_bool),
        dns_config: Some(Value::Object(serde_json::Map::new())),
        healthcheck: other.get("Healthcheck").cloned(),
        isolation: Some("default".to_owned()),
        ..wire::ContainerSpec::default()
    }
}

fn restart_policy(policy: &model::RestartPolicy) -> wire::RestartPolicy {
    let model::RestartPolicy { condition, delay_ns, max_attempts, window_ns } = policy;
    let condition = match condition {
        model::RestartCondition::None => "none",
        model::RestartCondition::OnFailure => "on-failure",
        model::RestartCondition::Any => "any",
    };
    wire::RestartPolicy {
        condition: Some(condition.to_owned()),
        delay: Some(clamped(*delay_ns)),
        max_attempts: Some(*max_attempts),
        window: (*window_ns > 0).then(|| clamped(*window_ns)),
    }
}

fn placement(placement: &model::Placement) -> wire::Placement {
    let model::Placement { constraints, max_replicas, other } = placement;
    wire::Placement {
        constraints: filled(constraints.clone()),
        preferences: None,
        max_replicas: (*max_replicas > 0).then_some(*max_replicas),
        platforms: read_back(other.get("Platforms")),
    }
}

fn attachment(attachment: &model::NetworkAttachment) -> wire::NetworkAttachment {
    let model::NetworkAttachment { target, aliases, options } = attachment;
    wire::NetworkAttachment {
        target: Some(target.to_string()),
        aliases: filled(aliases.clone()),
        driver_opts: (!options.is_empty()).then(|| options.clone()),
    }
}

fn mode(mode: model::Mode) -> wire::Mode {
    match mode {
        model::Mode::Replicated { replicas } => wire::Mode {
            replicated: Some(wire::Replicated { replicas: Some(replicas) }),
            ..wire::Mode::default()
        },
        model::Mode::Global => wire::Mode { global: Some(wire::Global {}), ..wire::Mode::default() },
    }
}

fn update_config(config: &model::UpdateConfig) -> wire::UpdateConfig {
    let model::UpdateConfig { parallelism, delay_ns, failure_action, monitor_ns, max_failure_ppm, order } =
        config;
    let failure_action = match failure_action {
        model::FailureAction::Pause => "pause",
        model::FailureAction::Continue => "continue",
        model::FailureAction::Rollback => "rollback",
    };
    let order = match order {
        model::UpdateOrder::StopFirst => "stop-first",
        model::UpdateOrder::StartFirst => "start-first",
    };
    wire::UpdateConfig {
        parallelism: Some(*parallelism),
        delay: (*delay_ns > 0).then(|| clamped(*delay_ns)),
        failure_action: Some(failure_action.to_owned()),
        monitor: Some(clamped(*monitor_ns)),
        max_failure_ratio: Some(f64::from(*max_failure_ppm) / 1e6),
        order: Some(order.to_owned()),
    }
}

/// How a service is reached.
pub(in crate::docker) fn endpoint_spec(spec: &model::EndpointSpec) -> wire::EndpointSpec {
    let model::EndpointSpec { mode, ports } = spec;
    let mode = match mode {
        EndpointMode::Vip => "vip",
        EndpointMode::Dnsrr => "dnsrr",
    };
    wire::EndpointSpec { mode: Some(mode.to_owned()), ports: filled(ports.iter().map(port).collect()) }
}

/// A published port.
pub(in crate::docker) fn port(port: &model::PortConfig) -> wire::PortConfig {
    let model::PortConfig { name, protocol, target, published, mode } = port;
    let protocol = match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    let mode = match mode {
        PublishMode::Ingress => "ingress",
        PublishMode::Host => "host",
    };
    wire::PortConfig {
        name: (!name.is_empty()).then(|| name.clone()),
        protocol: Some(protocol.to_owned()),
        target_port: Some(u32::from(*target)),
        published_port: (*published > 0).then(|| u32::from(*published)),
        publish_mode: Some(mode.to_owned()),
    }
}

fn filled<T>(items: Vec<T>) -> Option<Vec<T>> {
    (!items.is_empty()).then_some(items)
}

fn clamped(ns: u64) -> i64 {
    i64::try_from(ns).unwrap_or(i64::MAX)
}

fn read_back<T: DeserializeOwned>(value: Option<&Value>) -> Option<T> {
    serde_json::from_value(value?.clone()).ok()
}
