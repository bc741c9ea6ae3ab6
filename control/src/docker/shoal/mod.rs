//! What Shoal has beyond Docker's API: routes under `/shoal/v1`.

pub(super) mod attachments;
pub(super) mod backup;
pub(super) mod networks;
pub(super) mod nodes;
pub(super) mod status;
pub(super) mod tokens;
pub(super) mod watch;

use axum::extract::Query;
use axum::http::Uri;

use super::error::{ApiError, ApiResult};

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
