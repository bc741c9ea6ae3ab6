//! Snapshots in files, `snapshot-<index>`, sealed under their index.
//!
//! A snapshot becomes visible by a rename once it is on disk, so a crash leaves the one before it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::StoreError;
use super::folder::write_secret;
use super::keys::Keys;

const PREFIX: &str = "snapshot-";
const UNFINISHED: &str = "snapshot.unfinished";

/// Where snapshots are kept.
pub trait Snapshots: std::fmt::Debug + Send + Sync + 'static {
    /// The latest snapshot.
    fn load(&self) -> Result<Option<Vec<u8>>, StoreError>;
    /// Keeps a snapshot of the state at `index` durably, then drops older ones.
    fn save(&self, index: u64, body: &[u8]) -> Result<(), StoreError>;
    /// Has the present data key seal what an earlier one sealed; nothing to do where nothing is sealed.
    fn seal_anew(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Snapshots in a folder.
#[derive(Debug)]
pub struct Files {
    dir: PathBuf,
    keys: Arc<Keys>,
    /// Held while one is read or written: they share an unfinished file, the older ones go, and what is sealed anew must not
    /// take a newer one's place.
    turn: Mutex<()>,
}

impl Files {
    /// Those in `dir`, which exists.
    pub fn new(dir: &Path, keys: Arc<Keys>) -> Self {
        Self { dir: dir.to_owned(), keys, turn: Mutex::new(()) }
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The latest snapshot, its index, and whether the present data key sealed it.
    fn read(&self) -> Result<Option<(u64, Vec<u8>, bool)>, StoreError> {
        let found = list(&self.dir).map_err(StoreError::io("looking for snapshots"))?;
        let Some((index, path)) = found.into_iter().max_by_key(|(index, _)| *index) else { return Ok(None) };
        let sealed = std::fs::read(&path).map_err(StoreError::io("reading a snapshot"))?;
        match self.keys.seal().open_told(&name(index), &sealed) {
            Ok((body, is_present)) => Ok(Some((index, body, is_present))),
            Err(error) => Err(StoreError::Damaged { path, problem: error.to_string() }),
        }
    }

    fn write(&self, index: u64, body: &[u8]) -> Result<(), StoreError> {
        let sealed = self.keys.seal().seal(&name(index), body);
        let written = write_secret(&self.dir, &format!("{PREFIX}{index:020}"), UNFINISHED, &sealed);
        written.map_err(StoreError::io("writing a snapshot"))?;
        remove_before(&self.dir, index)
    }
}

/// Whether there is a snapshot in `dir`.
pub(super) fn exists(dir: &Path) -> bool {
    list(dir).is_ok_and(|found| !found.is_empty())
}

/// Removes the snapshots in `dir` of indexes before `end`.
pub(super) fn remove_before(dir: &Path, end: u64) -> Result<(), StoreError> {
    for (index, old) in list(dir).map_err(StoreError::io("looking for snapshots"))? {
        if index < end {
            std::fs::remove_file(old).map_err(StoreError::io("removing an old snapshot"))?;
        }
    }
    Ok(())
}

fn list(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if let Some(index) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse().ok()) {
            found.push((index, entry.path()));
        }
    }
    Ok(found)
}

/// What a snapshot is sealed under.
fn name(index: u64) -> Vec<u8> {
    [&b"snapshot"[..], &index.to_be_bytes()].concat()
}

impl Snapshots for Files {
    fn load(&self) -> Result<Option<Vec<u8>>, StoreError> {
        let _turn = self.turn();
        Ok(self.read()?.map(|(_, body, _)| body))
    }

    fn save(&self, index: u64, body: &[u8]) -> Result<(), StoreError> {
        let _turn = self.turn();
        self.write(index, body)
    }

    fn seal_anew(&self) -> Result<(), StoreError> {
        let _turn = self.turn();
        match self.read()? {
            Some((index, body, false)) => self.write(index, &body),
            _ => Ok(()),
        }
    }
}

/// How long something is as JSON, bytes.
pub(crate) fn json_bytes(value: &impl serde::Serialize) -> usize {
    struct Count(usize);
    impl io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    serde_json::to_writer(&mut count, value).map_or(usize::MAX, |()| count.0)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
