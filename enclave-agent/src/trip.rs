//! The trip: evidence, two connections, checks, keys (kms-protocol §3.2).
//!
//! ```text
//! NSM ── document over a fresh key ──▶ checked ourselves
//! connection 1, no client certificate ── GetTempCaCert [, GetMeta], GetChallenge ──▶ root CA, temp CA [, root k256 key]
//! a challenge: GetAppKeySealed on a connection held to the root CA (1 if it is pinned), see `sealed`
//! none: connection 2, RA-TLS certificate ── GetAppKey
//! ──▶ answer ──▶ signature, root, image ──▶ Keys
//! ```
//!
//! Both connections are held to the same [`KmsTrust`]. An attempt that fails on the way starts over with a fresh key
//! and a fresh document; a refusal ends the run.

mod sealed;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use attestation::UnixMillis;
use bytes::Bytes;
use kms_protocol::AppId;
use kms_protocol::app_keys::{AppKeys, KeyProvider};
use kms_protocol::attestation_encoding::Attestation;
use kms_protocol::derive::{AppK256Key, DiskCryptKey, EnvCryptKey, K256PublicKey, Signature, verify_app_key};
use kms_protocol::report_data;
use kms_protocol::sealed::Exporter;
use kms_protocol::wire::{AppKeyResponse, EMPTY_JSON, GetMetaResponse, GetTempCaCertResponse, Method, json};
use ratls::UnixTime;
use ratls::client::{ClientConfigBuilder, PinnedRoot, PresentedServer, ServerTrust};
use ratls::issue::{Ca, Certificate, KeyPair, client_certificate};
use rustls::time_provider::TimeProvider;
use sha2::{Digest, Sha256};
use tokio::time::{sleep, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use transport::{Prefixed, connect_through};
use zeroize::Zeroizing;

use crate::deadlines::RunEnd;
use crate::evidence::OwnDocument;
use crate::http::KmsConnection;
use crate::keys::Keys;
use crate::nsm::{AttestFields, Nsm};
use crate::{Deadlines, Error, Exchange, KmsTrust, KmsUrl, Proxy, Retry};

/// Body of `GetAppKey`: the configuration inside the attestation counts (kms-protocol §5.4).
const GET_APP_KEY: &[u8] = br#"{"api_version":1,"vm_config":""}"#;

/// Whether an enclave in debug mode may ask for keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DebugMode {
    /// No: its parent reads its memory and console.
    #[default]
    Refuse,
    /// Yes, for keys that protect nothing. The KMS may still refuse.
    DangerAllow,
}

/// Whether keys must come sealed to this enclave (docs/sealed-release.md).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SealedRelease {
    /// They do where the KMS offers it; otherwise upstream's exchange is used.
    #[default]
    Prefer,
    /// They must: a KMS that does not offer it is refused.
    Require,
}

impl SealedRelease {
    /// What a switch in a configuration means.
    #[must_use]
    pub fn required_if(required: bool) -> Self {
        if required { Self::Require } else { Self::Prefer }
    }
}

/// Everything that [`get_keys`] needs to know.
#[derive(Debug)]
pub struct GetKeys {
    /// Replicas of one KMS, tried in this order.
    pub kms_urls: Vec<KmsUrl>,
    /// The app whose keys are wanted.
    pub app_id: AppId,
    /// Which KMS to believe.
    pub trust: KmsTrust,
    /// Whether keys must come sealed.
    pub sealed: SealedRelease,
    /// How to reach it.
    pub proxy: Proxy,
    /// How long to wait.
    pub deadlines: Deadlines,
    /// How often to start over.
    pub retry: Retry,
    /// What to do in debug mode.
    pub debug_mode: DebugMode,
    /// How far the clock may be from the NSM's.
    pub max_clock_skew: Duration,
    /// The clock for certificates and evidence.
    pub time: Arc<dyn TimeProvider>,
}

