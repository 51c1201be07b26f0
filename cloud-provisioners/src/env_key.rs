//! The key that an app's secret variables are encrypted to: asked of its KMS, believed because a pinned root signed it.

use std::path::Path;
use std::time::Duration;

use kms_protocol::AppId;
use kms_protocol::derive::{K256PublicKey, Signature, verify_env_public_key_v0, verify_env_public_key_v1};
use kms_protocol::wire::kms::AppId as AppIdRequest;
use kms_protocol::wire::webhook::bounded_reason;
use kms_protocol::wire::{Encoding, ErrorBody, PublicKeyResponse, WireMessage};
use ratls::client::{ClientConfigBuilder, ServerTrust};
use reqwest::header;
use serde::Deserialize;
use tokio::time::timeout;

use crate::Error;

const CALL: Duration = Duration::from_secs(30);
const LONGEST_ANSWER: usize = 64 << 10;
/// dstack-cloud's list of those whose signature counts, beside the global settings.
pub(crate) const WHITELIST: &str = "kms-whitelist.json";

/// Reads the roots whose signature counts. A missing file is an empty list.
///
/// # Errors
///
/// When the file cannot be read or holds something else than compressed keys.
pub(crate) fn signers(settings_path: &Path) -> Result<Vec<K256PublicKey>, Error> {
    #[derive(Deserialize)]
    struct List {
        trusted_signers: Vec<String>,
    }
    let path = settings_path.with_file_name(WHITELIST);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::file("read", &path)(error)),
    };
    let list: List = serde_json::from_slice(&bytes).map_err(|source| Error::Json { path, source })?;
    let parse = |text: &String| {
        let problem = format!("{text:?} is no compressed secp256k1 public key in hex");
        text.parse().map_err(|_| Error::Setting { setting: "trusted_signers", problem })
    };
    list.trusted_signers.iter().map(parse).collect()
}

/// Asks the KMS at `url` for the app's key.
///
/// # Errors
///
/// [`Error::EnvironmentKey`] when it gives no answer, or none that one of `signers` signed for this app.
pub(crate) async fn fetch(url: &str, app_id: &AppId, signers: &[K256PublicKey]) -> Result<[u8; 32], Error> {
    let failed = |problem: String| Error::EnvironmentKey { url: url.to_owned(), problem };
    if signers.is_empty() {
        return Err(failed(format!("nobody's signature counts yet: {WHITELIST} names no trusted_signers")));
    }
    let base = url.trim_end_matches('/');
    let address = format!("{}/prpc/GetAppEnvEncryptPubKey?json", base.strip_suffix("/prpc").unwrap_or(base));
    // Whoever answers, the signature is what makes the key the app's.
    let tls = ClientConfigBuilder::new(ServerTrust::danger_accept_any_kms()).with_alpn(&["http/1.1"]);
    let tls = tls.build().map_err(|error| failed(error.to_string()))?;
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .https_only(true)
        .redirect(reqwest::redirect::Policy::none())
        .timeout(CALL)
        .build()
        .map_err(|error| failed(error.to_string()))?;
    let body = AppIdRequest { app_id: app_id.as_bytes().to_vec() }.encode_body(Encoding::Json);
    let work = async {
        let request = client.post(address).header(header::CONTENT_TYPE, "application/json").body(body);
        let mut answer = request.send().await?;
        let (status, mut body) = (answer.status(), Vec::new());
        while let Some(chunk) = answer.chunk().await? {
            body.extend_from_slice(&chunk);
            if body.len() > LONGEST_ANSWER {
                break;
            }
        }
        Ok::<_, reqwest::Error>((status, body))
    };
    let answer = timeout(CALL, work).await;
    let answer = answer.map_err(|_| failed(format!("no answer within {} s", CALL.as_secs())))?;
    let (status, body) = answer.map_err(|error| failed(error.without_url().to_string()))?;
    if !status.is_success() || body.len() > LONGEST_ANSWER {
        let text = ErrorBody::sniff(&body).unwrap_or_default();
        return Err(failed(bounded_reason(&format!("answered {status} {text}"))));
    }
    let answer = PublicKeyResponse::decode_body(Encoding::Json, &body);
    let answer = answer.map_err(|error| failed(bounded_reason(&error.to_string())))?;
    verified(&answer, app_id, signers).map_err(failed)
}

