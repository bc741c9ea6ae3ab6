//! What the host and this build are: version, kernel, distribution, an id that lasts.

use std::path::Path;

use anyhow::Context;

/// The file in the state folder with this installation's id.
pub(crate) const ID_FILE: &str = "id";

/// This build's version.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The commit that this was built from, where the build said so.
pub(crate) const GIT_COMMIT: &str = match option_env!("SHOAL_GIT_COMMIT") {
    Some(commit) => commit,
    None => "",
};

/// `0.1.0`, or `0.1.0 (abcdef0)`.
pub(crate) fn version_line() -> String {
    if GIT_COMMIT.is_empty() { VERSION.to_owned() } else { format!("{VERSION} ({GIT_COMMIT})") }
}

/// The kernel's release, such as `6.18.5-amd64`; empty where the system does not say.
pub(crate) fn kernel_release() -> String {
    nix::sys::utsname::uname().map(|uname| uname.release().to_string_lossy().into_owned()).unwrap_or_default()
}

/// The distribution's name.
pub(crate) fn os_name() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    pretty_name(&text).unwrap_or("Linux").to_owned()
}

fn pretty_name(os_release: &str) -> Option<&str> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(value.trim().trim_matches('"'))
}

/// This installation's id, made at its first start.
pub(crate) fn installation_id(state_dir: &Path) -> anyhow::Result<String> {
    let path = state_dir.join(ID_FILE);
    if let Ok(id) = std::fs::read_to_string(&path)
        && !id.trim().is_empty()
    {
        return Ok(id.trim().to_owned());
    }
    let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid").context("can't draw a random id")?;
    std::fs::write(&path, &id).with_context(|| format!("can't write {}", path.display()))?;
    Ok(id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distribution_is_read_with_and_without_quotes() {
        assert_eq!(pretty_name("ID=x\nPRETTY_NAME=\"Debian GNU/Linux 13\"\n"), Some("Debian GNU/Linux 13"));
        assert_eq!(pretty_name("PRETTY_NAME=Arch"), Some("Arch"));
        assert_eq!(pretty_name("ID=x"), None);
    }

    #[test]
    fn the_id_lasts() {
        let dir = tempfile::tempdir().unwrap();
        let id = installation_id(dir.path()).unwrap();
        assert_eq!(id.len(), 36);
        assert_eq!(installation_id(dir.path()).unwrap(), id);
    }
}
