//! Keys that stay in a key service. The stand-ins answer as the published interfaces say (AWS KMS: JSON 1.1 with
//! `X-Amz-Target`; Cloud KMS: `cloudkms` v1) and hold the key that owns the local chain's contracts.

#![cfg(all(feature = "aws-kms", feature = "gcp-kms"))]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test stops where something is wrong, and says what it skips"
)]

mod support;

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chain::local::DEVELOPMENT_KEY;
use k256::ecdsa::signature::hazmat::PrehashSigner;
use k256::ecdsa::{Signature, SigningKey};
use k256::pkcs8::{EncodePublicKey, LineEnding};
use serde_json::{Value, json};
use support::{Chain, Message, Ran, service};

const ONE: &str = "0x1111111111111111111111111111111111111111111111111111111111111111";
const ALIAS: &str = "alias/keyferry-owner";
const VERSION: &str = "projects/p/locations/europe-west1/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1";

fn key() -> SigningKey {
    SigningKey::from_slice(&hex::decode(DEVELOPMENT_KEY).unwrap()).unwrap()
}

/// A signature as key services make them: DER, with whichever of the two values of s; here every other one is high.
fn signature(key: &SigningKey, digest: &[u8]) -> String {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    let low: Signature = key.sign_prehash(digest).unwrap();
    let (r, s) = low.normalize_s().unwrap_or(low).split_scalars();
    let s = if MADE.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) { -s } else { s };
    STANDARD.encode(Signature::from_scalars(r, s).unwrap().to_der().as_bytes())
}

fn digest(text: &Value) -> Vec<u8> {
    let digest = STANDARD.decode(text.as_str().unwrap()).unwrap();
    assert_eq!(digest.len(), 32);
    digest
}

/// What the stand-in does instead of its duty.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    WrongKind,
    NoPermission,
    SignsAsAnother,
    SignsNothing,
    Hangs,
}

fn signer(fault: Fault) -> SigningKey {
    if fault == Fault::SignsAsAnother { SigningKey::from_slice(&[9; 32]).unwrap() } else { key() }
}

fn aws(fault: Fault) -> String {
    service(move |asked: &Message| {
        assert_eq!(asked.first_line, "POST / HTTP/1.1");
        assert_eq!(asked.headers["content-type"], "application/x-amz-json-1.1");
        let authorization = &asked.headers["authorization"];
        assert!(authorization.starts_with("AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/"), "{authorization}");
        assert!(authorization.contains("/eu-west-1/kms/aws4_request"), "{authorization}");
        let body: Value = serde_json::from_slice(&asked.body).unwrap();
        assert_eq!(body["KeyId"], ALIAS);
        let der = STANDARD.encode(key().verifying_key().to_public_key_der().unwrap().as_bytes());
        let spec = if fault == Fault::WrongKind { "ECC_NIST_P256" } else { "ECC_SECG_P256K1" };
        match asked.headers["x-amz-target"].as_str() {
            _ if fault == Fault::NoPermission => Some((
                400,
                json!({ "__type": "AccessDeniedException", "Message": "not authorized to perform it" }),
            )),
            "TrentService.GetPublicKey" => Some((
                200,
                json!({
                    "KeyId": ALIAS, "PublicKey": der, "KeySpec": spec, "CustomerMasterKeySpec": spec,
                    "KeyUsage": "SIGN_VERIFY", "SigningAlgorithms": ["ECDSA_SHA_256"],
                }),
            )),
            "TrentService.Sign" => {
                assert_eq!(body["MessageType"], "DIGEST");
                assert_eq!(body["SigningAlgorithm"], "ECDSA_SHA_256");
                let made = signature(&signer(fault), &digest(&body["Message"]));
                match fault {
                    Fault::Hangs => None,
                    Fault::SignsNothing => Some((200, json!({ "KeyId": ALIAS }))),
                    _ => Some((200, json!({ "KeyId": ALIAS, "Signature": made }))),
                }
            }
            other => panic!("{other} is not asked for"),
        }
    })
}

fn with_aws(chain: &Chain, url: &str, arguments: &[&str]) -> Ran {
    let mut command = chain.command(&chain.url, &[arguments, &["--aws-kms", ALIAS, "--yes"]].concat());
    command.env_remove("PRIVATE_KEY").env("AWS_ENDPOINT_URL_KMS", url).env("AWS_REGION", "eu-west-1");
    command.env("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE").env("AWS_SECRET_ACCESS_KEY", "secret");
    Ran::from(command.output().unwrap())
}

