//! Debian's kernels for virtual machines, fetched by apt with lists of its own and unpacked below the target directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::setup::VmPrograms;
use crate::{run, workspace};

const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// What the names of kernels for virtual machines end in.
const FLAVOUR: &str = "-cloud-amd64";

/// Kernels of one number; Debian updates each in one of its releases.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub(super) enum Series {
    /// Debian 11
    #[value(name = "5.10")]
    V5_10,
    /// Debian 12
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13
    #[value(name = "6.12")]
    V6_12,
    /// Debian's development
    #[value(name = "7.2")]
    V7_2,
}

impl Series {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V5_10 => "5.10",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::V7_2 => "7.2",
        }
    }

    /// Where to look for it; those that end in `-security` are in an archive of their own.
    fn suites(self) -> &'static [&'static str] {
        match self {
            Self::V5_10 => &["bullseye-security"],
            Self::V6_1 => &["bookworm", "bookworm-security"],
            Self::V6_12 => &["trixie", "trixie-security"],
            Self::V7_2 => &["sid"],
        }
    }

    /// Whether TC programs attach by TCX links.
    pub(super) fn has_tcx(self) -> bool {
        self > Self::V6_1
    }
}

/// An unpacked kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    /// What it calls itself: `6.1.0-56-cloud-amd64`.
    pub(super) release: String,
    /// What a boot loader loads.
    pub(super) image: PathBuf,
    /// The folder above `lib/modules`.
    base: PathBuf,
}

impl Kernel {
    fn find(folder: &Path, release: &str) -> Result<Self> {
        // Debian 13 moved everything below /usr, and its successor the image to the modules.
        let base = [folder.join("usr"), folder.to_owned()]
            .into_iter()
            .find(|base| base.join("lib/modules").join(release).is_dir())
            .with_context(|| format!("{} has no modules of {release}", folder.display()))?;
        let image = [
            folder.join(format!("boot/vmlinuz-{release}")),
            base.join("lib/modules").join(release).join("vmlinuz"),
        ]
        .into_iter()
        .find(|image| image.is_file())
        .with_context(|| format!("{} has no image of {release}", folder.display()))?;
        Ok(Self { release: release.to_owned(), image, base })
    }

    /// The folder that belongs at `/lib/modules/<release>`.
    pub(super) fn modules(&self) -> PathBuf {
        self.base.join("lib/modules").join(&self.release)
    }

    /// The files of `modules` and of what they need, in the order of loading; those that are built in have none.
    pub(super) fn module_files(&self, modules: &[&str], programs: &VmPrograms) -> Result<Vec<PathBuf>> {
        let mut files: Vec<PathBuf> = Vec::new();
        for module in modules {
            let mut modprobe = kmod("modprobe", programs)?;
            modprobe.arg("--dirname").arg(&self.base);
            modprobe.args(["--set-version", &self.release, "--show-depends", module]);
            let listing = run::output(&mut modprobe)?;
            let paths = listing.lines().filter_map(|line| line.strip_prefix("insmod "));
            for path in paths.map(|path| PathBuf::from(path.trim())) {
                if !files.contains(&path) {
                    files.push(path);
                }
            }
        }
        Ok(files)
    }
}

/// One of kmod's programs: it does what its own name says.
fn kmod(name: &str, programs: &VmPrograms) -> Result<Command> {
    use std::os::unix::process::CommandExt;
    let mut command = programs.command("kmod")?;
    command.arg0(name);
    Ok(command)
}

/// The kernel of a series that is unpacked here; the newest in the archive where there is none, or for `update`.
pub(super) fn provide(
    series: Series,
    update: bool,
    archive: Option<&str>,
    programs: &VmPrograms,
) -> Result<Kernel> {
    let folder = workspace::target_dir().join("vm/kernels").join(series.name());
    let current = fs::read_to_string(folder.join("release")).ok();
    if let Some(release) = current.as_ref().filter(|_| !update) {
        return Kernel::find(&folder, release);
    }
    let apt = Apt::new(series, archive)?;
    apt.run("apt-get", &["update"])?;
    let release = apt.newest(series)?;
    if current.is_some_and(|current| current == release) {
        return Kernel::find(&folder, &release);
    }
    let packages = apt.packages(&release)?;
    println!("{series}: downloading {}", packages.join(" "), series = series.name());
    let debs = apt.folder.join("debs");
    recreate(&debs)?;
    let names: Vec<&str> = packages.iter().map(String::as_str).collect();
    apt.run_in(&debs, "apt-get", &[&["download"], &names[..]].concat())?;
    let partial = folder.with_extension("partial");
    recreate(&partial)?;
    for deb in fs::read_dir(&debs)? {
        run::output(Command::new("dpkg").arg("-x").arg(deb?.path()).arg(&partial))?;
    }
    fs::remove_dir_all(&debs)?;
    prepare(&Kernel::find(&partial, &release)?, programs)?;
    fs::write(partial.join("release"), &release)?;
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::rename(&partial, &folder)?;
    Kernel::find(&folder, &release)
}

