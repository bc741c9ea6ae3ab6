//! Questions that are not ours, passed on to the host's resolvers.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use hickory_server::proto::op::{Message, ResponseCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use crate::links::HOST_ADDR;

/// Questions that may be out at once; more fail at once rather than pile up.
const CONCURRENT_MAX: usize = 512;
/// Questions of one asker that may be out at once, so that no task takes all.
const PER_ASKER_MAX: usize = 64;
/// How long each resolver has for an answer.
const ATTEMPT: Duration = Duration::from_secs(2);
/// How long a resolver that gave no answer is asked after the others.
const SHUN: Duration = Duration::from_secs(10);
/// How many resolvers are asked, as in resolv.conf(5).
const SERVERS_MAX: usize = 3;
/// Longest answer taken by UDP, bytes: how much the asker takes is in the question, and passed on with it.
const UDP_BYTES_MAX: usize = 65_535;

/// Passes questions on.
#[derive(Debug)]
pub(super) struct Forwarder {
    resolv_conf: PathBuf,
    servers: Mutex<Servers>,
    permits: Semaphore,
    /// How many questions of each asker are out.
    out: Mutex<HashMap<Ipv4Addr, usize>>,
}

#[derive(Debug, Default)]
struct Servers {
    /// When the file that they are from was written.
    written: Option<SystemTime>,
    addresses: Vec<SocketAddr>,
    /// Those that gave no answer when last asked, and until when they are asked after the others.
    silent: HashMap<SocketAddr, Instant>,
}

/// An asker's right to one question more; given back when dropped.
struct Turn<'a> {
    out: &'a Mutex<HashMap<Ipv4Addr, usize>>,
    asker: Ipv4Addr,
}

impl<'a> Turn<'a> {
    /// `None` when the asker has as many questions out as it may.
    fn take(out: &'a Mutex<HashMap<Ipv4Addr, usize>>, asker: Ipv4Addr) -> Option<Self> {
        let mut counts = out.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(asker).or_default();
        if *count >= PER_ASKER_MAX {
            return None;
        }
        *count += 1;
        Some(Self { out, asker })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut counts = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.asker) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.asker);
            }
        }
    }
}

impl Forwarder {
    /// Asks the resolvers that `resolv_conf` names, reading it again whenever it changes.
    pub(super) fn new(resolv_conf: &Path) -> Self {
        Self {
            resolv_conf: resolv_conf.to_owned(),
            servers: Mutex::new(Servers::default()),
            permits: Semaphore::new(CONCURRENT_MAX),
            out: Mutex::new(HashMap::new()),
        }
    }

    /// The answer to a question of `asker`, a DNS message, of the first resolver that has one; `None` when no resolver
    /// answers, or too many questions are out.
    pub(super) async fn ask(&self, asker: Ipv4Addr, question: &[u8]) -> Option<Message> {
        let _turn = Turn::take(&self.out, asker)?;
        let _permit = self.permits.try_acquire().ok()?;
        self.ask_each(&self.servers(), question).await
    }

    /// Asks one after the other, as resolv.conf(5) has it: a resolver that fails or refuses leaves it to the next one.
    async fn ask_each(&self, servers: &[SocketAddr], question: &[u8]) -> Option<Message> {
        let mut last = None;
        for server in servers {
            let answer = timeout(ATTEMPT, ask_one(*server, question)).await;
            self.lock_servers().heard(*server, matches!(answer, Ok(Ok(_))), Instant::now());
            let Ok(Ok(answer)) = answer else { continue };
            match answer.metadata.response_code {
                ResponseCode::ServFail | ResponseCode::NotImp | ResponseCode::Refused => last = Some(answer),
                _ => return Some(answer),
            }
        }
        last
    }

    fn lock_servers(&self) -> MutexGuard<'_, Servers> {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The resolvers, in the order to ask them in.
    fn servers(&self) -> Vec<SocketAddr> {
        let written = fs::metadata(&self.resolv_conf).and_then(|file| file.modified()).ok();
        let mut servers = self.lock_servers();
        if written.is_none() || servers.written != written {
            let text = fs::read_to_string(&self.resolv_conf).unwrap_or_default();
            servers.written = written;
            servers.addresses = parse(&text);
            let Servers { addresses, silent, .. } = &mut *servers;
            silent.retain(|server, _| addresses.contains(server));
        }
        servers.in_order(Instant::now())
    }
}

