//! The time, read at the rim and carried in commands from there on.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since the epoch; 0 on a host whose clock is before it.
pub fn now_ns() -> u64 {
    #[cfg(test)]
    if let Some(now_ns) = simulated::now_ns() {
        return now_ns;
    }
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// A clock of a thread's own, which goes as tokio's does, and which a test sets.
#[cfg(test)]
pub(crate) mod simulated {
    use std::cell::Cell;

    use tokio::time::Instant;

    const BEGIN_NS: u64 = 1_700_000_000_000_000_000;

    thread_local! {
        static SINCE: Cell<Option<Instant>> = const { Cell::new(None) };
        static AHEAD_NS: Cell<i64> = const { Cell::new(0) };
    }

    /// This thread has it from here on.
    pub(crate) fn begin() {
        SINCE.set(Some(Instant::now()));
    }

    /// How far it is ahead of the true time, or behind that.
    pub(crate) fn set_ahead_ns(ahead_ns: i64) {
        AHEAD_NS.set(ahead_ns);
    }

    /// The true time, ns since the epoch.
    pub(crate) fn true_ns() -> Option<u64> {
        let passed_ns = SINCE.get()?.elapsed().as_nanos();
        Some(BEGIN_NS + u64::try_from(passed_ns).unwrap_or(u64::MAX))
    }

    pub(super) fn now_ns() -> Option<u64> {
        Some(true_ns()?.saturating_add_signed(AHEAD_NS.get()))
    }
}