/// Does what the package's installation would: the list of modules. They are unpacked here, which a guest without KVM
/// takes seconds for.
fn prepare(kernel: &Kernel, programs: &VmPrograms) -> Result<()> {
    let mut compressed = Vec::new();
    let mut folders = vec![kernel.modules()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() && !path.is_symlink() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "xz") {
                compressed.push(path);
            }
        }
    }
    for some in compressed.chunks(500) {
        run::output(programs.command("xz")?.arg("--decompress").args(some))?;
    }
    let mut depmod = kmod("depmod", programs)?;
    run::output(depmod.arg("--basedir").arg(&kernel.base).arg(&kernel.release)).map(drop)
}

/// apt with sources and lists of its own: the machine's stay as they are.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    fn new(series: Series, archive: Option<&str>) -> Result<Self> {
        ensure!(cfg!(target_arch = "x86_64"), "vm-test knows kernels for x86-64 alone");
        ensure!(
            Path::new(KEYS).is_file(),
            "there is no {KEYS}: install debian-archive-keyring, as root: apt-get install debian-archive-keyring"
        );
        let archive = match archive {
            Some(archive) => archive.trim_end_matches('/').to_owned(),
            None => archive_of_this_machine()?,
        };
        let folder = workspace::target_dir().join("vm/apt").join(series.name());
        fs::create_dir_all(folder.join("lists/partial"))?;
        fs::create_dir_all(folder.join("archives/partial"))?;
        let sources = series.suites().iter().map(|suite| {
            let suffix = if suite.ends_with("-security") { "-security" } else { "" };
            format!("deb [arch=amd64 signed-by={KEYS} target=Packages] {archive}{suffix} {suite} main\n")
        });
        let sources: String = sources.collect();
        fs::write(folder.join("sources.list"), sources)?;
        Ok(Self { folder })
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        self.run_in(&self.folder, program, arguments)
    }

    fn run_in(&self, directory: &Path, program: &str, arguments: &[&str]) -> Result<String> {
        let folder = self.folder.display();
        let options = [
            format!("Dir::State={folder}"),
            format!("Dir::State::lists={folder}/lists"),
            "Dir::State::status=/dev/null".to_owned(),
            format!("Dir::Cache={folder}"),
            format!("Dir::Cache::archives={folder}/archives"),
            format!("Dir::Etc::SourceList={folder}/sources.list"),
            "Dir::Etc::SourceParts=-".to_owned(),
            "Dir::Etc::Preferences=-".to_owned(),
            "Dir::Etc::PreferencesParts=-".to_owned(),
            "Acquire::Languages=none".to_owned(),
            // apt's own user can't write here.
            "APT::Sandbox::User=root".to_owned(),
        ];
        let mut command = Command::new(program);
        command.current_dir(directory);
        for option in options {
            command.args(["--option", &option]);
        }
        run::output(command.args(arguments))
    }

    /// The release of the newest kernel of a series.
    fn newest(&self, series: Series) -> Result<String> {
        let listing = self.run("apt-cache", &["pkgnames", "linux-image-"])?;
        let prefix = format!("{}.", series.name());
        let releases = listing.lines().filter_map(|name| name.strip_prefix("linux-image-"));
        let releases = releases.filter(|name| name.starts_with(&prefix) && name.ends_with(FLAVOUR));
        let newest = releases.max_by_key(|release| numbers(release));
        newest.map(str::to_owned).with_context(|| {
            let suites = series.suites().join(" and ");
            format!("{suites} have no kernel {} any more: leave it out of --kernel", series.name())
        })
    }

    /// The packages that a kernel consists of.
    fn packages(&self, release: &str) -> Result<Vec<String>> {
        let image = format!("linux-image-{release}");
        let listing = self.run("apt-cache", &["depends", "--important", &image])?;
        let parts = listing.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        let parts = parts.filter(|name| name.contains(release)).map(str::to_owned);
        Ok(std::iter::once(image.clone()).chain(parts).collect())
    }
}

/// The archive that this machine's own apt gets Debian from.
fn archive_of_this_machine() -> Result<String> {
    let format = "$(ORIGIN)|$(LABEL)|$(REPO_URI)";
    let listing = run::output(Command::new("apt-get").args(["indextargets", "--format", format]))?;
    let found = listing.lines().find_map(|line| line.strip_prefix("Debian|Debian|"));
    match found {
        Some(archive) => Ok(archive.trim_end_matches('/').to_owned()),
        None => bail!("this machine's apt has no Debian archive: name one with --archive"),
    }
}

/// All numbers in a release's version, by which it is newer or older than another.
fn numbers(release: &str) -> Vec<u32> {
    // The architecture's name is a number as well.
    let version = release.strip_suffix(FLAVOUR).unwrap_or(release);
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

fn recreate(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder).with_context(|| format!("could not create {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_release_is_found_by_its_numbers() {
        let releases = [
            "6.12.90+deb13-cloud-amd64",
            "6.12.115+deb13-cloud-amd64",
            "6.12.115+deb13.1-cloud-amd64",
            "6.12.107+deb13-cloud-amd64",
        ];
        let newest = releases.into_iter().max_by_key(|release| numbers(release));
        assert_eq!(newest, Some("6.12.115+deb13.1-cloud-amd64"));
        assert!(numbers("6.1.0-9-cloud-amd64") < numbers("6.1.0-10-cloud-amd64"));
    }

    #[test]
    fn tcx_came_between_the_kernels_of_debian_12_and_13() {
        let with_tcx = Series::value_variants().iter().filter(|series| series.has_tcx());
        assert_eq!(with_tcx.map(|series| series.name()).collect::<Vec<_>>(), ["6.12", "7.2"]);
    }
}
