//! What goes onto the configuration volume.

use std::path::Path;

use serde::Serialize;
use zeroize::Zeroizing;

use super::compose::AppCompose;
use super::{
    App, Environment, KeyProvider, OsImage, Project, Services, USER_CONFIG_FILE, kms_template, python_json,
};
use crate::{Error, durable};

/// Directory of the generated files in a project.
pub const SHARED_DIRECTORY: &str = "shared";

const APP_COMPOSE: &str = "app-compose.json";
const SYS_CONFIG: &str = ".sys-config.json";
const INSTANCE_INFO: &str = ".instance_info";
const ENCRYPTED_ENV: &str = ".encrypted-env";

/// Sizes the guests of the 0.6.0 generation accept; later ones accept more. Past one of them the machine restarts for
/// ever. Source: `dstack-util/src/host_shared.rs`.
const LIMITS: [(&str, u64); 5] = [
    (APP_COMPOSE, 256 << 10),
    (SYS_CONFIG, 32 << 10),
    (INSTANCE_INFO, 10 << 10),
    (ENCRYPTED_ENV, 256 << 10),
    (USER_CONFIG_FILE, 1 << 20),
];

#[derive(Serialize)]
struct SysConfig<'a> {
    kms_urls: &'a [String],
    gateway_urls: &'a [String],
    pccs_url: &'a str,
    vm_config: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    nvidia_attestation_proxy_url: Option<&'a str>,
}

#[derive(Serialize)]
struct InstanceInfo<'a> {
    instance_id_seed: &'a str,
    app_id: &'a str,
}

/// The files of the configuration volume.
pub struct SharedFiles {
    compose: AppCompose,
    sys_config: Vec<u8>,
    instance_info: Vec<u8>,
    encrypted_env: Option<Vec<u8>>,
    /// May hold secrets: it reaches the guest outside every measurement.
    user_config: Option<Zeroizing<Vec<u8>>>,
}

impl SharedFiles {
    /// The files by their names on the volume.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &[u8])> {
        let always = [
            (APP_COMPOSE, Some(self.compose.as_bytes())),
            (SYS_CONFIG, Some(self.sys_config.as_slice())),
            (INSTANCE_INFO, Some(self.instance_info.as_slice())),
            (ENCRYPTED_ENV, self.encrypted_env.as_deref()),
            (USER_CONFIG_FILE, self.user_config.as_deref().map(Vec::as_slice)),
        ];
        always.into_iter().filter_map(|(name, bytes)| bytes.map(|bytes| (name, bytes)))
    }

    /// The measured part.
    #[must_use]
    pub fn compose(&self) -> &AppCompose {
        &self.compose
    }
}

impl Project {
    /// The variables of the environment file, if the project has one.
    ///
    /// # Errors
    ///
    /// [`Error::EnvironmentWithoutKms`] when the file is there and no KMS holds the key it would be encrypted to.
    pub fn environment(&self, app: &App) -> Result<Option<Environment>, Error> {
        let path = self.directory.join(&app.env_file);
        if app.env_file.is_empty() || !path.exists() {
            return Ok(None);
        }
        if app.key_provider != KeyProvider::Kms {
            return Err(Error::EnvironmentWithoutKms { path, provider: app.key_provider.name().to_owned() });
        }
        let text = Zeroizing::new(self.text(&app.env_file)?);
        Ok(Some(Environment::parse(&text)))
    }

    /// The compose of this project: the file it names, or a generated one.
    ///
    /// # Errors
    ///
    /// When a file it needs cannot be read.
    pub fn compose(&self, app: &App, environment: Option<&Environment>) -> Result<AppCompose, Error> {
        if !app.app_compose_file.is_empty() {
            let path = self.directory.join(&app.app_compose_file);
            return std::fs::read(&path).map(AppCompose::verbatim).map_err(Error::file("read", &path));
        }
        let (compose, script) = (self.text(&app.docker_compose_file)?, self.text(&app.prelaunch_script)?);
        let names = environment.into_iter().flat_map(Environment::names);
        AppCompose::generate(app, &compose, &script, names)
            .map_err(|source| Error::Json { path: self.directory.join(APP_COMPOSE), source })
    }

