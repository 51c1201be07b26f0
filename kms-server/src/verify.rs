//! Looking at a KMS from outside: what it says about itself, and whether its evidence bears that out.

use std::sync::Arc;
use std::time::Duration;

use attestation::{AttestationDocument, UnixMillis};
use bytes::Bytes;
use hyper::Method;
use kms_protocol::attestation_encoding::{self, Attestation, VersionedAttestation};
use kms_protocol::derive::K256PublicKey;
use kms_protocol::report_data;
use kms_protocol::runtime_events::Moment;
use kms_protocol::wire::webhook::BootInfo;
use kms_protocol::wire::{Encoding, GetMetaResponse, WireMessage};
use ratls::client::{ClientConfigBuilder, PinnedRoot, PresentedServer, ServerTrust};
use rustls_pki_types::ServerName;
use serde::Serialize;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::attest::{self, Attester, ClientEvidence, Trust, TrustError};
use crate::client::{self, Ask, Url};
use crate::offload::Offload;
use command_line::chain;

/// Longest answer.
const MAX_ANSWER: usize = 16 << 20;

/// What a KMS is compared with.
#[derive(Debug, Clone)]
pub struct Expectations {
    /// What evidence is verified against.
    pub trust: Trust,
    /// The root CA it must have, PEM.
    pub root_ca: Option<String>,
    /// The K256 root it must have.
    pub k256: Option<K256PublicKey>,
    /// For each connection with its request.
    pub timeout: Duration,
}

/// What was found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Where.
    pub url: String,
    /// SubjectPublicKeyInfo of its root CA, hex DER.
    pub ca_pubkey: String,
    /// Its K256 root, hex.
    pub k256_pubkey: String,
    /// Whether it gives keys to everybody.
    pub is_dev: bool,
    /// What was checked.
    pub checks: Vec<Check>,
}

/// One thing that was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub what: &'static str,
    /// What came out.
    pub result: Outcome,
    /// In words.
    pub detail: String,
}

/// What came out of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It holds.
    Good,
    /// There is nothing to check: the KMS does not show it.
    Absent,
    /// It does not hold.
    Bad,
}

/// Why nothing could be found out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The URL cannot be used.
    #[error("the URL is not usable: expected {0}")]
    Url(&'static str),
    /// The roots cannot be used.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The KMS gives no answer in time.
    #[error("{url} gave no answer within {0:?}", url = .1)]
    Deadline(Duration, String),
    /// The KMS cannot be asked.
    #[error("{url} {what}")]
    Answer {
        /// Where.
        url: String,
        /// Why not.
        what: String,
    },
}

impl Report {
    /// Whether nothing that was checked is bad.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.checks.iter().all(|check| check.result != Outcome::Bad)
    }

    fn note(&mut self, what: &'static str, result: Result<String, String>) {
        let (result, detail) = match result {
            Ok(detail) => (Outcome::Good, detail),
            Err(detail) => (Outcome::Bad, detail),
        };
        self.checks.push(Check { what, result, detail });
    }

    fn absent(&mut self, what: &'static str, detail: &str) {
        self.checks.push(Check { what, result: Outcome::Absent, detail: detail.into() });
    }
}

