//! Node-local alias addresses: one for each endpoint on this node, from 169.254.64.3 up.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use crate::links::{HOST_ADDR, HOST_PREFIX, MESH_ADDR};

/// Gives out aliases, each of which is one endpoint's at a time.
///
/// The next one follows the last one given, round the range: the host's connection tracker may still know an alias
/// of a task that has just ended.
#[derive(Debug, Default)]
pub(super) struct Aliases {
    used: BTreeSet<u32>,
    last: u32,
}

/// Aliases in the range, numbered from 1: without the network's own address, the host's, the mesh address and the
/// broadcast address.
const COUNT: u32 = (1 << (32 - HOST_PREFIX)) - 4;

const _: () = assert!(MESH_ADDR.to_bits() == HOST_ADDR.to_bits() + 1, "aliases follow both");

impl Aliases {
    /// An alias that nobody has; `None` when all are taken.
    pub(super) fn take(&mut self) -> Option<Ipv4Addr> {
        let candidates = (0..COUNT).map(|step| (self.last + step) % COUNT + 1);
        let free = candidates.into_iter().find(|number| !self.used.contains(number))?;
        self.used.insert(free);
        self.last = free;
        Some(Ipv4Addr::from_bits(MESH_ADDR.to_bits() + free))
    }

    /// Marks an alias of an earlier run as taken. False for an address that is not one, which an earlier version may
    /// have given out: the endpoint needs another.
    pub(super) fn adopt(&mut self, alias: Ipv4Addr) -> bool {
        let Some(number) = number(alias) else { return false };
        self.used.insert(number);
        self.last = self.last.max(number);
        true
    }

    /// Gives an alias back.
    pub(super) fn release(&mut self, alias: Ipv4Addr) {
        if let Some(number) = number(alias) {
            self.used.remove(&number);
        }
    }
}

fn number(alias: Ipv4Addr) -> Option<u32> {
    alias.to_bits().checked_sub(MESH_ADDR.to_bits()).filter(|number| (1..=COUNT).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 3);

    #[test]
    fn aliases_start_after_the_mesh_address_and_are_not_given_again_at_once() {
        let mut aliases = Aliases::default();
        assert_eq!(aliases.take(), Some(FIRST));
        aliases.release(FIRST);
        assert_eq!(aliases.take(), Some(Ipv4Addr::new(169, 254, 64, 4)));
    }

    #[test]
    fn adopted_aliases_are_skipped_and_other_addresses_are_none() {
        let mut aliases = Aliases::default();
        assert!(aliases.adopt(Ipv4Addr::new(169, 254, 64, 7)));
        assert_eq!(aliases.take(), Some(Ipv4Addr::new(169, 254, 64, 8)));
        for other in [HOST_ADDR, MESH_ADDR, Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(169, 254, 127, 255)] {
            assert!(!aliases.adopt(other), "{other}");
        }
    }

    #[test]
    fn the_whole_range_is_used_once_and_no_more() {
        let mut aliases = Aliases::default();
        let taken: BTreeSet<_> = std::iter::from_fn(|| aliases.take()).collect();
        assert_eq!(taken.len(), COUNT as usize);
        assert_eq!(taken.first(), Some(&FIRST));
        assert_eq!(taken.last(), Some(&Ipv4Addr::new(169, 254, 127, 254)));
        aliases.release(FIRST);
        assert_eq!(aliases.take(), Some(FIRST));
    }
}
