//! `shoal backup` and `shoal restore`: the swarm's state as a file, and back.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail, ensure};
use control::backup::{Backup, FILE_BYTES_MAX, Header};
use control::docker::RestoredSwarm;
use control::raft::Storage;
use control::raft::offline::OnDisk;
use control::store::StoreError;
use hyper::Method;
use hyper::body::Bytes;
use mesh_api::seal::UnlockKey;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::args::{BackupArgs, RestoreArgs};
use crate::{api, manager, preflight, print};

/// How long the agent may take to restore: its dataplane is verified and brought up in it.
const RESTORE_LIMIT: Duration = Duration::from_mins(2);

/// Said with every backup.
const SECRETS: &str = "It holds the swarm's keys: who has it can be any node, read and change everything. Keep it as you keep a root \
     password, and off these hosts.";

/// Takes a backup.
pub(crate) fn backup(args: &BackupArgs) -> Result<()> {
    let BackupArgs { file, force, offline, socket, state, unlock_key_file } = args;
    let target = Target::of(file, *force)?;
    let (bytes, undecided) = if *offline {
        read_disk(&state.state_dir, unlock_key_file.as_deref())?
    } else {
        (api::send(&socket.run_dir, Method::GET, "/shoal/v1/backup", "")?, 0)
    };
    let Backup { header, state } = Backup::read(&bytes).context("the backup that was made can't be read")?;
    let (services, nodes) = (state.services.len(), state.nodes.len());
    target.write(&bytes)?;
    let Header { cluster, index, .. } = header;
    // Where the backup itself is on standard output, this is for people.
    eprintln!(
        "Swarm {cluster} at index {index}: {services} services, {nodes} nodes, {} bytes in {}.",
        bytes.len(),
        target.name()
    );
    if undecided > 0 {
        eprintln!(
            "The last {undecided} entries of the log were not known to be decided by a majority; they are in the backup."
        );
    }
    eprintln!("{SECRETS}");
    Ok(())
}

/// The backup of what the manager in the state folder left, and how many entries of it may not have been decided.
fn read_disk(state_dir: &Path, unlock_key_file: Option<&Path>) -> Result<(Bytes, u64)> {
    let dir = state_dir.join(manager::DIR);
    ensure!(
        control::cluster::Cluster::exists(&dir),
        "{} holds no manager's state: name the --state-dir of a manager's agent, or a copy of it",
        dir.display()
    );
    let _lock = preflight::take_state(state_dir)
        .context("a running manager's state is read without --offline, or once its agent is stopped")?;
    let unlock = unlock_key_file.map(read_key).transpose()?;
    let storage = Storage::unlock(&dir, unlock.as_ref()).map_err(|error| match error {
        StoreError::Locked => {
            anyhow!("autolock is on: give the unlock key with --unlock-key-file FILE (or -)")
        }
        error => error.into(),
    })?;
    let OnDisk { state, undecided } = storage.read()?;
    let file = Backup::write(&state, SystemTime::now())?;
    Ok((file.into(), undecided))
}

/// The unlock key in a file, or on standard input.
fn read_key(file: &Path) -> Result<UnlockKey> {
    let text = if is_standard(file) {
        let mut line = String::new();
        io::stdin().read_line(&mut line).context("can't read the unlock key from standard input")?;
        line
    } else {
        std::fs::read_to_string(file).with_context(|| format!("can't read {}", file.display()))?
    };
    text.trim()
        .parse()
        .context("--unlock-key-file: expected what `docker swarm unlock-key` shows, SWMKEY-1-…")
}

/// Restores a backup.
pub(crate) fn restore(args: &RestoreArgs) -> Result<()> {
    let RestoreArgs { file, advertise_addr, listen_addr, data_path_addr, force, socket } = args;
    let bytes = read(file)?;
    // Before the agent is troubled, which says the same.
    let Backup { header, .. } =
        Backup::read(&bytes).with_context(|| format!("{} can't be restored", file.display()))?;
    let addresses =
        [("advertiseAddr", advertise_addr), ("listenAddr", listen_addr), ("dataPathAddr", data_path_addr)];
    let given = addresses
        .into_iter()
        .filter_map(|(name, value)| value.as_ref().map(|value| format!("&{name}={}", api::escaped(value))));
    let path = format!("/shoal/v1/restore?force={force}{}", given.collect::<String>());
    let answer = api::post_bytes(&socket.run_dir, &path, bytes.into(), RESTORE_LIMIT)?;
    let restored = serde_json::from_slice(&answer).context("the agent's answer does not decode")?;
    print::line(&told(&header, &restored))?;
    Ok(())
}

