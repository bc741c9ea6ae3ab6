//! What runs on the node without Shoal and is attached to a network: a process, or a network namespace by its path.
//!
//! It is looked for, told from a later one of the same number or path, and watched to its end; nothing is started or
//! stopped here. What is attached is in a file each, for the agent's next run.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_api::attachment::{AttachTarget, Attachment};
use mesh_api::id::TaskId;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::layout::EndpointFile;
use super::{RuntimeError, remove_dir, write_json};
use crate::files;
use crate::sys::netns::Netns;
use crate::sys::pidfd::{PidFd, WatchedPid};
use crate::sys::process;

/// How often a namespace without a process is looked for.
const POLL: Duration = Duration::from_secs(1);

/// Why something can't be attached, or not any longer. The text names the request's field.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// There is no such process.
    #[error("pid: there is no process {0} on this node")]
    NoProcess(u32),
    /// The path leads to nothing.
    #[error("netns: there is no file {}: `ip netns add` makes network namespaces, in /run/netns", .0.display())]
    NoFile(PathBuf),
    /// The path leads to something else.
    #[error("netns: {} is no network namespace: `ip netns add` makes some, in /run/netns", .0.display())]
    NoNetns(PathBuf),
    /// It is where the node itself is.
    #[error(
        "{field}: {target} is the node's own network namespace, or in it: attach what has one of its own, as containers and what \
         `ip netns exec` and `unshare --net` start"
    )]
    Own {
        /// The request's field.
        field: &'static str,
        /// What was to be attached.
        target: AttachTarget,
    },
    /// It can't be looked at.
    #[error("can't look into {target}")]
    Look {
        /// What was to be attached.
        target: AttachTarget,
        /// Why.
        source: io::Error,
    },
}

/// What tells it from a later one of the same number or path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Device of the namespace's file.
    dev: u64,
    /// Inode of the namespace's file.
    ino: u64,
    /// When the process started, clock ticks since boot.
    start_time: Option<u64>,
}

impl Identity {
    fn of(netns: &Path, start_time: Option<u64>) -> io::Result<Self> {
        let metadata = fs::metadata(netns)?;
        Ok(Self { dev: metadata.dev(), ino: metadata.ino(), start_time })
    }
}

/// What is attached, while it is there.
#[derive(Debug)]
pub struct Guest {
    target: AttachTarget,
    identity: Identity,
    process: Option<WatchedPid>,
}

impl Guest {
    /// Looks for what is to be attached. To be called inside a tokio runtime.
    pub fn find(target: &AttachTarget) -> Result<Self, GuestError> {
        let look = |source| GuestError::Look { target: target.clone(), source };
        let (process, identity, field) = match target {
            AttachTarget::Process(pid) => {
                let gone = |_| GuestError::NoProcess(*pid);
                let pidfd = PidFd::open(*pid).map_err(gone)?;
                let start_time = process::start_time(*pid).map_err(gone)?;
                // A process that has ended and was not waited for has no namespaces any more.
                let identity = Identity::of(&netns_of(target), Some(start_time)).map_err(|error| {
                    let is_denied = error.kind() == io::ErrorKind::PermissionDenied;
                    if is_denied { look(error) } else { gone(error) }
                })?;
                (Some(WatchedPid::new(pidfd).map_err(look)?), identity, "pid")
            }
            AttachTarget::Netns(path) => {
                let metadata = fs::metadata(path).map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                        GuestError::NoFile(path.clone())
                    }
                    _ => look(error),
                })?;
                // Anything else might keep whoever opens it waiting.
                if !metadata.is_file() {
                    return Err(GuestError::NoNetns(path.clone()));
                }
                (None, Identity::of(path, None).map_err(look)?, "netns")
            }
        };
        let own = Identity::of(Path::new("/proc/thread-self/ns/net"), identity.start_time).map_err(look)?;
        if own == identity {
            return Err(GuestError::Own { field, target: target.clone() });
        }
        let guest = Self { target: target.clone(), identity, process };
        match guest.netns()?.run(|| Ok(())) {
            Ok(()) => Ok(guest),
            Err(source) => Err(match target {
                AttachTarget::Netns(path) => GuestError::NoNetns(path.clone()),
                AttachTarget::Process(_) => look(source),
            }),
        }
    }

    /// What it is.
    pub fn target(&self) -> &AttachTarget {
        &self.target
    }

    /// Its number, if it is a process.
    pub fn pid(&self) -> Option<u32> {
        match self.target {
            AttachTarget::Process(pid) => Some(pid),
            AttachTarget::Netns(_) => None,
        }
    }

    /// What tells it from a later one.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Its network namespace, opened anew: held open, it would outlive what is attached.
    pub fn netns(&self) -> Result<Netns, GuestError> {
        let look = |source| GuestError::Look { target: self.target.clone(), source };
        let netns = Netns::open(&netns_of(&self.target)).map_err(look)?;
        if self.has_ended() {
            return Err(look(io::Error::from(io::ErrorKind::NotFound)));
        }
        Ok(netns)
    }

    /// Whether it is gone.
    pub fn has_ended(&self) -> bool {
        Identity::of(&netns_of(&self.target), self.identity.start_time).ok() != Some(self.identity)
    }

    /// Waits until it is gone. Cancel-safe.
    pub async fn ended(&self) {
        match &self.process {
            Some(process) => process.ended().await,
            None => {
                while !self.has_ended() {
                    tokio::time::sleep(POLL).await;
                }
            }
        }
    }
}

