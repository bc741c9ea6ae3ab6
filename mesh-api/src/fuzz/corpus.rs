//! The corpus of guided fuzzers' targets, in `fuzz/corpus`: it is what they begin with, and runs with the tests of the crates
//! whose decoders it is of, each of its files as it is and many times changed.
//!
//! `SHOAL_WRITE_CORPUS=1` makes these tests write it anew first; files of other names are left, since they are what a fuzzer
//! has found.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use super::Target;
use super::mutation::{Random, mutated};

/// The variable that has the corpus written.
const WRITE: &str = "SHOAL_WRITE_CORPUS";
/// The seed of the mutations here; a guided fuzzer draws others.
const SEED: u64 = 1;
/// Mutations of a target's corpus.
const ROUNDS: usize = 10_000;
/// Fewest files of a target.
const FILES_MIN: usize = 4;

/// Runs a target on its corpus, which begins with `seeds`, and on what that is changed to.
///
/// # Panics
///
/// If the target does, having printed what for; or if the corpus isn't there, or has no sound half any more.
pub fn check(name: &str, target: Target, seeds: &[Vec<u8>]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
    if std::env::var_os(WRITE).is_some() {
        write(&folder, seeds);
    }
    let paths: Vec<PathBuf> = match fs::read_dir(&folder) {
        Ok(files) => files.flatten().map(|file| file.path()).collect(),
        Err(error) => panic!("{}: {error}", folder.display()),
    };
    let mut corpus: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap_or_default()).collect();
    corpus.sort();
    let sound = corpus.iter().filter(|bytes| try_one(name, target, bytes)).count();
    assert!(corpus.len() >= FILES_MIN, "{name}: {} files", corpus.len());
    assert!(
        sound * 2 >= corpus.len(),
        "{name}: {sound} of {} are sound: write them with {WRITE}=1",
        corpus.len()
    );
    let mut random = Random::new(SEED);
    let sound = (0..ROUNDS).filter(|_| try_one(name, target, &mutated(&mut random, &corpus))).count();
    println!("{name}: {} files, {ROUNDS} mutations, {sound} of them sound", corpus.len());
    // All or none of them would try next to nothing.
    assert!((ROUNDS / 1000..ROUNDS).contains(&sound), "{name}: {sound} mutations are sound");
}

fn write(folder: &Path, seeds: &[Vec<u8>]) {
    let written = fs::create_dir_all(folder).and_then(|()| {
        seeds.iter().enumerate().try_for_each(|(at, seed)| fs::write(folder.join(format!("{at:02}")), seed))
    });
    if let Err(error) = written {
        panic!("{}: {error}", folder.display());
    }
}

/// Whether the bytes are sound; prints them if that panics.
fn try_one(name: &str, target: Target, bytes: &[u8]) -> bool {
    match catch_unwind(AssertUnwindSafe(|| target(bytes))) {
        Ok(is_sound) => is_sound,
        Err(panic) => {
            println!("{name}: a panic over {:?}", bytes.escape_ascii().to_string());
            resume_unwind(panic)
        }
    }
}
