//! `keyferry attestation`: looks at NSM attestation documents.

mod input;
mod report;
mod units;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use attestation::{AttestationDocument, Freshness, Pcr, PcrIndex, Policy, TrustAnchor, UnixMillis, Verifier};
use clap::{Args, Subcommand};
use command_line::{Exit, Failure};

use input::Input;
pub(super) use input::read_bounded;
use report::{Refusal, Report, Verdict};
pub(super) use units::rfc3339;
use units::{Age, Hex, Instant, PcrValue};

/// Chains remembered in one run; most documents of one machine share theirs.
const CHAINS: usize = 1024;

/// A root certificate in PEM takes less than 2 KB.
const MAX_ROOT_LEN: usize = 16 * 1024;

/// Attestation documents of Nitro Enclaves.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Verify documents: format, freshness, certificate chain, signature, and what the options ask for.
    ///
    /// Without --pcr this says that a document is authentic, not that its image is the one you want.
    /// Exits with 0 if every document is accepted, with 3 if one is refused.
    Verify(Verify),
    /// Show what documents say WITHOUT verifying them. Anybody can write such a document.
    Inspect(Inspect),
}

/// Arguments of `keyferry attestation verify`.
#[derive(Args, Debug)]
pub(crate) struct Verify {
    #[command(flatten)]
    files: Files,
    /// Verify as of this time instead of now: RFC 3339, or @SECONDS[.FRACTION] since 1970.
    #[arg(long, value_name = "TIME")]
    at: Option<Instant>,
    /// Trust the root certificate in this file (PEM) instead of AWS Nitro Enclaves Root CA G1.
    #[arg(long, value_name = "PEM")]
    root: Option<PathBuf>,
    /// How old a document may be, such as 90, 90s, 5m, 1h or 1d.
    #[arg(long, value_name = "DURATION", default_value = "1h")]
    max_age: Age,
    /// How far ahead of the time of verification a document may be dated.
    #[arg(long, value_name = "DURATION", default_value = "5m")]
    max_skew: Age,
    /// Accept debug enclaves, whose parent can read everything in them.
    #[arg(long)]
    danger_allow_debug: bool,
    /// Ask for this value of a register; can be given once for each.
    #[arg(long = "pcr", value_name = "N=HEX")]
    pcrs: Vec<PcrValue>,
    /// Ask for this nonce.
    #[arg(long, value_name = "HEX")]
    nonce: Option<Hex>,
    /// Ask for this user data.
    #[arg(long, value_name = "HEX")]
    user_data: Option<Hex>,
    /// Ask for this public key.
    #[arg(long, value_name = "HEX")]
    public_key: Option<Hex>,
}

/// Arguments of `keyferry attestation inspect`.
#[derive(Args, Debug)]
pub(crate) struct Inspect {
    #[command(flatten)]
    files: Files,
}

#[derive(Args, Debug)]
struct Files {
    /// Files with a document each, raw, in hex or in base64; - is standard input.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Print one JSON object per file and line.
    #[arg(long)]
    json: bool,
}

/// Runs the command and writes the answer to `out`, notes to `notes`.
pub(crate) fn run(command: Command, out: &mut dyn Write, notes: &mut dyn Write) -> Result<Exit, Failure> {
    match command {
        Command::Verify(verify) => verify.run(out),
        Command::Inspect(inspect) => inspect.run(out, notes),
    }
}

impl Verify {
    fn run(self, out: &mut dyn Write) -> Result<Exit, Failure> {
        let now = self.at.map_or_else(clock, |Instant(at)| Ok(at))?;
        let policy = self.policy()?;
        let freshness = Freshness { max_age: self.max_age.0, max_skew: self.max_skew.0 };
        let verifier = Verifier::new(anchor(self.root.as_deref())?)
            .with_freshness(freshness)
            .with_chain_cache(CHAINS.try_into().expect("the number is not zero"));
        self.files.report_each(out, |input| verdict(&verifier, &policy, input, now))
    }

    fn policy(&self) -> Result<Policy, Failure> {
        let mut policy = Policy::any_image_that_caller_authorises();
        let mut named: Vec<PcrIndex> = Vec::new();
        for &PcrValue(index, pcr) in &self.pcrs {
            if named.contains(&index) {
                return Err(Failure::new(Exit::Usage, format!("--pcr names {index} twice")));
            }
            named.push(index);
            policy = policy.with_pcr(index, pcr);
        }
        if let Some(Hex(nonce)) = &self.nonce {
            policy = policy.with_nonce(nonce);
        }
        if let Some(Hex(user_data)) = &self.user_data {
            policy = policy.with_user_data(user_data);
        }
        if let Some(Hex(public_key)) = &self.public_key {
            policy = policy.with_public_key(public_key);
        }
        Ok(if self.danger_allow_debug { policy.danger_allow_debug() } else { policy })
    }
}