/// The file of its network namespace.
fn netns_of(target: &AttachTarget) -> PathBuf {
    match target {
        AttachTarget::Process(pid) => PathBuf::from(format!("/proc/{pid}/ns/net")),
        AttachTarget::Netns(path) => path.clone(),
    }
}

/// An attachment as the agent knows it across restarts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentFile {
    /// The attachment.
    pub attachment: Attachment,
    /// The boot of the machine that it is of.
    pub boot_id: String,
    /// What tells it from a later one.
    pub identity: Identity,
    /// Its endpoint.
    pub endpoint: EndpointFile,
}

/// The files of the attachments of this node.
#[derive(Debug, Clone)]
pub struct Guests {
    dir: PathBuf,
}

impl Guests {
    /// Those in the folder `dir`.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn path(&self, id: &TaskId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    /// Remembers an attachment.
    pub fn save(&self, file: &AttachmentFile) -> Result<(), RuntimeError> {
        let wrap = |source| RuntimeError::File { operation: "create", path: self.dir.clone(), source };
        fs::create_dir_all(&self.dir).map_err(wrap)?;
        write_json(&self.path(&file.attachment.id), file)
    }

    /// Forgets an attachment; one that is not known is no error.
    pub fn remove(&self, id: &TaskId) -> Result<(), RuntimeError> {
        let path = self.path(id);
        files::remove(&path).map_err(|source| RuntimeError::File { operation: "remove", path, source })
    }

    /// Forgets all of them.
    pub fn clear(&self) -> Result<(), RuntimeError> {
        remove_dir(&self.dir)
    }

    /// What is attached, in the order of the ids. What can't be read is no attachment.
    pub fn list(&self) -> Result<Vec<AttachmentFile>, RuntimeError> {
        let wrap = |source| RuntimeError::File { operation: "list", path: self.dir.clone(), source };
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(wrap)?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(wrap)?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match files::read_json::<AttachmentFile>(&path) {
                Ok(file) => found.extend(file),
                Err(error) => warn!(file = %path.display(), %error, "an attachment's file can't be read"),
            }
        }
        found.sort_by(|a, b| a.attachment.id.cmp(&b.attachment.id));
        Ok(found)
    }
}

impl AttachmentFile {
    /// What was attached in an earlier run of the agent, if it is still there. To be called inside a tokio runtime.
    pub fn find(&self) -> Option<Guest> {
        let boot_id = process::boot_id().ok();
        let guest = Guest::find(&self.attachment.target).ok();
        guest.filter(|guest| boot_id.as_ref() == Some(&self.boot_id) && guest.identity == self.identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{in_netns, run, until};

    fn refusal(target: &AttachTarget) -> String {
        Guest::find(target).unwrap_err().to_string()
    }

    #[test]
    fn what_can_not_be_attached_says_which_field_and_why() {
        in_netns(|| async {
            let folder = tempfile::tempdir().unwrap();
            let (file, fifo) = (folder.path().join("file"), folder.path().join("fifo"));
            fs::write(&file, "").unwrap();
            nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
            let own = std::process::id();
            for (target, parts) in [
                (AttachTarget::Process(u32::MAX), ["pid:", "no process 4294967295"]),
                (AttachTarget::Netns(folder.path().join("missing")), ["netns:", "no file"]),
                (AttachTarget::Netns(file), ["netns:", "no network namespace"]),
                (AttachTarget::Netns(fifo), ["netns:", "no network namespace"]),
                (AttachTarget::Netns(folder.path().to_owned()), ["netns:", "no network namespace"]),
                (
                    AttachTarget::Netns(format!("/proc/{own}/ns/uts").into()),
                    ["netns:", "no network namespace"],
                ),
                (AttachTarget::Netns("/proc/thread-self/ns/net".into()), ["netns:", "the node's own"]),
            ] {
                let text = refusal(&target);
                assert!(parts.iter().all(|part| text.contains(part)), "{text}");
            }
            let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
            let text = refusal(&AttachTarget::Process(child.id()));
            assert!(text.contains("pid:") && text.contains("the node's own"), "{text}");
            child.kill().unwrap();
            let ended = || refusal(&AttachTarget::Process(child.id())).contains("no process");
            until("a process that was not waited for has ended", ended).await;
            child.wait().unwrap();
        });
    }

    #[test]
    fn processes_and_namespaces_are_watched_to_their_ends() {
        in_netns(|| async {
            let mut child =
                std::process::Command::new("unshare").args(["--net", "sleep", "60"]).spawn().unwrap();
            let target = AttachTarget::Process(child.id());
            until("it has its namespace", || Guest::find(&target).is_ok()).await;
            let guest = Guest::find(&target).unwrap();
            assert!(!guest.has_ended());
            let name = format!("att-guest-{}", std::process::id());
            run(&format!("ip netns add {name}"));
            let other = Guest::find(&AttachTarget::Netns(format!("/run/netns/{name}").into())).unwrap();
            assert_ne!(guest.identity(), other.identity());
            child.kill().unwrap();
            guest.ended().await;
            child.wait().unwrap();
            assert!(guest.has_ended() && guest.netns().is_err() && !other.has_ended());
            run(&format!("ip netns delete {name}"));
            other.ended().await;
        });
    }
}
