//! What is written is read, and what is something else is refused with what to do.

use std::time::{Duration, SystemTime};

use serde_json::json;

use super::world;
use crate::backup::{Backup, BackupError, FILE_BYTES_MAX, FORMAT, MAGIC, Reader};
use crate::model::State;
use crate::store::snapshot::hex;
use sha2::{Digest as _, Sha256};

fn file() -> Vec<u8> {
    Backup::write(&world().state, SystemTime::UNIX_EPOCH + Duration::from_hours(500_000)).unwrap()
}

/// A file with this header and body, whose length and digest are right.
fn made(format: u32, body: &[u8]) -> Vec<u8> {
    let header = json!({
        "magic": MAGIC, "format": format, "version": "9.9.9", "cluster": "cluster", "index": 1, "time": "",
        "length": body.len(), "sha256": hex(&Sha256::digest(body)),
    });
    [header.to_string().as_bytes(), b"\n", body].concat()
}

#[test]
fn what_is_written_is_read() {
    let state = world().state;
    let file = Backup::write(&state, SystemTime::UNIX_EPOCH + Duration::from_hours(500_000)).unwrap();
    let read = Backup::read(&file).unwrap();
    assert!(read.state == state, "the state and its indexes are the same");
    assert_eq!((read.header.cluster.as_str(), read.header.index), ("cluster", state.index));
    assert_eq!(read.header.time, "2027-01-15T08:00:00Z");
    for piece in [1, 7, 4096] {
        let mut reader = Reader::default();
        file.chunks(piece).for_each(|chunk| reader.feed(chunk).unwrap());
        assert_eq!(reader.finish().unwrap(), read);
    }
    assert!(matches!(Backup::write(&State::empty(), SystemTime::now()), Err(BackupError::NoCluster)));
}

#[test]
fn what_is_no_whole_backup_is_refused_with_what_to_do() {
    let file = file();
    let end = file.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let flipped = |at: usize| {
        let mut file = file.clone();
        file[at] ^= 1;
        file
    };
    let without_length = String::from_utf8(file[..end].to_vec()).unwrap().replace("\"length\"", "\"size\"");
    let deep = [&b"[".repeat(100_000)[..], &b"]".repeat(100_000)].concat();
    let long = format!("{{\"magic\":\"{MAGIC}\",\"format\":1,\"version\":\"{}", "9".repeat(5000));
    let other_index = String::from_utf8(file.clone()).unwrap().replacen("\"index\":", "\"index\":9", 1);
    let cases: [(&str, Vec<u8>, &str); 19] = [
        ("nothing", Vec::new(), "the file is empty"),
        ("text", b"hello\n".to_vec(), "is no backup of a swarm: `shoal backup FILE` makes one"),
        ("another JSON", b"{\"magic\":\"x\",\"format\":1}\n".to_vec(), "is no backup"),
        ("zeros", vec![0; 1 << 20], "is no backup"),
        ("a header without an end", file[..end - 1].to_vec(), "is no backup"),
        ("a header that is long", long.into_bytes(), "is no backup"),
        ("deep JSON for a header", deep.clone(), "is no backup"),
        ("no format", made(0, b"{}"), "is no backup"),
        ("a later format", made(FORMAT + 1, b"{}"), "by the version that wrote it, 9.9.9, or a later one"),
        ("a header that lacks a field", without_length.into_bytes(), "its header does not decode"),
        ("only the header", file[..end].to_vec(), "it ends after 0 of"),
        ("all but the last byte", file[..file.len() - 1].to_vec(), "copy the file again"),
        ("one more byte", [&file[..], b"\n"].concat(), "more follows"),
        ("a changed byte", flipped(file.len() / 2), "its SHA-256 is not what its header says"),
        ("a changed digest", flipped(end - 10), "its SHA-256"),
        ("deep JSON for a state", made(FORMAT, &deep), "its state does not decode"),
        ("another state", made(FORMAT, b"{}"), "its state does not decode"),
        (
            "no swarm",
            made(FORMAT, &serde_json::to_vec(&State::empty()).unwrap()),
            "its header is another backup's",
        ),
        ("another index", other_index.into_bytes(), "its header is another backup's"),
    ];
    for (what, file, part) in cases {
        let error = Backup::read(&file).unwrap_err().to_string();
        assert!(error.contains(part), "{what}: {error}");
    }
}

#[test]
fn no_more_is_read_than_is_of_use() {
    let header = json!({
        "magic": MAGIC, "format": FORMAT, "version": "", "cluster": "c", "index": 1, "time": "",
        "length": FILE_BYTES_MAX + 1, "sha256": "",
    });
    let mut reader = Reader::default();
    assert!(matches!(reader.feed(format!("{header}\n").as_bytes()), Err(BackupError::TooLong)));
    let mut reader = Reader::default();
    let zeros = vec![0; 1000];
    let fed = (0..1_000_000).take_while(|_| reader.feed(&zeros).is_ok()).count();
    assert!(fed < 10, "a gigabyte of zeros is given up after {fed} kB");
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
        let _ = Backup::read(&bytes);
        let _ = Backup::read(&made(FORMAT, &bytes));
    }
}
