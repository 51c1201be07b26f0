//! The trip against scripted peers on real sockets: the honest KMS, impostors, and everything that breaks on the way.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use command_line::Exit;
use enclave_agent::evidence::EvidenceError;
use enclave_agent::{DebugMode, Error, GetKeys, HttpError, Keys, KmsTrust, Proxy, get_keys};
use kms_protocol::app_keys::KeyProvider;
use nsm_emulator::{Config, system_clock};
use ratls::evidence::{EvidencePolicy, PeerEvidence};
use ratls::issue::{AppLeaf, Ca, KeyPair, app_ca, app_leaf};
use ratls::{UnixTime, provider};
use support::{APP, Answer, Authority, DOMAIN, Enclave, Script, Stage, config, image_hash, now};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use transport::{BindOptions, Endpoint, Listener};

const KMS: u8 = 7;
const IMPOSTOR: u8 = 70;

async fn fetch(config: &GetKeys) -> Result<Keys, Error> {
    let enclave = Enclave::start(Config::default()).await;
    get_keys(config, &enclave.nsm, &mut |_| {}).await
}

/// Plays a script to an agent that pins the KMS's root.
async fn play(script: Script) -> (Result<Keys, Error>, Stage) {
    let stage = script.start().await;
    let result = fetch(&config(&[stage.url()], Authority::new(KMS).trust())).await;
    (result, stage)
}

fn refused(result: Result<Keys, Error>) -> Error {
    let Err(error) = result else { panic!("accepted an impostor") };
    error
}

fn untrusted(result: Result<Keys, Error>) -> &'static str {
    match refused(result) {
        error @ Error::Untrusted { name, .. } => {
            assert_eq!(error.exit(), Exit::Refused);
            assert!(error.hint().is_some(), "{error}");
            name
        }
        error => panic!("{error}"),
    }
}

#[tokio::test]
async fn an_honest_kms_hands_out_the_keys() {
    let authority = Authority::new(KMS);
    let stage = Script::honest(&authority).start().await;
    let enclave = Enclave::start(Config::default()).await;
    let config = config(&[format!("{}/prpc/", stage.url())], authority.trust());
    let keys = get_keys(&config, &enclave.nsm, &mut |_| {}).await.unwrap_or_else(|error| panic!("{error}"));

    let expected = authority.app_keys();
    assert_eq!(keys.app_keys().disk_crypt_key.expose().as_slice(), expected.disk_crypt_key);
    assert_eq!(keys.app_keys().k256_key.expose().as_slice(), expected.k256_key);
    assert_eq!(keys.os_image_hash(), &image_hash());
    let KeyProvider::Kms { url, pubkey, .. } = &keys.app_keys().key_provider else { panic!("not by a KMS") };
    assert_eq!(*url, format!("{}/prpc", stage.url()));
    assert_eq!(pubkey, authority.pinned().spki_der());
    assert_eq!(stage.calls(), ["GetTempCaCert", "GetMeta", "GetChallenge", "GetAppKey"]);

    let evidence = stage.evidence();
    assert_eq!(evidence.len(), 1, "evidence goes to the second connection only");
    let attestation = evidence[0].attestation();
    assert_eq!(attestation.app_id(), APP.as_bytes());
    enclave.verify(attestation.platform.nsm_quote().unwrap());
}

#[tokio::test]
async fn pitfall_15_an_impostor_with_its_own_ca_learns_nothing() {
    let (result, stage) = play(Script::honest(&Authority::new(IMPOSTOR))).await;
    assert_eq!(untrusted(result), "server-not-issued-by-root");
    assert!(stage.calls().is_empty() && stage.evidence().is_empty());
}

#[tokio::test]
async fn a_certificate_for_another_name_or_time_is_refused() {
    let authority = Authority::new(KMS);
    let year_2000 = UnixTime::since_unix_epoch(Duration::from_secs(946_684_800));
    for (tls, expected) in [
        (authority.tls("kms.example.com", now()), "server-wrong-name"),
        (authority.tls(DOMAIN, year_2000), "server-certificate-expired"),
    ] {
        let mut script = Script::honest(&authority);
        script.tls = [Some(Arc::clone(&tls)), Some(tls)];
        let (result, stage) = play(script).await;
        assert_eq!(untrusted(result), expected);
        assert!(stage.calls().is_empty());
    }
}

