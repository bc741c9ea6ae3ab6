//! Room for peers that have not said yet what they want: so many, and each for so long.
//!
//! When there is no more, whoever has the most of it gives way with its oldest: one host that opens connection upon
//! connection pushes out its own, and an honest peer has its slot for longer than it needs.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

use super::refusals::Cause;

/// The slots.
#[derive(Debug)]
pub(super) struct Slots {
    max: usize,
    time: Duration,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    /// In the order of their coming: the source, and what drops its connection when dropped itself.
    slots: BTreeMap<u64, (IpAddr, oneshot::Sender<()>)>,
}

impl Taken {
    /// The oldest slot of the source that has the most.
    fn least_due(&self) -> Option<u64> {
        let mut sources: BTreeMap<IpAddr, (usize, u64)> = BTreeMap::new();
        for (number, (source, _)) in &self.slots {
            sources.entry(*source).or_insert((0, *number)).0 += 1;
        }
        sources
            .into_values()
            .max_by_key(|(count, oldest)| (*count, u64::MAX - oldest))
            .map(|(_, oldest)| oldest)
    }
}

impl Slots {
    /// `max` slots of `time` each.
    pub(super) fn new(max: usize, time: Duration) -> Arc<Self> {
        Arc::new(Self { max, time, taken: Mutex::default() })
    }

    /// A slot for a peer from `source`.
    pub(super) fn take(self: &Arc<Self>, source: IpAddr) -> Slot {
        let (hold, evicted) = oneshot::channel();
        let mut taken = self.taken();
        if taken.slots.len() >= self.max
            && let Some(number) = taken.least_due()
        {
            taken.slots.remove(&number);
        }
        let number = taken.next;
        taken.next += 1;
        taken.slots.insert(number, (source, hold));
        drop(taken);
        Slot { slots: Arc::clone(self), number, evicted, deadline: Instant::now() + self.time }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // Single insertions and removals; a panic can't leave one half done.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are taken.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.taken().slots.len()
    }
}

/// A slot, given back when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Slots>,
    number: u64,
    evicted: oneshot::Receiver<()>,
    deadline: Instant,
}

impl Slot {
    /// What `work` comes to, if that is while the slot lasts.
    pub(super) async fn within<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Cause> {
        tokio::select! {
            done = work => Ok(done),
            _ = &mut self.evicted => Err(Cause::Crowded),
            () = sleep_until(self.deadline) => Err(Cause::Slow),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.taken().slots.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::net::Ipv4Addr;

    use super::*;

    fn source(number: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, number).into()
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_the_most_gives_way_with_its_oldest() {
        let slots = Slots::new(3, Duration::from_secs(5));
        let mut honest = slots.take(source(1));
        let mut flood: Vec<Slot> = (0..2).map(|_| slots.take(source(2))).collect();
        for _ in 0..10 {
            flood.push(slots.take(source(2)));
        }
        assert_eq!(slots.len(), 3);
        assert_eq!(honest.within(async { 7 }).await, Ok(7));
        for slot in &mut flood[..10] {
            assert_eq!(slot.within(pending::<()>()).await, Err(Cause::Crowded));
        }
        assert_eq!(flood[11].within(pending::<()>()).await, Err(Cause::Slow));
        drop((honest, flood));
        assert_eq!(slots.len(), 0);
    }
}
