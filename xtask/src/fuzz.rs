//! `cargo xtask fuzz`: mutated packets on the host library and in the kernel, and guided fuzzing. See docs/fuzzing.md.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Args;

use crate::{lab, run, setup, workspace};

/// How much, and of what.
#[derive(Args)]
pub(crate) struct Options {
    /// Mutated packets on the host library
    #[arg(long, default_value_t = 10_000_000)]
    packets: u64,
    /// Mutated packets in the kernel beside the host library; needs root
    #[arg(long, default_value_t = 0)]
    kernel: u64,
    /// What all mutated packets come from; by default the time
    #[arg(long)]
    seed: Option<u64>,
    /// Lets libFuzzer search for so many seconds in each of its targets; needs a C++ compiler
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    guided: u32,
    /// Only this target of libFuzzer's
    #[arg(long, requires = "guided", value_parser = TARGETS)]
    target: Option<String>,
    /// Writes what libFuzzer begins with anew, from the packet fixtures and the decoders' tests, and does nothing else
    #[arg(long)]
    corpus: bool,
}

/// What libFuzzer searches in: the binaries of `fuzz/`.
const TARGETS: [&str; 22] = [
    "parse",
    "hooks",
    "decapsulate",
    "agent_message",
    "manager_message",
    "exchange",
    "token",
    "certificate",
    "raft_message",
    "raft_entry",
    "snapshot",
    "backup",
    "node",
    "csr",
    "service",
    "network",
    "request",
    "filters",
    "labels",
    "dns_question",
    "dns_answer",
    "echo",
];
/// The crates that have decoders among them, and tests that write what libFuzzer begins with for these.
const DECODING: [&str; 3] = ["mesh-api", "control", "mesh-agent"];
/// What has them write it.
const WRITE_CORPUS: &str = "SHOAL_WRITE_CORPUS";
/// Longest input that libFuzzer makes, bytes.
const INPUT_MAX: u32 = 16 << 10;
/// What a search may hold in memory, MB: nothing that is that long may need more.
const MEMORY_MAX_MB: u32 = 1024;

/// The release profile, where what it would wrap around is a panic, and without what only takes time to build.
const PROFILE: [&str; 6] = [
    "profile.fuzz.inherits=\"release\"",
    "profile.fuzz.lto=\"off\"",
    "profile.fuzz.codegen-units=16",
    "profile.fuzz.debug=\"line-tables-only\"",
    "profile.fuzz.debug-assertions=true",
    "profile.fuzz.overflow-checks=true",
];

/// What makes the compiler tell libFuzzer which way an input took. Stable compilers know it; cargo-fuzz passes the same.
const COVERAGE: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg=fuzzing",
];

/// `cargo xtask fuzz`.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.corpus {
        return corpus();
    }
    let seed = options.seed.map_or_else(now_s, Ok)?.to_string();
    if options.packets > 0 {
        mutate("host", &[&seed, &options.packets.to_string()])?;
    }
    if options.kernel > 0 {
        lab::require_root()?;
        setup::ensure_toolchain()?;
        mutate("kernel", &[&seed, &options.kernel.to_string()])?;
    }
    if options.guided > 0 {
        guided(options)?;
    }
    Ok(())
}

/// Writes what libFuzzer begins with.
fn corpus() -> Result<()> {
    mutate("corpus", &[folder().join("corpus").to_string_lossy().as_ref()])?;
    let mut command = workspace::cargo();
    command.env(WRITE_CORPUS, "1").args(["test", "--quiet", "--lib"]);
    for package in DECODING {
        command.args(["--package", package]);
    }
    run::inherit(command.arg("fuzz::"))
}

fn now_s() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs())
}

/// The workspace of libFuzzer's targets.
fn folder() -> PathBuf {
    workspace::root().join("fuzz")
}

/// Runs the program `mutate` of `shoal-tests`.
fn mutate(what: &str, words: &[&str]) -> Result<()> {
    let mut command = workspace::cargo();
    command.args(["run", "--quiet", "--package", "shoal-tests", "--bin", "mutate", "--profile", "fuzz"]);
    for setting in PROFILE {
        command.args(["--config", setting]);
    }
    run::inherit(command.arg("--").arg(what).args(words))
}

/// Lets libFuzzer search.
fn guided(options: &Options) -> Result<()> {
    let host = host_triple()?;
    let target_dir = workspace::target_dir().join("guided");
    let mut build = workspace::cargo();
    build.env("RUSTFLAGS", COVERAGE.join(" ")).env(ebpf_build::SKIP_VAR, "1");
    // With a target named, the flags are not for build scripts, which can't be linked with them.
    build.args(["build", "--release", "--locked", "--target", &host, "--target-dir"]).arg(&target_dir);
    run::inherit(build.arg("--manifest-path").arg(folder().join("Cargo.toml")))?;
    for target in
        TARGETS.into_iter().filter(|name| options.target.as_deref().is_none_or(|only| only == *name))
    {
        let found = target_dir.join("corpus").join(target);
        let failures = target_dir.join("failures").join(target);
        for folder in [&found, &failures] {
            std::fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        println!("{target}: {} s", options.guided);
        let mut search = std::process::Command::new(target_dir.join(&host).join("release").join(target));
        search.arg(format!("-max_total_time={}", options.guided));
        search.args([format!("-max_len={INPUT_MAX}"), format!("-rss_limit_mb={MEMORY_MAX_MB}")]);
        search.arg(format!("-artifact_prefix={}/", failures.display()));
        run::inherit(
            search.arg("-print_final_stats=1").arg(found).arg(folder().join("corpus").join(target)),
        )?;
    }
    Ok(())
}

/// The machine's own target.
fn host_triple() -> Result<String> {
    let said = run::output(std::process::Command::new("rustc").arg("-vV"))?;
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc names no host")?.to_owned())
}
