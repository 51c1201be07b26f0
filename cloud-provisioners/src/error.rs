use std::io;
use std::path::{Path, PathBuf};

/// Why a deployment cannot be described, prepared or recorded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be read or written.
    #[error("{}: cannot {action}", path.display())]
    File {
        /// What was attempted, as a verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A JSON file does not have the shape it must have.
    #[error("{}: not the JSON that is expected here", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        source: serde_json::Error,
    },
    /// A text file is not UTF-8.
    #[error("{}: not UTF-8 text", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
    /// There is no project in this directory.
    #[error("{}: no project here, app.json is missing", directory.display())]
    NoProject {
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// The directory of a new project exists already.
    #[error("{}: already exists", directory.display())]
    ProjectExists {
        /// The directory.
        directory: PathBuf,
    },
    /// A setting has a value that cannot work.
    #[error("{setting}: {problem}")]
    Setting {
        /// The setting as the file spells it, `gcp_config.instance_name`.
        setting: &'static str,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// A file for the configuration volume is larger than the guest accepts.
    #[error("{name}: {actual} bytes, the guest accepts at most {limit}")]
    TooLarge {
        /// The file on the volume.
        name: &'static str,
        /// Its size.
        actual: u64,
        /// The guest's limit; past it the machine restarts for ever.
        limit: u64,
    },
    /// A file of environment variables exists although nothing can decrypt it in the guest.
    #[error("{}: encrypted variables need the key provider kms, this project has {provider}", path.display())]
    EnvironmentWithoutKms {
        /// The file of variables.
        path: PathBuf,
        /// The project's key provider.
        provider: String,
    },
    /// The key that variables are encrypted to is not known for certain.
    #[error("{url}: {problem}")]
    EnvironmentKey {
        /// The KMS that was asked.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// The directory of an OS image is missing or incomplete.
    #[error("os image {image}: {problem}")]
    OsImage {
        /// The image's name, also that of its directory.
        image: String,
        /// What is missing, and where it was looked for.
        problem: String,
    },
    /// A disk image could not be built in memory.
    #[error("{disk}: cannot be built")]
    Disk {
        /// Which disk.
        disk: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// Another process is working on the same thing.
    #[error("{}: another process is working on this", path.display())]
    Locked {
        /// The directory, or the file that stands for what is worked on.
        path: PathBuf,
    },
    /// The deployment was refused before anything was changed.
    #[error(transparent)]
    Refused(#[from] crate::gcp_tdx::Refusal),
    /// There is no machine.
    #[error("instance {name}: not there")]
    NoInstance {
        /// Its name.
        name: String,
    },
    /// The machine belongs to another deployment.
    #[error("instance {name}: belongs to the deployment {deployment}, not to this project")]
    NotOurs {
        /// Its name.
        name: String,
        /// The other deployment's id.
        deployment: String,
    },
    /// There is no EC2 host in this directory, or its making has not ended.
    #[error("{}: no host here", directory.display())]
    NoHost {
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// The host was refused before anything was changed.
    #[error(transparent)]
    Ec2(#[from] crate::ec2_nitro::Refusal),
    /// AWS refused, or did not answer.
    #[error(transparent)]
    Aws(#[from] crate::ec2_nitro::AwsError),
    /// The record of how a host is reached cannot be used.
    #[error(transparent)]
    Reach(#[from] crate::nitro_host::ReachError),
    /// Google refused, or did not answer.
    #[error(transparent)]
    Google(#[from] crate::gcp::Error),
    /// The program's own part of HTTP cannot be set up.
    #[error("cannot set up HTTP")]
    HttpClient(#[source] reqwest::Error),
    /// An answer could not be read.
    #[error("{call}: {problem}")]
    Http {
        /// What was asked.
        call: String,
        /// What is wrong with the answer.
        problem: String,
    },
    /// A container image is not where guests would pull it.
    #[error(transparent)]
    Registry(#[from] crate::registry::Error),
    /// The VMM refused, or did not answer.
    #[error(transparent)]
    Vmm(#[from] crate::vmm::Error),
    /// The machine was not made, before anything was changed.
    #[error(transparent)]
    VmmRefused(#[from] crate::vmm::Refusal),
    /// An OS image could not be fetched.
    #[error(transparent)]
    Pull(#[from] crate::pull::Error),
    /// The operating system gave no randomness.
    #[error("no randomness from the operating system")]
    Random,
}

impl Error {
    /// The next step, when one is known.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::File { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("make room on the disk, then run the same command again".into())
            }
            Self::NoProject { .. } => {
                Some("make one with `keyferry kms new NAME`, or name it with -C DIRECTORY".into())
            }
            Self::EnvironmentWithoutKms { path, .. } => {
                Some(format!("remove {}, or set key_provider to kms in app.json", path.display()))
            }
            Self::EnvironmentKey { .. } => Some(format!(
                "variables are encrypted only to a key that a pinned root signed: put k256_pubkey of the KMS's kms.json \
                 into trusted_signers of {}, beside the global settings",
                crate::env_key::WHITELIST
            )),
            Self::OsImage { image, problem } if problem.contains("is there already") => {
                Some(format!("{image} can be used as it is; move it away to fetch it anew"))
            }
            Self::OsImage { image, .. } => Some(format!("fetch it with `keyferry kms pull {image}`")),
            Self::Google(error) => error.hint(),
            Self::Aws(error) => error.hint(),
            Self::Ec2(refusal) => Some(refusal.hint()),
            Self::NoHost { .. } => {
                Some("make one with `keyferry host up`, or name its directory with -C".into())
            }
            Self::Registry(error) => Some(error.remedy()),
            Self::Vmm(error) => error.hint(),
            Self::VmmRefused(refusal) => Some(refusal.hint()),
            Self::Pull(error) => error.hint(),
            Self::Refused(refusal) => Some(refusal.hint()),
            Self::Setting { setting: "vmm_config.ports", .. } => Some(
                "write the KMS's port of the host and the guest's into app.json: tcp:0.0.0.0:12001:8000"
                    .into(),
            ),
            Self::NoInstance { .. } => Some("make it with `keyferry kms deploy`".into()),
            Self::NotOurs { .. } => {
                Some("choose another gcp_config.instance_name, or work from the other project".into())
            }
            Self::Locked { .. } => Some("wait for it to end, or stop it".into()),
            _ => None,
        }
    }

    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { action, path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_from_other_troubles_with_files() {
        let path = Path::new("/images/disk.raw");
        let hint = |source| Error::file("write", path)(source).hint();
        let full = hint(io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error()));
        assert!(full.unwrap().contains("make room"));
        assert_eq!(hint(io::ErrorKind::PermissionDenied.into()), None);
    }
}
