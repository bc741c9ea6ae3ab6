//! The programs that `cargo xtask vm-test` calls, unpacked from Debian's packages below the target directory.
//!
//! Unpacked rather than installed: a machine that never runs a guest gets no emulator, and one that has another
//! version of it keeps that.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Setup, Steps, debian, private};
use crate::workspace;

const PACKAGES: [&str; 5] = ["qemu-system-x86", "seabios", "busybox-static", "kmod", "xz-utils"];
/// Debian 12 has it in qemu-system-common, which the first of the packages depends on; later ones have it apart.
const FILE_SYSTEM_PACKAGE: &str = "virtiofsd";
/// Where packages put programs, and libraries.
const PROGRAM_FOLDERS: [&str; 5] = ["usr/bin", "bin", "usr/sbin", "usr/libexec", "usr/lib/qemu"];
const LIBRARY_FOLDERS: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// The unpacked programs.
#[derive(Debug)]
pub(crate) struct VmPrograms {
    root: PathBuf,
}

impl VmPrograms {
    /// Where a program is: `qemu-system-x86_64`, `virtiofsd`, `busybox`, `kmod`, `xz`.
    pub(crate) fn path(&self, name: &str) -> Result<PathBuf> {
        let mut places = PROGRAM_FOLDERS.iter().map(|folder| self.root.join(folder).join(name));
        let found = places.find(|place| place.is_file());
        found.with_context(|| {
            let root = self.root.display();
            format!("{root} has no {name}: remove that folder, and it is made again")
        })
    }

    /// The value of LD_LIBRARY_PATH that the programs start with.
    pub(crate) fn library_path(&self) -> String {
        let folders = LIBRARY_FOLDERS.map(|folder| self.root.join(folder).display().to_string());
        folders.join(":")
    }

    /// A command that runs one of the programs.
    pub(crate) fn command(&self, name: &str) -> Result<Command> {
        let mut command = Command::new(self.path(name)?);
        command.env("LD_LIBRARY_PATH", self.library_path());
        Ok(command)
    }

    /// What QEMU loads: firmware and boot code.
    pub(crate) fn firmware(&self) -> PathBuf {
        self.root.join("usr/share/qemu")
    }
}

/// Unpacks the programs, unless they are there.
pub(crate) fn ensure() -> Result<VmPrograms> {
    let target_dir = workspace::target_dir();
    let root = target_dir.join("vm/programs");
    if root.is_dir() {
        return Ok(VmPrograms { root });
    }
    let _lock = super::lock()?;
    if !root.is_dir() {
        let setup = Setup { steps: Steps::new(), target_dir };
        unpack(&setup, &root).context("setting up an emulator")?;
    }
    Ok(VmPrograms { root })
}

fn unpack(setup: &Setup, root: &Path) -> Result<()> {
    debian::require_apt()?;
    let log = setup.log("vm-packages");
    let belongs: fn(&str) -> bool = |package| {
        package.starts_with("qemu-system-") || (package.starts_with("lib") && !debian::is_installed(package))
    };
    let mut packages = private::with_dependencies(&PACKAGES, &log, belongs)?;
    if debian::has_candidate(FILE_SYSTEM_PACKAGE) {
        let more = private::with_dependencies(&[FILE_SYSTEM_PACKAGE], &log, belongs)?;
        packages.extend(more);
        packages.sort();
        packages.dedup();
    }
    setup.steps.begin(&format!("downloading, not installing, about 20 MB: {}", packages.join(" ")));
    private::unpack(&packages, root, setup)
}
