//! `shoal internal …`: what the agent runs as processes of their own. Not for people, so not in the help.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use mesh_agent::runtime;

/// Runs the internal program that the command line names, if it names one.
pub(crate) fn dispatch() -> Option<ExitCode> {
    let args: Vec<OsString> = std::env::args_os().skip(1).take(3).collect();
    if args.first()? != "internal" {
        return None;
    }
    Some(match (args.get(1).and_then(|name| name.to_str()), args.get(2)) {
        (Some("task-init"), Some(dir)) => runtime::task_init::main(Path::new(dir)),
        (Some("whoami"), _) => runtime::whoami::main(),
        _ => {
            eprintln!("shoal internal: expected task-init DIR or whoami; the agent runs these by itself");
            ExitCode::from(2)
        }
    })
}
