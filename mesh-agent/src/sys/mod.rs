//! What the kernel offers without a safe wrapper in the crates at hand, or with one that needs care: the only folder
//! of this crate with `unsafe`.
//!
//! Small functions that are safe to call; no policy.

pub mod bpf;
pub mod clock;
pub mod icmp;
pub mod limits;
pub mod link;
pub mod memory;
pub mod netns;
pub mod pidfd;
pub mod process;
pub mod ring;
pub mod test_run;
#[cfg(test)]
pub(crate) mod testing;
pub mod tun;
