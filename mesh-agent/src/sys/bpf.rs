//! Reading and writing BPF maps many entries at a time: aya has single elements only, which take a call each.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use aya::Pod;
use nix::errno::Errno;

/// Commands of bpf(2), `enum bpf_cmd` in linux/bpf.h.
const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const MAP_LOOKUP_AND_DELETE_ELEM: libc::c_long = 21;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
const MAP_UPDATE_BATCH: libc::c_long = 26;
const MAP_DELETE_BATCH: libc::c_long = 27;

/// `BPF_ANY`, `BPF_NOEXIST`.
const ANY: u64 = 0;
const NO_EXIST: u64 = 1;

/// Entries that are read in one call.
const READ_CHUNK: usize = 4096;
/// Entries that are written in one call.
const WRITE_CHUNK: usize = 16_384;
/// Fewer entries than this are written one by one: a batch costs the kernel more to begin with.
const BATCH_MIN: usize = 4;

/// `struct { ... } batch` of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// The anonymous struct of `union bpf_attr` for single elements.
#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// A key of a map for longest prefixes: how many bits of `key` count, and the bits, highest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(C)]
pub struct Prefix<K> {
    /// Bits that count.
    pub len: u32,
    /// All bits.
    pub key: K,
}

// SAFETY: Keys are structures of 32-bit words, so there is no padding between the two, nor behind; any bytes are one.
unsafe impl<K: Pod> Pod for Prefix<K> {}

/// Writes `entries`; on an error, those before the one that failed are written.
pub fn update<K: Pod, V: Pod>(map: BorrowedFd<'_>, entries: &[(K, V)]) -> io::Result<()> {
    if entries.len() < BATCH_MIN {
        return entries.iter().try_for_each(|(key, value)| update_one(map, key, value));
    }
    for chunk in entries.chunks(WRITE_CHUNK) {
        let (keys, values): (Vec<K>, Vec<V>) = chunk.iter().copied().unzip();
        let mut attr = BatchAttr {
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count: chunk.len() as u32,
            map_fd: map.as_raw_fd().cast_unsigned(),
            ..BatchAttr::default()
        };
        // SAFETY: the kernel reads `count` keys and values of the map's sizes, which the callers' types have.
        if unsafe { batch(MAP_UPDATE_BATCH, &mut attr) }.is_err() {
            // One by one, to find the one that is refused, and why.
            let done = done(&attr, chunk.len());
            chunk[done..].iter().try_for_each(|(key, value)| update_one(map, key, value))?;
        }
    }
    Ok(())
}

/// Removes the entries of `keys`; keys that have none are no error.
pub fn remove<K: Pod>(map: BorrowedFd<'_>, keys: &[K]) -> io::Result<()> {
    if keys.len() < BATCH_MIN {
        return keys.iter().try_for_each(|key| remove_one(map, key));
    }
    for chunk in keys.chunks(WRITE_CHUNK) {
        let mut attr = BatchAttr {
            keys: chunk.as_ptr() as u64,
            count: chunk.len() as u32,
            map_fd: map.as_raw_fd().cast_unsigned(),
            ..BatchAttr::default()
        };
        // SAFETY: the kernel reads `count` keys of the map's size, which the callers' type has.
        if unsafe { batch(MAP_DELETE_BATCH, &mut attr) }.is_err() {
            // It stops where there is no entry.
            let done = done(&attr, chunk.len());
            chunk[done..].iter().try_for_each(|key| remove_one(map, key))?;
        }
    }
    Ok(())
}

/// Hands every entry of a map to `each`. A map that is written meanwhile may show entries twice, or not.
pub fn read<K: Pod, V: Pod>(map: BorrowedFd<'_>, mut each: impl FnMut(K, V)) -> io::Result<()> {
    read_from(map, None::<&K>, READ_CHUNK, |key, value| {
        each(key, value);
        true
    })
}

/// The elements of an array from `start` on, at most `len` of them.
pub fn read_array<V: Pod>(map: BorrowedFd<'_>, start: u32, len: u32) -> io::Result<Vec<V>> {
    let mut values = Vec::new();
    if len > 0 {
        // The batch goes on behind the element that it is told.
        let behind = start.checked_sub(1);
        read_from(map, behind.as_ref(), READ_CHUNK.min(len as usize), |_: u32, value| {
            values.push(value);
            values.len() < len as usize
        })?;
    }
    Ok(values)
}

/// Copies all entries of a map to another, whose keys and values have the same sizes in bytes; returns how many.
pub fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>, key_size: u32, value_size: u32) -> io::Result<usize> {
    let mut copied = 0;
    let sizes = [key_size as usize, value_size as usize];
    let copy = |keys: &[u8], values: &[u8], count: usize| {
        let mut attr = BatchAttr {
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count: count as u32,
            map_fd: to.as_raw_fd().cast_unsigned(),
            ..BatchAttr::default()
        };
        copied += count;
        if count > 0 {
            // SAFETY: the kernel reads `count` keys and values of the sizes that both maps have.
            unsafe { batch(MAP_UPDATE_BATCH, &mut attr) }?;
        }
        Ok(true)
    };
    // SAFETY: from the beginning.
    unsafe { read_chunks(from, sizes, 0, READ_CHUNK, copy) }?;
    Ok(copied)
}

/// The value of `key`.
pub fn lookup<K: Pod, V: Pod + Default>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    value_of(MAP_LOOKUP_ELEM, map, key)
}

