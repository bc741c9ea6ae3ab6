//! Power cuts: a process writes the product's log on an ext4 of its own, on a loop device, and says what it was told is
//! durable. It is stopped at any moment and the device's image copied: what the disk had, had the power gone then. The copy
//! is mounted and looked into.
//!
//! `SHOAL_POWER_CUTS=50` cuts so often, for each engine; five times is the rule. Needs root, for the mounts.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use openraft::EntryPayload;
use rand::RngExt as _;

use super::disk::log_id;
use crate::command::{self, Action};
use crate::raft::log::Work;
use crate::raft::{Batch, Entry, Storage, Vote};
use crate::store::folder::{self, Engine, Folder};
use crate::store::{LogKv, Op, Pair};
use crate::testing::network;

const CUTS: usize = 5;
/// Cuts of one process; the next one begins with an empty disk.
const CUTS_AT_ONCE: usize = 10;
const IMAGE_BYTES: u64 = 256 << 20;
/// What the writing process is told: the engine's name, and its folder.
const WRITER: &str = "SHOAL_POWER_WRITER";

/// How something is written.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// As the product does.
    Product(Engine),
    /// Without syncs.
    Careless(Engine),
}

impl Way {
    const ALL: [(&'static str, Self); 4] = [
        ("sled", Self::Product(Engine::Sled)),
        ("redb", Self::Product(Engine::Redb)),
        ("careless-sled", Self::Careless(Engine::Sled)),
        ("careless-redb", Self::Careless(Engine::Redb)),
    ];

    fn begin(self, dir: &Path) -> Storage {
        match self {
            Self::Product(engine) => Storage::create(dir, engine, 1).unwrap(),
            Self::Careless(engine) => {
                drop(Storage::create(dir, engine, 1).unwrap());
                let Folder { log, snapshots, .. } = until_free(|| folder::open(dir, None).ok());
                Storage::check(Box::new(Careless(log)), Arc::new(snapshots), dir, Work::Threads).unwrap()
            }
        }
    }
}

/// An engine that says that it synced, and didn't.
#[derive(Debug)]
struct Careless(Box<dyn LogKv>);

impl LogKv for Careless {
    fn commit(&self, ops: Vec<Op>) -> std::io::Result<()> {
        self.0.note(ops)
    }

    fn note(&self, ops: Vec<Op>) -> std::io::Result<()> {
        self.0.note(ops)
    }

    fn get(&self, key: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
        self.0.get(key)
    }

    fn range(&self, from: Vec<u8>, to: Vec<u8>) -> std::io::Result<Vec<Pair>> {
        self.0.range(from, to)
    }

    fn first(&self, from: Vec<u8>, to: Vec<u8>) -> std::io::Result<Option<Pair>> {
        self.0.first(from, to)
    }

