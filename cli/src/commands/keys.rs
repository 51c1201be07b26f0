//! `keyferry keys`: opens what an enclave exported.
//!
//! A sealed export says by its evidence who wrote it; anybody can encrypt to a recipient. So opening needs the image
//! that is expected, or a `danger` option.

use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};

use ::attestation::{AttestationDocument, OsImageHash, Policy, UnixMillis, Verifier};
use age::x25519::Identity;
use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use clap::{Args, Subcommand};
use command_line::{Exit, Failure};
use enclave_agent::delivery::{EVIDENCE_STANZA, EXPORT_TAG};
use enclave_agent::output::{Existing, KeyFile};
use kms_protocol::app_keys::AppKeys;
use kms_protocol::report_data;
use serde::Serialize;
use zeroize::Zeroizing;

use super::attestation::{anchor, read_bounded, rfc3339};

/// Largest export read; one with 100 recipients has about 30 kB.
const MAX_EXPORT: usize = 1024 * 1024;
/// Largest identity file.
const MAX_IDENTITY: usize = 64 * 1024;
/// Characters in a full line of a stanza's body.
const COLUMNS: usize = 64;

/// Keys that an enclave exported.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Open a sealed export: check who wrote it, decrypt it, write app_keys.json.
    #[command(after_help = "Examples:
  age-keygen -o operator.txt        # the recipient it prints goes into the image's project
  keyferry keys open received.age --identity operator.txt --image <OS_IMAGE_HASH> -o app_keys.json")]
    Open(Open),
}

/// Arguments of `keyferry keys open`.
#[derive(Args, Debug)]
pub(crate) struct Open {
    /// The export, as the receiver stored it; - is standard input.
    #[arg(value_name = "FILE")]
    export: PathBuf,
    /// File with the age identity (AGE-SECRET-KEY-1…), as age-keygen writes it; - is standard input.
    #[arg(short, long, value_name = "FILE")]
    identity: PathBuf,
    /// OS_IMAGE_HASH of the image whose export this must be; repeat it for several.
    #[arg(long = "image", value_name = "HEX", required_unless_present = "danger_accept_any_writer")]
    images: Vec<ImageHash>,
    /// Trust the root certificate in this file (PEM) instead of AWS Nitro Enclaves Root CA G1.
    #[arg(long, value_name = "PEM")]
    root: Option<PathBuf>,
    /// Opens it whoever wrote it, who may know the keys.
    #[arg(long, conflicts_with_all = ["images", "root"])]
    danger_accept_any_writer: bool,
    /// New file for the keys, mode 0600; without it they go to standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replaces the output file if there is one.
    #[arg(long, requires = "output")]
    force: bool,
    /// Shows the keys even on a terminal.
    #[arg(long, conflicts_with = "output")]
    reveal: bool,
    /// Prints a summary without secrets as JSON to standard output.
    #[arg(long, requires = "output")]
    json: bool,
}

/// 64 hex digits, `0x` allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ImageHash(OsImageHash);

impl std::str::FromStr for ImageHash {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut hash = [0; OsImageHash::LEN];
        hex::decode_to_slice(text.strip_prefix("0x").unwrap_or(text), &mut hash)
            .map_err(|_| "expected 64 hex digits")?;
        Ok(Self(OsImageHash::new(hash)))
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    output: &'a Path,
    /// Who wrote the export; absent when that was not to be checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    writer: Option<Writer>,
    k256_public_key: String,
}

/// The enclave that wrote an export.
#[derive(Serialize)]
struct Writer {
    os_image_hash: String,
    module_id: String,
    exported_at: String,
}

/// Runs the command.
pub(crate) fn run(command: Command) -> Result<Exit, Failure> {
    let Command::Open(open) = command;
    enclave_agent::forbid_core_dumps().map_err(|error| Failure::new(Exit::Internal, error))?;
    open.run()
}

/// Where opened keys go.
pub(super) struct Target {
    /// New file; otherwise standard output.
    pub(super) output: Option<PathBuf>,
    /// Replaces the file.
    pub(super) force: bool,
    /// Shows the keys even on a terminal.
    pub(super) reveal: bool,
    /// Prints a summary.
    pub(super) json: bool,
}

