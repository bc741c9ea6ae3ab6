//! The guest's first file system: busybox, the modules that the host's files are reached by, and `init.sh`.

use std::path::Path;

use anyhow::{Context, Result};

use super::kernels::Kernel;
use crate::setup::VmPrograms;

/// What it takes to see the host's files, and to write on top of them.
const MODULES: [&str; 3] = ["virtio_pci", "virtiofs", "overlay"];

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const DATA: u32 = 0o100_644;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// The initrd of a guest that runs the shell command `guest` on the host's files, and says how that goes.
pub(super) fn build(kernel: &Kernel, guest: &str, programs: &VmPrograms) -> Result<Vec<u8>> {
    let mut archive = base(programs)?;
    archive.folder("modules");
    for (index, path) in kernel.module_files(&MODULES, programs)?.iter().enumerate() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        archive.add(&format!("modules/{index:02}-{name}"), DATA, &read(path)?);
    }
    let kmod = programs.path("kmod")?;
    let modprobe = format!(
        "#!/bin/bash\nexport LD_LIBRARY_PATH={}\nexec -a modprobe {} \"$@\"\n",
        quoted(&programs.library_path()),
        quoted(&kmod.display().to_string())
    );
    archive.add("sbin/modprobe.root", PROGRAM, modprobe.as_bytes());
    let modules = kernel.modules().display().to_string();
    let configuration = format!(
        "release={}\nmodules={}\nguest={}\n",
        quoted(&kernel.release),
        quoted(&modules),
        quoted(guest)
    );
    archive.add("guest.conf", DATA, configuration.as_bytes());
    Ok(archive.finish())
}

/// The initrd of a guest that says that it has come up, and no more.
pub(super) fn build_probe(programs: &VmPrograms) -> Result<Vec<u8>> {
    let mut archive = base(programs)?;
    archive.add("guest.conf", DATA, b"guest=\n");
    Ok(archive.finish())
}

fn base(programs: &VmPrograms) -> Result<Archive> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sbin", "sys"] {
        archive.folder(folder);
    }
    archive.add_device("dev/console", (5, 1));
    archive.add("bin/busybox", PROGRAM, &read(&programs.path("busybox")?)?);
    archive.add("init", PROGRAM, include_bytes!("init.sh"));
    archive.add("sbin/modprobe", PROGRAM, include_bytes!("modprobe.sh"));
    Ok(archive)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| path.display().to_string())
}

/// A word that a shell takes as it is.
pub(super) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// An archive of cpio's form "newc", as the kernel's Documentation/driver-api/early-userspace/buffer-format.rst has it.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    count: u32,
}

impl Archive {
    fn folder(&mut self, name: &str) {
        self.add(name, FOLDER, &[]);
    }

    fn add(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entry(name, mode, (0, 0), data);
    }

    fn add_device(&mut self, name: &str, device: (u32, u32)) {
        self.entry(name, CHARACTER_DEVICE, device, &[]);
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.count += 1;
        let links = 1;
        // Inode, mode, user, group, links, time, size, device of the file system, device, length of the name, checksum.
        let fields = [
            self.count,
            mode,
            0,
            0,
            links,
            0,
            data.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(data);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_headers_names_and_contents_aligned() {
        let mut archive = Archive::default();
        archive.add("ab", DATA, b"hello");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("07070100000001000081a4"), "{text}");
        assert_eq!(&bytes[110..124], b"ab\0\0\0\0hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(bytes.len() % 4, 0);
        assert!(text.contains("TRAILER!!!\0"));
    }

    #[test]
    fn quotes_in_words_stay_quotes() {
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
