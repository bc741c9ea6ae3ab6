//! What Shoal's agents and managers say to each other: identifiers, the table as agents see it, and the session
//! that carries it.
//!
//! These are wire types: they derive serde and hold no logic beyond keeping a [`table::Table`] up to date. The model
//! that managers replicate is `control`'s, the ABI with the BPF programs is `mesh-common`'s; neither appears here.

pub mod attachment;
pub mod codec;
pub mod error;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod health;
pub mod id;
pub mod seal;
pub mod session;
pub mod table;
pub mod tls;
pub mod token;
pub mod wireguard;
