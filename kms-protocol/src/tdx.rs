//! What an authoriser is told about a TDX guest (kms-protocol §6.4), computed from verified values, and the material
//! that ties a Google image to its hash.

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::attestation_encoding::Attestation;
use crate::runtime_events::{self, Moment};
use crate::wire::webhook::BootInfo;

/// Name of the TDX platform in `teeVariant`.
pub const TEE_VARIANT_TDX: &str = "dstack-tdx";
/// Name of the platform of Google's TDX machines in `teeVariant`.
pub const TEE_VARIANT_GCP_TDX: &str = "dstack-gcp-tdx";
/// PCR0 of Google's current firmware; upstream knows this one.
pub const GCP_FIRMWARE_PCR0: [u8; 32] = [
    0x0c, 0xca, 0x9e, 0xc1, 0x61, 0xb0, 0x92, 0x88, 0x80, 0x2e, 0x5a, 0x11, 0x22, 0x55, 0xd2, 0x13, 0x40,
    0xed, 0x5b, 0x79, 0x7f, 0x5f, 0xe2, 0x9c, 0xec, 0xcc, 0xfd, 0x8f, 0x67, 0xb9, 0xf8, 0x02,
];
/// Which event of PCR2 measures the image: Google's firmware logs a separator and the partition table before it.
pub const GCP_IMAGE_EVENT: usize = 2;
/// Name of the measurement in the checksum file.
const GCP_MEASUREMENT: &str = "measurement.gcp.cbor";

/// Registers of a verified TDX quote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TdRegisters {
    /// MRTD.
    pub mrtd: [u8; 48],
    /// RTMR0 to RTMR2; RTMR3 follows from the events.
    pub rtmrs: [[u8; 48]; 3],
    /// MRCONFIGID, MROWNER, MROWNERCONFIG.
    pub owner: [[u8; 48]; 3],
}

/// What the platform says about its TCB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tcb {
    /// Intel's name of the status.
    pub status: String,
    /// Advisories that apply.
    pub advisories: Vec<String>,
    /// The platform's identifier.
    pub ppid: Vec<u8>,
}

/// The boot info of a guest on bare-metal TDX. `os_image_hash` was checked against the registers.
#[must_use]
pub fn tdx_boot_info(
    registers: &TdRegisters,
    tcb: Tcb,
    os_image_hash: &[u8; 32],
    attestation: &Attestation,
    moment: Moment,
) -> BootInfo {
    let TdRegisters { mrtd, rtmrs: [rtmr0, rtmr1, rtmr2], owner } = registers;
    let key_provider = key_provider(attestation, moment);
    let mr_system = Sha256::new()
        .chain_update(mrtd)
        .chain_update(rtmr0)
        .chain_update(rtmr1)
        .chain_update(rtmr2)
        .chain_update(key_provider_hash(key_provider))
        .finalize();
    let mut mr_aggregated = Sha256::new()
        .chain_update(mrtd)
        .chain_update(rtmr0)
        .chain_update(rtmr1)
        .chain_update(rtmr2)
        .chain_update(runtime_events::rtmr3(&attestation.runtime_events, moment));
    if owner.iter().flatten().any(|byte| *byte != 0) {
        owner.iter().for_each(|register| mr_aggregated.update(register));
    }
    let measured = Measured { mr_system: mr_system.into(), mr_aggregated: mr_aggregated.finalize().into() };
    boot_info(TEE_VARIANT_TDX, measured, tcb, os_image_hash, attestation, key_provider)
}

/// The boot info of a guest on Google's TDX machines. `os_image_hash` was checked against the event log.
#[must_use]
pub fn gcp_boot_info(
    pcr0: &[u8; 32],
    pcr2: &[u8; 32],
    tcb: Tcb,
    os_image_hash: &[u8; 32],
    attestation: &Attestation,
    moment: Moment,
) -> BootInfo {
    let key_provider = key_provider(attestation, moment);
    let mr_system =
        Sha256::new().chain_update(os_image_hash).chain_update(key_provider_hash(key_provider)).finalize();
    let mr_aggregated = Sha256::new()
        .chain_update(pcr0)
        .chain_update(pcr2)
        .chain_update(runtime_events::pcr14(&attestation.runtime_events, moment))
        .finalize();
    let measured = Measured { mr_system: mr_system.into(), mr_aggregated: mr_aggregated.into() };
    boot_info(TEE_VARIANT_GCP_TDX, measured, tcb, os_image_hash, attestation, key_provider)
}

struct Measured {
    mr_system: [u8; 32],
    mr_aggregated: [u8; 32],
}

