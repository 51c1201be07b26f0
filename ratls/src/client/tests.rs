//! Handshakes in memory: every server a client accepts or refuses, and every client a server does.

use std::sync::Arc;
use std::time::Duration;

use kms_protocol::attestation_encoding::Attestation;
use kms_protocol::{AppId, report_data};
use rustls::time_provider::TimeProvider;
use rustls::{CertificateError, ClientConnection, ServerConnection};
use rustls_pki_types::{ServerName, UnixTime};

use super::*;
use crate::evidence::{EvidencePolicy, PeerEvidence};
use crate::issue::{self, AppLeaf, Ca};
use crate::server::{SelfIssued, ServerConfigBuilder};
use crate::{Error, Refusal};

const NOW: u64 = 1_800_000_000;
const HOST: &str = "kms.example";

#[derive(Debug)]
struct FixedTime(u64);

impl TimeProvider for FixedTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(at(self.0))
    }
}

fn at(seconds: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

/// A KMS with its hierarchy.
struct Kms {
    root: Ca,
    temp_ca: Ca,
    key: KeyPair,
}

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

impl Kms {
    fn new() -> Self {
        let (root_key, temp_key) = (key(), key());
        let root = issue::root_ca(&root_key, at(NOW)).unwrap();
        let temp = issue::temp_ca(&temp_key, at(NOW)).unwrap();
        Self {
            root: Ca::new("root CA", root.der().clone(), root_key).unwrap(),
            temp_ca: Ca::new("temp CA", temp.der().clone(), temp_key).unwrap(),
            key: key(),
        }
    }

    fn pin(&self) -> ServerTrust {
        ServerTrust::pinned_root(PinnedRoot::from_der(self.root.certificate()).unwrap())
    }

    fn leaf(&self, domain: &str) -> Certificate {
        issue::rpc_leaf(&self.root, &self.key, domain, None, at(NOW)).unwrap()
    }

    fn server(&self) -> ServerConfigBuilder {
        ServerConfigBuilder::new(self.temp_ca.certificate().clone())
            .unwrap()
            .with_time(Arc::new(FixedTime(NOW)))
    }

    /// The outcome of a client's handshake with this server at `now`.
    fn judged(&self, trust: ServerTrust, leaf: &Certificate, now: u64) -> Result<(), String> {
        let client = ClientConfigBuilder::new(trust).with_time(Arc::new(FixedTime(now))).build().unwrap();
        let server = self.server().build(leaf, &self.key).unwrap();
        handshake(client, server, HOST).map(|_| ()).map_err(|failure| failure.client_refusal())
    }

    /// The outcome for a client with that certificate.
    fn admits(
        &self,
        self_issued: SelfIssued,
        certificate: &Certificate,
        key: &KeyPair,
    ) -> Result<Pair, Box<Failure>> {
        let client = ClientConfigBuilder::new(self.pin()).with_time(Arc::new(FixedTime(NOW)));
        let client = client.build_with_certificate(certificate, key).unwrap();
        let server = self.server().with_self_issued(self_issued).build(&self.leaf(HOST), &self.key).unwrap();
        handshake(client, server, HOST)
    }
}

struct Pair {
    client: ClientConnection,
    server: ServerConnection,
}

#[derive(Debug)]
struct Failure {
    client: Option<rustls::Error>,
    server: Option<rustls::Error>,
}

impl Failure {
    fn client_refusal(&self) -> String {
        let error = self.client.as_ref().expect("the client refused");
        let wrapped = std::io::Error::other(error.clone());
        let refusal = Refusal::in_error(&wrapped).unwrap_or_else(|| panic!("no refusal in {error:?}"));
        refusal.name().to_owned()
    }
}

/// Moves bytes between both until the handshake is over and, in TLS 1.3, the client has seen the server's verdict on
/// its certificate.
fn handshake(
    client: rustls::ClientConfig,
    server: rustls::ServerConfig,
    host: &str,
) -> Result<Pair, Box<Failure>> {
    let name = ServerName::try_from(host.to_owned()).unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    for _ in 0..10 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut rest = wire.as_slice();
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
        }
        let server_error = server.process_new_packets().err();
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut rest = wire.as_slice();
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
        }
        let client_error = client.process_new_packets().err();
        if server_error.is_some() || client_error.is_some() {
            return Err(Box::new(Failure { client: client_error, server: server_error }));
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok(Pair { client, server })
}

