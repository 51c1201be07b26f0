//! [`TdxPolicy`]: what the TDX evidence in the KMS's certificate must say, from a file.
//!
//! ```toml
//! # Intel's collateral for the KMS's machine, as PCCS clients fetch it (JSON); relative to this file.
//! collateral = "collateral.json"
//! mrtd = "…96 hex digits…"             # firmware
//! rtmr0 = "…"                          # optional: the machine's shape
//! rtmr1 = "…"                          # kernel
//! rtmr2 = "…"                          # command line, initial ramdisk
//! compose_hash = "…64 hex digits…"     # the app: found in events that replay to RTMR3
//! # rtmr3 = "…"                        # instead of compose_hash: this very instance
//! tcb_statuses = ["UpToDate"]          # what is tolerated; this is the default
//! ```
//!
//! Firmware, kernel, command line and app have to be named: any Confidential VM can put evidence about itself into a
//! certificate, and only what runs in it makes it the KMS. Unknown names are refused.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use attestation::UnixMillis;
use attestation::tdx::{self, Collateral, Measurement, ReportData, TcbStatus, Verifier};
use kms_protocol::attestation_encoding::{Attestation, RuntimeEvent};
use ratls::UnixTime;
use ratls::evidence::{EvidencePolicy, PeerEvidence};
use serde::Deserialize;
use sha2::{Digest, Sha384};

/// Largest policy file read.
const MAX_POLICY_FILE: u64 = 64 * 1024;
/// Event type of a dstack runtime event of version 1 (kms-protocol §6.4).
const EVENT_TYPE: u32 = 0x0800_0001;

/// What the KMS's TDX evidence must say. Made from a file that names everything it has to.
pub struct TdxPolicy {
    verifier: Verifier,
    collateral: Collateral,
    quote: tdx::Policy,
    compose_hash: Option<[u8; 32]>,
}

/// Why a policy file cannot be used; there is no default to fall back to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyFileError {
    /// The file, or the collateral it names, cannot be read.
    #[error("{}: cannot read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file is larger than any policy or collateral.
    #[error("{}: larger than {max} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit.
        max: u64,
    },
    /// The file does not hold a policy.
    #[error("{}: not a KMS policy", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong, with its place.
        source: toml::de::Error,
    },
    /// A value is not what its name asks for.
    #[error("{}: {name}: expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The name.
        name: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// The collateral cannot be read as such.
    #[error("{}", path.display())]
    Collateral {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<tdx::Error>,
    },
}

