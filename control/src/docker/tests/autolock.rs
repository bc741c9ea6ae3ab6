//! Autolock, as users of the API and of the `docker` command line see it.

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::docker::{Docker, text};
use super::host::{Client, FakeHost};

const LOCKED: &str = "Swarm is encrypted and needs to be unlocked before it can be used. Please use \"docker swarm unlock\" to unlock it.";
const OTHER_KEY: &str = "SWMKEY-1-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

impl Client {
    async fn unlock_key(&self) -> String {
        let (status, answer) = self.get("/swarm/unlockkey").await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer["UnlockKey"].as_str().unwrap().to_owned()
    }

    async fn update(&self, query: &str, autolock: bool) {
        let (_, swarm) = self.get("/swarm").await;
        let (version, mut spec) = (swarm["Version"]["Index"].clone(), swarm["Spec"].clone());
        spec["EncryptionConfig"] = json!({ "AutoLockManagers": autolock });
        let path = format!("/swarm/update?version={version}{query}");
        assert_eq!(self.post(&path, &spec.to_string()).await, (StatusCode::OK, Value::Null));
        let (_, swarm) = self.get("/swarm").await;
        assert_eq!(swarm["Spec"]["EncryptionConfig"]["AutoLockManagers"], autolock);
    }

    async fn unlock(&self, key: &str) -> (StatusCode, String) {
        let body = json!({ "UnlockKey": key }).to_string();
        let (status, answer) = self.post("/swarm/unlock", &body).await;
        (status, answer["message"].as_str().unwrap_or_default().to_owned())
    }
}

#[tokio::test]
async fn there_is_a_key_with_autolock_alone_and_it_rotates() {
    let client = Client::manager().await;
    assert_eq!(client.unlock_key().await, "");
    client.update("&rotateManagerUnlockKey=true", false).await;
    assert_eq!(client.unlock_key().await, "", "a rotation of nothing");
    client.update("", true).await;
    let first = client.unlock_key().await;
    assert!(first.starts_with("SWMKEY-1-") && first.len() == 9 + 43, "{first}");
    client.update("", true).await;
    assert_eq!(client.unlock_key().await, first);
    client.update("&rotateManagerUnlockKey=true", true).await;
    let second = client.unlock_key().await;
    assert_ne!(first, second);
    client.update("", false).await;
    assert_eq!(client.unlock_key().await, "");
    client.update("", true).await;
    assert_ne!(client.unlock_key().await, second);
}

#[tokio::test]
async fn a_locked_manager_says_so_until_its_key_comes() {
    for init in [
        r#"{"ListenAddr":"0.0.0.0:2377","AutoLockManagers":true}"#,
        r#"{"ListenAddr":"0.0.0.0:2377","Spec":{"EncryptionConfig":{"AutoLockManagers":true}}}"#,
    ] {
        let client = Client::of(FakeHost::new());
        assert_eq!(client.post("/swarm/init", init).await.0, StatusCode::OK);
        let key = client.unlock_key().await;
        assert_eq!(client.unlock(&key).await, (StatusCode::CONFLICT, "swarm is not locked".to_owned()));
        assert!(client.host.restart().await, "it is locked from its first file on");

        let (_, info) = client.get("/info").await;
        let swarm = &info["Swarm"];
        assert_eq!(swarm["LocalNodeState"], "locked");
        assert_eq!(swarm["Error"], LOCKED);
        assert_eq!((&swarm["NodeAddr"], &swarm["ControlAvailable"]), (&json!("192.0.2.7"), &json!(false)));
        for path in ["/swarm", "/nodes", "/services", "/tasks", "/swarm/unlockkey"] {
            let (status, answer) = client.get(path).await;
            assert_eq!(
                (status, &answer["message"]),
                (StatusCode::SERVICE_UNAVAILABLE, &json!(LOCKED)),
                "{path}"
            );
        }
        let unavailable = |part: &str| (StatusCode::SERVICE_UNAVAILABLE, part.to_owned());
        let (status, answer) = client.post("/swarm/leave", "").await;
        assert_eq!(
            (status, answer["message"].as_str().unwrap().to_owned()),
            unavailable(
                "Swarm is encrypted and locked. Please unlock it first or use `--force` to ignore this message."
            )
        );
        let (status, answer) = client.post("/swarm/init", "{}").await;
        assert!(
            status == StatusCode::SERVICE_UNAVAILABLE
                && answer["message"].to_string().contains("already part")
        );

        let invalid = |text: &str| (StatusCode::BAD_REQUEST, text.to_owned());
        assert_eq!(client.unlock("").await, invalid("invalid key string"));
        assert_eq!(client.unlock(&key[..51]).await, invalid("invalid key string"));
        let wrong =
            (StatusCode::UNAUTHORIZED, "swarm could not be unlocked: invalid key provided".to_owned());
        assert_eq!(client.unlock(OTHER_KEY).await, wrong);
        assert_eq!(client.unlock(&format!("{key}\n")).await, (StatusCode::OK, String::new()));
        assert_eq!(client.unlock_key().await, key);
        assert_eq!(client.get("/info").await.1["Swarm"]["LocalNodeState"], "active");
    }
}

