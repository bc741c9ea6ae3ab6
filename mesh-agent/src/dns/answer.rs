//! From a question's bytes to its answer's.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, PoisonError, RwLock};

use hickory_proto::op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable as _, BinDecoder};
use mesh_api::id::TaskId;
use mesh_api::table::Table;
use rand::seq::SliceRandom as _;
use tokio::sync::watch;

use super::forward::{Forwarder, Question};
use super::turns::Turn;
use super::zone::{Answer, Server, Zone};

/// Time to live of every record of ours, s: as long as a client may hold on to an address that is gone.
const TTL_S: u32 = 5;
/// Longest answer by UDP to an asker that takes more than [`UDP_BYTES_MIN`].
const UDP_BYTES_MAX: u16 = 1232;
/// Longest answer by UDP to an asker that does not say how much it takes.
const UDP_BYTES_MIN: u16 = 512;

/// Answers questions.
pub(super) struct Answerer {
    pub(super) zone: RwLock<Zone>,
    pub(super) tables: watch::Receiver<Option<Arc<Table>>>,
    pub(super) forwarder: Forwarder,
}

/// How a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// What becomes of a question.
pub(super) enum Outcome {
    /// It is none.
    Ignored,
    /// Its answer.
    Answered(Vec<u8>),
    /// The host's resolvers are to be asked.
    Forwarded(Box<Forwarding>),
}

/// A question on its way to the host's resolvers.
pub(super) struct Forwarding {
    answerer: Arc<Answerer>,
    request: Request,
    question: Question,
    turn: Turn,
}

/// A question that can be answered.
struct Request {
    metadata: Metadata,
    query: Query,
    edns: Option<Edns>,
    /// Longest answer, bytes.
    bytes_max: u16,
}

/// What is sent: a code, and the records of three sections.
#[derive(Debug)]
struct Reply {
    code: ResponseCode,
    authoritative: bool,
    authentic: bool,
    answers: Vec<Record>,
    authorities: Vec<Record>,
    additionals: Vec<Record>,
}

impl Answerer {
    /// What becomes of a question from `source`. Waits for nobody.
    pub(super) fn take(self: &Arc<Self>, source: IpAddr, bytes: &[u8], transport: Transport) -> Outcome {
        let request = match Request::read(bytes, transport) {
            Ok(request) => request,
            Err(refusal) => return refusal.map_or(Outcome::Ignored, Outcome::Answered),
        };
        let task = match self.reply(source, &request) {
            Ok(reply) => return Outcome::Answered(request.answer(reply)),
            Err(task) => task,
        };
        let question = request.question();
        if let Some(answer) = self.forwarder.known(&question) {
            return Outcome::Answered(request.answer(Reply::forwarded(answer)));
        }
        let Some(turn) = self.forwarder.turn(task) else {
            return Outcome::Answered(request.answer(Reply::code(ResponseCode::ServFail)));
        };
        Outcome::Forwarded(Box::new(Forwarding { answerer: Arc::clone(self), request, question, turn }))
    }

    /// The task that asks from `source`.
    pub(super) fn task_at(&self, source: IpAddr) -> Option<TaskId> {
        let IpAddr::V4(source) = source else { return None };
        self.zone.read().unwrap_or_else(PoisonError::into_inner).task_at(source).cloned()
    }

    /// What there is to say here; else, the task that the host's resolvers are to be asked for.
    fn reply(&self, source: IpAddr, request: &Request) -> Result<Reply, TaskId> {
        let (name, record_type) = (request.query.name(), request.query.query_type());
        let is_transfer = matches!(record_type, RecordType::AXFR | RecordType::IXFR);
        let IpAddr::V4(source) = source else { return Ok(Reply::code(ResponseCode::Refused)) };
        if request.query.query_class() != DNSClass::IN || is_transfer {
            return Ok(Reply::code(ResponseCode::Refused));
        }
        Ok(match self.answer(source, name) {
            Answer::Addresses(addresses) => Reply::addresses(name, record_type, addresses),
            Answer::Name(found) => Reply::name(name, record_type, &found),
            Answer::Servers(servers) => Reply::servers(name, record_type, servers),
            Answer::NoName => Reply { authorities: vec![soa()], ..Reply::own(ResponseCode::NXDomain) },
            Answer::NoWayOut => Reply::code(ResponseCode::ServFail),
            Answer::Refused => Reply::code(ResponseCode::Refused),
            Answer::Forward(task) => return Err(task),
        })
    }