impl Servers {
    /// Those that answer first. One that did not, and whose time is over, gets its place back for one question, while
    /// others go round it until that has an answer.
    fn in_order(&mut self, now: Instant) -> Vec<SocketAddr> {
        let (mut front, mut back) = (Vec::new(), Vec::new());
        for server in &self.addresses {
            match self.silent.get_mut(server) {
                Some(until) if *until > now => back.push(*server),
                Some(until) => {
                    *until = now + ATTEMPT;
                    front.push(*server);
                }
                None => front.push(*server),
            }
        }
        front.append(&mut back);
        front
    }

    /// Remembers whether a resolver gave an answer, whichever.
    fn heard(&mut self, server: SocketAddr, answered: bool, now: Instant) {
        if answered {
            self.silent.remove(&server);
        } else {
            self.silent.insert(server, now + SHUN);
        }
    }
}

/// The name servers of a resolv.conf, but for ourselves.
fn parse(text: &str) -> Vec<SocketAddr> {
    let words = text.lines().map(str::split_whitespace);
    let servers = words.filter_map(|mut words| match (words.next(), words.next()) {
        (Some("nameserver"), Some(addr)) => addr.parse::<IpAddr>().ok(),
        _ => None,
    });
    let others = servers.filter(|addr| *addr != IpAddr::V4(HOST_ADDR));
    others.map(|addr| SocketAddr::new(addr, 53)).take(SERVERS_MAX).collect()
}

async fn ask_one(server: SocketAddr, question: &[u8]) -> io::Result<Message> {
    let mut question = question.to_vec();
    // An id of our own: the asker's may be guessed by whoever made it ask.
    let id = rand::random::<u16>().to_be_bytes();
    question.get_mut(..2).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(&id);
    let answer = ask_udp(server, &question).await?;
    if answer.metadata.truncation { ask_tcp(server, &question).await } else { Ok(answer) }
}

async fn ask_udp(server: SocketAddr, question: &[u8]) -> io::Result<Message> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; UDP_BYTES_MAX];
    loop {
        let len = socket.recv(&mut buffer).await?;
        // Anything else is late, or forged.
        if let Ok(answer) = decode(&buffer[..len], question) {
            return Ok(answer);
        }
    }
}

async fn ask_tcp(server: SocketAddr, question: &[u8]) -> io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let len = u16::try_from(question.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&len.to_be_bytes(), question].concat()).await?;
    let len = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(len)];
    stream.read_exact(&mut answer).await?;
    decode(&answer, question)
}

