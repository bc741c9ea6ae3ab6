//! What setup asks of apt and dpkg.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;

/// Installs without starting a service: a machine on which someone works on Shoal has not asked for a web server. A
/// policy that is there already is somebody's decision, and stays.
const INSTALL: &str = r#"
set -e
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap 'rm -f $policy' EXIT
    trap 'exit 130' INT TERM
fi
had_nginx=$(command -v nginx || true)
had_docker=$(command -v dockerd || true)
had_haproxy=$(command -v haproxy || true)
DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
if [ -d /run/systemd/system ]; then
    [ -n "$had_nginx" ] || systemctl disable --quiet nginx.service || true
    [ -n "$had_haproxy" ] || systemctl disable --quiet haproxy.service || true
    [ -n "$had_docker" ] || systemctl disable --quiet docker.service docker.socket containerd.service || true
fi
"#;

/// Fails with the remedy where there is no apt.
pub(super) fn require_apt() -> Result<()> {
    if run::succeeds(Command::new("apt-get").arg("--version"))
        && run::succeeds(Command::new("dpkg").arg("--version"))
    {
        return Ok(());
    }
    bail!(
        "this machine has no apt-get: install what is named here with its own package manager, then run setup again"
    )
}

/// Whether dpkg has `package` installed; false without a dpkg.
pub(super) fn is_installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${db:Status-Status}", package]);
    run::output(&mut query).is_ok_and(|status| status == "installed")
}

/// Installs `packages`, as root or by sudo; none of their services starts.
pub(super) fn install(packages: &[String], log: &Path) -> Result<()> {
    let remedy =
        || format!("install them as root, then run setup again: apt-get install {}", packages.join(" "));
    require_apt().with_context(remedy)?;
    require_root().with_context(remedy)?;
    let mut command = as_root("sh");
    command.args(["-c", INSTALL, "sh"]).args(packages);
    if run::logged(&mut command, log).is_ok() {
        return Ok(());
    }
    // Security updates remove the versions that older lists name.
    update(log)?;
    run::logged(&mut command, log).with_context(remedy)
}

/// Downloads the newest version of each of `packages` into `directory`; installs nothing.
pub(super) fn download(packages: &[String], directory: &Path, log: &Path) -> Result<()> {
    let mut command = Command::new("apt-get");
    // Without the option root's apt warns that its own sandbox user can't write here.
    command.current_dir(directory).args(["download", "--option", "APT::Sandbox::User=root"]).args(packages);
    if run::logged(&mut command, log).is_ok() {
        return Ok(());
    }
    update(log)?;
    run::logged(&mut command, log)
}

/// The packages that `package` depends on. Without lists, as on a fresh machine, they are fetched first.
pub(super) fn dependencies(package: &str, log: &Path) -> Result<Vec<String>> {
    let mut depends = Command::new("apt-cache");
    depends.args(["depends", "--important", package]);
    let listing = match run::output(&mut depends) {
        Ok(listing) => listing,
        Err(_) => update(log).and_then(|()| run::output(&mut depends))?,
    };
    let names = listing.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(names.filter(|name| !name.starts_with('<')).map(str::to_owned).collect())
}

/// Whether apt's lists have a version of `package`.
pub(super) fn has_candidate(package: &str) -> bool {
    let policy = run::output(Command::new("apt-cache").args(["policy", package])).unwrap_or_default();
    policy
        .lines()
        .any(|line| line.trim().strip_prefix("Candidate: ").is_some_and(|version| version != "(none)"))
}

/// What of `packages` is not installed, by the names that this release has them under.
pub(super) fn missing(packages: &[String], log: &Path) -> Result<Vec<String>> {
    let missing: Vec<&String> = packages.iter().filter(|package| !is_installed(package)).collect();
    if require_apt().is_ok() && missing.iter().any(|package| !has_candidate(package)) {
        update(log)?;
    }
    Ok(missing.into_iter().map(|package| name_here(package).to_owned()).collect())
}

/// Debian 13 split the docker client from the engine.
fn name_here(package: &str) -> &str {
    if package == "docker.io" && has_candidate("docker-cli") { "docker-cli" } else { package }
}

/// Has apt's lists as new as they come. Who can't fetch them, or not all, goes on with what there is.
pub(super) fn refresh(log: &Path) {
    if require_root().is_err() {
        return;
    }
    if let Err(error) = update(log) {
        println!("         {error:#}; going on with the lists that are there");
    }
}

fn update(log: &Path) -> Result<()> {
    require_root()
        .context("apt's lists are missing or old: run `apt-get update` as root, then setup again")?;
    println!("         apt-get update");
    run::logged(as_root("apt-get").arg("update"), log).context("apt-get update failed: is there a network?")
}

fn require_root() -> Result<()> {
    if run::succeeds(&mut as_root("true")) {
        return Ok(());
    }
    bail!("this needs root, and sudo does not give it without a password")
}

/// `program` as root: directly, or by a sudo that asks nothing.
fn as_root(program: &str) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut sudo = Command::new("sudo");
    sudo.args(["--non-interactive", program]);
    sudo
}

/// The owner of this process, as /proc tells it: geteuid would be the only unsafe call here.
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}
