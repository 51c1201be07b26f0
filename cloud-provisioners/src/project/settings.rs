//! The global settings, `~/.config/dstack-cloud/config.json`, shared with dstack-cloud.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::app::GcpConfig;
use crate::{Error, durable};

/// The global settings. Keys this program does not know are kept.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Addresses of the services guests use.
    pub services: Services,
    /// Directories with OS images; relative ones start at the project.
    pub image_search_paths: Vec<String>,
    /// Defaults for every project on GCP.
    pub gcp: GcpConfig,
    /// What else the file holds.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Addresses of the services guests use.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Services {
    /// KMS addresses.
    pub kms_urls: Vec<String>,
    /// Gateway addresses.
    pub gateway_urls: Vec<String>,
    /// Address of the collateral cache, or empty for Intel's.
    pub pccs_url: String,
    /// Address of a proxy for NVIDIA's attestation service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvidia_attestation_proxy_url: Option<String>,
    /// What else the section holds.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// A first settings file: as dstack-cloud writes it, without anyone's services.
const TEMPLATE: &str = r#"{
  "_comment_services": "Where guests find their KMS, gateway and collateral",
  "services": {
    "kms_urls": [],
    "gateway_urls": [],
    "pccs_url": ""
  },
  "_comment_images": "Directories with OS images",
  "image_search_paths": [
    "~/.dstack/images"
  ],
  "_comment_gcp": "Defaults for projects on GCP",
  "gcp": {
    "project": "",
    "zone": "us-central1-a",
    "bucket": ""
  }
}
"#;

impl Settings {
    /// Where the settings are: `override_path` (the variable `DSTACK_CLOUD_CONFIG`), else below the home directory.
    #[must_use]
    pub fn path(override_path: Option<&Path>, home: &Path) -> PathBuf {
        override_path.map_or_else(|| home.join(".config/dstack-cloud/config.json"), Path::to_owned)
    }

    /// Reads the settings; a missing file means none.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or is not what it should be.
    pub fn load(path: &Path) -> Result<Self, Error> {
        match std::fs::read(path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: path.to_owned(), source })
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(Error::file("read", path)(error)),
        }
    }

    /// Writes a commented first file where there is none. Says whether it wrote.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made or the file not written.
    pub fn write_template(path: &Path) -> Result<bool, Error> {
        if path.exists() {
            return Ok(false);
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(Error::file("create", parent))?;
        }
        durable::replace(path, TEMPLATE.as_bytes(), 0o644).map(|()| true)
    }

    /// The directories with OS images, absolute, in the order in which they are searched.
    #[must_use]
    pub fn image_directories(&self, home: &Path, project: &Path) -> Vec<PathBuf> {
        self.image_search_paths.iter().map(|path| expand(path, home, project)).collect()
    }
}

/// `~` is the home directory; a relative path starts at the project.
pub(crate) fn expand(path: &str, home: &Path, project: &Path) -> PathBuf {
    match path.strip_prefix("~") {
        Some("") => home.to_owned(),
        Some(rest) if rest.starts_with('/') => home.join(&rest[1..]),
        _ => project.join(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_parses_and_is_written_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/config.json");
        assert!(Settings::write_template(&path).unwrap());
        assert!(!Settings::write_template(&path).unwrap());
        let settings = Settings::load(&path).unwrap();
        assert_eq!(
            settings.image_directories(Path::new("/home/u"), Path::new("/p")),
            [Path::new("/home/u/.dstack/images")]
        );
    }

    #[test]
    fn relative_search_paths_start_at_the_project() {
        let at = |path| expand(path, Path::new("/home/u"), Path::new("/p"));
        assert_eq!(at("images"), Path::new("/p/images"));
        assert_eq!(at("/srv/images"), Path::new("/srv/images"));
        assert_eq!(at("~"), Path::new("/home/u"));
        assert_eq!(at("~other/x"), Path::new("/p/~other/x"));
    }
}
