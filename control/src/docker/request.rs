//! Reading requests: JSON bodies and query parameters, with errors in Docker's body that name the field.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, Uri};
use futures::StreamExt as _;
use hyper::body::Body as _;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::error::{ApiError, ApiResult};

/// Longest body that is read, bytes: a service's spec is a few kB.
pub(super) const BODY_BYTES_MAX: usize = 4 << 20;
/// Longest body that is read without leave, bytes: most are shorter by far.
pub(super) const SMALL_BODY_BYTES: usize = 64 << 10;

/// Whether a request's body is its handler's to read, piece by piece: a backup is longer than any other.
pub(super) fn is_streamed(request: &Parts) -> bool {
    request.method == Method::POST && request.uri.path().ends_with("/shoal/v1/restore")
}

/// Reads a request's body before it is answered, whoever answers: a client that is still writing when it is refused
/// reports the broken connection instead of the refusal. One that is long waits for a permit of `large`, and keeps that.
pub(super) async fn read_whole(
    body: hyper::body::Incoming,
    large: &Arc<Semaphore>,
    limit: Duration,
) -> ApiResult<(Vec<u8>, Option<OwnedSemaphorePermit>)> {
    let too_large = || {
        ApiError::too_large(format!(
            "the request's body can't be read: it may have up to {BODY_BYTES_MAX} bytes"
        ))
    };
    if body.size_hint().lower() > BODY_BYTES_MAX as u64 {
        return Err(too_large());
    }
    let read = async {
        let (mut bytes, mut leave) = (Vec::new(), None);
        let mut pieces = axum::body::Body::new(body).into_data_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece
                .map_err(|error| ApiError::invalid(format!("the request's body can't be read: {error}")))?;
            if bytes.len() + piece.len() > BODY_BYTES_MAX {
                return Err(too_large());
            }
            if bytes.len() + piece.len() > SMALL_BODY_BYTES && leave.is_none() {
                // It is never closed.
                leave = Arc::clone(large).acquire_owned().await.ok();
            }
            bytes.extend_from_slice(&piece);
        }
        Ok((bytes, leave))
    };
    let late = |_| ApiError {
        status: StatusCode::REQUEST_TIMEOUT,
        message: format!("the request's body did not come within {} s", limit.as_secs()),
    };
    timeout(limit, read).await.map_err(late)?
}

/// A JSON body.
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> ApiResult<Self> {
        let content_type =
            request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let media_type = content_type.split(';').next().unwrap_or_default().trim();
        if !media_type.is_empty() && !media_type.eq_ignore_ascii_case("application/json") {
            return Err(ApiError::invalid(format!(
                "unsupported Content-Type header ({content_type}): must be 'application/json'"
            )));
        }
        let bytes = axum::body::to_bytes(request.into_body(), BODY_BYTES_MAX).await;
        let bytes = bytes.map_err(|error| ApiError::invalid(format!("invalid JSON: {error}")))?;
        if bytes.is_empty() {
            return Err(ApiError::invalid("invalid JSON: got EOF while reading request body"));
        }
        // serde takes an array for a struct, field by field; Docker doesn't.
        if !bytes.trim_ascii_start().starts_with(b"{") {
            return Err(ApiError::invalid("invalid JSON: expected an object"));
        }
        match Json::from_bytes(&bytes) {
            Ok(Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(ApiError::invalid(format!("invalid JSON: {}", explain(&rejection)))),
        }
    }
}

/// What serde says: the field's path and what is wrong with it, without the framework's words around it.
fn explain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    // The last but one names the field; the last is the same without it.
    while let Some(source) = innermost.source() {
        if source.source().is_none() && innermost.to_string().ends_with(&source.to_string()) {
            break;
        }
        innermost = source;
    }
    innermost.to_string()
}

/// The query's parameters.
pub(super) struct Params(BTreeMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::of(&parts.uri))
    }
}

impl Params {
    /// Those of an address.
    pub(super) fn of(uri: &Uri) -> Self {
        let pairs: Vec<(String, String)> =
            Query::try_from_uri(uri).map(|Query(pairs)| pairs).unwrap_or_default();
        Self(pairs.into_iter().collect())
    }

    /// A parameter.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A parameter that is true or false; false if it is not there.
    pub(super) fn boolean(&self, name: &str) -> ApiResult<bool> {
        match self.get(name).unwrap_or_default() {
            "" | "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
            other => {
                Err(ApiError::invalid(format!("invalid value for {name}: {other}: expected true or false")))
            }
        }
    }

    /// The version that an update of a `kind` is based on.
    pub(super) fn version(&self, kind: &str) -> ApiResult<u64> {
        let text = self.get("version").unwrap_or_default();
        text.parse().map_err(|_| {
            ApiError::invalid(format!(
                "invalid {kind} version '{text}': give the Version.Index that inspecting the {kind} shows"
            ))
        })
    }
}
