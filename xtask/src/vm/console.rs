//! What a guest's kernel says, as far as it tells that the guest is lost.

use std::path::Path;

use crate::run;

/// After these a guest's results mean nothing.
const LOST: [&str; 7] = [
    "Kernel panic",
    "soft lockup",
    "hard LOCKUP",
    "detected stalls on CPUs",
    "self-detected stall on CPU",
    "RCU grace-period kthread stack dump",
    "BUG: ",
];

/// The line that tells that the guest is lost.
pub(super) fn complaint(console: &str) -> Option<&str> {
    console.lines().find(|line| LOST.iter().any(|lost| line.contains(lost)))
}

/// Everything that the kernel said.
pub(super) fn read(file: &Path) -> String {
    let bytes = std::fs::read(file).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\r', "")
}

/// The last lines of it.
pub(super) fn tail(file: &Path) -> String {
    let text = read(file);
    if text.trim().is_empty() { "(nothing)".to_owned() } else { run::last_lines(&text, 25) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_lockups_and_stalls_are_complaints_and_other_lines_are_not() {
        for line in [
            "[    1.2] Kernel panic - not syncing: Attempted to kill init!",
            "[   60.1] watchdog: BUG: soft lockup - CPU#1 stuck for 22s!",
            "[   70.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "[   80.0] BUG: kernel NULL pointer dereference, address: 0000000000000008",
        ] {
            assert_eq!(complaint(&format!("before\n{line}\nafter")), Some(line));
        }
        assert_eq!(complaint("[    0.0] rcu: RCU restricting CPUs\n[    2.0] a debug: line"), None);
    }
}
