//! `app-compose.json`: what the guest runs, and what is measured of it.

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::app::{App, KeyProvider};
use super::python_json;

/// The exact bytes of an `app-compose.json`. Their hash is what the guest measures, so they are never written again
/// from a parsed form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppCompose(Vec<u8>);

/// The fields in the order dstack-cloud writes them, which the hash depends on.
#[derive(Serialize)]
struct Fields<'a> {
    manifest_version: u32,
    name: &'a str,
    runner: &'static str,
    docker_compose_file: &'a str,
    gateway_enabled: bool,
    public_logs: bool,
    public_sysinfo: bool,
    public_tcbinfo: bool,
    key_provider_id: &'a str,
    allowed_envs: Vec<&'a str>,
    no_instance_id: bool,
    secure_time: bool,
    key_provider: KeyProvider,
    storage_fs: &'a str,
    pre_launch_script: &'a str,
}

impl AppCompose {
    /// Takes over a compose made elsewhere, byte for byte.
    #[must_use]
    pub fn verbatim(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Generates the compose of `app`. The texts are those of the files it names; `variables` are the names in its
    /// environment file.
    ///
    /// dstack-cloud brings `allowed_envs` into an order that changes from run to run as soon as the environment file
    /// names two variables, and the measurement with it. Here it is the order of `app.json`, then of the file.
    ///
    /// # Errors
    ///
    /// Never for values that came from files; the serialiser's own error otherwise.
    pub fn generate<'a>(
        app: &'a App,
        docker_compose: &'a str,
        pre_launch: &'a str,
        variables: impl Iterator<Item = &'a str>,
    ) -> Result<Self, serde_json::Error> {
        let mut allowed_envs: Vec<&str> = app.allowed_envs.iter().map(String::as_str).collect();
        for name in variables {
            if !allowed_envs.contains(&name) {
                allowed_envs.push(name);
            }
        }
        let fields = Fields {
            manifest_version: 2,
            name: &app.name,
            runner: "docker-compose",
            docker_compose_file: docker_compose,
            gateway_enabled: app.gateway_enabled,
            public_logs: app.public_logs,
            public_sysinfo: app.public_sysinfo,
            public_tcbinfo: app.public_tcbinfo,
            key_provider_id: &app.key_provider_id,
            allowed_envs,
            no_instance_id: app.no_instance_id,
            secure_time: app.secure_time,
            key_provider: app.key_provider,
            storage_fs: &app.storage_fs,
            pre_launch_script: pre_launch,
        };
        python_json::indented(&fields).map(Self)
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The compose hash: SHA-256 of the bytes, measured by the guest and registered on chain.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(&self.0).into()
    }

    /// The id the guest gives an app whose keys come from no KMS: the first 20 bytes of the hash.
    #[must_use]
    pub fn app_id(&self) -> [u8; 20] {
        let mut id = [0; 20];
        id.copy_from_slice(&self.hash()[..20]);
        id
    }
}

/// The id of an instance: the first 20 bytes of `sha256(seed ‖ app id)`, as the guest computes it.
#[must_use]
pub fn instance_id(seed: &[u8; 20], app_id: &[u8; 20]) -> [u8; 20] {
    let mut id = [0; 20];
    id.copy_from_slice(&Sha256::new().chain_update(seed).chain_update(app_id).finalize()[..20]);
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> [u8; 20] {
        hex::decode(text).unwrap().try_into().unwrap()
    }

    /// The project that dstack-cloud's `new kms-prod --key-provider tpm` makes; the hash is of the file its `prepare`
    /// wrote. Fix the code, not the vector: a changed byte is a changed measurement.
    #[test]
    fn the_hash_is_that_of_dstack_cloud() {
        let app = App {
            name: "kms-prod".into(),
            key_provider: KeyProvider::Tpm,
            gateway_enabled: false,
            ..App::default()
        };
        let compose = "services:\n  nginx:\n    image: nginx:alpine\n    ports:\n      - \"80:80\"\n    restart: unless-stopped\n";
        let script = "#!/bin/sh\n# Prelaunch script - runs before starting containers\n";
        let compose = AppCompose::generate(&app, compose, script, std::iter::empty()).unwrap();
        assert_eq!(compose.as_bytes().len(), 556);
        assert_eq!(
            hex::encode(compose.hash()),
            "b28a6fda5c027e43ff399e4f39a94997806c84e47872cc1eae8ae6ab97dcb6f7"
        );
    }

    #[test]
    fn the_instance_id_is_that_of_the_guest() {
        let seed = bytes("c43335857d0aab26137ac556b7cb77b5b0d7e981");
        let app = bytes("03a840e57f44e1c125fa2c94004163877d780c16");
        assert_eq!(hex::encode(instance_id(&seed, &app)), "111bb89ea5ef56746aec139518cdb56ff8d392c7");
    }

    #[test]
    fn names_of_variables_keep_their_first_place() {
        let app = App { allowed_envs: vec!["B".into()], ..App::default() };
        let compose = AppCompose::generate(&app, "", "", ["A", "B", "C"].into_iter()).unwrap();
        let value: serde_json::Value = serde_json::from_slice(compose.as_bytes()).unwrap();
        assert_eq!(value["allowed_envs"], serde_json::json!(["B", "A", "C"]));
    }
}
