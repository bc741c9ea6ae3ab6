//! Identifiers, in Docker's form: 25 characters of base 36.

use std::fmt;

use rand::RngExt as _;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The alphabet of identifiers and token parts.
pub(crate) const BASE36: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// Characters in an identifier.
pub const ID_LEN: usize = 25;

/// A fresh identifier's text: [`ID_LEN`] base-36 characters, 124 bits of randomness.
pub fn random(rng: &mut impl rand::Rng) -> String {
    (0..ID_LEN).map(|_| char::from(BASE36[rng.random_range(0..36)])).collect()
}

/// A text of at most [`ID_LEN`] bytes, kept in place: agents hold several for each of 100,000 tasks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Text {
    /// Zeros follow the text, so that texts compare as their bytes do.
    bytes: [u8; ID_LEN],
    len: u8,
}

impl Text {
    const EMPTY: Self = Self { bytes: [0; ID_LEN], len: 0 };

    /// `None` where the text is too long.
    fn new(text: &str) -> Option<Self> {
        let mut bytes = [0; ID_LEN];
        bytes.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        Some(Self { bytes, len: text.len() as u8 })
    }

    fn as_str(&self) -> &str {
        // It was made of a text of this length.
        std::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or_default()
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;

        impl Visitor<'_> for Texts {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an identifier of at most {ID_LEN} bytes")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text, E> {
                Text::new(text).ok_or_else(|| E::invalid_length(text.len(), &self))
            }
        }

        deserializer.deserialize_str(Texts)
    }
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Text);

        impl $name {
            /// A fresh identifier.
            pub fn random(rng: &mut impl rand::Rng) -> Self {
                Self::from(random(rng))
            }

            /// The identifier's text.
            pub fn as_str(&self) -> &str {
                self.0.as_str()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl From<&str> for $name {
            /// A text of more than [`ID_LEN`] bytes names nothing, and becomes the empty identifier, which does so too.
            fn from(text: &str) -> Self {
                Self(Text::new(text).unwrap_or(Text::EMPTY))
            }
        }

        impl From<String> for $name {
            /// As that of `&str`.
            fn from(text: String) -> Self {
                Self::from(text.as_str())
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
    /// A join token beside the cluster's two.
    TokenId;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_texts_in_json_and_in_order() {
        let texts = ["", "0", "0a", "a", "a0", "b", "zzzzzzzzzzzzzzzzzzzzzzzzz"];
        let ids = texts.map(NodeId::from);
        assert!(ids.is_sorted());
        for (id, text) in ids.iter().zip(texts) {
            assert_eq!(id.as_str(), text);
            let json = serde_json::to_string(id).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<NodeId>(&json).unwrap(), *id);
        }
        assert_eq!(serde_json::from_str::<NodeId>(r#""\u0061""#).unwrap(), NodeId::from("a"));
    }

    #[test]
    fn what_is_too_long_names_nothing() {
        let text = "0".repeat(ID_LEN + 1);
        assert_eq!(TaskId::from(text.clone()), TaskId::from(""));
        let error = serde_json::from_str::<TaskId>(&format!("{text:?}")).unwrap_err();
        assert!(error.to_string().contains("at most 25"), "{error}");
    }

    #[test]
    fn fresh_identifiers_differ() {
        let mut rng = rand::rng();
        let [a, b] = [TaskId::random(&mut rng), TaskId::random(&mut rng)];
        assert_ne!(a, b);
        assert_eq!(a.as_str().len(), ID_LEN);
    }
}
