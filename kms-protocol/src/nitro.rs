//! What an authoriser is told about a Nitro Enclave (kms-protocol §6.3), computed from verified values.

use sha2::{Digest, Sha256};

use crate::attestation_encoding::Attestation;
use crate::wire::webhook::{BootInfo, TEE_VARIANT_NITRO};

/// How the device id is taken from the NSM's module id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceIdRule {
    /// Upstream's: the text before the first `-`. A module id starts with the instance id, `i-…`, so the text is
    /// always `i` and every enclave has the same device id. Allow-lists on chain hold that one.
    #[default]
    Upstream,
    /// The EC2 instance id in full: the text before `-enc`. Tells instances apart.
    InstanceId,
}

impl DeviceIdRule {
    /// The raw device id in a module id such as `i-0abc-enc0def`.
    #[must_use]
    pub fn raw(self, module_id: &str) -> &str {
        let end = match self {
            Self::Upstream => module_id.find('-'),
            Self::InstanceId => module_id.find("-enc"),
        };
        &module_id[..end.unwrap_or(module_id.len())]
    }

    /// The device id: SHA-256 of the raw one.
    #[must_use]
    pub fn device_id(self, module_id: &str) -> [u8; 32] {
        Sha256::digest(self.raw(module_id)).into()
    }
}

/// The boot info of an enclave.
///
/// `measured_image_hash` is SHA-256 over PCR0, PCR1 and PCR2 of the verified document. Upstream copies `osImageHash`
/// and `composeHash` from the unsigned configuration and compares them later, or never (§12.2, 11); here all four
/// hashes are the measured one, which is what honest configurations say.
#[must_use]
pub fn boot_info(
    measured_image_hash: &[u8; 32],
    module_id: &str,
    rule: DeviceIdRule,
    attestation: &Attestation,
) -> BootInfo {
    let hash = measured_image_hash.to_vec();
    BootInfo {
        tee_variant: TEE_VARIANT_NITRO.to_owned(),
        mr_aggregated: hash.clone(),
        os_image_hash: hash.clone(),
        mr_system: hash.clone(),
        app_id: attestation.app_id().to_vec(),
        compose_hash: hash,
        instance_id: attestation.instance_id().to_vec(),
        device_id: rule.device_id(module_id).to_vec(),
        key_provider_info: attestation.key_provider().to_vec(),
        tcb_status: String::new(),
        advisory_ids: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AppId;
    use crate::wire::webhook::BootInfoKeys;

    const MODULE_ID: &str = "i-0827e799ec9232d44-enc019b5640fdf630d6";

    /// Frozen (§6.3): fix the code, not the vector. The constant is upstream's bug, and contracts list it.
    #[test]
    fn the_device_id_is_upstreams_constant() {
        let constant = "de7d1b721a1e0632b7cf04edf5032c8ecffa9f9a08492152b926f1a5a7e765d7";
        assert_eq!(hex::encode(DeviceIdRule::Upstream.device_id(MODULE_ID)), constant);
        assert_eq!(hex::encode(DeviceIdRule::Upstream.device_id("i-1-enc2")), constant);
    }

    #[test]
    fn the_other_rule_tells_instances_apart() {
        assert_eq!(DeviceIdRule::InstanceId.raw(MODULE_ID), "i-0827e799ec9232d44");
        assert_eq!(DeviceIdRule::InstanceId.raw("plain"), "plain");
        assert_eq!(DeviceIdRule::Upstream.raw("plain"), "plain");
    }

    /// Frozen (§13.7, captured): fix the code, not the vector.
    #[test]
    fn the_webhook_body_is_frozen() {
        let hash_hex = "7f985dffdbbe255e104a483961a9e2344bf9476bca077727eeb0ad88fbcd3326";
        let hash: [u8; 32] = hex::decode(hash_hex).unwrap().try_into().unwrap();
        let app = AppId::new([0x11; 20]);
        let attestation = Attestation::nitro(vec![], Some(&app), [0; 64], &hash);
        let info = boot_info(&hash, MODULE_ID, DeviceIdRule::Upstream, &attestation);
        let body = |first: &str| {
            format!(
                concat!(
                    r#"{{"{}":"dstack-nitro-enclave","mrAggregated":"{}","osImageHash":"{}","mrSystem":"{}","#,
                    r#""appId":"1111111111111111111111111111111111111111","composeHash":"{}","instanceId":"","#,
                    r#""deviceId":"de7d1b721a1e0632b7cf04edf5032c8ecffa9f9a08492152b926f1a5a7e765d7","#,
                    r#""keyProviderInfo":"","tcbStatus":"","advisoryIds":[]}}"#
                ),
                first, hash_hex, hash_hex, hash_hex, hash_hex
            )
        };
        let json = String::from_utf8(info.to_json(BootInfoKeys::TeeVariant)).unwrap();
        assert_eq!(json, body("teeVariant"));
        assert_eq!(json.len(), 557);
        let json = String::from_utf8(info.to_json(BootInfoKeys::AttestationMode)).unwrap();
        assert_eq!(json, body("attestationMode"));
    }
}
