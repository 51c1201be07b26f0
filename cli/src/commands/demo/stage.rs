//! What the demo needs to be there: an emulated NSM, two KMSs and a proxy, each the real thing in this process.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use attestation::{OsImageHash, Pcr, os_image_hash};
use command_line::{Exit, Failure};
use enclave_agent::nsm::{Nsm, NsmSource};
use enclave_agent::{Deadlines, DebugMode, GetKeys, Keys, KmsTrust, Proxy, Retry, SealedRelease, get_keys};
use host_proxy::config::Service;
use host_proxy::policy::{Entry, RuleSet};
use kms_protocol::AppId;
use kms_server::{Server, ServerHandle};
use nsm_emulator::{Emulator, system_clock};
use ratls::client::PinnedRoot;
use rustls::time_provider::DefaultTimeProvider;
use sha2::{Digest, Sha256, Sha384};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use transport::{BindOptions, Endpoint, Listener};

use super::on_chain::Registry;
use super::story::{Story, short};

/// The name in the KMS's certificate.
pub(super) const DOMAIN: &str = "localhost";
/// How far the old document's clock is behind, in seconds; the KMS takes documents up to an hour old.
const OLD: i64 = 2 * 60 * 60;

/// All parts, up and running; the directory goes with the stage.
pub(super) struct Stage {
    directory: TempDir,
    app_id: AppId,
    module: Emulator,
    kms: ServerHandle,
    impostor: ServerHandle,
    proxy: host_proxy::Proxy,
    way_out: Endpoint,
    trusted_root: PinnedRoot,
    shutdown: CancellationToken,
    modules: TaskTracker,
}

/// An enclave that asks for keys: a module with its measurements and its clock.
pub(super) struct Enclave {
    socket: Endpoint,
    nsm: NsmSource,
    module: Arc<Emulator>,
    max_clock_skew: Duration,
}

impl Stage {
    /// Sets up everything. The registry decides who gets keys; without one, a file of rules that knows the demo's image.
    pub(super) async fn set(registry: Option<&Registry>, story: &mut Story) -> Result<Self, Failure> {
        let directory = tempfile::tempdir().map_err(internal)?;
        let module = Emulator::new(module_config(measurements(), 0)).map_err(internal)?;
        story.said(
            "nsm",
            &format!(
                "{} signs under a root made now: {}",
                module.module_id(),
                short(&sha256(module.root_der()))
            ),
        );
        let image = registered_image();
        story.said("image", &format!("OS_IMAGE_HASH = sha256(PCR0 ‖ PCR1 ‖ PCR2) = 0x{image}"));

        let app_id = registry.map_or(AppId::new([0x11; 20]), Registry::app_id);
        let root = directory.path().join("nsm-root.pem");
        write(&root, &module.root_pem())?;
        let authoriser = match registry {
            Some(registry) => registry.kms_settings(),
            None => {
                let policy = directory.path().join("policy.toml");
                write(&policy, &format!("[apps.{app_id}]\nimages = [\"{image}\"]\n"))?;
                by_policy(&policy)
            }
        };
        let kms = start_kms(&directory.path().join("kms"), &root, &authoriser, 0).await?;
        let root_ca = PinnedRoot::from_pem(kms.root_ca_pem()).map_err(internal)?;
        story.said(
            "kms",
            &format!(
                "made its root keys; {}; the agent pins its root CA, key {}",
                url(&kms),
                short(&sha256(root_ca.spki_der()))
            ),
        );
        let rule = match registry {
            Some(_) => "asks the contracts on the chain who may have the keys".to_owned(),
            None => format!("may release the keys of app {app_id} to that image and no other"),
        };
        story.said("kms", &rule);
        let impostor = start_kms(&directory.path().join("impostor"), &root, &authoriser, 0).await?;

        let rules = [&kms, &impostor].into_iter().flat_map(|kms| {
            let port = kms.address().port();
            // A name opens public addresses only; the loopback has to be named as well.
            [format!("{DOMAIN}:{port}"), format!("127.0.0.1:{port}")]
        });
        let rules =
            rules.map(|rule| rule.parse().map(Entry::new)).collect::<Result<_, _>>().map_err(internal)?;
        let way_out = Endpoint::unix(directory.path().join("proxy.sock")).map_err(internal)?;
        let service = Service::egress("egress", way_out.clone(), RuleSet::new(rules));
        let config = host_proxy::Config::new(vec![service]).map_err(internal)?;
        let proxy = host_proxy::Proxy::start(config).await.map_err(internal)?;
        story.said("proxy", &format!("is the only way out, on a Unix socket; opens {DOMAIN} at two ports"));

        Ok(Self {
            directory,
            app_id,
            module,
            kms,
            impostor,
            proxy,
            way_out,
            trusted_root: root_ca,
            shutdown: CancellationToken::new(),
            modules: TaskTracker::new(),
        })
    }

    /// The KMS whose root the agent pins.
    pub(super) fn kms(&self) -> &ServerHandle {
        &self.kms
    }

    /// A KMS that knows the app and the image too, and has a root of its own.
    pub(super) fn impostor(&self) -> &ServerHandle {
        &self.impostor
    }