    /// Makes the files of the configuration volume, checks them against the guest's limits, and writes the generated
    /// ones below `shared/`. `encrypted_env` is the encrypted environment, when there is one.
    ///
    /// # Errors
    ///
    /// A setting or file that would keep the guest from starting.
    pub fn prepare(
        &self,
        app: &App,
        services: &Services,
        image: &OsImage,
        encrypted_env: Option<Vec<u8>>,
    ) -> Result<SharedFiles, Error> {
        check_id("instance_id_seed", &app.instance_id_seed)?;
        check_id("app_id", &app.app_id)?;
        let environment = self.environment(app)?;
        let shared = self.directory.join(SHARED_DIRECTORY);
        let json = |name: &str, bytes: Result<Vec<u8>, serde_json::Error>| {
            bytes.map_err(|source| Error::Json { path: shared.join(name), source })
        };
        let user_config = self.directory.join(USER_CONFIG_FILE);
        let user_config = match std::fs::read(&user_config) {
            Ok(bytes) => Some(Zeroizing::new(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::file("read", &user_config)(error)),
        };
        self.check_user_config(app, user_config.as_ref().map(|bytes| bytes.as_slice()))?;
        let instance_info = InstanceInfo { instance_id_seed: &app.instance_id_seed, app_id: &app.app_id };
        let files = SharedFiles {
            compose: self.compose(app, environment.as_ref())?,
            sys_config: json(SYS_CONFIG, python_json::indented(&sys_config(app, services, image)?))?,
            instance_info: json(INSTANCE_INFO, python_json::indented(&instance_info))?,
            encrypted_env,
            user_config,
        };
        for (name, bytes) in files.files() {
            let limit = LIMITS.iter().find(|(known, _)| *known == name).map_or(0, |(_, limit)| *limit);
            let actual = bytes.len() as u64;
            if actual > limit {
                return Err(Error::TooLarge { name, actual, limit });
            }
        }
        write(&shared, &files)?;
        Ok(files)
    }
}

impl Project {
    /// What the script takes from the unmeasured configuration must be there: without it a container of the guest does
    /// not start, and the console does not say why.
    fn check_user_config(&self, app: &App, bytes: Option<&[u8]>) -> Result<(), Error> {
        let script = self.text(&app.prelaunch_script)?;
        let names = kms_template::user_config_names(&script);
        if names.is_empty() {
            return Ok(());
        }
        let setting = USER_CONFIG_FILE;
        // What is wrong with the text is not repeated: it may hold secrets.
        let object = bytes.and_then(|it| serde_json::from_slice::<serde_json::Map<_, _>>(it).ok());
        let object = object.ok_or(Error::Setting { setting, problem: "is no JSON object".into() })?;
        let is_there = |name: &str| {
            object.get(name).and_then(serde_json::Value::as_str).is_some_and(|value| !value.is_empty())
        };
        match names.iter().find(|name| !is_there(name)) {
            None => Ok(()),
            Some(name) => Err(Error::Setting {
                setting,
                problem: format!(
                    "{name} is missing or empty, and {} takes it from there",
                    app.prelaunch_script
                ),
            }),
        }
    }
}

/// Writes the generated files; an encrypted environment that is not part of this deployment is removed.
fn write(shared: &Path, files: &SharedFiles) -> Result<(), Error> {
    std::fs::create_dir_all(shared).map_err(Error::file("create", shared))?;
    for (name, bytes) in files.files().filter(|(name, _)| *name != USER_CONFIG_FILE) {
        durable::replace(&shared.join(name), bytes, 0o644)?;
    }
    let stale = shared.join(ENCRYPTED_ENV);
    if files.encrypted_env.is_none() && stale.exists() {
        std::fs::remove_file(&stale).map_err(Error::file("remove", &stale))?;
    }
    Ok(())
}

/// dstack-cloud fills in its vendor's lab services where none are named. A guest that needs a service must be told
/// which; one that does not gets none.
fn sys_config<'a>(app: &App, services: &'a Services, image: &OsImage) -> Result<SysConfig<'a>, Error> {
    let needed = |setting, used: bool, urls: &'a [String]| match (used, urls) {
        (false, _) => Ok(&[][..]),
        (true, []) => Err(Error::Setting { setting, problem: "is empty in the global settings".into() }),
        (true, urls) => Ok(urls),
    };
    let vm_config = image.vm_config();
    Ok(SysConfig {
        kms_urls: needed("services.kms_urls", app.key_provider == KeyProvider::Kms, &services.kms_urls)?,
        gateway_urls: needed("services.gateway_urls", app.gateway_enabled, &services.gateway_urls)?,
        pccs_url: &services.pccs_url,
        vm_config: vm_config.map_err(|source| Error::Json { path: SYS_CONFIG.into(), source })?,
        nvidia_attestation_proxy_url: services.nvidia_attestation_proxy_url.as_deref(),
    })
}

