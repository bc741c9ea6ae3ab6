//! WireGuard between nodes, below the VXLAN of encrypted networks: what a node tells the others of its keys.
//!
//! Nothing is allocated: an identity's address inside of WireGuard follows from its public key, and a peer may use that
//! address alone.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use base64::engine::general_purpose::STANDARD;
use base64::{DecodeError, Engine as _};
use ipnet::Ipv6Net;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where the addresses of identities lie.
pub const WIREGUARD_NET: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd73, 0x686f, 0x616c, 2, 0, 0, 0, 0), 64);

/// The UDP ports that WireGuard listens on: a node's identities take turns.
pub const WIREGUARD_PORTS: [u16; 2] = [51820, 51821];

/// Most identities that a node has at a time: the one that it sends from, and one that it comes from or goes to.
pub const WIREGUARD_IDENTITIES_MAX: usize = 2;

/// Bytes of a key.
const KEY_LEN: usize = 32;

/// A public key, an X25519 point. Its text, in JSON as well, is the one that WireGuard's tools print: base64.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WireguardKey([u8; KEY_LEN]);

/// A text that is not a WireGuard key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MalformedKey {
    /// It is not base64.
    #[error("a WireGuard key is 44 characters of base64, the last of them `=`: {0}")]
    Text(#[from] DecodeError),
    /// It is the base64 of something shorter or longer.
    #[error("a WireGuard key is 44 characters of base64, for 32 bytes; this has {0} bytes")]
    Length(usize),
}

impl WireguardKey {
    /// The key's bytes.
    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }
}

impl From<[u8; KEY_LEN]> for WireguardKey {
    fn from(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for WireguardKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for WireguardKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for WireguardKey {
    type Err = MalformedKey;

    fn from_str(text: &str) -> Result<Self, MalformedKey> {
        let bytes = STANDARD.decode(text)?;
        let key = bytes.as_slice().try_into().map_err(|_| MalformedKey::Length(bytes.len()))?;
        Ok(Self(key))
    }
}

impl Serialize for WireguardKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for WireguardKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;

        impl Visitor<'_> for Keys {
            type Value = WireguardKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a WireGuard key in base64")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<WireguardKey, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_str(Keys)
    }
}

/// A key of a node, and where the node listens for those who use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WireguardIdentity {
    /// The public key.
    pub public_key: WireguardKey,
    /// The UDP port that its device listens on, at the node's data path address; one of [`WIREGUARD_PORTS`] by default.
    pub port: u16,
}

impl WireguardIdentity {
    /// The identity's address inside of WireGuard: [`WIREGUARD_NET`]'s prefix, and the key's first eight bytes.
    pub fn address(&self) -> Ipv6Addr {
        let beginning = self.public_key.as_bytes().iter().take(8);
        let interface = beginning.fold(0, |bits, byte| bits << 8 | u128::from(*byte));
        Ipv6Addr::from_bits(WIREGUARD_NET.addr().to_bits() | interface)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The public key of Alice in RFC 7748, section 6.1, and its base64 by `base64(1)`.
    const BYTES: [u8; 32] = [
        0x85, 0x20, 0xf0, 0x09, 0x89, 0x30, 0xa7, 0x54, 0x74, 0x8b, 0x7d, 0xdc, 0xb4, 0x3e, 0xf7, 0x5a, 0x0d,
        0xbf, 0x3a, 0x0d, 0x26, 0x38, 0x1a, 0xf4, 0xeb, 0xa4, 0xa9, 0x8e, 0xaa, 0x9b, 0x4e, 0x6a,
    ];
    const TEXT: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";

    #[test]
    fn a_key_is_base64_as_wireguard_prints_it() {
        let key = WireguardKey::from(BYTES);
        assert_eq!((key.to_string().as_str(), format!("{key:?}").as_str()), (TEXT, TEXT));
        assert_eq!(TEXT.parse(), Ok(key));
        let json = serde_json::to_string(&key).unwrap();
        assert_eq!(json, format!("{TEXT:?}"));
        assert_eq!(serde_json::from_str::<WireguardKey>(&json).unwrap(), key);
    }

    #[test]
    fn every_byte_reads_back_at_every_place() {
        for place in 0..KEY_LEN {
            for byte in 0..=u8::MAX {
                let mut bytes = [0xa5; KEY_LEN];
                bytes[place] = byte;
                let key = WireguardKey::from(bytes);
                assert_eq!(key.to_string().parse(), Ok(key));
            }
        }
    }

    #[test]
    fn other_texts_are_refused() {
        let last = DecodeError::InvalidLastSymbol { offset: 42, symbol: b'p', symbol_value: 41 };
        for (text, error) in [
            (String::new(), MalformedKey::Length(0)),
            (TEXT.replace("Tmo=", ""), MalformedKey::Length(30)),
            (TEXT.replace('=', "A"), MalformedKey::Length(33)),
            (TEXT.replace('=', ""), DecodeError::InvalidPadding.into()),
            (format!("{TEXT}="), DecodeError::InvalidByte(43, b'=').into()),
            (TEXT.replace('/', "_"), DecodeError::InvalidByte(23, b'_').into()),
            (TEXT.replace("o=", "p="), last.into()),
        ] {
            assert_eq!(text.parse::<WireguardKey>(), Err(error), "{text}");
        }
        let error = serde_json::from_str::<WireguardKey>("\"AAAA\"").unwrap_err();
        assert!(error.to_string().contains("44 characters"), "{error}");
    }

    #[test]
    fn an_identity_s_address_begins_with_the_net_and_ends_with_the_key_s_beginning() {
        let identity = WireguardIdentity { public_key: BYTES.into(), port: WIREGUARD_PORTS[0] };
        let address: Ipv6Addr = "fd73:686f:616c:2:8520:f009:8930:a754".parse().unwrap();
        assert_eq!(identity.address(), address);
        assert!(WIREGUARD_NET.contains(&address));
    }
}
