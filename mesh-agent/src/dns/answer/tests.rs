//! Messages in, messages out.

use std::path::Path;

use hickory_proto::rr::rdata::TXT;
use proptest::prelude::*;

use super::super::zone::tests::{ASKER, INNER, example};
use super::*;

fn answerer() -> Arc<Answerer> {
    let (table, zone) = example();
    let tables = watch::channel(Some(Arc::new(table))).1;
    let forwarder = Forwarder::new(Path::new("/nonexistent"));
    Arc::new(Answerer { zone: RwLock::new(zone), tables, forwarder })
}

fn question(name: &str, record_type: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), record_type));
    message
}

/// The answer to a message of `ASKER` by UDP, if there is any at once.
fn answer(message: &Message) -> Option<Message> {
    match answerer().take(ASKER.into(), &message.to_vec().unwrap(), Transport::Udp) {
        Outcome::Answered(bytes) => Some(Message::from_vec(&bytes).unwrap()),
        Outcome::Ignored | Outcome::Forwarded(_) => None,
    }
}

fn code(message: &Message) -> Option<ResponseCode> {
    answer(message).map(|answer| answer.metadata.response_code)
}

#[test]
fn an_answer_is_the_questions_and_ours() {
    let answer = answer(&question("wEb.", RecordType::A)).unwrap();
    assert_eq!(answer.metadata.id, 7);
    assert_eq!(answer.queries[0].name().to_string(), "wEb.");
    assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
    assert!(answer.metadata.recursion_desired && !answer.metadata.authentic_data);
    let records: Vec<String> = answer.answers.iter().map(ToString::to_string).collect();
    assert_eq!(records, ["wEb. 5 IN A 10.0.1.2"]);
    assert!(answer.edns.is_none());
}

#[test]
fn a_name_without_what_is_asked_for_is_told_from_no_name() {
    for (name, record_type, expected) in [
        ("web.", RecordType::AAAA, ResponseCode::NoError),
        ("web.", RecordType::MX, ResponseCode::NoError),
        ("web.", RecordType::SRV, ResponseCode::NoError),
        ("2.1.0.10.in-addr.arpa.", RecordType::A, ResponseCode::NoError),
        ("tasks.nothing.", RecordType::A, ResponseCode::NXDomain),
        ("9.1.0.10.in-addr.arpa.", RecordType::PTR, ResponseCode::NXDomain),
    ] {
        let answer = answer(&question(name, record_type)).unwrap();
        assert_eq!(answer.metadata.response_code, expected, "{name} {record_type}");
        assert!(answer.answers.is_empty());
        // What others may hold it by.
        assert!(
            matches!(&answer.authorities[..], [soa] if soa.record_type() == RecordType::SOA && soa.ttl == TTL_S)
        );
    }
}

#[test]
fn what_can_not_be_served_is_refused_in_its_own_way() {
    let web = || question("web.", RecordType::A);
    let with = |change: fn(&mut Message)| {
        let mut message = web();
        change(&mut message);
        code(&message)
    };
    assert_eq!(with(|message| message.metadata.op_code = OpCode::Update), Some(ResponseCode::NotImp));
    assert_eq!(with(|message| message.metadata.message_type = MessageType::Response), None);
    assert_eq!(with(|message| message.queries.clear()), Some(ResponseCode::FormErr));
    assert_eq!(with(|message| message.queries.push(Query::new())), Some(ResponseCode::FormErr));
    assert_eq!(with(|message| message.queries[0].query_class = DNSClass::CH), Some(ResponseCode::Refused));
    assert_eq!(code(&question("web.", RecordType::AXFR)), Some(ResponseCode::Refused));
    let version = |message: &mut Message| {
        let mut edns = Edns::new();
        edns.set_version(1);
        message.set_edns(edns);
    };
    // The number has two names.
    assert_eq!(with(version).map(u16::from), Some(u16::from(ResponseCode::BADVERS)));
    for source in ["169.254.64.99", "fd00::1"] {
        let bytes = web().to_vec().unwrap();
        let Outcome::Answered(bytes) = answerer().take(source.parse().unwrap(), &bytes, Transport::Udp)
        else {
            panic!("{source}");
        };
        let code = Message::from_vec(&bytes).unwrap().metadata.response_code;
        assert_eq!(code, ResponseCode::Refused, "{source}");
    }
}

