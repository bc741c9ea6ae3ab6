//! Questions that are not ours, passed on to the host's resolvers.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use hickory_proto::op::Message;
use mesh_api::id::TaskId;
use tokio::sync::OnceCell;

mod cache;
mod exchange;
#[cfg(any(test, feature = "fuzz"))]
pub(super) mod fuzz;
mod question;
mod resolvers;

use super::turns::{Turn, Turns};
use cache::Cache;
pub(super) use question::Question;
use resolvers::Resolvers;

/// Questions of one task that may be out at once; more fail at once rather than pile up.
const PER_TASK_MAX: usize = 64;
/// Questions of all tasks that may be out at once.
const ALL_MAX: usize = 512;

/// Passes questions on.
#[derive(Debug)]
pub(super) struct Forwarder {
    resolvers: Arc<Resolvers>,
    cache: Cache,
    turns: Arc<Turns>,
    /// The questions that are out: who asks one of them again waits for the same answer.
    out: Mutex<HashMap<Question, Arc<Asked>>>,
}

/// A question's answer, once there is one or is not going to be.
type Asked = OnceCell<Option<Message>>;

impl Forwarder {
    /// Asks the resolvers that `resolv_conf` names, reading it again whenever it changes.
    pub(super) fn new(resolv_conf: &Path) -> Self {
        Self {
            resolvers: Arc::new(Resolvers::new(resolv_conf)),
            cache: Cache::new(),
            turns: Turns::new(PER_TASK_MAX, ALL_MAX),
            out: Mutex::default(),
        }
    }

    /// The answer, where it is known.
    pub(super) fn known(&self, question: &Question) -> Option<Message> {
        if self.resolvers.refresh() {
            self.cache.clear();
        }
        self.cache.get(question, Instant::now())
    }

    /// The right of `task` to one question; `None` when too many are out.
    pub(super) fn turn(&self, task: TaskId) -> Option<Turn> {
        self.turns.take(task)
    }

    /// The answer of the first resolver that has one; `None` when none answers.
    pub(super) async fn ask(&self, question: &Question, turn: Turn) -> Option<Message> {
        let turn = Arc::new(turn);
        let asked = Arc::clone(self.lock_out().entry(question.clone()).or_default());
        let answer = asked.get_or_init(async || {
            let resolvers = self.resolvers.addresses();
            let answer = self.resolvers.ask(question, &turn).await;
            // What others said who are the host's resolvers no longer is not held.
            if let Some(answer) = answer.as_ref().filter(|_| self.resolvers.addresses() == resolvers) {
                self.cache.insert(question, answer, Instant::now());
            }
            answer
        });
        let answer = answer.await.clone();
        let mut out = self.lock_out();
        // Not another one that was begun since.
        if out.get(question).is_some_and(|other| Arc::ptr_eq(other, &asked)) {
            out.remove(question);
        }
        answer
    }

    fn lock_out(&self) -> std::sync::MutexGuard<'_, HashMap<Question, Arc<Asked>>> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{RData, Record};
    use tokio::net::UdpSocket;

    use super::question::tests::question;
    use super::*;

    fn forwarder(resolver: &UdpSocket) -> Arc<Forwarder> {
        let forwarder = Forwarder::new(Path::new("/nonexistent"));
        forwarder.resolvers.replace(vec![resolver.local_addr().unwrap()]);
        Arc::new(forwarder)
    }

    async fn answer(resolver: &UdpSocket) {
        let mut buffer = [0; 512];
        let (len, client) = resolver.recv_from(&mut buffer).await.unwrap();
        let mut answer = Message::from_vec(&buffer[..len]).unwrap().into_response();
        let name = answer.queries[0].name().clone();
        answer.add_answer(Record::from_rdata(name, 60, RData::A(A::new(192, 0, 2, 1))));
        resolver.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
    }

    #[tokio::test]
    async fn who_asks_the_same_meanwhile_waits_for_the_same_answer_and_who_asks_later_has_it_at_once() {
        let resolver = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let forwarder = forwarder(&resolver);
        let ask = |task: &str| {
            let (forwarder, turn) = (Arc::clone(&forwarder), forwarder.turn(task.into()).unwrap());
            tokio::spawn(async move { forwarder.ask(&question("example.com."), turn).await })
        };
        let asked = [ask("a"), ask("b"), ask("b")];
        // The only one that the resolver is asked.
        answer(&resolver).await;
        for asked in asked {
            assert_eq!(asked.await.unwrap().unwrap().answers.len(), 1);
        }
        assert!(forwarder.lock_out().is_empty());
        let known = forwarder.known(&question("example.com.")).unwrap();
        assert_eq!(known.answers.len(), 1);
        assert!(resolver.try_recv(&mut [0; 512]).is_err(), "asked again");
    }

    #[tokio::test]
    async fn what_a_former_resolver_says_is_not_held() {
        let former = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let forwarder = forwarder(&former);
        let turn = forwarder.turn("a".into()).unwrap();
        let asking = Arc::clone(&forwarder);
        let asked = tokio::spawn(async move { asking.ask(&question("example.com."), turn).await });
        former.readable().await.unwrap();
        forwarder.resolvers.replace(vec!["192.0.2.1:53".parse().unwrap()]);
        answer(&former).await;
        assert!(asked.await.unwrap().is_some());
        assert!(forwarder.known(&question("example.com.")).is_none());
    }
}