/// The root that documents are verified under: that in a file, or AWS's.
pub(super) fn anchor(root: Option<&Path>) -> Result<TrustAnchor, Failure> {
    let Some(path) = root else { return Ok(TrustAnchor::aws_nitro_g1()) };
    let failure = |reason: String| {
        let failure = Failure::new(Exit::Usage, format!("root {}: {reason}", path.display()));
        failure.with_hint("--root takes a file with one certificate in PEM")
    };
    let pem = input::read_bounded(path, MAX_ROOT_LEN).map_err(|error| failure(error.to_string()))?;
    let pem = pem.ok_or_else(|| failure(format!("longer than {MAX_ROOT_LEN} bytes")))?;
    let pem = String::from_utf8(pem).map_err(|error| failure(error.to_string()))?;
    TrustAnchor::from_pem(&pem).map_err(|error| failure(error.to_string()))
}

impl Inspect {
    fn run(self, out: &mut dyn Write, notes: &mut dyn Write) -> Result<Exit, Failure> {
        let warning =
            "warning: UNVERIFIED: anybody can write such documents; use `keyferry attestation verify`";
        // A closed standard error must not take the answer with it.
        drop(writeln!(notes, "{warning}"));
        self.files.report_each(out, |input| match input {
            Input::Unreadable(reason) => Verdict::Unreadable(reason),
            Input::TooLarge(error) => Verdict::Refused(Refusal::of(&error), None),
            Input::Evidence(evidence) => match AttestationDocument::decode(&evidence) {
                Ok(document) => Verdict::Unverified(Box::new(document)),
                Err(error) => Verdict::Refused(Refusal::of(&error), None),
            },
        })
    }
}

fn verdict(verifier: &Verifier, policy: &Policy, input: Input, now: UnixMillis) -> Verdict {
    let evidence = match input {
        Input::Unreadable(reason) => return Verdict::Unreadable(reason),
        Input::TooLarge(error) => return Verdict::Refused(Refusal::of(&error), None),
        Input::Evidence(evidence) => evidence,
    };
    let verified = match verifier.verify(&evidence, now) {
        Ok(verified) => verified,
        Err(error) => return Verdict::Refused(Refusal::of(&error), None),
    };
    match verified.clone().appraise(policy) {
        Ok(appraised) => Verdict::Accepted(Box::new(appraised)),
        Err(error) => Verdict::Refused(Refusal::of(&error), Some(Box::new(verified))),
    }
}

impl Files {
    /// Reports every file as soon as it is judged, and says how the command ends.
    fn report_each(self, out: &mut dyn Write, judge: impl Fn(Input) -> Verdict) -> Result<Exit, Failure> {
        let mut exit = Exit::Done;
        for path in &self.files {
            let report = Report { path, verdict: judge(Input::read(path)) };
            exit = match (report.verdict.exit(), exit) {
                (Exit::Refused, _) | (_, Exit::Refused) => Exit::Refused,
                (Exit::Done, exit) => exit,
                (exit, _) => exit,
            };
            match report.write(self.json, out) {
                Ok(()) => {}
                // Whoever read the answer has seen enough; the exit code still counts all files up to here.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(exit),
                Err(error) => return Err(Failure::new(Exit::Internal, error)),
            }
        }
        match out.flush() {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Failure::new(Exit::Internal, error))
            }
            _ => Ok(exit),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the outermost layer reads the clock, once for the whole run")]
fn clock() -> Result<UnixMillis, Failure> {
    UnixMillis::try_from(SystemTime::now()).map_err(|error| {
        Failure::new(Exit::Internal, error).with_hint("set the clock, or give the time with --at")
    })
}

impl std::str::FromStr for PcrValue {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (index, value) = text.split_once('=').ok_or("expected N=HEX")?;
        let index: PcrIndex = index.parse().map_err(|error| format!("{index:?}: {error}"))?;
        let value = value.strip_prefix("0x").unwrap_or(value);
        let pcr: Pcr = value.parse().map_err(|error| format!("{index}: {error}"))?;
        Ok(Self(index, pcr))
    }
}