fn boot_info(
    variant: &str,
    measured: Measured,
    tcb: Tcb,
    os_image_hash: &[u8; 32],
    attestation: &Attestation,
    key_provider: &[u8],
) -> BootInfo {
    BootInfo {
        tee_variant: variant.to_owned(),
        mr_aggregated: measured.mr_aggregated.to_vec(),
        os_image_hash: os_image_hash.to_vec(),
        mr_system: measured.mr_system.to_vec(),
        app_id: attestation.app_id().to_vec(),
        compose_hash: attestation.compose_hash().to_vec(),
        instance_id: attestation.instance_id().to_vec(),
        device_id: Sha256::digest(&tcb.ppid).to_vec(),
        key_provider_info: key_provider.to_vec(),
        tcb_status: tcb.status,
        advisory_ids: tcb.advisories,
    }
}

fn key_provider(attestation: &Attestation, moment: Moment) -> &[u8] {
    match moment {
        Moment::Now => attestation.key_provider(),
        Moment::Boot => &[],
    }
}

fn key_provider_hash(key_provider: &[u8]) -> [u8; 32] {
    if key_provider.is_empty() { [0; 32] } else { Sha256::digest(key_provider).into() }
}

/// What ties the measured boot image of a Google machine to the hash of the whole image: the image's list of
/// checksums, whose own hash is the image hash, and the measurement that the list names.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct GcpMeasurement {
    /// `sha256sum.txt`.
    #[serde(with = "base64_bytes")]
    pub checksum_file: Vec<u8>,
    /// `measurement.gcp.cbor`.
    #[serde(with = "base64_bytes")]
    pub measurement: Vec<u8>,
}

/// Why a measurement says nothing about an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MeasurementError {
    /// The list of checksums is another image's.
    #[error("os_image_hash mismatch: expected sha256(sha256sum.txt)={expected}, actual={actual}", expected = hex::encode(.claimed), actual = hex::encode(.computed))]
    ImageHash {
        /// What the configuration says.
        claimed: Vec<u8>,
        /// The hash of the list.
        computed: [u8; 32],
    },
    /// The list does not name the measurement exactly once, with its hash.
    #[error("sha256sum.txt does not list the hash of measurement.gcp.cbor exactly once")]
    NotListed,
    /// The measurement is not `{"version": 1, "uki_auth": 32 bytes}` in CBOR.
    #[error("measurement.gcp.cbor is not readable")]
    Cbor,
}

impl GcpMeasurement {
    /// The Authenticode digest of the boot image, which the firmware measures, for the image of that hash.
    ///
    /// # Errors
    /// [`MeasurementError`].
    pub fn boot_image_digest(&self, os_image_hash: &[u8]) -> Result<[u8; 32], MeasurementError> {
        let computed: [u8; 32] = Sha256::digest(&self.checksum_file).into();
        if computed != os_image_hash {
            // Somebody else's bytes: enough of them to see what went wrong.
            let claimed = os_image_hash.iter().copied().take(64).collect();
            return Err(MeasurementError::ImageHash { claimed, computed });
        }
        let listed = listed_hash(&self.checksum_file).ok_or(MeasurementError::NotListed)?;
        if listed != <[u8; 32]>::from(Sha256::digest(&self.measurement)) {
            return Err(MeasurementError::NotListed);
        }
        uki_digest(&self.measurement).ok_or(MeasurementError::Cbor)
    }
}

fn listed_hash(checksum_file: &[u8]) -> Option<[u8; 32]> {
    let text = std::str::from_utf8(checksum_file).ok()?;
    let mut entries = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let hash = words.next()?;
        (words.next()? == GCP_MEASUREMENT).then_some(hash)
    });
    let hash = entries.next()?;
    if entries.next().is_some() {
        return None;
    }
    let mut bytes = [0; 32];
    hex::decode_to_slice(hash, &mut bytes).ok()?;
    Some(bytes)
}

/// Reads `{"version": 1, "uki_auth": h'32 bytes'}`, in either order. The document is a constant form of about 60 bytes, so
/// it is compared with the two ways to write it.
fn uki_digest(cbor: &[u8]) -> Option<[u8; 32]> {
    const VERSION: &[u8] = b"\x67version\x01";
    const UKI: &[u8] = b"\x68uki_auth\x58\x20";
    let body = cbor.strip_prefix(b"\xa2")?;
    let digest = match body.strip_prefix(VERSION) {
        Some(rest) => rest.strip_prefix(UKI)?,
        None => body.strip_prefix(UKI)?.strip_suffix(VERSION)?,
    };
    digest.try_into().ok()
}

