//! Sealed release over real sockets: who gets keys, and what every attacker of docs/sealed-release.md gets from either
//! exchange.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use attestation::UnixMillis;
use bytes::Bytes;
use common::{APP, Ask, DEADLINE, Told, World};
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use kms_protocol::attestation_encoding::Attestation;
use kms_protocol::derive::{K256PublicKey, Signature, verify_sealed_app_keys};
use kms_protocol::sealed::{Binding, Commitment, Exporter, NONCE_LEN};
use kms_protocol::wire::{
    AppKeyResponse, ChallengeResponse, Encoding, SealedAppKeyRequest, SealedAppKeyResponse, WireMessage, json,
};
use kms_protocol::{AppId, InstanceId, report_data};
use kms_server::Server;
use nsm_emulator::Emulator;
use prost::Message as _;
use ratls::client::PinnedRoot;
use ratls::issue::{self, KeyPair};
use ratls::sealed::{RecipientKey, Sealed, exporter};

const SEALED: &str = "/prpc/GetAppKeySealed?json";

/// A TLS connection that lasts for several calls, as sealed release needs it.
struct Line {
    sender: SendRequest<Full<Bytes>>,
    exporter: Exporter,
}

impl Line {
    async fn open(world: &World) -> Self {
        let stream = common::connect(&world.kms, None, &["http/1.1"]).await.unwrap();
        let exporter = exporter(stream.get_ref().1).unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self { sender, exporter }
    }

    async fn call(&mut self, path: &str, body: Vec<u8>) -> Told {
        let request = Request::post(path).header("host", "localhost").body(Full::new(body.into())).unwrap();
        let exchange = async {
            let response = self.sender.send_request(request).await.unwrap();
            let (parts, body) = response.into_parts();
            let content_type = parts.headers["content-type"].to_str().unwrap().to_owned();
            let body = body.collect().await.unwrap().to_bytes().to_vec();
            Told { status: parts.status.as_u16(), content_type, headers: parts.headers, body }
        };
        tokio::time::timeout(DEADLINE, exchange).await.unwrap()
    }

    async fn challenge(&mut self) -> [u8; NONCE_LEN] {
        let told = self.call("/prpc/GetChallenge?json", br#"{"version":1}"#.to_vec()).await;
        assert_eq!(told.status, 200, "{told:?}");
        let answer: ChallengeResponse = json::decode(&told.body).unwrap();
        assert_eq!((answer.version, answer.valid_for), (1, 60));
        answer.nonce.try_into().unwrap()
    }

    async fn release(&mut self, request: &SealedAppKeyRequest) -> Told {
        self.call(SEALED, json::encode(request)).await
    }
}

/// What an enclave puts into its evidence; a test changes one thing.
struct Claim {
    nonce: [u8; NONCE_LEN],
    key: RecipientKey,
    app_id: AppId,
    instance_id: InstanceId,
    root_ca_spki: Vec<u8>,
    root_k256: K256PublicKey,
    exporter: Exporter,
}

impl Claim {
    async fn new(world: &World, line: &mut Line) -> Self {
        Self {
            nonce: line.challenge().await,
            key: RecipientKey::generate().unwrap(),
            app_id: APP,
            instance_id: InstanceId::NONE,
            root_ca_spki: PinnedRoot::from_pem(world.kms.root_ca_pem()).unwrap().spki_der().to_vec(),
            root_k256: K256PublicKey::from_sec1(&world.kms.k256_public_key()).unwrap(),
            exporter: line.exporter,
        }
    }

    fn commitment(&self) -> Commitment {
        Binding {
            nonce: &self.nonce,
            public_key: self.key.public_key(),
            app_id: &self.app_id,
            instance_id: &self.instance_id,
            root_ca_spki: &self.root_ca_spki,
            root_k256: &self.root_k256,
            exporter: &self.exporter,
        }
        .commitment()
    }

    fn fields(&self) -> [Option<Vec<u8>>; 3] {
        let commitment = self.commitment().as_bytes().to_vec();
        [Some(commitment), Some(self.nonce.to_vec()), Some(self.key.public_key().to_vec())]
    }

