//! The directory of an OS image, in the form of either generation.

use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::python_json;
use crate::Error;

const CHECKSUMS: &str = "sha256sum.txt";
const MEASUREMENT: &str = "measurement.gcp.cbor";

/// An OS image on this machine.
#[derive(Debug)]
pub struct OsImage {
    directory: PathBuf,
    /// Hash that names the image to a verifier. Its meaning differs between generations: what is registered must come
    /// from the running guest.
    hash: String,
    measurement: Option<Measurement>,
}

/// What newer guests are told about their own measurement.
#[derive(Debug, Serialize)]
struct Measurement {
    checksum_file: String,
    measurement: String,
}

#[derive(Serialize)]
struct VmConfig<'a> {
    spec_version: u32,
    os_image_hash: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    gcp_measurement: Option<&'a Measurement>,
}

impl OsImage {
    /// Finds the image `name` below one of `directories`, and reads what describes it.
    ///
    /// # Errors
    ///
    /// [`Error::OsImage`] when it is nowhere, has no bootable disk (the variant for bare metal), or a file that names
    /// its hash is missing or contradicts another.
    pub fn find(name: &str, directories: &[PathBuf]) -> Result<Self, Error> {
        let fail = |problem: String| Error::OsImage { image: name.to_owned(), problem };
        let listed = || directories.iter().map(|it| it.display().to_string()).collect::<Vec<_>>().join(", ");
        let directory = directories.iter().map(|it| it.join(name)).find(|it| it.is_dir());
        let directory = directory.ok_or_else(|| match directories {
            [] => fail("image_search_paths is empty in the global settings".into()),
            _ => fail(format!("not in {}", listed())),
        })?;
        if !directory.join("disk.raw").is_file() {
            let shown = directory.display();
            return Err(fail(format!(
                "{shown} has no disk.raw: this is not the UKI variant, which a Confidential VM boots"
            )));
        }
        Self::read(&directory, &fail)
    }

    /// The image whose disk is the file `disk`; what describes it stands beside it.
    ///
    /// # Errors
    ///
    /// As [`OsImage::find`].
    pub fn of_disk(name: &str, disk: &Path) -> Result<Self, Error> {
        let fail = |problem: String| Error::OsImage { image: name.to_owned(), problem };
        match (disk.is_file(), disk.parent()) {
            (true, Some(directory)) if disk.file_name().is_some_and(|it| it == "disk.raw") => {
                Self::read(directory, &fail)
            }
            _ => Err(fail(format!("{} is no file named disk.raw", disk.display()))),
        }
    }

