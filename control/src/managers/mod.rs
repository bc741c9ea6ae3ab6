//! Managers among themselves: what carries raft's questions, and who is one.

pub mod membership;
pub mod wire;

pub use wire::{Wire, answer};
