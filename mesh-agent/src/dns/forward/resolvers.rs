//! The host's resolvers: which there are, in which order they are asked, and when the next one is.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use hickory_proto::op::{Message, ResponseCode};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::exchange::exchange;
use super::question::Question;
use crate::dns::resolv_conf;
use crate::dns::turns::Turn;

/// How long a resolver has for an answer.
const ATTEMPT: Duration = Duration::from_secs(3);
/// How long a resolver may be silent before the next one is asked as well.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long a silent resolver is asked after the others, and how often it is tried.
const SHUN: Duration = Duration::from_secs(10);

/// The resolvers that a resolv.conf names.
#[derive(Debug)]
pub(super) struct Resolvers {
    resolv_conf: PathBuf,
    list: Mutex<List>,
}

#[derive(Debug, Default)]
struct List {
    /// When the file that they are from was written, and its length: what empties it and what fills it again may come
    /// within one tick of the clock.
    written: Option<(SystemTime, u64)>,
    addresses: Vec<SocketAddr>,
    /// When each answered last.
    answered: HashMap<SocketAddr, Instant>,
    /// Those that have answered nothing since a question that they left without an answer, and when they are tried again.
    silent: HashMap<SocketAddr, Instant>,
}

/// Whom to ask.
#[derive(Debug, Default, PartialEq, Eq)]
struct Order {
    /// One after the other.
    servers: Vec<SocketAddr>,
    /// Beside them, only to hear whether they answer again.
    tried: Vec<SocketAddr>,
}

impl Resolvers {
    pub(super) fn new(resolv_conf: &Path) -> Self {
        Self { resolv_conf: resolv_conf.to_owned(), list: Mutex::default() }
    }

    /// Reads the file if it has changed; true if there are other resolvers now.
    pub(super) fn refresh(&self) -> bool {
        let written =
            fs::metadata(&self.resolv_conf).and_then(|file| Ok((file.modified()?, file.len()))).ok();
        let mut list = self.lock();
        if list.written == written {
            return false;
        }
        let text = fs::read_to_string(&self.resolv_conf).unwrap_or_default();
        list.written = written;
        list.replace(resolv_conf::resolvers(&text))
    }

    /// Their addresses.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.lock().addresses.clone()
    }

    /// The answer of the first resolver that has one. A resolver that fails or refuses leaves it to the next one; one that
    /// is silent gets company. `turn` is over when nobody is asked any more.
    pub(super) async fn ask(self: &Arc<Self>, question: &Question, turn: &Arc<Turn>) -> Option<Message> {
        let Order { servers, tried } = self.lock().order(Instant::now());
        let (sender, mut answers) = mpsc::channel(servers.len().max(1));
        for server in tried {
            self.start(server, question, turn, None);
        }
        let (mut servers, mut out, mut last) = (servers.into_iter(), 0, None);
        loop {
            let asked = servers.next();
            if let Some(server) = asked {
                self.start(server, question, turn, Some(sender.clone()));
                out += 1;
            } else if out == 0 {
                return last;
            }
            let (limit, start) = (if servers.len() > 0 { PATIENCE } else { ATTEMPT }, Instant::now());
            match timeout(limit, answers.recv()).await {
                Ok(Some(Ok(answer))) if !leaves_it_to_others(&answer) => return Some(answer),
                Ok(heard) => {
                    out -= 1;
                    last = heard.and_then(Result::ok).or(last);
                }
                Err(_) => {
                    if let Some(server) = asked {
                        self.lock().unanswered(server, start, Instant::now());
                    }
                }
            }
        }
    }

    /// Asks one resolver, remembers whether it answered, and says what.
    fn start(
        self: &Arc<Self>,
        server: SocketAddr,
        question: &Question,
        turn: &Arc<Turn>,
        answers: Option<mpsc::Sender<io::Result<Message>>>,
    ) {
        let (resolvers, question, turn) = (Arc::clone(self), question.clone(), Arc::clone(turn));
        tokio::spawn(async move {
            let start = Instant::now();
            let answer = timeout(ATTEMPT, exchange(server, &question)).await;
            let answer = answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            match &answer {
                Ok(_) => resolvers.lock().answered(server, Instant::now()),
                Err(_) => resolvers.lock().unanswered(server, start, Instant::now()),
            }
            if let Some(answers) = answers {
                // Another one was quicker, if nobody hears it.
                let _ = answers.send(answer).await;
            }
            drop(turn);
        });
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(in crate::dns) fn replace(&self, addresses: Vec<SocketAddr>) {
        self.lock().replace(addresses);
    }
}

