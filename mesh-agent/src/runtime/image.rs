//! The images that the process runtime has, and what each runs.

use mesh_api::table::TaskSpec;

/// Why a task can't be run from its image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Not one of ours.
    #[error(
        "No such image: {0}: the process runtime has shoal/whoami, and shoal/exec, which runs a program of the host"
    )]
    Unknown(String),
    /// `shoal/exec` without a program.
    #[error("image shoal/exec needs a program to run: docker service create … shoal/exec PROGRAM [ARG…]")]
    NoProgram,
    /// A stop signal that does not exist.
    #[error("unknown stop signal {0:?}: use a name such as SIGTERM")]
    UnknownSignal(String),
}

/// What the task runs: `program` stands for Shoal's own binary as seen from inside the task.
pub(super) fn argv(spec: &TaskSpec) -> Result<Vec<String>, ImageError> {
    let image = repository(&spec.image);
    let built_in: &[&str] = match image {
        "shoal/whoami" => &["/proc/self/exe", "internal", "whoami"],
        "shoal/exec" => &[],
        _ => return Err(ImageError::Unknown(spec.image.clone())),
    };
    let entry_point = if spec.command.is_empty() {
        built_in.iter().map(|part| (*part).to_owned()).collect()
    } else {
        spec.command.clone()
    };
    let argv: Vec<_> = entry_point.into_iter().chain(spec.args.iter().cloned()).collect();
    if argv.is_empty() { Err(ImageError::NoProgram) } else { Ok(argv) }
}

/// An image reference without registry `docker.io`, tag and digest.
fn repository(image: &str) -> &str {
    let image = image.split_once('@').map_or(image, |(name, _)| name);
    let image = image.strip_prefix("docker.io/").unwrap_or(image);
    match image.rsplit_once(':') {
        // A colon before a slash belongs to a registry's port.
        Some((name, tag)) if !tag.contains('/') => name,
        _ => image,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(image: &str, command: &[&str], args: &[&str]) -> TaskSpec {
        let owned = |parts: &[&str]| parts.iter().map(|part| (*part).to_owned()).collect();
        TaskSpec {
            image: image.to_owned(),
            command: owned(command),
            args: owned(args),
            env: Vec::new(),
            dir: String::new(),
            user: String::new(),
            hostname: String::new(),
            stop_grace_ns: 0,
            stop_signal: String::new(),
            service_name: String::new(),
            egress: Vec::new(),
        }
    }

    #[test]
    fn references_lose_registry_tag_and_digest() {
        for image in [
            "shoal/whoami",
            "shoal/whoami:latest",
            "docker.io/shoal/whoami:1",
            "shoal/whoami:latest@sha256:00",
            "shoal/whoami@sha256:00",
        ] {
            assert_eq!(repository(image), "shoal/whoami", "{image}");
        }
        assert_eq!(repository("localhost:5000/shoal/whoami"), "localhost:5000/shoal/whoami");
    }

    #[test]
    fn entry_point_and_arguments_follow_dockers_rules() {
        let whoami = ["/proc/self/exe", "internal", "whoami", "--port", "81"];
        assert_eq!(argv(&spec("shoal/whoami", &[], &["--port", "81"])).unwrap(), whoami);
        assert_eq!(argv(&spec("shoal/exec", &[], &["nginx", "-v"])).unwrap(), ["nginx", "-v"]);
        assert_eq!(argv(&spec("shoal/exec:1", &["sh", "-c"], &["true"])).unwrap(), ["sh", "-c", "true"]);
        assert_eq!(argv(&spec("shoal/exec", &[], &[])), Err(ImageError::NoProgram));
        let nginx = argv(&spec("nginx:latest", &[], &[]));
        assert_eq!(nginx, Err(ImageError::Unknown("nginx:latest".to_owned())));
    }
}