    fn request(&self, emulator: &Emulator) -> SealedAppKeyRequest {
        let [user_data, nonce, public_key] = self.fields();
        self.request_with(common::document_of(emulator, user_data, nonce, public_key))
    }

    fn request_with(&self, document: Vec<u8>) -> SealedAppKeyRequest {
        SealedAppKeyRequest {
            version: 1,
            document,
            app_id: self.app_id.as_bytes().to_vec(),
            instance_id: self.instance_id.as_bytes().to_vec(),
        }
    }

    /// What the enclave makes of an answer.
    fn open(self, told: &Told) -> AppKeyResponse {
        assert_eq!(told.status, 200, "{told:?}");
        let answer: SealedAppKeyResponse = json::decode(&told.body).unwrap();
        self.open_message(answer)
    }

    fn open_message(self, answer: SealedAppKeyResponse) -> AppKeyResponse {
        let commitment = self.commitment();
        let sealed = Sealed { enc: answer.enc.try_into().unwrap(), ciphertext: answer.ciphertext };
        let signature = Signature::from_slice(&answer.signature).unwrap();
        verify_sealed_app_keys(&self.root_k256, &commitment, &sealed.enc, &sealed.ciphertext, &signature)
            .unwrap();
        let plain = self.key.open(&commitment, &sealed).unwrap();
        AppKeyResponse::decode_body(Encoding::Protobuf, &plain).unwrap()
    }
}

#[tokio::test]
async fn sealed_keys_are_the_ones_of_upstreams_exchange() {
    let world = World::with_policy("").await;
    let upstream = world.app_key(&world.certificate().await).await.json();

    let mut line = Line::open(&world).await;
    let claim = Claim::new(&world, &mut line).await;
    let told = line.release(&claim.request(&world.emulator)).await;
    let keys = claim.open(&told);
    for (name, sealed) in [
        ("disk_crypt_key", &keys.disk_crypt_key),
        ("env_crypt_key", &keys.env_crypt_key),
        ("k256_key", &keys.k256_key),
        ("k256_signature", &keys.k256_signature),
        ("os_image_hash", &keys.os_image_hash),
    ] {
        let sealed = hex::encode(sealed);
        assert_eq!(upstream[name], *sealed, "{name}");
        assert!(!String::from_utf8_lossy(&told.body).contains(&sealed), "{name} is in the answer");
    }
    assert_eq!(upstream["ca_cert"], keys.ca_cert);

    // Again on the same connection, in protobuf, for an instance.
    let mut claim = Claim::new(&world, &mut line).await;
    claim.instance_id = InstanceId::new([0x33; 20]);
    let told = line.call("/prpc/KMS.GetAppKeySealed", claim.request(&world.emulator).encode_to_vec()).await;
    assert_eq!((told.status, told.content_type.as_str()), (200, "application/octet-stream"), "{told:?}");
    let of_instance = claim.open_message(SealedAppKeyResponse::decode(told.body.as_slice()).unwrap());
    assert_ne!(of_instance.disk_crypt_key, keys.disk_crypt_key);
    assert_eq!(of_instance.k256_key, keys.k256_key);
}

#[tokio::test]
async fn an_authoriser_that_says_no_is_obeyed() {
    let world = World::with_policy("").await;
    let mut line = Line::open(&world).await;
    let mut claim = Claim::new(&world, &mut line).await;
    claim.app_id = AppId::new([0x12; 20]);
    let told = line.release(&claim.request(&world.emulator)).await;
    assert_eq!(
        (told.status, told.error().as_str()),
        (400, "App not allowed: Boot denied: app not registered")
    );

    let world = World::with_policy("core.nitro_enclave_key_release = false\n").await;
    let mut line = Line::open(&world).await;
    let claim = Claim::new(&world, &mut line).await;
    let told = line.release(&claim.request(&world.emulator)).await;
    assert!(told.error().contains("core.nitro_enclave_key_release"), "{told:?}");
}

const UNKNOWN: &str =
    "challenge refused: the nonce is not one that this connection was given and has not used";
const NOT_BOUND: &str = "invalid document: it is not bound to this request";

#[tokio::test]
async fn a_nonce_is_good_once() {
    let world = World::with_policy("").await;
    let mut line = Line::open(&world).await;
    let claim = Claim::new(&world, &mut line).await;
    let request = claim.request(&world.emulator);
    assert_eq!(line.release(&request).await.status, 200);
    assert_eq!(line.release(&request).await.error(), UNKNOWN);

    // A refused request has used its nonce up as well.
    let claim = Claim::new(&world, &mut line).await;
    let good = claim.request(&world.emulator);
    let bad = SealedAppKeyRequest { app_id: vec![0x12; 20], ..good.clone() };
    assert!(line.release(&bad).await.error().starts_with(NOT_BOUND));
    assert_eq!(line.release(&good).await.error(), UNKNOWN);
}

#[tokio::test]
async fn a_nonce_dies_with_time_and_with_its_connection() {
    let directory = tempfile::tempdir().unwrap();
    let emulator = Emulator::new(nsm_emulator::Config::default()).unwrap();
    let start = nsm_emulator::system_clock(0)();
    let millis = Arc::new(AtomicU64::new(start));
    let clock = {
        let millis = Arc::clone(&millis);
        Arc::new(move || UnixMillis(millis.load(Ordering::SeqCst)))
    };
    let more = common::policy(&directory);
    let kms = Server::start_at(common::settings(&directory, &emulator, &more), clock).await.unwrap();
    let world = World { kms, emulator, directory };
    let expired = "challenge refused: the nonce is older than 60 seconds";
    for (passed, expected) in [(60_000, None), (60_001, Some(expired)), (-1, Some(expired))] {
        millis.store(start, Ordering::SeqCst);
        let mut line = Line::open(&world).await;
        let claim = Claim::new(&world, &mut line).await;
        millis.store(start.checked_add_signed(passed).unwrap(), Ordering::SeqCst);
        let told = line.release(&claim.request(&world.emulator)).await;
        assert_eq!((told.status != 200).then(|| told.error()).as_deref(), expected, "{passed}");
    }
    millis.store(start, Ordering::SeqCst);
    let mut line = Line::open(&world).await;
    let claim = Claim::new(&world, &mut line).await;
    drop(line);
    let mut line = Line::open(&world).await;
    assert_eq!(line.release(&claim.request(&world.emulator)).await.error(), UNKNOWN);
}

#[tokio::test]
async fn a_greedy_peer_pushes_out_only_its_own_challenges() {
    let world = World::with_policy("").await;
    let mut patient = Line::open(&world).await;
    let claim = Claim::new(&world, &mut patient).await;
    let mut greedy = Line::open(&world).await;
    let first = Claim::new(&world, &mut greedy).await;
    let mut last = None;
    for _ in 0..200 {
        last = Some(Claim::new(&world, &mut greedy).await);
    }
    assert_eq!(greedy.release(&first.request(&world.emulator)).await.error(), UNKNOWN);
    let last = last.unwrap();
    assert_eq!(greedy.release(&last.request(&world.emulator)).await.status, 200);
    assert_eq!(patient.release(&claim.request(&world.emulator)).await.status, 200);
}

/// Every bound value, changed in the evidence.
#[tokio::test]
async fn evidence_for_anything_else_is_refused() {
    let world = World::with_policy("").await;
    let other_kms = World::with_policy("").await;
    let mut line = Line::open(&world).await;
    let elsewhere = Line::open(&world).await;
    type Change = fn(&mut Claim, &World, &Line);
    let changes: [(&str, Change); 7] = [
        ("nothing", |_, _, _| {}),
        ("another app", |claim, _, _| claim.app_id = AppId::new([0x12; 20])),
        ("another instance", |claim, _, _| claim.instance_id = InstanceId::new([7; 20])),
        ("another connection", |claim, _, elsewhere| claim.exporter = elsewhere.exporter),
        ("another root CA", |claim, other, _| {
            claim.root_ca_spki = PinnedRoot::from_pem(other.kms.root_ca_pem()).unwrap().spki_der().to_vec();
        }),
        ("another root k256 key", |claim, other, _| {
            claim.root_k256 = K256PublicKey::from_sec1(&other.kms.k256_public_key()).unwrap();
        }),
        ("another key", |claim, _, _| claim.key = RecipientKey::generate().unwrap()),
    ];
    for (what, change) in changes {
        let honest = Claim::new(&world, &mut line).await;
        let mut claim = Claim { key: RecipientKey::generate().unwrap(), ..honest };
        let [_, nonce, public_key] = claim.fields();
        change(&mut claim, &other_kms, &elsewhere);
        // The document commits to the changed value; the request and the document's other fields are the honest ones.
        let [user_data, ..] = claim.fields();
        let document = common::document_of(&world.emulator, user_data, nonce, public_key);
        claim.app_id = APP;
        claim.instance_id = InstanceId::NONE;
        let told = line.release(&claim.request_with(document)).await;
        if what == "nothing" {
            assert_eq!(told.status, 200, "{told:?}");
        } else {
            assert!(told.error().starts_with(NOT_BOUND), "{what}: {told:?}");
        }
    }
    // A document made for the other KMS, complete and honest, with that KMS's nonce.
    let mut there = Line::open(&other_kms).await;
    let claim = Claim::new(&other_kms, &mut there).await;
    assert_eq!(line.release(&claim.request(&other_kms.emulator)).await.error(), UNKNOWN);
}

#[tokio::test]
async fn requests_that_are_none_are_refused() {
    let world = World::with_policy("").await;
    let mut line = Line::open(&world).await;
    for version in [0, 2, u32::MAX] {
        let expected = format!("Unsupported sealed release version: {version} (this KMS speaks 1)");
        let told = line.call("/prpc/GetChallenge?json", format!("{{\"version\":{version}}}").into()).await;
        assert_eq!((told.status, told.error()), (400, expected.clone()));
        let claim = Claim::new(&world, &mut line).await;
        let request = SealedAppKeyRequest { version, ..claim.request(&world.emulator) };
        assert_eq!(line.release(&request).await.error(), expected);
    }
    let claim = Claim::new(&world, &mut line).await;
    let good = claim.request(&world.emulator);
    let [user_data, nonce, public_key] = claim.fields();
    let document = |user_data, nonce, public_key| {
        claim.request_with(common::document_of(&world.emulator, user_data, nonce, public_key))
    };
    let with = |change: fn(&mut SealedAppKeyRequest)| {
        let mut request = good.clone();
        change(&mut request);
        request
    };
    let cases = [
        (with(|it| it.app_id = vec![0x11; 19]), "App not allowed: app_id must be 20 bytes"),
        (with(|it| it.app_id = vec![]), "App not allowed: app_id must be 20 bytes"),
        (with(|it| it.instance_id = vec![1]), "App not allowed: instance_id must be 0 or 20 bytes"),
        (with(|it| it.document = vec![]), "invalid document: "),
        (with(|it| it.document = vec![0; 0x3001]), "invalid document: 12289 bytes, expected at most 12288"),
        (document(user_data.clone(), None, public_key.clone()), "invalid document: nonce is absent"),
        (document(user_data.clone(), Some(vec![1; 31]), public_key.clone()), UNKNOWN),
        (document(user_data.clone(), nonce.clone(), None), "invalid document: public_key is absent"),
    ];
    for (request, expected) in cases {
        let told = line.release(&request).await;
        assert!(told.status == 400 && told.error().starts_with(expected), "{expected}: {told:?}");
    }
    // The last one used the nonce up.
    assert_eq!(line.release(&good).await.error(), UNKNOWN);
    for public_key in [vec![1; 31], vec![1; 33], vec![1; 1024]] {
        let claim = Claim::new(&world, &mut line).await;
        let [user_data, nonce, _] = claim.fields();
        let document = common::document_of(&world.emulator, user_data, nonce, Some(public_key));
        let told = line.release(&claim.request_with(document)).await;
        assert!(told.error().starts_with("invalid document: public_key"), "{told:?}");
    }
    let too_long = vec![b' '; (64 << 10) + 1];
    assert_eq!(line.call(SEALED, too_long).await.error(), "failed to read data: payload too large");
}

/// No prefix of a good document passes, and no byte of its signed part can be changed.
#[tokio::test]
async fn documents_that_are_cut_or_changed_are_refused() {
    let world = World::with_policy("").await;
    let mut line = Line::open(&world).await;
    let claim = Claim::new(&world, &mut line).await;
    let good = claim.request(&world.emulator);
    for length in 0..good.document.len() {
        let request = SealedAppKeyRequest { document: good.document[..length].to_vec(), ..good.clone() };
        let told = line.call("/prpc/GetAppKeySealed", request.encode_to_vec()).await;
        assert_eq!(told.status, 400, "a prefix of {length} bytes");
    }
    // None of them decoded, so the nonce is still good.
    assert_eq!(line.release(&good).await.status, 200);
    for at in (0..good.document.len()).step_by(97) {
        let claim = Claim::new(&world, &mut line).await;
        let mut request = claim.request(&world.emulator);
        // In the payload or the signature; the first bytes, partly unsigned, are framing.
        let at = at.max(16);
        request.document[at] ^= 0x01;
        assert_eq!(line.release(&request).await.status, 400, "byte {at}");
    }
}

#[tokio::test]
async fn a_debug_enclave_and_a_foreign_module_get_nothing() {
    let world = World::with_policy("").await;
    let config = nsm_emulator::Config { pcrs: std::collections::BTreeMap::new(), ..Default::default() };
    let foreign = Emulator::new(nsm_emulator::Config::default()).unwrap();
    let debug = world.emulator.another(config).unwrap();
    let mut line = Line::open(&world).await;
    let claim = Claim::new(&world, &mut line).await;
    assert!(line.release(&claim.request(&debug)).await.error().contains("debug mode"));
    let claim = Claim::new(&world, &mut line).await;
    assert!(line.release(&claim.request(&foreign)).await.error().starts_with("invalid quote: "));
}

#[tokio::test]
async fn the_setting_decides_which_exchange_there_is() {
    let world = World::with_policy("core.sealed_release = \"off\"\n").await;
    for method in ["GetChallenge", "GetAppKeySealed"] {
        let told = world.post(&format!("/prpc/{method}?json"), b"{}").await;
        assert_eq!((told.status, told.error()), (400, format!("Service not found: {method}")));
    }
    assert_eq!(world.app_key(&world.certificate().await).await.status, 200);

    let world = World::with_policy("core.sealed_release = \"require\"\n").await;
    let told = world.app_key(&world.certificate().await).await;
    assert!(told.error().contains("only sealed"), "{told:?}");
    let mut line = Line::open(&world).await;
    let claim = Claim::new(&world, &mut line).await;
    let told = line.release(&claim.request(&world.emulator)).await;
    assert_eq!(claim.open(&told).k256_key.len(), 32);
}

/// The attackers of the specification, one after the other, against both exchanges of one KMS. What upstream's gives
/// away is shown to be given away: a table that claims too much would fail here.
mod pitfall_13 {
    use super::*;

