//! Snapshots in files: `snapshot-<index>.json`, its first line the SHA-256 of what follows.
//!
//! A snapshot becomes visible by a rename once it is on disk, so a crash leaves the one before it.

use std::fs::{OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use sha2::{Digest as _, Sha256};

use super::StoreError;
use super::folder::sync_dir;

const PREFIX: &str = "snapshot-";
const SUFFIX: &str = ".json";

/// Where snapshots are kept.
pub trait Snapshots: std::fmt::Debug + Send + Sync + 'static {
    /// The latest snapshot.
    fn load(&self) -> Result<Option<Vec<u8>>, StoreError>;
    /// Keeps a snapshot of the state at `index` durably, then drops older ones.
    fn save(&self, index: u64, body: &[u8]) -> Result<(), StoreError>;
}

/// Snapshots in a folder.
#[derive(Debug)]
pub struct Files {
    dir: PathBuf,
    /// Held while one is written: they share an unfinished file.
    writing: Mutex<()>,
}

impl Files {
    /// Those in `dir`, which exists.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), writing: Mutex::new(()) }
    }

    /// The latest snapshot's file.
    pub fn latest(&self) -> io::Result<Option<PathBuf>> {
        Ok(self.list()?.into_iter().max_by_key(|(index, _)| *index).map(|(_, path)| path))
    }

    /// Removes all of them.
    pub fn clear(&self) -> Result<(), StoreError> {
        self.remove_before(u64::MAX)
    }

    fn remove_before(&self, end: u64) -> Result<(), StoreError> {
        for (index, old) in self.list().map_err(StoreError::io("looking for snapshots"))? {
            if index < end {
                std::fs::remove_file(old).map_err(StoreError::io("removing an old snapshot"))?;
            }
        }
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<(u64, PathBuf)>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
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

    fn write(&self, path: &Path, body: &[u8]) -> io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let unfinished = self.dir.join("snapshot.tmp");
        // The state holds the join tokens' secrets.
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.write_all(hex(&Sha256::digest(body)).as_bytes())?;
        file.write_all(b"\n")?;
        file.write_all(body)?;
        file.sync_all()?;
        std::fs::rename(&unfinished, path)?;
        sync_dir(&self.dir)
    }
}

impl Snapshots for Files {
    fn load(&self) -> Result<Option<Vec<u8>>, StoreError> {
        let latest = self.latest().map_err(StoreError::io("looking for snapshots"))?;
        let Some(path) = latest else { return Ok(None) };
        let mut bytes = std::fs::read(&path).map_err(StoreError::io("reading a snapshot"))?;
        let damaged = |problem: &str| StoreError::Damaged { path: path.clone(), problem: problem.to_owned() };
        let end =
            bytes.iter().position(|byte| *byte == b'\n').ok_or_else(|| damaged("it has no first line"))?;
        let body = bytes.split_off(end + 1);
        if bytes[..end] != *hex(&Sha256::digest(&body)).as_bytes() {
            return Err(damaged("its checksum is wrong"));
        }
        Ok(Some(body))
    }

    fn save(&self, index: u64, body: &[u8]) -> Result<(), StoreError> {
        let path = self.dir.join(format!("{PREFIX}{index:020}{SUFFIX}"));
        self.write(&path, body).map_err(StoreError::io("writing a snapshot"))?;
        self.remove_before(index)
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
