//! The name server of the node's tasks, on the host's address of the node-local range.
//!
//! Tasks reach it as their gateway's address; the dataplane translates that, and their own address to their alias, by
//! which this tells them apart. What they may know is in the [`zone`]; the rest goes to the host's resolvers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use hickory_server::Server;
use hickory_server::net::runtime::Time;
use hickory_server::proto::op::{Edns, Message, MessageType, Metadata, OpCode, ResponseCode};
use hickory_server::proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_server::proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::MessageResponseBuilder;
use mesh_api::table::Table;
use rand::seq::SliceRandom as _;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::watch;
use tracing::debug;

mod forward;
mod zone;

use crate::dataplane::{LocalEndpoint, Touched};
use forward::Forwarder;
pub use zone::{Answer, Zone};

/// Time to live of every answer, s: as long as a client may hold on to an address that is gone.
const TTL_S: u32 = 5;
/// How long a TCP connection may idle.
const TCP_IDLE: Duration = Duration::from_secs(10);
/// Answers that may wait on a TCP connection.
const TCP_QUEUE: usize = 32;
/// Most that is sent by UDP to an asker that takes more than 512 bytes.
const UDP_BYTES_MAX: u16 = 1232;

/// The running name server; it ends when dropped.
pub struct Dns {
    zone: Arc<RwLock<Zone>>,
    _server: Server<Handler>,
}

impl Dns {
    /// Serves at `addr`, UDP and TCP, from the last table, forwarding to the resolvers of `resolv_conf`; nobody may ask
    /// before the first [`Dns::update`].
    pub async fn start(
        addr: SocketAddr,
        resolv_conf: &Path,
        tables: watch::Receiver<Option<Arc<Table>>>,
    ) -> io::Result<Self> {
        let socket = UdpSocket::bind(addr).await?;
        let listener = TcpListener::bind(addr).await?;
        let zone = Arc::new(RwLock::new(Zone::default()));
        let forwarder = Forwarder::new(resolv_conf);
        let mut server = Server::new(Handler { zone: Arc::clone(&zone), tables, forwarder });
        server.register_socket(socket);
        server.register_listener(listener, TCP_IDLE, TCP_QUEUE);
        Ok(Self { zone, _server: server })
    }

    /// Follows the table: see [`Zone::update`].
    pub fn update(&self, table: &Table, touched: &Touched, endpoints: &[LocalEndpoint]) {
        self.zone.write().unwrap_or_else(PoisonError::into_inner).update(table, touched, endpoints);
    }
}

impl std::fmt::Debug for Dns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dns").finish_non_exhaustive()
    }
}

struct Handler {
    zone: Arc<RwLock<Zone>>,
    tables: watch::Receiver<Option<Arc<Table>>>,
    forwarder: Forwarder,
}

/// What is sent: a code, and the records of three sections.
struct Reply {
    code: ResponseCode,
    authoritative: bool,
    answers: Vec<Record>,
    authorities: Vec<Record>,
    additionals: Vec<Record>,
}

#[async_trait::async_trait]
impl RequestHandler for Handler {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut response: R,
    ) -> ResponseInfo {
        let reply = self.reply(request).await;
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.response_code = reply.code;
        metadata.authoritative = reply.authoritative;
        metadata.recursion_available = true;
        let mut builder = MessageResponseBuilder::from_message_request(request);
        let edns = request.edns.as_ref().map(|asked| {
            let mut edns = Edns::new();
            edns.set_max_payload(asked.max_payload().clamp(512, UDP_BYTES_MAX));
            edns
        });
        if let Some(edns) = &edns {
            builder.edns(edns);
        }
        let message =
            builder.build(metadata, &reply.answers, &reply.authorities, None::<&Record>, &reply.additionals);
        match response.send_response(message).await {
            Ok(info) => info,
            Err(error) => {
                debug!(%error, "an answer could not be sent");
                metadata.response_code = ResponseCode::ServFail;
                let counts = hickory_server::proto::op::HeaderCounts::default();
                ResponseInfo::from(hickory_server::proto::op::Header { metadata, counts })
            }
        }
    }
}

