//! Room for the API's connections, and for the requests on them: so many, and who is slow gives way to who comes.
//!
//! A connection gives way while it has said no whole request, once it has had [`Limits::grace`] for that, and while it takes
//! its answer, once it has had [`Limits::leisure`]. What is being worked on, and streams of events, never do.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::time::{Instant, sleep};

/// How soon to look again whether one of those that are slow gives way.
const LOOK: Duration = Duration::from_millis(50);

/// What the API's socket bears at once, and for how long.
#[derive(Debug, Clone, Copy)]
pub(in crate::docker) struct Limits {
    /// Connections; further ones wait in the kernel's queue.
    pub(in crate::docker) connections: usize,
    /// Requests that are worked on, or whose answers are being taken.
    pub(in crate::docker) requests: usize,
    /// Streams of events.
    pub(in crate::docker) streams: usize,
    /// Requests' bodies of more than [`crate::docker::request::SMALL_BODY_BYTES`].
    pub(in crate::docker) large_bodies: usize,
    /// For a request's head, or between two requests.
    pub(in crate::docker) head: Duration,
    /// For a request's body.
    pub(in crate::docker) body: Duration,
    /// For a request to have its turn.
    pub(in crate::docker) turn: Duration,
    /// For the work on a request.
    pub(in crate::docker) work: Duration,
    /// For a client that takes nothing of an answer or of a stream.
    pub(in crate::docker) stalled: Duration,
    /// For saying a request while others wait.
    pub(in crate::docker) grace: Duration,
    /// For taking an answer while others wait.
    pub(in crate::docker) leisure: Duration,
}

impl Limits {
    /// The product's.
    pub(in crate::docker) const PRODUCT: Self = Self {
        connections: 512,
        requests: 64,
        streams: 128,
        large_bodies: 16,
        head: Duration::from_secs(10),
        body: Duration::from_secs(30),
        turn: Duration::from_secs(10),
        work: Duration::from_mins(2),
        stalled: Duration::from_secs(30),
        grace: Duration::from_millis(500),
        leisure: Duration::from_secs(2),
    };
}

/// What a connection is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The client is to say its next request, and since when it hasn't, where it was listened to.
    Receiving(Option<Instant>),
    /// The request is there, and waits for its turn.
    Waiting,
    /// The request is worked on.
    Working,
    /// The client takes the answer, since then.
    Answering(Instant),
    /// The client follows a stream.
    Streaming,
}

/// There are as many as may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Crowded;

#[derive(Debug)]
struct Entry {
    stage: Stage,
    /// All of the answer is on its way, some of it perhaps not taken yet.
    is_said: bool,
    /// Ends the connection when dropped.
    _hold: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    /// In the order of their coming.
    connections: BTreeMap<u64, Entry>,
}

impl Taken {
    fn count(&self, is_counted: impl Fn(Stage) -> bool) -> usize {
        self.connections.values().filter(|entry| is_counted(entry.stage)).count()
    }

    /// Ends the oldest connection of those that may be ended; false if there is none.
    fn one_gives_way(&mut self, may_end: impl Fn(Stage) -> bool) -> bool {
        let oldest = self.connections.iter().find(|(_, entry)| may_end(entry.stage));
        let Some(number) = oldest.map(|(number, _)| *number) else { return false };
        self.connections.remove(&number);
        true
    }
}

/// The room.
#[derive(Debug)]
pub(super) struct Room {
    pub(super) limits: Limits,
    /// For bodies that are long.
    pub(super) large_bodies: Arc<Semaphore>,
    /// For backups to restore, one at a time.
    pub(super) restores: Arc<Semaphore>,
    taken: Mutex<Taken>,
    freed: Notify,
}

impl Room {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        let [large_bodies, restores] = [limits.large_bodies, 1].map(|count| Arc::new(Semaphore::new(count)));
        Arc::new(Self { limits, large_bodies, restores, taken: Mutex::default(), freed: Notify::new() })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // Single insertions and removals; a panic can't leave one half done.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_slow_to_take(&self, stage: Stage) -> bool {
        matches!(stage, Stage::Answering(since) if since.elapsed() >= self.limits.leisure)
    }

    fn is_slow(&self, stage: Stage) -> bool {
        matches!(stage, Stage::Receiving(Some(since)) if since.elapsed() >= self.limits.grace)
            || self.is_slow_to_take(stage)
    }

    /// A connection's place, as soon as there is one; and what resolves when the connection is to end.
    pub(super) async fn enter(self: &Arc<Self>) -> (Place, oneshot::Receiver<()>) {
        loop {
            let freed = self.freed.notified();
            if let Some(entered) = self.try_enter() {
                return entered;
            }
            tokio::select! {
                () = freed => {}
                () = sleep(LOOK) => {}
            }
        }
    }

    fn try_enter(self: &Arc<Self>) -> Option<(Place, oneshot::Receiver<()>)> {
        let mut taken = self.taken();
        if taken.connections.len() >= self.limits.connections
            && !taken.one_gives_way(|stage| self.is_slow(stage))
        {
            return None;
        }
        let (hold, ended) = oneshot::channel();
        let number = taken.next;
        taken.next += 1;
        let entry = Entry { stage: Stage::Receiving(None), is_said: false, _hold: hold };
        taken.connections.insert(number, entry);
        Some((Place { room: Arc::clone(self), number }, ended))
    }

    /// Connections of this moment.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.taken().connections.len()
    }
}

/// A connection's place, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) room: Arc<Room>,
    number: u64,
}

