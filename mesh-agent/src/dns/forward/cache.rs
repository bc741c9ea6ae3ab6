//! Answers of the host's resolvers, for as long as they say.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, RecordType};
use moka::sync::Cache as Moka;

use super::question::Question;

/// What is held at most, bytes.
const BYTES_MAX: u64 = 4 << 20;
/// What an entry takes beside its message, bytes, roughly.
const ENTRY_BYTES: u32 = 512;
/// The longest that an answer is held, s, whatever it says.
const TTL_MAX_S: u32 = 3600;
/// The longest that "no" is held, s.
const NEGATIVE_TTL_MAX_S: u32 = 300;

/// The cache. A flood of questions does not drive out what is often asked for.
#[derive(Debug)]
pub(super) struct Cache {
    entries: Moka<Question, Arc<Entry>>,
}

#[derive(Debug)]
struct Entry {
    message: Vec<u8>,
    at: Instant,
    ttl: Duration,
}

impl Cache {
    pub(super) fn new() -> Self {
        let bytes = |_: &Question, entry: &Arc<Entry>| entry.message.len() as u32 + ENTRY_BYTES;
        let entries = Moka::builder().max_capacity(BYTES_MAX).weigher(bytes);
        Self { entries: entries.time_to_live(Duration::from_secs(TTL_MAX_S.into())).build() }
    }

    /// The answer, with what is left of its records' time to live.
    pub(super) fn get(&self, question: &Question, now: Instant) -> Option<Message> {
        let entry = self.entries.get(question)?;
        let age = now.saturating_duration_since(entry.at);
        if age >= entry.ttl {
            return None;
        }
        let mut message = Message::from_vec(&entry.message).ok()?;
        let Message { answers, authorities, additionals, .. } = &mut message;
        for record in answers.iter_mut().chain(authorities).chain(additionals) {
            record.ttl = record.ttl.saturating_sub(age.as_secs() as u32);
        }
        Some(message)
    }

    /// Keeps an answer, if it says for how long.
    pub(super) fn insert(&self, question: &Question, answer: &Message, now: Instant) {
        let Some(ttl_s) = ttl_s(question.record_type, answer).filter(|ttl_s| *ttl_s > 0) else { return };
        let Ok(message) = answer.to_vec() else { return };
        let entry = Entry { message, at: now, ttl: Duration::from_secs(ttl_s.into()) };
        self.entries.insert(question.clone(), Arc::new(entry));
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        self.entries.invalidate_all();
    }
}

/// How long an answer holds, s: as long as the first of its records; "no" as long as the zone says (RFC 2308).
fn ttl_s(record_type: RecordType, answer: &Message) -> Option<u32> {
    let code = answer.metadata.response_code;
    if !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
        return None;
    }
    let shortest = answer.answers.iter().map(|record| record.ttl).min();
    let has_it = |found| found == record_type || record_type == RecordType::ANY;
    if code == ResponseCode::NoError && answer.answers.iter().any(|record| has_it(record.record_type())) {
        return shortest.map(|ttl_s| ttl_s.min(TTL_MAX_S));
    }
    let soa = answer.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
        _ => None,
    });
    Some(soa?.min(shortest.unwrap_or(u32::MAX)).min(NEGATIVE_TTL_MAX_S))
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::rdata::{A, CNAME, SOA};
    use hickory_proto::rr::{Name, Record};

    use super::super::question::tests::question;
    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn address(owner: &str, ttl_s: u32) -> Record {
        Record::from_rdata(name(owner), ttl_s, RData::A(A::new(192, 0, 2, 1)))
    }

    fn alias(ttl_s: u32) -> Record {
        Record::from_rdata(name("example.com."), ttl_s, RData::CNAME(CNAME(name("other.example."))))
    }

    fn soa(ttl_s: u32, minimum: u32) -> Record {
        let soa = SOA::new(name("ns."), name("me."), 1, 1, 1, 1, minimum);
        Record::from_rdata(name("com."), ttl_s, RData::SOA(soa))
    }

    fn answer(code: ResponseCode, answers: Vec<Record>, authorities: Vec<Record>) -> Message {
        let mut message = question("example.com.").message(false).into_response();
        message.metadata.response_code = code;
        (message.answers, message.authorities) = (answers, authorities);
        message
    }

    #[test]
    fn answers_are_held_for_as_long_as_they_say() {
        use ResponseCode::{NXDomain, NoError, Refused, ServFail};
        let cases = [
            (NoError, vec![address("example.com.", 30), address("example.com.", 20)], vec![], Some(20)),
            (NoError, vec![alias(10), address("other.example.", 300)], vec![], Some(10)),
            (NoError, vec![address("example.com.", 900_000)], vec![soa(1, 1)], Some(TTL_MAX_S)),
            (NoError, vec![], vec![soa(60, 20)], Some(20)),
            (NoError, vec![alias(10)], vec![soa(60, 20)], Some(10)),
            (NXDomain, vec![], vec![soa(15, 20)], Some(15)),
            (NXDomain, vec![], vec![soa(86_400, 86_400)], Some(NEGATIVE_TTL_MAX_S)),
            (NXDomain, vec![], vec![], None),
            (NoError, vec![], vec![], None),
            (ServFail, vec![], vec![soa(60, 60)], None),
            (Refused, vec![address("example.com.", 30)], vec![], None),
        ];
        for (code, answers, authorities, expected) in cases {
            let answer = answer(code, answers, authorities);
            assert_eq!(ttl_s(RecordType::A, &answer), expected, "{answer}");
        }
    }

    #[test]
    fn a_held_answers_time_runs_out() {
        let (cache, asked, start) = (Cache::new(), question("example.com."), Instant::now());
        let records = vec![address("example.com.", 30), address("example.com.", 90)];
        cache.insert(&asked, &answer(ResponseCode::NoError, records, vec![]), start);
        let ttls = |after_s| {
            let held = cache.get(&question("EXAMPLE.com."), start + Duration::from_secs(after_s));
            held.map(|message| message.answers.iter().map(|record| record.ttl).collect::<Vec<_>>())
        };
        assert_eq!(ttls(0), Some(vec![30, 90]));
        assert_eq!(ttls(29), Some(vec![1, 61]));
        assert_eq!(ttls(30), None);
        assert!(cache.get(&Question { dnssec_ok: true, ..asked }, start).is_none());
        cache.clear();
        assert_eq!(ttls(0), None);
    }

    #[test]
    fn what_says_no_time_is_not_held() {
        let (cache, asked, now) = (Cache::new(), question("example.com."), Instant::now());
        cache.insert(&asked, &answer(ResponseCode::NoError, vec![address("example.com.", 0)], vec![]), now);
        assert!(cache.get(&asked, now).is_none());
    }

    #[test]
    fn the_cache_is_bounded() {
        let (cache, now) = (Cache::new(), Instant::now());
        let answer = answer(ResponseCode::NoError, vec![address("example.com.", 60)], vec![]);
        for number in 0..20_000 {
            cache.insert(&question(&format!("n{number}.example.com.")), &answer, now);
        }
        cache.entries.run_pending_tasks();
        assert!(cache.entries.weighted_size() <= BYTES_MAX);
        assert!(cache.entries.entry_count() > 1000);
    }
}
