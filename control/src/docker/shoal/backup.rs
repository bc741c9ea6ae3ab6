//! Backups: the state as a file, and a swarm that begins anew with one.

use std::net::IpAddr;
use std::time::SystemTime;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Uri;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use futures::StreamExt as _;

use super::parameters;
use crate::backup::{Backup, BackupError, FILE_BYTES_MAX, Reader};
use crate::docker::address;
use crate::docker::error::{ApiError, ApiResult};
use crate::docker::local::{Membership, RestoreError, RestoreRequest, RestoredSwarm};
use crate::docker::request::Params;
use crate::docker::{Api, Interface};

/// `GET /shoal/v1/backup`: the file, with all that was decided before this call.
pub(in crate::docker) async fn backup(State(api): State<Api>) -> ApiResult<Response> {
    let state = api.state().await?;
    let written = aside(move || Backup::write(&state, SystemTime::now())).await?;
    let file = written.map_err(|error| match error {
        BackupError::NoCluster => ApiError::unavailable(error.to_string()),
        error => ApiError::internal(format!("the backup can't be written: {error}")),
    })?;
    Ok(([(CONTENT_TYPE, "application/octet-stream")], file).into_response())
}

/// `POST /shoal/v1/restore`: this host becomes the only manager of the swarm whose backup the body is.
pub(in crate::docker) async fn restore(
    State(api): State<Api>,
    uri: Uri,
    params: Params,
    body: Body,
) -> ApiResult<Json<RestoredSwarm>> {
    let backup = read(body).await?;
    parameters(&uri, &["force", "advertiseAddr", "listenAddr", "dataPathAddr"])?;
    let force = params.boolean("force")?;
    let text = |name| params.get(name).unwrap_or_default();
    let interfaces = api.host.interfaces();
    let (advertise, port) = match api.host.membership() {
        Membership::Inactive => address::advertise(text("advertiseAddr"), &interfaces)?,
        Membership::Active { addr, .. } | Membership::Locked { addr, .. } => {
            own_address(addr, text("advertiseAddr"), &interfaces)?
        }
    };
    let listen = text("listenAddr");
    let listen = address::listen(if listen.is_empty() { "0.0.0.0" } else { listen }, &interfaces)?;
    let listen = address::reachable(listen, advertise)?;
    let data_path = address::data_path(text("dataPathAddr"), &interfaces)?;
    if data_path.is_some() && api.host.membership() != Membership::Inactive {
        return Err(ApiError::invalid(
            "--data-path-addr: this host is a node, and has one: leave the flag out",
        ));
    }
    let request = RestoreRequest {
        backup: Box::new(backup),
        listen,
        advertise,
        advertise_port: port.unwrap_or(listen.port()),
        data_path,
        force,
    };
    Ok(Json(api.host.restore(request).await?))
}

/// A node's address is what it is; with another port, if one is given.
fn own_address(own: IpAddr, text: &str, interfaces: &[Interface]) -> ApiResult<(IpAddr, Option<u16>)> {
    if text.is_empty() {
        return Ok((own, None));
    }
    let (addr, port) = address::advertise(text, interfaces)?;
    if addr == own {
        return Ok((own, port));
    }
    Err(ApiError::invalid(format!(
        "--advertise-addr: this host is a node that advertises {own}: leave the flag out, or leave the swarm first \
         (`docker swarm leave`)"
    )))
}

/// Reads the body to its end, also once it is refused: or its sender would learn of the broken connection alone.
async fn read(body: Body) -> ApiResult<Backup> {
    let refused = |error: BackupError| ApiError::invalid(format!("the backup can't be read: {error}"));
    let mut reader = Reader::default();
    let mut pieces = body.into_data_stream();
    let (mut bytes, mut failed) = (0, None);
    while let Some(piece) = pieces.next().await {
        let piece =
            piece.map_err(|error| ApiError::invalid(format!("the request's body can't be read: {error}")))?;
        bytes += piece.len();
        if failed.is_none() {
            failed = reader.feed(&piece).err();
        } else if bytes > FILE_BYTES_MAX {
            break;
        }
    }
    if let Some(error) = failed {
        return Err(refused(error));
    }
    aside(move || reader.finish()).await?.map_err(refused)
}

/// Does what takes long beside the requests.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> ApiResult<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        if error.is_panic() {
            ApiError::internal(format!("the backup failed: {error}"))
        } else {
            ApiError::unavailable("the agent is shutting down")
        }
    })
}

impl From<RestoreError> for ApiError {
    fn from(error: RestoreError) -> Self {
        let message = error.to_string();
        match error {
            RestoreError::Manager | RestoreError::OtherSwarm { .. } | RestoreError::Alive(_) => {
                Self::conflict(message)
            }
            RestoreError::Unfit(_) => Self::invalid(message),
            RestoreError::Swarm(error) => error.into(),
        }
    }
}
