//! A machine that a KMS is to run on: a guest agent, a directory, a policy.

use std::path::Path;
use std::sync::Arc;

use attestation::UnixMillis;
use kms_server::store::inspect::{State, inspect};
use kms_server::{Config, OnboardHandle, Opened, ServerHandle};
use nsm_emulator::{Config as EmulatorConfig, Emulator};

use super::agent::Agent;
use super::{APP, Told, ask_plain, image, settings_text};

/// A machine with an agent, and a directory for its KMS.
pub(crate) struct Machine {
    pub(crate) emulator: Arc<Emulator>,
    pub(crate) agent: Agent,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) settings: String,
}

/// Settings for a policy in this directory that lets this image (hex) be a KMS.
pub(crate) fn policy(directory: &Path, kms_image: &str) -> String {
    let file = directory.join("policy.toml");
    let (app, image) = (APP, hex::encode(image()));
    let text = format!(
        "[apps.{app}]\nimages = [\"{image}\"]\n\
         [kms]\nimages = [\"{kms_image}\"]\nmr_aggregated = [\"{kms_image}\"]\nallow_any_device = true\n"
    );
    std::fs::write(&file, text).unwrap();
    format!("core.auth_api.type = \"policy\"\ncore.auth_api.policy.file = \"{}\"\n", file.display())
}

impl Machine {
    /// Under the root of `like`, if given, with a policy that lets this image be a KMS.
    pub(crate) async fn start(like: Option<&Self>, more: &str) -> Self {
        Self::with_policy(like, &hex::encode(image()), more).await
    }

    pub(crate) async fn with_policy(like: Option<&Self>, kms_image: &str, more: &str) -> Self {
        let emulator = match like {
            Some(machine) => machine.emulator.another(EmulatorConfig::default()).unwrap(),
            None => Emulator::new(EmulatorConfig::default()).unwrap(),
        };
        let emulator = Arc::new(emulator);
        let agent = Agent::start(Arc::clone(&emulator)).await;
        let directory = tempfile::tempdir().unwrap();
        let more = policy(directory.path(), kms_image) + &agent.settings() + more;
        let settings = settings_text(directory.path(), &emulator, &more);
        Self { emulator, agent, directory, settings }
    }

    pub(crate) async fn open(&self) -> Opened {
        let config = Config::from_toml(&self.settings).unwrap().0;
        Opened::open(config, Arc::new(clock)).await.unwrap()
    }

    /// Bootstraps by RPC and serves.
    pub(crate) async fn bootstrapped(&self) -> ServerHandle {
        let opened = self.open().await;
        let onboarding = opened.onboard().await.unwrap();
        let told = post(&onboarding, "Bootstrap", r#"{"domain":"localhost"}"#).await;
        assert_eq!(told.status, 200, "{told:?}");
        finish(opened, onboarding).await
    }

    pub(crate) fn state(&self) -> State {
        inspect(&self.directory.path().join("certs"), clock()).unwrap().state
    }
}

/// The system's.
pub(crate) fn clock() -> UnixMillis {
    UnixMillis(nsm_emulator::system_clock(0)())
}

/// Calls a method of the Onboard service in JSON.
pub(crate) async fn post(onboarding: &OnboardHandle, method: &str, body: &str) -> Told {
    ask_plain(onboarding.address(), "POST", &format!("/prpc/{method}?json"), body.as_bytes()).await
}

/// Finishes by hand, and serves.
pub(crate) async fn finish(opened: Opened, onboarding: OnboardHandle) -> ServerHandle {
    let told = ask_plain(onboarding.address(), "GET", "/finish", b"").await;
    assert_eq!((told.status, told.body.as_slice()), (200, b"OK".as_slice()));
    finished(opened, onboarding).await
}

/// Waits until somebody has finished, and serves.
pub(crate) async fn finished(opened: Opened, onboarding: OnboardHandle) -> ServerHandle {
    onboarding.finished().await;
    onboarding.shutdown().await;
    opened.serve().await.unwrap()
}