    /// One trip of `enclave` to `kms`.
    pub(super) async fn fetch_keys(
        &self,
        enclave: &Enclave,
        kms: &ServerHandle,
        story: &mut Story,
    ) -> Result<Keys, Failure> {
        let listener = Listener::bind(&enclave.socket, BindOptions::default()).await.map_err(internal)?;
        self.modules.spawn(nsm_emulator::serve(
            Arc::clone(&enclave.module),
            listener,
            self.shutdown.child_token(),
        ));
        let nsm: Arc<dyn Nsm> = enclave.nsm.open().map_err(internal)?;
        let trust = KmsTrust::anchored(Some(self.trusted_root.clone()), None, None).map_err(internal)?;
        let config = GetKeys {
            kms_urls: vec![url(kms).parse().map_err(internal)?],
            app_id: self.app_id,
            trust,
            sealed: SealedRelease::Prefer,
            proxy: Proxy::Endpoint(self.way_out.clone()),
            deadlines: Deadlines { total: Duration::from_secs(30), ..Deadlines::default() },
            retry: Retry::default(),
            debug_mode: DebugMode::Refuse,
            max_clock_skew: enclave.max_clock_skew,
            time: Arc::new(DefaultTimeProvider),
        };
        get_keys(&config, &nsm, &mut |step| story.step(step)).await.map_err(Failure::from)
    }

    /// Stops everything and removes the directory.
    pub(super) async fn strike(self) {
        let Self { directory, kms, impostor, proxy, shutdown, modules, .. } = self;
        shutdown.cancel();
        modules.close();
        modules.wait().await;
        proxy.shutdown().await;
        kms.shutdown().await;
        impostor.shutdown().await;
        drop(directory);
    }
}

impl Enclave {
    /// The enclave whose image the KMS knows; `name` tells its module from others.
    pub(super) fn registered(stage: &Stage, name: &str) -> Result<Self, Failure> {
        Self::new(stage, name, measurements(), 0)
    }

    /// The same with one byte of the application changed, which is another PCR0 and another PCR2.
    pub(super) fn with_changed_image(stage: &Stage) -> Result<Self, Failure> {
        let [_, pcr1, _] = measurements();
        Self::new(stage, "changed", [digest("demo image, changed"), pcr1, digest("demo app, changed")], 0)
    }

    /// The same with a document from the past. This agent would notice by its own clock, so here it does not look.
    pub(super) fn with_old_clock(stage: &Stage) -> Result<Self, Failure> {
        let enclave = Self::new(stage, "old", measurements(), -OLD)?;
        Ok(Self { max_clock_skew: Duration::from_secs(OLD.unsigned_abs() * 2), ..enclave })
    }

    fn new(stage: &Stage, name: &str, pcrs: [[u8; 48]; 3], clock_offset: i64) -> Result<Self, Failure> {
        let path = stage.directory.path().join(format!("nsm-{name}.sock"));
        let module = stage.module.another(module_config(pcrs, clock_offset)).map_err(internal)?;
        Ok(Self {
            socket: Endpoint::unix(&path).map_err(internal)?,
            nsm: NsmSource::Socket(path),
            module: Arc::new(module),
            max_clock_skew: Duration::from_secs(300),
        })
    }
}

/// The settings of a KMS that decides by the rules in a file.
pub(super) fn by_policy(policy: &Path) -> String {
    format!("[core.auth_api]\ntype = \"policy\"\n[core.auth_api.policy]\nfile = {policy:?}\n")
}

/// A KMS that believes documents under `nsm_root`; port 0 is one that is free.
pub(super) async fn start_kms(
    directory: &Path,
    nsm_root: &Path,
    authoriser: &str,
    port: u16,
) -> Result<ServerHandle, Failure> {
    let settings = format!(
        "[rpc]\naddress = \"127.0.0.1\"\nport = {port}\n\
         [core]\ncert_dir = {directory:?}\nenforce_self_authorization = false\nattest_rpc_cert = false\n\
         nitro_enclave_key_release = true\n\
         [core.onboard]\nauto_bootstrap_domain = \"{DOMAIN}\"\n\
         [core.attestation]\ninsecure_allow_external_trust_anchors = true\n\
         [core.attestation.root_ca]\naws_nitro_enclave = {nsm_root:?}\n\
         {authoriser}"
    );
    let (config, _warnings_about_our_own_text) =
        kms_server::Config::from_toml(&settings).map_err(internal)?;
    Server::start(config).await.map_err(internal)
}

pub(super) fn url(kms: &ServerHandle) -> String {
    format!("https://{}:{}", kms.domain(), kms.address().port())
}

pub(super) fn module_config(pcrs: [[u8; 48]; 3], clock_offset: i64) -> nsm_emulator::Config {
    nsm_emulator::Config {
        pcrs: (0..).zip(pcrs).collect(),
        module_id: None,
        clock: system_clock(clock_offset),
    }
}

/// The demo's image.
pub(super) fn registered_image() -> OsImageHash {
    let [pcr0, pcr1, pcr2] = measurements().map(Pcr::new);
    os_image_hash(&pcr0, &pcr1, &pcr2)
}

/// PCR0 to PCR2 of the demo's image.
fn measurements() -> [[u8; 48]; 3] {
    ["demo image", "demo kernel and init", "demo app"].map(digest)
}

fn digest(text: &str) -> [u8; 48] {
    Sha384::digest(text).into()
}

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

pub(super) fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text)
        .map_err(|error| Failure::new(Exit::Internal, format!("{}: {error}", path.display())))
}

pub(super) fn internal(error: impl std::error::Error + Send + Sync + 'static) -> Failure {
    Failure::new(Exit::Internal, error)
}