/// Cloud KMS and the token endpoint of a service account in one.
fn gcp(fault: Fault) -> String {
    let (publics, signs) = (
        format!("GET /v1/{VERSION}/publicKey HTTP/1.1"),
        format!("POST /v1/{VERSION}:asymmetricSign HTTP/1.1"),
    );
    service(move |asked: &Message| {
        if asked.first_line.starts_with("POST /token ") {
            let body = String::from_utf8_lossy(&asked.body);
            assert!(body.contains("grant-type%3Ajwt-bearer"), "{body}");
            return Some((
                200,
                json!({ "access_token": "a-token", "expires_in": 3600, "token_type": "Bearer" }),
            ));
        }
        assert_eq!(asked.headers["authorization"], "Bearer a-token");
        let pem = key().verifying_key().to_public_key_pem(LineEnding::LF).unwrap();
        match fault {
            Fault::NoPermission => {
                let message = "Permission 'cloudkms.cryptoKeyVersions.viewPublicKey' denied";
                let error = json!({ "code": 403, "status": "PERMISSION_DENIED", "message": message });
                Some((403, json!({ "error": error })))
            }
            _ if asked.first_line == publics => {
                let algorithm = if fault == Fault::WrongKind {
                    "EC_SIGN_P256_SHA256"
                } else {
                    "EC_SIGN_SECP256K1_SHA256"
                };
                Some((
                    200,
                    json!({ "name": VERSION, "pem": pem, "algorithm": algorithm, "protectionLevel": "HSM" }),
                ))
            }
            Fault::Hangs => None,
            Fault::SignsNothing => Some((200, json!({ "name": VERSION }))),
            _ => {
                assert_eq!(asked.first_line, signs);
                let body: Value = serde_json::from_slice(&asked.body).unwrap();
                assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
                let made = signature(&signer(fault), &digest(&body["digest"]["sha256"]));
                Some((200, json!({ "name": VERSION, "signature": made, "protectionLevel": "HSM" })))
            }
        }
    })
}

fn with_gcp(chain: &Chain, url: &str, arguments: &[&str]) -> Ran {
    let account = chain.folder.path().join("service-account.json");
    let text = json!({
        "type": "service_account", "project_id": "p", "private_key_id": "1", "client_email": "ops@p.example",
        "private_key": rsa_key(chain), "token_uri": format!("{url}/token"),
    });
    std::fs::write(&account, text.to_string()).unwrap();
    let mut command = chain.command(&chain.url, &[arguments, &["--gcp-kms", VERSION, "--yes"]].concat());
    command.env_remove("PRIVATE_KEY").env("CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDKMS", url);
    command.env("GOOGLE_APPLICATION_CREDENTIALS", account);
    Ran::from(command.output().unwrap())
}