#[test]
fn what_is_not_ours_goes_on_unless_the_asker_has_no_way_out() {
    let elsewhere = question("example.com.", RecordType::A).to_vec().unwrap();
    let take = |source: Ipv4Addr| answerer().take(source.into(), &elsewhere, Transport::Udp);
    assert!(matches!(take(ASKER), Outcome::Forwarded(_)));
    let Outcome::Answered(bytes) = take(INNER) else { panic!("it has no way out") };
    assert_eq!(Message::from_vec(&bytes).unwrap().metadata.response_code, ResponseCode::ServFail);
    // A label with a dot in it is not the name that it looks like.
    let mut dotted = question("web.", RecordType::A);
    dotted.queries[0].set_name(Name::from_labels([&b"tasks.web"[..]]).unwrap());
    assert!(answer(&dotted).is_none());
}

#[test]
fn a_task_has_a_bounded_number_of_questions_out() {
    let answerer = answerer();
    let ask = |number: usize| {
        let question = question(&format!("n{number}.example.com."), RecordType::A).to_vec().unwrap();
        answerer.take(ASKER.into(), &question, Transport::Udp)
    };
    let out: Vec<_> = (0..1000).map(ask).collect();
    let forwarded = out.iter().filter(|outcome| matches!(outcome, Outcome::Forwarded(_))).count();
    assert_eq!(forwarded, 64);
    let Outcome::Answered(last) = &out[999] else { panic!("too many are out") };
    assert_eq!(Message::from_vec(last).unwrap().metadata.response_code, ResponseCode::ServFail);
    drop(out);
    assert!(matches!(ask(0), Outcome::Forwarded(_)));
}

fn long(count: u8) -> Reply {
    let name = Name::from_ascii("web.").unwrap();
    let addresses = (0..count).map(|last| IpAddr::from([10, 0, 1, last])).collect();
    Reply::addresses(&name, RecordType::A, addresses)
}

#[test]
fn an_answer_that_is_too_long_holds_what_fits_and_says_so() {
    let mut with_edns = question("web.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    with_edns.set_edns(edns);
    for (asked, transport, bytes_max, cut) in [
        (question("web.", RecordType::A), Transport::Udp, 512, true),
        (with_edns.clone(), Transport::Udp, 1232, true),
        (with_edns, Transport::Tcp, 65_535, false),
    ] {
        let request = Request::read(&asked.to_vec().unwrap(), transport).unwrap_or_else(|_| panic!());
        let bytes = request.answer(long(200));
        let answer = Message::from_vec(&bytes).unwrap();
        assert_eq!(answer.metadata.truncation, cut);
        assert!(bytes.len() <= bytes_max && (!cut || bytes.len() + 16 > bytes_max), "{}", bytes.len());
        assert_eq!(answer.edns.is_some(), asked.edns.is_some());
        assert_eq!(answer.answers.len() == 200, !cut);
    }
}

#[test]
fn what_only_helps_is_left_out_before_anything_is_cut() {
    let request = Request::read(&question("web.", RecordType::A).to_vec().unwrap(), Transport::Udp);
    let request = request.unwrap_or_else(|_| panic!());
    let note = record(&Name::root(), RData::TXT(TXT::new(vec!["x".repeat(200); 3])));
    let answer = request.answer(Reply { additionals: vec![note], ..long(3) });
    let answer = Message::from_vec(&answer).unwrap();
    assert!(!answer.metadata.truncation && answer.additionals.is_empty());
    assert_eq!(answer.answers.len(), 3);
}

proptest! {
    /// Whatever comes, there is no answer, or one that can be read and is no longer than may be.
    #[test]
    fn arbitrary_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300), udp: bool) {
        survives(&bytes, udp);
    }

    /// A question with some bytes changed: most of it still makes sense.
    #[test]
    fn damaged_questions_are_survived(
        name in "[a-z_]{1,8}(\\.[a-z0-9_][a-z0-9_-]{0,12}){0,4}\\.",
        record_type: u16,
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in 0..8_usize,
        udp: bool,
    ) {
        let mut message = question(&name, RecordType::from(record_type));
        message.set_edns(Edns::new());
        let mut bytes = message.to_vec().unwrap();
        bytes.truncate(bytes.len() - cut);
        for (index, value) in damage {
            let index = index.index(bytes.len());
            bytes[index] = value;
        }
        survives(&bytes, udp);
    }
}

fn survives(bytes: &[u8], udp: bool) {
    let transport = if udp { Transport::Udp } else { Transport::Tcp };
    if let Outcome::Answered(answer) = answerer().take(ASKER.into(), bytes, transport) {
        assert!(!udp || answer.len() <= usize::from(UDP_BYTES_MAX));
        Message::from_vec(&answer).unwrap();
    }
}
