//! `new`, `config-edit`, `prepare`: what needs no cloud.

use std::path::{Path, PathBuf};

use clap::builder::ArgPredicate;
use clap::{Args, ValueEnum};
use command_line::{Exit, Failure, print_line};
use serde_json::json;

use super::site::{Site, shown};
use super::{ProjectArguments, failure};
use crate::Error;
use crate::project::{App, Chain, KeyProvider, KmsTemplate, Project, Settings, random_id};
use crate::vmm::{self, PortMapping};

/// A compose file and a script that say what they are for.
const COMPOSE: &str =
    "# The containers of this app. Their text is measured; name images by digest.\nservices: {}\n";
const PRELAUNCH: &str =
    "#!/bin/sh\n# Runs before the containers start. Its text is measured and public: no secrets here.\n";

/// Arguments of `new`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  keyferry kms new app --project my-project --compose docker-compose.yaml
  keyferry kms new kms-a --project my-project --kms direct --kms-image $KMS_IMAGE --kms-contract 0x… \\
    --rpc-url https://sepolia.base.org --rpc-url https://base-sepolia-rpc.publicnode.com
  keyferry kms new kms-a --project my-project --kms light --kms-image $KMS_IMAGE --kms-contract 0x… \\
    --helios-image $HELIOS_IMAGE --checkpoint 0x…")]
pub struct New {
    /// Name of the project and of its folder
    pub name: String,
    /// The OS image's name
    #[arg(long, value_name = "IMAGE")]
    pub os_image: Option<String>,
    /// The app's id, 40 hex characters; random when not given
    #[arg(long, value_name = "HEX")]
    pub app_id: Option<String>,
    /// Publish the app through a dstack gateway
    #[arg(long, visible_alias = "gw", overrides_with = "no_gateway_enabled")]
    pub gateway_enabled: bool,
    /// Do not publish the app through a dstack gateway
    #[arg(long, visible_alias = "no-gw")]
    pub no_gateway_enabled: bool,
    /// Where the disk key comes from: kms, local, tpm or none; tpm with --kms
    #[arg(long, visible_alias = "kp", value_name = "PROVIDER", value_parser = key_provider, default_value = "kms",
        default_value_if("mode", ArgPredicate::IsPresent, "tpm"))]
    pub key_provider: KeyProvider,
    /// File system of the data disk
    #[arg(long, visible_alias = "fs", value_parser = ["ext4", "zfs"], default_value = "ext4")]
    pub storage_fs: String,
    /// Wait for authenticated time at boot, which can hang it
    #[arg(long, overrides_with = "no_secure_time")]
    pub secure_time: bool,
    /// Do not wait for authenticated time at boot
    #[arg(long)]
    pub no_secure_time: bool,
    /// Leave the instance's id out of the measurement
    #[arg(long)]
    pub no_instance_id: bool,
    /// Google project
    #[arg(short, long, value_name = "ID")]
    pub project: Option<String>,
    /// Zone
    #[arg(short, long)]
    pub zone: Option<String>,
    /// Name of the machine; dstack-NAME when not given
    #[arg(long, value_name = "NAME")]
    pub instance_name: Option<String>,
    /// Machine type
    #[arg(short, long, value_name = "TYPE")]
    pub machine_type: Option<String>,
    /// Size of the data disk in GB
    #[arg(long, value_name = "GB")]
    pub data_size: Option<u32>,
    #[command(flatten)]
    kms: Kms,
    /// Publish a port of a machine on bare metal, tcp:ADDRESS:HOST:GUEST; may be given more than once
    #[arg(long, value_name = "MAPPING")]
    pub publish: Vec<PortMapping>,
    /// Start from this compose file
    #[arg(long, value_name = "FILE", conflicts_with = "mode")]
    pub compose: Option<PathBuf>,
    /// Start from this script to run before the containers
    #[arg(long, value_name = "FILE", conflicts_with = "mode")]
    pub prelaunch: Option<PathBuf>,
}

