//! A question to the host's resolvers, and what of their answers is one to it.

use std::io;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};

/// How long an answer may be by UDP, bytes: what passes any path unfragmented (DNS Flag Day 2020).
const UDP_BYTES_MAX: u16 = 1232;

/// What is asked, as far as answers may differ.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in crate::dns) struct Question {
    /// The name; its letters' case makes no difference.
    pub(in crate::dns) name: Name,
    /// The type of records.
    pub(in crate::dns) record_type: RecordType,
    /// The asker wants signatures.
    pub(in crate::dns) dnssec_ok: bool,
    /// The asker wants what fails validation as well.
    pub(in crate::dns) checking_disabled: bool,
}

impl Question {
    /// The question as a message of our own, that holds nothing else of the asker's: under a fresh id, since the
    /// asker's may be guessed by whoever made it ask.
    pub(super) fn message(&self, edns: bool) -> Message {
        let mut message = Message::new(rand::random(), MessageType::Query, OpCode::Query);
        message.add_query(Query::query(self.name.clone(), self.record_type));
        message.metadata.recursion_desired = true;
        message.metadata.checking_disabled = self.checking_disabled;
        // Asks whether the resolver has validated the answer (RFC 6840, 5.7).
        message.metadata.authentic_data = true;
        if edns {
            let mut options = Edns::new();
            options.set_max_payload(UDP_BYTES_MAX).set_dnssec_ok(self.dnssec_ok);
            message.set_edns(options);
        }
        message
    }
}

/// Decodes an answer, if it is one to `question`: the same id, and the same name and type asked for. Some servers leave
/// those out of what says only that they fail (FORMERR, where they don't know EDNS).
pub(super) fn decode(answer: &[u8], question: &Message) -> io::Result<Message> {
    let answer = Message::from_vec(answer).map_err(io::Error::other)?;
    let is_ours = answer.metadata.message_type == MessageType::Response
        && answer.metadata.op_code == OpCode::Query
        && answer.metadata.id == question.metadata.id
        && (answer.queries == question.queries || answer.queries.is_empty() && fails(&answer));
    if is_ours { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Whether it says nothing of the name asked for.
fn fails(answer: &Message) -> bool {
    use ResponseCode::{FormErr, NotImp, Refused, ServFail};
    matches!(answer.metadata.response_code, FormErr | ServFail | NotImp | Refused)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::dns::forward) fn question(name: &str) -> Question {
        let name = Name::from_ascii(name).unwrap();
        Question { name, record_type: RecordType::A, dnssec_ok: false, checking_disabled: false }
    }

    #[test]
    fn an_answer_counts_only_if_it_is_one_to_the_question() {
        let asked = question("example.com.").message(true);
        let counts = |answer: Message| decode(&answer.to_vec().unwrap(), &asked).is_ok();
        let mut right = asked.clone().into_response();
        assert!(counts(right.clone()));
        right.queries = question("EXAMPLE.com.").message(true).queries;
        assert!(counts(right.clone()));
        assert!(!counts(asked.clone()), "a question is no answer");
        let mut update = right.clone();
        update.metadata.op_code = OpCode::Update;
        assert!(!counts(update), "records of an update may be such that answers can't have");
        right.metadata.id ^= 1;
        assert!(!counts(right), "another id");
        let mut other = asked.clone().into_response();
        other.queries = question("example.org.").message(true).queries;
        assert!(!counts(other), "another name");
        let mut other = asked.clone().into_response();
        other.queries[0].set_query_type(RecordType::AAAA);
        assert!(!counts(other), "another type");
        assert!(decode(b"nonsense", &asked).is_err());
        for (code, counting) in
            [(ResponseCode::FormErr, true), (ResponseCode::NoError, false), (ResponseCode::NXDomain, false)]
        {
            let bare = Message::error_msg(asked.metadata.id, OpCode::Query, code);
            assert_eq!(counts(bare), counting, "{code} without the question");
        }
    }

    #[test]
    fn equal_questions_differ_in_case_at_most() {
        assert_eq!(question("Example.com."), question("example.COM."));
        assert_ne!(question("example.com."), Question { dnssec_ok: true, ..question("example.com.") });
    }
}
