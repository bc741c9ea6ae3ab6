//! What Shoal has beyond Docker's API: routes under `/shoal/v1`.

pub(super) mod attachments;
mod backup;
mod networks;
mod nodes;
mod status;
pub(super) mod tokens;
pub(super) mod watch;

use axum::Router;
use axum::extract::{Query, Request};
use axum::http::Uri;
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{delete, get, post};

use super::Api;
use super::error::{ApiError, ApiResult};

/// The routes.
pub(super) fn routes() -> Router<Api> {
    let bare = Router::new()
        .route("/shoal/v1/attachments", get(attachments::list).post(attachments::create))
        .route("/shoal/v1/attachments/{id}", get(attachments::inspect).delete(attachments::remove))
        .route("/shoal/v1/backup", get(backup::backup))
        .route("/shoal/v1/networks/rotate-keys", post(networks::rotate_keys))
        .route("/shoal/v1/networks/{id}/subnets", post(networks::add_subnet))
        .route("/shoal/v1/nodes", get(nodes::list))
        .route("/shoal/v1/nodes/{id}/approve", post(nodes::approve))
        .route("/shoal/v1/status", get(status::status))
        .route("/shoal/v1/tokens", get(tokens::list).post(tokens::create))
        .route("/shoal/v1/tokens/{id}", delete(tokens::remove))
        .route_layer(middleware::from_fn(without_parameters));
    bare.route("/shoal/v1/restore", post(backup::restore)).route("/shoal/v1/watch", get(watch::watch))
}

/// Refuses a request that has parameters.
async fn without_parameters(request: Request, next: Next) -> ApiResult<Response> {
    parameters(request.uri(), &[])?;
    Ok(next.run(request).await)
}

/// The parameters of a request, in order, some perhaps more than once; refuses others than `accepted`.
fn parameters(uri: &Uri, accepted: &[&str]) -> ApiResult<Vec<(String, String)>> {
    let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri)
        .map_err(|error| ApiError::invalid(format!("the parameters can't be read: {error}")))?;
    match pairs.iter().find(|(name, _)| !accepted.contains(&name.as_str())) {
        None => Ok(pairs),
        Some((name, _)) if accepted.is_empty() => {
            Err(ApiError::invalid(format!("unknown parameter '{name}': this takes none")))
        }
        Some((name, _)) => Err(ApiError::invalid(format!(
            "unknown parameter '{name}': expected one of {}",
            accepted.join(", ")
        ))),
    }
}