/// Evidence bound to `key`.
fn evidence_for(key: &KeyPair) -> Vec<u8> {
    let report_data = report_data::ratls_cert(&key.spki_der());
    Attestation::nitro(vec![1, 2, 3], None, report_data, &[0; 32]).encode_v0().unwrap()
}

#[derive(Debug)]
struct Policy {
    accepts: bool,
}

impl EvidencePolicy for Policy {
    fn appraise(
        &self,
        evidence: &PeerEvidence,
        now: UnixTime,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        assert_eq!(evidence.attestation().platform.nsm_quote(), Some([1, 2, 3].as_slice()));
        assert_eq!(now, at(NOW));
        if self.accepts { Ok(()) } else { Err("measurements differ".into()) }
    }
}

fn policy(accepts: bool) -> ServerTrust {
    ServerTrust::evidence(Arc::new(Policy { accepts }))
}

fn refused(name: &str) -> Result<(), String> {
    Err(name.to_owned())
}

#[test]
fn the_pinned_roots_own_listener_is_accepted() {
    let kms = Kms::new();
    assert_eq!(kms.judged(kms.pin(), &kms.leaf(HOST), NOW), Ok(()));
    let by_key =
        PinnedRoot::from_spki_der(PinnedRoot::from_der(kms.root.certificate()).unwrap().spki_der()).unwrap();
    assert_eq!(kms.judged(ServerTrust::pinned_root(by_key), &kms.leaf(HOST), NOW), Ok(()));
}

#[test]
fn an_ip_address_is_matched_by_an_ip_name() {
    let kms = Kms::new();
    let connect = |domain: &str, host: &str| {
        let client = ClientConfigBuilder::new(kms.pin()).with_time(Arc::new(FixedTime(NOW))).build().unwrap();
        let server = kms.server().build(&kms.leaf(domain), &kms.key).unwrap();
        handshake(client, server, host).map(|_| ()).map_err(|failure| failure.client_refusal())
    };
    assert_eq!(connect("10.0.0.1", "10.0.0.1"), Ok(()));
    assert_eq!(connect(HOST, "10.0.0.1"), refused("server-wrong-name"));
    assert_eq!(connect("10.0.0.1", "10.0.0.2"), refused("server-wrong-name"));
}

#[test]
fn another_root_is_refused_even_under_the_same_name() {
    let (kms, other) = (Kms::new(), Kms::new());
    assert_eq!(kms.judged(other.pin(), &kms.leaf(HOST), NOW), refused("server-not-issued-by-root"));
}

#[test]
fn another_name_is_refused() {
    let kms = Kms::new();
    assert_eq!(kms.judged(kms.pin(), &kms.leaf("other.example"), NOW), refused("server-wrong-name"));
}

#[test]
fn validity_is_judged_at_the_given_time() {
    let kms = Kms::new();
    let end = NOW + 3650 * 86_400;
    assert_eq!(kms.judged(kms.pin(), &kms.leaf(HOST), end), Ok(()));
    assert_eq!(kms.judged(kms.pin(), &kms.leaf(HOST), end + 1), refused("server-certificate-expired"));
    assert_eq!(
        kms.judged(kms.pin(), &kms.leaf(HOST), 100_000_000),
        refused("server-certificate-not-yet-valid")
    );
    let leaf = issue::rpc_leaf(&kms.root, &kms.key, HOST, Some(&evidence_for(&kms.key)), at(NOW)).unwrap();
    assert_eq!(kms.judged(policy(true), &leaf, end + 1), refused("server-certificate-expired"));
    assert_eq!(kms.judged(policy(true), &leaf, 100_000_000), refused("server-certificate-not-yet-valid"));
}

