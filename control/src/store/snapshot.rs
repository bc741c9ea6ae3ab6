//! The state in a file: `snapshot-<index>.json`, its first line the SHA-256 of what follows.
//!
//! A snapshot becomes visible by a rename once it is on disk, so a crash leaves the one before it.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::sled::sync_dir;
use super::upgrade;
use super::{FORMAT, StoreError};
use crate::model::{Lookup, State};

const PREFIX: &str = "snapshot-";
const SUFFIX: &str = ".json";
#[derive(Serialize)]
struct Body<'a> {
    format: u32,
    state: &'a State,
}

#[derive(Deserialize)]
struct Format {
    format: u32,
}

#[derive(Deserialize)]
struct OwnedBody {
    state: State,
}

/// The latest snapshot in `dir`.
pub(super) fn latest(dir: &Path) -> io::Result<Option<PathBuf>> {
    Ok(list(dir)?.into_iter().max_by_key(|(index, _)| *index).map(|(_, path)| path))
}

fn list(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let index =
            name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok());
        if let Some(index) = index {
            found.push((index, entry.path()));
        }
    }
    Ok(found)
}

/// Reads the latest snapshot in `dir`; `None` if there is none.
pub(super) fn load(dir: &Path) -> Result<Option<State>, StoreError> {
    let Some(path) = latest(dir).map_err(StoreError::io("looking for snapshots"))? else { return Ok(None) };
    let bytes = std::fs::read(&path).map_err(StoreError::io("reading a snapshot"))?;
    let damaged = |problem: String| StoreError::Damaged { path: path.clone(), problem };
    let end =
        bytes.iter().position(|byte| *byte == b'\n').ok_or_else(|| damaged("it has no first line".into()))?;
    let (digest, body) = (&bytes[..end], &bytes[end + 1..]);
    if digest != hex(&Sha256::digest(body)).as_bytes() {
        return Err(damaged("its checksum is wrong".into()));
    }
    // Before the rest, which another format may have in another shape.
    let Format { format } = serde_json::from_slice(body).map_err(|error| damaged(error.to_string()))?;
    if !(1..=FORMAT).contains(&format) {
        return Err(StoreError::Format { path, format });
    }
    let OwnedBody { mut state } = serde_json::from_slice(body).map_err(|error| damaged(error.to_string()))?;
    if format == 1 {
        upgrade::state(&mut state).map_err(|refusal| damaged(refusal.to_string()))?;
    }
    state.lookup = Lookup::of(&state);
    Ok(Some(state))
}

/// Writes a snapshot durably, then removes older ones.
pub(super) fn save(dir: &Path, state: &State) -> Result<(), StoreError> {
    let body = serde_json::to_vec(&Body { format: FORMAT, state })
        .map_err(|error| StoreError::Io { what: "encoding a snapshot", source: error.into() })?;
    let path = dir.join(format!("{PREFIX}{:020}{SUFFIX}", state.index));
    write(dir, &path, &body).map_err(StoreError::io("writing a snapshot"))?;
    for (index, old) in list(dir).map_err(StoreError::io("looking for snapshots"))? {
        if index < state.index {
            std::fs::remove_file(old).map_err(StoreError::io("removing an old snapshot"))?;
        }
    }
    Ok(())
}

fn write(dir: &Path, path: &Path, body: &[u8]) -> io::Result<()> {
    let unfinished = dir.join("snapshot.tmp");
    // The state holds the join tokens' secrets.
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    file.write_all(hex(&Sha256::digest(body)).as_bytes())?;
    file.write_all(b"\n")?;
    file.write_all(body)?;
    file.sync_all()?;
    std::fs::rename(&unfinished, path)?;
    sync_dir(dir)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
