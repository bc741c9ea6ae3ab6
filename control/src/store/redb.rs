//! redb 4 behind [`LogKv`]. Its commits are synced unless they are told otherwise; what is noted is not, and a crash takes it
//! back as a whole.

use std::io;
use std::path::Path;

use redb::{Database, Durability, ReadableDatabase as _, TableDefinition};

use super::folder::sync_dir;
use super::{LogKv, Op, Pair, StoreError, VALUE_BYTES_MAX};

const TABLE: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("log");
const CACHE_BYTES: usize = 16 << 20;

/// A redb database.
#[derive(Debug)]
pub struct RedbKv {
    db: Database,
}

impl RedbKv {
    /// Opens the database in the file `path`; where there is no such file, a database is made first.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |problem: String| StoreError::Open { dir: path.to_owned(), problem };
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        if !path.exists() {
            create(&builder, path).map_err(|error| failed(error.to_string()))?;
        }
        let db = builder.open(path).map_err(|error| failed(error.to_string()))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        sync_dir(folder).map_err(|error| failed(error.to_string()))?;
        Ok(Self { db })
    }

    fn write(&self, ops: Vec<Op>, durability: Durability) -> Result<(), redb::Error> {
        let mut transaction = self.db.begin_write()?;
        transaction.set_durability(durability)?;
        {
            let mut table = transaction.open_table(TABLE)?;
            for op in ops {
                match op {
                    Op::Put(key, value) => {
                        if value.len() > VALUE_BYTES_MAX {
                            let problem =
                                format!("a value of {} bytes exceeds {VALUE_BYTES_MAX}", value.len());
                            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem).into());
                        }
                        table.insert(&key[..], &value[..])?;
                    }
                    Op::Del(key) => drop(table.remove(&key[..])?),
                }
            }
        }
        Ok(transaction.commit()?)
    }

    fn read<T>(
        &self,
        read: impl FnOnce(&redb::ReadOnlyTable<&'static [u8], &'static [u8]>) -> Result<T, redb::Error>,
    ) -> io::Result<T> {
        let read = || read(&self.db.begin_read()?.open_table(TABLE)?);
        read().map_err(io::Error::other)
    }
}

/// Makes a database beside `path`, then moves it there: a crash leaves none, or a whole one.
fn create(builder: &redb::Builder, path: &Path) -> Result<(), redb::Error> {
    let unfinished = path.with_extension("unfinished");
    match std::fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let kv = RedbKv { db: builder.create(&unfinished)? };
    kv.write(Vec::new(), Durability::Immediate)?;
    drop(kv);
    Ok(std::fs::rename(&unfinished, path)?)
}

type Entry<'a> = (redb::AccessGuard<'a, &'static [u8]>, redb::AccessGuard<'a, &'static [u8]>);

fn to_pair((key, value): Entry<'_>) -> Pair {
    (key.value().to_vec(), value.value().to_vec())
}

impl LogKv for RedbKv {
    fn commit(&self, ops: Vec<Op>) -> io::Result<()> {
        self.write(ops, Durability::Immediate).map_err(io::Error::other)
    }

    fn note(&self, ops: Vec<Op>) -> io::Result<()> {
        self.write(ops, Durability::None).map_err(io::Error::other)
    }

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.read(|table| Ok(table.get(key)?.map(|value| value.value().to_vec())))
    }

    fn range(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Vec<Pair>> {
        self.read(|table| {
            let mut pairs = Vec::new();
            for entry in table.range(&from[..]..&to[..])? {
                pairs.push(to_pair(entry?));
            }
            Ok(pairs)
        })
    }

    fn first(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>> {
        self.read(|table| Ok(table.range(&from[..]..&to[..])?.next().transpose()?.map(to_pair)))
    }

    fn last(&self, from: Vec<u8>, to: Vec<u8>) -> io::Result<Option<Pair>> {
        self.read(|table| Ok(table.range(&from[..]..&to[..])?.next_back().transpose()?.map(to_pair)))
    }
}