/// Upstream's `get-keys` accepts this one: any app can ask its KMS for a certificate with any name.
#[test]
fn an_app_certificate_with_the_kmss_host_name_must_not_pass() {
    let kms = Kms::new();
    let app = AppId::new([0x11; 20]);
    let ca_key = key();
    let ca = issue::app_ca(&kms.root, &ca_key, &app, at(NOW)).unwrap();
    let app_ca = Ca::new("App CA", ca.der().clone(), ca_key).unwrap();
    let leaf = AppLeaf {
        spki_der: kms.key.spki_der(),
        subject: HOST.into(),
        names: vec![HOST.into()],
        server_auth: true,
        ..AppLeaf::default()
    };
    let leaf = issue::app_leaf(&app_ca, &app, &leaf, at(NOW)).unwrap();
    assert_eq!(kms.judged(kms.pin(), &leaf, NOW), refused("server-not-issued-by-root"));

    // With the App CA sent along, which chains to the root.
    let client = ClientConfigBuilder::new(kms.pin()).with_time(Arc::new(FixedTime(NOW))).build().unwrap();
    let chain = vec![leaf.der().clone(), app_ca.certificate().clone()];
    let server = rustls::ServerConfig::builder_with_provider(crate::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, kms.key.private_key_der())
        .unwrap();
    let failure = handshake(client, server, HOST).err().unwrap();
    assert_eq!(failure.client_refusal(), "server-not-issued-by-root");

    // Even signed by the root itself its usage gives it away.
    let direct = AppLeaf { spki_der: kms.key.spki_der(), names: vec![HOST.into()], ..AppLeaf::default() };
    let direct = issue::app_leaf(&kms.root, &app, &direct, at(NOW)).unwrap();
    assert_eq!(kms.judged(kms.pin(), &direct, NOW), refused("server-wrong-usage"));
    let with_evidence = AppLeaf {
        spki_der: kms.key.spki_der(),
        names: vec![HOST.into()],
        attestation: Some(evidence_for(&kms.key)),
        ..AppLeaf::default()
    };
    let with_evidence = issue::app_leaf(&app_ca, &app, &with_evidence, at(NOW)).unwrap();
    assert_eq!(kms.judged(policy(true), &with_evidence, NOW), refused("server-wrong-usage"));
}

#[test]
fn certificates_that_are_no_servers_are_refused() {
    let kms = Kms::new();
    // An App CA as the server's own certificate, and the root's.
    let ca = issue::app_ca(&kms.root, &kms.key, &AppId::new([1; 20]), at(NOW)).unwrap();
    assert_eq!(kms.judged(kms.pin(), &ca, NOW), refused("server-wrong-purpose"));
    let client_only = AppLeaf {
        spki_der: kms.key.spki_der(),
        names: vec![HOST.into()],
        client_auth: true,
        ..AppLeaf::default()
    };
    let client_only = issue::app_leaf(&kms.root, &AppId::new([1; 20]), &client_only, at(NOW)).unwrap();
    assert_eq!(kms.judged(kms.pin(), &client_only, NOW), refused("server-wrong-purpose"));
}

