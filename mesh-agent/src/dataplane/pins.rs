//! Where things are pinned, and how one version of the maps follows another.
//!
//! `<folder>/v<ABI version>/` holds the maps, `<folder>/links/` the attachments, which outlive their programs: another
//! version fills maps of its own, swaps its programs in, and only then removes the folder of the one before.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::maps::{MapData, MapError};
use mesh_common::ABI_VERSION;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::error::DataplaneError;
use crate::sys::bpf;

/// What flows refer to by number: they mean something to another version only together with these.
const NUMBERS: [&str; 3] = ["shoal_backends4", "shoal_backends6", "shoal_peers"];
/// What flows are in.
const FLOWS: [&str; 6] =
    ["shoal_flows4", "shoal_flows6", "shoal_opening4", "shoal_opening6", "shoal_sent4", "shoal_sent6"];

/// The name of the folder of this version's maps.
pub fn version_folder() -> String {
    format!("v{ABI_VERSION}")
}

/// The folder of this version's maps under `pin_dir`, made if need be.
pub fn pin_folder(pin_dir: &Path) -> Result<PathBuf, DataplaneError> {
    let mount = pin_dir.ancestors().find(|path| path.exists()).unwrap_or(pin_dir);
    match statfs(mount) {
        Ok(stat) if stat.filesystem_type() == BPF_FS_MAGIC => {}
        _ => return Err(DataplaneError::NotBpffs { path: pin_dir.to_owned() }),
    }
    let folder = pin_dir.join(version_folder());
    fs::create_dir_all(&folder).map_err(|source| at(&folder, source))?;
    Ok(folder)
}

/// The folder of attachments, made if need be, with those that the first version pinned among its maps.
pub fn links_folder(pin_dir: &Path) -> Result<PathBuf, DataplaneError> {
    let folder = pin_dir.join("links");
    fs::create_dir_all(&folder).map_err(|source| at(&folder, source))?;
    for former in versions(pin_dir).map(|(_, path)| path.join("links")) {
        for entry in fs::read_dir(&former).into_iter().flatten().flatten() {
            let (from, to) = (entry.path(), folder.join(entry.file_name()));
            // One that is in both belongs to another link, which this one only doubles.
            let moved = if to.exists() { fs::remove_file(&from) } else { fs::rename(&from, &to) };
            moved.map_err(|source| at(&from, source))?;
        }
    }
    Ok(folder)
}

/// The newest of the other versions that have maps under `pin_dir`.
pub fn former_version(pin_dir: &Path) -> Option<PathBuf> {
    let others = versions(pin_dir).filter(|(version, _)| *version != ABI_VERSION);
    others.max().map(|(_, path)| path)
}

/// Removes the maps of other versions.
pub fn remove_other_versions(pin_dir: &Path) -> Result<(), DataplaneError> {
    for (_, path) in versions(pin_dir).filter(|(version, _)| *version != ABI_VERSION) {
        fs::remove_dir_all(&path).map_err(|source| at(&path, source))?;
    }
    Ok(())
}

/// Removes all that is pinned under `pin_dir`, of any version; goes on past failures.
pub fn remove_all(pin_dir: &Path) -> Vec<DataplaneError> {
    let folders = versions(pin_dir).map(|(_, path)| path).chain([pin_dir.join("links")]);
    let failures = folders.filter_map(|path| match fs::remove_dir_all(&path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Some(at(&path, source)),
        _ => None,
    });
    failures.collect()
}

/// The folders of all versions' maps, by version.
fn versions(pin_dir: &Path) -> impl Iterator<Item = (u32, PathBuf)> {
    let entries = fs::read_dir(pin_dir).into_iter().flatten().flatten();
    // The file system's root also holds files of the kernel's own.
    entries.filter_map(|entry| {
        let version = entry.file_name().to_str()?.strip_prefix('v')?.parse().ok()?;
        Some((version, entry.path()))
    })
}

/// How flows pass from one version's maps to another's.
#[derive(Debug)]
pub struct Inheritance {
    from: PathBuf,
    to: PathBuf,
}

impl Inheritance {
    /// From the maps in the folder `from` to those in `to`; `None` where a map that flows are in, or refer to, is of
    /// another layout.
    pub fn between(from: PathBuf, to: PathBuf) -> Option<Self> {
        let alike = |name: &&str| {
            let [from, to] =
                [&from, &to].map(|folder| Some(MapData::from_pin(folder.join(name)).ok()?.info()));
            matches!((from, to), (Some(Ok(from)), Some(Ok(to)))
                if (from.key_size(), from.value_size()) == (to.key_size(), to.value_size()))
        };
        let all_alike = NUMBERS.iter().chain(&FLOWS).all(alike);
        all_alike.then_some(Self { from, to })
    }

    /// Copies what flows refer to: before numbers are given out in the new maps.
    pub fn numbers(&self) -> Result<(), DataplaneError> {
        NUMBERS.into_iter().try_for_each(|name| self.copy(name).map(drop))
    }

    /// Copies the flows, and says how many: at the last moment, for packets still make and change them.
    pub fn flows(&self) -> Result<usize, DataplaneError> {
        FLOWS.into_iter().try_fold(0, |copied, name| Ok(copied + self.copy(name)?))
    }

    fn copy(&self, name: &'static str) -> Result<usize, DataplaneError> {
        let open = |folder: &Path| -> Result<MapData, MapError> { MapData::from_pin(folder.join(name)) };
        let failed = |source| DataplaneError::Map { name, operation: "opening", source };
        let (from, to) = (open(&self.from).map_err(failed)?, open(&self.to).map_err(failed)?);
        let info = to.info().map_err(failed)?;
        let (from, to) = (from.fd().as_fd(), to.fd().as_fd());
        bpf::copy(from, to, info.key_size(), info.value_size()).map_err(|source| DataplaneError::MapAccess {
            name,
            operation: "copying another version's entries of",
            source,
        })
    }
}

fn at(path: &Path, source: std::io::Error) -> DataplaneError {
    DataplaneError::PinFolder { path: path.to_owned(), source }
}
