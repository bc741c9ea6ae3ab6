//! What the maps are to hold, and how one content becomes another.

use std::collections::BTreeMap;

use mesh_common::addr::{Address, Ip6};
use mesh_common::be::Be32;
use mesh_common::map::{
    AddrKey, Alias, Backend, Endpoint, Iface, Port, PortKey, RuleKey, Service, TaskKey, TaskSlots,
};

use crate::sys::bpf::Prefix;

/// Declares the maps of a structure, and what is done to each of them alike.
macro_rules! maps {
    ($($(#[$doc:meta])* struct $name:ident $(<$addr:ident: $bound:ident>)? {
        $($(#[$field_doc:meta])* $field:ident: $key:ty => $value:ty,)*
    })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Default)]
        pub struct $name $(<$addr: $bound>)? {
            $($(#[$field_doc])* pub $field: BTreeMap<$key, $value>,)*
        }

        impl $(<$addr: $bound>)? $name $(<$addr>)? {
            /// Leaves in `wanted` what is to be written, and in `held` what is to be removed.
            fn part(held: &mut Self, wanted: &mut Self) {
                $(
                    let former = &held.$field;
                    let unwanted = former.iter().filter(|(key, _)| !wanted.$field.contains_key(key));
                    let unwanted = unwanted.map(|(key, value)| (*key, *value)).collect();
                    wanted.$field.retain(|key, value| former.get(key).is_none_or(|former| *former != *value));
                    held.$field = unwanted;
                )*
            }

            /// Damages each of the maps.
            #[cfg(test)]
            fn damage(&mut self, damage: Damage) {
                $(
                    let values: Vec<_> = self.$field.values().copied().collect();
                    match (damage, self.$field.last_entry()) {
                        (_, None) => {}
                        (Damage::Deleted, Some(entry)) => _ = entry.remove(),
                        (Damage::Changed, Some(mut entry)) => {
                            let other = values.iter().find(|value| *value != entry.get()).copied();
                            entry.insert(other.unwrap_or_default());
                        }
                        (Damage::Added, Some(_)) => _ = self.$field.insert(Default::default(), values[0]),
                    }
                )*
            }

            /// Makes the changes.
            #[cfg(any(test, feature = "simulated"))]
            fn follow(&mut self, set: &Self, removed: &Self) {
                $(
                    for key in removed.$field.keys() {
                        self.$field.remove(key);
                    }
                    self.$field.extend(set.$field.iter().map(|(key, value)| (*key, *value)));
                )*
            }

            /// Adds the entries of `set`, which is to be written, and of `removed`: what any part writes is not removed.
            fn add(all_set: &mut Self, all_removed: &mut Self, set: Self, removed: Self) {
                $(
                    for (key, value) in removed.$field {
                        if !all_set.$field.contains_key(&key) {
                            all_removed.$field.insert(key, value);
                        }
                    }
                    for (key, value) in set.$field {
                        all_removed.$field.remove(&key);
                        all_set.$field.insert(key, value);
                    }
                )*
            }
        }
    )*};
}

maps! {
    /// What the maps of one family hold.
    struct Family<A: Address> {
        /// `shoal_locals4/6`.
        locals: A => u32,
        /// `shoal_rules4/6`.
        rules: Prefix<RuleKey<A>> => u32,
        /// `shoal_vips4/6`.
        vips: AddrKey<A> => u32,
        /// `shoal_backends4/6`.
        backends: u32 => Backend<A>,
        /// `shoal_tasks4/6`.
        tasks: TaskKey => TaskSlots,
        /// `shoal_endpts4/6`.
        endpoints: AddrKey<A> => Endpoint,
        /// `shoal_ifaces4/6`.
        ifaces: u32 => Iface<A>,
        /// `shoal_aliases4/6`.
        aliases: A => Alias<A>,
    }

    /// What the maps hold that are there once.
    struct Common {
        /// `shoal_ports`.
        ports: PortKey => Port,
        /// `shoal_services`.
        services: u32 => Service,
        /// `shoal_members`.
        members: Ip6 => u32,
        /// `shoal_tags`.
        tags: u32 => u32,
        /// `shoal_peers`: the VTEPs. The rest of a peer is the programs'.
        peers: u32 => Ip6,
    }
}

/// What the maps hold, but for the configuration and the places.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contents {
    /// IPv4.
    pub v4: Family<Be32>,
    /// IPv6.
    pub v6: Family<Ip6>,
    /// Both.
    pub common: Common,
}

/// How the maps become what they are to be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    /// What is to be written.
    pub set: Contents,
    /// What is to be removed.
    pub removed: Contents,
}

impl Changes {
    /// What turns `held` into `wanted`.
    pub fn between(mut held: Contents, mut wanted: Contents) -> Self {
        Family::part(&mut held.v4, &mut wanted.v4);
        Family::part(&mut held.v6, &mut wanted.v6);
        Common::part(&mut held.common, &mut wanted.common);
        Self { set: wanted, removed: held }
    }

    /// Adds the changes of another part of the contents. What moves from one part to the other is not removed.
    pub fn add(&mut self, other: Self) {
        let Self { set, removed } = other;
        Family::add(&mut self.set.v4, &mut self.removed.v4, set.v4, removed.v4);
        Family::add(&mut self.set.v6, &mut self.removed.v6, set.v6, removed.v6);
        Common::add(&mut self.set.common, &mut self.removed.common, set.common, removed.common);
    }
}

/// What may have befallen a map.
#[cfg(test)]
#[derive(Debug, Clone, Copy)]
pub(super) enum Damage {
    /// An entry was removed.
    Deleted,
    /// An entry has another's value.
    Changed,
    /// An entry was added.
    Added,
}

#[cfg(test)]
impl Contents {
    /// Damages each of the maps.
    pub(super) fn damage(&mut self, damage: Damage) {
        self.v4.damage(damage);
        self.v6.damage(damage);
        self.common.damage(damage);
    }
}

#[cfg(any(test, feature = "simulated"))]
impl Contents {
    /// Makes changes, as the maps do.
    pub(crate) fn follow(&mut self, changes: &Changes) {
        let Changes { set, removed } = changes;
        self.v4.follow(&set.v4, &removed.v4);
        self.v6.follow(&set.v6, &removed.v6);
        self.common.follow(&set.common, &removed.common);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_tags(tags: &[(u32, u32)]) -> Contents {
        let common = Common { tags: tags.iter().copied().collect(), ..Common::default() };
        Contents { common, ..Contents::default() }
    }

    #[test]
    fn what_differs_is_written_and_what_is_unwanted_removed() {
        let changes =
            Changes::between(with_tags(&[(1, 1), (2, 2), (3, 3)]), with_tags(&[(2, 2), (3, 4), (5, 5)]));
        assert_eq!(changes.set, with_tags(&[(3, 4), (5, 5)]));
        assert_eq!(changes.removed, with_tags(&[(1, 1)]));
    }

    #[test]
    fn an_entry_that_moves_between_parts_stays() {
        let gives = Changes::between(with_tags(&[(1, 1)]), Contents::default());
        let takes = Changes::between(Contents::default(), with_tags(&[(1, 2)]));
        for order in [[&gives, &takes], [&takes, &gives]] {
            let mut changes = Changes::default();
            for part in order {
                changes.add(part.clone());
            }
            assert_eq!(changes.set, with_tags(&[(1, 2)]));
            assert_eq!(changes.removed, Contents::default());
        }
    }
}