    fn last(&self, from: Vec<u8>, to: Vec<u8>) -> std::io::Result<Option<Pair>> {
        self.0.last(from, to)
    }
}

fn until_free<T>(open: impl Fn() -> Option<T>) -> T {
    loop {
        match open() {
            Some(opened) => return opened,
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// The entry at an index: most are short, some far longer than the longest value.
fn entry(index: u64) -> Entry {
    let name = if index % 50 == 7 { "long".repeat(5000) } else { format!("n{index}") };
    let action = Action::CreateNetwork { id: format!("{index}").into(), spec: network(&name) };
    let commands = vec![command::Command { at_ns: index, action }];
    let payload = EntryPayload::Normal(Batch { proposer: 1, number: index, commands });
    Entry { log_id: log_id(index), payload }
}

/// What the writer was told is durable.
#[derive(Debug, Default, Clone, Copy)]
struct Told {
    entry: u64,
    vote: u64,
    snapshot: u64,
}

/// Writes until it is killed, where it is a process of its own for that.
#[test]
fn writer() {
    let Ok(told) = std::env::var(WRITER) else { return };
    let (name, dir) = told.split_once(':').unwrap();
    let (_, way) = Way::ALL.into_iter().find(|(it, _)| *it == name).unwrap();
    let storage = way.begin(Path::new(dir));
    let mut rng = rand::rng();
    let mut next = 1;
    let say = |what: char, number: u64| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "\ndurable {what} {number}").and_then(|()| out.flush()).unwrap();
    };
    loop {
        let end = next + rng.random_range(1..8);
        let batch: Vec<Entry> = (next..end).map(entry).collect();
        storage.log.append(&batch).unwrap();
        say('E', end - 1);
        storage.log.save_committed(Some(log_id(end - 1))).unwrap();
        if end / 64 > next / 64 {
            storage.log.save_vote(&Vote::new(end, 1)).unwrap();
            say('V', end);
        }
        if end / 512 > next / 512 {
            storage.snapshots.save(end - 100, format!("snapshot {}", end - 100).as_bytes()).unwrap();
            say('S', end - 100);
            storage.log.purge(log_id(end - 200)).unwrap();
        }
        next = end;
    }
}

/// An ext4 on a loop device, in a folder.
struct Disk {
    image: PathBuf,
    at: PathBuf,
}

fn run(program: &str, arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Result<(), String> {
    let mut command = Command::new(program);
    let output = command.args(arguments.iter().map(AsRef::as_ref)).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl Disk {
    fn make(folder: &Path) -> Result<Self, String> {
        let image = folder.join("image");
        let file = std::fs::File::create(&image).map_err(|error| error.to_string())?;
        file.set_len(IMAGE_BYTES).map_err(|error| error.to_string())?;
        run("mkfs.ext4", &[&"-q", &"-F", &image])?;
        Self::mount(image, folder.join("disk"))
    }

    fn mount(image: PathBuf, at: PathBuf) -> Result<Self, String> {
        std::fs::create_dir_all(&at).map_err(|error| error.to_string())?;
        run("mount", &[&"-o", &"loop", &image, &at])?;
        Ok(Self { image, at })
    }

    /// What the disk had if the power went at this moment. `number` tells it from other cuts: where somebody else's mount
    /// namespace holds a former one's mount, another of the same file would be that one again.
    fn cut(&self, folder: &Path, number: usize) -> Self {
        let image = folder.join(format!("cut{number}"));
        run("cp", &[&"--sparse=always", &self.image, &image]).unwrap();
        Self::mount(image, folder.join("after")).unwrap()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It goes once nobody has it mounted.
        let _ = std::fs::remove_file(&self.image);
        // The engine may be just closing.
        for _ in 0..100 {
            if run("umount", &[&self.at]).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = run("umount", &[&"-l", &self.at]);
    }
}

/// The writing process.
struct Writer {
    child: Child,
    told: Arc<Mutex<Told>>,
}

impl Writer {
    fn start(name: &str, dir: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "raft::tests::power::writer", "--nocapture"])
            .env(WRITER, format!("{name}:{}", dir.display()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let told = Arc::<Mutex<Told>>::default();
        let (out, heard) = (BufReader::new(child.stdout.take().unwrap()), Arc::clone(&told));
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let mut words = line.split(' ');
                if words.next() != Some("durable") {
                    continue;
                }
                let what = words.next().unwrap_or_default().to_owned();
                // A line that was cut off says nothing.
                let Some(number) = words.next().and_then(|number| number.parse().ok()) else { continue };
                let mut told = heard.lock().unwrap();
                match &what[..] {
                    "E" => told.entry = number,
                    "V" => told.vote = number,
                    _ => told.snapshot = number,
                }
            }
        });
        let writer = Self { child, told };
        while writer.told().entry == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        writer
    }

    fn told(&self) -> Told {
        *self.told.lock().unwrap()
    }

    fn signal(&self, signal: &str) {
        run("kill", &[&signal, &self.child.id().to_string()]).unwrap();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is wrong with what a disk has after a power cut.
fn loss(dir: &Path, told: Told) -> Option<String> {
    let storage = match Storage::open(dir) {
        Ok(storage) => storage,
        Err(error) => return Some(format!("it does not open: {error}")),
    };
    let check = || {
        let (purged, last) = storage.log.ends()?;
        let (purged, last) = (purged.map_or(0, |it| it.index), last.map_or(0, |it| it.index));
        let vote = storage.log.vote()?.map_or(0, |vote| vote.leader_id.term);
        let snapshot = storage.snapshots.load()?.map_or(0, |body| {
            String::from_utf8(body).unwrap().split(' ').nth(1).unwrap().parse::<u64>().unwrap()
        });
        storage.log.check_reaches(snapshot)?;
        let entries = storage.log.entries(purged + 1, last + 1)?;
        let whole =
            entries.len() as u64 == last - purged && entries.iter().all(|it| *it == entry(it.log_id.index));
        let committed = storage.log.committed()?.map_or(0, |it| it.index);
        Ok((whole, last, vote, snapshot, committed))
    };
    match check() {
        Err::<_, crate::store::StoreError>(error) => Some(error.to_string()),
        Ok((false, ..)) => Some("entries are missing or others".to_owned()),
        Ok((_, last, vote, snapshot, committed)) => {
            let kept =
                last >= told.entry && vote >= told.vote && snapshot >= told.snapshot && committed <= last;
            (!kept).then(|| format!("{last}, {vote}, {snapshot}, {committed} are there of {told:?}"))
        }
    }
}

/// Cuts so often, and tells of each cut that lost something. `None`, and why, where it can't be tried.
fn cut(name: &str, cuts: usize) -> Option<Vec<String>> {
    let mut losses = Vec::new();
    let mut left = cuts;
    let mut rng = rand::rng();
    let mut durable = 0;
    while left > 0 {
        let folder = tempfile::tempdir().unwrap();
        let disk = match Disk::make(folder.path()) {
            Ok(disk) => disk,
            Err(problem) => {
                // Not by `println!`, which the test harness keeps to itself.
                let skip = format!("\nSKIP: power cuts need root and loop devices: {problem}\n");
                std::io::stdout().write_all(skip.as_bytes()).unwrap();
                let in_ci = std::env::var("CI").is_ok_and(|value| !value.is_empty() && value != "false");
                assert!(!in_ci, "CI has them");
                return None;
            }
        };
        let writer = Writer::start(name, &disk.at.join("state"));
        for _ in 0..left.min(CUTS_AT_ONCE) {
            std::thread::sleep(Duration::from_millis(rng.random_range(20..300)));
            writer.signal("-STOP");
            // What it said before is still in the pipe.
            std::thread::sleep(Duration::from_millis(30));
            let told = writer.told();
            let after = disk.cut(folder.path(), left);
            losses.extend(loss(&after.at.join("state"), told));
            drop(after);
            durable += told.entry;
            writer.signal("-CONT");
            left -= 1;
        }
        drop(writer);
    }
    println!("{name}: {cuts} power cuts, {} lost something; {durable} entries acknowledged", losses.len());
    Some(losses)
}

fn cuts() -> usize {
    std::env::var("SHOAL_POWER_CUTS").map_or(CUTS, |cuts| cuts.parse().expect("SHOAL_POWER_CUTS is a number"))
}

#[test]
fn sled_loses_nothing_acknowledged_to_a_power_cut() {
    assert_eq!(cut("sled", cuts()).unwrap_or_default(), Vec::<String>::new());
}

#[test]
fn redb_loses_nothing_acknowledged_to_a_power_cut() {
    assert_eq!(cut("redb", cuts()).unwrap_or_default(), Vec::<String>::new());
}

#[test]
fn a_store_that_does_not_sync_is_caught_by_a_power_cut() {
    for name in ["careless-sled", "careless-redb"] {
        // A cut right after the kernel wrote by itself loses nothing.
        assert!(cut(name, CUTS).is_none_or(|losses| !losses.is_empty()), "{name}");
    }
}