/// What a project that runs a KMS is made of.
#[derive(Debug, Args)]
#[command(next_help_heading = "A project that runs a KMS")]
struct Kms {
    /// Run a KMS that reads its contract from endpoints (direct) or through a light client (light)
    #[arg(id = "mode", long = "kms", value_name = "MODE")]
    mode: Option<Mode>,
    /// Image of kms-server, by digest
    #[arg(long, value_name = "NAME@sha256:DIGEST", requires = "mode")]
    kms_image: Option<String>,
    /// Address of the KMS contract
    #[arg(long, value_name = "ADDRESS", env = "KMS_CONTRACT_ADDR")]
    kms_contract: Option<String>,
    /// Chain the contract is on
    #[arg(long, value_name = "ID", default_value_t = 84532)]
    chain_id: u64,
    /// Port of the KMS on the machine
    #[arg(long, value_name = "PORT", env = "KMS_PORT", default_value_t = 12001)]
    kms_port: u16,
    /// A JSON-RPC endpoint whose address holds no key (direct); give two, of different operators
    #[arg(long, value_name = "URL", requires = "mode")]
    rpc_url: Vec<String>,
    /// Image of the Helios light client, by digest (light)
    #[arg(long, value_name = "NAME@sha256:DIGEST", requires = "mode")]
    helios_image: Option<String>,
    /// The light client's name of the network (light)
    #[arg(long, default_value = "base-sepolia")]
    network: String,
    /// A finalised beacon block root from a source you trust (light)
    #[arg(long, value_name = "0xROOT", requires = "mode")]
    checkpoint: Option<String>,
}

/// How a KMS reads its contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// From endpoints that must agree
    Direct,
    /// Through a light client
    Light,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Light => "light",
        }
    }
}

/// Arguments of `prepare`.
#[derive(Debug, Args)]
pub struct Prepare {
    #[command(flatten)]
    project: ProjectArguments,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
}

fn key_provider(text: &str) -> Result<KeyProvider, String> {
    [KeyProvider::Kms, KeyProvider::Local, KeyProvider::Tpm, KeyProvider::None]
        .into_iter()
        .find(|provider| provider.name() == text)
        .ok_or_else(|| "expected kms, local, tpm or none".to_owned())
}

pub(super) fn new(arguments: &New) -> Result<(), Failure> {
    let app = app(arguments)?;
    let text = |file: &Option<PathBuf>, default: &str| match file {
        Some(path) => {
            std::fs::read_to_string(path).map_err(|error| failure(Error::file("read", path)(error)))
        }
        None => Ok(default.to_owned()),
    };
    let (compose, script, user_config) = match arguments.template()? {
        Some(template) => {
            let script = template.prelaunch().map_err(failure)?;
            (template.compose().to_owned(), script, template.user_config())
        }
        None => (text(&arguments.compose, COMPOSE)?, text(&arguments.prelaunch, PRELAUNCH)?, "{}".to_owned()),
    };
    let project = Project::create(Path::new(&arguments.name), &app, &compose, &script, &user_config);
    let project = project.map_err(failure)?;
    print_line(&format!("made the project {}", shown(project.directory())));
    if user_config.contains("\"\"") {
        tracing::info!("fill in {}", project.directory().join(".user-config").display());
    }
    Ok(())
}

impl New {
    /// The KMS to run, when one is asked for.
    fn template(&self) -> Result<Option<KmsTemplate>, Failure> {
        let Some(mode) = self.kms.mode else { return Ok(None) };
        let Kms {
            kms_image,
            kms_contract,
            chain_id,
            kms_port,
            rpc_url,
            helios_image,
            network,
            checkpoint,
            ..
        } = &self.kms;
        let needed = |name: &str| Failure::new(Exit::Usage, format!("--kms {} needs {name}", mode.name()));
        let text = |name: &str, given: &Option<String>| given.clone().ok_or_else(|| needed(name));
        let chain = match mode {
            Mode::Direct => {
                let [first, second] = rpc_url.as_slice() else {
                    return Err(needed("--rpc-url twice: endpoints of two operators, which must agree"));
                };
                Chain::Direct { endpoints: [first.clone(), second.clone()] }
            }
            Mode::Light => Chain::Light {
                image: text("--helios-image", helios_image)?,
                network: network.clone(),
                checkpoint: text("--checkpoint, from a source you trust", checkpoint)?,
            },
        };
        Ok(Some(KmsTemplate {
            image: text("--kms-image", kms_image)?,
            contract: text("--kms-contract", kms_contract)?,
            chain_id: *chain_id,
            port: *kms_port,
            chain,
        }))
    }
}

