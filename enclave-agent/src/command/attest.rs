//! `attest`: evidence of this enclave on the command line.

use std::fs;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use command_line::{Exit, Failure};
use kms_protocol::AppId;
use kms_protocol::attestation_encoding::Attestation;
use kms_protocol::report_data;
use serde::Serialize;
use tokio::task::spawn_blocking;

use super::get_keys::{internal, print};
use crate::evidence::{EvidenceError, OwnDocument};
use crate::nsm::{AttestFields, NsmSource};
use crate::{DurationArg, Error};

/// The NSM's limits, in bytes.
const MAX_USER_DATA: usize = 512;
const MAX_NONCE: usize = 512;
const MAX_PUBLIC_KEY: usize = 1024;

/// Arguments of `attest`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  enclave-agent attest --report-data 00112233
  enclave-agent attest --report-data-file challenge.bin --nonce a1b2c3d4")]
pub struct Arguments {
    /// Data to bind, as hex: up to 64 bytes (filled up with zeros) for a versioned attestation, up to 512 for a document
    #[arg(long, value_name = "HEX", required_unless_present = "report_data_file")]
    pub report_data: Option<HexBytes>,
    /// Data to bind, from a file
    #[arg(long, value_name = "FILE", conflicts_with = "report_data")]
    pub report_data_file: Option<PathBuf>,
    /// A verifier's challenge, as hex, up to 512 bytes
    #[arg(long, value_name = "HEX")]
    pub nonce: Option<HexBytes>,
    /// A public key to have signed, as hex, up to 1024 bytes
    #[arg(long, value_name = "HEX")]
    pub public_key: Option<HexBytes>,
    /// App that a versioned attestation claims to be of: 40 hex digits
    #[arg(long, value_name = "HEX")]
    pub app_id: Option<AppId>,
    /// What to print
    #[arg(long, value_enum, default_value_t = Format::Versioned)]
    pub format: Format,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Encoding::Hex, conflicts_with = "json")]
    pub encoding: Encoding,
    /// Prints a JSON object with the evidence and what it says
    #[arg(long)]
    pub json: bool,
    /// Security module: /dev/nsm, or unix:PATH of a stand-in
    #[arg(long, value_name = "NSM", default_value = "/dev/nsm")]
    pub nsm: NsmSource,
    /// How long the module may take
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub nsm_timeout: DurationArg,
}

/// What to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The NSM's document (COSE_Sign1).
    Document,
    /// The dstack versioned attestation around it, version 0.
    Versioned,
}

/// How to print it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Encoding {
    /// Lowercase hex and a line feed.
    Hex,
    /// The bytes.
    Binary,
}

/// Bytes on the command line, as hex with or without `0x`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HexBytes(pub Vec<u8>);

impl FromStr for HexBytes {
    type Err = hex::FromHexError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        hex::decode(text.strip_prefix("0x").unwrap_or(text)).map(Self)
    }
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    version: u32,
    format: &'static str,
    attestation: String,
    module_id: String,
    timestamp_ms: u64,
    debug: bool,
    os_image_hash: String,
    pcrs: std::collections::BTreeMap<u8, String>,
}

/// Asks the module and prints its evidence.
///
/// # Errors
/// A [`Failure`] with its exit code.
pub async fn run(arguments: Arguments) -> Result<(), Failure> {
    let Arguments { format, encoding, json, nsm_timeout, .. } = arguments;
    let request = Request::new(&arguments)?;
    let nsm = spawn_blocking(move || arguments.nsm.open())
        .await
        .map_err(internal)?
        .map_err(|error| Error::from(EvidenceError::from(error)))?;
    let document =
        OwnDocument::ask(&nsm, request.fields.clone(), nsm_timeout.into()).await.map_err(Error::from)?;
    let evidence = request.evidence(&document)?;
    spawn_blocking(move || match (json, encoding) {
        (true, _) => {
            print(&serde_json::to_vec_pretty(&Report::new(format, &evidence, &document)).map_err(internal)?)
        }
        (false, Encoding::Hex) => print(hex::encode(&evidence).as_bytes()),
        (false, Encoding::Binary) => super::get_keys::print_raw(&evidence),
    })
    .await
    .map_err(internal)?
}

/// What to ask the module for, and what to make of its answer.
#[derive(Debug)]
struct Request {
    fields: AttestFields,
    /// Report data of a versioned attestation; `None` for the bare document.
    versioned: Option<([u8; report_data::LEN], Option<AppId>)>,
}

impl Request {
    fn new(arguments: &Arguments) -> Result<Self, Failure> {
        let usage = |reason: String| Failure::new(Exit::Usage, reason);
        let mut data = match (&arguments.report_data, &arguments.report_data_file) {
            (Some(HexBytes(bytes)), _) => bytes.clone(),
            (None, Some(path)) => fs::read(path)
                .map_err(|error| usage(format!("--report-data-file {}: {error}", path.display())))?,
            (None, None) => Vec::new(),
        };
        let versioned = match arguments.format {
            Format::Document => None,
            Format::Versioned => {
                let mut padded = [0; report_data::LEN];
                let len = data.len();
                let target = padded.get_mut(..len).ok_or_else(|| {
                    usage(format!("report data has {len} bytes, a versioned attestation holds at most 64"))
                })?;
                target.copy_from_slice(&data);
                data = padded.to_vec();
                Some((padded, arguments.app_id))
            }
        };
        let plain = |field: &Option<HexBytes>| field.as_ref().map(|HexBytes(bytes)| bytes.clone());
        let fields = AttestFields {
            user_data: Some(data),
            nonce: plain(&arguments.nonce),
            public_key: plain(&arguments.public_key),
        };
        for (name, field, max) in [
            ("report data", &fields.user_data, MAX_USER_DATA),
            ("nonce", &fields.nonce, MAX_NONCE),
            ("public key", &fields.public_key, MAX_PUBLIC_KEY),
        ] {
            let len = field.as_ref().map_or(0, Vec::len);
            if len > max {
                return Err(usage(format!("{name} has {len} bytes, the NSM takes at most {max}")));
            }
        }
        Ok(Self { fields, versioned })
    }

    fn evidence(&self, document: &OwnDocument) -> Result<Vec<u8>, Failure> {
        let quote = document.as_bytes().to_vec();
        let Some((report_data, app_id)) = &self.versioned else { return Ok(quote) };
        Attestation::nitro(quote, app_id.as_ref(), *report_data, document.os_image_hash().as_bytes())
            .encode_v0()
            .map_err(|error| Error::Encode(error).into())
    }
}

impl Report {
    fn new(format: Format, evidence: &[u8], document: &OwnDocument) -> Self {
        let decoded = document.decoded();
        Self {
            version: 1,
            format: match format {
                Format::Document => "document",
                Format::Versioned => "versioned",
            },
            attestation: hex::encode(evidence),
            module_id: decoded.module_id().to_owned(),
            timestamp_ms: decoded.timestamp().0,
            debug: decoded.is_debug(),
            os_image_hash: document.os_image_hash().to_string(),
            pcrs: decoded.pcrs().map(|(index, pcr)| (index.get(), pcr.to_string())).collect(),
        }
    }
}
