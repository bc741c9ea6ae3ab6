//! The API's version: the optional `/v1.NN` before a path, and what this server speaks.

use std::fmt;

use axum::extract::Request;
use axum::http::Uri;
use axum::http::uri::PathAndQuery;

use super::error::{ApiError, ApiResult};

/// A version of the Docker Engine API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ApiVersion {
    major: u32,
    minor: u32,
}

/// The newest version that this server speaks: Docker Engine 28's.
pub(super) const NEWEST: ApiVersion = ApiVersion::new(1, 50);

/// The oldest version that this server speaks: Docker Engine 28's.
pub(super) const OLDEST: ApiVersion = ApiVersion::new(1, 24);

impl ApiVersion {
    /// Version `major.minor`.
    pub(super) const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once('.')?;
        let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(major) || !digits(minor) {
            return None;
        }
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl fmt::Display for ApiVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Takes the version off the request's path and notes it in the request's extensions; refuses one out of range.
pub(super) fn strip(request: &mut Request) -> ApiResult<()> {
    let path = request.uri().path();
    let Some((version, rest)) = split(path) else {
        request.extensions_mut().insert(NEWEST);
        return Ok(());
    };
    if version < OLDEST {
        return Err(ApiError::invalid(format!(
            "client version {version} is too old. Minimum supported API version is {OLDEST}, please upgrade your client to a \
             newer version"
        )));
    }
    if version > NEWEST {
        return Err(ApiError::invalid(format!(
            "client version {version} is too new. Maximum supported API version is {NEWEST}"
        )));
    }
    let path_and_query = match request.uri().query() {
        Some(query) => format!("{rest}?{query}"),
        None => rest.to_owned(),
    };
    let path_and_query = PathAndQuery::try_from(path_and_query)
        .map_err(|error| ApiError::invalid(format!("the request's path is invalid: {error}")))?;
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = Some(path_and_query);
    *request.uri_mut() = Uri::from_parts(parts)
        .map_err(|error| ApiError::invalid(format!("the request's address is invalid: {error}")))?;
    request.extensions_mut().insert(version);
    Ok(())
}

/// `/v1.41/info` is version 1.41 and `/info`.
fn split(path: &str) -> Option<(ApiVersion, &str)> {
    let rest = path.strip_prefix("/v")?;
    let (version, _) = rest.split_once('/')?;
    Some((ApiVersion::parse(version)?, &rest[version.len()..]))
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn stripped(path: &str) -> Result<(String, String), String> {
        let mut request = Request::builder().uri(path).body(Body::empty()).unwrap();
        strip(&mut request).map_err(|error| error.message)?;
        let version = request.extensions().get::<ApiVersion>().unwrap().to_string();
        Ok((version, request.uri().to_string()))
    }

    #[test]
    fn the_prefix_is_optional() {
        assert_eq!(stripped("/info"), Ok(("1.50".into(), "/info".into())));
        assert_eq!(stripped("/v1.41/tasks?filters=x"), Ok(("1.41".into(), "/tasks?filters=x".into())));
        assert_eq!(stripped("/volumes"), Ok(("1.50".into(), "/volumes".into())));
        assert_eq!(stripped("/v1.x/info"), Ok(("1.50".into(), "/v1.x/info".into())));
    }

    #[test]
    fn versions_out_of_range_get_dockers_text() {
        assert_eq!(
            stripped("/v1.51/info").unwrap_err(),
            "client version 1.51 is too new. Maximum supported API version is 1.50"
        );
        assert!(stripped("/v1.12/info").unwrap_err().starts_with("client version 1.12 is too old. Minimum"));
    }
}
