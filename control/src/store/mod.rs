//! What a manager keeps on disk: an ordered key-value engine for raft's log, sled or redb behind one small trait, and
//! snapshots of the state in files. Both have fakes in memory for tests. All of it is sealed.
//!
//! ```text
//! <dir>/key                        what it is sealed with: in the clear, or sealed by the swarm's unlock key
//! <dir>/log/                       sled's folder, or
//! <dir>/log.redb                   redb's file: the log and what belongs to it ([`crate::raft::log`] has the keys)
//! <dir>/snapshot-<index>           the state at that index
//! ```

pub mod folder;
pub mod keys;
pub mod memory;
pub mod redb;
pub mod sealed;
pub mod sled;
pub mod snapshot;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

use mesh_api::seal::SEAL_BYTES;

/// The format of what is on disk.
pub const FORMAT: u32 = 1;
/// Longest value that the engines take, bytes: from about 8 KiB on, sled moves pages to files that it never syncs.
pub const VALUE_BYTES_MAX: usize = 4096;
/// Longest value that fits once it is sealed, bytes.
pub const PLAIN_BYTES_MAX: usize = VALUE_BYTES_MAX - SEAL_BYTES;

/// Why the store can't be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// An operation on a file or in the engine failed.
    #[error("the manager's store: {what} failed")]
    Io {
        /// The operation.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The engine can't open its folder.
    #[error(
        "the manager's log in {dir} can't be opened: {problem}. If another shoal agent uses it, stop that one; \
         otherwise move the folder aside and join the cluster again (or restore it from a backup)"
    )]
    Open {
        /// The engine's folder.
        dir: PathBuf,
        /// What happened.
        problem: String,
    },
    /// What is stored was written by another version.
    #[error(
        "the manager's state in {path} has format {format}, and this version of Shoal reads format {FORMAT}: start the version \
         that wrote it, or move the folder aside and make or join a cluster again"
    )]
    Format {
        /// The file or folder.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// What is stored does not read back.
    #[error(
        "the manager's state in {path} is damaged: {problem}. Move the folder that holds it aside and join the \
         cluster again (or restore it from a backup)"
    )]
    Damaged {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// What is stored is sealed by the swarm's unlock key, and none was given (Docker's text).
    #[error(
        "Swarm is encrypted and needs to be unlocked before it can be used. Please use \"docker swarm unlock\" to unlock it."
    )]
    Locked,
    /// What is stored is sealed by another unlock key (Docker's text).
    #[error("swarm could not be unlocked: invalid key provided")]
    WrongUnlockKey,
}

impl StoreError {
    pub(crate) fn io(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// One change of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets a key.
    Put(Vec<u8>, Vec<u8>),
    /// Removes a key.
    Del(Vec<u8>),
}

/// A key and its value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// An ordered key-value engine that a log can rest on.
pub trait LogKv: std::fmt::Debug + Send + Sync + 'static {
    /// Makes all of the changes or none; they are durable when it returns `Ok`, and so is what was noted before.
    fn commit(&self, ops: Vec<Op>) -> io::Result<()>;
    /// Makes all of the changes or none; a crash may undo them unless a commit follows.
    fn note(&self, ops: Vec<Op>) -> io::Result<()>;
    /// The value of a key.
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>>;
    /// Keys from `from` up to, but without, `to`, in order.
    fn range(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Vec<Pair>>;
    /// The first of what [`LogKv::range`] gives.
    fn first(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>>;
    /// The last of what [`LogKv::range`] gives.
    fn last(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>>;
    /// Has the present data key seal all that an earlier one sealed; nothing to do for an engine that does not seal.
    fn seal_anew(&self) -> io::Result<()> {
        Ok(())
    }
}
