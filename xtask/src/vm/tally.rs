//! What a suite's lines add up to. What did not run, or is not known to have run, never counts as passed.

use std::fmt;
use std::ops::AddAssign;

/// How many tests ended which way.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Tally {
    /// Whether every test ran and passed.
    pub(super) fn is_clean(self) -> bool {
        self.failed == 0 && self.skipped == 0
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// The counts of a suite that runs.
#[derive(Default)]
pub(super) struct Counting {
    found: Tally,
    /// Tests that say that they were skipped: libtest has no skips, and counts them among those that passed.
    disguised: usize,
}

impl Counting {
    /// Takes a line of a test program into account.
    pub(super) fn read(&mut self, line: &str) {
        if line.starts_with("SKIP: ") {
            self.disguised += 1;
        }
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let count = |word: &str| -> usize {
            let part = result.split(['.', ';']).find_map(|part| part.trim().strip_suffix(word));
            part.and_then(|number| number.trim().parse().ok()).unwrap_or_default()
        };
        self.found += Tally { passed: count("passed"), failed: count("failed"), skipped: count("ignored") };
    }

    /// The counts at the suite's end: `is_ok` is what it said itself, `wanted` how many tests it must consist of.
    pub(super) fn close(&self, is_ok: bool, wanted: usize) -> Tally {
        let Tally { passed, mut failed, skipped } = self.found;
        let (passed, skipped) = (passed.saturating_sub(self.disguised), skipped + self.disguised);
        if !is_ok && failed == 0 {
            // It crashed, or could not start: no line says so.
            failed = 1;
        }
        let missing = wanted.saturating_sub(passed + failed + skipped);
        Tally { passed, failed, skipped: skipped + missing }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(lines: &[&str], is_ok: bool, wanted: usize) -> String {
        let mut counting = Counting::default();
        for line in lines {
            counting.read(line);
        }
        counting.close(is_ok, wanted).to_string()
    }

    #[test]
    fn closing_lines_are_added_up() {
        let lines = [
            "test packet::x ... ok",
            "test result: ok. 6 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 1.20s",
            "test result: FAILED. 1 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.20s",
        ];
        assert_eq!(closed(&lines, false, 1), "7 passed, 2 failed, 1 skipped");
    }

    #[test]
    fn what_did_not_run_has_not_passed() {
        assert_eq!(closed(&[], true, 1), "0 passed, 0 failed, 1 skipped");
        assert_eq!(closed(&[], false, 1), "0 passed, 1 failed, 0 skipped");
        let skip = ["SKIP: needs root", "test result: ok. 2 passed; 0 failed; 0 ignored"];
        assert_eq!(closed(&skip, true, 2), "1 passed, 0 failed, 1 skipped");
        let fewer = ["test result: ok. 3 passed; 0 failed; 0 ignored"];
        assert_eq!(closed(&fewer, true, 5), "3 passed, 0 failed, 2 skipped");
    }
}