/// An app may ask the KMS for a certificate with any name, the KMS's own included (kms-protocol §12.1, 2).
#[tokio::test]
async fn an_apps_certificate_with_the_kmss_name_is_refused() {
    let authority = Authority::new(KMS);
    let app_ca_key = KeyPair::generate().unwrap();
    let app_ca_certificate = app_ca(&authority.root, &app_ca_key, &APP, now()).unwrap();
    let app_ca = Ca::new("app CA", app_ca_certificate.der().clone(), app_ca_key).unwrap();
    for (issuer, expected) in
        [(&app_ca, "server-not-issued-by-root"), (&authority.root, "server-wrong-usage")]
    {
        let key = KeyPair::generate().unwrap();
        let leaf = AppLeaf {
            spki_der: key.spki_der(),
            subject: DOMAIN.into(),
            names: vec![DOMAIN.into()],
            server_auth: true,
            ..AppLeaf::default()
        };
        let leaf = app_leaf(issuer, &APP, &leaf, now()).unwrap();
        let chain = vec![leaf.der().clone(), app_ca_certificate.der().clone()];
        let tls = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key.private_key_der())
            .unwrap();
        let tls = Arc::new(tls);
        let mut script = Script::honest(&authority);
        script.tls = [Some(Arc::clone(&tls)), Some(tls)];
        let (result, stage) = play(script).await;
        assert_eq!(untrusted(result), expected);
        assert!(stage.calls().is_empty());
    }
}

#[tokio::test]
async fn the_second_connection_is_held_to_the_same_anchor() {
    let authority = Authority::new(KMS);
    let impostor = Authority::new(IMPOSTOR);
    let mut script = Script::honest(&authority);
    script.tls[1] = Some(impostor.tls(DOMAIN, now()));
    let (result, stage) = play(script).await;
    assert_eq!(untrusted(result), "server-not-issued-by-root");
    assert_eq!(stage.calls(), ["GetTempCaCert", "GetMeta", "GetChallenge"]);
}

#[tokio::test]
async fn a_swapped_root_ca_in_an_answer_is_refused() {
    let authority = Authority::new(KMS);
    let impostor = Authority::new(IMPOSTOR);
    let mut temp_ca = authority.temp_ca();
    temp_ca.ca_cert.clone_from(&impostor.root_pem);
    let mut keys = authority.app_keys();
    keys.ca_cert.clone_from(&impostor.root_pem);
    for (expected, answer) in [("GetTempCaCert", Answer::ok(&temp_ca)), ("GetAppKey", Answer::ok(&keys))] {
        let error = refused(play(Script::honest(&authority).with(expected, answer)).await.0);
        assert!(matches!(&error, Error::OtherRoot { method, .. } if *method == expected), "{error}");
        assert_eq!(error.exit(), Exit::Refused);
    }
}

#[tokio::test]
async fn keys_that_the_root_key_did_not_sign_are_refused() {
    let authority = Authority::new(KMS);
    let mut of_other_root = authority.app_keys();
    let impostor = Authority::new(IMPOSTOR).app_keys();
    of_other_root.k256_key.clone_from(&impostor.k256_key);
    of_other_root.k256_signature.clone_from(&impostor.k256_signature);
    let mut other_key = authority.app_keys();
    other_key.k256_key.clone_from(&impostor.k256_key);
    for answer in [of_other_root, other_key] {
        let script = Script::honest(&authority).with("GetAppKey", Answer::ok(&answer));
        let error = refused(play(script).await.0);
        assert!(matches!(error, Error::KeySignature { .. }), "{error}");
        assert_eq!(error.exit(), Exit::Refused);
    }
}