impl Open {
    /// An export of an enclave that was started for it, whose module signs under `root`, or AWS's where none is given.
    pub(super) fn of_enclave(
        export: PathBuf,
        identity: PathBuf,
        image: OsImageHash,
        root: Option<PathBuf>,
        target: Target,
    ) -> Self {
        let Target { output, force, reveal, json } = target;
        let images = vec![ImageHash(image)];
        Self { export, identity, images, root, danger_accept_any_writer: false, output, force, reveal, json }
    }

    /// Whether the keys go into a file.
    pub(super) fn is_kept(&self) -> bool {
        self.output.is_some()
    }

    /// Whether there will be something to open the export with and, unless that is not asked for, a place for the keys.
    pub(super) fn check(&self, without_keys: bool) -> Result<(), Failure> {
        identities(&self.identity)?;
        if without_keys { Ok(()) } else { self.target().map(drop) }
    }

    /// The document that came with the export, after all the checks of [`Self::run`]; the keys are not kept.
    pub(super) fn evidence(&self) -> Result<Vec<u8>, Failure> {
        let export = read("export", &self.export, MAX_EXPORT)?;
        let plaintext = decrypt(&export, &identities(&self.identity)?)?;
        self.writer(&export, &plaintext)?;
        evidence(&export).ok_or_else(|| refused("the export carries no evidence of who wrote it".to_owned()))
    }

    pub(super) fn run(self) -> Result<Exit, Failure> {
        let target = self.target()?;
        if self.export == Path::new("-") && self.identity == Path::new("-") {
            return Err(Failure::new(Exit::Usage, "both the export and the identity are standard input"));
        }
        let identities = identities(&self.identity)?;
        let export = read("export", &self.export, MAX_EXPORT)?;
        let plaintext = decrypt(&export, &identities)?;
        let writer =
            if self.danger_accept_any_writer { None } else { Some(self.writer(&export, &plaintext)?) };
        let keys = AppKeys::from_json(&plaintext)
            .map_err(|error| refused(format!("the export holds no app keys: {error}")))?;
        let Some(file) = target else {
            let text =
                std::str::from_utf8(&plaintext).map_err(|error| Failure::new(Exit::Internal, error))?;
            command_line::print_line(text);
            return Ok(Exit::Done);
        };
        file.write(&plaintext)?;
        if self.json {
            let k256_public_key = keys.k256_key.public_key().map(|key| key.to_string()).unwrap_or_default();
            let report = Report { version: 1, output: file.path(), writer, k256_public_key };
            let text = serde_json::to_string_pretty(&report);
            command_line::print_line(&text.map_err(|error| Failure::new(Exit::Internal, error))?);
        }
        Ok(Exit::Done)
    }

    /// Where the keys go, decided before they are decrypted; `None` is standard output.
    fn target(&self) -> Result<Option<KeyFile>, Failure> {
        let Some(path) = &self.output else {
            if io::stdout().is_terminal() && !self.reveal {
                let failure =
                    Failure::new(Exit::Usage, "standard output is a terminal, which would show the keys");
                return Err(failure.with_hint("give -o FILE, or --reveal to see them"));
            }
            return Ok(None);
        };
        let existing = if self.force { Existing::Replace } else { Existing::Keep };
        let file = KeyFile::new(path, existing);
        file.check()?;
        Ok(Some(file))
    }

    /// Checks that an enclave of an expected image exported exactly this.
    fn writer(&self, export: &[u8], plaintext: &[u8]) -> Result<Writer, Failure> {
        let evidence = evidence(export).ok_or_else(|| {
            refused("the export carries no evidence of who wrote it".to_owned()).with_hint(
                "it was not written by an enclave-agent; --danger-accept-any-writer opens it all the same",
            )
        })?;
        let of_evidence = |error: ::attestation::Error| refused(format!("evidence of the export: {error}"));
        // An export may be opened days later, so its chain is verified as of the time that the module signed.
        let at = AttestationDocument::decode(&evidence).map_err(of_evidence)?.timestamp();
        let verifier = Verifier::new(anchor(self.root.as_deref())?);
        let policy = Policy::any_image_that_caller_authorises()
            .with_user_data(&report_data::tagged(EXPORT_TAG, plaintext));
        let document = verifier
            .verify(&evidence, at)
            .and_then(|document| document.appraise(&policy))
            .map_err(of_evidence)?;
        let hash = document.os_image_hash();
        if !self.images.iter().any(|ImageHash(expected)| *expected == hash) {
            let failure = refused(format!("the export was written by image {hash}, not by an expected one"));
            return Err(failure.with_hint("compare it with `eif-builder measure` of the image you started"));
        }
        Ok(Writer {
            os_image_hash: hash.to_string(),
            module_id: document.module_id().to_owned(),
            exported_at: rfc3339(UnixMillis(document.timestamp().0)).unwrap_or_default(),
        })
    }
}

