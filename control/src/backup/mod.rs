//! Backups: the replicated state in a file that later versions read.
//!
//! ```text
//! {"magic":"shoal-backup","format":1,"version":…,"cluster":…,"index":…,"time":…,"length":…,"sha256":…}
//! the state as JSON: `length` bytes, of that SHA-256
//! ```
//!
//! The header is one line, so that `head -n 1` shows it. [`revive`] says what becomes of a state that comes back.

#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
pub mod revive;
#[cfg(test)]
mod tests;

use std::time::SystemTime;

use mesh_api::id::ClusterId;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::model::{Lookup, State};
use crate::store::snapshot::hex;

/// The format that is written. Any change of the header, or of what a state is as JSON, needs another.
pub const FORMAT: u32 = 1;
/// Longest file that is read, bytes: some 300,000 tasks.
pub const FILE_BYTES_MAX: usize = 512 << 20;
/// Longest header, bytes.
const HEADER_BYTES_MAX: usize = 4096;
const MAGIC: &str = "shoal-backup";

/// Why there is no backup, or a file is none that can be restored. The texts go on from "the backup can't be read: ".
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// It has no bytes.
    #[error("the file is empty: copy it again, or take another backup")]
    Empty,
    /// It begins otherwise than a backup.
    #[error("the file is no backup of a swarm: `shoal backup FILE` makes one, on a manager")]
    NotABackup,
    /// It was written by a later version.
    #[error(
        "it has format {format}, and this version of Shoal reads formats 1 to {FORMAT}: restore it by the version that wrote it, \
         {version}, or a later one"
    )]
    Newer {
        /// Its format.
        format: u32,
        /// The version of Shoal that wrote it; `unknown` if it does not say.
        version: String,
    },
    /// Its header lacks something.
    #[error("its header does not decode ({0}): copy the file again, or take another backup")]
    Header(#[source] serde_json::Error),
    /// It is longer than any that is taken.
    #[error("it has more than the {FILE_BYTES_MAX} bytes that a backup may have")]
    TooLong,
    /// Its end is missing.
    #[error("it ends after {found} of {length} bytes: copy the file again, or take another backup")]
    Truncated {
        /// Bytes of the state that should be there.
        length: usize,
        /// Those that are.
        found: usize,
    },
    /// Something follows its end.
    #[error("more follows than the {length} bytes that its header tells of: copy the file again")]
    Trailing {
        /// Bytes of the state.
        length: usize,
    },
    /// It was changed.
    #[error(
        "its SHA-256 is not what its header says, so it was changed: copy the file again, or take another backup"
    )]
    Digest,
    /// The state does not decode.
    #[error("its state does not decode ({0}): it was not written by Shoal, or this is a bug")]
    State(#[source] serde_json::Error),
    /// Header and state are of different backups.
    #[error("its header is another backup's: copy the file again, or take another backup")]
    Mismatch,
    /// There is no swarm in the state.
    #[error("there is no swarm to be backed up yet: try again once `docker node ls` answers")]
    NoCluster,
}

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    magic: String,
    format: u32,
    /// The version of Shoal that wrote it.
    pub version: String,
    /// The swarm.
    pub cluster: ClusterId,
    /// The table index of the state.
    pub index: u64,
    /// When it was taken, RFC 3339.
    pub time: String,
    length: usize,
    sha256: String,
}

/// Only this much is read of a header that may be of any format.
#[derive(Deserialize)]
struct Beginning {
    magic: String,
    format: u32,
    #[serde(default)]
    version: Option<String>,
}

/// A backup that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// What it says of itself.
    pub header: Header,
    /// The state.
    pub state: State,
}

impl Backup {
    /// The file's bytes for `state`, as it was at the time `now`.
    pub fn write(state: &State, now: SystemTime) -> Result<Vec<u8>, BackupError> {
        let now = OffsetDateTime::from(now);
        let time = now.replace_nanosecond(0).unwrap_or(now).format(&Rfc3339).unwrap_or_default();
        encode(state, env!("CARGO_PKG_VERSION").to_owned(), time)
    }

