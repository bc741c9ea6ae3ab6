//! A service's spec from the API's words to the model's. Every refusal names the field, and says what would do.

use std::collections::{BTreeMap, BTreeSet};

use mesh_api::id::NetworkId;
use mesh_api::table::{EndpointMode, Protocol, PublishMode};
use serde_json::Value;

use super::{image, refuse};
use crate::docker::error::{ApiError, ApiResult};
use crate::docker::names;
use crate::docker::wire::spec as wire;
use crate::model::{
    ContainerSpec, EndpointSpec, FailureAction, Mode, NetworkAttachment, Placement, PortConfig, Resources,
    RestartCondition, RestartPolicy, ServiceSpec, State, TaskTemplate, UpdateConfig, UpdateOrder, constraint,
    labels,
};

/// Signals by name, without `SIG`.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// Reads a service's spec; its networks are looked up in `state`, and a name is made where there is none.
pub(in crate::docker) fn service_spec(spec: wire::ServiceSpec, state: &State) -> ApiResult<ServiceSpec> {
    let wire::ServiceSpec {
        name,
        labels,
        task_template,
        mode,
        update_config,
        rollback_config,
        networks,
        endpoint_spec,
    } = spec;
    let template = task_template
        .ok_or_else(|| ApiError::invalid("TaskTemplate: missing; it needs at least ContainerSpec.Image"))?;
    // As Docker: those of the template, else the older field.
    let networks =
        template.networks.clone().filter(|networks| !networks.is_empty()).or(networks).unwrap_or_default();
    let networks = attachments(networks, state)?;
    let name = match name {
        Some(name) if !name.is_empty() => name,
        _ => names::invent(state, &mut rand::rng()),
    };
    names::check("Name", &name)?;
    Ok(ServiceSpec {
        name,
        labels: labels.unwrap_or_default(),
        task: task_template_of(template, networks)?,
        mode: self::mode(mode.unwrap_or_default())?,
        update: update(update_config, "UpdateConfig")?,
        rollback: update(rollback_config, "RollbackConfig")?,
        endpoint: endpoint(endpoint_spec.unwrap_or_default())?,
    })
}

fn task_template_of(
    template: wire::TaskTemplate,
    networks: Vec<NetworkAttachment>,
) -> ApiResult<TaskTemplate> {
    refuse::template(&template)?;
    let container = template.container_spec.ok_or_else(|| {
        ApiError::invalid(
            "TaskTemplate.ContainerSpec: missing; it needs at least an Image, such as shoal/whoami",
        )
    })?;
    refuse::container(&container)?;
    refuse::resources(&template.resources.unwrap_or_default())?;
    Ok(TaskTemplate {
        container: self::container(container)?,
        resources: Resources::default(),
        restart: restart(template.restart_policy.as_ref())?,
        placement: placement(template.placement.unwrap_or_default())?,
        networks,
        force_update: template.force_update.unwrap_or_default(),
        other: BTreeMap::new(),
    })
}