#[tokio::test]
async fn keys_for_another_image_are_refused() {
    let authority = Authority::new(KMS);
    for hash in [vec![], vec![0; 32], vec![1; 33]] {
        let mut answer = authority.app_keys();
        answer.os_image_hash = hash;
        let script = Script::honest(&authority).with("GetAppKey", Answer::ok(&answer));
        let error = refused(play(script).await.0);
        assert!(matches!(error, Error::OtherImage { .. }), "{error}");
    }
}

#[tokio::test]
async fn the_k256_key_alone_authenticates_the_answer() {
    let authority = Authority::new(KMS);
    let trust = |seed| {
        let key = Authority::new(seed).roots.k256_public_key();
        KmsTrust::anchored(None, None, Some(key)).unwrap()
    };
    let stage = Script::honest(&authority).start().await;
    assert!(fetch(&config(&[stage.url()], trust(KMS))).await.is_ok());
    assert_eq!(stage.calls(), ["GetTempCaCert", "GetChallenge", "GetAppKey"]);
    let error = refused(fetch(&config(&[stage.url()], trust(IMPOSTOR))).await);
    assert!(matches!(error, Error::KeySignature { .. }), "{error}");
}

#[tokio::test]
async fn any_kms_is_accepted_only_by_name_of_danger() {
    let stage = Script::honest(&Authority::new(IMPOSTOR)).start().await;
    assert!(fetch(&config(&[stage.url()], KmsTrust::danger_accept_any_kms())).await.is_ok());
    assert!(KmsTrust::anchored(None, None, None).is_err());
}

/// Refuses everything it is shown.
#[derive(Debug)]
struct RefuseAll;

impl EvidencePolicy for RefuseAll {
    fn appraise(
        &self,
        _: &PeerEvidence,
        _: UnixTime,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Err("nothing is good enough".into())
    }
}

#[tokio::test]
async fn a_policy_is_an_anchor_of_its_own() {
    let authority = Authority::new(KMS);
    let trust = || KmsTrust::anchored(None, Some(Arc::new(RefuseAll)), None).unwrap();
    let stage = Script::honest(&authority).start().await;
    assert_eq!(untrusted(fetch(&config(&[stage.url()], trust())).await), "server-no-evidence");

    let key = KeyPair::generate().unwrap();
    let report_data = kms_protocol::report_data::ratls_cert(&key.spki_der());
    let evidence =
        kms_protocol::attestation_encoding::Attestation::nitro(vec![0], None, report_data, &[0; 32]);
    let evidence = evidence.encode_v0().unwrap();
    let leaf = ratls::issue::rpc_leaf(&authority.root, &key, DOMAIN, Some(&evidence), now()).unwrap();
    let tls = authority.tls_with(&leaf, &key);
    let mut script = Script::honest(&authority);
    script.tls = [Some(Arc::clone(&tls)), Some(tls)];
    let stage = script.start().await;
    assert_eq!(untrusted(fetch(&config(&[stage.url()], trust())).await), "server-policy");
    assert!(stage.calls().is_empty());
}

