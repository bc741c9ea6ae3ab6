//! Runs mutated packets: `mutate host SEED PACKETS`, `mutate kernel SEED PACKETS`. `mutate corpus FOLDER` writes what the
//! guided fuzzers begin with.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use shoal_tests::mutate::rounds::{self, Ends, Total};
use shoal_tests::mutate::starts::Starts;
use shoal_tests::mutate::{ROUND, kernel, targets};

/// Failures of a thread after which it stops.
const FAILURES_MAX: usize = 10;
/// Packets between two words about how far it is.
const TELL_PACKETS: u64 = 10_000_000;

fn main() -> Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["host", seed, packets] => host(number(seed)?, number(packets)?),
        ["kernel", seed, packets] => in_kernel(number(seed)?, number(packets)?),
        ["corpus", folder] => write_corpus(Path::new(folder)).map(|()| ExitCode::SUCCESS),
        _ => bail!("mutate host SEED PACKETS, mutate kernel SEED PACKETS, or mutate corpus FOLDER"),
    }
}

fn number(word: &str) -> Result<u64> {
    word.parse().with_context(|| format!("{word} is no number"))
}

fn host(seed: u64, packets: u64) -> Result<ExitCode> {
    let starts = Starts::of_fixtures();
    let threads = std::thread::available_parallelism()?.get();
    let rounds = packets.div_ceil(ROUND as u64);
    println!("host library: seed {seed}, {rounds} rounds of {ROUND} packets, {threads} threads");
    // A panic is reported with its packet.
    std::panic::set_hook(Box::new(|info| eprintln!("{info}")));
    let began = Instant::now();
    let tell = |done: u64| {
        if done / TELL_PACKETS != (done - ROUND as u64) / TELL_PACKETS {
            println!("  {} million packets after {} s", done / 1_000_000, began.elapsed().as_secs());
            let _ = std::io::stdout().flush();
        }
    };
    let Total { packets, ends, failures } =
        rounds::all(&starts, seed, 0..rounds, threads, FAILURES_MAX, tell);
    let seconds = began.elapsed().as_secs_f64();
    let rate = f64_of(packets) / seconds;
    println!("{packets} packets in {seconds:.0} s, {rate:.0} a second, {} failures", failures.len());
    print_ends(&ends);
    for failure in &failures {
        println!("{failure}");
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn in_kernel(seed: u64, packets: u64) -> Result<ExitCode> {
    let starts = Starts::of_fixtures();
    let rounds = packets.div_ceil(ROUND as u64);
    println!("kernel beside host library: seed {seed}, {rounds} rounds of {ROUND} packets");
    let began = Instant::now();
    let mut kernel = kernel::Kernel::new()?;
    let mut total = kernel::Total::default();
    for round in 0..rounds {
        kernel.round(&starts, seed, round, &mut total)?;
        if total.differences.len() >= FAILURES_MAX {
            break;
        }
    }
    let kernel::Total { packets, not_taken, no_way, ends, differences } = &total;
    let seconds = began.elapsed().as_secs_f64();
    let rate = f64_of(*packets) / seconds;
    println!(
        "{packets} packets in {seconds:.0} s, {rate:.0} a second; {not_taken} more that the kernel's test runs don't take; \
         {no_way} for which only the host library has a way; {} differences",
        differences.len()
    );
    print_ends(ends);
    for difference in differences {
        println!("{difference}");
    }
    Ok(if differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[expect(clippy::cast_precision_loss, reason = "a figure to look at")]
fn f64_of(count: u64) -> f64 {
    count as f64
}

fn print_ends(ends: &Ends) {
    for (name, count) in ends {
        println!("  {name:<12} {count:>12}");
    }
}

fn write_corpus(folder: &Path) -> Result<()> {
    for (target, _) in targets::ALL {
        let folder = folder.join(target);
        std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        for (number, data) in targets::corpus(target).into_iter().enumerate() {
            let file = folder.join(format!("{number:02}"));
            std::fs::write(&file, data).with_context(|| format!("writing {}", file.display()))?;
        }
    }
    Ok(())
}
