//! `keyferry demo --vm`: the trip of a real enclave image. Built here, booted in a virtual machine whose security module
//! signs, and its keys opened by the operator, who alone can.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use age::secrecy::ExposeSecret;
use age::x25519::Identity;
use clap::Args;
use command_line::{Exit, Failure};
use eif_builder::Registers;
use eif_builder::project::Project;
use enclave_agent::output::{Existing, KeyFile};
use enclave_vm::Tools;
use kms_protocol::AppId;
use kms_protocol::app_keys::AppKeys;
use kms_server::ServerHandle;
use nsm_emulator::Emulator;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::task::spawn_blocking;
use zeroize::Zeroizing;

use super::stage::{DOMAIN, by_policy, internal, module_config, start_kms, url, write};
use super::story::Story;
use crate::commands::enclave::run::ToolArguments;
use crate::commands::keys;
use crate::commands::local_enclave::{Console, Ended, LocalEnclave, NsmRoot, tools};

/// Everything together: without KVM the machine takes its time.
pub(super) const WHOLE_DEMO: Duration = Duration::from_secs(300);
/// The enclave's part of it.
const ENCLAVE: Duration = Duration::from_secs(180);
/// The image in the demo's directory.
const IMAGE: &str = "demo.eif";
/// What comes out of the enclave, and what opens it.
const EXPORT: &str = "keys.age";
const IDENTITY: &str = "operator.txt";

/// What `--vm` needs.
#[derive(Args, Debug)]
pub(super) struct VmArguments {
    /// With --vm: kernel for the image (a bzImage with the NSM driver, as eif-builder/kernel makes it)
    #[arg(long, value_name = "FILE", env = "KEYFERRY_KERNEL")]
    kernel: Option<PathBuf>,
    /// With --vm: a static enclave-agent, the image's init (and here its app, too)
    #[arg(long, value_name = "FILE", env = "KEYFERRY_AGENT")]
    agent: Option<PathBuf>,
    /// With --vm: memory of the machine in MiB, at least four times the image
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    #[command(flatten)]
    tools: ToolArguments,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    version: u32,
    image_bytes: u64,
    os_image_hash: String,
    /// From the start of QEMU to the start of init.
    boot_millis: Option<u128>,
    /// From the start of QEMU to the delivery of keys and the app's end.
    total_millis: u128,
    disk_crypt_key_fingerprint: String,
    k256_public_key: String,
}

pub(super) async fn tell(arguments: VmArguments, reveal: bool, json: bool) -> Result<(), Failure> {
    let VmArguments { kernel, agent, memory, tools: tool_arguments } = arguments;
    let tools = tools(&tool_arguments)?;
    let kernel = needed(kernel, "--kernel FILE or KEYFERRY_KERNEL", "a kernel with the NSM driver")?;
    let agent = needed(agent, "--agent FILE or KEYFERRY_AGENT", "a static enclave-agent")?;

    let mut story = Story::new(json);
    story.chapter("The stage: a KMS and a parent in this process, the enclave in a virtual machine");
    let stage = Stage::set(&kernel, &agent, &mut story).await?;

    story.chapter("The enclave");
    let started = Instant::now();
    let ended = stage.enclave(tools, memory, &mut story).await?;
    let total_millis = started.elapsed().as_millis();

    story.chapter("What came out");
    let sealed = fs::metadata(stage.path(EXPORT)).map_err(internal)?.len();
    story.said(
        "op",
        &format!("received {sealed} sealed bytes through the parent, with a document of the module"),
    );
    let keys = stage.open().await?;
    story.said(
        "op",
        "verified the document under the module's root: it is of this image, and of these very keys",
    );
    let app_keys = AppKeys::from_json(&keys).map_err(internal)?;
    let disk = Sha256::new().chain_update("disk_crypt_key:").chain_update(app_keys.disk_crypt_key.expose());
    let report = Report {
        version: 1,
        image_bytes: fs::metadata(stage.path(IMAGE)).map_err(internal)?.len(),
        os_image_hash: stage.registers.os_image_hash().to_string(),
        boot_millis: ended.boot_time.map(|it| it.wall.as_millis()),
        total_millis,
        disk_crypt_key_fingerprint: hex::encode(&disk.finalize()[..8]),
        k256_public_key: app_keys.k256_key.public_key().map_err(internal)?.to_string(),
    };
    stage.kms.shutdown().await;
    if json {
        command_line::print_line(&serde_json::to_string(&report).map_err(internal)?);
        return Ok(());
    }
    story.facts(&[
        ("image", &format!("{} bytes", report.image_bytes)),
        ("OS_IMAGE_HASH", &report.os_image_hash),
        ("init after", &report.boot_millis.map_or("unknown".into(), |millis| format!("{millis} ms"))),
        ("keys and app after", &format!("{total_millis} ms")),
        ("disk key fingerprint", &report.disk_crypt_key_fingerprint),
        ("app k256 public key", &report.k256_public_key),
    ]);
    if reveal {
        story.reveal(&keys);
    }
    Ok(())
}

