//! Image references: `[host[:port]/]path[:tag][@digest]`, checked for form only. Which images a node can run
//! is the node's to say.

use sha2::{Digest as _, Sha256};

/// The images that every node has built in.
const BUILT_IN: [&str; 2] = ["shoal/whoami", "shoal/exec"];

/// Whether `image` has the form of a reference.
pub(in crate::docker) fn is_reference(image: &str) -> bool {
    let (rest, digest) = match image.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (image, None),
    };
    let (path, tag) = split_tag(rest);
    let digest_valid = digest.is_none_or(|digest| {
        digest.split_once(':').is_some_and(|(algorithm, hex)| {
            !algorithm.is_empty()
                && algorithm.chars().all(|c| c.is_ascii_alphanumeric() || "+._-".contains(c))
                && hex.len() >= 32
                && hex.chars().all(|c| c.is_ascii_hexdigit())
        })
    });
    let tag_valid = tag.is_none_or(|tag| {
        (1..=128).contains(&tag.len())
            && !tag.starts_with(['.', '-'])
            && tag.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
    });
    let parts: Vec<&str> = path.split('/').collect();
    let (host, names) = match parts.split_first() {
        Some((host, names)) if !names.is_empty() && is_host(host) => (true, names),
        _ => (false, &parts[..]),
    };
    let names_valid = names.iter().all(|name| {
        name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && name.ends_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c))
    });
    digest_valid && tag_valid && names_valid && (!host || !names.is_empty()) && rest.len() <= 255
}

/// The digest of a built-in image, which stands for its name: the program is the node's own.
pub(in crate::docker) fn built_in_digest(image: &str) -> Option<String> {
    let name = image.split_once('@').map_or(image, |(name, _)| name);
    let (path, _) = split_tag(name);
    let path = path.strip_prefix("docker.io/").unwrap_or(path);
    BUILT_IN.contains(&path).then(|| {
        let digest = Sha256::digest(path.as_bytes());
        digest.iter().fold(String::from("sha256:"), |text, byte| format!("{text}{byte:02x}"))
    })
}

fn split_tag(reference: &str) -> (&str, Option<&str>) {
    match reference.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
        _ => (reference, None),
    }
}

/// The first part of a path is a host if it could not be a name: Docker's rule.
fn is_host(part: &str) -> bool {
    (part.contains(['.', ':']) || part == "localhost" || part.chars().any(|c| c.is_ascii_uppercase()))
        && part.chars().all(|c| c.is_ascii_alphanumeric() || ".:-".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_told_from_nonsense() {
        let digest = format!("shoal/whoami:latest@sha256:{}", "a".repeat(64));
        for image in
            ["nginx", "shoal/whoami", "shoal/exec:1.2", "localhost:5000/a/b:t", "ghcr.io/x/y_z", &digest]
        {
            assert!(is_reference(image), "{image}");
        }
        for image in ["", "Nginx", "a b", "a//b", "-a", "a:", "a@sha256:xyz", "a:t:u", "a\0b", "http://x/y"] {
            assert!(!is_reference(image), "{image}");
        }
    }

    #[test]
    fn only_built_in_images_have_digests() {
        let digest = built_in_digest("shoal/whoami:latest").unwrap();
        assert_eq!(digest.len(), "sha256:".len() + 64);
        assert_eq!(built_in_digest("docker.io/shoal/whoami"), Some(digest));
        assert_eq!(built_in_digest("nginx"), None);
    }
}