/// Decodes an answer, if it is one to `question`: the same id, and the same name and type asked for.
fn decode(answer: &[u8], question: &[u8]) -> io::Result<Message> {
    let answer = Message::from_vec(answer).map_err(io::Error::other)?;
    let question = Message::from_vec(question).map_err(io::Error::other)?;
    // Name comparison is without regard to case.
    if answer.metadata.id != question.metadata.id || answer.queries != question.queries {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use hickory_server::proto::op::{OpCode, Query};
    use hickory_server::proto::rr::{Name, RecordType};

    use super::*;

    #[test]
    fn resolv_conf_gives_up_to_three_servers_without_ourselves() {
        let text = "# comment\nsearch x\nnameserver 169.254.64.1\nnameserver 192.0.2.1\n nameserver ::1 # c\n\
                    nameserver nonsense\nnameserver 192.0.2.2\nnameserver 192.0.2.3\n";
        let expected = ["192.0.2.1:53", "[::1]:53", "192.0.2.2:53"].map(|text| text.parse().unwrap());
        assert_eq!(parse(text), expected);
    }

    const ASKER: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 3);

    fn question(id: u16, name: &str) -> Message {
        let mut message = Message::new(id, hickory_server::proto::op::MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message
    }

    #[test]
    fn an_answer_counts_only_if_it_is_one_to_the_question() {
        let asked = question(7, "example.com.").to_vec().unwrap();
        let matches = |message: Message| decode(&message.to_vec().unwrap(), &asked).is_ok();
        assert!(matches(question(7, "example.com.").into_response()));
        assert!(!matches(question(8, "example.com.").into_response()));
        assert!(!matches(question(7, "example.org.").into_response()));
    }

    #[tokio::test]
    async fn a_resolver_is_asked_by_tcp_when_its_answer_is_cut_short_and_none_means_no_answer() {
        let folder = tempfile::tempdir().unwrap();
        let forwarder = Forwarder::new(&folder.path().join("missing"));
        assert!(forwarder.ask(ASKER, &question(1, "example.com.").to_vec().unwrap()).await.is_none());
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let server = udp.local_addr().unwrap();
        let tcp = tokio::net::TcpListener::bind(server).await.unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            let (len, client) = udp.recv_from(&mut buffer).await.unwrap();
            let mut answer = Message::from_vec(&buffer[..len]).unwrap().into_response();
            answer.metadata.truncation = true;
            udp.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
            let (mut stream, _) = tcp.accept().await.unwrap();
            let mut asked = vec![0; usize::from(stream.read_u16().await.unwrap())];
            stream.read_exact(&mut asked).await.unwrap();
            let answer = Message::from_vec(&asked).unwrap().into_response().to_vec().unwrap();
            stream.write_u16(u16::try_from(answer.len()).unwrap()).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        });
        let answer = ask_one(server, &question(1, "example.com.").to_vec().unwrap()).await.unwrap();
        assert!(!answer.metadata.truncation);
    }

    /// The address of a resolver that answers every question with `code`.
    async fn resolver(code: ResponseCode) -> SocketAddr {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let addr = udp.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            loop {
                let (len, client) = udp.recv_from(&mut buffer).await.unwrap();
                let mut answer = Message::from_vec(&buffer[..len]).unwrap().into_response();
                answer.metadata.response_code = code;
                udp.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
            }
        });
        addr
    }

    #[tokio::test]
    async fn a_resolver_that_fails_or_refuses_leaves_it_to_the_next_one() {
        use ResponseCode::{NXDomain, NoError, Refused, ServFail};
        let question = question(1, "example.com.").to_vec().unwrap();
        let forwarder = Forwarder::new(Path::new("/nonexistent"));
        let code = async |codes: &[ResponseCode]| {
            let mut servers = Vec::new();
            for code in codes {
                servers.push(resolver(*code).await);
            }
            forwarder.ask_each(&servers, &question).await.map(|answer| answer.metadata.response_code)
        };
        assert_eq!(code(&[ServFail, Refused, NoError]).await, Some(NoError));
        assert_eq!(code(&[NXDomain, NoError]).await, Some(NXDomain));
        assert_eq!(code(&[Refused, ServFail]).await, Some(ServFail));
        assert_eq!(code(&[]).await, None);
    }
    #[test]
    fn a_silent_resolver_is_asked_last_until_one_question_finds_that_it_answers_again() {
        let [first, second] = ["192.0.2.1:53", "192.0.2.2:53"].map(|text| text.parse().unwrap());
        let mut servers = Servers { addresses: vec![first, second], ..Servers::default() };
        let start = Instant::now();
        assert_eq!(servers.in_order(start), [first, second]);
        servers.heard(first, false, start);
        assert_eq!(servers.in_order(start + SHUN / 2), [second, first]);
        // The one that finds out, and those beside it.
        assert_eq!(servers.in_order(start + SHUN), [first, second]);
        assert_eq!(servers.in_order(start + SHUN), [second, first]);
        servers.heard(first, true, start + SHUN);
        assert_eq!(servers.in_order(start + SHUN), [first, second]);
    }

    #[test]
    fn an_asker_has_a_bounded_number_of_questions_out() {
        let out = Mutex::new(HashMap::new());
        let mut turns: Vec<_> = (0..PER_ASKER_MAX).map(|_| Turn::take(&out, ASKER).unwrap()).collect();
        assert!(Turn::take(&out, ASKER).is_none());
        assert!(Turn::take(&out, Ipv4Addr::new(169, 254, 64, 4)).is_some());
        turns.pop();
        assert!(Turn::take(&out, ASKER).is_some());
        drop(turns);
        assert!(out.lock().unwrap().is_empty());
    }
}