#[test]
fn evidence_that_meets_the_policy_is_accepted_whoever_issued_the_certificate() {
    let (kms, other) = (Kms::new(), Kms::new());
    let leaf = issue::rpc_leaf(&kms.root, &kms.key, HOST, Some(&evidence_for(&kms.key)), at(NOW)).unwrap();
    assert_eq!(kms.judged(policy(true), &leaf, NOW), Ok(()));
    assert_eq!(kms.judged(policy(false), &leaf, NOW), refused("server-policy"));
    let root = |kms: &Kms| PinnedRoot::from_der(kms.root.certificate()).unwrap();
    let both = |root, accepts| ServerTrust::pinned_root_and_evidence(root, Arc::new(Policy { accepts }));
    assert_eq!(kms.judged(both(root(&kms), true), &leaf, NOW), Ok(()));
    assert_eq!(kms.judged(both(root(&kms), false), &leaf, NOW), refused("server-policy"));
    assert_eq!(kms.judged(both(root(&other), true), &leaf, NOW), refused("server-not-issued-by-root"));
}

#[test]
fn evidence_for_another_key_name_or_none_is_refused() {
    let kms = Kms::new();
    let leaf = |domain, evidence: Option<&[u8]>| {
        issue::rpc_leaf(&kms.root, &kms.key, domain, evidence, at(NOW)).unwrap()
    };
    let own = evidence_for(&kms.key);
    // Relayed: genuine evidence that speaks for another key.
    let relayed = evidence_for(&key());
    assert_eq!(kms.judged(policy(true), &leaf(HOST, Some(&relayed)), NOW), refused("report-data-not-bound"));
    assert_eq!(kms.judged(policy(true), &leaf(HOST, None), NOW), refused("server-no-evidence"));
    assert_eq!(
        kms.judged(policy(true), &leaf("other.example", Some(&own)), NOW),
        refused("server-wrong-name")
    );
    assert_eq!(
        kms.judged(policy(true), &leaf(HOST, Some(&own[..40])), NOW),
        refused("attestation-truncated")
    );
}

#[test]
fn danger_accepts_any_certificate_and_shows_which() {
    let (kms, other) = (Kms::new(), Kms::new());
    let trust = ServerTrust::danger_accept_any_kms();
    assert!(trust.is_danger() && !other.pin().is_danger());
    let client = ClientConfigBuilder::new(trust).with_time(Arc::new(FixedTime(NOW))).build().unwrap();
    let leaf = kms.leaf("other.example");
    let pair = handshake(client, kms.server().build(&leaf, &kms.key).unwrap(), HOST).ok().unwrap();
    let presented = PresentedServer::from_peer(pair.client.peer_certificates()).unwrap();
    assert_eq!((presented.der(), presented.spki_der()), (leaf.der(), kms.key.spki_der().as_slice()));
    assert_eq!(PresentedServer::from_peer(None).unwrap_err().name(), "no-peer-certificate");
}

/// The signature of the handshake is checked even then: a copied certificate is of no use without its key.
#[test]
fn danger_still_wants_the_certificates_key() {
    let kms = Kms::new();
    let leaf = kms.leaf(HOST);
    let stranger = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&key().private_key_der()).unwrap();
    let stolen = rustls::sign::CertifiedKey::new(vec![leaf.der().clone()], stranger);
    #[derive(Debug)]
    struct Always(Arc<rustls::sign::CertifiedKey>);
    impl rustls::server::ResolvesServerCert for Always {
        fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<rustls::sign::CertifiedKey>> {
            Some(Arc::clone(&self.0))
        }
    }
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let server = rustls::ServerConfig::builder_with_provider(crate::provider())
            .with_protocol_versions(&[version])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(Always(Arc::new(stolen.clone()))));
        let client = ClientConfigBuilder::new(ServerTrust::danger_accept_any_kms()).build().unwrap();
        let failure = handshake(client, server, HOST).err().unwrap();
        assert_eq!(failure.client, Some(rustls::Error::InvalidCertificate(CertificateError::BadSignature)));
    }
}

#[test]
fn a_client_of_the_temp_ca_is_admitted_with_its_evidence() {
    let kms = Kms::new();
    let key = key();
    let certificate =
        issue::client_certificate(&key, &evidence_for(&key), Some(&kms.temp_ca), at(NOW)).unwrap();
    let pair = kms.admits(SelfIssued::Refuse, &certificate, &key).ok().unwrap();
    let evidence = PeerEvidence::from_peer(pair.server.peer_certificates()).unwrap().unwrap();
    assert_eq!(evidence.spki_der(), key.spki_der());
}

