//! Runs cases one after another on the lab, and prints as `cargo test` does, with each case's figures below its name.
//!
//! libtest runs cases side by side and hides what a passing one prints; a lab is one machine, and figures are the point.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow};

use crate::lab::Lab;

/// A case: its name as a sentence, and what it does.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Lab) -> Result<()>,
}

/// Names cases by their functions.
#[macro_export]
macro_rules! cases {
    ($($module:ident :: $case:ident),* $(,)?) => {
        &[$($crate::harness::Case {
            name: concat!(stringify!($module), "::", stringify!($case)),
            run: $crate::$module::$case,
        }),*]
    };
}

/// Prints a figure of the running case.
#[macro_export]
macro_rules! figure {
    ($($part:tt)*) => { println!("    {}", format_args!($($part)*)) };
}

/// The cases there are.
pub(crate) struct Cases {
    /// They run on every lab.
    pub(crate) everywhere: &'static [Case],
    /// They run on labs with XDP.
    pub(crate) once: &'static [Case],
    /// They run where the command line asks for them by their full names.
    pub(crate) on_request: &'static [Case],
}

/// Runs the cases that are meant for the lab, if the command line asks for them or names none, and those that it names in full.
pub(crate) fn main(cases: &Cases) -> ExitCode {
    let arguments = Arguments::parse(std::env::args().skip(1));
    let Cases { everywhere, once, on_request } = cases;
    let all = everywhere.len() + once.len() + on_request.len();
    let Some(lab) = Lab::from_environment() else {
        if arguments.list {
            return ExitCode::SUCCESS;
        }
        // Of a plain `cargo test`: no result of any case, so that nobody takes it for one.
        println!("\nno lab: these {} cases run by `cargo xtask test`", all - on_request.len());
        return ExitCode::SUCCESS;
    };
    let is_chosen = |case: &&Case| arguments.chooses(case.name);
    let is_named = |case: &&Case| arguments.names(case.name);
    let once = once.iter().filter(|case| if lab.has_xdp { is_chosen(case) } else { is_named(case) });
    let chosen = everywhere.iter().filter(is_chosen).chain(once).chain(on_request.iter().filter(is_named));
    let chosen: Vec<&Case> = chosen.collect();
    if arguments.list {
        for case in chosen {
            println!("{}: test", case.name);
        }
        return ExitCode::SUCCESS;
    }
    run(&lab, &chosen, all)
}

fn run(lab: &Lab, chosen: &[&Case], all: usize) -> ExitCode {
    let started = Instant::now();
    println!("\nrunning {} tests", chosen.len());
    let mut failed = Vec::new();
    for case in chosen {
        let started = Instant::now();
        println!("test {} …", case.name);
        let outcome = protected(|| (case.run)(lab));
        // What a case leaves behind is its failure, and must not become the next one's.
        let outcome = match (outcome, protected(|| lab.reset())) {
            (Ok(()), reset) => reset.map_err(|error| error.context("after the case")),
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(reset)) => Err(anyhow!("{error:#}\n    and after the case: {reset:#}")),
        };
        let seconds = started.elapsed().as_secs_f32();
        match outcome {
            Ok(()) => println!("test {} … ok ({seconds:.1} s)", case.name),
            Err(error) => {
                println!("    {error:#}");
                println!("test {} … FAILED ({seconds:.1} s)", case.name);
                failed.push(case.name);
            }
        }
    }
    if !failed.is_empty() {
        println!("\nfailures:\n    {}", failed.join("\n    "));
    }
    println!(
        "\ntest result: {}. {} passed; {} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s",
        if failed.is_empty() { "ok" } else { "FAILED" },
        chosen.len() - failed.len(),
        failed.len(),
        all - chosen.len(),
        started.elapsed().as_secs_f32()
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A panic is a failure of its case alone.
fn protected(work: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(anyhow!("panicked: {}", text.unwrap_or("with something that is no text")))
    })
}

/// The part of libtest's command line that cargo and people use.
#[derive(Default)]
struct Arguments {
    list: bool,
    exact: bool,
    filters: Vec<String>,
}

impl Arguments {
    fn parse(words: impl Iterator<Item = String>) -> Self {
        let mut arguments = Self::default();
        let mut words = words;
        while let Some(word) = words.next() {
            match word.as_str() {
                "--list" => arguments.list = true,
                "--exact" => arguments.exact = true,
                // These are followed by a value.
                "--format" | "--test-threads" | "--color" | "--skip" => drop(words.next()),
                flag if flag.starts_with('-') => {}
                filter => arguments.filters.push(filter.to_owned()),
            }
        }
        arguments
    }

    fn chooses(&self, name: &str) -> bool {
        let contained = || self.filters.iter().any(|filter| name.contains(filter.as_str()));
        self.filters.is_empty() || if self.exact { self.names(name) } else { contained() }
    }

    /// Whether a filter is the whole name.
    fn names(&self, name: &str) -> bool {
        self.filters.iter().any(|filter| filter == name)
    }
}