impl Place {
    /// The client was listened to, and has said nothing more.
    pub(super) fn awaits(&self) {
        if let Some(entry) = self.room.taken().connections.get_mut(&self.number)
            && entry.stage == Stage::Receiving(None)
        {
            entry.stage = Stage::Receiving(Some(Instant::now()));
        }
    }

    /// Waits for the turn of the request that has been said.
    pub(super) async fn begin(&self) -> Result<(), Crowded> {
        self.to(Stage::Waiting);
        let turn = async {
            loop {
                let freed = self.room.freed.notified();
                if self.try_begin() {
                    return;
                }
                tokio::select! {
                    () = freed => {}
                    () = sleep(LOOK) => {}
                }
            }
        };
        tokio::time::timeout(self.room.limits.turn, turn).await.map_err(|_| Crowded)
    }

    fn try_begin(&self) -> bool {
        let mut taken = self.room.taken();
        let under_way = taken.count(|stage| matches!(stage, Stage::Working | Stage::Answering(_)));
        if under_way >= self.room.limits.requests
            && !taken.one_gives_way(|stage| self.room.is_slow_to_take(stage))
        {
            return false;
        }
        if let Some(entry) = taken.connections.get_mut(&self.number) {
            entry.stage = Stage::Working;
        }
        true
    }

    /// The answer is about to be sent.
    pub(super) fn answer(&self) {
        self.to(Stage::Answering(Instant::now()));
    }

    /// The answer is a stream.
    pub(super) fn follow(&self) -> Result<(), Crowded> {
        let mut taken = self.room.taken();
        if taken.count(|stage| stage == Stage::Streaming) >= self.room.limits.streams {
            return Err(Crowded);
        }
        if let Some(entry) = taken.connections.get_mut(&self.number) {
            entry.stage = Stage::Streaming;
        }
        drop(taken);
        self.room.freed.notify_waiters();
        Ok(())
    }

    /// All of the answer is on its way.
    pub(super) fn said(&self) {
        if let Some(entry) = self.room.taken().connections.get_mut(&self.number) {
            entry.is_said = true;
        }
    }

    /// The client has taken what was sent so far.
    pub(super) fn flushed(&self) {
        let mut taken = self.room.taken();
        let entry = taken.connections.get_mut(&self.number).filter(|entry| entry.is_said);
        let Some(entry) = entry else { return };
        (entry.is_said, entry.stage) = (false, Stage::Receiving(None));
        drop(taken);
        self.room.freed.notify_waiters();
    }

    fn to(&self, stage: Stage) {
        if let Some(entry) = self.room.taken().connections.get_mut(&self.number) {
            entry.stage = stage;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.room.taken().connections.remove(&self.number);
        self.room.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(connections: usize, requests: usize) -> Arc<Room> {
        Room::new(Limits { connections, requests, streams: 1, ..Limits::PRODUCT })
    }

    fn is_over(ended: &mut oneshot::Receiver<()>) -> bool {
        ended.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_that_has_said_nothing_gives_way_and_who_is_worked_for_does_not() {
        let room = room(2, 2);
        let (busy, mut busy_ends) = room.enter().await;
        busy.begin().await.unwrap();
        let (idle, mut idle_ends) = room.enter().await;
        tokio::time::advance(Limits::PRODUCT.grace).await;
        assert!(room.try_enter().is_none(), "nobody has listened to it yet");
        idle.awaits();
        assert!(room.try_enter().is_none(), "it may be about to say something");
        tokio::time::advance(Limits::PRODUCT.grace).await;
        let (third, mut third_ends) = room.enter().await;
        assert!(is_over(&mut idle_ends) && !is_over(&mut busy_ends) && !is_over(&mut third_ends));
        third.begin().await.unwrap();
        assert!(room.try_enter().is_none(), "both are worked for");
        // Who takes its answer has a while for it.
        busy.answer();
        assert!(room.try_enter().is_none());
        tokio::time::advance(Limits::PRODUCT.leisure).await;
        let (fourth, _fourth_ends) = room.enter().await;
        assert!(is_over(&mut busy_ends) && !is_over(&mut third_ends));
        drop((busy, third));
        assert_eq!(room.len(), 1);
        drop(fourth);
        assert_eq!(room.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_has_its_turn_once_another_is_answered_or_is_told_that_there_is_none() {
        let room = room(9, 1);
        let (first, _first_ends) = room.enter().await;
        let (second, _second_ends) = room.enter().await;
        first.begin().await.unwrap();
        let began = Instant::now();
        assert_eq!(second.begin().await, Err(Crowded));
        assert_eq!(began.elapsed(), Limits::PRODUCT.turn);
        first.answer();
        first.flushed();
        assert!(!second.try_begin(), "there is more to come");
        first.said();
        assert!(!second.try_begin(), "it is not taken yet");
        first.flushed();
        second.begin().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_long_over_an_answer_gives_way_to_a_request() {
        let room = room(9, 1);
        let (slow, mut slow_ends) = room.enter().await;
        let (second, _second_ends) = room.enter().await;
        slow.begin().await.unwrap();
        slow.answer();
        slow.said();
        let began = Instant::now();
        second.begin().await.unwrap();
        assert!(began.elapsed() >= Limits::PRODUCT.leisure && is_over(&mut slow_ends));
    }

    #[tokio::test(start_paused = true)]
    async fn streams_take_no_requests_place_and_are_counted_by_themselves() {
        let room = room(9, 1);
        let (stream, _stream_ends) = room.enter().await;
        let (second, _second_ends) = room.enter().await;
        stream.begin().await.unwrap();
        stream.follow().unwrap();
        second.begin().await.unwrap();
        assert_eq!(second.follow(), Err(Crowded));
        drop(stream);
        second.follow().unwrap();
    }
}