fn app(arguments: &New) -> Result<App, Failure> {
    let mut app = App { name: arguments.name.clone(), ..App::default() };
    let folder = Path::new(&arguments.name).file_name().and_then(|it| it.to_str()).unwrap_or_default();
    let config = &mut app.gcp_config;
    config.instance_name = arguments.instance_name.clone().unwrap_or_else(|| format!("dstack-{folder}"));
    for (given, setting) in [
        (&arguments.os_image, &mut app.os_image),
        (&arguments.project, &mut config.project),
        (&arguments.zone, &mut config.zone),
        (&arguments.machine_type, &mut config.machine_type),
    ] {
        if let Some(given) = given {
            setting.clone_from(given);
        }
    }
    if !arguments.publish.is_empty() {
        let ports = arguments.publish.iter().map(ToString::to_string).collect();
        let section = vmm::Config { ports, ..vmm::Config::default() };
        app.other.insert(vmm::SECTION.to_owned(), json!(section));
    }
    config.data_size = arguments.data_size.unwrap_or(config.data_size);
    app.key_provider = arguments.key_provider;
    // Without a KMS there is nothing a gateway could authenticate the app by.
    app.gateway_enabled = arguments.key_provider == KeyProvider::Kms && !arguments.no_gateway_enabled;
    app.storage_fs.clone_from(&arguments.storage_fs);
    app.secure_time = arguments.secure_time;
    app.no_instance_id = arguments.no_instance_id;
    app.instance_id_seed = random_id().map_err(failure)?;
    app.app_id = match &arguments.app_id {
        Some(id) if id.len() == 40 && id.bytes().all(|byte| byte.is_ascii_hexdigit()) => id.to_lowercase(),
        Some(id) => {
            return Err(Failure::new(Exit::Usage, format!("--app-id: {id:?} is not 40 hex characters")));
        }
        None => random_id().map_err(failure)?,
    };
    Ok(app)
}

pub(super) async fn config_edit() -> Result<(), Failure> {
    let site = Site::read()?;
    Settings::write_template(&site.settings_path).map_err(failure)?;
    let editor = std::env::var("EDITOR").ok().filter(|it| !it.is_empty()).unwrap_or_else(|| "vi".to_owned());
    // An editor may come with arguments, `code --wait`; there is no shell in between.
    let mut words = editor.split_whitespace();
    let program = words.next().unwrap_or("vi");
    let status = tokio::process::Command::new(program).args(words).arg(&site.settings_path).status().await;
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => return Err(Failure::new(Exit::Internal, format!("{program}: {status}"))),
        Err(error) => {
            let failure = Failure::new(Exit::Usage, format!("{program}: {error}"));
            return Err(failure.with_hint("set EDITOR to an editor that is installed"));
        }
    }
    // What was written must be readable before the editor is out of sight.
    Settings::load(&site.settings_path).map(|_| ()).map_err(failure)
}

pub(super) fn prepare(arguments: &Prepare) -> Result<(), Failure> {
    let site = Site::read()?;
    let deployment = site.open(&arguments.project)?;
    let image = deployment.image(&site.settings, &site.home).map_err(failure)?;
    let (project, app) = (deployment.project(), deployment.app());
    for doubt in project.doubts(app).map_err(failure)? {
        tracing::warn!("{doubt}");
    }
    let files = project.prepare(app, &site.settings.services, &image, None).map_err(failure)?;
    let compose = files.compose();
    let hash = hex::encode(compose.hash());
    let own_id = hex::encode(compose.app_id());
    let app_id = if app.key_provider == KeyProvider::Kms { app.app_id.as_str() } else { own_id.as_str() };
    let written: Vec<&str> = files.files().map(|(name, _)| name).collect();
    if arguments.json {
        print_line(
            &json!({"composeHash": hash, "appId": app_id, "osImageHash": image.hash(), "files": written})
                .to_string(),
        );
    } else {
        print_line(&format!(
            "COMPOSE_HASH: 0x{hash}\nAPP_ID: 0x{app_id}\nOS_IMAGE_HASH (by the image's own files): 0x{}",
            image.hash()
        ));
    }
    Ok(())
}