    fn answer(&self, source: Ipv4Addr, name: &Name) -> Answer {
        let zone = self.zone.read().unwrap_or_else(PoisonError::into_inner);
        let table = self.tables.borrow();
        let (Some(table), Some(text)) = (table.as_ref(), text_of(name)) else {
            return zone.lookup_other(source);
        };
        match name.parse_arpa_name() {
            Ok(net) if net.prefix_len() == net.max_prefix_len() => {
                zone.lookup_reverse(table, source, net.addr())
            }
            _ => zone.lookup(table, source, &text),
        }
    }
}

impl Forwarding {
    /// The answer, once there is one or is not going to be.
    pub(super) async fn answer(self) -> Vec<u8> {
        let Self { answerer, request, question, turn } = self;
        let answer = answerer.forwarder.ask(&question, turn).await;
        request.answer(answer.map_or_else(|| Reply::code(ResponseCode::ServFail), Reply::forwarded))
    }
}

/// A name as people write it, without the escapes of DNS's own text form for what names of ours may hold (`_`, `-`).
/// `None` for one that could be taken for another.
fn text_of(name: &Name) -> Option<String> {
    let labels: Option<Vec<&str>> = name
        .iter()
        .map(|label| std::str::from_utf8(label).ok().filter(|label| !label.contains('.')))
        .collect();
    Some(labels?.join("."))
}

/// The DNS name of a text of ours; `None` if it is too long for one.
fn name_of(text: &str) -> Option<Name> {
    let mut name = Name::from_labels(text.split('.').map(str::as_bytes)).ok()?;
    name.set_fqdn(true);
    Some(name)
}

impl Request {
    /// Reads a question. Fails with the answer to what is a question, but can't be served; or with none.
    fn read(bytes: &[u8], transport: Transport) -> Result<Self, Option<Vec<u8>>> {
        let header = Header::read(&mut BinDecoder::new(bytes)).map_err(|_| None)?;
        if header.metadata.message_type == MessageType::Response {
            // Whoever answered that would answer answers for ever.
            return Err(None);
        }
        let refusal = |code| {
            let mut message = Message::error_msg(header.metadata.id, header.metadata.op_code, code);
            message.metadata.recursion_desired = header.metadata.recursion_desired;
            message.to_vec().ok()
        };
        if header.metadata.op_code != OpCode::Query {
            return Err(refusal(ResponseCode::NotImp));
        }
        let Ok(Message { metadata, queries, edns, .. }) = Message::from_vec(bytes) else {
            return Err(refusal(ResponseCode::FormErr));
        };
        let Ok([query]) = <[Query; 1]>::try_from(queries) else {
            return Err(refusal(ResponseCode::FormErr));
        };
        let payload = edns.as_ref().map_or(UDP_BYTES_MIN, Edns::max_payload);
        let bytes_max = match transport {
            Transport::Udp => payload.clamp(UDP_BYTES_MIN, UDP_BYTES_MAX),
            Transport::Tcp => u16::MAX,
        };
        let request = Self { metadata, query, edns, bytes_max };
        match &request.edns {
            Some(edns) if edns.version() > 0 => Err(Some(request.answer(Reply::code(ResponseCode::BADVERS)))),
            _ => Ok(request),
        }
    }

    fn dnssec_ok(&self) -> bool {
        self.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok)
    }

    /// What of it the host's resolvers are asked.
    fn question(&self) -> Question {
        Question {
            name: self.query.name().clone(),
            record_type: self.query.query_type(),
            dnssec_ok: self.dnssec_ok(),
            checking_disabled: self.metadata.checking_disabled,
        }
    }

    fn answer(&self, reply: Reply) -> Vec<u8> {
        let Reply { code, authoritative, authentic, answers, authorities, additionals } = reply;
        let mut message = Message::response(self.metadata.id, self.metadata.op_code);
        message.metadata = Metadata::response_from_request(&self.metadata);
        message.metadata.response_code = code;
        message.metadata.authoritative = authoritative;
        message.metadata.recursion_available = true;
        // Only who knows what it means is told (RFC 6840, 5.8).
        message.metadata.authentic_data = authentic && (self.metadata.authentic_data || self.dnssec_ok());
        message.queries = vec![self.query.clone()];
        (message.answers, message.authorities, message.additionals) = (answers, authorities, additionals);
        message.edns = self.edns.as_ref().map(|_| {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_BYTES_MAX).set_dnssec_ok(self.dnssec_ok());
            edns
        });
        encode(message, usize::from(self.bytes_max)).unwrap_or_default()
    }
}