/// Why evidence does not meet the policy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// Evidence of another platform.
    #[error("evidence is of platform {platform}, expected TDX")]
    Platform {
        /// The platform.
        platform: &'static str,
    },
    /// The quote is not genuine, or does not say what it should.
    #[error("TDX quote")]
    Quote(#[from] tdx::Error),
    /// The events in the evidence are not those that RTMR3 was extended with.
    #[error("the runtime events do not replay to RTMR3")]
    Events,
    /// The app is another one.
    #[error("compose hash is {actual}, policy expects {expected}")]
    ComposeHash {
        /// The policy's, hex.
        expected: String,
        /// The evidence's, hex, shortened.
        actual: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    collateral: Option<PathBuf>,
    mrtd: String,
    rtmr0: Option<String>,
    rtmr1: String,
    rtmr2: String,
    rtmr3: Option<String>,
    compose_hash: Option<String>,
    #[serde(default)]
    tcb_statuses: Vec<String>,
}

impl TdxPolicy {
    /// Reads a policy and the collateral it names. Blocks.
    ///
    /// # Errors
    /// [`PolicyFileError`].
    pub fn from_file(path: &Path) -> Result<Self, PolicyFileError> {
        let text = read_bounded(path, MAX_POLICY_FILE)?;
        let syntax = |source| PolicyFileError::Syntax { path: path.to_owned(), source };
        let text = String::from_utf8_lossy(&text);
        let file: PolicyFile = toml::from_str(&text).map_err(syntax)?;
        let Some(collateral) = &file.collateral else {
            let expected = "the file with Intel's collateral";
            return Err(PolicyFileError::Value { path: path.to_owned(), name: "collateral", expected });
        };
        let collateral_path = path.parent().unwrap_or(Path::new("")).join(collateral);
        let max = u64::try_from(tdx::MAX_COLLATERAL_LEN).unwrap_or(u64::MAX);
        let collateral = Collateral::from_json(&read_bounded(&collateral_path, max)?).map_err(|source| {
            PolicyFileError::Collateral { path: collateral_path, source: Box::new(source) }
        })?;
        Self::new(file, path, collateral, Verifier::new())
    }

    /// A policy whose text does not name its collateral, and the collateral: both are part of a measured
    /// configuration, where there is no other file to read.
    ///
    /// # Errors
    /// [`PolicyFileError`]; in place of a path it names `kms_policy` or `kms_collateral`.
    pub fn from_texts(policy: &str, collateral: &str) -> Result<Self, PolicyFileError> {
        let path = Path::new("kms_policy");
        let file: PolicyFile = toml::from_str(policy)
            .map_err(|source| PolicyFileError::Syntax { path: path.to_owned(), source })?;
        if file.collateral.is_some() {
            let expected = "none beside kms_collateral";
            return Err(PolicyFileError::Value { path: path.to_owned(), name: "collateral", expected });
        }
        let collateral = Collateral::from_json(collateral.as_bytes()).map_err(|source| {
            PolicyFileError::Collateral { path: "kms_collateral".into(), source: Box::new(source) }
        })?;
        Self::new(file, path, collateral, Verifier::new())
    }

    fn new(
        file: PolicyFile,
        path: &Path,
        collateral: Collateral,
        verifier: Verifier,
    ) -> Result<Self, PolicyFileError> {
        let PolicyFile { collateral: _, mrtd, rtmr0, rtmr1, rtmr2, rtmr3, compose_hash, tcb_statuses } = file;
        let value = |name, expected| PolicyFileError::Value { path: path.to_owned(), name, expected };
        let measurement = |name, text: &str| {
            decode_hex(text).map(Measurement).ok_or_else(|| value(name, "96 hex digits, not all zero"))
        };
        let optional =
            |name, text: &Option<String>| text.as_deref().map(|text| measurement(name, text)).transpose();
        if rtmr3.is_none() && compose_hash.is_none() {
            return Err(value(
                "compose_hash",
                "a value, or one for rtmr3: without either any app could be the KMS",
            ));
        }
        let mut quote = tdx::Policy::for_mrtd(measurement("mrtd", &mrtd)?).with_rtmrs([
            optional("rtmr0", &rtmr0)?,
            Some(measurement("rtmr1", &rtmr1)?),
            Some(measurement("rtmr2", &rtmr2)?),
            optional("rtmr3", &rtmr3)?,
        ]);
        for status in &tcb_statuses {
            let status: TcbStatus =
                status.parse().map_err(|_| value("tcb_statuses", "Intel's names, such as UpToDate"))?;
            if status == TcbStatus::Revoked {
                return Err(value("tcb_statuses", "no Revoked: such a platform proves nothing"));
            }
            quote = quote.allow_tcb_status(status);
        }
        let compose_hash = compose_hash
            .map(|text| decode_hex(&text).ok_or_else(|| value("compose_hash", "64 hex digits, not all zero")))
            .transpose()?;
        Ok(Self { verifier, collateral, quote, compose_hash })
    }

    /// Verifies the quote, its binding to `attestation`'s report data, its measurements, and the app.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn check(&self, attestation: &Attestation, now: UnixMillis) -> Result<(), PolicyError> {
        let evidence = attestation
            .platform
            .tdx()
            .ok_or_else(|| PolicyError::Platform { platform: attestation.platform.kind() })?;
        let policy = self.quote.clone().with_report_data(ReportData(attestation.report_data));
        let quote = self.verifier.verify(&evidence.quote, &self.collateral, now)?.appraise(&policy)?;
        let Some(expected) = self.compose_hash else { return Ok(()) };
        if replay(&attestation.runtime_events) != Some(quote.report().rtmrs[3].0) {
            return Err(PolicyError::Events);
        }
        let actual = attestation.compose_hash();
        if actual != expected {
            let actual = hex::encode(actual.get(..32).unwrap_or(actual));
            return Err(PolicyError::ComposeHash { expected: hex::encode(expected), actual });
        }
        Ok(())
    }
}