    fn app_key(body: &[u8]) -> Option<String> {
        let value: serde_json::Value = serde_json::from_slice(body).ok()?;
        value["k256_key"].as_str().map(str::to_owned)
    }

    /// The private key of the enclave's TLS certificate leaks, and somebody else uses it elsewhere.
    #[tokio::test]
    async fn a_stolen_client_key_opens_the_upstream_exchange_only() {
        let world = World::with_policy("").await;
        let (certificate, key) = world.certificate().await;
        let stolen = (certificate, key);
        let first = world.app_key(&stolen).await;
        let again = world.app_key(&stolen).await;
        assert!(app_key(&again.body).is_some() && app_key(&first.body) == app_key(&again.body));

        // The same loot, in the sealed exchange: it signs nothing there, and the evidence in it has no nonce.
        let mut line = Line::open(&world).await;
        let claim = Claim::new(&world, &mut line).await;
        let report_data = report_data::ratls_cert(&stolen.1.spki_der());
        let loot = common::document(&world.emulator, &report_data);
        assert!(line.release(&claim.request_with(loot)).await.error().contains("nonce is absent"));
    }

    /// An attestation service in the enclave signs whatever `user_data` (or nonce) its caller wants.
    #[tokio::test]
    async fn evidence_on_request_opens_the_upstream_exchange_only() {
        let world = World::with_policy("").await;
        // The attacker's own key, outside any enclave.
        let key = KeyPair::generate().unwrap();
        let report_data = report_data::ratls_cert(&key.spki_der());
        let service = |user_data: &[u8], nonce: Option<&[u8]>| {
            common::document_of(&world.emulator, Some(user_data.to_vec()), nonce.map(<[u8]>::to_vec), None)
        };
        let attestation =
            Attestation::nitro(service(&report_data, None), Some(&APP), report_data, &common::image());
        let encoded = attestation.encode_v0().unwrap();
        let certificate =
            issue::client_certificate(&key, &encoded, Some(&world.temp_ca().await), common::now()).unwrap();
        assert!(app_key(&world.app_key(&(certificate, key)).await.body).is_some());

        let mut line = Line::open(&world).await;
        let claim = Claim::new(&world, &mut line).await;
        let document = service(claim.commitment().as_bytes(), Some(&claim.nonce));
        let told = line.release(&claim.request_with(document)).await;
        assert!(told.error().contains("public_key is absent"), "{told:?}");
    }