#[tokio::test]
async fn answers_that_are_none_end_the_run() {
    let authority = Authority::new(KMS);
    let endless = b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n".to_vec();
    for (answer, exit) in [
        (Answer::Http("200 OK", "", b"{\"ca_cert\":".to_vec()), Exit::Internal),
        (Answer::Http("200 OK", "", b"null".to_vec()), Exit::Internal),
        (Answer::Http("200 OK", "", b"{}".to_vec()), Exit::Internal),
        (Answer::Http("302 Found", "location: https://evil.example/\r\n", vec![]), Exit::Internal),
        (Answer::Http("404 Not Found", "", b"<html>".to_vec()), Exit::Internal),
        (Answer::RawThenHang(endless), Exit::Internal),
        (Answer::RawThenHang(b"SSH-2.0-x\r\n\r\n".to_vec()), Exit::Internal),
        (Answer::Http("400 Bad Request", "", br#"{"error":"Boot denied: no"}"#.to_vec()), Exit::Refused),
    ] {
        for method in ["GetTempCaCert", "GetAppKey"] {
            let (result, stage) = play(Script::honest(&authority).with(method, answer.clone())).await;
            let error = refused(result);
            assert_eq!(error.exit(), exit, "{method}: {error}");
            assert!(error.hint().is_some(), "{error}");
            let asked = stage.calls().iter().filter(|call| *call == method).count();
            assert_eq!(asked, 1, "{method} was asked again after: {error}");
        }
    }
}

#[tokio::test]
async fn a_refusal_shows_the_kmss_reason() {
    let body = br#"{"error":"App not allowed: Boot denied: App not registered"}"#.to_vec();
    let script =
        Script::honest(&Authority::new(KMS)).with("GetAppKey", Answer::Http("400 Bad Request", "", body));
    let Error::Call { source: HttpError::Refused { reason, .. }, .. } = refused(play(script).await.0) else {
        panic!("not a refusal")
    };
    assert_eq!(reason, "App not allowed: Boot denied: App not registered");
}

#[tokio::test]
async fn a_busy_or_broken_kms_is_asked_again_with_new_evidence() {
    for first in [Answer::Http("503 Service Unavailable", "retry-after: 0\r\n", vec![]), Answer::Close] {
        let authority = Authority::new(KMS);
        let script = Script::honest(&authority);
        script.first_app_key_answers.lock().unwrap().push(first);
        let (result, stage) = play(script).await;
        assert!(result.is_ok());
        let evidence = stage.evidence();
        assert_eq!(evidence.len(), 2);
        assert_ne!(evidence[0].spki_der(), evidence[1].spki_der());
        assert_ne!(evidence[0].attestation().platform, evidence[1].attestation().platform);
    }
}

#[tokio::test]
async fn attempts_end() {
    let busy = Answer::Http("503 Service Unavailable", "", vec![]);
    let (result, stage) = play(Script::honest(&Authority::new(KMS)).with("GetTempCaCert", busy)).await;
    let error = refused(result);
    assert!(matches!(error, Error::GaveUp { attempts: 3, .. }), "{error}");
    assert_eq!(error.exit(), Exit::NoAnswer);
    assert_eq!(stage.calls().len(), 3);
}

#[tokio::test]
async fn a_replica_that_is_down_is_passed_over() {
    let authority = Authority::new(KMS);
    let gone = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), BindOptions::default()).await.unwrap();
    let gone_url = format!("https://{}", gone.endpoint().to_string().strip_prefix("tcp:").unwrap());
    drop(gone);
    let stage = Script::honest(&authority).start().await;
    assert!(fetch(&config(&[gone_url.clone(), stage.url()], authority.trust())).await.is_ok());
    let error = refused(fetch(&config(&[gone_url], authority.trust())).await);
    assert_eq!(error.exit(), Exit::NoAnswer);
    assert!(error.hint().is_some());
}

#[tokio::test]
async fn a_kms_that_hangs_at_any_step_meets_a_deadline() {
    let authority = Authority::new(KMS);
    let hang = |bytes: &[u8]| Answer::RawThenHang(bytes.to_vec());
    let half = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{";
    let mut silent = Script::honest(&authority);
    // Plain HTTP that waits for a call: to a TLS client it is a peer that says nothing.
    silent.tls = [None, None];
    let scripts = [
        silent,
        Script::honest(&authority).with("GetTempCaCert", hang(b"")),
        Script::honest(&authority).with("GetTempCaCert", hang(half)),
        Script::honest(&authority).with("GetMeta", hang(b"HTTP/1.1 200")),
        Script::honest(&authority).with("GetAppKey", hang(b"")),
        Script::honest(&authority).with("GetAppKey", hang(half)),
    ];
    for script in scripts {
        let stage = script.start().await;
        let mut config = config(&[stage.url()], authority.trust());
        config.retry.attempts = 1;
        config.deadlines.handshake = Duration::from_millis(500);
        config.deadlines.request = Duration::from_millis(100);
        let error = refused(fetch(&config).await);
        assert_eq!(error.exit(), Exit::NoAnswer, "{error}");
        config.deadlines.request = Duration::from_secs(3600);
        config.deadlines.handshake = Duration::from_secs(3600);
        config.deadlines.total = Duration::from_millis(500);
        let error = refused(fetch(&config).await);
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        assert_eq!(error.exit(), Exit::NoAnswer);
    }
}

#[tokio::test]
async fn a_plain_http_port_is_named_as_such() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), BindOptions::default()).await.unwrap();
    let url = format!("https://{}", listener.endpoint().to_string().strip_prefix("tcp:").unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _written = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
            let _read = stream.read_to_end(&mut Vec::new()).await;
        }
    });
    let error = refused(fetch(&config(&[url], Authority::new(KMS).trust())).await);
    assert!(matches!(error, Error::NotTls { .. }), "{error}");
    assert!(error.hint().is_some());
}

