//! What is unpacked below the target directory from Debian's packages, above all the private toolchain: rustc-web, and
//! a bpf-linker built for its LLVM.
//!
//! rustc-web is what Debian builds Firefox and Chromium with, so even an old Debian has a fresh one. Installed rather
//! than unpacked, it would put a second rustc on PATH, before or behind rustup's.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ebpf_build::toolchain::{self, Compiler};

use super::{Setup, debian};
use crate::{run, workspace};

const COMPILER_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
const LINKER_VERSION: &str = "0.13.0";
/// The oldest LLVM that this bpf-linker builds with.
const LLVM_MIN: u32 = 21;

/// Downloads the compiler with the libraries it needs, and unpacks it.
pub(super) fn unpack_compiler(setup: &Setup) -> Result<()> {
    setup.steps.begin("asking apt for a rustc with the source of core (rustc-web)");
    // Lists that came with a machine's image name one that is too old.
    debian::refresh(&setup.log("packages"));
    let packages = with_dependencies(&COMPILER_PACKAGES, &setup.log("packages"), belongs_to_compiler)?;
    let root = setup.directory().join("root");
    setup.steps.begin(&format!("downloading, not installing, about 150 MB: {}", packages.join(" ")));
    unpack(&packages, &root, setup)
        .context("without these packages: `rustup component add rust-src` and a bpf-linker")
}

/// Packages with what they depend on, so far as it `belongs`. Names move with each release (libstd-rust-web-1.96,
/// libllvm22), so they come from the dependencies.
pub(super) fn with_dependencies(
    seeds: &[&str],
    log: &Path,
    belongs: fn(&str) -> bool,
) -> Result<Vec<String>> {
    let mut packages: Vec<String> = seeds.iter().map(|&seed| seed.to_owned()).collect();
    let mut index = 0;
    while index < packages.len() {
        for dependency in debian::dependencies(&packages[index], log)? {
            if !packages.contains(&dependency) && belongs(&dependency) {
                packages.push(dependency);
            }
        }
        index += 1;
    }
    Ok(packages)
}

/// Downloads `packages` and unpacks them into the folder `root`, in place of what is there.
pub(super) fn unpack(packages: &[String], root: &Path, setup: &Setup) -> Result<()> {
    let debs = root.with_extension("debs");
    recreate(&debs)?;
    debian::download(packages, &debs, &setup.log("download"))?;
    // Unpacked aside and then renamed: an interrupted setup leaves no half of it where others look for the whole.
    let unpacked = root.with_extension("partial");
    recreate(&unpacked)?;
    setup.steps.begin(&format!("unpacking into {}", root.display()));
    for deb in std::fs::read_dir(&debs)? {
        run::logged(Command::new("dpkg").arg("-x").arg(deb?.path()).arg(&unpacked), &setup.log("unpack"))?;
    }
    if root.exists() {
        std::fs::remove_dir_all(root)?;
    }
    std::fs::rename(&unpacked, root)?;
    std::fs::remove_dir_all(&debs)?;
    Ok(())
}

/// Its own libraries are unpacked even where the machine has them: an upgrade of the machine must not break the folder.
fn belongs_to_compiler(package: &str) -> bool {
    let own = package.starts_with("libstd-rust") || package.starts_with("libllvm");
    own || (package.starts_with("lib") && !debian::is_installed(package))
}

/// The LLVM that `compiler` emits bitcode of; the linker's must not be older.
pub(super) fn llvm_major(compiler: &Compiler) -> Result<u32> {
    let version = run::output(compiler.command(&compiler.rustc).arg("-vV"))?;
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "));
    let major = llvm.and_then(|llvm| llvm.split('.').next()?.parse().ok());
    major.with_context(|| format!("{} does not say its LLVM version", compiler.rustc.display()))
}

/// Refuses a compiler that bpf-linker has no LLVM for.
pub(super) fn check_llvm(compiler: &Compiler, llvm: u32) -> Result<()> {
    ensure!(
        llvm >= LLVM_MIN,
        "{} emits bitcode of LLVM {llvm}, and bpf-linker {LINKER_VERSION} builds with LLVM {LLVM_MIN} or newer: run `apt-get \
         update` as root, remove {} if it is from there, and run setup again; or have a newer rustc with the source of core",
        compiler.rustc.display(),
        toolchain::private_dir(&workspace::target_dir()).display()
    );
    Ok(())
}

/// What bpf-linker is built with.
pub(super) fn linker_packages(llvm: u32) -> Vec<String> {
    let mut packages = vec![format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev")];
    packages.extend(["libzstd-dev", "zlib1g-dev", "g++"].map(str::to_owned));
    packages
}

/// Builds bpf-linker from crates.io with the machine's own cargo.
pub(super) fn build_linker(setup: &Setup, llvm: u32) -> Result<()> {
    setup.steps.begin(&format!("building bpf-linker {LINKER_VERSION} with LLVM {llvm} (about 2 minutes)"));
    let build_dir = setup.directory().join("bpf-linker.build");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut install = workspace::cargo();
    install
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--force"])
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}")])
        .arg("--root")
        .arg(setup.directory())
        .arg("--target-dir")
        .arg(&build_dir)
        .env("PATH", format!("/usr/lib/llvm-{llvm}/bin:{path}"))
        .env_remove("RUSTFLAGS");
    run::logged(&mut install, &setup.log("bpf-linker"))
        .context("bpf-linker did not build: is crates.io reachable? A bpf-linker on PATH does as well")?;
    std::fs::remove_dir_all(&build_dir)?;
    Ok(())
}

fn recreate(directory: &Path) -> Result<()> {
    if directory.exists() {
        std::fs::remove_dir_all(directory)?;
    }
    std::fs::create_dir_all(directory).with_context(|| format!("could not create {}", directory.display()))
}
