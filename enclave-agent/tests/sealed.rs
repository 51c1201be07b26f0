//! Sealed release from the enclave's side against scripted peers: what is believed, and what is refused.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]
#![allow(dead_code, reason = "each test program uses its part of the support")]

mod support;

use command_line::Exit;
use enclave_agent::{Error, GetKeys, HttpError, Keys, KmsTrust, SealedRelease, get_keys};
use kms_protocol::InstanceId;
use kms_protocol::derive::sign_sealed_app_keys;
use kms_protocol::sealed::Binding;
use kms_protocol::wire::{ChallengeResponse, SealedAppKeyResponse};
use nsm_emulator::Config;
use support::{APP, Answer, Authority, Enclave, Script, Stage, config};

const KMS: u8 = 7;

async fn fetch(config: &GetKeys) -> Result<Keys, Error> {
    let enclave = Enclave::start(Config::default()).await;
    get_keys(config, &enclave.nsm, &mut |_| {}).await
}

async fn play(script: Script, sealed: SealedRelease) -> (Error, Stage) {
    let stage = script.start().await;
    let config = GetKeys { sealed, ..config(&[stage.url()], Authority::new(KMS).trust()) };
    let Err(error) = fetch(&config).await else { panic!("got keys") };
    (error, stage)
}

fn challenge() -> ChallengeResponse {
    ChallengeResponse { version: 1, nonce: vec![7; 32], valid_for: 60 }
}

/// A KMS that offers sealed release and answers with this.
fn offering(answer: &SealedAppKeyResponse) -> Script {
    Script::honest(&Authority::new(KMS))
        .with("GetChallenge", Answer::ok(&challenge()))
        .with("GetAppKeySealed", Answer::ok(answer))
}

fn refusal(text: &str) -> Answer {
    Answer::Http("400 Bad Request", "", format!("{{\"error\":\"{text}\"}}").into_bytes())
}

#[tokio::test]
async fn a_kms_without_sealed_release_is_refused_by_who_requires_it() {
    let (error, stage) = play(Script::honest(&Authority::new(KMS)), SealedRelease::Require).await;
    assert!(matches!(error, Error::NotSealed { .. }), "{error}");
    assert_eq!(error.exit(), Exit::Refused);
    assert!(error.hint().unwrap().contains("core.sealed_release"));
    assert_eq!(stage.calls(), ["GetTempCaCert", "GetMeta", "GetChallenge"]);
    assert!(stage.evidence().is_empty(), "no evidence was shown to a KMS that is not asked for keys");
}

/// A refusal is a refusal, not the absence of the method.
#[tokio::test]
async fn other_refusals_of_a_challenge_lead_to_no_other_exchange() {
    for text in [
        "Service not found: GetAppKey",
        "service not found: GetChallenge",
        "Unsupported sealed release version: 1 (this KMS speaks 2)",
    ] {
        let script = Script::honest(&Authority::new(KMS)).with("GetChallenge", refusal(text));
        let (error, stage) = play(script, SealedRelease::Prefer).await;
        assert!(matches!(&error, Error::Call { source: HttpError::Refused { .. }, .. }), "{text}: {error}");
        assert!(!stage.calls().contains(&"GetAppKey".to_owned()), "{text}");
    }
}

#[tokio::test]
async fn challenges_that_are_none_end_the_run() {
    for answer in [
        ChallengeResponse { version: 2, ..challenge() },
        ChallengeResponse { version: 0, ..challenge() },
        ChallengeResponse { nonce: vec![], ..challenge() },
        ChallengeResponse { nonce: vec![7; 31], ..challenge() },
        ChallengeResponse { nonce: vec![7; 512], ..challenge() },
    ] {
        let script = Script::honest(&Authority::new(KMS)).with("GetChallenge", Answer::ok(&answer));
        let (error, stage) = play(script, SealedRelease::Prefer).await;
        assert!(matches!(&error, Error::Answer { method: "GetChallenge", .. }), "{answer:?}: {error}");
        assert_eq!(stage.calls().len(), 3);
    }
}

