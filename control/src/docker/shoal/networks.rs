//! `/shoal/v1/networks`, on managers: what networks have beyond Docker's.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use crate::command::{Action, Command};
use crate::docker::error::ApiResult;
use crate::docker::networks::{ask, show_network};
use crate::docker::request::Body;
use crate::docker::wire::network as wire;
use crate::docker::{Api, names};

/// `POST /shoal/v1/networks/{id}/subnets`, with what is one entry of `IPAM.Config` in `POST /networks/create`: gives a
/// network another IPv4 subnet.
pub(in crate::docker) async fn add_subnet(
    State(api): State<Api>,
    Path(id): Path<String>,
    Body(request): Body<wire::IpamConfigRequest>,
) -> ApiResult<Json<wire::Network>> {
    let cluster = api.manager()?;
    let network = names::network(&cluster.linearizable().await?, &id)?.id.clone();
    let config = ask::another_subnet(&request)?;
    cluster.propose(Command::now(Action::AddSubnet { network: network.clone(), config })).await?;
    Ok(Json(show_network(names::network(&cluster.linearizable().await?, network.as_str())?)))
}

/// `POST /shoal/v1/networks/rotate-keys`: every node makes new WireGuard keys. Tells how many nodes do, and how many of those
/// only when they are back.
pub(in crate::docker) async fn rotate_keys(State(api): State<Api>) -> ApiResult<Json<Value>> {
    let cluster = api.manager()?;
    cluster.propose(Command::now(Action::RotateKeys)).await?;
    let state = cluster.linearizable().await?;
    let epoch = state.cluster.as_ref().map(|cluster| cluster.key_epoch);
    let (down, up): (Vec<_>, Vec<_>) =
        state.nodes.values().filter(|node| node.encrypts()).partition(|node| node.is_down());
    Ok(Json(json!({ "KeyEpoch": epoch, "Nodes": up.len() + down.len(), "NodesDown": down.len() })))
}
