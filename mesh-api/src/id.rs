//! Identifiers, in Docker's form: 25 characters of base 36.

use std::fmt;

use rand::RngExt as _;
use serde::{Deserialize, Serialize};

/// The alphabet of identifiers and token parts.
pub(crate) const BASE36: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// Characters in an identifier.
pub const ID_LEN: usize = 25;

/// A fresh identifier: [`ID_LEN`] base-36 characters, 124 bits of randomness.
pub fn random(rng: &mut impl rand::Rng) -> String {
    (0..ID_LEN).map(|_| char::from(BASE36[rng.random_range(0..36)])).collect()
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl $name {
            /// A fresh identifier.
            pub fn random(rng: &mut impl rand::Rng) -> Self {
                Self(random(rng))
            }

            /// The identifier's text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }
    )*};
}

ids! {
    /// A cluster.
    ClusterId;
    /// A host in the cluster.
    NodeId;
    /// An overlay network.
    NetworkId;
    /// A service.
    ServiceId;
    /// A task: one running instance of a service.
    TaskId;
}
