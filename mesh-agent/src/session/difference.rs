//! The changes that lead from one table to another, and those that lead nowhere.

use std::collections::BTreeMap;

use mesh_api::table::{Change, Delta, Table};

/// What makes `to` of `from`.
pub(super) fn difference(from: &Table, to: &Table) -> Delta {
    let mut changes = Vec::new();
    if from.cluster != to.cluster {
        changes.push(Change::Cluster(to.cluster.clone()));
    }
    compare(&from.nodes, &to.nodes, Change::Node, Change::NodeRemoved, &mut changes);
    compare(&from.networks, &to.networks, Change::Network, Change::NetworkRemoved, &mut changes);
    compare(&from.services, &to.services, Change::Service, Change::ServiceRemoved, &mut changes);
    let task = |task| Change::Task(Box::new(task));
    compare(&from.tasks, &to.tasks, task, Change::TaskRemoved, &mut changes);
    Delta { from: from.index, to: to.index, changes }
}

/// Whether `change` makes something else of `table`. At the beginning of a session managers tell of what has changed
/// meanwhile, though it may have changed back.
pub(super) fn is_news(table: &Table, change: &Change) -> bool {
    match change {
        Change::Cluster(record) => table.cluster != *record,
        Change::Node(record) => table.nodes.get(&record.id) != Some(record),
        Change::NodeRemoved(id) => table.nodes.contains_key(id),
        Change::Network(record) => table.networks.get(&record.id) != Some(record),
        Change::NetworkRemoved(id) => table.networks.contains_key(id),
        Change::Service(record) => table.services.get(&record.id) != Some(record),
        Change::ServiceRemoved(id) => table.services.contains_key(id),
        Change::Task(record) => table.tasks.get(&record.id) != Some(&**record),
        Change::TaskRemoved(id) => table.tasks.contains_key(id),
    }
}

fn compare<K: Ord + Clone, V: PartialEq + Clone>(
    from: &BTreeMap<K, V>,
    to: &BTreeMap<K, V>,
    set: impl Fn(V) -> Change,
    removed: impl Fn(K) -> Change,
    changes: &mut Vec<Change>,
) {
    changes.extend(from.keys().filter(|key| !to.contains_key(key)).cloned().map(removed));
    let differ = to.iter().filter(|(key, value)| from.get(key) != Some(value));
    changes.extend(differ.map(|(_, value)| set(value.clone())));
}

#[cfg(test)]
mod tests {
    use mesh_api::table::{ClusterRecord, NodeRecord, NodeState, ReturnPath, Role};

    use super::*;

    fn node(id: &str, state: NodeState) -> NodeRecord {
        let (hostname, vtep) = (id.to_owned(), "192.0.2.1".parse().unwrap());
        NodeRecord {
            id: id.into(),
            hostname,
            role: Role::Worker,
            vtep,
            state,
            wireguard: Vec::new(),
            manager: None,
        }
    }

    fn table(index: u64, nodes: &[(&str, NodeState)]) -> Table {
        let return_path = ReturnPath::Tunnel;
        let cluster =
            ClusterRecord { id: "c".into(), hash_seed: 7, data_path_port: 4789, return_path, key_epoch: 0 };
        let nodes = nodes.iter().map(|(id, state)| ((*id).into(), node(id, *state))).collect();
        Table { index, nodes, ..Table::new(cluster) }
    }

    #[test]
    fn the_difference_leads_from_one_table_to_the_other() {
        let mut from = table(4, &[("a", NodeState::Ready), ("b", NodeState::Ready), ("c", NodeState::Ready)]);
        let to = table(9, &[("b", NodeState::Down), ("c", NodeState::Ready), ("d", NodeState::Ready)]);
        let delta = difference(&from, &to);
        assert_eq!(delta.changes.len(), 3, "{:?}", delta.changes);
        from.apply(delta).unwrap();
        assert_eq!(from, to);
    }

    #[test]
    fn what_the_table_says_already_is_no_news() {
        let table = table(4, &[("a", NodeState::Ready)]);
        let cluster = ClusterRecord { key_epoch: 1, ..table.cluster.clone() };
        for (change, expected) in [
            (Change::Node(node("a", NodeState::Ready)), false),
            (Change::Node(node("a", NodeState::Down)), true),
            (Change::Node(node("b", NodeState::Ready)), true),
            (Change::NodeRemoved("a".into()), true),
            (Change::NodeRemoved("b".into()), false),
            (Change::Cluster(table.cluster.clone()), false),
            (Change::Cluster(cluster), true),
            (Change::NetworkRemoved("a".into()), false),
            (Change::ServiceRemoved("a".into()), false),
            (Change::TaskRemoved("a".into()), false),
        ] {
            assert_eq!(is_news(&table, &change), expected, "{change:?}");
        }
    }

    #[test]
    fn the_same_table_is_no_change() {
        let table = table(4, &[("a", NodeState::Ready)]);
        assert!(difference(&table, &table).changes.is_empty());
    }
}