fn container(spec: wire::ContainerSpec) -> ApiResult<ContainerSpec> {
    let image = spec.image.unwrap_or_default();
    if image.is_empty() {
        return Err(ApiError::invalid(
            "ContainerSpec: image reference must be provided (TaskTemplate.ContainerSpec.Image)",
        ));
    }
    if !image::is_reference(&image) {
        return Err(ApiError::invalid(format!("ContainerSpec: {image:?} is not a valid repository/tag")));
    }
    let labels = spec.labels.unwrap_or_default();
    labels::only_known(labels::Owner::Container, &labels)
        .map_err(|error| ApiError::invalid(format!("ContainerSpec.Labels: {error}")))?;
    let command = without_nul("Command", spec.command)?;
    let args = without_nul("Args", spec.args)?;
    let env = without_nul("Env", spec.env)?;
    if let Some(wrong) = env.iter().find(|pair| pair.is_empty() || pair.starts_with('=')) {
        return Err(ApiError::invalid(format!(
            "ContainerSpec.Env: invalid environment variable: '{wrong}': expected KEY=value"
        )));
    }
    let dir = spec.dir.unwrap_or_default();
    if !dir.is_empty() && !dir.starts_with('/') {
        return Err(ApiError::invalid(format!(
            "ContainerSpec.Dir: the working directory '{dir}' is invalid, it needs to be an absolute path"
        )));
    }
    let hostname = spec.hostname.unwrap_or_default();
    let host_char = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if hostname.len() > 63 || hostname.starts_with(['-', '.']) || !hostname.chars().all(host_char) {
        return Err(ApiError::invalid(format!(
            "ContainerSpec.Hostname: invalid hostname format: '{hostname}': expected up to 63 letters, digits, - and ."
        )));
    }
    let stop_signal = spec.stop_signal.unwrap_or_default();
    if !is_signal(&stop_signal) {
        return Err(ApiError::invalid(format!(
            "ContainerSpec.StopSignal: '{stop_signal}' is not a signal: expected a name such as SIGTERM"
        )));
    }
    let stop_grace_ns =
        spec.stop_grace_period.map(|ns| not_negative(ns, "ContainerSpec.StopGracePeriod")).transpose()?;
    let texts = [("Dir", &dir), ("User", spec.user.as_ref().unwrap_or(&dir))];
    for (field, text) in texts {
        if text.contains('\0') {
            return Err(ApiError::invalid(format!("ContainerSpec.{field}: contains a NUL byte")));
        }
    }
    // What is kept has a shape of our own choosing: the store can't read back what is nested too deeply.
    let kept =
        [("Init", spec.init.map(Value::Bool)), ("Healthcheck", spec.healthcheck.filter(refuse::is_no_check))];
    Ok(ContainerSpec {
        image,
        labels,
        command,
        args,
        env,
        dir,
        user: spec.user.unwrap_or_default(),
        hostname,
        stop_signal,
        stop_grace_ns,
        other: kept.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect(),
    })
}

fn without_nul(field: &str, texts: Option<Vec<String>>) -> ApiResult<Vec<String>> {
    let texts = texts.unwrap_or_default();
    match texts.iter().position(|text| text.contains('\0')) {
        Some(at) => Err(ApiError::invalid(format!("ContainerSpec.{field}[{at}]: contains a NUL byte"))),
        None => Ok(texts),
    }
}

