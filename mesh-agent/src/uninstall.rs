//! Removing everything that agents made on a host, while none runs there.
//!
//! What was removed is told by looking before and after: an inventory knows what there is of Shoal's on a host, whoever
//! made it and however far the removal came.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use mesh_api::error::chain;
use mesh_api::id::NodeId;

use crate::claim::{ClaimError, NetnsClaim};
use crate::dataplane::Dataplane;
use crate::links::{LinkError, Links};
use crate::node;
use crate::runtime::Runtime;
use crate::session::Store;

/// Where attachments are pinned.
const LINKS_FOLDER: &str = "links";

/// Something of Shoal's on the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Item {
    /// A task, by its id.
    Task(String),
    /// A network interface, by its name.
    Link(String),
    /// A netfilter table, by its family and name.
    Table(String),
    /// A program, map or attachment, by the path of its pin.
    Pin(PathBuf),
    /// A file of the agent's state.
    File(PathBuf),
}

/// What an uninstallation came to.
#[derive(Debug, Default)]
pub struct Uninstalled {
    /// The node that the host was in a cluster, if it was one.
    pub node: Option<NodeId>,
    /// What was there and is gone.
    pub removed: Vec<Item>,
    /// What is still there.
    pub left: Vec<Item>,
    /// What went wrong, in words.
    pub errors: Vec<String>,
}

/// Stops the tasks that agents with this state folder and this folder on a BPF file system left running, detaches and
/// removes all that they made, and forgets the host's place in its cluster. Refused while an agent runs in this network
/// namespace. Done again, it removes nothing.
///
/// To be called with the state folder locked. Sysctls stay as they are: others may rely on them meanwhile.
pub async fn uninstall(state_dir: &Path, bpffs: &Path) -> Result<Uninstalled, ClaimError> {
    let _claim = NetnsClaim::take()?;
    let store = Store::new(state_dir);
    let runtime = Runtime::new(store.tasks(), PathBuf::from("/proc/self/exe"));
    let mut errors = Vec::new();
    // One that can't be read is removed all the same.
    let node = store.load().ok().flatten().map(|kept| kept.membership.node_id);
    let before = inventory(state_dir, bpffs, &mut errors).await;
    errors.extend(node::remove_all::<Dataplane>(&runtime, bpffs, state_dir).await);
    errors.extend(store.forget().iter().map(ToString::to_string));
    // What is in them, or why they can't be removed, is in the inventory.
    for folder in [store.tasks(), bpffs.to_owned()] {
        let _ = fs::remove_dir(folder);
    }
    // What went wrong with looking has been said.
    let after = inventory(state_dir, bpffs, &mut Vec::new()).await;
    let removed = before.difference(&after).cloned().collect();
    Ok(Uninstalled { node, removed, left: after.into_iter().collect(), errors })
}

/// What there is of Shoal's on the host.
async fn inventory(state_dir: &Path, bpffs: &Path, errors: &mut Vec<String>) -> BTreeSet<Item> {
    let mut items = BTreeSet::new();
    items.extend(names_in(&Store::new(state_dir).tasks()).map(Item::Task));
    // The agent's own, and those of attachments; a manager has a folder there.
    let folders = [state_dir.to_owned(), Store::new(state_dir).attachments()];
    let files = folders.iter().flat_map(|folder| names_in(folder).map(|name| folder.join(name)));
    items.extend(files.filter(|path| path.extension().is_some_and(|it| it == "json")).map(Item::File));
    for folder in pin_folders(bpffs) {
        pins_in(&folder, &mut items);
    }
    match links_and_tables().await {
        Ok(found) => items.extend(found),
        Err(error) => errors.push(chain(&error)),
    }
    items
}

async fn links_and_tables() -> Result<Vec<Item>, LinkError> {
    let links = Links::open()?;
    let facts = links.facts().await?;
    let ours = facts.links.into_iter().filter(crate::links::LinkFact::is_ours);
    let mut items: Vec<_> = ours.map(|link| Item::Link(link.name)).collect();
    items.extend(links.rules().await?.into_iter().map(Item::Table));
    Ok(items)
}

fn names_in(folder: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
}

/// The folders of pins: of attachments, and of the maps of this version and of others.
fn pin_folders(bpffs: &Path) -> Vec<PathBuf> {
    let is_version = |name: &str| name.strip_prefix('v').is_some_and(|rest| rest.parse::<u32>().is_ok());
    let ours = names_in(bpffs).filter(|name| name == LINKS_FOLDER || is_version(name));
    ours.map(|name| bpffs.join(name)).collect()
}

fn pins_in(folder: &Path, items: &mut BTreeSet<Item>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => pins_in(&entry.path(), items),
            _ => drop(items.insert(Item::Pin(entry.path()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::links::Egress;
    use crate::sys::testing::{in_netns, run};

    #[test]
    fn attachments_and_pins_of_every_version_are_known_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for dir in ["v1/links", "v2", "links", "very", "v"] {
            fs::create_dir_all(path(dir)).unwrap();
        }
        let ours = [
            "links/from_task-8",
            "links/sock_connect4-0",
            "v1/links/from_task-7",
            "v1/shoal_ports",
            "v2/shoal_ports",
        ];
        for pin in ours.into_iter().chain(["very/own", "maps.debug"]) {
            fs::write(path(pin), "").unwrap();
        }
        let mut items = BTreeSet::new();
        for folder in pin_folders(folder.path()) {
            pins_in(&folder, &mut items);
        }
        assert_eq!(items, ours.iter().map(|pin| Item::Pin(path(pin))).collect());
        assert!(pin_folders(&path("missing")).is_empty());
    }

    #[test]
    fn what_an_agent_left_is_removed_and_told_once() {
        in_netns(|| async {
            let folder = tempfile::tempdir().unwrap();
            let (state, pins) = (folder.path().join("state"), folder.path().join("bpf"));
            fs::create_dir_all(state.join("manager")).unwrap();
            fs::write(state.join("table.json"), "{}").unwrap();
            fs::create_dir(state.join("attachments")).unwrap();
            fs::write(state.join("attachments/a1.json"), "{}").unwrap();
            let links = Links::open().unwrap();
            links.ensure_vxlan(4789).await.unwrap();
            links.ensure_host_pair(1450).await.unwrap();
            links.ensure_rules(4789, &Egress::default()).await.unwrap();
            run("ip link add sh0123456789a type veth peer name inside");

            let claim = NetnsClaim::take().unwrap();
            assert!(matches!(uninstall(&state, &pins).await, Err(ClaimError::InUse)));
            drop(claim);
            let done = uninstall(&state, &pins).await.unwrap();
            let link = |name: &str| Item::Link(name.to_owned());
            let table = |name: &str| Item::Table(name.to_owned());
            let expected = [
                link("sh0123456789a"),
                link("shoal-vxlan"),
                link("shoal0"),
                link("shoal0p"),
                table("ip shoal"),
                table("ip6 shoal"),
                Item::File(state.join("attachments/a1.json")),
                Item::File(state.join("table.json")),
            ];
            assert_eq!(done.removed, expected);
            assert_eq!((done.left, done.errors, done.node), (vec![], vec![], None));
            assert_eq!(run("ip -o link").lines().count(), 1);

            let again = uninstall(&state, &pins).await.unwrap();
            assert_eq!((again.removed, again.left, again.errors), (vec![], vec![], vec![]));
            assert!(state.join("manager").exists(), "that is the manager's own");
        });
    }
}