/// Asks the KMS at `url` for `GetMeta` and checks what it shows: its certificate against its root CA, the bootstrap
/// record against its keys, and the evidence in both.
///
/// # Errors
///
/// [`Error`] when there is no answer to check.
pub async fn verify(url: &str, expect: Expectations, now: UnixMillis) -> Result<Report, Error> {
    let base = url.trim_end_matches('/');
    let url = Url::parse(base.strip_suffix("/prpc").unwrap_or(base)).map_err(Error::Url)?.join("prpc");
    let offload = Arc::new(Offload::new(1, 8));
    let attester = Arc::new(Attester::new(expect.trust.clone(), offload)?);
    let failed = |what: String| Error::Answer { url: url.to_string(), what };
    let any = ServerTrust::danger_accept_any_kms();
    let (meta, server) = get_meta(&url, any, &expect).await?;
    let meta = meta.ok_or_else(|| failed("did not answer GetMeta usably".into()))?;
    let root = PinnedRoot::from_pem(&meta.ca_cert)
        .map_err(|error| failed(format!("has a root CA that is none: {}", chain(&error))))?;
    let mut report = Report {
        url: url.to_string(),
        ca_pubkey: hex::encode(root.spki_der()),
        k256_pubkey: hex::encode(&meta.k256_pubkey),
        is_dev: meta.is_dev,
        checks: Vec::new(),
    };
    if meta.is_dev {
        report.note("authoriser", Err("it gives keys to everybody (development)".into()));
    }
    compare(&mut report, &meta, &root, &expect);
    let issued = get_meta(&url, ServerTrust::pinned_root(root.clone()), &expect).await;
    let issued = issued.map(|_| "issued by the root CA for this name, for a KMS".into());
    report.note("certificate", issued.map_err(|error| error.to_string()));
    match attester.certificate(server.der().to_vec(), now).await {
        Ok(None) => report.absent("certificate evidence", "the certificate carries no attestation"),
        Ok(Some(evidence)) => report.note("certificate evidence", describe(evidence)),
        Err(error) => report.note("certificate evidence", Err(error.to_string())),
    }
    check_bootstrap(&mut report, &meta, &root, &attester, now).await;
    Ok(report)
}

fn compare(report: &mut Report, meta: &GetMetaResponse, root: &PinnedRoot, expect: &Expectations) {
    if let Some(pem) = &expect.root_ca {
        let same = root.is_key_of(pem);
        report.note(
            "expected root CA",
            match same {
                Ok(true) => Ok("the same key".into()),
                Ok(false) => Err("another key".into()),
                Err(error) => Err(chain(&error)),
            },
        );
    }
    let actual = K256PublicKey::from_sec1(&meta.k256_pubkey);
    match (&expect.k256, actual) {
        (_, Err(error)) => report.note("K256 root", Err(error.to_string())),
        (Some(expected), Ok(actual)) if *expected != actual => {
            report.note("K256 root", Err(format!("another key, expected {expected}")));
        }
        (Some(_), Ok(_)) => report.note("K256 root", Ok("the expected key".into())),
        (None, Ok(_)) => {}
    }
}

/// The record of the bootstrap must speak of both keys, and its evidence of the record.
async fn check_bootstrap(
    report: &mut Report,
    meta: &GetMetaResponse,
    root: &PinnedRoot,
    attester: &Arc<Attester>,
    now: UnixMillis,
) {
    let what = "bootstrap record";
    let Some(info) = &meta.bootstrap_info else {
        return report.absent(what, "the keys were made or taken over without one");
    };
    let Ok(k256) = <[u8; 33]>::try_from(meta.k256_pubkey.as_slice()) else { return };
    if info.ca_pubkey != root.spki_der() || info.k256_pubkey != k256 {
        return report.note(what, Err("it speaks of other keys than the KMS has".into()));
    }
    report.note(what, Ok("it speaks of both root keys".into()));
    let what = "bootstrap evidence";
    if info.attestation.is_empty() {
        return report.absent(what, "the record carries no attestation");
    }
    let attestation = match VersionedAttestation::decode(&info.attestation) {
        Ok(attestation) => attestation.into_attestation(),
        Err(error) => return report.note(what, Err(error.to_string())),
    };
    let (binding, made) = (report_data::bootstrap(&info.ca_pubkey, &k256), time_of(&attestation, now));
    match attester.evidence(attestation, binding, made).await {
        Ok(evidence) => report.note(what, describe(evidence)),
        Err(error) => report.note(what, Err(error.to_string())),
    }
}

/// When to verify the evidence of a record at: it was fresh when the record was made, and an NSM document says when. Other
/// evidence holds now or not at all.
fn time_of(attestation: &Attestation, now: UnixMillis) -> UnixMillis {
    let document = attestation.platform.nsm_quote().and_then(|it| AttestationDocument::decode(it).ok());
    document.map_or(now, |document| document.timestamp())
}