#[test]
fn a_client_without_certificate_is_admitted_without_evidence() {
    let kms = Kms::new();
    let client = ClientConfigBuilder::new(kms.pin()).with_time(Arc::new(FixedTime(NOW))).build().unwrap();
    let pair = handshake(client, kms.server().build(&kms.leaf(HOST), &kms.key).unwrap(), HOST).ok().unwrap();
    assert_eq!(PeerEvidence::from_peer(pair.server.peer_certificates()).unwrap(), None);
}

#[test]
fn a_clients_evidence_for_another_key_is_found_out() {
    let kms = Kms::new();
    let (own, other) = (key(), key());
    let certificate =
        issue::client_certificate(&own, &evidence_for(&other), Some(&kms.temp_ca), at(NOW)).unwrap();
    let pair = kms.admits(SelfIssued::Refuse, &certificate, &own).ok().unwrap();
    let error = PeerEvidence::from_peer(pair.server.peer_certificates()).unwrap_err();
    assert!(matches!(error, Error::NotBound), "{error}");
}

fn server_error(result: Result<Pair, Box<Failure>>) -> CertificateError {
    match result.err().and_then(|failure| failure.server) {
        Some(rustls::Error::InvalidCertificate(error)) => error,
        other => panic!("the server said {other:?}"),
    }
}

#[test]
fn clients_of_another_ca_are_refused() {
    let (kms, other) = (Kms::new(), Kms::new());
    let key = key();
    let certificate = issue::client_certificate(&key, b"e", Some(&other.temp_ca), at(NOW)).unwrap();
    // Same name, another key: the signature fails.
    assert_eq!(
        server_error(kms.admits(SelfIssued::Refuse, &certificate, &key)),
        CertificateError::BadSignature
    );
    assert_eq!(
        server_error(kms.admits(SelfIssued::Accept, &certificate, &key)),
        CertificateError::BadSignature
    );
}

#[test]
fn self_issued_clients_need_the_switch() {
    let kms = Kms::new();
    let key = key();
    let certificate = issue::client_certificate(&key, &evidence_for(&key), None, at(NOW)).unwrap();
    assert_eq!(
        server_error(kms.admits(SelfIssued::Refuse, &certificate, &key)),
        CertificateError::UnknownIssuer
    );
    let pair = kms.admits(SelfIssued::Accept, &certificate, &key).ok().unwrap();
    let evidence = PeerEvidence::from_peer(pair.server.peer_certificates()).unwrap().unwrap();
    assert_eq!(evidence.spki_der(), key.spki_der());
}

#[test]
fn expired_clients_and_servers_certificates_are_refused() {
    let kms = Kms::new();
    let key = key();
    let old = issue::client_certificate(&key, b"e", Some(&kms.temp_ca), at(NOW - 3650 * 86_400 - 1)).unwrap();
    assert_eq!(server_error(kms.admits(SelfIssued::Refuse, &old, &key)), CertificateError::Expired);
    let old = issue::client_certificate(&key, b"e", None, at(NOW - 3650 * 86_400 - 1)).unwrap();
    assert_eq!(server_error(kms.admits(SelfIssued::Accept, &old, &key)), CertificateError::Expired);

    let with_usage = |server_auth, client_auth| {
        let leaf = AppLeaf {
            spki_der: key.spki_der(),
            subject: "c".into(),
            server_auth,
            client_auth,
            ..AppLeaf::default()
        };
        issue::app_leaf(&kms.temp_ca, &AppId::new([1; 20]), &leaf, at(NOW)).unwrap()
    };
    let refused = kms.admits(SelfIssued::Refuse, &with_usage(true, false), &key);
    assert_eq!(server_error(refused), CertificateError::InvalidPurpose);
    assert!(kms.admits(SelfIssued::Refuse, &with_usage(false, true), &key).is_ok());
    assert!(kms.admits(SelfIssued::Refuse, &with_usage(false, false), &key).is_ok());
}