/// The message in at most `bytes_max` bytes: without the additional records if it is longer, and if it still is, with as
/// many answers as fit, and the mark that it was cut. Some libraries make do with those.
fn encode(mut message: Message, bytes_max: usize) -> Option<Vec<u8>> {
    let fits = |message: &Message| {
        let bytes = message.to_vec().ok()?;
        // The encoder cuts by itself what is longer than any message can be.
        let is_whole = bytes.len() <= bytes_max && bytes.get(2).is_some_and(|flags| flags & 2 == 0);
        is_whole.then_some(bytes)
    };
    if let Some(bytes) = fits(&message) {
        return Some(bytes);
    }
    message.additionals.clear();
    if let Some(bytes) = fits(&message) {
        return Some(bytes);
    }
    message.authorities.clear();
    let answers = std::mem::take(&mut message.answers);
    let (mut least, mut most) = (0, answers.len());
    while least < most {
        let middle = usize::midpoint(least, most + 1);
        message.answers = answers[..middle].to_vec();
        if fits(&message).is_some() { least = middle } else { most = middle - 1 }
    }
    message.answers = answers[..least].to_vec();
    message.metadata.truncation = true;
    message.to_vec().ok()
}

impl Reply {
    fn code(code: ResponseCode) -> Self {
        let (answers, authorities, additionals) = Default::default();
        Self { code, authoritative: false, authentic: false, answers, authorities, additionals }
    }

    fn own(code: ResponseCode) -> Self {
        Self { authoritative: true, ..Self::code(code) }
    }

    /// Answers in any order; without any, the name exists, with nothing of the type asked for.
    fn records(mut answers: Vec<Record>) -> Self {
        if answers.is_empty() {
            return Self { authorities: vec![soa()], ..Self::own(ResponseCode::NoError) };
        }
        answers.shuffle(&mut rand::rng());
        Self { answers, ..Self::own(ResponseCode::NoError) }
    }

    fn addresses(name: &Name, record_type: RecordType, addresses: Vec<IpAddr>) -> Self {
        let records = addresses.into_iter().map(|addr| address(name, addr));
        Self::records(records.filter(|record| is_asked(record, record_type)).collect())
    }

    fn name(asked: &Name, record_type: RecordType, found: &str) -> Self {
        let record = name_of(found).map(|name| record(asked, RData::PTR(PTR(name))));
        Self::records(record.into_iter().filter(|record| is_asked(record, record_type)).collect())
    }

    /// The addresses of the servers come with them, since they are asked for next.
    fn servers(asked: &Name, record_type: RecordType, servers: Vec<Server>) -> Self {
        let (mut answers, mut additionals) = (Vec::new(), Vec::new());
        for Server { name, port, addresses } in servers {
            let Some(name) = name_of(&name) else { continue };
            additionals.extend(addresses.into_iter().map(|addr| address(&name, addr)));
            answers.push(record(asked, RData::SRV(SRV::new(0, 0, port, name))));
        }
        answers.retain(|record| is_asked(record, record_type));
        if answers.is_empty() {
            additionals.clear();
        }
        Self { additionals, ..Self::records(answers) }
    }

    fn forwarded(message: Message) -> Self {
        Self {
            code: message.metadata.response_code,
            authoritative: false,
            authentic: message.metadata.authentic_data,
            answers: message.answers,
            authorities: message.authorities,
            additionals: message.additionals,
        }
    }
}

fn is_asked(record: &Record, record_type: RecordType) -> bool {
    record_type == RecordType::ANY || record.record_type() == record_type
}

fn record(name: &Name, data: RData) -> Record {
    Record::from_rdata(name.clone(), TTL_S, data)
}

fn address(name: &Name, addr: IpAddr) -> Record {
    match addr {
        IpAddr::V4(addr) => record(name, RData::A(A(addr))),
        IpAddr::V6(addr) => record(name, RData::AAAA(AAAA(addr))),
    }
}

/// What bounds how long "no" is remembered (RFC 2308). Names of ours have nothing in common but the root.
fn soa() -> Record {
    let root = Name::root();
    record(&root, RData::SOA(SOA::new(root.clone(), root.clone(), 1, 60, 60, 60, TTL_S)))
}

#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