#[tokio::test]
async fn a_host_outside_a_swarm_and_a_worker_have_nothing_to_unlock() {
    for (host, part) in [(FakeHost::new(), "docker swarm init"), (FakeHost::worker(), "Worker nodes")] {
        let client = Client::of(host);
        let (status, message) = client.unlock(OTHER_KEY).await;
        assert!(status == StatusCode::SERVICE_UNAVAILABLE && message.contains(part), "{message}");
        assert_eq!(client.get("/swarm/unlockkey").await.0, StatusCode::SERVICE_UNAVAILABLE);
    }
}

#[tokio::test]
async fn docker_locks_and_unlocks() {
    let Some(docker) = Docker::of(FakeHost::new()).await else { return };
    let out = docker.shows("swarm init --autolock", &["docker swarm unlock", "SWMKEY-1-"]).await;
    let key = docker.ok("swarm unlock-key -q").await;
    let key = key.trim();
    assert!(out.contains(key), "{out}");
    docker.shows("info", &["Autolock Managers: true"]).await;
    assert!(docker.host.restart().await);
    docker.shows("info", &["Swarm: locked"]).await;
    docker.fails("node ls", &[LOCKED]).await;
    docker.fails("swarm leave", &["use `--force`"]).await;
    let wrong = docker.answer("swarm unlock", OTHER_KEY).await;
    assert!(text(&wrong.stderr).contains("invalid key provided"), "{}", text(&wrong.stderr));
    assert!(docker.answer("swarm unlock", key).await.status.success());
    docker.shows("node ls", &["n1", "Leader"]).await;
    docker.fails("swarm unlock", &["swarm is not locked"]).await;

    let rotated =
        docker.shows("swarm unlock-key --rotate", &["Successfully rotated manager unlock key."]).await;
    let next = docker.ok("swarm unlock-key -q").await;
    assert!(rotated.contains(next.trim()) && next.trim() != key);
    docker.host.is_locked_by(next.trim()).await;
    assert!(docker.host.restart().await);
    assert!(!docker.answer("swarm unlock", key).await.status.success());
    assert!(docker.answer("swarm unlock", &next).await.status.success());

    docker.shows("swarm update --autolock=false", &["Swarm updated."]).await;
    docker.fails("swarm unlock-key", &["no unlock key is set"]).await;
    docker.fails("swarm unlock-key --rotate", &["autolock is not turned on"]).await;
    docker.host.is_unlocked().await;
    assert!(!docker.host.restart().await);
    docker.shows("swarm update --autolock", &["Swarm updated.", "SWMKEY-1-"]).await;
    let key = docker.ok("swarm unlock-key -q").await;
    docker.host.is_locked_by(key.trim()).await;
    assert!(docker.host.restart().await);
    docker.shows("swarm leave --force", &["Node left the swarm."]).await;
    docker.shows("info", &["Swarm: inactive"]).await;
    docker.shows("swarm init", &["Swarm initialized"]).await;
}
