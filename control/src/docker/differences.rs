//! What happened to the objects of one kind between two states.

use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;

/// What happened to one object.
#[derive(Debug, Clone)]
pub(super) enum Difference<T> {
    /// It was made.
    Created(Arc<T>),
    /// It was changed.
    Updated {
        /// As it was.
        old: Arc<T>,
        /// As it is.
        new: Arc<T>,
    },
    /// It was removed.
    Removed(Arc<T>),
}

impl<T> Difference<T> {
    /// The object: as it is, or as it was.
    pub(super) fn object(&self) -> &Arc<T> {
        match self {
            Self::Created(object) | Self::Removed(object) | Self::Updated { new: object, old: _ } => object,
        }
    }
}

/// What happened between `old` and `new`, in the order of the keys.
pub(super) fn differences<K, T>(old: &OrdMap<K, Arc<T>>, new: &OrdMap<K, Arc<T>>) -> Vec<Difference<T>>
where
    K: Ord,
    T: PartialEq,
{
    if old.ptr_eq(new) {
        return Vec::new();
    }
    let difference = |item: DiffItem<'_, '_, K, Arc<T>>| match item {
        DiffItem::Add(_, object) => Difference::Created(Arc::clone(object)),
        DiffItem::Update { old: (_, old), new: (_, new) } => {
            Difference::Updated { old: Arc::clone(old), new: Arc::clone(new) }
        }
        DiffItem::Remove(_, object) => Difference::Removed(Arc::clone(object)),
    };
    old.diff(new).map(difference).collect()
}
