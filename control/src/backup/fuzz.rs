//! What a fuzzer is given to try of backups.

#![expect(clippy::missing_panics_doc, reason = "to panic on what must not be is what the targets are for")]

use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::{Backup, encode};
use crate::store::snapshot::hex;

/// A backup: as it is, and with the length and the digest in its header that its state has, which no change of it would come by.
pub fn backup(data: &[u8]) -> bool {
    let _ = Backup::read(data);
    let Some(file) = mended(data) else { return false };
    let Ok(Backup { header, state }) = Backup::read(&file) else { return false };
    let again = encode(&state, header.version, header.time).and_then(|file| Backup::read(&file));
    assert_eq!(again.ok().map(|again| again.state), Some(state), "it reads back as another");
    true
}

fn mended(data: &[u8]) -> Option<Vec<u8>> {
    let end = data.iter().position(|byte| *byte == b'\n')?;
    let (line, state) = (&data[..end], &data[end + 1..]);
    let mut header: Map<String, Value> = serde_json::from_slice(line).ok()?;
    header.insert("length".to_owned(), state.len().into());
    header.insert("sha256".to_owned(), hex(&Sha256::digest(state)).into());
    let mut file = serde_json::to_vec(&header).ok()?;
    file.push(b'\n');
    file.extend(state);
    Some(file)
}