#[tokio::test]
async fn pitfall_28_a_debug_enclave_asks_for_no_keys() {
    let authority = Authority::new(KMS);
    let mut answer = authority.app_keys();
    answer.os_image_hash = vec![0; 32];
    let stage = Script::honest(&authority).with("GetAppKey", Answer::ok(&answer)).start().await;
    let enclave = Enclave::start(Config { pcrs: BTreeMap::new(), ..Config::default() }).await;
    let mut config = config(&[stage.url()], authority.trust());
    let error = refused(get_keys(&config, &enclave.nsm, &mut |_| {}).await);
    assert!(matches!(error, Error::Evidence(EvidenceError::Debug)), "{error}");
    assert_eq!((error.exit(), stage.calls().len()), (Exit::Refused, 0));
    config.debug_mode = DebugMode::DangerAllow;
    assert!(get_keys(&config, &enclave.nsm, &mut |_| {}).await.is_ok());
}

#[tokio::test]
async fn pitfall_25_a_clock_far_from_the_nsms_is_refused() {
    let authority = Authority::new(KMS);
    let stage = Script::honest(&authority).start().await;
    for offset in [-86_400, 86_400] {
        let enclave = Enclave::start(Config { clock: system_clock(offset), ..Config::default() }).await;
        let config = config(&[stage.url()], authority.trust());
        let error = refused(get_keys(&config, &enclave.nsm, &mut |_| {}).await);
        assert!(matches!(error, Error::Evidence(EvidenceError::ClockSkew { .. })), "{error}");
        assert_eq!(error.exit(), Exit::Refused);
    }
    assert!(stage.calls().is_empty());
}

/// A proxy on a Unix socket that answers with this head, and relays when it is a 200.
async fn proxy(head: &'static str, target: Endpoint) -> (tempfile::TempDir, Endpoint) {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::unix(dir.path().join("proxy")).unwrap();
    let listener = Listener::bind(&endpoint, BindOptions::default()).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let target = target.clone();
            tokio::spawn(async move {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(client.read_u8().await.unwrap());
                }
                let wanted = target.to_string().replace("tcp:", "CONNECT ");
                assert!(String::from_utf8(request).unwrap().starts_with(&wanted));
                client.write_all(head.as_bytes()).await.unwrap();
                if head.contains(" 200 ") {
                    let mut upstream = target.connect(Duration::from_secs(5)).await.unwrap();
                    let _relayed = copy_bidirectional(&mut client, &mut upstream).await;
                }
            });
        }
    });
    (dir, endpoint)
}

#[tokio::test]
async fn the_trip_goes_through_a_proxy() {
    let authority = Authority::new(KMS);
    let stage = Script::honest(&authority).start().await;
    let mut config = config(&[stage.url()], authority.trust());
    let (_dir, endpoint) = proxy("HTTP/1.1 200 OK\r\n\r\n", stage.endpoint.clone()).await;
    config.proxy = Proxy::Endpoint(endpoint);
    assert!(fetch(&config).await.is_ok());

    for (head, exit) in [
        ("HTTP/1.1 403 Forbidden\r\n\r\n", Exit::Refused),
        ("HTTP/1.1 502 Bad Gateway\r\n\r\n", Exit::NoAnswer),
    ] {
        let (_dir, endpoint) = proxy(head, stage.endpoint.clone()).await;
        config.proxy = Proxy::Endpoint(endpoint);
        let error = refused(fetch(&config).await);
        assert_eq!(error.exit(), exit, "{error}");
        assert!(error.hint().is_some());
    }
}
