//! `cargo xtask setup`: makes a fresh machine able to build the BPF side, and to run the lab, the demo and the tests.
//!
//! Looks first, and does only what is missing. Outside the target directory it changes nothing but to install the
//! Debian packages that it names before installing them.

mod debian;
mod private;
mod programs;
mod vm;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use ebpf_build::toolchain::{self, Compiler, Toolchain};
use ebpf_build::{OBJECT_VAR, RUSTC_VAR, SKIP_VAR};

use self::programs::Program;
pub(crate) use self::vm::{VmPrograms, ensure as ensure_vm};
use crate::{run, workspace};

/// `cargo xtask setup`.
pub(crate) fn run() -> Result<()> {
    let started = Instant::now();
    let changed = complete(programs::missing)?;
    let outcome = if changed { "ready" } else { "it is all there" };
    if ebpf_build::is_overridden() {
        println!("setup: {outcome}, without a BPF toolchain: {OBJECT_VAR} or {SKIP_VAR} is set");
        return Ok(());
    }
    let toolchain = toolchain::find(&workspace::target_dir())?;
    verify(&toolchain)?;
    println!("setup: {outcome} ({:.1} s)", started.elapsed().as_secs_f32());
    println!("  rustc       {}", toolchain.compiler.rustc.display());
    println!("  bpf-linker  {}", toolchain.linker.display());
    Ok(())
}

/// What commands that run the lab or root tests call first: toolchain and programs.
pub(crate) fn ensure() -> Result<()> {
    complete(programs::missing).map(drop)
}

/// What benchmarks call first: their programs as well.
pub(crate) fn ensure_for_benchmarks() -> Result<()> {
    complete(programs::missing_for_benchmarks).map(drop)
}

/// What commands that only build call first: it asks for no program that a build can do without.
pub(crate) fn ensure_toolchain() -> Result<()> {
    complete(Vec::new).map(drop)
}

/// Does what is missing; says whether there was anything.
fn complete(missing_programs: fn() -> Vec<&'static Program>) -> Result<bool> {
    let target_dir = workspace::target_dir();
    let lacks_toolchain = || !ebpf_build::is_overridden() && toolchain::find(&target_dir).is_err();
    if !lacks_toolchain() && missing_programs().is_empty() {
        return stamp(&target_dir).map(|()| false);
    }
    let _lock = lock()?;
    // Another setup may have done it while this one waited for the lock: look again.
    let (lacks_toolchain, programs) = (lacks_toolchain(), missing_programs());
    if !lacks_toolchain && programs.is_empty() {
        return Ok(false);
    }
    let packages = programs.iter().map(|program| program.package.to_owned()).collect();
    let setup = Setup { steps: Steps::new(), target_dir };
    if lacks_toolchain {
        setup.provide_toolchain(packages)?;
    } else {
        setup.install(&packages)?;
    }
    stamp(&setup.target_dir)?;
    Ok(true)
}

/// One setup at a time works on a target directory.
fn lock() -> Result<File> {
    let directory = toolchain::private_dir(&workspace::target_dir());
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("could not create {}", directory.display()))?;
    let path = directory.join("lock");
    let file = File::create(&path).with_context(|| format!("could not write {}", path.display()))?;
    if file.try_lock().is_err() {
        println!("setup: waiting for another setup to end");
        file.lock()?;
    }
    Ok(file)
}

struct Setup {
    steps: Steps,
    target_dir: PathBuf,
}

impl Setup {
    /// Installs `packages` on the way: one run of apt is quicker than two.
    fn provide_toolchain(&self, mut packages: Vec<String>) -> Result<()> {
        let compiler = self.compiler()?;
        if toolchain::find_linker(&self.target_dir).is_some() {
            return self.install(&packages);
        }
        let llvm = private::llvm_major(&compiler)?;
        private::check_llvm(&compiler, llvm)?;
        packages.extend(private::linker_packages(llvm));
        self.install(&packages)?;
        private::build_linker(self, llvm)
    }

    /// One that is there, else the private one. A compiler that the user named is not replaced by another.
    fn compiler(&self) -> Result<Compiler> {
        let none = match toolchain::find_compiler(&self.target_dir) {
            Ok(compiler) => return Ok(compiler),
            Err(none) => none,
        };
        if std::env::var_os(RUSTC_VAR).is_some() {
            return Err(none.into());
        }
        debian::require_apt().context(none)?;
        private::unpack_compiler(self)?;
        Ok(toolchain::find_compiler(&self.target_dir)?)
    }

    fn install(&self, packages: &[String]) -> Result<()> {
        let missing = debian::missing(packages, &self.log("install"))?;
        if missing.is_empty() {
            return Ok(());
        }
        self.steps.begin(&format!("installing Debian packages: {}", missing.join(" ")));
        debian::install(&missing, &self.log("install"))
    }

    fn directory(&self) -> PathBuf {
        toolchain::private_dir(&self.target_dir)
    }

    fn log(&self, step: &str) -> PathBuf {
        self.directory().join(format!("{step}.log"))
    }
}

/// Tells the agent's build script that it can build more than a stub; also where the toolchain came by other means.
fn stamp(target_dir: &Path) -> Result<()> {
    let stamp = toolchain::stamp(target_dir);
    let stubbed = std::fs::metadata(&stamp).is_ok_and(|stamp| stamp.len() == 0);
    if stubbed && toolchain::find(target_dir).is_ok() {
        std::fs::write(&stamp, "set up\n").with_context(|| format!("could not write {}", stamp.display()))?;
    }
    Ok(())
}

/// Both programs start: libraries that they need are there.
fn verify(toolchain: &Toolchain) -> Result<()> {
    let compiler = &toolchain.compiler;
    run::output(compiler.command(&compiler.rustc).arg("-vV"))?;
    run::output(compiler.command(&compiler.cargo).arg("-V"))?;
    run::output(std::process::Command::new(&toolchain.linker).arg("--version"))?;
    Ok(())
}

/// Says what is being done, numbered, with the seconds since the start.
struct Steps {
    started: Instant,
    count: std::cell::Cell<u32>,
}

impl Steps {
    fn new() -> Self {
        Self { started: Instant::now(), count: std::cell::Cell::new(0) }
    }

    fn begin(&self, what: &str) {
        self.count.set(self.count.get() + 1);
        println!("{:5.0} s  {}. {what}", self.started.elapsed().as_secs_f32(), self.count.get());
    }
}
