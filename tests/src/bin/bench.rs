//! Runs benchmarks and prints their figures, one line a case; with `--json FILE` also to a file.

use std::process::ExitCode;

fn main() -> ExitCode {
    match shoal_tests::bench::dataplane::run() {
        Ok(cases) => {
            for case in cases {
                println!("{case}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:?}");
            ExitCode::FAILURE
        }
    }
}