/// Whether another resolver may know better.
fn leaves_it_to_others(answer: &Message) -> bool {
    matches!(
        answer.metadata.response_code,
        ResponseCode::ServFail | ResponseCode::NotImp | ResponseCode::Refused
    )
}

impl List {
    /// True if they are others than before.
    fn replace(&mut self, addresses: Vec<SocketAddr>) -> bool {
        self.silent.retain(|server, _| addresses.contains(server));
        self.answered.retain(|server, _| addresses.contains(server));
        let is_new = self.addresses != addresses;
        self.addresses = addresses;
        is_new
    }

    /// As the file has them, but for the silent ones, which come last.
    fn order(&mut self, now: Instant) -> Order {
        let mut order = Order::default();
        let mut silent = Vec::new();
        for server in &self.addresses {
            match self.silent.get_mut(server) {
                None => order.servers.push(*server),
                Some(again) => {
                    silent.push(*server);
                    if *again <= now {
                        *again = now + SHUN;
                        order.tried.push(*server);
                    }
                }
            }
        }
        if order.servers.is_empty() {
            // They are asked in earnest.
            order.tried.clear();
        }
        order.servers.append(&mut silent);
        order
    }

    /// Remembers that a resolver gave an answer, whichever.
    fn answered(&mut self, server: SocketAddr, now: Instant) {
        self.silent.remove(&server);
        if self.addresses.contains(&server) {
            self.answered.insert(server, now);
        }
    }