/// A service account signs its requests for tokens with an RSA key.
fn rsa_key(chain: &Chain) -> String {
    let file = chain.folder.path().join("rsa.pem");
    if !file.exists() {
        let made = Command::new("openssl")
            .args(["genpkey", "-quiet", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out"])
            .arg(&file)
            .status();
        assert!(made.unwrap().success());
    }
    std::fs::read_to_string(file).unwrap()
}

type Stand = fn(Fault) -> String;
type Run = fn(&Chain, &str, &[&str]) -> Ran;
const SERVICES: [(Stand, Run); 2] = [(aws, with_aws), (gcp, with_gcp)];

#[test]
fn transactions_are_signed_by_the_service() {
    let Some(chain) = Chain::start() else { return };
    for (stand, run) in SERVICES {
        let url = stand(Fault::None);
        let before = chain.nonce();
        // Two of each, so that both values of s are seen.
        for write in ["add-image", "remove-image"] {
            run(&chain, &url, &[write, ONE]).expect(0).says("done in block");
        }
        assert_eq!(chain.nonce(), before + 2);
        run(&chain, &url, &["remove-image", ONE]).expect(0).says("already done");
    }
}

#[test]
fn a_service_that_fails_is_named_with_a_hint_and_nothing_is_sent() {
    let Some(chain) = Chain::start() else { return };
    let before = chain.nonce();
    let cases: [(Fault, i32, &[&str]); 5] = [
        (Fault::WrongKind, 3, &["expected E", "hint: create an asymmetric key on the curve secp256k1"]),
        (Fault::NoPermission, 3, &["refuses its public key", "hint: the caller needs"]),
        (Fault::SignsAsAnother, 3, &["answered with a signature that is not by it"]),
        (Fault::SignsNothing, 1, &["0 bytes that are not a signature in DER"]),
        (
            Fault::Hangs,
            4,
            &["gave no answer to a signature within 2 s", "hint: check the way to the key service"],
        ),
    ];
    for (stand, run) in SERVICES {
        for (fault, code, words) in cases {
            let ran = run(&chain, &stand(fault), &["add-image", ONE, "--timeout", "2"]).expect(code);
            words.iter().fold(ran, |ran, words| ran.says(words));
        }
    }
    assert_eq!(chain.nonce(), before);
}

#[test]
fn missing_credentials_are_explained() {
    let Some(chain) = Chain::start() else { return };
    let mut command = chain.command(&chain.url, &["add-image", ONE, "--aws-kms", ALIAS, "--yes"]);
    command.env("AWS_REGION", "eu-west-1").env("AWS_EC2_METADATA_DISABLED", "true");
    let ran = Ran::from(command.output().unwrap()).expect(4);
    ran.says("cannot be asked for its public key").says("hint: set up AWS credentials");
    let mut command = chain.command(&chain.url, &["add-image", ONE, "--gcp-kms", VERSION, "--yes"]);
    command.env("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent");
    Ran::from(command.output().unwrap()).expect(4).says("hint: set GOOGLE_APPLICATION_CREDENTIALS");
}

#[test]
fn only_one_key_can_be_named() {
    let Some(chain) = Chain::start() else { return };
    let ran = chain.run(&["add-image", ONE, "--aws-kms", ALIAS, "--gcp-kms", VERSION]).expect(2);
    ran.says("cannot be used with");
    chain.run(&["add-image", ONE, "--gcp-kms", "my-key"]).expect(2).says("expected projects/P/");
}

/// moto, an implementation of AWS's interface by others. It hashes digests once more, so its signatures are not usable;
/// keys and refusals are.
#[test]
fn keys_of_moto_are_read() {
    let Some(chain) = Chain::start() else { return };
    let Some(moto) = Moto::start() else { return };
    let good = moto.create(json!({ "KeySpec": "ECC_SECG_P256K1", "KeyUsage": "SIGN_VERIFY" }));
    let ran = moto.run(&chain, &good);
    // The key's account is a stranger to the contract: the service was asked, the address made, the dry run refused.
    ran.expect(3).says("is not the owner");
    for (spec, usage) in
        [("ECC_NIST_P256", "SIGN_VERIFY"), ("RSA_2048", "SIGN_VERIFY"), ("RSA_2048", "ENCRYPT_DECRYPT")]
    {
        let key = moto.create(json!({ "KeySpec": spec, "KeyUsage": usage }));
        let ran = moto.run(&chain, &key).expect(3);
        ran.says(&format!("for {usage}, expected ECC_SECG_P256K1 for SIGN_VERIFY"));
    }
    moto.run(&chain, "alias/nobody").expect(3).says("NotFoundException").says("hint: check the key's id");
}

struct Moto {
    process: std::process::Child,
    url: String,
}

impl Drop for Moto {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Moto {
    fn start() -> Option<Self> {
        use std::io::{BufRead, BufReader};
        use std::process::Stdio;
        let mut command = Command::new("moto_server");
        command.args(["-H", "127.0.0.1", "-p", "0"]).env("PYTHONUNBUFFERED", "1");
        let started = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let Ok(mut process) = started else {
            println!("skipped: no moto_server; run `pip install 'moto[server]'`");
            return None;
        };
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
        let url = lines.find_map(|line| line.split_once("Running on ").map(|(_, url)| url.trim().to_owned()));
        // Its log is read and dropped, or it would stop at a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Some(Self { process, url: url.unwrap() })
    }

    fn create(&self, body: Value) -> String {
        let headers = [
            ("content-type", "application/x-amz-json-1.1"),
            ("x-amz-target", "TrentService.CreateKey"),
            (
                "authorization",
                "AWS4-HMAC-SHA256 Credential=a/20260101/eu-west-1/kms/aws4_request, SignedHeaders=host, Signature=0",
            ),
        ];
        let answer: Value =
            serde_json::from_slice(&support::send(&self.url, &headers, body.to_string().as_bytes())).unwrap();
        answer["KeyMetadata"]["KeyId"].as_str().unwrap().to_owned()
    }

    fn run(&self, chain: &Chain, key: &str) -> Ran {
        let mut command = chain.command(&chain.url, &["add-image", ONE, "--aws-kms", key, "--yes"]);
        command.env("AWS_ENDPOINT_URL_KMS", &self.url).env("AWS_REGION", "eu-west-1");
        command.env("AWS_ACCESS_KEY_ID", "a").env("AWS_SECRET_ACCESS_KEY", "b");
        Ran::from(command.output().unwrap())
    }
}
