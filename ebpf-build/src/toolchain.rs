//! Which rustc, cargo and bpf-linker build the BPF side on this machine.
//!
//! Any rustc does, stable ones too (`RUSTC_BOOTSTRAP=1` unlocks `-Z build-std`), so long as its sysroot carries the
//! source of `core`. The private toolchain under the target directory is what `cargo xtask setup` makes.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::RUSTC_VAR;

/// A compiler, and the linker that turns its bitcode into a BPF object.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// rustc and cargo.
    pub compiler: Compiler,
    /// bpf-linker.
    pub linker: PathBuf,
}

/// A rustc with its cargo.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// The compiler. Its sysroot has the source of `core`.
    pub rustc: PathBuf,
    /// The cargo that lies beside it.
    pub cargo: PathBuf,
    /// `LD_LIBRARY_PATH` for a compiler that is not installed where it was built for.
    pub library_path: Option<PathBuf>,
}

impl Compiler {
    /// A command that runs one of the compiler's programs.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_remove("RUSTUP_TOOLCHAIN");
        if let Some(libraries) = &self.library_path {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command
    }
}

/// Nothing on this machine builds the BPF side.
#[derive(Debug)]
pub struct NoToolchain {
    /// One line for each candidate: its path, and what it lacks.
    pub tried: Vec<String>,
}

impl fmt::Display for NoToolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "no toolchain on this machine builds the BPF side. Tried:")?;
        for line in &self.tried {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "Any of these helps:")?;
        writeln!(
            f,
            "  cargo xtask setup                  (Debian and its kin: a private toolchain under target/)"
        )?;
        writeln!(
            f,
            "  rustup component add rust-src      and `cargo install bpf-linker` with rustc's LLVM or newer"
        )?;
        write!(f, "  {RUSTC_VAR}=<rustc> or {}=<prebuilt object>", crate::OBJECT_VAR)
    }
}

impl std::error::Error for NoToolchain {}

/// Where `cargo xtask setup` puts the private toolchain.
pub fn private_dir(target_dir: &Path) -> PathBuf {
    target_dir.join("toolchain")
}

/// Empty where an agent was built as a stub; `cargo xtask setup` then writes it, so that the agent is built again.
pub fn stamp(target_dir: &Path) -> PathBuf {
    private_dir(target_dir).join("stamp")
}

/// The first toolchain that can build the BPF side.
pub fn find(target_dir: &Path) -> Result<Toolchain, NoToolchain> {
    match (find_compiler(target_dir), find_linker(target_dir)) {
        (Ok(compiler), Some(linker)) => Ok(Toolchain { compiler, linker }),
        (Ok(compiler), None) => {
            let found = format!("{}: fits", compiler.rustc.display());
            Err(NoToolchain { tried: vec![found, no_linker(target_dir)] })
        }
        (Err(none), Some(_)) => Err(none),
        (Err(mut none), None) => {
            none.tried.push(no_linker(target_dir));
            Err(none)
        }
    }
}

/// The first rustc that has a cargo beside it and the source of `core` in its sysroot.
pub fn find_compiler(target_dir: &Path) -> Result<Compiler, NoToolchain> {
    let mut tried = Vec::new();
    for (rustc, library_path) in candidates(target_dir) {
        let compiler = Compiler { cargo: rustc.with_file_name("cargo"), rustc, library_path };
        match check(&compiler) {
            Ok(()) => return Ok(compiler),
            Err(lack) => tried.push(format!("{}: {lack}", compiler.rustc.display())),
        }
    }
    Err(NoToolchain { tried })
}

/// bpf-linker: the private one, else the first on PATH, else cargo's.
pub fn find_linker(target_dir: &Path) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let private = private_dir(target_dir).join("bin");
    std::iter::once(private)
        .chain(std::env::split_paths(&path))
        .chain(home_dir("CARGO_HOME", ".cargo").map(|home| home.join("bin")))
        .map(|dir| dir.join("bpf-linker"))
        .find(|linker| linker.is_file())
}

/// A named rustc stands alone: falling back from it would hide a typing error.
fn candidates(target_dir: &Path) -> Vec<(PathBuf, Option<PathBuf>)> {
    if let Some(named) = std::env::var_os(RUSTC_VAR) {
        return vec![(named.into(), None)];
    }
    let root = private_dir(target_dir).join("root");
    let libraries = root.join("usr/lib").join(multiarch());
    let mut candidates = vec![(root.join("usr/bin/rustc"), Some(libraries))];
    candidates.extend(rustup_toolchains().into_iter().map(|dir| (dir.join("bin/rustc"), None)));
    candidates.push(("/usr/bin/rustc".into(), None));
    candidates
}

/// Debian's name for the folder that holds this architecture's libraries.
fn multiarch() -> String {
    format!("{}-linux-gnu", std::env::consts::ARCH)
}

/// Stable before numbered ones before nightly: a nightly's LLVM is likelier to be ahead of bpf-linker's.
fn rustup_toolchains() -> Vec<PathBuf> {
    let Some(home) = home_dir("RUSTUP_HOME", ".rustup") else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir(home.join("toolchains")) else { return Vec::new() };
    let mut names: Vec<OsString> = entries.flatten().map(|entry| entry.file_name()).collect();
    names.sort_by_key(|name| {
        let text = name.to_string_lossy().into_owned();
        (text.starts_with("nightly"), !text.starts_with("stable"), text)
    });
    names.into_iter().map(|name| home.join("toolchains").join(name)).collect()
}

fn home_dir(variable: &str, below_home: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    named.or_else(|| std::env::home_dir().map(|home| home.join(below_home)))
}

fn check(compiler: &Compiler) -> Result<(), String> {
    if !compiler.rustc.is_file() {
        return Err("not there".to_owned());
    }
    if !compiler.cargo.is_file() {
        return Err("no cargo beside it".to_owned());
    }
    let sysroot = sysroot(compiler)?;
    if !sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
        return Err(format!("no rust-src in its sysroot {}", sysroot.display()));
    }
    Ok(())
}

fn sysroot(compiler: &Compiler) -> Result<PathBuf, String> {
    let output = compiler
        .command(&compiler.rustc)
        .args(["--print", "sysroot"])
        .output()
        .map_err(|error| format!("does not start: {error}"))?;
    if !output.status.success() {
        return Err(format!("fails: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().into())
}

fn no_linker(target_dir: &Path) -> String {
    format!("bpf-linker: neither in {} nor on PATH", private_dir(target_dir).join("bin").display())
}