#[test]
fn the_certificate_request_names_the_temp_ca() {
    let kms = Kms::new();
    #[derive(Debug)]
    struct Recorder(std::sync::Mutex<Vec<Vec<u8>>>);
    impl rustls::client::ResolvesClientCert for Recorder {
        fn resolve(
            &self,
            hints: &[&[u8]],
            _: &[rustls::SignatureScheme],
        ) -> Option<Arc<rustls::sign::CertifiedKey>> {
            *self.0.lock().unwrap() = hints.iter().map(|hint| hint.to_vec()).collect();
            None
        }
        fn has_certs(&self) -> bool {
            true
        }
    }
    let recorder = Arc::new(Recorder(std::sync::Mutex::default()));
    let mut client = ClientConfigBuilder::new(kms.pin()).with_time(Arc::new(FixedTime(NOW))).build().unwrap();
    client.client_auth_cert_resolver = Arc::clone(&recorder) as _;
    handshake(client, kms.server().build(&kms.leaf(HOST), &kms.key).unwrap(), HOST).ok().unwrap();
    let (_, subject) = crate::verify::names(kms.temp_ca.certificate()).unwrap();
    assert_eq!(*recorder.0.lock().unwrap(), [subject]);
}

#[test]
fn both_tls_versions_and_both_protocols_are_spoken() {
    let kms = Kms::new();
    let server = || kms.server().build(&kms.leaf(HOST), &kms.key).unwrap();
    for (protocol, version) in [("h2", &rustls::version::TLS13), ("http/1.1", &rustls::version::TLS12)] {
        let verifier =
            verifier::TrustVerifier::new(kms.pin(), crate::provider().signature_verification_algorithms);
        let mut client =
            rustls::ClientConfig::builder_with_details(crate::provider(), Arc::new(FixedTime(NOW)))
                .with_protocol_versions(&[version])
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(verifier))
                .with_no_client_auth();
        client.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        let pair = handshake(client, server(), HOST).ok().unwrap();
        assert_eq!(pair.client.protocol_version(), Some(version.version));
        assert_eq!(pair.client.alpn_protocol(), Some(protocol.as_bytes()));
    }
}

#[test]
fn no_session_is_resumed() {
    let kms = Kms::new();
    let server = Arc::new(kms.server().build(&kms.leaf(HOST), &kms.key).unwrap());
    // A client that would resume if it could.
    let mut client = ClientConfigBuilder::new(kms.pin()).with_time(Arc::new(FixedTime(NOW))).build().unwrap();
    client.resumption = Resumption::in_memory_sessions(8);
    for _ in 0..2 {
        let pair = handshake(client.clone(), (*server).clone(), HOST).ok().unwrap();
        assert_eq!(pair.client.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
}

#[test]
fn anchors_that_are_none_are_refused() {
    let kms = Kms::new();
    let leaf = kms.leaf(HOST);
    assert_eq!(PinnedRoot::from_pem(&leaf.pem()).unwrap_err().name(), "not-a-ca");
    assert_eq!(PinnedRoot::from_pem("").unwrap_err().name(), "pem-count");
    assert_eq!(PinnedRoot::from_spki_der(&[1, 2, 3]).unwrap_err().name(), "public-key-invalid");
    assert_eq!(ServerConfigBuilder::new(leaf.der().clone()).unwrap_err().name(), "not-a-ca");
    let error = kms.server().build(&leaf, &key()).unwrap_err();
    assert_eq!(error.name(), "tls-configuration");
    let pin = PinnedRoot::from_der(kms.root.certificate()).unwrap();
    assert!(!pin.is_key_of(&leaf.pem()).unwrap());
}