fn check_id(setting: &'static str, value: &str) -> Result<(), Error> {
    match value.len() == 40 && value.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        true => Ok(()),
        false => {
            Err(Error::Setting { setting, problem: format!("is {value:?}, expected 40 hex characters") })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files as the `prepare` of dstack-cloud wrote them, for its own image generation and for the one before. Fix the code,
    /// not the vectors: projects go to and fro between the two programs.
    #[test]
    fn the_files_are_those_of_dstack_cloud() {
        const OLD: &str = r#"{
  "kms_urls": [
    "https://kms.example.com:12001"
  ],
  "gateway_urls": [
    "https://gw.example.com:12002"
  ],
  "pccs_url": "",
  "vm_config": "{\"spec_version\": 2, \"os_image_hash\": \"abababababababababababababababababababababababababababababababab\"}"
}"#;
        const NEW: &str = r#"{
  "kms_urls": [
    "https://kms.example.com:12001"
  ],
  "gateway_urls": [
    "https://gw.example.com:12002"
  ],
  "pccs_url": "",
  "vm_config": "{\"spec_version\": 2, \"os_image_hash\": \"a8e25d91feac6b378a543df762d9c0937ca7ed3aced22d43655b8ce374565f7c\", \"gcp_measurement\": {\"checksum_file\": \"ODAxOThhNmE0NTIyZWFmZDEwOTdkMWY2MjYzZmZhNDA2NzU2NzJlZWQ4ZDBjOWNhMWYyZDI1Njg2NmFiMjg4ZSAgbWVhc3VyZW1lbnQuZ2NwLmNib3IK\", \"measurement\": \"Y2Jvcgo=\"}}"
}"#;
        const INSTANCE: &str = r#"{
  "instance_id_seed": "4548efb60f4d63f6e5663e662459231012393b17",
  "app_id": "dcd9c3ddfbe0b8d3a2e02f220b1df0d5bf0b65be"
}"#;
        let directory = tempfile::tempdir().unwrap();
        let image = |name: &str, files: &[(&str, &str)]| {
            let image = directory.path().join(name);
            std::fs::create_dir(&image).unwrap();
            for (file, text) in [("disk.raw", "")].iter().chain(files) {
                std::fs::write(image.join(file), text).unwrap();
            }
            OsImage::find(name, &[directory.path().to_owned()]).unwrap()
        };
        let services = Services {
            kms_urls: vec!["https://kms.example.com:12001".into()],
            gateway_urls: vec!["https://gw.example.com:12002".into()],
            ..Services::default()
        };
        let app = App {
            name: "kms".into(),
            instance_id_seed: "4548efb60f4d63f6e5663e662459231012393b17".into(),
            app_id: "dcd9c3ddfbe0b8d3a2e02f220b1df0d5bf0b65be".into(),
            ..App::default()
        };
        let project = Project::create(&directory.path().join("kms"), &app, "", "", "{}").unwrap();
        let checksums =
            "80198a6a4522eafd1097d1f6263ffa40675672eed8d0c9ca1f2d256866ab288e  measurement.gcp.cbor\n";
        let new = [
            ("digest.txt", "a8e25d91feac6b378a543df762d9c0937ca7ed3aced22d43655b8ce374565f7c"),
            ("sha256sum.txt", checksums),
            ("measurement.gcp.cbor", "cbor\n"),
        ];
        for (image, expected) in
            [(image("old", &[("auth_hash.txt", &"ab".repeat(32))]), OLD), (image("new", &new), NEW)]
        {
            let files = project.prepare(&app, &services, &image, None).unwrap();
            let text = |name: &str| {
                let (_, bytes) = files.files().find(|(known, _)| *known == name).unwrap();
                String::from_utf8(bytes.to_vec()).unwrap()
            };
            assert_eq!(text(SYS_CONFIG), expected);
            assert_eq!(text(INSTANCE_INFO), INSTANCE);
        }
    }
}
