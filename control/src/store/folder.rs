//! A manager's folder: which engine it has, who may read it, and when it counts as holding anything.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;

use super::redb::RedbKv;
use super::sled::SledKv;
use super::snapshot::Files;
use super::{LogKv, StoreError};

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
    engine_of(dir).is_some() || Files::new(dir).latest().is_ok_and(|found| found.is_some())
}

/// Makes the folder and a log in it.
pub fn create(dir: &Path, engine: Engine) -> Result<Box<dyn LogKv>, StoreError> {
    protect(dir)?;
    open_engine(dir, engine)
}

/// Opens the log in a folder.
pub fn open(dir: &Path) -> Result<Box<dyn LogKv>, StoreError> {
    protect(dir)?;
    // Whoever made a snapshot had a log: without it, the snapshot alone would pass for the latest state.
    let Some(engine) = engine_of(dir) else {
        let (path, problem) = (dir.to_owned(), "the log is missing".to_owned());
        return Err(StoreError::Damaged { path, problem });
    };
    open_engine(dir, engine)
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
    if dir.exists() { Files::new(dir).clear() } else { Ok(()) }
}

fn open_engine(dir: &Path, engine: Engine) -> Result<Box<dyn LogKv>, StoreError> {
    let path = dir.join(engine.name());
    Ok(match engine {
        Engine::Sled => Box::new(SledKv::open(&path)?),
        Engine::Redb => Box::new(RedbKv::open(&path)?),
    })
}

/// The state holds the join tokens' secrets, and the folder may have been there before.
fn protect(dir: &Path) -> Result<(), StoreError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    let made = made.and_then(|()| std::fs::set_permissions(dir, Permissions::from_mode(0o700)));
    made.map_err(StoreError::io("making the store's folder"))
}

/// Syncs a folder's entries.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir)?.sync_all()
}
