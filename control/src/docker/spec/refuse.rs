//! Docker's fields that a process of the host can't be given. They are refused by name rather than passed
//! over, so that nobody believes in a health check or a mount that isn't there.

use serde_json::Value;

use crate::docker::error::{ApiError, ApiResult};
use crate::docker::wire::spec::{ContainerSpec, Resources, TaskTemplate};

/// Whether there is nothing in `value`, however deep: what clients send for a field left out.
fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_blank),
    }
}

/// 501 for a field of the task template that is set.
fn unset(field: &str, flag: &str, value: Option<&Value>) -> ApiResult<()> {
    if value.is_none_or(is_blank) {
        return Ok(());
    }
    Err(ApiError::unsupported(format!(
        "TaskTemplate.{field} is not supported by Shoal's process runtime: leave it out ({flag})"
    )))
}

/// `--no-healthcheck`, which asks for what is the case.
pub(super) fn is_no_check(health: &Value) -> bool {
    *health == serde_json::json!({ "Test": ["NONE"] })
}

/// Refuses what a container would have and a process has not.
pub(super) fn container(spec: &ContainerSpec) -> ApiResult<()> {
    let health = spec.healthcheck.as_ref().filter(|health| !is_no_check(health));
    let fields = [
        ("Mounts", "--mount", &spec.mounts),
        ("Secrets", "--secret", &spec.secrets),
        ("Configs", "--config", &spec.configs),
        ("Healthcheck", "--health-cmd and others; --no-healthcheck is accepted", &health.cloned()),
        ("Hosts", "--host", &spec.hosts),
        ("DNSConfig", "--dns, --dns-option, --dns-search", &spec.dns_config),
        ("Groups", "--group", &spec.groups),
        ("Privileges", "--credential-spec and others", &spec.privileges),
        ("TTY", "--tty", &spec.tty),
        ("OpenStdin", "stdin_open", &spec.open_stdin),
        ("ReadOnly", "--read-only", &spec.read_only),
        ("Sysctls", "--sysctl", &spec.sysctls),
        ("CapabilityAdd", "--cap-add", &spec.capability_add),
        ("CapabilityDrop", "--cap-drop", &spec.capability_drop),
        ("Ulimits", "--ulimit", &spec.ulimits),
        ("OomScoreAdj", "--oom-score-adj", &spec.oom_score_adj),
    ];
    for (field, flag, value) in fields {
        unset(&format!("ContainerSpec.{field}"), flag, value.as_ref())?;
    }
    match spec.isolation.as_deref() {
        None | Some("" | "default") => Ok(()),
        Some(other) => Err(ApiError::invalid(format!(
            "TaskTemplate.ContainerSpec.Isolation: '{other}' is not possible on Linux: leave it out (--isolation)"
        ))),
    }
}

/// Refuses limits that nobody would enforce and reservations that nobody would count.
pub(super) fn resources(resources: &Resources) -> ApiResult<()> {
    let flags = [
        ("Limits", "--limit-cpu, --limit-memory, --limit-pids", resources.limits.as_ref()),
        (
            "Reservations",
            "--reserve-cpu, --reserve-memory, --generic-resource",
            resources.reservations.as_ref(),
        ),
    ];
    for (part, flag, amounts) in flags {
        for (name, amount) in amounts.into_iter().flatten() {
            unset(&format!("Resources.{part}.{name}"), flag, Some(amount))?;
        }
    }
    unset("Resources.SwapBytes", "--memory-swap", resources.swap_bytes.as_ref())?;
    // -1 is Docker's word for "not set".
    let swappiness = resources.memory_swappiness.as_ref().filter(|value| value.as_i64() != Some(-1));
    unset("Resources.MemorySwappiness", "--memory-swappiness", swappiness)
}

/// Refuses runtimes other than containers, and log drivers.
pub(super) fn template(template: &TaskTemplate) -> ApiResult<()> {
    unset("PluginSpec", "plugins are services of Docker Engine only", template.plugin_spec.as_ref())?;
    unset(
        "NetworkAttachmentSpec",
        "it is for containers of the local engine",
        template.network_attachment_spec.as_ref(),
    )?;
    unset("LogDriver", "--log-driver, --log-opt", template.log_driver.as_ref())?;
    match template.runtime.as_deref() {
        None | Some("" | "container") => Ok(()),
        Some(other) => Err(ApiError::unsupported(format!(
            "TaskTemplate.Runtime: '{other}' is not supported: leave it out, or use 'container'"
        ))),
    }
}