fn is_signal(text: &str) -> bool {
    if text.is_empty() {
        return true;
    }
    if let Ok(number) = text.parse::<u8>() {
        return (1..=64).contains(&number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    SIGNALS.contains(&name) || name.starts_with("RTMIN") || name.starts_with("RTMAX")
}

fn not_negative(ns: i64, field: &str) -> ApiResult<u64> {
    u64::try_from(ns)
        .map_err(|_| ApiError::invalid(format!("{field}: {ns} cannot be negative (nanoseconds)")))
}

fn restart(policy: Option<&wire::RestartPolicy>) -> ApiResult<RestartPolicy> {
    let default = RestartPolicy::default();
    let Some(policy) = policy else { return Ok(default) };
    let condition = match policy.condition.as_deref() {
        None | Some("" | "any") => RestartCondition::Any,
        Some("on-failure") => RestartCondition::OnFailure,
        Some("none") => RestartCondition::None,
        Some(other) => {
            return Err(ApiError::invalid(format!(
                "RestartPolicy.Condition: invalid RestartCondition: \"{other}\": expected none, on-failure or any"
            )));
        }
    };
    let ns = |value: Option<i64>, field, default| value.map_or(Ok(default), |ns| not_negative(ns, field));
    Ok(RestartPolicy {
        condition,
        delay_ns: ns(policy.delay, "RestartPolicy.Delay", default.delay_ns)?,
        max_attempts: policy.max_attempts.unwrap_or_default(),
        window_ns: ns(policy.window, "RestartPolicy.Window", default.window_ns)?,
    })
}

fn placement(placement: wire::Placement) -> ApiResult<Placement> {
    let wire::Placement { constraints, preferences, max_replicas, platforms } = placement;
    let constraints = constraints.unwrap_or_default();
    for text in &constraints {
        if let Err(error) = constraint::parse_all(std::slice::from_ref(text)) {
            return Err(ApiError::invalid(format!(
                "Placement.Constraints: {error} in '{text}': expected node.id, node.hostname, node.ip, node.role, \
                 node.platform.os, node.platform.arch, node.labels.<label> or engine.labels.<label>, then == or !=, then \
                 a value"
            )));
        }
    }
    if preferences.is_some_and(|preferences| !preferences.is_empty()) {
        return Err(ApiError::unsupported(
            "Placement.Preferences is not supported: leave it out (--placement-pref); replicas are spread over the nodes",
        ));
    }
    let platforms = platforms.filter(|platforms| !platforms.is_empty());
    let platforms = platforms.map(serde_json::to_value).transpose();
    let platforms = platforms.map_err(|error| ApiError::invalid(format!("Placement.Platforms: {error}")))?;
    Ok(Placement {
        constraints,
        max_replicas: max_replicas.unwrap_or_default(),
        other: platforms.map(|platforms: Value| ("Platforms".to_owned(), platforms)).into_iter().collect(),
    })
}

fn attachments(networks: Vec<wire::NetworkAttachment>, state: &State) -> ApiResult<Vec<NetworkAttachment>> {
    let mut seen: BTreeSet<NetworkId> = BTreeSet::new();
    let mut attachments = Vec::with_capacity(networks.len());
    for wire::NetworkAttachment { target, aliases, driver_opts } in networks {
        let target = target.unwrap_or_default();
        let network = names::network(state, &target)?;
        if network.spec.ingress {
            return Err(ApiError::invalid(format!(
                "Service cannot be explicitly attached to the ingress network {:?}: publish a port instead",
                network.spec.name
            )));
        }
        if !seen.insert(network.id.clone()) {
            return Err(ApiError::invalid(format!("TaskTemplate.Networks: network {target} is given twice")));
        }
        attachments.push(NetworkAttachment {
            target: network.id.clone(),
            aliases: aliases.unwrap_or_default(),
            options: driver_opts.unwrap_or_default(),
        });
    }
    Ok(attachments)
}

fn mode(mode: wire::Mode) -> ApiResult<Mode> {
    let wire::Mode { replicated, global, replicated_job, global_job } = mode;
    let jobs = [("ReplicatedJob", replicated_job), ("GlobalJob", global_job)];
    for (name, job) in jobs {
        if job.is_some_and(|job| !job.is_null()) {
            return Err(ApiError::unsupported(format!(
                "Mode.{name} is not supported: use Mode.Replicated or Mode.Global (--mode replicated or global)"
            )));
        }
    }
    match (replicated, global) {
        (Some(_), Some(_)) => {
            Err(ApiError::invalid("Mode: must specify only one service mode: Replicated or Global"))
        }
        (None, Some(_)) => Ok(Mode::Global),
        (replicated, None) => {
            let replicas = replicated.and_then(|replicated| replicated.replicas).unwrap_or(1);
            Ok(Mode::Replicated { replicas })
        }
    }
}

fn update(config: Option<wire::UpdateConfig>, field: &str) -> ApiResult<UpdateConfig> {
    let Some(config) = config else { return Ok(UpdateConfig::default()) };
    let failure_action = match config.failure_action.as_deref() {
        None | Some("" | "pause") => FailureAction::Pause,
        Some("continue") => FailureAction::Continue,
        Some("rollback") if field == "UpdateConfig" => FailureAction::Rollback,
        Some(other) => {
            return Err(ApiError::invalid(format!(
                "{field}.FailureAction: unrecognized update failure action {other}: expected pause, continue or (for \
                 updates) rollback"
            )));
        }
    };
    let order = match config.order.as_deref() {
        None | Some("" | "stop-first") => UpdateOrder::StopFirst,
        Some("start-first") => UpdateOrder::StartFirst,
        Some(other) => {
            return Err(ApiError::invalid(format!(
                "{field}.Order: unrecognized update order {other}: expected stop-first or start-first"
            )));
        }
    };
    let ratio = config.max_failure_ratio.unwrap_or_default();
    if !(0.0..=1.0).contains(&ratio) {
        return Err(ApiError::invalid(format!(
            "{field}.MaxFailureRatio: update-maxfailureratio cannot be less than 0 or bigger than 1, and is {ratio}"
        )));
    }
    let monitor_ns = not_negative(config.monitor.unwrap_or_default(), &format!("{field}.Monitor"))?;
    #[expect(clippy::cast_sign_loss, reason = "the ratio was checked to be between 0 and 1")]
    let max_failure_ppm = (ratio * 1e6).round() as u32;
    Ok(UpdateConfig {
        parallelism: config.parallelism.unwrap_or_default(),
        delay_ns: not_negative(config.delay.unwrap_or_default(), &format!("{field}.Delay"))?,
        failure_action,
        // Docker takes 0 for "not given".
        monitor_ns: if monitor_ns == 0 { UpdateConfig::default().monitor_ns } else { monitor_ns },
        max_failure_ppm,
        order,
    })
}

fn endpoint(spec: wire::EndpointSpec) -> ApiResult<EndpointSpec> {
    let mode = match spec.mode.as_deref() {
        None | Some("" | "vip") => EndpointMode::Vip,
        Some("dnsrr") => EndpointMode::Dnsrr,
        Some(other) => {
            return Err(ApiError::invalid(format!(
                "EndpointSpec.Mode: invalid resolution mode: {other:?}: expected vip or dnsrr"
            )));
        }
    };
    let mut ports = Vec::new();
    let mut seen = BTreeSet::new();
    for (at, port) in spec.ports.unwrap_or_default().into_iter().enumerate() {
        let port = self::port(port, &format!("EndpointSpec.Ports[{at}]"))?;
        if mode == EndpointMode::Dnsrr && port.mode == PublishMode::Ingress {
            return Err(ApiError::invalid(
                "EndpointSpec: port published with ingress mode can't be used with dnsrr mode: use mode=host for the port, \
                 or --endpoint-mode vip",
            ));
        }
        if port.published > 0 && !seen.insert((port.published, port.protocol)) {
            return Err(ApiError::invalid(format!(
                "EndpointSpec: duplicate published ports provided: {} is published twice",
                port.published
            )));
        }
        ports.push(port);
    }
    Ok(EndpointSpec { mode, ports })
}

fn port(port: wire::PortConfig, field: &str) -> ApiResult<PortConfig> {
    let protocol = match port.protocol.as_deref() {
        None | Some("" | "tcp") => Protocol::Tcp,
        Some("udp") => Protocol::Udp,
        Some("sctp") => {
            return Err(ApiError::unsupported(format!(
                "{field}.Protocol: sctp is not supported by Shoal: use tcp or udp"
            )));
        }
        Some(other) => {
            return Err(ApiError::invalid(format!(
                "{field}.Protocol: invalid protocol '{other}': expected tcp or udp"
            )));
        }
    };
    let mode = match port.publish_mode.as_deref() {
        None | Some("" | "ingress") => PublishMode::Ingress,
        Some("host") => PublishMode::Host,
        Some(other) => {
            return Err(ApiError::invalid(format!(
                "{field}.PublishMode: invalid publish mode '{other}': expected ingress or host"
            )));
        }
    };
    let number = |name: &str, value: u32, least: u32| {
        u16::try_from(value).ok().filter(|_| value >= least).ok_or_else(|| {
            ApiError::invalid(format!("{field}.{name}: {value} is not a port: expected {least} to 65535"))
        })
    };
    Ok(PortConfig {
        name: port.name.unwrap_or_default(),
        protocol,
        target: number("TargetPort", port.target_port.unwrap_or_default(), 1)?,
        published: number("PublishedPort", port.published_port.unwrap_or_default(), 0)?,
        mode,
    })
}
