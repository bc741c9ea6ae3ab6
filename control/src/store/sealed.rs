//! A [`LogKv`] that seals its values, each under its key: none of them can be read, changed, or put in another's place.
//! Keys (kinds of records, and indexes) are in the clear.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use mesh_api::seal::{Seal, SealError};

use super::keys::Keys;
use super::sled::MARKER_KEY;
use super::{LogKv, Op, Pair};

/// Values sealed anew at once.
const CHUNK: usize = 256;

/// An engine whose values are sealed.
#[derive(Debug)]
pub struct SealedKv {
    kv: Box<dyn LogKv>,
    keys: Arc<Keys>,
    /// Held while something is written: what is sealed anew must not take a newer value's place.
    writing: Mutex<()>,
}

impl SealedKv {
    /// Over an engine.
    pub fn new(kv: Box<dyn LogKv>, keys: Arc<Keys>) -> Self {
        Self { kv, keys, writing: Mutex::new(()) }
    }

    fn sealed(&self, ops: Vec<Op>) -> Vec<Op> {
        let seal = self.keys.seal();
        let sealed = |op| match op {
            Op::Put(key, value) => {
                let value = seal.seal(&name(&key), &value);
                Op::Put(key, value)
            }
            Op::Del(key) => Op::Del(key),
        };
        ops.into_iter().map(sealed).collect()
    }
}

/// What a value is sealed under.
fn name(key: &[u8]) -> Vec<u8> {
    [b"log ", key].concat()
}

fn open(seal: &Seal, (key, value): Pair) -> io::Result<Pair> {
    let plain = seal.open(&name(&key), &value).map_err(|error| damaged(&key, error))?;
    Ok((key, plain))
}

fn damaged(key: &[u8], error: SealError) -> io::Error {
    let (name, remedy) = (key.escape_ascii(), "move the manager's folder aside and join the swarm again");
    io::Error::new(io::ErrorKind::InvalidData, format!("the record {name}: {error}: {remedy}"))
}

impl LogKv for SealedKv {
    fn commit(&self, ops: Vec<Op>) -> io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.kv.commit(self.sealed(ops))
    }

    fn note(&self, ops: Vec<Op>) -> io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.kv.note(self.sealed(ops))
    }

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let Some(value) = self.kv.get(key)? else { return Ok(None) };
        self.keys.seal().open(&name(key), &value).map(Some).map_err(|error| damaged(key, error))
    }

    fn range(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Vec<Pair>> {
        let pairs = self.kv.range(from, to)?;
        // Taken after the reading, it opens also what was sealed anew meanwhile.
        let seal = self.keys.seal();
        pairs.into_iter().map(|pair| open(&seal, pair)).collect()
    }

    fn first(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>> {
        self.kv.first(from, to)?.map(|pair| open(&self.keys.seal(), pair)).transpose()
    }

    fn last(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>> {
        self.kv.last(from, to)?.map(|pair| open(&self.keys.seal(), pair)).transpose()
    }

    fn seal_anew(&self) -> io::Result<()> {
        let mut from = Vec::new();
        loop {
            let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            let seal = self.keys.seal();
            let mut ops = Vec::new();
            for _ in 0..CHUNK {
                let Some((key, value)) = self.kv.first(from, vec![u8::MAX])? else {
                    from = Vec::new();
                    break;
                };
                from = [&key[..], &[0]].concat();
                if key == MARKER_KEY {
                    continue;
                }
                let name = name(&key);
                let (plain, is_present) =
                    seal.open_told(&name, &value).map_err(|error| damaged(&key, error))?;
                if !is_present {
                    ops.push(Op::Put(key, seal.seal(&name, &plain)));
                }
            }
            if !ops.is_empty() {
                self.kv.commit(ops)?;
            }
            if from.is_empty() {
                return Ok(());
            }
        }
    }
}
