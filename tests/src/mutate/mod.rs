//! Mutated packets: what no fixture thought of, on the host library and in the kernel.
//!
//! All that is drawn comes from a seed, in rounds of [`ROUND`] packets: a seed and a round's number give the same packets
//! again. A round's packets come in at one hook of one world, one after the other, on the same tables.

pub mod check;
pub mod kernel;
pub mod layout;
pub mod mutation;
pub mod random;
pub mod rounds;
pub mod starts;
pub mod targets;

#[cfg(test)]
mod tests;

/// Packets of a round.
pub const ROUND: usize = 256;
