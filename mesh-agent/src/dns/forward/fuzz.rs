//! What a fuzzer is given to try of what resolvers answer.

use std::time::Instant;

use hickory_proto::op::Message;
use hickory_proto::rr::{Name, RecordType};

use super::cache::Cache;
use super::question::{Question, decode};

fn question() -> Question {
    let name = Name::from_labels(["example", "com"]).unwrap_or_default();
    Question { name, record_type: RecordType::A, dnssec_ok: true, checking_disabled: false }
}

/// A question under the id of `answer`, and that, if it is an answer to it.
pub(in crate::dns) fn decoded(answer: &[u8]) -> Option<(Message, Message)> {
    let mut asked = question().message(true);
    asked.metadata.id = u16::from_be_bytes(*answer.first_chunk()?);
    let decoded = decode(answer, &asked).ok()?;
    Some((asked, decoded))
}

/// The answer, as it is held for others who ask.
pub(in crate::dns) fn held(answer: &Message, now: Instant) -> Option<Message> {
    let (cache, asked) = (Cache::new(), question());
    cache.insert(&asked, answer, now);
    cache.get(&asked, now)
}