/// Judges evidence as a KMS judges its clients', for those who set a KMS up.
pub struct Judge {
    attester: Arc<Attester>,
}

/// Why evidence proves nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JudgeError {
    /// It cannot be read.
    #[error("the attestation cannot be read")]
    Decode(#[from] attestation_encoding::Error),
    /// It does not verify, or is of something else than it says.
    #[error(transparent)]
    Evidence(#[from] attest::Error),
}

impl Judge {
    /// Judges under these anchors.
    ///
    /// # Errors
    ///
    /// [`TrustError`].
    pub fn new(trust: Trust) -> Result<Self, TrustError> {
        Ok(Self { attester: Arc::new(Attester::new(trust, Arc::new(Offload::new(1, 8)))?) })
    }

    /// What an encoded attestation over `report_data` proves. One of a Nitro Enclave is judged at its own time, for it
    /// may be the evidence of a record.
    ///
    /// # Errors
    ///
    /// [`JudgeError`].
    pub async fn evidence(
        &self,
        encoded: &[u8],
        report_data: [u8; 64],
        now: UnixMillis,
    ) -> Result<BootInfo, JudgeError> {
        let attestation = VersionedAttestation::decode(encoded)?.into_attestation();
        let made = time_of(&attestation, now);
        let evidence = self.attester.evidence(attestation, report_data, made).await?;
        Ok(evidence.into_client("", Moment::Now)?.boot_info)
    }

    /// What the evidence in a certificate (DER) proves about the holder of its key; `None` when there is none in it.
    ///
    /// # Errors
    ///
    /// [`JudgeError`].
    pub async fn certificate(&self, der: &[u8], now: UnixMillis) -> Result<Option<BootInfo>, JudgeError> {
        let evidence = self.attester.certificate(der.to_vec(), now).await?;
        Ok(evidence.map(|it| it.into_client("", Moment::Now)).transpose()?.map(|client| client.boot_info))
    }
}

fn describe(evidence: ClientEvidence) -> Result<String, String> {
    let tee = evidence.tee_variant();
    let client = evidence.into_client("", Moment::Now).map_err(|error| error.to_string())?;
    let mr = hex::encode(&client.boot_info.mr_aggregated);
    Ok(format!("{tee}, image {}, mr_aggregated {mr}", client.os_image_hash))
}

/// The answer, if it is one, and the certificate that the server showed.
async fn get_meta(
    url: &Url,
    trust: ServerTrust,
    expect: &Expectations,
) -> Result<(Option<GetMetaResponse>, PresentedServer), Error> {
    let failed = |what: String| Error::Answer { url: url.to_string(), what };
    let config = ClientConfigBuilder::new(trust).build().map_err(|error| failed(chain(&error)))?;
    let work = async {
        let name =
            ServerName::try_from(url.host.clone()).map_err(|_| client::Error::Name(url.host.clone()))?;
        let stream = url.endpoint.connect(expect.timeout).await.map_err(client::Error::Connect)?;
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, stream).await.map_err(client::Error::Tls)?;
        let server = PresentedServer::from_peer(stream.get_ref().1.peer_certificates());
        let ask = Ask {
            method: Method::POST,
            authority: url.authority.clone(),
            path: format!("{}/GetMeta?json", url.path),
            body: Bytes::from_static(b"null"),
            limit: MAX_ANSWER,
        };
        Ok::<_, client::Error>((client::exchange(stream, ask).await?, server))
    };
    let answer = timeout(expect.timeout, work).await;
    let answer = answer.map_err(|_| Error::Deadline(expect.timeout, url.to_string()))?;
    let (answer, server) = answer.map_err(|error| failed(error.to_string()))?;
    let server = server.map_err(|error| failed(chain(&error)))?;
    let meta = GetMetaResponse::decode_body(Encoding::Json, &answer.body).ok();
    Ok((meta.filter(|_| answer.status.is_success()), server))
}