fn refused(reason: String) -> Failure {
    Failure::new(Exit::Refused, reason)
}

fn read(what: &str, path: &Path, max: usize) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let usage = |reason: String| Failure::new(Exit::Usage, format!("{what} {}: {reason}", path.display()));
    let content = read_bounded(path, max).map_err(|error| usage(error.to_string()))?;
    content.map(Zeroizing::new).ok_or_else(|| usage(format!("longer than {max} bytes")))
}

/// The identities in a file: one a line, `#` starts a remark.
fn identities(path: &Path) -> Result<Vec<Identity>, Failure> {
    let usage = |reason: &str| {
        let failure = Failure::new(Exit::Usage, format!("identity {}: {reason}", path.display()));
        failure.with_hint(
            "age-keygen -o FILE makes one; a file with a passphrase is decrypted first, with age -d",
        )
    };
    let text = read("identity", path, MAX_IDENTITY)?;
    let text = std::str::from_utf8(&text).map_err(|_| usage("not text"))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    // The line is not repeated in the message: it may be a key with one wrong letter.
    let found: Result<Vec<Identity>, _> = lines.map(str::parse).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(usage("no identity in it")),
        Err(_) => Err(usage("a line that is no age X25519 identity")),
    }
}

/// The recipients of the identities in a file, as a project names them.
pub(super) fn recipients(path: &Path) -> Result<Vec<String>, Failure> {
    Ok(identities(path)?.iter().map(|identity| identity.to_public().to_string()).collect())
}

fn decrypt(export: &[u8], identities: &[Identity]) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let failed = |error: age::DecryptError| match error {
        age::DecryptError::NoMatchingKeys => {
            refused("the export is not encrypted to this identity".to_owned())
                .with_hint("the recipients are those of the image's measured configuration")
        }
        error => refused(format!("export: {error}")),
    };
    let decryptor = age::Decryptor::new(export).map_err(failed)?;
    let mut reader =
        decryptor.decrypt(identities.iter().map(|it| it as &dyn age::Identity)).map_err(failed)?;
    let mut plaintext = Zeroizing::new(Vec::with_capacity(export.len()));
    reader.read_to_end(&mut plaintext).map_err(|error| refused(format!("export: {error}")))?;
    Ok(plaintext)
}

/// The attestation document in the header of an age file, see [`EVIDENCE_STANZA`].
fn evidence(export: &[u8]) -> Option<Vec<u8>> {
    let start = format!("\n-> {EVIDENCE_STANZA}\n");
    let at = export.windows(start.len()).position(|window| window == start.as_bytes())? + start.len();
    let mut text = Vec::new();
    for line in export[at..].split(|byte| *byte == b'\n') {
        text.extend_from_slice(line);
        // The last line of a body is shorter than the others.
        if line.len() < COLUMNS {
            return STANDARD_NO_PAD.decode(text).ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use enclave_agent::delivery::seal;

    use super::*;

    #[test]
    fn evidence_is_found_whatever_its_length() {
        let recipient = Identity::generate().to_public().to_string().parse().unwrap();
        for len in [1, 47, 48, 49, 96, 4600] {
            let document = vec![0xd2; len];
            let export = seal(&[recipient], Some(&document), b"keys").unwrap();
            assert_eq!(evidence(&export), Some(document), "{len} bytes");
        }
        assert_eq!(evidence(&seal(&[recipient], None, b"keys").unwrap()), None);
    }

    #[test]
    fn image_hashes_are_64_digits() {
        let digits = "ab".repeat(32);
        assert_eq!(digits.parse::<ImageHash>(), format!("0x{digits}").parse());
        for wrong in ["", "ab", &digits[1..], &"zz".repeat(32)] {
            assert!(wrong.parse::<ImageHash>().is_err(), "{wrong}");
        }
    }
}
