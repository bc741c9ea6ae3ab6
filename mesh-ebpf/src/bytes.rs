//! A packet in a vector, for user space and for tests.

extern crate alloc;

use alloc::vec::Vec;

use mesh_common::addr::Ip6;
use mesh_common::be::Be16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::checksum;
use crate::header::IP_OFFSET;
use crate::packet::{Fault, Field, Packet, Resize, Reuse, Rewrite, Store};

/// What is where nobody has stored anything.
const UNDEFINED: u8 = 0xaa;

/// A packet in a vector.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Bytes {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// See [`Packet::segment_len`].
    pub segment_len: u32,
    /// Refuses every store, as the kernel may.
    pub read_only: bool,
    /// Where a later stage sums from, and where behind that it stores the checksum: see [`Reuse::is_checksum_deferred`].
    pub deferred: Option<(usize, usize)>,
}

impl Bytes {
    /// A packet that can be written, whole and with all of its checksums.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, ..Self::default() }
    }

    fn patch(&mut self, offset: usize, change: impl FnOnce(Be16) -> Be16) -> Result<(), Fault> {
        let checksum = self.load::<Be16>(offset).ok_or(Fault)?;
        self.store(offset, &change(checksum))
    }

    fn patch6(&mut self, offset: usize, from: &Ip6, to: &Ip6, udp: bool) -> Result<(), Fault> {
        for (from, to) in from.0.iter().zip(&to.0) {
            self.patch(offset, |old| checksum::patch_l4(old, from.raw(), to.raw(), udp))?;
        }
        Ok(())
    }

    fn insert(&mut self, offset: usize, bytes: u32) {
        self.bytes.splice(offset..offset, core::iter::repeat_n(UNDEFINED, bytes as usize));
        self.deferred = self.deferred.map(|(start, behind)| (start + bytes as usize, behind));
    }
}

impl Packet for Bytes {
    fn len(&self) -> u32 {
        self.bytes.len() as u32
    }

    fn load<T: FromBytes + Immutable + KnownLayout + Copy>(&self, offset: usize) -> Option<T> {
        T::read_from_prefix(self.bytes.get(offset..)?).ok().map(|(value, _)| value)
    }

    fn segment_len(&self) -> u32 {
        self.segment_len
    }
}

impl Store for Bytes {
    fn store<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Result<(), Fault> {
        if self.read_only {
            return Err(Fault);
        }
        let to = self.bytes.get_mut(offset..offset + size_of::<T>()).ok_or(Fault)?;
        to.copy_from_slice(value.as_bytes());
        Ok(())
    }
}

impl Rewrite for Bytes {
    fn patch_ip_checksum(&mut self, offset: usize, from: u32, to: u32) -> Result<(), Fault> {
        self.patch(offset, |old| checksum::patch(old, from, to))
    }

    fn patch_l4_checksum(
        &mut self,
        offset: usize,
        from: u32,
        to: u32,
        _: Field,
        udp: bool,
    ) -> Result<(), Fault> {
        self.patch(offset, |old| checksum::patch_l4(old, from, to, udp))
    }

    fn patch_l4_address6(&mut self, offset: usize, from: &Ip6, to: &Ip6, udp: bool) -> Result<(), Fault> {
        self.patch6(offset, from, to, udp)
    }

    fn patch_l4_payload6(&mut self, offset: usize, from: &Ip6, to: &Ip6) -> Result<(), Fault> {
        self.patch6(offset, from, to, false)
    }
}

impl Reuse for Bytes {
    fn set_len(&mut self, len: u32) -> Result<(), Fault> {
        // As the kernel: the place of a deferred checksum can't be cut off.
        if self.deferred.is_some_and(|(start, offset)| (len as usize) < start + offset + 2) {
            return Err(Fault);
        }
        self.bytes.resize(len as usize, UNDEFINED);
        self.segment_len = 0;
        Ok(())
    }

    fn is_checksum_deferred(&mut self, offset: usize) -> bool {
        self.deferred.is_some_and(|(start, behind)| start + behind == offset)
    }

    fn insert_header(&mut self, bytes: u32) -> Result<(), Fault> {
        self.insert(IP_OFFSET, bytes);
        Ok(())
    }
}

impl Resize for Bytes {
    fn grow(&mut self, bytes: u32) -> Result<(), Fault> {
        self.insert(0, bytes);
        Ok(())
    }

    fn shrink(&mut self, bytes: u32) -> Result<(), Fault> {
        self.bytes.drain(..bytes as usize);
        Ok(())
    }
}
