//! The part of the API that belongs to a container engine: lists are empty, objects don't exist, and what
//! would make or run one is refused with a word on where it would work.

use axum::Json;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::Api;
use super::error::ApiError;

/// The answer to `method path`, if it is the engine's.
pub(super) fn answer(api: &Api, method: &Method, path: &str) -> Option<Response> {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let (kind, rest) = segments.split_first()?;
    let get = method == Method::GET || method == Method::HEAD;
    let list = |value: Value| Some((StatusCode::OK, Json(value)).into_response());
    match (*kind, rest) {
        ("containers" | "images", ["json"]) | ("images", ["search"]) | ("plugins", []) if get => {
            list(json!([]))
        }
        ("volumes", []) if get => list(json!({ "Volumes": [], "Warnings": null })),
        ("secrets" | "configs", []) if get => Some(match api.manager() {
            Ok(_) => Json(json!([])).into_response(),
            Err(error) => error.into_response(),
        }),
        ("system", ["df"]) if get => {
            list(json!({ "LayersSize": 0, "Images": [], "Containers": [], "Volumes": [], "BuildCache": [] }))
        }
        ("containers" | "images" | "volumes" | "build", ["prune"]) if method == Method::POST => {
            list(json!({ "SpaceReclaimed": 0 }))
        }
        ("secrets" | "configs", [id]) if get => Some(missing(singular(kind), id)),
        ("secrets" | "configs", _) => Some(refuse(
            "secrets and configs are not supported by the process runtime: give tasks what they need \
                                                   by --env",
        )),
        (
            "containers",
            [id, "json" | "logs" | "stats" | "top" | "changes" | "export" | "attach" | "archive"],
        ) if get => Some(ApiError::not_found(format!("No such container: {id}")).into_response()),
        ("containers", [id, ..]) if *id != "create" => {
            Some(ApiError::not_found(format!("No such container: {id}")).into_response())
        }
        ("images", [name @ .., "json" | "history" | "get"]) if get && !name.is_empty() => {
            Some(ApiError::not_found(format!("No such image: {}", name.join("/"))).into_response())
        }
        ("volumes", [name]) if get || method == Method::DELETE => {
            Some(ApiError::not_found(format!("get {name}: no such volume")).into_response())
        }
        ("plugins", [name @ .., "json"]) if get && !name.is_empty() => {
            Some(ApiError::not_found(format!("plugin \"{}\" not found", name.join("/"))).into_response())
        }
        ("networks", [_, "connect" | "disconnect"]) => Some(refuse(
            "containers of a local engine can't be attached: attach services (docker service create --network)",
        )),
        (
            "containers" | "images" | "volumes" | "plugins" | "build" | "commit" | "exec" | "session"
            | "grpc" | "auth",
            _,
        ) => Some(refuse(
            "Shoal runs services, not single containers or images: use `docker service create`, or a container engine's own \
                 socket (docker --host unix:///var/run/docker.sock …)",
        )),
        _ => None,
    }
}

fn singular(kind: &str) -> &str {
    kind.strip_suffix('s').unwrap_or(kind)
}

fn missing(kind: &str, id: &str) -> Response {
    ApiError::not_found(format!("{kind} {id} not found")).into_response()
}

fn refuse(why: &str) -> Response {
    ApiError::unsupported(why).into_response()
}