fn needed(path: Option<PathBuf>, how: &str, what: &str) -> Result<PathBuf, Failure> {
    let path = path.ok_or_else(|| {
        Failure::new(Exit::Usage, format!("--vm needs {what}: {how}"))
            .with_hint("scripts/demo.sh --vm finds or builds all that is needed")
    })?;
    // The project file that names it is in another directory.
    fs::canonicalize(&path).map_err(|error| Failure::new(Exit::Usage, format!("{}: {error}", path.display())))
}

/// The image, and all that it will meet.
struct Stage {
    directory: TempDir,
    module: Emulator,
    kms: ServerHandle,
    registers: Registers,
}

impl Stage {
    /// The image holds the KMS's root, and the KMS's policy the image: so the KMS makes its keys first, and comes back
    /// at the same port when the image is there.
    async fn set(kernel: &Path, agent: &Path, story: &mut Story) -> Result<Self, Failure> {
        let directory = tempfile::tempdir().map_err(internal)?;
        let path = |name: &str| directory.path().join(name);
        let module = Emulator::new(module_config([[0; 48]; 3], 0)).map_err(internal)?;
        write(&path("nsm-root.pem"), &module.root_pem())?;
        story.said("nsm", "signs under a root made now, which the KMS is told to believe");

        let app_id = AppId::new([0x11; 20]);
        write(&path("policy.toml"), &policy(&app_id, &"11".repeat(32)))?;
        let start = |port| {
            let (keys, root, policy) = (path("kms"), path("nsm-root.pem"), path("policy.toml"));
            async move { start_kms(&keys, &root, &by_policy(&policy), port).await }
        };
        let kms = start(0).await?;
        let (kms_url, port) = (url(&kms), kms.address().port());
        write(&path("kms-ca.pem"), kms.root_ca_pem())?;
        kms.shutdown().await;
        // Its directory is free again for the next one.
        drop(kms);
        story.said("kms", &format!("made its root keys; will be at {kms_url}"));
        let identity = Identity::generate();
        let recipient = identity.to_public();
        let text = identity.to_string();
        KeyFile::new(path(IDENTITY), Existing::Keep)
            .write(text.expose_secret().as_bytes())
            .map_err(internal)?;
        story.said("op", &format!("made a key to receive with: {recipient}"));

        let project = format!(
            "[image]\nbinary = {agent:?}\ncmd = [\"--version\"]\n\
             [boot]\nkernel = {kernel:?}\ninit = \"agent\"\nagent = {agent:?}\n\
             [kms]\nurl = \"{kms_url}\"\napp_id = \"{app_id}\"\nkms_ca = \"kms-ca.pem\"\n\
             recipients = [\"{recipient}\"]\n"
        );
        write(&path("keyferry.toml"), &project)?;
        let registers = build(directory.path().to_owned()).await?;
        let (pcrs, hash) = (registers_of(&registers), registers.os_image_hash().to_string());
        for (name, value) in &pcrs {
            story.said("image", &format!("{name} {value}"));
        }
        write(&path("policy.toml"), &policy(&app_id, &hash))?;
        let kms = start(port).await?;
        story.said("kms", &format!("may release the keys of app {app_id} to image 0x{hash} and no other"));
        Ok(Self { directory, module, kms, registers })
    }

    /// Boots the image; it ends with its app.
    async fn enclave(&self, tools: Tools, memory: Option<u64>, story: &mut Story) -> Result<Ended, Failure> {
        let mut shown = story.another();
        let port = self.kms.address().port();
        let enclave = LocalEnclave {
            image: &self.path(IMAGE),
            tools,
            root: NsmRoot::Of(&self.module),
            // A name opens public addresses only; the loopback has to be named as well.
            opens: vec![format!("{DOMAIN}:{port}"), format!("127.0.0.1:{port}")],
            export: self.path(EXPORT),
            console: Console::new(move |line| {
                if let Some(words) = line.strip_prefix("keyferry: ") {
                    shown.said("guest", words);
                }
            }),
            memory_mib: memory,
            cpus: 2,
            lifetime: ENCLAVE,
            until_exported: false,
        };
        enclave.run().await?.into_result()
    }

    /// What the operator does with the export, as `keyferry keys open` does.
    async fn open(&self) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let output = self.path("app_keys.json");
        let open = keys::Open::of_enclave(
            self.path(EXPORT),
            self.path(IDENTITY),
            self.registers.os_image_hash(),
            Some(self.path("nsm-root.pem")),
            keys::Target { output: Some(output.clone()), force: false, reveal: false, json: false },
        );
        spawn_blocking(move || open.run()).await.map_err(internal)??;
        fs::read(output).map(Zeroizing::new).map_err(internal)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

fn policy(app_id: &AppId, image: &str) -> String {
    format!("[apps.{app_id}]\nimages = [\"{image}\"]\n")
}

fn registers_of(registers: &Registers) -> [(&'static str, String); 3] {
    [("pcr0", registers.pcr0), ("pcr1", registers.pcr1), ("pcr2", registers.pcr2)]
        .map(|(name, pcr)| (name, pcr.to_string()))
}

async fn build(project: PathBuf) -> Result<Registers, Failure> {
    let built = spawn_blocking(move || {
        let recipe = Project::read(&project)?.build(None)?.prepare(&eif_builder::registry::pull)?.recipe;
        Ok::<_, eif_builder::Error>(recipe.write(&project.join(IMAGE))?.registers)
    });
    built.await.map_err(internal)?.map_err(internal)
}