/// What was done, and what is to be done.
fn told(header: &Header, restored: &RestoredSwarm) -> String {
    let RestoredSwarm { cluster, node, index, advertise, demoted, replaced, known } = restored;
    let mut lines = vec![format!(
        "Swarm {cluster} is back as it was at {} (index {} of then, {index} from here on). This host is its node {node}, and its \
         only manager.",
        header.time, header.index
    )];
    if !replaced.is_empty() {
        lines.push(format!("Removed, since this host has their address: {}.", replaced.join(", ")));
    }
    if !demoted.is_empty() {
        lines.push(format!(
            "Managers then, workers from here on: {}. Promote them again once they are back (`docker node promote`).",
            demoted.join(", ")
        ));
    }
    if !known.contains(advertise) {
        let known: Vec<String> = known.iter().map(ToString::to_string).collect();
        let known = if known.is_empty() { "nowhere" } else { &known.join(", ") };
        lines.push(format!(
            "The other nodes don't know {advertise}: they look for managers at {known}. Give this host one of these addresses, or \
             have them leave the swarm and join it again."
        ));
    }
    lines.push(
        "The join tokens are those of the backup: `docker swarm join-token --rotate` makes others."
            .to_owned(),
    );
    lines.join("\n")
}

fn is_standard(file: &Path) -> bool {
    file == Path::new("-")
}

/// A whole file, or standard input, as long as a backup may be.
fn read(file: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let most = FILE_BYTES_MAX as u64 + 1;
    let read = if is_standard(file) {
        io::stdin().lock().take(most).read_to_end(&mut bytes)
    } else {
        File::open(file).and_then(|file| file.take(most).read_to_end(&mut bytes))
    };
    read.with_context(|| format!("can't read {}", file.display()))?;
    Ok(bytes)
}

/// Where a backup goes.
enum Target {
    Standard,
    File { path: PathBuf, force: bool },
}

impl Target {
    /// Refuses what can't be before anything is asked for.
    fn of(path: &Path, force: bool) -> Result<Self> {
        if is_standard(path) {
            ensure!(!io::stdout().is_terminal(), "standard output is a terminal: name a file, or pipe it on");
            return Ok(Self::Standard);
        }
        ensure!(force || std::fs::symlink_metadata(path).is_err(), exists(path));
        Ok(Self::File { path: path.to_owned(), force })
    }

    fn name(&self) -> String {
        match self {
            Self::Standard => "all".to_owned(),
            Self::File { path, .. } => path.display().to_string(),
        }
    }

    /// Writes all of it or nothing; it outlives a loss of power when this returns.
    fn write(&self, bytes: &[u8]) -> Result<()> {
        let Self::File { path, force } = self else {
            let mut out = io::stdout().lock();
            return out.write_all(bytes).and_then(|()| out.flush()).context("can't write to standard output");
        };
        let Some(name) = path.file_name() else { bail!("{} names no file", path.display()) };
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut unfinished = std::ffi::OsString::from(".");
        unfinished.push(name);
        unfinished.push(format!(".{}", std::process::id()));
        let unfinished = dir.join(unfinished);
        let written = write_synced(&unfinished, bytes).and_then(|()| put(&unfinished, path, *force));
        if written.is_err() {
            let _ = std::fs::remove_file(&unfinished);
        }
        match written.and_then(|()| File::open(dir)?.sync_all()) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => bail!(exists(path)),
            written => written.with_context(|| format!("can't write {}", path.display())),
        }
    }
}

fn exists(path: &Path) -> String {
    format!("{} exists: name another file, or replace it with --force", path.display())
}

/// For root alone.
fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // One that a command with this process' number left.
    let _ = std::fs::remove_file(path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Gives a file its name; takes no other's place unless that is wanted.
fn put(unfinished: &Path, path: &Path, force: bool) -> io::Result<()> {
    if !force {
        match renameat2(AT_FDCWD, unfinished, AT_FDCWD, path, RenameFlags::RENAME_NOREPLACE) {
            // Some file systems can't tell.
            Err(Errno::EINVAL) if !path.exists() => {}
            renamed => return Ok(renamed?),
        }
    }
    std::fs::rename(unfinished, path)
}

#[cfg(test)]
mod tests;