    /// Evidence that an enclave made for one connection is carried to another one of the same KMS: by a relay that the
    /// enclave took for the KMS, because it has the KMS's TLS key or because the enclave checks nothing.
    #[tokio::test]
    async fn relayed_evidence_and_relayed_answers_give_nothing() {
        let world = World::with_policy("").await;
        let mut relay = Line::open(&world).await;
        // The enclave's end of its connection to the relay has another exporter; the relay passes nonces on.
        let mut claim = Claim::new(&world, &mut relay).await;
        claim.exporter = Exporter([0x5e; 32]);
        let told = relay.release(&claim.request(&world.emulator)).await;
        assert!(told.error().starts_with(NOT_BOUND), "{told:?}");

        // Even an answer that is let through opens for the enclave alone.
        let claim = Claim::new(&world, &mut relay).await;
        let told = relay.release(&claim.request(&world.emulator)).await;
        let answer: SealedAppKeyResponse = json::decode(&told.body).unwrap();
        let thief = Claim { key: RecipientKey::generate().unwrap(), ..claim };
        let sealed = Sealed { enc: answer.enc.try_into().unwrap(), ciphertext: answer.ciphertext };
        let commitment = thief.commitment();
        assert!(thief.key.open(&commitment, &sealed).is_err());
    }

    /// Everything of one exchange is recorded in plain, as somebody with the KMS's TLS key can, and tried again.
    #[tokio::test]
    async fn a_recording_of_the_upstream_exchange_holds_the_keys_one_of_the_sealed_does_not() {
        let world = World::with_policy("").await;
        let upstream = world.app_key(&world.certificate().await).await;
        let secret = app_key(&upstream.body).unwrap();

        let mut line = Line::open(&world).await;
        let claim = Claim::new(&world, &mut line).await;
        let request = json::encode(&claim.request(&world.emulator));
        let told = line.call(SEALED, request.clone()).await;
        assert_eq!(told.status, 200);
        let recording = [request.as_slice(), &told.body].concat();
        assert!(!String::from_utf8_lossy(&recording).contains(&secret));
        let ask = Ask { verb: "POST", path: SEALED, headers: &[], body: &request, certificate: None };
        assert_eq!(world.ask(ask).await.unwrap().error(), UNKNOWN);
    }
}
