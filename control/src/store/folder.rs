//! A manager's folder: which engine it has, what it is sealed with, who may read it, and when it counts as holding anything.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use mesh_api::seal::UnlockKey;

use super::keys::{self, Keys};
use super::redb::RedbKv;
use super::sealed::SealedKv;
use super::sled::SledKv;
use super::snapshot::{self, Files};
use super::{LogKv, StoreError};
use crate::model::Lock;

const SLED: &str = "log";
const REDB: &str = "log.redb";

/// What the log rests on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Engine {
    /// sled 0.34, with the guard rails of [`super::sled`].
    #[default]
    Sled,
    /// redb 4.
    Redb,
}

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Self::Sled => SLED,
            Self::Redb => REDB,
        }
    }
}

/// The engine whose log is in `dir`, if one is.
pub fn engine_of(dir: &Path) -> Option<Engine> {
    [Engine::Sled, Engine::Redb].into_iter().find(|engine| dir.join(engine.name()).exists())
}

/// Whether `dir` holds a log or a snapshot.
pub fn exists(dir: &Path) -> bool {
    engine_of(dir).is_some() || snapshot::exists(dir)
}

/// Whether what `dir` holds is to be unlocked before it can be opened.
pub fn is_locked(dir: &Path) -> Result<bool, StoreError> {
    Keys::are_locked(dir)
}

/// What a manager's folder holds, open.
#[derive(Debug)]
pub struct Folder {
    /// The log.
    pub log: Box<dyn LogKv>,
    /// The snapshots.
    pub snapshots: Files,
    /// What both are sealed with.
    pub keys: Arc<Keys>,
}

/// Makes the folder and an empty log in it, sealed as `lock` says.
pub fn create(dir: &Path, engine: Engine, lock: Lock) -> Result<Folder, StoreError> {
    protect(dir)?;
    over(dir, engine, Keys::create(dir, lock)?)
}

/// Opens a folder: with the unlock key, where it [`is_locked`].
pub fn open(dir: &Path, unlock: Option<&UnlockKey>) -> Result<Folder, StoreError> {
    protect(dir)?;
    // Whoever made a snapshot had a log: without it, the snapshot alone would pass for the latest state.
    let Some(engine) = engine_of(dir) else {
        let (path, problem) = (dir.to_owned(), "the log is missing".to_owned());
        return Err(StoreError::Damaged { path, problem });
    };
    let folder = over(dir, engine, Keys::open(dir, unlock)?)?;
    if folder.keys.seal().has_former() {
        // A crash may have come before all of it was sealed anew.
        folder.log.seal_anew().map_err(StoreError::io("sealing the log anew"))?;
        snapshot::Snapshots::seal_anew(&folder.snapshots)?;
    }
    Ok(folder)
}

/// Removes what an unfinished creation left.
pub fn clear(dir: &Path) -> Result<(), StoreError> {
    let removed = |result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    let failed = StoreError::io("removing an unfinished log");
    removed(std::fs::remove_dir_all(dir.join(SLED))).map_err(&failed)?;
    removed(std::fs::remove_file(dir.join(REDB))).map_err(&failed)?;
    if dir.exists() {
        snapshot::remove_before(dir, u64::MAX)?;
    }
    removed(std::fs::remove_file(dir.join(keys::FILE))).map_err(&failed)
}

fn over(dir: &Path, engine: Engine, keys: Arc<Keys>) -> Result<Folder, StoreError> {
    let path = dir.join(engine.name());
    let kv: Box<dyn LogKv> = match engine {
        Engine::Sled => Box::new(SledKv::open(&path)?),
        Engine::Redb => Box::new(RedbKv::open(&path)?),
    };
    let log = Box::new(SealedKv::new(kv, Arc::clone(&keys)));
    Ok(Folder { log, snapshots: Files::new(dir, Arc::clone(&keys)), keys })
}

/// Nobody but root has business here, and the folder may have been there before.
fn protect(dir: &Path) -> Result<(), StoreError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    let made = made.and_then(|()| std::fs::set_permissions(dir, Permissions::from_mode(0o700)));
    made.map_err(StoreError::io("making the store's folder"))
}

/// Replaces the file `name` in `dir`, for root alone: a reader, also after a crash, sees the old content or the new. It is
/// written as `unfinished` first.
pub(super) fn write_secret(dir: &Path, name: &str, unfinished: &str, bytes: &[u8]) -> io::Result<()> {
    let unfinished = dir.join(unfinished);
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&unfinished, dir.join(name))?;
    sync_dir(dir)
}

/// Syncs a folder's entries.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir)?.sync_all()
}