/// The script cannot know the enclave's key, so all it can do is guess, or sign with another key.
#[tokio::test]
async fn answers_that_the_root_key_did_not_sign_are_refused_before_they_are_opened() {
    let impostor = Authority::new(70);
    let commitment = Binding {
        nonce: &[7; 32],
        public_key: &[1; 32],
        app_id: &APP,
        instance_id: &InstanceId::NONE,
        root_ca_spki: b"",
        root_k256: &impostor.roots.k256_public_key(),
        exporter: &kms_protocol::sealed::Exporter([0; 32]),
    }
    .commitment();
    let whole = SealedAppKeyResponse { enc: vec![9; 32], ciphertext: vec![1; 600], signature: vec![0; 65] };
    let signed = |authority: &Authority| {
        let signature = sign_sealed_app_keys(&authority.roots, &commitment, &[9; 32], &[1; 600]);
        SealedAppKeyResponse { signature: signature.as_bytes().to_vec(), ..whole.clone() }
    };
    for answer in [
        // The KMS's own key over another commitment: an answer of another connection.
        signed(&Authority::new(KMS)),
        signed(&impostor),
        whole.clone(),
        SealedAppKeyResponse { signature: vec![], ..whole.clone() },
        SealedAppKeyResponse { signature: vec![1; 64], ..whole.clone() },
    ] {
        let (error, _) = play(offering(&answer), SealedRelease::Prefer).await;
        assert!(matches!(error, Error::SealedSignature { .. }), "{error}");
        assert_eq!(error.exit(), Exit::Refused);
        assert!(error.hint().is_some());
    }
    for answer in [
        SealedAppKeyResponse { enc: vec![9; 31], ..whole.clone() },
        SealedAppKeyResponse { enc: vec![], ..whole.clone() },
        SealedAppKeyResponse { ciphertext: vec![1; 65_537], ..whole },
    ] {
        let (error, _) = play(offering(&answer), SealedRelease::Prefer).await;
        assert!(matches!(&error, Error::Answer { method: "GetAppKeySealed", .. }), "{error}");
    }
}

/// The parent leads the second attempt to a replica of the same root that knows upstream's exchange only.
#[tokio::test]
async fn a_downgrade_within_one_run_is_noticed() {
    let authority = Authority::new(KMS);
    let busy = Answer::Http("503 Service Unavailable", "", vec![]);
    let modern = Script::honest(&authority)
        .with("GetChallenge", Answer::ok(&challenge()))
        .with("GetAppKeySealed", busy)
        .start()
        .await;
    let old = Script::honest(&authority).start().await;
    let config = config(&[modern.url(), old.url()], authority.trust());
    let Err(error) = fetch(&config).await else { panic!("got keys") };
    assert!(matches!(error, Error::SealedWithdrawn { .. }), "{error}");
    assert_eq!((error.exit(), error.hint().is_some()), (Exit::Refused, true));
    assert!(!old.calls().contains(&"GetAppKey".to_owned()));
}

/// Without a pinned root the keys come on a connection of their own, which is asked for a challenge again.
#[tokio::test]
async fn an_offer_on_the_first_connection_binds_the_second() {
    let authority = Authority::new(KMS);
    let stage = offering(&SealedAppKeyResponse::default()).start().await;
    let trust = KmsTrust::anchored(None, None, Some(authority.roots.k256_public_key())).unwrap();
    let Err(error) = fetch(&config(&[stage.url()], trust)).await else { panic!("got keys") };
    assert!(matches!(error, Error::Answer { method: "GetAppKeySealed", .. }), "{error}");
    assert_eq!(stage.calls(), ["GetTempCaCert", "GetChallenge", "GetChallenge", "GetAppKeySealed"]);
    assert!(stage.evidence().is_empty(), "no certificate is shown");
}

/// Somebody on the way who has the app's k256 key, from an instance that was taken over, and wants another instance to
/// encrypt its disk with a key he knows. The enclave pins the root k256 key alone, so TLS tells it nothing.
#[tokio::test]
async fn with_the_root_k256_key_alone_only_sealed_release_covers_the_other_keys() {
    let (kms, insider) = (Authority::new(KMS), Authority::new(70));
    let forged = [0x66; 32];
    let mut answer = kms.app_keys();
    answer.ca_cert.clone_from(&insider.root_pem);
    answer.disk_crypt_key = forged.to_vec();
    let trust = || KmsTrust::anchored(None, None, Some(kms.roots.k256_public_key())).unwrap();

    let stage = Script::honest(&insider).with("GetAppKey", Answer::ok(&answer)).start().await;
    let keys = fetch(&config(&[stage.url()], trust())).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(keys.app_keys().disk_crypt_key.expose(), &forged, "upstream's exchange gives this away");

    let required = GetKeys { sealed: SealedRelease::Require, ..config(&[stage.url()], trust()) };
    let Err(error) = fetch(&required).await else { panic!("got keys") };
    assert!(matches!(error, Error::NotSealed { .. }), "{error}");

    let sealed = SealedAppKeyResponse { enc: vec![9; 32], ciphertext: vec![1; 600], signature: vec![0; 65] };
    let stage = Script::honest(&insider)
        .with("GetChallenge", Answer::ok(&challenge()))
        .with("GetAppKeySealed", Answer::ok(&sealed))
        .start()
        .await;
    let required = GetKeys { sealed: SealedRelease::Require, ..config(&[stage.url()], trust()) };
    let Err(error) = fetch(&required).await else { panic!("got keys") };
    assert!(matches!(error, Error::SealedSignature { .. }), "{error}");
}