/// The key, if one of `signers` signed it for this app; with its time where the KMS signs that too.
fn verified(
    answer: &PublicKeyResponse,
    app_id: &AppId,
    signers: &[K256PublicKey],
) -> Result<[u8; 32], String> {
    let PublicKeyResponse { public_key, signature, timestamp, signature_v1 } = answer;
    let key: [u8; 32] = public_key.as_slice().try_into().map_err(|_| "the key is not 32 bytes".to_owned())?;
    let is_by = |signer: &K256PublicKey| match signature_v1.is_empty() {
        false => Signature::from_slice(signature_v1)
            .and_then(|signature| verify_env_public_key_v1(signer, app_id, *timestamp, &key, &signature)),
        true => Signature::from_slice(signature)
            .and_then(|signature| verify_env_public_key_v0(signer, app_id, &key, &signature)),
    };
    let mut last = None;
    for signer in signers {
        match is_by(signer) {
            Ok(()) => return Ok(key),
            Err(error) => last = Some(error),
        }
    }
    let why = last.map(|error| error.to_string()).unwrap_or_default();
    Err(format!("the key is not signed by one of the {} trusted_signers: {why}", signers.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    use kms_protocol::derive::{
        K256Root, P256Scalar, RootKeys, sign_env_public_key_v0, sign_env_public_key_v1,
    };

    const APP: AppId = AppId::new([0x11; 20]);
    const KEY: [u8; 32] = [7; 32];

    fn roots(byte: u8) -> RootKeys {
        let ca = P256Scalar::from_slice(&[1; 32]).unwrap();
        RootKeys::new(ca, K256Root::from_slice(&[byte; 32]).unwrap()).unwrap()
    }

    fn answer(roots: &RootKeys) -> PublicKeyResponse {
        PublicKeyResponse {
            public_key: KEY.to_vec(),
            signature: sign_env_public_key_v0(roots, &APP, &KEY).as_bytes().to_vec(),
            timestamp: 5,
            signature_v1: sign_env_public_key_v1(roots, &APP, 5, &KEY).as_bytes().to_vec(),
        }
    }

    #[test]
    fn a_key_counts_when_a_pinned_root_signed_it_for_this_app() {
        let (ours, other) = (roots(0x42), roots(0x43));
        let both = [other.k256_public_key(), ours.k256_public_key()];
        assert_eq!(verified(&answer(&ours), &APP, &both), Ok(KEY));
        let old = PublicKeyResponse { signature_v1: Vec::new(), timestamp: 0, ..answer(&ours) };
        assert_eq!(verified(&old, &APP, &both), Ok(KEY));

        let refused = |answer: PublicKeyResponse, app: &AppId, signers: &[K256PublicKey]| {
            verified(&answer, app, signers).unwrap_err()
        };
        let only = [ours.k256_public_key()];
        assert!(refused(answer(&other), &APP, &only).contains("not signed by one of the 1 trusted_signers"));
        assert!(refused(answer(&ours), &AppId::new([0x12; 20]), &only).contains("not signed by"));
        assert!(
            refused(PublicKeyResponse { timestamp: 6, ..answer(&ours) }, &APP, &only).contains("not signed")
        );
        // A good old signature does not stand in for a bad new one.
        let mixed = PublicKeyResponse { signature_v1: answer(&other).signature_v1, ..answer(&ours) };
        assert!(refused(mixed, &APP, &only).contains("not signed by"));
        let short = PublicKeyResponse { public_key: vec![7; 31], ..answer(&ours) };
        assert_eq!(refused(short, &APP, &only), "the key is not 32 bytes");
        assert!(refused(answer(&ours), &APP, &[]).contains("0 trusted_signers"));
    }

    #[tokio::test]
    async fn without_a_pinned_root_nobody_is_asked() {
        let error = fetch("https://kms.invalid:1", &APP, &[]).await.unwrap_err();
        assert!(error.to_string().contains("nobody's signature counts yet"), "{error}");
        assert!(error.hint().unwrap().contains("kms.json"));
    }

    #[test]
    fn the_whitelist_is_dstack_clouds() {
        let directory = tempfile::tempdir().unwrap();
        let settings = directory.path().join("config.json");
        assert_eq!(signers(&settings).unwrap(), []);
        let list = directory.path().join(WHITELIST);
        let root = roots(0x42).k256_public_key();
        std::fs::write(&list, format!("{{\"trusted_signers\": [\"0x{root}\"]}}")).unwrap();
        assert_eq!(signers(&settings).unwrap(), [root]);
        for text in ["{}", "[]", "{\"trusted_signers\": [\"0x02\"]}"] {
            std::fs::write(&list, text).unwrap();
            assert!(signers(&settings).is_err(), "{text}");
        }
    }
}
