//! What a fuzzer is given to try of this crate, as [`mesh_api::fuzz`] has it: functions of bytes that others send, which panic on
//! what must not be. What comes in WireGuard is GotaTun's or the kernel's to decode.

use mesh_api::fuzz::Target;

pub use crate::dns::fuzz::{dns_answer, dns_question};
pub use crate::node::silent::echo::fuzz as echo;

/// The targets by name.
pub const TARGETS: [(&str, Target); 3] =
    [("dns_question", dns_question), ("dns_answer", dns_answer), ("echo", echo)];

#[cfg(test)]
mod tests {
    use mesh_api::fuzz::corpus;

    use super::*;
    use crate::dns::fuzz::seeds;
    use crate::node::silent::echo::fuzz_seeds;

    #[test]
    fn decoders_bear_what_their_corpus_is_changed_to() {
        let seeds = [seeds::questions(), seeds::answers(), fuzz_seeds()];
        for ((name, target), seeds) in TARGETS.into_iter().zip(seeds) {
            corpus::check(name, target, &seeds);
        }
    }
}