impl Handler {
    async fn reply(&self, request: &Request) -> Reply {
        if request.metadata.op_code != OpCode::Query || request.metadata.message_type != MessageType::Query {
            return Reply::code(ResponseCode::NotImp);
        }
        let Ok(info) = request.request_info() else { return Reply::code(ResponseCode::FormErr) };
        let IpAddr::V4(source) = info.src.ip() else { return Reply::code(ResponseCode::Refused) };
        let query = info.query.original();
        let answer = self.answer(source, query.name(), query.query_class());
        match answer {
            Answer::Addresses(addresses) => Reply::addresses(query.name(), query.query_type(), addresses),
            Answer::Name(name) => Reply::name(query.name(), query.query_type(), &name),
            Answer::NoName => {
                Reply { authorities: vec![soa(query.name())], ..Reply::own(ResponseCode::NXDomain) }
            }
            Answer::Refused => Reply::code(ResponseCode::Refused),
            Answer::Forward => match self.forwarder.ask(source, request.as_slice()).await {
                Some(message) => Reply::forwarded(message),
                None => Reply::code(ResponseCode::ServFail),
            },
        }
    }

    fn answer(&self, source: Ipv4Addr, name: &Name, class: DNSClass) -> Answer {
        let zone = self.zone.read().unwrap_or_else(PoisonError::into_inner);
        let table = self.tables.borrow();
        let Some(table) = table.as_ref().filter(|_| class == DNSClass::IN) else {
            return zone.lookup_other(source);
        };
        match name.parse_arpa_name() {
            Ok(net) if net.prefix_len() == net.max_prefix_len() => {
                zone.lookup_reverse(table, source, net.addr())
            }
            _ => zone.lookup(table, source, text_of(name).trim_end_matches('.')),
        }
    }
}

/// A name as people write it, without the escapes of DNS's own text form for what names of ours may hold (`_`, `-`).
fn text_of(name: &Name) -> String {
    let labels = name.iter().map(|label| String::from_utf8_lossy(label).into_owned());
    labels.collect::<Vec<_>>().join(".")
}

impl Reply {
    fn code(code: ResponseCode) -> Self {
        let (answers, authorities, additionals) = Default::default();
        Self { code, authoritative: false, answers, authorities, additionals }
    }

    fn own(code: ResponseCode) -> Self {
        Self { authoritative: true, ..Self::code(code) }
    }

    fn addresses(name: &Name, record_type: RecordType, mut addresses: Vec<IpAddr>) -> Self {
        addresses.retain(|addr| match record_type {
            RecordType::A => addr.is_ipv4(),
            RecordType::AAAA => addr.is_ipv6(),
            RecordType::ANY => true,
            _ => false,
        });
        if addresses.is_empty() {
            return Self::no_data(name);
        }
        addresses.shuffle(&mut rand::rng());
        let record = |addr| {
            let data = match addr {
                IpAddr::V4(addr) => RData::A(A(addr)),
                IpAddr::V6(addr) => RData::AAAA(AAAA(addr)),
            };
            Record::from_rdata(name.clone(), TTL_S, data)
        };
        Self { answers: addresses.into_iter().map(record).collect(), ..Self::own(ResponseCode::NoError) }
    }

    fn name(asked: &Name, record_type: RecordType, name: &str) -> Self {
        // A name that is too long for DNS has no PTR.
        let target = Name::from_labels(name.split('.').map(str::as_bytes));
        match target {
            Ok(mut target) if matches!(record_type, RecordType::PTR | RecordType::ANY) => {
                target.set_fqdn(true);
                let record = Record::from_rdata(asked.clone(), TTL_S, RData::PTR(PTR(target)));
                Self { answers: vec![record], ..Self::own(ResponseCode::NoError) }
            }
            _ => Self::no_data(asked),
        }
    }

    /// The name exists, with nothing of the type asked for.
    fn no_data(name: &Name) -> Self {
        Self { authorities: vec![soa(name)], ..Self::own(ResponseCode::NoError) }
    }

    fn forwarded(message: Message) -> Self {
        Self {
            code: message.metadata.response_code,
            authoritative: false,
            answers: message.answers,
            authorities: message.authorities,
            additionals: message.additionals,
        }
    }
}

/// What bounds how long "no" is remembered (RFC 2308).
fn soa(name: &Name) -> Record {
    let soa = SOA::new(name.clone(), name.clone(), 1, 60, 60, 60, TTL_S);
    Record::from_rdata(name.clone(), TTL_S, RData::SOA(soa))
}
