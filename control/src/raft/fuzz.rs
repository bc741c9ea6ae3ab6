//! What a fuzzer is given to try of raft: messages of other members, entries of the log, snapshots.

#![expect(clippy::missing_panics_doc, reason = "to panic on what must not be is what the targets are for")]

#[cfg(test)]
pub(crate) mod seeds;

use std::path::PathBuf;

use mesh_api::fuzz::{framed, lines, stream, written};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::log::{Log, Work};
use super::machine::Contents;
use super::message::{Request, Response};
use super::{Entry, TypeConfig};
use crate::managers::wire::FRAME_BYTES_MAX;
use crate::model::State;
use crate::store::memory::MemoryKv;

/// What managers ask each other and answer: bodies of frames, one a line; and the bytes as they are, as a stream.
pub fn raft_message(data: &[u8]) -> bool {
    stream::<Request>(data, FRAME_BYTES_MAX);
    lines(data).filter(|body| reads_back::<Request>(body) | reads_back::<Response>(body)).count() > 0
}

/// Whether it is a message; it is read as it is written.
fn reads_back<T: Serialize + DeserializeOwned>(body: &[u8]) -> bool {
    let Some(read) = framed::<T>(body, FRAME_BYTES_MAX) else { return false };
    let first = written(&read);
    let again = first.as_ref().and_then(|body| framed::<T>(body, u32::MAX)).and_then(|read| written(&read));
    assert!(first.is_some() && first == again, "it reads back as another: {first:?}");
    true
}

/// An entry of the log, as another member sends it and this one keeps it.
pub fn raft_entry(data: &[u8]) -> bool {
    let Ok(entry) = serde_json::from_slice::<Entry>(data) else { return false };
    let index = entry.log_id.index;
    let (log, _) = Log::new(Box::<MemoryKv>::default(), PathBuf::from("memory"), Work::Inline);
    assert!(log.append(std::slice::from_ref(&entry)).is_ok());
    let kept = log.entries(index, index.saturating_add(1)).unwrap_or_default();
    assert!(index == u64::MAX || kept.len() == 1, "{} entries are kept", kept.len());
    for kept in kept {
        assert_eq!(json::<openraft::Entry<TypeConfig>>(&kept), json(&entry));
        let _ = contents().apply(kept);
    }
    true
}

/// A snapshot, as another member sends it.
pub fn snapshot(data: &[u8]) -> bool {
    let Ok(contents) = Contents::decode(data) else { return false };
    let Ok(first) = contents.encode() else { panic!("it is not written") };
    let Ok(again) = Contents::decode(&first).and_then(|contents| contents.encode()) else {
        panic!("it is not read back: {}", first.escape_ascii())
    };
    assert_eq!(first, again);
    true
}

/// The state of a snapshot that the tests read too.
pub(crate) fn state() -> State {
    contents().state
}

fn contents() -> Contents {
    match Contents::decode(include_bytes!("tests/format1/snapshot.json")) {
        Ok(contents) => contents,
        Err(error) => panic!("SHOAL_WRITE_FIXTURE=1 writes it anew: {error}"),
    }
}

fn json<T: Serialize>(value: &T) -> Option<String> {
    serde_json::to_string(value).ok()
}