    fn read(directory: &Path, fail: &dyn Fn(String) -> Error) -> Result<Self, Error> {
        let optional = |name: &str| {
            let path = directory.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(Error::file("read", &path)(error)),
            }
        };
        let hash_of =
            |bytes: Vec<u8>, name: &str| match String::from_utf8(bytes).map(|it| it.trim().to_lowercase()) {
                Ok(hash) if hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) => Ok(hash),
                _ => Err(fail(format!("{name} does not hold a SHA-256 hash in hex"))),
            };
        let (digest, checksums, measurement) =
            (optional("digest.txt")?, optional(CHECKSUMS)?, optional(MEASUREMENT)?);
        let directory = directory.to_owned();
        match (digest, checksums, measurement) {
            (Some(digest), Some(checksums), Some(measurement)) => {
                let hash = hash_of(digest, "digest.txt")?;
                let actual = hex::encode(Sha256::digest(&checksums));
                if hash != actual {
                    return Err(fail(format!("digest.txt says {hash}, {CHECKSUMS} hashes to {actual}")));
                }
                if !lists(&checksums, MEASUREMENT, &hex::encode(Sha256::digest(&measurement))) {
                    return Err(fail(format!("{MEASUREMENT} is not the file {CHECKSUMS} lists")));
                }
                let measurement =
                    Measurement { checksum_file: base64(&checksums), measurement: base64(&measurement) };
                Ok(Self { directory, hash, measurement: Some(measurement) })
            }
            (None, _, _) => match optional("auth_hash.txt")? {
                Some(hash) => {
                    Ok(Self { hash: hash_of(hash, "auth_hash.txt")?, directory, measurement: None })
                }
                None => Err(fail("neither digest.txt nor auth_hash.txt is there".into())),
            },
            (Some(_), checksums, _) => {
                let missing = if checksums.is_none() { CHECKSUMS } else { MEASUREMENT };
                Err(fail(format!("{missing} is missing beside digest.txt")))
            }
        }
    }

    /// The bootable disk.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.directory.join("disk.raw")
    }

    /// The hash the image's own files give it, hex.
    #[must_use]
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The JSON text of the `vm_config` a guest of this image is told.
    pub(crate) fn vm_config(&self) -> Result<String, serde_json::Error> {
        let config = VmConfig {
            spec_version: 2,
            os_image_hash: &self.hash,
            gcp_measurement: self.measurement.as_ref(),
        };
        python_json::one_line(&config).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Whether a list in the form of `sha256sum` has `name` with this hash.
fn lists(checksums: &[u8], name: &str, hash: &str) -> bool {
    String::from_utf8_lossy(checksums).lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next() == Some(hash) && words.next().map(|it| it.trim_start_matches('*')) == Some(name)
    })
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(files: &[(&str, &[u8])]) -> (tempfile::TempDir, Result<OsImage, Error>) {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("dstack-0.6.0");
        std::fs::create_dir(&image).unwrap();
        for (name, bytes) in files {
            std::fs::write(image.join(name), bytes).unwrap();
        }
        let found = OsImage::find("dstack-0.6.0", &[directory.path().to_owned()]);
        (directory, found)
    }

    fn problem(files: &[(&str, &[u8])]) -> String {
        image(files).1.unwrap_err().to_string()
    }

    #[test]
    fn an_image_of_the_old_generation() {
        let hash = [b'A'; 64];
        let (_directory, found) = image(&[("disk.raw", b""), ("auth_hash.txt", &hash)]);
        let vm_config = found.unwrap().vm_config().unwrap();
        assert_eq!(vm_config, format!("{{\"spec_version\": 2, \"os_image_hash\": \"{}\"}}", "a".repeat(64)));
    }

    #[test]
    fn an_image_of_the_new_generation() {
        let checksums = format!("{}  measurement.gcp.cbor\n", hex::encode(Sha256::digest(b"m")));
        let digest = hex::encode(Sha256::digest(&checksums));
        let files: [(&str, &[u8]); 4] = [
            ("disk.raw", b""),
            ("digest.txt", digest.as_bytes()),
            ("sha256sum.txt", checksums.as_bytes()),
            ("measurement.gcp.cbor", b"m"),
        ];
        let (_directory, found) = image(&files);
        let vm_config: serde_json::Value =
            serde_json::from_str(&found.unwrap().vm_config().unwrap()).unwrap();
        assert_eq!(vm_config["os_image_hash"], digest);
        assert_eq!(vm_config["gcp_measurement"]["measurement"], "bQ==");

        let mut other = files;
        other[3].1 = b"n";
        assert!(problem(&other).contains("measurement.gcp.cbor is not the file sha256sum.txt lists"));
        other[1].1 = &[b'0'; 64];
        assert!(problem(&other).contains("digest.txt says 0000"));
        assert!(problem(&files[..3]).contains("measurement.gcp.cbor is missing beside digest.txt"));
    }

    #[test]
    fn what_cannot_boot_or_be_registered_is_refused() {
        assert!(problem(&[("auth_hash.txt", &[b'a'; 64])]).contains("has no disk.raw"));
        assert!(problem(&[("disk.raw", b"")]).contains("neither digest.txt nor auth_hash.txt"));
        assert!(
            problem(&[("disk.raw", b""), ("auth_hash.txt", b"Not Found")])
                .contains("does not hold a SHA-256")
        );
        let nowhere = OsImage::find("x", &[]).unwrap_err();
        assert_eq!(nowhere.to_string(), "os image x: image_search_paths is empty in the global settings");
        assert_eq!(nowhere.hint().unwrap(), "fetch it with `keyferry kms pull x`");
    }
}
