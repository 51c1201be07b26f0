//! The surroundings of a command: home directory, settings, credentials, clock.

use std::path::{Path, PathBuf};

use command_line::{Exit, Failure};
use time::OffsetDateTime;
use time::format_description::well_known::Iso8601;

use super::{GoogleArguments, ProjectArguments, failure};
use crate::gcp::{Client, Credentials, Endpoints};
use crate::gcp_tdx::Deployment;
use crate::project::{Project, Settings};

/// The surroundings, read once.
pub(crate) struct Site {
    pub(crate) home: PathBuf,
    pub(crate) settings_path: PathBuf,
    pub(crate) settings: Settings,
}

impl Site {
    pub(crate) fn read() -> Result<Self, Failure> {
        let home = variable("HOME").map(PathBuf::from);
        let home = home.ok_or_else(|| Failure::new(Exit::Usage, "HOME is not set"))?;
        let own = variable("DSTACK_CLOUD_CONFIG").map(PathBuf::from);
        let settings_path = Settings::path(own.as_deref(), &home);
        let settings = Settings::load(&settings_path).map_err(failure)?;
        Ok(Self { home, settings_path, settings })
    }

    /// Opens the project with its ledger.
    pub(super) fn open(&self, project: &ProjectArguments) -> Result<Deployment, Failure> {
        let project = Project::open(&project.directory).map_err(failure)?;
        Deployment::open(project, &self.settings).map_err(failure)
    }
}

/// A client for the Google project `project`, with the variables gcloud knows.
pub(super) async fn client(project: &str, google: &GoogleArguments) -> Result<Client, Failure> {
    let mut endpoints = Endpoints::default();
    if let Some(address) = variable("CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE") {
        endpoints.compute = parse("CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE", &address)?;
    }
    if let Some(address) = variable("CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE") {
        // gcloud's variable names the JSON API; uploads are beside it.
        let root = address.trim_end_matches('/').trim_end_matches("storage/v1");
        endpoints.storage = parse("CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE", root)?;
    }
    if let Some(address) = variable("CLOUDSDK_API_ENDPOINT_OVERRIDES_IAMCREDENTIALS") {
        endpoints.iam_credentials = parse("CLOUDSDK_API_ENDPOINT_OVERRIDES_IAMCREDENTIALS", &address)?;
    }
    let credentials = match variable("CLOUDSDK_AUTH_ACCESS_TOKEN") {
        Some(token) => Credentials::token(token),
        None => Credentials::find().await.map_err(|error| failure(error.into()))?,
    };
    let credentials = match &google.impersonate_service_account {
        Some(account) => credentials.impersonate(account.clone()),
        None => credentials,
    };
    Client::new(project, endpoints, credentials).map_err(|error| failure(error.into()))
}

fn parse(name: &str, address: &str) -> Result<reqwest::Url, Failure> {
    reqwest::Url::parse(address)
        .map_err(|error| Failure::new(Exit::Usage, format!("{name}: {address}: {error}")))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The time as dstack-cloud writes it into `state.json`, without a zone; here it is UTC.
pub(crate) fn now() -> String {
    let text = OffsetDateTime::now_utc().format(&Iso8601::DATE_TIME).unwrap_or_default();
    text.split('.').next().unwrap_or_default().to_owned()
}

/// Whether `path` is there, for messages.
pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}
