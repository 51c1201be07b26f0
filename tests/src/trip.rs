//! All the programs of one trip: a module, a KMS, a proxy, and what to say to the agent.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::Daemon;

/// The app of every trip.
pub const APP_ID: &str = "1111111111111111111111111111111111111111";

/// PCR0 to PCR2 of the image that the KMS knows.
pub const IMAGE: [[u8; 48]; 3] = [[0xa0; 48], [0xa1; 48], [0xa2; 48]];

/// Running programs; they end and their directory goes with this value.
#[derive(Debug)]
pub struct Trip {
    /// The emulated module.
    pub module: Daemon,
    /// The KMS.
    pub kms: Daemon,
    /// The way out.
    pub proxy: Daemon,
    directory: TempDir,
}

/// What differs from the trip that succeeds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Variation<'a> {
    /// More arguments of the module.
    pub module: &'a [&'a str],
    /// The proxy opens this target instead of the KMS.
    pub proxy_opens: Option<&'a str>,
    /// More settings of the KMS's table `[core]`, in TOML.
    pub kms: &'a str,
    /// The KMS starts with a copy of these keys.
    pub kms_keys: Option<&'a Path>,
    /// The part of kms.toml about who decides, instead of a policy that allows the image.
    pub authoriser: Option<&'a str>,
}

impl Trip {
    /// Starts everything. `image_hash` (hex) is what the KMS's policy allows.
    ///
    /// # Panics
    /// When a program does not start.
    #[must_use]
    pub fn start(image_hash: &str, variation: Variation<'_>) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| directory.path().join(name);
        let text = |name: &str| path(name).display().to_string();

        let socket = format!("unix:{}", text("nsm.sock"));
        let root = text("nsm-root.pem");
        let mut arguments = vec!["--listen", &socket, "--root-out", &root];
        arguments.extend(variation.module);
        let module = Daemon::start("nsm-emulator", &arguments);

        let root = fs::read_to_string(&root).expect("the module's root");
        let kms = start_kms(directory.path(), &root, image_hash, variation);

        let port = kms.port();
        let rules = match variation.proxy_opens {
            Some(other) => vec![other.to_owned()],
            // A name opens public addresses only; the loopback has to be named as well.
            None => vec![format!("localhost:{port}"), format!("127.0.0.1:{port}")],
        };
        let socket = format!("unix:{}", text("proxy.sock"));
        let mut arguments = vec!["--listen", &socket];
        for rule in &rules {
            arguments.extend(["--allow", rule]);
        }
        let proxy = Daemon::start("host-proxy", &arguments);
        Self { module, kms, proxy, directory }
    }

    /// A path in the trip's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where the KMS keeps its keys and certificates.
    #[must_use]
    pub fn kms_keys(&self) -> PathBuf {
        self.path("certs")
    }

    /// Where the agent is told to put the keys.
    #[must_use]
    pub fn output(&self) -> PathBuf {
        self.path("app_keys.json")
    }

    /// Arguments of `enclave-agent` for the trip that succeeds.
    #[must_use]
    pub fn agent_arguments(&self) -> Vec<String> {
        let output = self.output().display().to_string();
        let mut arguments = vec!["get-keys".to_owned()];
        arguments.extend(self.fetch_arguments());
        arguments.extend(["--output".to_owned(), output, "--json".to_owned()]);
        arguments
    }

    /// Those that say where keys come from, each a flag and its value.
    #[must_use]
    pub fn fetch_arguments(&self) -> Vec<String> {
        let root_ca = self.kms_keys().join("root-ca.crt").display().to_string();
        let url = format!("https://localhost:{}", self.kms.port());
        [
            "--kms-url",
            &url,
            "--app-id",
            APP_ID,
            "--root-ca",
            &root_ca,
            "--nsm",
            self.module.endpoint(),
            "--proxy",
            self.proxy.endpoint(),
        ]
        .map(str::to_owned)
        .to_vec()
    }
}

/// A KMS that trusts a module's root (PEM) and knows one image (its hash in hex); its files are in `directory`, its
/// keys and certificates in `certs` there.
///
/// # Panics
/// When it does not start.
#[must_use]
pub fn start_kms(directory: &Path, module_root: &str, image_hash: &str, variation: Variation<'_>) -> Daemon {
    let path = |name: &str| directory.join(name);
    write(&path("nsm-root.pem"), module_root);
    write(&path("policy.toml"), &format!("[apps.{APP_ID}]\nimages = [\"{image_hash}\"]\n"));
    let policy = format!("type = \"policy\"\n[core.auth_api.policy]\nfile = {:?}\n", path("policy.toml"));
    let settings = kms_settings(directory, variation.kms, variation.authoriser.unwrap_or(&policy));
    if let Some(keys) = variation.kms_keys {
        copy_files(keys, &path("certs"));
    }
    write(&path("kms.toml"), &settings);
    Daemon::start("kms-server", &["serve", "-c", &path("kms.toml").display().to_string()])
}

/// The least that a KMS for an emulated module needs: its keys and the module's root are in `directory`, as `certs` and
/// `nsm-root.pem`; `authoriser` is the section that names one.
#[must_use]
pub fn kms_settings(directory: &Path, more: &str, authoriser: &str) -> String {
    let path = |name: &str| directory.join(name);
    format!(
        "[rpc]\naddress = \"127.0.0.1\"\nport = 0\n\
         [core]\n{more}\ncert_dir = {:?}\nenforce_self_authorization = false\nattest_rpc_cert = false\n\
         nitro_enclave_key_release = true\n\
         [core.onboard]\nauto_bootstrap_domain = \"localhost\"\n\
         [core.attestation]\ninsecure_allow_external_trust_anchors = true\n\
         [core.attestation.root_ca]\naws_nitro_enclave = {:?}\n\
         [core.auth_api]\n{authoriser}",
        path("certs"),
        path("nsm-root.pem"),
    )
}

fn copy_files(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a directory of ours");
    for entry in fs::read_dir(from).expect("a directory of keys") {
        let entry = entry.expect("a directory of keys");
        fs::copy(entry.path(), to.join(entry.file_name())).expect("a file of keys");
    }
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).expect("a file in a directory of ours");
}