/// Removes the entry of `key`, and gives its value.
pub fn take<K: Pod, V: Pod + Default>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    value_of(MAP_LOOKUP_AND_DELETE_ELEM, map, key)
}

/// Writes an entry, unless the key has one: `false` then.
pub fn insert_new<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<bool> {
    match set_value(map, key, value, NO_EXIST) {
        Ok(()) => Ok(true),
        Err(Errno::EEXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn value_of<K: Pod, V: Pod + Default>(
    command: libc::c_long,
    map: BorrowedFd<'_>,
    key: &K,
) -> io::Result<Option<V>> {
    let mut value = V::default();
    let attr = ElementAttr {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: std::ptr::from_ref(key) as u64,
        value: std::ptr::from_mut(&mut value) as u64,
        ..ElementAttr::default()
    };
    // SAFETY: the kernel reads a key and writes a value of the map's sizes, which the callers' types have.
    match unsafe { element(command, &attr) } {
        Ok(()) => Ok(Some(value)),
        Err(Errno::ENOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn update_one<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    Ok(set_value(map, key, value, ANY)?)
}

fn set_value<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V, flags: u64) -> Result<(), Errno> {
    let attr = ElementAttr {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: std::ptr::from_ref(key) as u64,
        value: std::ptr::from_ref(value) as u64,
        flags,
        ..ElementAttr::default()
    };
    // SAFETY: the kernel reads a key and a value of the map's sizes, which the callers' types have.
    unsafe { element(MAP_UPDATE_ELEM, &attr) }
}

fn remove_one<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    let attr = ElementAttr {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: std::ptr::from_ref(key) as u64,
        ..ElementAttr::default()
    };
    // SAFETY: the kernel reads a key of the map's size, which the callers' type has.
    match unsafe { element(MAP_DELETE_ELEM, &attr) } {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn read_from<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    behind: Option<&K>,
    chunk: usize,
    mut each: impl FnMut(K, V) -> bool,
) -> io::Result<()> {
    let sizes = [size_of::<K>(), size_of::<V>()];
    let each = |keys: &[u8], values: &[u8], count: usize| {
        let (keys, values) = (keys.as_ptr().cast::<K>(), values.as_ptr().cast::<V>());
        for index in 0..count {
            // SAFETY: the bytes are those of `count` keys.
            let key = unsafe { keys.add(index) };
            // SAFETY: likewise.
            let value = unsafe { values.add(index) };
            // SAFETY: any bytes are a key.
            let key = unsafe { key.read_unaligned() };
            // SAFETY: any bytes are a value.
            let value = unsafe { value.read_unaligned() };
            if !each(key, value) {
                return Ok(false);
            }
        }
        Ok(true)
    };
    let behind = behind.map_or(0, |key| std::ptr::from_ref(key) as u64);
    // SAFETY: a key of the map's type, or none.
    unsafe { read_chunks(map, sizes, behind, chunk, each) }
}

/// Hands the entries behind the key at the address `from` to `each`, so many at a time, as bytes with their number,
/// until it has enough; all of them if the address is 0.
///
/// # Safety
///
/// The address must be that of a key, and the sizes those of the map's keys and values.
unsafe fn read_chunks(
    map: BorrowedFd<'_>,
    [key_size, value_size]: [usize; 2],
    mut from: u64,
    mut chunk: usize,
    mut each: impl FnMut(&[u8], &[u8], usize) -> io::Result<bool>,
) -> io::Result<()> {
    // A hash map's cursor has four bytes, another map's is a key.
    let mut cursor = vec![0_u8; key_size.max(size_of::<u64>())];
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    loop {
        keys.resize(key_size * chunk, 0_u8);
        values.resize(value_size * chunk, 0_u8);
        let mut attr = BatchAttr {
            in_batch: from,
            out_batch: cursor.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: chunk as u32,
            map_fd: map.as_raw_fd().cast_unsigned(),
            ..BatchAttr::default()
        };
        // SAFETY: there is room for `count` keys and values, and for a cursor; `in_batch` is null, a key or a cursor.
        let last = match unsafe { batch(MAP_LOOKUP_BATCH, &mut attr) } {
            Ok(()) => false,
            Err(Errno::ENOENT) => true,
            // A bucket of a hash map holds more than that.
            Err(Errno::ENOSPC) => {
                chunk *= 2;
                continue;
            }
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        };
        from = cursor.as_ptr() as u64;
        if !each(&keys, &values, done(&attr, chunk))? || last {
            return Ok(());
        }
    }
}

/// How many of `count` entries the kernel got through.
fn done(attr: &BatchAttr, count: usize) -> usize {
    (attr.count as usize).min(count)
}

/// # Safety
///
/// The attribute's addresses must be good for what the command reads and writes.
unsafe fn batch(command: libc::c_long, attr: &mut BatchAttr) -> Result<(), Errno> {
    let attr = std::ptr::from_mut(attr);
    // SAFETY: the caller's; the kernel writes `count` of the attribute.
    Errno::result(unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<BatchAttr>()) }).map(drop)
}

/// # Safety
///
/// As of [`batch`].
unsafe fn element(command: libc::c_long, attr: &ElementAttr) -> Result<(), Errno> {
    let attr = std::ptr::from_ref(attr);
    // SAFETY: the caller's.
    Errno::result(unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<ElementAttr>()) }).map(drop)
}
