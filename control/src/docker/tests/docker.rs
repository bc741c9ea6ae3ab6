//! The real `docker` command line, run against the API on a socket.

use std::io::Write as _;
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mesh_api::table::Role;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::task::JoinHandle;

use super::host::FakeHost;
use crate::docker::local::LocalNode;
use crate::docker::{bind, router, serve};

/// A host's API on a socket, and `docker` pointed at it.
pub(super) struct Docker {
    pub(super) host: Arc<FakeHost>,
    pub(super) dir: tempfile::TempDir,
    server: JoinHandle<()>,
}

impl Drop for Docker {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Docker {
    /// `None`, with a word on why, where there is no `docker` to drive.
    pub(super) async fn of(host: FakeHost) -> Option<Self> {
        if std::process::Command::new("docker").arg("--version").output().is_err() {
            // Not by a print macro, whose output libtest keeps to itself: `cargo xtask test` counts this line.
            let _ = std::io::stdout().write_all(b"\nSKIP: there is no `docker` command on this machine\n");
            return None;
        }
        let host = Arc::new(host);
        let dir = tempfile::tempdir().unwrap();
        let listener = bind(&dir.path().join("docker.sock")).await.unwrap();
        let api = router(Arc::clone(&host) as Arc<dyn LocalNode>);
        let server = tokio::spawn(serve(listener, api, std::future::pending()));
        Some(Self { host, dir, server })
    }

    /// A manager, `n1`, with a worker, `n2`.
    pub(super) async fn swarm() -> Option<Self> {
        let docker = Self::of(FakeHost::that_runs_tasks()).await?;
        docker.ok("swarm init").await;
        docker.host.add_node("n2", Role::Worker).await;
        Some(docker)
    }

    /// Runs `docker` with `line`, split at spaces (`·` stands for a space within an argument).
    pub(super) async fn run(&self, line: &str) -> Output {
        self.answer(line, "").await
    }

    /// Runs `docker` with `line`, and answers what it asks with `input`.
    pub(super) async fn answer(&self, line: &str, input: &str) -> Output {
        let mut docker = Command::new("docker")
            .args(line.split(' ').filter(|part| !part.is_empty()).map(|part| part.replace('·', " ")))
            .env_clear()
            .env("PATH", std::env::var("PATH").unwrap_or_default())
            .env("HOME", self.dir.path())
            .env("DOCKER_HOST", format!("unix://{}", self.dir.path().join("docker.sock").display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        // One that asks nothing may have ended by now.
        let _ = docker.stdin.take().unwrap().write_all(input.as_bytes()).await;
        let output = docker.wait_with_output();
        let output =
            tokio::time::timeout(Duration::from_mins(1), output).await.expect("docker hangs").unwrap();
        if std::env::var_os("SHOW_DOCKER").is_some() {
            eprintln!("$ docker {line}\n{}{}", text(&output.stdout), text(&output.stderr));
        }
        output
    }

    /// Expects success without a word on standard error, and answers standard output.
    pub(super) async fn ok(&self, line: &str) -> String {
        let output = self.run(line).await;
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "docker {line}: {out}{err}");
        assert_eq!(err, "", "docker {line}");
        out
    }

    /// Expects success and all of `parts` in the output.
    pub(super) async fn shows(&self, line: &str, parts: &[&str]) -> String {
        let out = self.ok(line).await;
        for part in parts {
            assert!(out.contains(part), "docker {line} does not show {part:?}:\n{out}");
        }
        out
    }

    /// Expects failure and all of `parts` on standard error.
    pub(super) async fn fails(&self, line: &str, parts: &[&str]) {
        let output = self.run(line).await;
        let err = text(&output.stderr);
        assert!(!output.status.success(), "docker {line} succeeds");
        for part in parts {
            assert!(err.contains(part), "docker {line} does not say {part:?}:\n{err}");
        }
    }

    /// Runs `line` until it shows `part`.
    pub(super) async fn comes_to_show(&self, line: &str, part: &str) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            let out = self.ok(line).await;
            if out.contains(part) {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "docker {line} never shows {part:?}:\n{out}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// What a command wrote.
pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
