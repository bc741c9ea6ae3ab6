//! The file is made whole or not at all, a stopped manager's folder is read, and people are told what to do.

use std::os::unix::fs::PermissionsExt as _;

use control::cluster::{Cluster, InitRequest};
use control::model::ClusterSpec;

use super::*;

fn entries(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_file_is_roots_alone_and_takes_no_others_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("swarm.shoal");
    Target::of(&path, false).unwrap().write(b"one").unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let refused = Target::of(&path, false).err().unwrap().to_string();
    assert!(refused.contains("swarm.shoal exists") && refused.contains("--force"), "{refused}");
    // It came about while the agent was asked.
    let late = Target::File { path: path.clone(), force: false };
    let refused = late.write(b"two").unwrap_err().to_string();
    assert!(refused.contains("exists"), "{refused}");
    assert_eq!(std::fs::read(&path).unwrap(), b"one");
    Target::of(&path, true).unwrap().write(b"three").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"three");
    let nowhere = Target::of(&dir.path().join("no/swarm.shoal"), false).unwrap();
    assert!(nowhere.write(b"four").unwrap_err().to_string().contains("can't write"));
    assert_eq!(entries(dir.path()), ["swarm.shoal"], "nothing else is left");
}

async fn left_by_a_manager(state_dir: &Path, autolock: bool) -> Cluster {
    let spec = ClusterSpec { autolock, ..ClusterSpec::default() };
    let request = InitRequest { spec, ..InitRequest::default() };
    let cluster = Cluster::create(&state_dir.join(manager::DIR), request).await.unwrap();
    cluster.shutdown().await;
    cluster
}

#[tokio::test]
async fn a_stopped_managers_folder_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let absent = read_disk(dir.path(), None).unwrap_err().to_string();
    assert!(absent.contains("holds no manager's state") && absent.contains("--state-dir"), "{absent}");
    let cluster = left_by_a_manager(dir.path(), false).await;
    let (file, undecided) = read_disk(dir.path(), None).unwrap();
    assert_eq!(undecided, 0);
    assert_eq!(Backup::read(&file).unwrap().state, cluster.state());

    let running = preflight::take_state(dir.path()).unwrap();
    let refused = format!("{:#}", read_disk(dir.path(), None).unwrap_err());
    assert!(refused.contains("without --offline") && refused.contains("running agent"), "{refused}");
    drop(running);
}

#[tokio::test]
async fn a_locked_managers_folder_is_read_with_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = left_by_a_manager(dir.path(), true).await;
    let key = cluster.state().cluster.unwrap().lock.key.clone().unwrap();
    let locked = format!("{:#}", read_disk(dir.path(), None).unwrap_err());
    assert!(locked.contains("--unlock-key-file"), "{locked}");
    let file = dir.path().join("key");
    for (text, part) in [("hello", "SWMKEY-1-"), (&UnlockKey::random().to_string(), "invalid key")] {
        std::fs::write(&file, text).unwrap();
        let refused = format!("{:#}", read_disk(dir.path(), Some(&file)).unwrap_err());
        assert!(refused.contains(part), "{refused}");
    }
    std::fs::write(&file, format!("{key}\n")).unwrap();
    let (bytes, _) = read_disk(dir.path(), Some(&file)).unwrap();
    assert_eq!(Backup::read(&bytes).unwrap().state, cluster.state());
}

#[tokio::test]
async fn people_are_told_what_was_done_and_what_is_to_be_done() {
    let dir = tempfile::tempdir().unwrap();
    left_by_a_manager(dir.path(), false).await;
    let (file, _) = read_disk(dir.path(), None).unwrap();
    let header = Backup::read(&file).unwrap().header;
    let answer = |more: &str| -> RestoredSwarm {
        let known = r#"{"ID":"c","NodeID":"n","Index":9000,"Advertise":"192.0.2.1:2377""#;
        serde_json::from_str(&format!("{known},{more}}}")).unwrap()
    };
    let plain = answer(r#""Demoted":[],"Replaced":[],"KnownManagers":["192.0.2.1:2377"]"#);
    let text = told(&header, &plain);
    assert!(text.contains("Swarm c is back") && text.contains("9000 from here on"), "{text}");
    assert!(!text.contains("Removed") && !text.contains("docker node promote"), "{text}");
    assert!(!text.contains("don't know") && text.contains("join-token --rotate"), "{text}");
    let all = answer(
        r#""Demoted":["m2","m3"],"Replaced":["m1"],"KnownManagers":["192.0.2.2:2377","192.0.2.3:2377"]"#,
    );
    let text = told(&header, &all);
    for part in [
        "Removed, since this host has their address: m1.",
        "workers from here on: m2, m3. Promote them again",
        "The other nodes don't know 192.0.2.1:2377: they look for managers at 192.0.2.2:2377, 192.0.2.3:2377.",
    ] {
        assert!(text.contains(part), "{text} lacks {part}");
    }
}