/// A step of the trip that is done, for whoever wants to watch.
#[non_exhaustive]
pub enum Step<'a> {
    /// An attempt starts.
    Connecting {
        /// The KMS.
        url: &'a KmsUrl,
        /// `direct`, or the proxy.
        via: String,
    },
    /// The NSM signed a document for a fresh key, and it says what it should.
    Attested {
        /// The document.
        document: &'a OwnDocument,
    },
    /// A TLS connection stands, and the server passed the checks of its anchors.
    Connected {
        /// 1 or 2.
        connection: u8,
        /// SHA-256 of the server's certificate.
        certificate_sha256: [u8; 32],
    },
    /// The KMS handed out its temp CA and named its root CA.
    TempCa {
        /// SHA-256 of the root CA's SubjectPublicKeyInfo.
        root_spki_sha256: [u8; 32],
    },
    /// The KMS released keys, and they passed all checks.
    Released {
        /// The keys.
        keys: &'a Keys,
    },
    /// The attempt failed in a way that another may mend.
    Retrying {
        /// Why.
        error: &'a Error,
        /// The pause before the next attempt.
        pause: Duration,
    },
}

/// Proves this enclave to the KMS and fetches the app's keys. Not cancel safe in its effects: a KMS may have released
/// keys to a call that was dropped.
///
/// # Errors
/// [`Error`]; after the deadline of the whole run always [`Error::TimedOut`].
pub async fn get_keys(
    config: &GetKeys,
    nsm: &Arc<dyn Nsm>,
    watch: &mut (dyn FnMut(Step<'_>) + Send),
) -> Result<Keys, Error> {
    let end = RunEnd::after(config.deadlines.total);
    let mut last = None;
    match timeout_at(end.instant(), attempts(config, nsm, watch, end, &mut last)).await {
        Ok(result) => result,
        Err(_elapsed) => Err(Error::TimedOut { after: end.total, source: last.map(Box::new) }),
    }
}

async fn attempts(
    config: &GetKeys,
    nsm: &Arc<dyn Nsm>,
    watch: &mut (dyn FnMut(Step<'_>) + Send),
    end: RunEnd,
    last: &mut Option<Error>,
) -> Result<Keys, Error> {
    let mut attempt = 1;
    let sealed_was_offered = AtomicBool::new(false);
    // `kms_urls` may be empty only by a caller's mistake; then there is no attempt to make.
    for url in config.kms_urls.iter().cycle() {
        let current = Attempt { config, nsm, url, sealed_was_offered: &sealed_was_offered };
        let error = match current.run(watch).await {
            Ok(keys) => return Ok(keys),
            Err(error) => error,
        };
        let Some(asked) = error.retry() else { return Err(error) };
        if config.retry.attempts <= 1 {
            return Err(error);
        }
        if attempt >= config.retry.attempts {
            return Err(Error::GaveUp { attempts: attempt, source: Box::new(error) });
        }
        attempt += 1;
        let pause = config.retry.pause(attempt, asked, random());
        if !end.allows(pause) {
            return Err(Error::GaveUp { attempts: attempt - 1, source: Box::new(error) });
        }
        watch(Step::Retrying { error: &error, pause });
        *last = Some(error);
        sleep(pause).await;
    }
    Err(Error::GaveUp { attempts: 0, source: Box::new(Error::Clock) })
}

/// One call outside of the trip, on a connection that is held to `root`, which was trusted when the keys came. Every
/// replica is asked once, within the deadline of a whole run.
pub(crate) async fn call_once(
    config: &GetKeys,
    nsm: &Arc<dyn Nsm>,
    root: &PinnedRoot,
    method: Method,
    body: Vec<u8>,
) -> Result<Zeroizing<Vec<u8>>, Error> {
    let end = RunEnd::after(config.deadlines.total);
    let body = Bytes::from(body);
    let mut last = None;
    let calls = async {
        for url in &config.kms_urls {
            // No keys are released here, sealed or not.
            let attempt = Attempt { config, nsm, url, sealed_was_offered: &AtomicBool::new(false) };
            let called = async {
                let trust = config.trust.key_connection(root);
                let mut connection = attempt.connect(trust, None, 1, &mut |_step| {}).await?;
                attempt.call(&mut connection, method, body.clone()).await
            };
            match called.await {
                Ok(answer) => return Ok(answer),
                // Another replica would refuse as well.
                Err(error) if error.retry().is_none() => return Err(error),
                Err(error) => last = Some(error),
            }
        }
        Err(last.take().unwrap_or(Error::Clock))
    };
    match timeout_at(end.instant(), calls).await {
        Ok(result) => result,
        Err(_elapsed) => Err(Error::TimedOut { after: end.total, source: last.map(Box::new) }),
    }
}

/// Jitter is no secret: the standard library's per-process random hash keys are enough.
pub(crate) fn random() -> u16 {
    use std::hash::{BuildHasher, RandomState};
    let hash = RandomState::new().hash_one(0_u8).to_le_bytes();
    u16::from_le_bytes([hash[0], hash[1]])
}

/// One run through all steps against one KMS.
struct Attempt<'a> {
    config: &'a GetKeys,
    nsm: &'a Arc<dyn Nsm>,
    url: &'a KmsUrl,
    /// By any KMS, at any attempt of this run.
    sealed_was_offered: &'a AtomicBool,
}

/// A connection to the KMS.
struct Connection {
    http: KmsConnection,
    /// None before TLS 1.3.
    exporter: Option<Exporter>,
}

/// What upstream's exchange shows.
struct Evidence {
    key: KeyPair,
    document: OwnDocument,
    report_data: [u8; 64],
    os_image_hash: [u8; 32],
}

/// What the first connection brings.
struct Introduction {
    temp_ca: GetTempCaCertResponse,
    /// The root that issues the KMS's certificates: pinned, or named over this connection.
    root: PinnedRoot,
    k256_root: Option<K256PublicKey>,
}

impl Attempt<'_> {
    async fn run(&self, watch: &mut (dyn FnMut(Step<'_>) + Send)) -> Result<Keys, Error> {
        let route = self.config.proxy.route(self.url)?;
        watch(Step::Connecting { url: self.url, via: route.to_string() });
        let key = KeyPair::generate().map_err(Error::Tls)?;
        let report_data = report_data::ratls_cert(&key.spki_der());
        let document = self.document(report_data).await?;
        watch(Step::Attested { document: &document });
        let os_image_hash = *document.os_image_hash().as_bytes();

        let (introduction, mut connection) = self.introduction(watch).await?;
        let keys = match self.offered(self.challenge(&mut connection).await?)? {
            Some(challenge) => {
                self.sealed_keys(challenge, connection, introduction, os_image_hash, watch).await?
            }
            None => {
                drop(connection);
                let evidence = Evidence { key, document, report_data, os_image_hash };
                self.upstream_keys(evidence, introduction, watch).await?
            }
        };
        watch(Step::Released { keys: &keys });
        Ok(keys)
    }

    /// Upstream's exchange: evidence in the TLS client certificate, keys in plain inside TLS.
    async fn upstream_keys(
        &self,
        evidence: Evidence,
        introduction: Introduction,
        watch: &mut (dyn FnMut(Step<'_>) + Send),
    ) -> Result<Keys, Error> {
        let Evidence { key, document, report_data, os_image_hash } = evidence;
        let attestation =
            Attestation::nitro(document.into_bytes(), Some(&self.config.app_id), report_data, &os_image_hash)
                .encode_v0()
                .map_err(Error::Encode)?;
        let certificate = self.certificate(&key, &attestation, &introduction.temp_ca)?;
        let trust = self.config.trust.key_connection(&introduction.root);
        let mut connection = self.connect(trust, Some((&certificate, &key)), 2, watch).await?;
        let method = Method::GetAppKey;
        let body = self.call(&mut connection, method, GET_APP_KEY).await?;
        let answer = self.decode(method, &body)?;
        self.release(method, answer, introduction, os_image_hash)
    }

    async fn document(&self, report_data: [u8; 64]) -> Result<OwnDocument, Error> {
        let fields = AttestFields { user_data: Some(report_data.to_vec()), ..AttestFields::default() };
        let document = OwnDocument::ask(self.nsm, fields, self.config.deadlines.nsm).await?;
        if self.config.debug_mode == DebugMode::Refuse {
            document.refuse_debug()?;
        }
        let now = UnixMillis::from_secs(self.now()?.as_secs());
        document.check_clock(now, self.config.max_clock_skew)?;
        Ok(document)
    }

    async fn introduction(
        &self,
        watch: &mut (dyn FnMut(Step<'_>) + Send),
    ) -> Result<(Introduction, Connection), Error> {
        let trust = &self.config.trust;
        let mut connection = self.connect(trust.first_connection(), None, 1, watch).await?;
        let method = Method::GetTempCaCert;
        let body = self.call(&mut connection, method, EMPTY_JSON).await?;
        let temp_ca: GetTempCaCertResponse = self.decode(method, &body)?;
        let unreadable = |source| self.unreadable(method, source);
        let root = match trust.root() {
            Some(root) if root.is_key_of(&temp_ca.ca_cert).map_err(unreadable)? => root.clone(),
            Some(_) => return Err(Error::OtherRoot { url: self.url.clone(), method: method.name() }),
            None => PinnedRoot::from_pem(&temp_ca.ca_cert).map_err(unreadable)?,
        };
        watch(Step::TempCa { root_spki_sha256: Sha256::digest(root.spki_der()).into() });
        let k256_root = match trust.k256() {
            Some(pinned) => Some(*pinned),
            // Only an authenticated KMS's word about its own key is worth asking for.
            None if trust.authenticates_first_connection() => Some(self.k256_root(&mut connection).await?),
            None => None,
        };
        Ok((Introduction { temp_ca, root, k256_root }, connection))
    }

    /// The root k256 key as the KMS names it.
    async fn k256_root(&self, connection: &mut Connection) -> Result<K256PublicKey, Error> {
        let body = self.call(connection, Method::GetMeta, EMPTY_JSON).await?;
        let meta: GetMetaResponse = self.decode(Method::GetMeta, &body)?;
        K256PublicKey::from_sec1(&meta.k256_pubkey).map_err(|source| self.unreadable(Method::GetMeta, source))
    }

    fn certificate(
        &self,
        key: &KeyPair,
        attestation: &[u8],
        temp_ca: &GetTempCaCertResponse,
    ) -> Result<Certificate, Error> {
        let ca = Ca::from_pem("temp CA", &temp_ca.temp_ca_cert, &temp_ca.temp_ca_key)
            .map_err(|source| self.unreadable(Method::GetTempCaCert, source))?;
        client_certificate(key, attestation, Some(&ca), self.now()?).map_err(Error::Tls)
    }

    /// Checks an answer and takes the keys out of it: the only place where keys become usable.
    fn release(
        &self,
        method: Method,
        mut answer: AppKeyResponse,
        introduction: Introduction,
        os_image_hash: [u8; 32],
    ) -> Result<Keys, Error> {
        let Introduction { temp_ca, root, k256_root } = introduction;
        if !root.is_key_of(&answer.ca_cert).map_err(|source| self.unreadable(method, source))? {
            return Err(Error::OtherRoot { url: self.url.clone(), method: method.name() });
        }
        if answer.os_image_hash != os_image_hash {
            return Err(Error::OtherImage {
                url: self.url.clone(),
                expected: hex::encode(os_image_hash),
                actual: hex::encode(answer.os_image_hash.get(..32).unwrap_or(&answer.os_image_hash)),
            });
        }
        let length = |source| self.unreadable(method, source);
        let app_keys = AppKeys {
            disk_crypt_key: DiskCryptKey::from_slice(&answer.disk_crypt_key).map_err(length)?,
            env_crypt_key: Some(EnvCryptKey::from_slice(&answer.env_crypt_key).map_err(length)?),
            k256_key: AppK256Key::from_slice(&answer.k256_key).map_err(length)?,
            k256_signature: Signature::from_slice(&answer.k256_signature)
                .map_err(|source| self.unreadable(method, source))?,
            gateway_app_id: std::mem::take(&mut answer.gateway_app_id),
            ca_cert: temp_ca.ca_cert,
            key_provider: KeyProvider::Kms {
                url: self.url.to_string(),
                pubkey: root.spki_der().to_vec(),
                tmp_ca_key: temp_ca.temp_ca_key,
                tmp_ca_cert: temp_ca.temp_ca_cert,
            },
        };
        if let Some(k256_root) = &k256_root {
            verify_app_key(k256_root, &self.config.app_id, &app_keys.k256_key, &app_keys.k256_signature)
                .map_err(|source| Error::KeySignature { url: self.url.clone(), source: Box::new(source) })?;
        }
        let exchange = if method == Method::GetAppKeySealed { Exchange::Sealed } else { Exchange::Upstream };
        Ok(Keys { app_id: self.config.app_id, os_image_hash, app_keys, exchange })
    }

    /// A connection on which the server has passed the checks of `trust`.
    async fn connect(
        &self,
        trust: ServerTrust,
        certificate: Option<(&Certificate, &KeyPair)>,
        number: u8,
        watch: &mut (dyn FnMut(Step<'_>) + Send),
    ) -> Result<Connection, Error> {
        let Deadlines { connect, handshake, request, .. } = self.config.deadlines;
        let builder = ClientConfigBuilder::new(trust).with_time(Arc::clone(&self.config.time));
        let tls = match certificate {
            Some((certificate, key)) => builder.build_with_certificate(certificate, key),
            None => builder.build(),
        }
        .map_err(Error::Tls)?;
        let name = self
            .url
            .server_name()
            .map_err(|error| Error::NotTls { url: self.url.clone(), reason: error.to_string() })?;
        let route = self.config.proxy.route(self.url)?;
        let stream = route.first_hop.connect(connect).await?;
        let stream = match &route.tunnel {
            None => Prefixed::new(Vec::new(), stream),
            Some(target) => connect_through(stream, target, connect)
                .await
                .map_err(|source| Error::Tunnel { proxy: route.first_hop.clone(), source })?,
        };
        let connected = timeout(handshake, TlsConnector::from(Arc::new(tls)).connect(name, stream)).await;
        let stream = connected
            .map_err(|_elapsed| Error::HandshakeTimedOut { url: self.url.clone(), after: handshake })?
            .map_err(|error| Error::handshake(self.url, error))?;
        let (_, tls) = stream.get_ref();
        let server = PresentedServer::from_peer(tls.peer_certificates()).map_err(Error::Tls)?;
        let exporter = ratls::sealed::exporter(tls).ok();
        watch(Step::Connected {
            connection: number,
            certificate_sha256: Sha256::digest(server.der()).into(),
        });
        let http = KmsConnection::new(stream, self.url.clone(), request).await.map_err(|source| {
            Error::call(self.url, crate::HttpError::Exchange { method: "connect", source })
        })?;
        Ok(Connection { http, exporter })
    }

    async fn call(
        &self,
        connection: &mut Connection,
        method: Method,
        body: impl Into<Bytes>,
    ) -> Result<Zeroizing<Vec<u8>>, Error> {
        connection.http.call(method, body).await.map_err(|error| Error::call(self.url, error))
    }

    fn decode<M: serde::de::DeserializeOwned + Default>(
        &self,
        method: Method,
        body: &[u8],
    ) -> Result<M, Error> {
        json::decode(body).map_err(|source| Error::answer(self.url, method.name(), source))
    }

    fn unreadable(&self, method: Method, source: impl std::error::Error + Send + Sync + 'static) -> Error {
        Error::Answer { url: self.url.clone(), method: method.name(), source: Box::new(source) }
    }

    fn now(&self) -> Result<UnixTime, Error> {
        self.config.time.current_time().ok_or(Error::Clock)
    }
}