impl fmt::Debug for TdxPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TdxPolicy").field("quote", &self.quote).finish_non_exhaustive()
    }
}

impl EvidencePolicy for TdxPolicy {
    fn appraise(
        &self,
        evidence: &PeerEvidence,
        now: UnixTime,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.check(evidence.attestation(), UnixMillis::from_secs(now.as_secs()))?)
    }
}

/// The value of RTMR3 after these events (kms-protocol §6.4); `None` when one has a version whose digest is not known
/// here.
fn replay(events: &[RuntimeEvent]) -> Option<[u8; 48]> {
    let mut register = [0; 48];
    for event in events {
        if event.version != 1 {
            return None;
        }
        let digest = Sha384::new()
            .chain_update(EVENT_TYPE.to_le_bytes())
            .chain_update(":")
            .chain_update(&event.event)
            .chain_update(":")
            .chain_update(&event.payload)
            .finalize();
        register = Sha384::new().chain_update(register).chain_update(digest).finalize().into();
    }
    Some(register)
}

/// Hex of exactly `N` bytes; all zero is a register nobody measured into.
fn decode_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text.trim(), &mut bytes).ok()?;
    (bytes != [0; N]).then_some(bytes)
}

fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>, PolicyFileError> {
    let failed = |source| PolicyFileError::Read { path: path.to_owned(), source };
    let mut content = Vec::new();
    let mut file = File::open(path).map_err(failed)?.take(max + 1);
    file.read_to_end(&mut content).map_err(failed)?;
    if u64::try_from(content.len()).is_ok_and(|len| len <= max) {
        return Ok(content);
    }
    Err(PolicyFileError::TooLarge { path: path.to_owned(), max })
}

#[cfg(test)]
mod tests {
    use kms_protocol::attestation_encoding::{PlatformEvidence, Stack, TdxEvidence};

    use super::*;

    /// A genuine quote whose RTMR3 was never extended, so that no events replay to it.
    const QUOTE: &str = "gcp-v4";
    const NOW: UnixMillis = UnixMillis::from_secs(1_782_809_233);
    const MRTD: &str =
        "9bf86e6280ec4282b8b5822d8166410a456cdb720109aa799f0011fa63df1de3ee5e35e293fc410c061433163acb03a6";
    const RTMR1: &str =
        "c89d429d47bf02018b2638504926ff17072db1fbf1c60b1c7b13908e8a3792b3d0e10e407fe93692022144cd1d6e51ad";
    const RTMR2: &str =
        "9caa04c96af83d3c412d45d644e4570ed2530381d8d565452e0cfd2d7b09dfcbef49738f80e3070e23f150be4be5b942";

    /// Published quotes lie beside the project; without them there is nothing to verify.
    fn fixtures() -> Option<PathBuf> {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/fixtures/tdx"));
        if path.is_dir() {
            return Some(path.to_owned());
        }
        println!("skipped: {} is absent", path.display());
        None
    }

    fn evidence(fixtures: &Path) -> Attestation {
        let quote = std::fs::read(fixtures.join(format!("{QUOTE}.quote.bin"))).unwrap();
        Attestation {
            platform: PlatformEvidence::Tdx(TdxEvidence { quote, event_log: Vec::new() }),
            runtime_events: Vec::new(),
            report_data: [0; 64],
            config: String::new(),
            stack: Stack::Dstack,
        }
    }