/// Base64 as upstream writes it in JSON.
mod base64_bytes {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, de::Error as _};

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        STANDARD.decode(text.as_bytes()).map_err(|_| D::Error::custom("not base64"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attestation_encoding::{PlatformEvidence, RuntimeEvent, Stack, TdxEvidence};

    fn attestation() -> Attestation {
        Attestation {
            platform: PlatformEvidence::Tdx(TdxEvidence::default()),
            runtime_events: vec![
                RuntimeEvent::new("app-id", [0x11; 20]),
                RuntimeEvent::new("compose-hash", [0x22; 32]),
                RuntimeEvent::new("key-provider", b"{}".as_slice()),
                RuntimeEvent::new("boot-mr-done", []),
                RuntimeEvent::new("system-ready", []),
            ],
            report_data: [0; 64],
            config: String::new(),
            stack: Stack::Dstack,
        }
    }

    fn tcb() -> Tcb {
        Tcb { status: "UpToDate".into(), advisories: vec!["INTEL-SA-1".into()], ppid: vec![7; 16] }
    }

    fn registers() -> TdRegisters {
        TdRegisters { mrtd: [1; 48], rtmrs: [[2; 48], [3; 48], [4; 48]], owner: [[0; 48]; 3] }
    }

    /// Computed with another implementation of the formulas; fix the code, not the vectors.
    #[test]
    fn boot_infos_are_frozen() {
        let attestation = attestation();
        let info = tdx_boot_info(&registers(), tcb(), &[9; 32], &attestation, Moment::Now);
        assert_eq!(
            hex::encode(&info.mr_system),
            "7c0456711236f3fe838aebe212e2ada6ea8f110d5f1ef57aaab6e693f80f6ebe"
        );
        assert_eq!(
            hex::encode(&info.mr_aggregated),
            "21ad8cd26d80084551f22621016871864903978388c6ad79d391845960bdeeb3"
        );
        assert_eq!(info.compose_hash, [0x22; 32]);
        let boot = tdx_boot_info(&registers(), tcb(), &[9; 32], &attestation, Moment::Boot);
        assert_eq!(
            hex::encode(&boot.mr_system),
            "277dd3f55ca5f00d78b6df04104ca9e04ad17b871128e38808abc9f6b86faf31"
        );
        assert_eq!(
            hex::encode(&boot.mr_aggregated),
            "214f4ae8154a082b512ccc948284e4458d3b20ec4f54ff82a5738ffa7f757f35"
        );
        assert!(boot.key_provider_info.is_empty());
        let owned = TdRegisters { owner: [[0; 48], [5; 48], [0; 48]], ..registers() };
        let owned = tdx_boot_info(&owned, tcb(), &[9; 32], &attestation, Moment::Now);
        assert_eq!(
            hex::encode(&owned.mr_aggregated),
            "7b47c8cce0c075fba20704b59d7a4b5a6af98e3f20bfb191e9ce8abc59f87e2b"
        );
        let info = gcp_boot_info(&[1; 32], &[2; 32], tcb(), &[9; 32], &attestation, Moment::Now);
        assert_eq!(
            hex::encode(&info.mr_system),
            "4f769c13f80745d45159f35f7ecadbd417603ddc7aa0186a5d5f62f0e3d19a31"
        );
        assert_eq!(
            hex::encode(&info.mr_aggregated),
            "78e50dbc8c51efc62228dc9892f093c97fd53e1e9da8d20258361ece2633618b"
        );
    }

    fn measurement() -> (GcpMeasurement, [u8; 32]) {
        let cbor = [b"\xa2\x67version\x01\x68uki_auth\x58\x20".as_slice(), &[0xab; 32]].concat();
        let list = format!(
            "{}  other\n{}  measurement.gcp.cbor\n",
            "00".repeat(32),
            hex::encode(Sha256::digest(&cbor))
        );
        let hash = Sha256::digest(&list).into();
        (GcpMeasurement { checksum_file: list.into_bytes(), measurement: cbor }, hash)
    }

    #[test]
    fn a_measurement_leads_to_the_boot_image() {
        let (measurement, hash) = measurement();
        assert_eq!(measurement.boot_image_digest(&hash), Ok([0xab; 32]));
    }

    #[test]
    fn measurements_of_other_images_are_refused() {
        let (good, hash) = measurement();
        let error = good.boot_image_digest(&[0; 32]).unwrap_err();
        assert!(matches!(error, MeasurementError::ImageHash { .. }), "{error}");
        let mut other = good.clone();
        other.measurement[40] ^= 1;
        assert_eq!(other.boot_image_digest(&hash), Err(MeasurementError::NotListed));
        let twice = [good.checksum_file.as_slice(), &good.checksum_file].concat();
        let twice = GcpMeasurement { checksum_file: twice, measurement: good.measurement.clone() };
        let hash = Sha256::digest(&twice.checksum_file);
        assert_eq!(twice.boot_image_digest(&hash), Err(MeasurementError::NotListed));
        for (name, cbor) in [
            (
                "another version",
                good.measurement.iter().map(|byte| if *byte == 1 { 2 } else { *byte }).collect(),
            ),
            ("a cut one", good.measurement[..good.measurement.len() - 1].to_vec()),
            ("bytes after it", [good.measurement.as_slice(), &[0]].concat()),
        ] {
            assert_eq!(uki_digest(&cbor), None, "{name}");
        }
    }
}
