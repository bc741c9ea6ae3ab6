//! The Docker Engine API's swarm part, for the unmodified `docker` command line and what else speaks it.
//!
//! A router over two things: the local host ([`LocalNode`]) and, on a manager, the replicated state
//! ([`crate::cluster::Cluster`]). Handlers read a state, or propose a command and answer; they hold nothing.
//! What belongs to a container engine (images, volumes, single containers) is answered with empty lists or
//! with an error that says so.

mod address;
mod differences;
mod engine;
mod error;
mod events;
mod filters;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
mod listen;
mod local;
mod names;
mod networks;
mod nodes;
mod refused;
mod request;
mod services;
mod shoal;
mod spec;
mod swarm;
mod system;
mod tasks;
mod time;
mod version;
mod wire;

use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use mesh_api::table::Role;
use tower::{ServiceExt as _, service_fn};

pub use listen::{ListenError, bind, serve};
pub use local::{
    AttachError, HostFacts, InitRequest, Interface, JoinRequest, LocalNode, Membership, RestoreError,
    RestoreRequest, RestoredSwarm, SwarmError,
};

use crate::cluster::Cluster;
use crate::model::State as ClusterState;
use error::{ApiError, ApiResult, NO_SWARM, NOT_A_MANAGER};

/// What the handlers work with.
#[derive(Clone)]
struct Api {
    host: Arc<dyn LocalNode>,
}

impl Api {
    /// The cluster, or Docker's text for a node that is not a manager.
    fn manager(&self) -> ApiResult<Cluster> {
        let membership = self.host.membership();
        // One that was demoted may not be gone yet.
        let is_worker = matches!(membership, Membership::Active { role: Role::Worker, .. });
        self.host.cluster().filter(|_| !is_worker).ok_or_else(|| match membership {
            Membership::Inactive => ApiError::unavailable(NO_SWARM),
            Membership::Active { .. } => ApiError::unavailable(NOT_A_MANAGER),
            Membership::Locked { .. } => SwarmError::Locked.into(),
        })
    }
}

impl Api {
    /// The state with all that was decided before this call, whichever manager was told of it.
    async fn state(&self) -> ApiResult<ClusterState> {
        Ok(self.manager()?.linearizable().await?)
    }
}

/// The API's routes, with or without `/v1.NN` before them.
pub fn router(host: Arc<dyn LocalNode>) -> Router {
    let api = Api { host };
    let routes = Router::new()
        .route("/_ping", get(system::ping))
        .route("/version", get(system::version))
        .route("/info", get(system::info))
        .route("/events", get(events::events))
        .route("/distribution/{*name}", get(system::distribution))
        .route("/swarm", get(swarm::inspect))
        .route("/swarm/init", post(swarm::init))
        .route("/swarm/join", post(swarm::join))
        .route("/swarm/leave", post(swarm::leave))
        .route("/swarm/update", post(swarm::update))
        .route("/swarm/unlockkey", get(swarm::unlock_key))
        .route("/swarm/unlock", post(swarm::unlock))
        .route("/nodes", get(nodes::list))
        .route("/nodes/{id}", get(nodes::inspect).delete(nodes::remove))
        .route("/nodes/{id}/update", post(nodes::update))
        .route("/services", get(services::list))
        .route("/services/create", post(services::create))
        .route("/services/{id}", get(services::inspect).delete(services::remove))
        .route("/services/{id}/update", post(services::update))
        .route("/services/{id}/logs", get(tasks::logs))
        .route("/tasks", get(tasks::list))
        .route("/tasks/{id}", get(tasks::inspect))
        .route("/tasks/{id}/logs", get(tasks::logs))
        .route("/networks", get(networks::list))
        .route("/networks/create", post(networks::create))
        .route("/networks/prune", post(networks::prune))
        .route("/networks/{id}", get(networks::inspect).delete(networks::remove))
        .merge(shoal::routes())
        .fallback(elsewhere)
        .method_not_allowed_fallback(elsewhere)
        .layer(middleware::from_fn_with_state(api.clone(), headers))
        .with_state(api);
    let versioned = service_fn(move |mut request: Request| {
        let routes = routes.clone();
        async move {
            match version::strip(&mut request) {
                Ok(()) => routes.oneshot(request).await,
                Err(error) => Ok::<_, Infallible>(error.into_response()),
            }
        }
    });
    Router::new().fallback_service(versioned)
}

/// What is not Shoal's own: the engine's part of the API, or nothing known.
async fn elsewhere(State(api): State<Api>, method: Method, uri: Uri) -> Response {
    engine::answer(&api, &method, uri.path())
        .unwrap_or_else(|| ApiError::not_found("page not found").into_response())
}

/// The headers that Docker's clients read: what the server is, and what it speaks.
async fn headers(State(api): State<Api>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let server = format!("Shoal/{} (linux)", api.host.facts().version);
    let headers = response.headers_mut();
    if let Ok(version) = HeaderValue::from_str(&version::NEWEST.to_string()) {
        headers.insert("Api-Version", version);
    }
    if let Ok(server) = HeaderValue::from_str(&server) {
        headers.insert("Server", server);
    }
    headers.insert("Docker-Experimental", HeaderValue::from_static("false"));
    headers.insert("Ostype", HeaderValue::from_static("linux"));
    response
}

/// `active/manager`, `active/worker`, `inactive`, `locked`: the `Swarm` header of `_ping`.
fn swarm_header(membership: &Membership) -> &'static str {
    match membership {
        Membership::Inactive => "inactive",
        Membership::Active { role: Role::Manager, .. } => "active/manager",
        Membership::Active { role: Role::Worker, .. } => "active/worker",
        Membership::Locked { .. } => "locked",
    }
}

#[cfg(test)]
mod tests;
