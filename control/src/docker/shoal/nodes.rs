//! `/shoal/v1/nodes`, on managers: which nodes ask to come back because their certificates have expired, and an operator's
//! approval.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use crate::clock::now_ns;
use crate::command::{Action, Command};
use crate::docker::error::ApiResult;
use crate::docker::time::rfc3339;
use crate::docker::{Api, names, nodes};
use crate::model::{Node, Readmission};

/// A node.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct NodeAnswer {
    #[serde(rename = "ID")]
    id: String,
    hostname: String,
    role: &'static str,
    state: &'static str,
    /// Since when it asks for a certificate, because its own has expired.
    #[serde(skip_serializing_if = "Option::is_none")]
    asking_since: Option<String>,
    /// Until when it may have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    approved_until: Option<String>,
}

/// `GET /shoal/v1/nodes`.
pub(in crate::docker) async fn list(State(api): State<Api>) -> ApiResult<Json<Vec<NodeAnswer>>> {
    let state = api.state().await?;
    let now_ns = now_ns();
    Ok(Json(state.nodes.values().map(|node| show(node, now_ns)).collect()))
}

/// `POST /shoal/v1/nodes/{id}/approve`.
pub(in crate::docker) async fn approve(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<NodeAnswer>> {
    let cluster = api.manager()?;
    let id = names::node(&cluster.linearizable().await?, &id)?.id.clone();
    cluster.propose(Command::now(Action::ApproveNode { id: id.clone() })).await?;
    let state = cluster.state();
    Ok(Json(show(names::node(&state, id.as_str())?, now_ns())))
}

fn show(node: &Node, now_ns: u64) -> NodeAnswer {
    let Readmission { asking_since_ns, approved_until_ns } = node.readmission;
    NodeAnswer {
        id: node.id.to_string(),
        hostname: node.description.hostname.clone(),
        role: nodes::role_name(node.spec.role),
        state: nodes::state_name(node.status.state),
        asking_since: asking_since_ns.map(rfc3339),
        approved_until: approved_until_ns.filter(|_| node.is_approved(now_ns)).map(rfc3339),
    }
}
