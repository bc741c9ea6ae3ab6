//! What the search begins with: sound questions and answers.

use hickory_proto::rr::rdata::{CNAME, TXT};

use super::*;

fn message(name: &str, record_type: RecordType, edns: bool) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), record_type));
    if edns {
        let mut edns = Edns::new();
        edns.set_max_payload(4096);
        message.set_edns(edns);
    }
    message
}

pub(crate) fn questions() -> Vec<Vec<u8>> {
    let asked = [
        ("web.", RecordType::A, false),
        ("tasks.web.", RecordType::AAAA, true),
        ("db.", RecordType::ANY, false),
        ("_http._tcp.web.", RecordType::SRV, true),
        ("3.1.0.10.in-addr.arpa.", RecordType::PTR, false),
        ("www.example.com.", RecordType::MX, true),
        ("nothing.", RecordType::A, false),
    ];
    asked.iter().map(|(name, kind, edns)| message(name, *kind, *edns).to_vec().unwrap()).collect()
}

pub(crate) fn answers() -> Vec<Vec<u8>> {
    let question = || message("example.com.", RecordType::A, true).into_response();
    let (name, other) =
        (Name::from_ascii("example.com.").unwrap(), Name::from_ascii("www.example.com.").unwrap());
    let mut several = question();
    for last in 0..4 {
        several.add_answer(Record::from_rdata(name.clone(), 60, RData::A(A::new(192, 0, 2, last))));
    }
    let mut led_on = question();
    led_on.add_answer(Record::from_rdata(name.clone(), 0, RData::CNAME(CNAME(other.clone()))));
    led_on.add_answer(Record::from_rdata(other, u32::MAX, RData::A(A::new(192, 0, 2, 1))));
    led_on.add_additional(Record::from_rdata(name.clone(), 5, RData::TXT(TXT::new(vec!["x".repeat(200)]))));
    let mut none = question();
    none.metadata.response_code = ResponseCode::NXDomain;
    none.add_authority(soa());
    let mut fails = question();
    fails.metadata.response_code = ResponseCode::ServFail;
    fails.queries.clear();
    [several, led_on, none, fails].iter().map(|message| message.to_vec().unwrap()).collect()
}
