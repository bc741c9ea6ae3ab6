//! Integers in network byte order, naturally aligned.
//!
//! zerocopy's own big-endian integers have alignment 1, which makes the verifier walk byte loads; these load in one
//! instruction and swap only where a value is computed with.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! big_endian {
    ($(#[$doc:meta])* $name:ident, $native:ty, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(transparent)]
        pub struct $name($native);

        impl $name {
            /// From a number in host order.
            #[inline(always)]
            pub const fn new(value: $native) -> Self {
                Self(value.to_be())
            }

            /// The number in host order.
            #[inline(always)]
            pub const fn get(self) -> $native {
                <$native>::from_be(self.0)
            }

            /// The bits as they lie in memory.
            #[inline(always)]
            pub const fn raw(self) -> $native {
                self.0
            }

            /// The bytes on the wire.
            #[inline(always)]
            pub const fn to_bytes(self) -> [u8; $bytes] {
                self.0.to_ne_bytes()
            }

            /// From the bytes on the wire.
            #[inline(always)]
            pub const fn from_bytes(bytes: [u8; $bytes]) -> Self {
                Self(<$native>::from_ne_bytes(bytes))
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{:#x}", self.get())
            }
        }
    };
}

big_endian! {
    /// A 16-bit number in network order: a port, an EtherType, a length.
    Be16, u16, 2
}
big_endian! {
    /// A 32-bit number in network order: an IPv4 address, a sequence number.
    Be32, u32, 4
}

impl Be32 {
    /// An IPv4 address from its four parts.
    #[inline(always)]
    pub const fn ipv4(a: u8, b: u8, c: u8, d: u8) -> Self {
        Self::from_bytes([a, b, c, d])
    }
}

impl From<core::net::Ipv4Addr> for Be32 {
    fn from(addr: core::net::Ipv4Addr) -> Self {
        Self::from_bytes(addr.octets())
    }
}

impl From<Be32> for core::net::Ipv4Addr {
    fn from(addr: Be32) -> Self {
        addr.to_bytes().into()
    }
}
