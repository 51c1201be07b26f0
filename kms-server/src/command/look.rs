//! `inspect` and `verify`: looking at a KMS from the inside and from the outside.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use command_line::{Exit, Failure, print_line};
use kms_protocol::derive::K256PublicKey;
use serde::Serialize;

use crate::config::Config;
use crate::server::system_clock;
use crate::store::inspect::{Inspection, State, inspect};
use crate::verify::{Error, Expectations, Outcome, Report, verify};

/// Arguments of `inspect`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kms-server inspect /etc/kms/certs
  kms-server inspect /etc/kms/certs --json | jq -r .state")]
pub struct Inspect {
    /// The directory of keys (core.cert_dir)
    pub dir: PathBuf,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kms-server verify https://kms.example.com:12001
  kms-server verify https://kms.example.com:12001 --root-ca root-ca.crt --json")]
pub struct Verify {
    /// The KMS, with or without /prpc
    pub url: String,
    /// The root CA it must have, PEM
    #[arg(long, value_name = "FILE")]
    pub root_ca: Option<PathBuf>,
    /// The K256 root it must have, compressed
    #[arg(long, value_name = "HEX")]
    pub k256: Option<K256PublicKey>,
    /// Settings whose core.attestation says what evidence is verified against
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Seconds for each connection with its request
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub timeout: u64,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Versioned<T> {
    version: u8,
    #[serde(flatten)]
    answer: T,
}

fn print_json(answer: impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(&Versioned { version: 1, answer });
    print_line(&text.map_err(|error| Failure::new(Exit::Internal, error))?);
    Ok(())
}

/// # Errors
///
/// 2 without such a directory, 3 when it is broken.
pub(super) fn run_inspect(arguments: Inspect) -> Result<(), Failure> {
    let inspection =
        inspect(&arguments.dir, system_clock()).map_err(|error| Failure::new(Exit::Usage, error))?;
    if arguments.json {
        print_json(&inspection)?;
    } else {
        print_inspection(&inspection);
    }
    if inspection.state == State::Broken {
        let finding = inspection.findings.first().cloned().unwrap_or_default();
        return Err(
            Failure::new(Exit::Refused, Broken(finding)).with_hint("restore the directory from a backup")
        );
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
#[error("the directory cannot be used: {0}")]
struct Broken(String);

fn print_inspection(inspection: &Inspection) {
    let Inspection {
        path,
        state,
        in_use,
        domain,
        ca_pubkey,
        k256_pubkey,
        has_bootstrap_info,
        certificates,
        findings,
    } = inspection;
    let state = match state {
        State::Empty => "no keys yet",
        State::Unfinished => "the remains of a bootstrap that made no keys",
        State::AlmostReady => "keys of an interrupted bootstrap, which the next start finishes",
        State::Ready => "keys",
        State::Broken => "not usable",
    };
    let user = if *in_use { ", in use" } else { "" };
    print_line(&format!("{}: {state}{user}", path.display()));
    let line = |what: &str, value: &Option<String>| {
        if let Some(value) = value {
            print_line(&format!("  {what:<16} {value}"));
        }
    };
    line("domain", domain);
    line("K256 root", k256_pubkey);
    line("root CA key", ca_pubkey);
    line("bootstrap record", &has_bootstrap_info.then(|| "yes".to_owned()));
    for certificate in certificates {
        let end = if certificate.expired { "expired" } else { "valid" };
        line(certificate.file, &Some(format!("{end}, not after {} s", certificate.not_after)));
    }
    for finding in findings {
        line("note", &Some(finding.clone()));
    }
}

/// # Errors
///
/// 2 for unusable arguments, 3 when something does not hold, 4 without an answer in time, 1 otherwise.
pub(super) async fn run_verify(arguments: Verify) -> Result<(), Failure> {
    let Verify { url, root_ca, k256, config, timeout, json } = arguments;
    let usage = |error: std::io::Error| Failure::new(Exit::Usage, error);
    let root_ca = root_ca.map(std::fs::read_to_string).transpose().map_err(usage)?;
    let loaded = Config::load(config.as_deref()).map_err(|error| Failure::new(Exit::Usage, error))?;
    let timeout = Duration::from_secs(timeout.max(1));
    let expect = Expectations { trust: loaded.config.trust, root_ca, k256, timeout };
    let report = verify(&url, expect, system_clock()).await.map_err(|error| {
        let exit = match &error {
            Error::Url(_) | Error::Trust(_) => Exit::Usage,
            Error::Deadline(..) => Exit::NoAnswer,
            _ => Exit::Internal,
        };
        Failure::new(exit, error)
    })?;
    if json {
        print_json(&report)?;
    } else {
        print_report(&report);
    }
    match report.checks.into_iter().find(|check| check.result == Outcome::Bad) {
        None => Ok(()),
        Some(check) => Err(Failure::new(Exit::Refused, Refused(check.what, check.detail))),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0}: {1}")]
struct Refused(&'static str, String);

fn print_report(report: &Report) {
    print_line(&report.url);
    print_line(&format!("  K256 root   {}", report.k256_pubkey));
    print_line(&format!("  root CA key {}", report.ca_pubkey));
    for check in &report.checks {
        let result = match check.result {
            Outcome::Good => "good",
            Outcome::Absent => "none",
            Outcome::Bad => "BAD ",
        };
        print_line(&format!("  {result} {}: {}", check.what, check.detail));
    }
}
