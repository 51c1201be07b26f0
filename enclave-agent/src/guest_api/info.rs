//! `Info` and `Version`.

use std::collections::BTreeMap;

use kms_protocol::app_keys::KeyProvider;
use kms_protocol::nitro::DeviceIdRule;
use kms_protocol::wire::guest::{AppInfo, WorkerVersion};
use serde::Serialize;

use super::GuestApi;
use super::events::Entry;

/// Registers by index, as hex.
pub(super) type Pcrs = BTreeMap<u8, String>;

/// The measurements as the SDKs know them. Those of TDX are empty texts: the SDKs want them to be there.
#[derive(Serialize)]
struct TcbInfo<'a> {
    mrtd: &'a str,
    rtmr0: &'a str,
    rtmr1: &'a str,
    rtmr2: &'a str,
    rtmr3: &'a str,
    mr_aggregated: &'a str,
    os_image_hash: &'a str,
    compose_hash: &'a str,
    device_id: &'a str,
    event_log: &'a [Entry],
    app_compose: &'a str,
    /// What a Nitro Enclave has instead.
    pcrs: &'a Pcrs,
}

/// Who gave the keys, as upstream's agent writes it.
#[derive(Serialize)]
struct Provider {
    name: &'static str,
    /// SubjectPublicKeyInfo of the KMS's root CA, hex.
    id: String,
}

impl GuestApi {
    pub(super) async fn info(&self) -> AppInfo {
        let keys = self.keys.current();
        let image = keys.os_image_hash().to_vec();
        let image_hex = hex::encode(&image);
        let device_id = DeviceIdRule::Upstream.device_id(&self.module_id);
        let provider = match &keys.app_keys().key_provider {
            KeyProvider::Kms { pubkey, .. } => {
                let provider = Provider { name: "kms", id: hex::encode(pubkey) };
                serde_json::to_string(&provider).unwrap_or_default()
            }
            KeyProvider::None { .. } | KeyProvider::Local { .. } | KeyProvider::Tpm { .. } => String::new(),
        };
        let log = self.events.lock().await;
        let tcb_info = TcbInfo {
            mrtd: "",
            rtmr0: "",
            rtmr1: "",
            rtmr2: "",
            rtmr3: "",
            mr_aggregated: &image_hex,
            os_image_hash: &image_hex,
            compose_hash: &image_hex,
            device_id: &hex::encode(device_id),
            event_log: log.entries(),
            app_compose: "",
            pcrs: &self.pcrs,
        };
        AppInfo {
            app_id: keys.app_id().as_bytes().to_vec(),
            device_id: device_id.to_vec(),
            mr_aggregated: image.clone(),
            os_image_hash: image.clone(),
            compose_hash: image,
            key_provider_info: provider,
            tcb_info: serde_json::to_string(&tcb_info).unwrap_or_default(),
            vm_config: self.vm_config(),
            ..AppInfo::default()
        }
    }

    /// The configuration inside this enclave's attestations.
    pub(super) fn vm_config(&self) -> String {
        format!("{{\"os_image_hash\":\"{}\"}}", hex::encode(self.keys.current().os_image_hash()))
    }
}

pub(super) fn version() -> WorkerVersion {
    WorkerVersion { version: env!("CARGO_PKG_VERSION").to_owned(), rev: "keyferry".to_owned() }
}
