//! The project folder of dstack-cloud: read, made and prepared so that either tool can go on with it.
//!
//! ```text
//! app.json, docker-compose.yaml, prelaunch.sh ──▶ app-compose.json ─┐ measured
//! global settings, OS image ───────────────────▶ .sys-config.json ─┤
//! app.json ────────────────────────────────────▶ .instance_info ───┼─▶ volume DSTACKSHR
//! .env, the KMS's key ─────────────────────────▶ .encrypted-env ───┤
//! .user-config ───────────────────────────────▶ .user-config ─────┘ not measured
//! ```
//!
//! Source of the formats: `scripts/bin/dstack-cloud` of Phala-Network/meta-dstack-cloud (old) and of Dstack-TEE/dstack
//! (new).

mod app;
mod compose;
mod environment;
mod guest_image;
mod kms_template;
mod os_image;
mod python_json;
mod settings;
mod shared;
mod state;

use std::path::{Path, PathBuf};

pub use app::{App, GcpConfig, KeyProvider};
pub use compose::{AppCompose, instance_id};
pub use environment::Environment;
pub use guest_image::check_guest_image;
pub(crate) use guest_image::sha256_of;
pub use kms_template::{Chain, KmsTemplate};
pub use os_image::OsImage;
pub(crate) use settings::expand;
pub use settings::{Services, Settings};
pub use shared::{SHARED_DIRECTORY, SharedFiles};
pub use state::State;

use zeroize::Zeroizing;

use crate::{Error, durable};

/// OS image of a new project, the one the deployment guide uses.
const DEFAULT_OS_IMAGE: &str = "dstack-cloud-0.6.0";

const APP_FILE: &str = "app.json";
const STATE_FILE: &str = "state.json";
const USER_CONFIG_FILE: &str = ".user-config";

/// A project folder.
#[derive(Clone, Debug)]
pub struct Project {
    directory: PathBuf,
}

impl Project {
    /// The project in `directory`.
    ///
    /// # Errors
    ///
    /// [`Error::NoProject`] when there is no `app.json`.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let project = Self { directory: directory.to_owned() };
        match project.directory.join(APP_FILE).is_file() {
            true => Ok(project),
            false => Err(Error::NoProject { directory: project.directory }),
        }
    }

    /// Makes a new folder with `app` and the texts of its compose file, its script and its unmeasured configuration.
    ///
    /// # Errors
    ///
    /// [`Error::ProjectExists`] when the directory exists; when it cannot be written.
    pub fn create(
        directory: &Path,
        app: &App,
        docker_compose: &str,
        pre_launch: &str,
        user_config: &str,
    ) -> Result<Self, Error> {
        std::fs::create_dir(directory).map_err(|source| match source.kind() {
            std::io::ErrorKind::AlreadyExists => Error::ProjectExists { directory: directory.to_owned() },
            _ => Error::file("create", directory)(source),
        })?;
        let project = Self { directory: directory.to_owned() };
        let shared = directory.join(SHARED_DIRECTORY);
        std::fs::create_dir(&shared).map_err(Error::file("create", &shared))?;
        durable::replace(&directory.join(&app.docker_compose_file), docker_compose.as_bytes(), 0o644)?;
        durable::replace(&directory.join(&app.prelaunch_script), pre_launch.as_bytes(), 0o755)?;
        durable::replace(&directory.join(USER_CONFIG_FILE), user_config.as_bytes(), 0o600)?;
        if app.key_provider == KeyProvider::Kms {
            durable::replace(&directory.join(&app.env_file), b"# NAME=value, one a line\n", 0o600)?;
        }
        project.save_app(app)?;
        Ok(project)
    }

    /// The folder.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Reads `app.json`.
    ///
    /// # Errors
    ///
    /// When it cannot be read or parsed.
    pub fn app(&self) -> Result<App, Error> {
        self.json(APP_FILE)
    }

    /// Writes `app.json`.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn save_app(&self, app: &App) -> Result<(), Error> {
        self.save_json(APP_FILE, app)
    }

    /// What is likely wrong with the project's measured texts, in words.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub fn doubts(&self, app: &App) -> Result<Vec<String>, Error> {
        if !app.app_compose_file.is_empty() {
            return Ok(Vec::new());
        }
        Ok(kms_template::doubts(&self.text(&app.docker_compose_file)?, &self.text(&app.prelaunch_script)?))
    }

    /// Reads `state.json`, if a deployment was made.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be read or parsed.
    pub fn state(&self) -> Result<Option<State>, Error> {
        match self.directory.join(STATE_FILE).exists() {
            true => self.json(STATE_FILE).map(Some),
            false => Ok(None),
        }
    }

    /// Writes `state.json`.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn save_state(&self, state: &State) -> Result<(), Error> {
        self.save_json(STATE_FILE, state)
    }

    /// The text of the compose file of the app; empty when there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn docker_compose(&self, app: &App) -> Result<String, Error> {
        self.text(&app.docker_compose_file)
    }

    /// The text of the script that runs before the containers; empty when there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn pre_launch(&self, app: &App) -> Result<String, Error> {
        self.text(&app.prelaunch_script)
    }

    /// What the guest gets beside every measurement; empty when there is none. It may hold secrets.
    ///
    /// # Errors
    ///
    /// When it cannot be read or is no text.
    pub fn user_config(&self) -> Result<Zeroizing<String>, Error> {
        let path = self.directory.join(USER_CONFIG_FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Zeroizing::new(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Zeroizing::default()),
            Err(error) => Err(Error::file("read", &path)(error)),
        }
    }

    fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, Error> {
        let path = self.directory.join(name);
        let bytes = std::fs::read(&path).map_err(Error::file("read", &path))?;
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { path, source })
    }

    fn save_json(&self, name: &str, value: &impl serde::Serialize) -> Result<(), Error> {
        let path = self.directory.join(name);
        let bytes =
            python_json::indented(value).map_err(|source| Error::Json { path: path.clone(), source })?;
        durable::replace(&path, &bytes, 0o644)
    }

    /// A text file of the project as Python's text mode reads it: any line end becomes `\n`. A missing file is empty.
    fn text(&self, name: &str) -> Result<String, Error> {
        let path = self.directory.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => match String::from_utf8(bytes) {
                Ok(text) => Ok(text.replace("\r\n", "\n").replace('\r', "\n")),
                Err(_) => Err(Error::NotText { path }),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(Error::file("read", &path)(error)),
        }
    }
}

/// 20 random bytes as hex: an app's id or the seed of an instance's.
///
/// # Errors
///
/// [`Error::Random`].
pub fn random_id() -> Result<String, Error> {
    let mut bytes = [0; 20];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Error::Random)?;
    Ok(hex::encode(bytes))
}
