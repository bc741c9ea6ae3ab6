//! `/shoal/v1/attachments`, on every node: what runs there without Shoal gets an endpoint on an attachable network. This
//! is what engines' and CNI's plugins call.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use mesh_api::attachment::{AttachRequest, AttachTarget, Attachment};

use crate::docker::Api;
use crate::docker::error::{ApiError, ApiResult};
use crate::docker::local::AttachError;
use crate::docker::request::Body;
use crate::docker::time::rfc3339;
use crate::docker::wire::attachment as wire;

/// `GET /shoal/v1/attachments`.
pub(in crate::docker) async fn list(State(api): State<Api>) -> ApiResult<Json<Vec<wire::Attachment>>> {
    Ok(Json(api.host.attachments()?.iter().map(show).collect()))
}

/// `GET /shoal/v1/attachments/{id}`.
pub(in crate::docker) async fn inspect(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<wire::Attachment>> {
    Ok(Json(show(&api.host.attachment(&id)?)))
}

/// `POST /shoal/v1/attachments`.
pub(in crate::docker) async fn create(
    State(api): State<Api>,
    Body(request): Body<wire::AttachmentRequest>,
) -> ApiResult<(StatusCode, Json<wire::Attachment>)> {
    let attachment = api.host.attach(read(request)?).await?;
    Ok((StatusCode::CREATED, Json(show(&attachment))))
}

/// `DELETE /shoal/v1/attachments/{id}`.
pub(in crate::docker) async fn remove(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<StatusCode> {
    api.host.detach(id).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(in crate::docker) fn read(request: wire::AttachmentRequest) -> ApiResult<AttachRequest> {
    let wire::AttachmentRequest { network, name, aliases, ipv4_address, pid, netns, interface } = request;
    let network = network.filter(|network| !network.is_empty());
    let network =
        network.ok_or_else(|| ApiError::invalid("Network: name an attachable network, or give its id"))?;
    let target = match (pid, netns.filter(|path| !path.is_empty())) {
        (Some(pid), None) => AttachTarget::Process(pid),
        (None, Some(path)) => AttachTarget::Netns(path.into()),
        _ => {
            return Err(ApiError::invalid(
                "Pid, Netns: give one of them, a process on this node or a file that its network namespace is mounted on",
            ));
        }
    };
    let addr = match ipv4_address.filter(|text| !text.is_empty()) {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| {
            ApiError::invalid(format!("IPv4Address: '{text}' is no IPv4 address: give one such as 10.0.1.9"))
        })?),
    };
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let (name, interface) = (given(name), given(interface));
    Ok(AttachRequest { network, name, aliases: aliases.unwrap_or_default(), addr, target, interface })
}

fn show(attachment: &Attachment) -> wire::Attachment {
    let Attachment {
        id,
        network,
        network_name,
        name,
        aliases,
        target,
        interface,
        addresses,
        gateways,
        name_server,
        mac,
        mtu,
        since_ns,
    } = attachment;
    let (pid, netns) = match target {
        AttachTarget::Process(pid) => (Some(*pid), None),
        AttachTarget::Netns(path) => (None, Some(path.display().to_string())),
    };
    wire::Attachment {
        id: id.to_string(),
        network_id: network.to_string(),
        network: network_name.clone(),
        name: name.clone(),
        aliases: aliases.clone(),
        pid,
        netns,
        interface: interface.clone(),
        addresses: addresses.iter().map(ToString::to_string).collect(),
        gateways: gateways.iter().map(ToString::to_string).collect(),
        name_server: name_server.to_string(),
        mac_address: mac.map(|byte| format!("{byte:02x}")).join(":"),
        mtu: *mtu,
        created_at: rfc3339(*since_ns),
    }
}

impl From<AttachError> for ApiError {
    fn from(error: AttachError) -> Self {
        let message = error.to_string();
        match error {
            AttachError::Invalid(_) => Self::invalid(message),
            AttachError::NotFound(_) => Self::not_found(message),
            AttachError::Conflict(_) => Self::conflict(message),
            AttachError::Unavailable(_) => Self::unavailable(message),
            AttachError::Host(_) => Self::internal(message),
        }
    }
}
