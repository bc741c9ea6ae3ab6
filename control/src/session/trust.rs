//! What a session has told its agent of the cluster's certificate authority.

use std::sync::Arc;

use mesh_api::id::NodeId;
use mesh_api::session::ManagerMessage;
use mesh_api::tls::KeyId;

use crate::model::{ClusterObject, State};

/// The roots that the agent knows of, and whether it was asked to renew its certificate.
#[derive(Debug)]
pub(super) struct Trust {
    cluster: Option<Arc<ClusterObject>>,
    /// What its certificate is to come from, as it was asked.
    asked: Option<KeyId>,
}

impl Trust {
    /// Of an agent that was told the roots of `state`.
    pub(super) fn told(state: &State) -> Self {
        Self { cluster: state.cluster.clone(), asked: None }
    }

    /// What `node` is to be told of `state`.
    pub(super) fn news(&mut self, state: &State, node: &NodeId) -> Vec<ManagerMessage> {
        let mut news = Vec::new();
        let Some(cluster) = &state.cluster else { return news };
        let same =
            self.cluster.as_ref().is_some_and(|told| Arc::ptr_eq(told, cluster) || told.ca == cluster.ca);
        if !same {
            news.push(ManagerMessage::Trust { roots: cluster.ca.trusted() });
        }
        self.cluster = Some(Arc::clone(cluster));
        let signer = cluster.ca.signer().id;
        let is_behind = state.nodes.get(node).is_some_and(|node| node.issuer != signer);
        if is_behind && self.asked != Some(signer) {
            self.asked = Some(signer);
            news.push(ManagerMessage::Renew);
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::command::Action;
    use crate::model::JoinSecrets;
    use crate::testing::World;

    #[test]
    fn a_node_is_told_of_each_change_once() {
        let mut world = World::new(&["n1"]);
        let id = NodeId::from("n1");
        let issued = |issuer| Action::SetNodeIssuer { id: "n1".into(), issuer };
        let mut trust = Trust::told(&world.state);
        assert_eq!(trust.news(&world.state, &id), [ManagerMessage::Renew], "nobody signed its certificate");
        assert!(trust.news(&world.state, &id).is_empty());
        let first = world.state.cluster.as_ref().unwrap().ca.root.id;
        world.must(issued(first));
        assert!(trust.news(&world.state, &id).is_empty());

        let rotation = world.rotate(SystemTime::now());
        let roots = world.state.cluster.as_ref().unwrap().ca.trusted();
        assert_eq!(trust.news(&world.state, &id), [ManagerMessage::Trust { roots }, ManagerMessage::Renew]);
        assert!(trust.news(&world.state, &id).is_empty());
        world.must(issued(rotation));
        assert!(trust.news(&world.state, &id).is_empty());

        let join_secrets = JoinSecrets { worker: [8; 16], manager: [9; 16] };
        world.must(Action::FinishRotation { root: rotation, join_secrets });
        let roots = world.state.cluster.as_ref().unwrap().ca.trusted();
        assert_eq!(trust.news(&world.state, &id), [ManagerMessage::Trust { roots }]);
    }
}
