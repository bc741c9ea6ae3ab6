//! sled 0.34 behind [`LogKv`], with the guard rails without which it loses data:
//!
//! 1. one tree, no background flush, every batch flushed by us;
//! 2. `Db::flush` only writes the pages back (`sync_file_range`); after it the file is synced through a handle of
//!    our own. The folder and its parent are synced once at opening;
//! 3. values above 4 KiB are refused ([`crate::raft::log`] cuts longer ones up): from about 8 KiB on, sled moves pages
//!    to files that it never syncs;
//! 4. a damaged database shows as a panic or as a hang when it is opened, so that happens on a thread of its own, with
//!    a time limit. Or it shows as an empty one: so each holds a marker from the start.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use super::folder::sync_dir;
use super::{LogKv, Op, Pair, StoreError, VALUE_BYTES_MAX};

/// How long an opening may take.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// sled gives its lock up a moment after it is dropped: how often, and how long apart, to try again.
const LOCK_TRIES: u32 = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(50);
const CACHE_BYTES: u64 = 16 << 20;
/// The marker's key and value; raft's keys are others.
pub(super) const MARKER_KEY: &[u8] = b"Mformat";
const MARKER_VALUE: &[u8] = b"1";

/// A sled database.
#[derive(Debug)]
pub struct SledKv {
    db: sled::Db,
    file: File,
}

impl SledKv {
    /// Opens the database in `dir`; where there is no such folder, a database is made first.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let failed = |problem: String| StoreError::Open { dir: dir.to_owned(), problem };
        if !dir.exists() {
            create(dir).map_err(failed)?;
        }
        let kv = Self::open_synced(dir).map_err(failed)?;
        match kv.get(MARKER_KEY).map_err(|error| failed(error.to_string()))? {
            Some(value) if value == MARKER_VALUE => Ok(kv),
            Some(_) => Err(failed("it was written by another version of Shoal".to_owned())),
            None => {
                Err(failed("the engine finds nothing of what it holds, so its files are damaged".to_owned()))
            }
        }
    }

    fn open_synced(dir: &Path) -> Result<Self, String> {
        let text = |error: io::Error| error.to_string();
        let db = open_guarded(dir)?;
        // Syncs what the opening itself wrote, and the folder entries that lead to it.
        db.flush().map_err(|error| error.to_string())?;
        let file = File::open(dir.join("db")).map_err(text)?;
        file.sync_all().map_err(text)?;
        for folder in [Some(dir), dir.parent()].into_iter().flatten() {
            sync_dir(folder).map_err(text)?;
        }
        Ok(Self { db, file })
    }
}

/// Makes a database beside `dir`, then moves it there: a crash leaves none, or a whole one.
fn create(dir: &Path) -> Result<(), String> {
    let text = |error: io::Error| error.to_string();
    let unfinished = dir.with_extension("unfinished");
    if unfinished.exists() {
        std::fs::remove_dir_all(&unfinished).map_err(text)?;
    }
    std::fs::create_dir_all(&unfinished).map_err(text)?;
    let kv = SledKv::open_synced(&unfinished)?;
    kv.commit(vec![Op::Put(MARKER_KEY.to_vec(), MARKER_VALUE.to_vec())]).map_err(text)?;
    drop(kv);
    std::fs::rename(&unfinished, dir).map_err(text)
}

fn open_guarded(dir: &Path) -> Result<sled::Db, String> {
    let (sender, receiver) = mpsc::channel();
    let config = sled::Config::new()
        .path(dir)
        .mode(sled::Mode::HighThroughput)
        .flush_every_ms(None)
        .cache_capacity(CACHE_BYTES);
    let thread = std::thread::Builder::new()
        .name("store-open".to_owned())
        .spawn(move || drop(sender.send(open_unlocked(&config))))
        .map_err(|error| error.to_string())?;
    match receiver.recv_timeout(OPEN_TIMEOUT) {
        Ok(opened) => {
            let _ = thread.join();
            opened.map_err(|error| error.to_string())
        }
        // The thread is left behind: it holds a lock that only the end of the process releases.
        Err(mpsc::RecvTimeoutError::Timeout) => {
            Err(format!("the engine did not answer within {} s", OPEN_TIMEOUT.as_secs()))
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            Err("the engine panicked, so its files are damaged".to_owned())
        }
    }
}

fn open_unlocked(config: &sled::Config) -> sled::Result<sled::Db> {
    let is_locked = |error: &sled::Error| error.to_string().contains("could not acquire lock");
    for _ in 1..LOCK_TRIES {
        match config.open() {
            Err(error) if is_locked(&error) => std::thread::sleep(LOCK_PAUSE),
            opened => return opened,
        }
    }
    config.open()
}

impl SledKv {
    /// Makes the changes without syncing them.
    fn apply(&self, ops: Vec<Op>) -> io::Result<()> {
        let mut batch = sled::Batch::default();
        for op in ops {
            match op {
                Op::Put(key, value) => {
                    if value.len() > VALUE_BYTES_MAX {
                        let problem = format!("a value of {} bytes exceeds {VALUE_BYTES_MAX}", value.len());
                        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
                    }
                    batch.insert(key, value);
                }
                Op::Del(key) => batch.remove(key),
            }
        }
        self.db.apply_batch(batch).map_err(io::Error::other)
    }
}

impl LogKv for SledKv {
    fn commit(&self, ops: Vec<Op>) -> io::Result<()> {
        self.apply(ops)?;
        self.db.flush().map_err(io::Error::other)?;
        self.file.sync_data()
    }

    fn note(&self, ops: Vec<Op>) -> io::Result<()> {
        self.apply(ops)
    }

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.db.get(key).map_err(io::Error::other)?.map(|value| value.to_vec()))
    }

    fn range(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Vec<Pair>> {
        self.db.range(from..to).map(|pair| pair.map(to_pair).map_err(io::Error::other)).collect()
    }

    fn first(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>> {
        self.db.range(from..to).next().transpose().map(|pair| pair.map(to_pair)).map_err(io::Error::other)
    }

    fn last(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>> {
        self.db
            .range(from..to)
            .next_back()
            .transpose()
            .map(|pair| pair.map(to_pair))
            .map_err(io::Error::other)
    }
}

fn to_pair((key, value): (sled::IVec, sled::IVec)) -> Pair {
    (key.to_vec(), value.to_vec())
}