    /// A policy file with these lines beside the collateral.
    fn policy(fixtures: &Path, lines: &str) -> Result<TdxPolicy, PolicyFileError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kms-policy.toml");
        let collateral = fixtures.join(format!("{QUOTE}.collateral.json"));
        std::fs::write(&path, format!("collateral = {:?}\n{lines}", collateral.display().to_string()))
            .unwrap();
        TdxPolicy::from_file(&path)
    }

    fn lines(mrtd: &str, rest: &str) -> String {
        format!("mrtd = {mrtd:?}\nrtmr1 = {RTMR1:?}\nrtmr2 = {RTMR2:?}\n{rest}")
    }

    fn compose() -> String {
        format!("compose_hash = {:?}", "ab".repeat(32))
    }

    #[test]
    fn a_genuine_quote_of_another_app_is_refused_for_its_app_only() {
        let Some(fixtures) = fixtures() else { return };
        let policy = policy(&fixtures, &lines(MRTD, &compose())).unwrap();
        // All measurements agree, the empty list of events replays to the zero RTMR3: what is missing is the app.
        let error = policy.check(&evidence(&fixtures), NOW).unwrap_err();
        assert!(matches!(&error, PolicyError::ComposeHash { actual, .. } if actual.is_empty()), "{error}");
    }

    #[test]
    fn events_that_rtmr3_does_not_know_are_refused() {
        let Some(fixtures) = fixtures() else { return };
        let policy = policy(&fixtures, &lines(MRTD, &compose())).unwrap();
        let mut evidence = evidence(&fixtures);
        evidence.runtime_events.push(RuntimeEvent::new("compose-hash", vec![0xab; 32]));
        let error = policy.check(&evidence, NOW).unwrap_err();
        assert!(matches!(error, PolicyError::Events), "{error}");
    }

    #[test]
    fn another_measurement_binding_time_or_platform_is_refused() {
        let Some(fixtures) = fixtures() else { return };
        let good = policy(&fixtures, &lines(MRTD, &compose())).unwrap();
        let other = policy(&fixtures, &lines(RTMR1, &compose())).unwrap();
        let error = other.check(&evidence(&fixtures), NOW).unwrap_err();
        assert!(
            matches!(error, PolicyError::Quote(tdx::Error::Measurement { register: "MRTD", .. })),
            "{error}"
        );

        let mut unbound = evidence(&fixtures);
        unbound.report_data = [1; 64];
        let error = good.check(&unbound, NOW).unwrap_err();
        assert!(matches!(error, PolicyError::Quote(tdx::Error::ReportData { .. })), "{error}");

        let later = UnixMillis::from_secs(NOW.as_secs() + 10 * 365 * 86_400);
        let error = good.check(&evidence(&fixtures), later).unwrap_err();
        assert!(matches!(error, PolicyError::Quote(tdx::Error::Unverified { .. })), "{error}");

        let nitro = Attestation::nitro(vec![0], None, [0; 64], &[0; 32]);
        let error = good.check(&nitro, NOW).unwrap_err();
        assert!(matches!(error, PolicyError::Platform { platform: "nitro-enclave" }), "{error}");
    }

    #[test]
    fn a_policy_file_names_everything_and_nothing_unknown() {
        let Some(fixtures) = fixtures() else { return };
        let zero = "0".repeat(96);
        for (lines, expected) in [
            (lines(MRTD, ""), "compose_hash: expected"),
            (lines(&zero, &compose()), "mrtd: expected 96 hex digits"),
            (lines("abc", &compose()), "mrtd: expected 96 hex digits"),
            (lines(MRTD, &format!("{}\nrtmr4 = \"00\"", compose())), "not a KMS policy"),
            (lines(MRTD, &format!("{}\ntcb_statuses = [\"Fine\"]", compose())), "tcb_statuses: expected"),
            (lines(MRTD, &format!("{}\ntcb_statuses = [\"Revoked\"]", compose())), "tcb_statuses: expected"),
            (format!("mrtd = {MRTD:?}\n{}", compose()), "not a KMS policy"),
        ] {
            let error = policy(&fixtures, &lines).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_an_error() {
        let error = TdxPolicy::from_file(Path::new("/nonexistent/policy.toml")).unwrap_err();
        assert!(matches!(error, PolicyFileError::Read { .. }), "{error}");
    }

    /// The rule of the register, computed by hand: SHA-384(zeros ‖ SHA-384(event)).
    #[test]
    fn one_event_extends_the_register_once() {
        assert_eq!(replay(&[]), Some([0; 48]));
        let digest = Sha384::digest(b"\x01\0\0\x08:compose-hash:payload");
        let expected: [u8; 48] = Sha384::digest([&[0; 48][..], &digest].concat()).into();
        assert_eq!(replay(&[RuntimeEvent::new("compose-hash", *b"payload")]), Some(expected));
        let unknown = RuntimeEvent { version: 2, ..RuntimeEvent::new("x", *b"y") };
        assert_eq!(replay(&[unknown]), None);
    }
}
