//! What earlier versions wrote, as files that are part of the source: every later version must restore them.
//!
//! `SHOAL_WRITE_FIXTURE=1` writes the present format's anew, which only a new format is a reason for.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{host, id, world};
use crate::backup::revive::revive;
use crate::backup::{Backup, FORMAT, encode};
use crate::testing::World;

fn path(format: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/backup/fixtures/format-{format}.shoal"))
}

fn is_written_anew() -> bool {
    std::env::var_os("SHOAL_WRITE_FIXTURE").is_some()
}

#[test]
fn what_any_version_wrote_is_restored() {
    if is_written_anew() {
        let file = encode(&world().state, "0.1.0".to_owned(), "2026-11-23T03:00:00Z".to_owned()).unwrap();
        std::fs::write(path(FORMAT), file).unwrap();
        return;
    }
    for format in 1..=FORMAT {
        let file = std::fs::read(path(format)).unwrap();
        let Backup { header, state } = Backup::read(&file).unwrap();
        assert_eq!(header.format, format);
        let revived = revive(state, None, &host("n9"), SystemTime::now(), &mut rand::rng()).unwrap();
        let mut world = World::new(&[]);
        world.state = revived.state;
        world.check_invariants();
        let state = &world.state;
        let nodes: Vec<_> = state.nodes.values().map(|node| node.description.hostname.as_str()).collect();
        assert!(["n1", "n2", "n3", "n4", "n9"].iter().all(|name| nodes.contains(name)), "{nodes:?}");
        assert_eq!(state.service_by_name("web").unwrap().spec.task.container.env, ["A=1"]);
        assert_eq!(state.service_by_name("web").unwrap().endpoint.ports[0].published, 8080);
        assert_eq!(state.attachments().count(), 1);
        assert!(state.network_by_name("vault").unwrap().is_encrypted());
        assert_eq!(state.network_by_name("app").unwrap().subnets.len(), 2);
        let cluster = state.cluster.as_ref().unwrap();
        assert!(cluster.removed.contains_key(&id("n5")) && cluster.ca.rotation.is_some());
    }
}

/// Were it otherwise, a later version would read what this one writes as something else, or not all of it.
#[test]
fn what_a_state_is_as_json_changes_with_the_format_alone() {
    if is_written_anew() {
        return;
    }
    let written = std::fs::read(path(FORMAT)).unwrap();
    let Backup { header, state } = Backup::read(&written).unwrap();
    let again = encode(&state, header.version, header.time).unwrap();
    assert!(
        again == written,
        "a state is other JSON than in format {FORMAT}: count `backup::FORMAT` up, have `Reader::finish` make the present state \
         of format {FORMAT}'s, and write the next fixture (SHOAL_WRITE_FIXTURE=1); before the first release, write this \
         format's anew instead"
    );
}
