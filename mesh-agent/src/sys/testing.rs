//! What tests of this crate need of the machine: root, a network namespace of their own, and a test executable that
//! can stand in for the `shoal` binary.

use std::future::Future;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::unistd::Uid;

use super::pidfd::PidFd;
use super::process;
use crate::files;
use crate::runtime::layout::TaskFile;
use crate::runtime::{task_init, whoami};

/// Runs before `main`: started as `EXE internal …`, the test executable is the program of that name instead.
#[used]
// SAFETY: the C library calls what this section lists, once, with the process set up as for `main`; std itself reads
// the arguments there, at a higher priority.
#[unsafe(link_section = ".init_array")]
static STAND_IN: extern "C" fn() = stand_in;

extern "C" fn stand_in() {
    let mut args = std::env::args().skip(1);
    if args.next().as_deref() != Some("internal") {
        return;
    }
    let code = match (args.next().as_deref(), args.next()) {
        (Some("task-init"), Some(dir)) => task_init::main(Path::new(&dir)),
        (Some("whoami"), _) => whoami::main(),
        _ => ExitCode::FAILURE,
    };
    std::process::exit(i32::from(code != ExitCode::SUCCESS));
}

/// The stand-in for the `shoal` binary.
pub(crate) fn program() -> PathBuf {
    PathBuf::from("/proc/self/exe")
}

/// Runs a test as root in a network namespace of its own, with tokio; elsewhere says that it is skipped. Threads and
/// processes that the test starts are in the namespace as well.
pub(crate) fn in_netns<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if !Uid::effective().is_root() {
        // Not by a print macro, whose output libtest keeps to itself: `cargo xtask test` counts this line.
        let _ = std::io::stdout().write_all(b"\nSKIP: needs root\n");
        return;
    }
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command that has to succeed, and returns what it printed.
pub(crate) fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Waits until `condition` holds.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Kills, when dropped, the tasks that a failed test left in this folder of tasks' folders.
pub(crate) struct KillTasks(pub(crate) PathBuf);

impl Drop for KillTasks {
    fn drop(&mut self) {
        let folders = std::fs::read_dir(&self.0).into_iter().flatten().filter_map(Result::ok);
        let paths = folders.map(|folder| folder.path().join("task.json"));
        for task in paths.filter_map(|path| files::read_json::<TaskFile>(&path).ok()?) {
            if process::start_time(task.shim).ok() == Some(task.shim_start_time)
                && let Ok(pidfd) = PidFd::open(task.shim)
            {
                let _ = pidfd.signal(Signal::SIGKILL);
            }
        }
    }
}