    /// Reads a whole file.
    pub fn read(bytes: &[u8]) -> Result<Self, BackupError> {
        let mut reader = Reader::default();
        reader.feed(bytes)?;
        reader.finish()
    }
}

fn encode(state: &State, version: String, time: String) -> Result<Vec<u8>, BackupError> {
    let cluster = state.cluster.as_ref().ok_or(BackupError::NoCluster)?.id.clone();
    let body = serde_json::to_vec(state).map_err(BackupError::State)?;
    let header = Header {
        magic: MAGIC.to_owned(),
        format: FORMAT,
        version,
        cluster,
        index: state.index,
        time,
        length: body.len(),
        sha256: hex(&Sha256::digest(&body)),
    };
    let mut file = serde_json::to_vec(&header).map_err(BackupError::Header)?;
    file.push(b'\n');
    if file.len() + body.len() > FILE_BYTES_MAX {
        return Err(BackupError::TooLong);
    }
    file.extend(body);
    Ok(file)
}

/// Reads a file piece by piece, and no more of it than is of use.
#[derive(Debug, Default)]
pub struct Reader {
    line: Vec<u8>,
    header: Option<Header>,
    body: Vec<u8>,
    digest: Sha256,
}

impl Reader {
    /// Takes the next bytes. Once it has failed, the file is not to be read on.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), BackupError> {
        let length = match &self.header {
            Some(header) => header.length,
            None => match self.feed_header(&mut bytes)? {
                Some(length) => length,
                None => return Ok(()),
            },
        };
        if self.body.len() + bytes.len() > length {
            return Err(BackupError::Trailing { length });
        }
        self.digest.update(bytes);
        self.body.extend_from_slice(bytes);
        Ok(())
    }

    /// Takes the header off `bytes`; the body's length, once it is there.
    fn feed_header(&mut self, bytes: &mut &[u8]) -> Result<Option<usize>, BackupError> {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let (part, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
        if self.line.len() + part.len() > HEADER_BYTES_MAX {
            return Err(BackupError::NotABackup);
        }
        self.line.extend_from_slice(part);
        if end.is_none() {
            return Ok(None);
        }
        *bytes = &rest[1..];
        let header = header(&self.line)?;
        let length = header.length;
        self.header = Some(header);
        Ok(Some(length))
    }

    /// The backup, where the file ends here.
    pub fn finish(self) -> Result<Backup, BackupError> {
        let Self { line, header, body, digest } = self;
        let Some(header) = header else {
            return Err(if line.is_empty() { BackupError::Empty } else { BackupError::NotABackup });
        };
        if body.len() < header.length {
            return Err(BackupError::Truncated { length: header.length, found: body.len() });
        }
        if hex(&digest.finalize()) != header.sha256 {
            return Err(BackupError::Digest);
        }
        // What a later format makes of this one's state belongs here.
        let mut state: State = serde_json::from_slice(&body).map_err(BackupError::State)?;
        drop(body);
        let cluster = state.cluster.as_ref().ok_or(BackupError::Mismatch)?;
        if cluster.id != header.cluster || state.index != header.index {
            return Err(BackupError::Mismatch);
        }
        state.lookup = Lookup::of(&state);
        Ok(Backup { header, state })
    }
}

fn header(line: &[u8]) -> Result<Header, BackupError> {
    let beginning =
        serde_json::from_slice::<Beginning>(line).ok().filter(|it| it.magic == MAGIC && it.format > 0);
    let Beginning { magic: _, format, version } = beginning.ok_or(BackupError::NotABackup)?;
    if format > FORMAT {
        return Err(BackupError::Newer { format, version: version.unwrap_or_else(|| "unknown".to_owned()) });
    }
    let header: Header = serde_json::from_slice(line).map_err(BackupError::Header)?;
    if header.length > FILE_BYTES_MAX {
        return Err(BackupError::TooLong);
    }
    Ok(header)
}
