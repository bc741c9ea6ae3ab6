//! Takes a lab down, whatever is left of it, and looks whether anything stayed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use super::layout::{self, RUN_DIR};
use super::{processes, topology};
use crate::bounded;

/// What there was to remove.
#[derive(Default, PartialEq, Eq, Debug)]
pub(crate) struct Removed {
    pub(crate) processes: usize,
    pub(crate) mounts: usize,
    pub(crate) namespaces: usize,
    pub(crate) files: usize,
}

/// Removes everything; goes on past what it can't remove, and names all of that in its error.
pub(crate) fn down() -> Result<Removed> {
    let mut removed = Removed::default();
    let mut failures = Vec::new();
    // Processes first: they hold the namespaces and the mounted files.
    match processes::kill_all() {
        Ok(count) => removed.processes = count,
        Err(error) => failures.push(format!("{error:#}")),
    }
    // Deepest first. With a BPF file system go its pins, and with them programs and maps.
    for mount in mounts().into_iter().rev() {
        let unmounted = bounded::output(Command::new("umount").arg(&mount), Duration::from_secs(10));
        note(unmounted.map(drop), &mut removed.mounts, &mut failures);
    }
    for namespace in topology::namespaces() {
        note(topology::remove_netns(&namespace), &mut removed.namespaces, &mut failures);
    }
    for path in files() {
        let gone = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        let gone = gone.map_err(|error| anyhow::anyhow!("could not remove {}: {error}", path.display()));
        note(gone, &mut removed.files, &mut failures);
    }
    // Not ours to remove where somebody else keeps files in it.
    let _ = fs::remove_dir(RUN_DIR);

    failures.extend(leftovers());
    if failures.is_empty() {
        return Ok(removed);
    }
    bail!("the lab is not all gone:\n  {}", failures.join("\n  "))
}

fn note(result: Result<()>, count: &mut usize, failures: &mut Vec<String>) {
    match result {
        Ok(()) => *count += 1,
        Err(error) => failures.push(format!("{error:#}")),
    }
}

/// Whether there is anything of a lab on this machine.
pub(super) fn is_any_left() -> bool {
    !leftovers().is_empty()
}

/// What there is of a lab, one line each.
fn leftovers() -> Vec<String> {
    let processes = processes::all().into_iter().map(|p| format!("process {}: {}", p.pid, p.command));
    let namespaces = topology::namespaces().into_iter().map(|name| format!("namespace {name}"));
    let mounts = mounts().into_iter().map(|path| format!("mount {}", path.display()));
    let files = files().into_iter().map(|path| format!("file {}", path.display()));
    processes.chain(namespaces).chain(mounts).chain(files).collect()
}

/// The lab's files: its record, its binary, its nodes' folders.
fn files() -> Vec<PathBuf> {
    let entries = fs::read_dir(RUN_DIR).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let own = names.filter(|name| name == "lab.json" || name == "bin" || layout::is_node(name));
    let mut paths: Vec<PathBuf> = own.map(|name| Path::new(RUN_DIR).join(name)).collect();
    paths.sort();
    paths
}

/// The file systems mounted in the lab's files, in the order in which they were mounted.
fn mounts() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    points.filter(|point| is_in_the_lab(point)).collect()
}

fn is_in_the_lab(path: &Path) -> bool {
    let Ok(below) = path.strip_prefix(RUN_DIR) else { return false };
    let first = below.components().next().map(|first| first.as_os_str().to_string_lossy().into_owned());
    first.is_some_and(|name| name == "bin" || layout::is_node(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_lab_mounts_is_unmounted() {
        for own in ["/run/shoal/bin", "/run/shoal/n1/bpf", "/run/shoal/n12/state/x"] {
            assert!(is_in_the_lab(Path::new(own)), "{own}");
        }
        for other in ["/run/shoal", "/run/shoal/tasks", "/run/shoal-n1", "/run/netns/shoal-n1", "/"] {
            assert!(!is_in_the_lab(Path::new(other)), "{other}");
        }
    }
}
