//! What a fuzzer is given to try of the API: the bodies and the parameters of requests.

#![expect(clippy::missing_panics_doc, reason = "to panic on what must not be is what the targets are for")]

use axum::http::Uri;
use mesh_api::fuzz::message;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::filters::Filters;
use super::networks::ask;
use super::request::{BODY_BYTES_MAX, Params};
use super::shoal::attachments;
use super::shoal::tokens::TokenRequest;
use super::shoal::watch::Asked;
use super::wire::{attachment, network, spec as wire, swarm};
use super::{events, spec, swarm as swarms, time};
use crate::apply::apply;
use crate::command::{Action, Command};
use crate::fuzz::{STATE, check};

/// A body, if it is of this type; it is read as it is written.
fn body<T: Serialize + DeserializeOwned + std::fmt::Debug + PartialEq>(data: &[u8]) -> Option<T> {
    message(data, BODY_BYTES_MAX as u32)
}

/// `POST /services/create`: what is accepted is shown as it was asked for, so that `docker service update`, which sends back
/// what it was shown, changes nothing by that.
pub fn service(data: &[u8]) -> bool {
    let Ok(request) = serde_json::from_slice::<wire::ServiceSpec>(data) else { return false };
    let Ok(spec) = spec::service_spec(request, &STATE) else { return true };
    let shown = spec::show_service_spec(&spec);
    let again = serde_json::to_vec(&shown).ok().and_then(|shown| serde_json::from_slice(&shown).ok());
    let again = again.and_then(|shown| spec::service_spec(shown, &STATE).ok());
    assert_eq!(again.as_ref(), Some(&spec), "{shown:?}");
    let action = Action::CreateService { id: "fuzzed".into(), spec: Box::new(spec) };
    accepted(action);
    true
}

/// `POST /networks/create`, and the subnets that are added to a network.
pub fn network(data: &[u8]) -> bool {
    let subnet = body::<network::IpamConfigRequest>(data);
    if let Some(Ok(config)) = subnet.as_ref().map(ask::another_subnet) {
        accepted(Action::AddSubnet { network: "net-app".into(), config });
    }
    let request = body::<network::CreateRequest>(data);
    let is_sound = request.is_some();
    if let Some(Ok(spec)) = request.map(ask::spec) {
        accepted(Action::CreateNetwork { id: "fuzzed".into(), spec });
    }
    is_sound
}

/// The other bodies.
pub fn request(data: &[u8]) -> bool {
    let attach = body::<attachment::AttachmentRequest>(data);
    let is_attach = attach.is_some_and(|request| attachments::read(request).is_ok());
    let spec = body::<swarm::SpecRequest>(data);
    let is_spec = spec.is_some_and(|spec| swarms::check_spec(&spec).is_ok());
    let read = [
        body::<swarm::InitRequest>(data).is_some(),
        body::<swarm::JoinRequest>(data).is_some(),
        body::<swarm::NodeSpecRequest>(data).is_some(),
        body::<swarm::UnlockRequest>(data).is_some(),
        serde_json::from_slice::<TokenRequest>(data).is_ok(),
    ];
    is_attach || is_spec && read.contains(&true)
}

/// What is between `?` and the end of a request's address: filters, versions and times.
pub fn filters(data: &[u8]) -> bool {
    let Ok(uri) = Uri::try_from([b"/services?", data].concat()) else { return false };
    let params = Params::of(&uri);
    let _ = (params.boolean("status"), params.version("service"));
    let _ = ["since", "until"].map(|name| events::parameter_ns(&params, name));
    let _ = params.get("until").map(|text| time::point_ns(text, 1));
    let _ = Asked::read(&uri);
    let accepted = ["id", "label", "mode", "name", "type"];
    let Some(text) = params.get("filters") else { return false };
    let Ok(filters) = Filters::parse(Some(text), &accepted) else { return false };
    for service in STATE.services.values() {
        let _ = filters.labels("label", &service.spec.labels);
        let _ = filters.matches("name", &service.spec.name) || filters.prefix("id", service.id.as_str());
    }
    let _ = filters.boolean("mode");
    true
}

/// How a service's spec is shown.
#[cfg(test)]
pub(crate) fn shown(spec: &crate::model::ServiceSpec) -> Vec<u8> {
    serde_json::to_vec(&spec::show_service_spec(spec)).unwrap()
}

/// What is proposed is applied or refused.
fn accepted(action: Action) {
    let command = Command { at_ns: 1, action };
    if let Ok((state, _)) = apply(&STATE, STATE.index + 1, &command) {
        check(state);
    }
}