    /// Remembers that a resolver has left a question of `start` without an answer. If it has answered another one since,
    /// it is the question that takes long: whoever asks for names without servers turns nobody else to other resolvers.
    fn unanswered(&mut self, server: SocketAddr, start: Instant, now: Instant) {
        let is_known = self.addresses.contains(&server);
        if is_known && self.answered.get(&server).is_none_or(|answered| *answered < start) {
            self.silent.insert(server, now + SHUN);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UdpSocket;

    use super::super::question::tests::question;
    use super::*;
    use crate::dns::turns::Turns;

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

    fn resolvers(addresses: &[SocketAddr]) -> Arc<Resolvers> {
        let resolvers = Resolvers::new(Path::new("/nonexistent"));
        resolvers.replace(addresses.to_vec());
        Arc::new(resolvers)
    }

    fn turn() -> Arc<Turn> {
        Arc::new(Turns::new(1, 1).take("t".into()).unwrap())
    }

    #[tokio::test]
    async fn a_resolver_that_fails_or_refuses_leaves_it_to_the_next_one() {
        use ResponseCode::{NXDomain, NoError, Refused, ServFail};
        let code = async |codes: &[ResponseCode]| {
            let mut servers = Vec::new();
            for code in codes {
                servers.push(resolver(*code).await);
            }
            let answer = resolvers(&servers).ask(&question("example.com."), &turn()).await;
            answer.map(|answer| answer.metadata.response_code)
        };
        assert_eq!(code(&[ServFail, Refused, NoError]).await, Some(NoError));
        assert_eq!(code(&[NXDomain, NoError]).await, Some(NXDomain));
        assert_eq!(code(&[Refused, ServFail]).await, Some(ServFail));
        assert_eq!(code(&[]).await, None);
    }

    #[tokio::test]
    async fn a_silent_resolver_delays_the_first_question_a_little_and_the_next_ones_not_at_all() {
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let servers = [silent.local_addr().unwrap(), resolver(ResponseCode::NoError).await];
        let resolvers = resolvers(&servers);
        let mut took = Vec::new();
        for _ in 0..3 {
            let start = Instant::now();
            resolvers.ask(&question("example.com."), &turn()).await.unwrap();
            took.push(start.elapsed());
        }
        assert!(took[0] >= PATIENCE && took[0] < 3 * PATIENCE, "{took:?}");
        assert!(took[1..].iter().all(|took| *took < PATIENCE), "{took:?}");
    }

    #[tokio::test]
    async fn a_resolver_that_refuses_the_port_delays_nothing() {
        let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let resolvers = resolvers(&[closed, resolver(ResponseCode::NoError).await]);
        let start = Instant::now();
        resolvers.ask(&question("example.com."), &turn()).await.unwrap();
        assert!(start.elapsed() < PATIENCE);
    }

    #[tokio::test]
    async fn where_nobody_answers_the_question_ends() {
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let resolvers = resolvers(&[silent.local_addr().unwrap()]);
        let (start, turns) = (Instant::now(), Turns::new(1, 1));
        let turn = Arc::new(turns.take("t".into()).unwrap());
        assert!(resolvers.ask(&question("example.com."), &turn).await.is_none());
        assert!(start.elapsed() < ATTEMPT + PATIENCE, "{:?}", start.elapsed());
        drop(turn);
        // Its end frees the turn.
        while turns.take("t".into()).is_none() {
            assert!(start.elapsed() < 2 * ATTEMPT);
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn a_silent_resolver_is_asked_last_and_tried_now_and_then() {
        let [first, second] = ["192.0.2.1:53", "192.0.2.2:53"].map(|text| text.parse().unwrap());
        let mut list = List { addresses: vec![first, second], ..List::default() };
        let order = |servers: &[SocketAddr], tried: &[SocketAddr]| Order {
            servers: servers.to_vec(),
            tried: tried.to_vec(),
        };
        let start = Instant::now();
        assert_eq!(list.order(start), order(&[first, second], &[]));
        list.unanswered(first, start, start);
        assert_eq!(list.order(start + SHUN / 2), order(&[second, first], &[]));
        // One question tries it, and those beside it don't.
        assert_eq!(list.order(start + SHUN), order(&[second, first], &[first]));
        assert_eq!(list.order(start + SHUN), order(&[second, first], &[]));
        list.answered(first, start + SHUN);
        assert_eq!(list.order(start + SHUN), order(&[first, second], &[]));
        for server in [first, second] {
            list.unanswered(server, start + 2 * SHUN, start + 2 * SHUN);
        }
        assert_eq!(list.order(start + 3 * SHUN), order(&[first, second], &[]));
    }

    #[test]
    fn a_resolver_that_answers_others_is_not_silent_for_one_question_that_takes_long() {
        let [first, second] = ["192.0.2.1:53", "192.0.2.2:53"].map(|text| text.parse().unwrap());
        let mut list = List { addresses: vec![first, second], ..List::default() };
        let start = Instant::now();
        list.answered(first, start + PATIENCE / 2);
        list.unanswered(first, start, start + PATIENCE);
        assert_eq!(list.order(start + PATIENCE).servers, [first, second]);
        list.unanswered(first, start + PATIENCE, start + 2 * PATIENCE);
        assert_eq!(list.order(start + 2 * PATIENCE).servers, [second, first]);
        assert!(!list.replace(vec![first, second]) && list.answered.len() == 1);
        assert!(list.replace(vec![second]) && list.answered.is_empty());
    }

    #[test]
    fn the_file_is_read_again_when_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        let resolvers = Resolvers::new(&path);
        assert!(!resolvers.refresh(), "there is none");
        let write = |text: &str, age_s: u64| {
            std::fs::write(&path, text).unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age_s)).unwrap();
        };
        write("nameserver 192.0.2.1\n", 20);
        assert!(resolvers.refresh());
        assert!(!resolvers.refresh());
        write("nameserver 192.0.2.1\nsearch example.com\n", 10);
        assert!(!resolvers.refresh(), "the same resolvers");
        write("nameserver 192.0.2.2\n", 0);
        assert!(resolvers.refresh());
        assert_eq!(resolvers.addresses(), ["192.0.2.2:53".parse().unwrap()]);
        // Emptied and filled at what the clock says is one moment.
        let file = || std::fs::File::options().write(true).open(&path).unwrap();
        let moment = SystemTime::now() + Duration::from_secs(10);
        file().set_len(0).unwrap();
        file().set_modified(moment).unwrap();
        assert!(resolvers.refresh());
        std::fs::write(&path, "nameserver 192.0.2.3\n").unwrap();
        file().set_modified(moment).unwrap();
        assert!(resolvers.refresh());
        assert_eq!(resolvers.addresses(), ["192.0.2.3:53".parse().unwrap()]);
    }
}
