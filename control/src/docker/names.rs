//! Names and ids: which names are allowed, names for services that came without one, and finding an object by
//! its id, its name or the beginning of its id.

use std::sync::Arc;

use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId, TokenId};
use rand::RngExt as _;

use super::error::{ApiError, ApiResult};
use crate::model::{Network, Node, Service, State, Task, Token};

/// Longest name, characters: a DNS label.
const NAME_LEN_MAX: usize = 63;

const ADJECTIVES: [&str; 24] = [
    "agile", "bold", "brisk", "calm", "clever", "coral", "eager", "fleet", "gentle", "golden", "happy",
    "keen", "lively", "lucid", "merry", "nimble", "quick", "quiet", "silver", "sleek", "swift", "tidal",
    "vivid", "witty",
];
const FISH: [&str; 24] = [
    "anchovy", "bass", "bream", "capelin", "carp", "char", "cod", "dace", "goby", "grayling", "halibut",
    "herring", "ide", "mackerel", "minnow", "perch", "pike", "roach", "salmon", "sardine", "smelt", "sprat",
    "tench", "trout",
];

/// Refuses a name that is not a DNS label (SwarmKit's rule, which also allows `_` within).
pub(super) fn check(field: &str, name: &str) -> ApiResult<()> {
    let alphanumeric = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    if name.is_empty() {
        return Err(ApiError::invalid(format!("invalid {field}: name must be provided")));
    }
    let valid = alphanumeric(name.chars().next())
        && alphanumeric(name.chars().next_back())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    if !valid {
        return Err(ApiError::invalid(format!(
            "invalid {field} '{name}': name must be valid as a DNS name component (letters, digits, and - or _ between \
             them)"
        )));
    }
    if name.len() > NAME_LEN_MAX {
        return Err(ApiError::invalid(format!(
            "invalid {field} '{name}': name must be {NAME_LEN_MAX} characters or fewer"
        )));
    }
    Ok(())
}

/// A name for a service that came without one, such as no service of `state` has.
pub(super) fn invent(state: &State, rng: &mut impl rand::Rng) -> String {
    loop {
        let adjective = ADJECTIVES[rng.random_range(0..ADJECTIVES.len())];
        let fish = FISH[rng.random_range(0..FISH.len())];
        let name = format!("{adjective}_{fish}");
        if state.service_by_name(&name).is_none() {
            return name;
        }
        let name = format!("{name}{}", rng.random_range(0..10_000_u32));
        if state.service_by_name(&name).is_none() {
            return name;
        }
    }
}

/// The node with this id, host name, or beginning of an id.
pub(super) fn node<'s>(state: &'s State, input: &str) -> ApiResult<&'s Arc<Node>> {
    find("node", input, state.nodes.get(&NodeId::from(input)), || {
        let named = state.nodes.values().filter(|node| node.description.hostname == input).collect();
        (named, state.nodes.values().filter(|node| node.id.as_str().starts_with(input)).collect())
    })
}

/// The service with this id, name, or beginning of an id.
pub(super) fn service<'s>(state: &'s State, input: &str) -> ApiResult<&'s Arc<Service>> {
    find("service", input, state.services.get(&ServiceId::from(input)), || {
        let named = state.service_by_name(input).into_iter().collect();
        (named, state.services.values().filter(|service| service.id.as_str().starts_with(input)).collect())
    })
}

/// The task with this id, name, or beginning of an id.
pub(super) fn task<'s>(state: &'s State, input: &str) -> ApiResult<&'s Arc<Task>> {
    find("task", input, state.tasks.get(&TaskId::from(input)), || {
        let named = state.tasks.values().filter(|task| task.name() == input).collect();
        (named, state.tasks.values().filter(|task| task.id.as_str().starts_with(input)).collect())
    })
}

/// The network with this id, name, or beginning of an id.
pub(super) fn network<'s>(state: &'s State, input: &str) -> ApiResult<&'s Arc<Network>> {
    find("network", input, state.networks.get(&NetworkId::from(input)), || {
        let named = state.networks.values().filter(|network| network.spec.name == input).collect();
        (named, state.networks.values().filter(|network| network.id.as_str().starts_with(input)).collect())
    })
}

/// The join token with this id, or beginning of an id.
pub(super) fn token<'s>(state: &'s State, input: &str) -> ApiResult<&'s Arc<Token>> {
    find("token", input, state.tokens.get(&TokenId::from(input)), || {
        (Vec::new(), state.tokens.values().filter(|token| token.id.as_str().starts_with(input)).collect())
    })
}

/// Docker's order: the id, then the name, then the beginning of an id; more than one match is an error.
fn find<'s, T>(
    kind: &str,
    input: &str,
    by_id: Option<&'s Arc<T>>,
    others: impl FnOnce() -> (Vec<&'s Arc<T>>, Vec<&'s Arc<T>>),
) -> ApiResult<&'s Arc<T>> {
    if let Some(found) = by_id {
        return Ok(found);
    }
    let (named, prefixed) = if input.is_empty() { (Vec::new(), Vec::new()) } else { others() };
    let found = if named.is_empty() { prefixed } else { named };
    match found[..] {
        [] => Err(ApiError::not_found(format!("{kind} {input} not found"))),
        [found] => Ok(found),
        _ => Err(ApiError::invalid(format!("{kind} {input} is ambiguous ({} matches found)", found.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for name in ["web", "a", "9", "my-web_1", &"x".repeat(63)] {
            assert!(check("Name", name).is_ok(), "{name}");
        }
        for name in ["", "-web", "web-", "we b", "wéb", "a.b", "a/b", &"x".repeat(64)] {
            let error = check("Name", name).unwrap_err();
            assert_eq!(error.status, 400);
            assert!(error.message.starts_with("invalid Name"), "{}", error.message);
        }
    }

    #[test]
    fn invented_names_are_allowed() {
        let name = invent(&State::empty(), &mut rand::rng());
        assert!(check("Name", &name).is_ok(), "{name}");
    }
}
