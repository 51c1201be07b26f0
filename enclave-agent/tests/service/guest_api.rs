//! What the API answers, and that it verifies.

use attestation::{AttestationDocument, Pcr, PcrIndex};
use kms_protocol::attestation_encoding::VersionedAttestation;
use kms_protocol::derive::{Signature, verify_path_key};
use kms_protocol::report_data;
use serde_json::{Value, json};
use sha2::{Digest, Sha384};

use crate::app::{App, hex_of};
use crate::support::{APP, Answer, image_hash};

/// The two signatures behind a public key, as the app's and the KMS's.
fn signatures(chain: &[Value]) -> [Signature; 2] {
    let [app, root] = chain else { panic!("{} signatures", chain.len()) };
    [app, root].map(|it| Signature::from_slice(&hex_of(it)).unwrap())
}

#[tokio::test]
async fn a_key_by_path_leads_to_the_root_of_the_kms() {
    let app = App::start().await;
    let root = app.authority.roots.k256_public_key();
    for (algorithm, purpose) in [("", "wallet"), ("k256", ""), ("secp256k1", "a:b")] {
        let request = json!({"path": "a/b", "purpose": purpose, "algorithm": algorithm});
        let answer = app.ask("GetKey", request).await;
        let secret = k256::SecretKey::from_slice(&hex_of(&answer["key"])).unwrap();
        let public = secret.public_key().to_sec1_bytes();
        let chain = signatures(answer["signature_chain"].as_array().unwrap());
        let app_key = verify_path_key(&root, &APP, purpose, &public, &chain).unwrap();
        assert_eq!(app_key, app.keys.current().app_keys().k256_key.public_key().unwrap());
    }
    let answer = app.ask("GetKey", json!({"path": "a/b", "algorithm": "ed25519"})).await;
    let seed = hex_of(&answer["key"]);
    let pair = aws_lc_rs::signature::Ed25519KeyPair::from_seed_unchecked(&seed).unwrap();
    let public = aws_lc_rs::signature::KeyPair::public_key(&pair).as_ref().to_vec();
    let chain = signatures(answer["signature_chain"].as_array().unwrap());
    verify_path_key(&root, &APP, "", &public, &chain).unwrap();
}

#[tokio::test]
async fn paths_give_their_own_keys_and_the_same_ones_again() {
    let app = App::start().await;
    let a = app.ask("GetKey", json!({"path": "a"})).await;
    assert_eq!(a, app.ask("GetKey", json!({"path": "a"})).await);
    assert_ne!(a["key"], app.ask("GetKey", json!({"path": "b"})).await["key"]);
    let old = app.ask("prpc/Tappd.DeriveK256Key", json!({"path": "a"})).await;
    assert_eq!((&old["k256_key"], &old["k256_signature_chain"]), (&a["key"], &a["signature_chain"]));
}

#[tokio::test]
async fn what_is_signed_verifies_and_leads_to_the_root() {
    let app = App::start().await;
    let root = app.authority.roots.k256_public_key();
    let digest = hex::encode([7; 32]);
    for (algorithm, data) in
        [("ed25519", "00ff"), ("secp256k1", ""), ("k256", "01"), ("secp256k1_prehashed", &*digest)]
    {
        let signed = app.ask("Sign", json!({"algorithm": algorithm, "data": data})).await;
        let chain = signed["signature_chain"].as_array().unwrap();
        assert_eq!(chain[0], signed["signature"]);
        let public = hex_of(&signed["public_key"]);
        verify_path_key(&root, &APP, "signing", &public, &signatures(&chain[1..])).unwrap();
        let mut check = json!({"algorithm": algorithm, "data": data,
            "signature": signed["signature"], "public_key": signed["public_key"]});
        assert_eq!(app.ask("Verify", check.clone()).await, json!({"valid": true}), "{algorithm}");
        check["data"] = json!(hex::encode([8; 32]));
        assert_eq!(app.ask("Verify", check).await, json!({"valid": false}), "{algorithm}");
    }
}

#[tokio::test]
async fn a_quote_is_a_document_over_the_report_data() {
    let app = App::start().await;
    let answer = app.ask("GetQuote", json!({"report_data": "0xC0FFEE"})).await;
    let mut expected = [0; 64];
    expected[..3].copy_from_slice(&[0xc0, 0xff, 0xee]);
    let document = hex_of(&answer["quote"]);
    app.enclave.verify(&document);
    let document = AttestationDocument::decode(&document).unwrap();
    assert_eq!(document.user_data(), Some(&expected[..]));
    assert_eq!(hex_of(&answer["report_data"]), expected);
    assert_eq!(answer["event_log"], "[]");

    let answer = app.ask("Attest", json!({"report_data": "c0ffee"})).await;
    let attestation =
        VersionedAttestation::decode(&hex_of(&answer["attestation"])).unwrap().into_attestation();
    assert_eq!((attestation.app_id(), attestation.report_data), (&APP.as_bytes()[..], expected));
    app.enclave.verify(attestation.platform.nsm_quote().unwrap());
}

#[tokio::test]
async fn old_quotes_are_hashed_first() {
    let app = App::start().await;
    let answer = app.ask("prpc/Tappd.TdxQuote", json!({"report_data": hex::encode("hello")})).await;
    assert_eq!((&answer["hash_algorithm"], &answer["prefix"]), (&json!("sha512"), &json!("app-data")));
    let document = AttestationDocument::decode(&hex_of(&answer["quote"])).unwrap();
    assert_eq!(document.user_data(), Some(&report_data::app_data(b"hello")[..]));
    let raw = json!({"report_data": hex::encode([5; 64]), "hash_algorithm": "raw"});
    let answer = app.ask("prpc/Tappd.TdxQuote", raw).await;
    let document = AttestationDocument::decode(&hex_of(&answer["quote"])).unwrap();
    assert_eq!(document.user_data(), Some(&[5; 64][..]));
    let (status, _) = app.call("RawQuote", json!({"report_data": "00"})).await;
    assert_eq!(status, 400, "raw report data is 64 bytes");
}

#[tokio::test]
async fn events_show_in_every_later_document_until_the_registers_are_used_up() {
    let app = App::start().await;
    for number in 16_u8..32 {
        let event = json!({"event": format!("event-{number}"), "payload": hex::encode([number])});
        assert_eq!(app.ask("EmitEvent", event).await, Value::Null);
    }
    let quote = app.ask("GetQuote", json!({"report_data": ""})).await;
    let document = AttestationDocument::decode(&hex_of(&quote["quote"])).unwrap();
    let log: Vec<Value> = serde_json::from_str(quote["event_log"].as_str().unwrap()).unwrap();
    assert_eq!(log.len(), 16);
    for (number, entry) in (16_u8..32).zip(&log) {
        let text = format!(":event-{number}:");
        let digest = Sha384::new()
            .chain_update(0x0800_0001_u32.to_le_bytes())
            .chain_update(text)
            .chain_update([number])
            .finalize();
        assert_eq!((&entry["imr"], hex_of(&entry["digest"])), (&json!(number), digest.to_vec()));
        let value: [u8; 48] = Sha384::new().chain_update([0; 48]).chain_update(digest).finalize().into();
        assert_eq!(document.pcr(PcrIndex::new(number).unwrap()), Some(&Pcr::new(value)));
    }
    let attestation =
        VersionedAttestation::decode(&hex_of(&quote["attestation"])).unwrap().into_attestation();
    assert_eq!(attestation.runtime_events.len(), 17, "the app id and the events");
    assert_eq!(attestation.claimed("event-31"), [31]);

    let (status, answer) = app.call("EmitEvent", json!({"event": "one more", "payload": ""})).await;
    assert_eq!(status, 409);
    assert_eq!(answer["error"], "PCR16 to PCR31 are all locked or in use");
    for name in ["", "app-id", "instance-id"] {
        assert_eq!(app.call("EmitEvent", json!({"event": name, "payload": ""})).await.0, 400, "{name}");
    }
}

// The module is called from here, and served beside it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_register_that_the_app_locked_itself_is_left_alone() {
    let app = App::start().await;
    app.enclave.nsm.lock_pcr(PcrIndex::new(16).unwrap()).unwrap();
    app.enclave.nsm.extend_pcr(PcrIndex::new(17).unwrap(), vec![1]).unwrap();
    app.ask("EmitEvent", json!({"event": "event", "payload": ""})).await;
    let info = app.ask("Info", Value::Null).await;
    let tcb: Value = serde_json::from_str(info["tcb_info"].as_str().unwrap()).unwrap();
    assert_eq!(tcb["event_log"][0]["imr"], 18);
}

#[tokio::test]
async fn info_says_who_and_where_the_app_is() {
    let app = App::start().await;
    // What the SDKs send, and what upstream's own client sends, for an empty message.
    for body in [json!({}), Value::Null] {
        let info = app.ask("Info", body).await;
        assert_eq!(info["app_id"], APP.to_string());
        assert_eq!(hex_of(&info["os_image_hash"]), image_hash());
        let tcb: Value = serde_json::from_str(info["tcb_info"].as_str().unwrap()).unwrap();
        assert_eq!(tcb["pcrs"]["0"], hex::encode([0xa0; 48]));
        for name in ["mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "app_compose"] {
            assert!(tcb[name].is_string(), "the SDKs want {name}");
        }
        let provider: Value = serde_json::from_str(info["key_provider_info"].as_str().unwrap()).unwrap();
        assert_eq!(provider["id"], hex::encode(app.authority.pinned().spki_der()));
    }
    assert!(app.ask("Version", json!({})).await["version"].is_string());
    assert_eq!(app.ask("GpuInfo", json!({})).await, json!({"attestation": ""}));
}

#[tokio::test]
async fn a_certificate_of_another_key_is_not_handed_on() {
    // The chain of somebody else's certificate, as a KMS that mixes up answers would send it.
    let app = App::with(
        |_| {},
        |script| {
            let chain = json!({"certificate_chain": ["a", "b", "c"]});
            script.with("SignCert", Answer::Http("200 OK", "", chain.to_string().into_bytes()))
        },
    )
    .await
    .unwrap_or_else(|error| panic!("{error}"));
    let (status, answer) = app.call("GetTlsKey", json!({"subject": "app"})).await;
    assert_eq!(status, 502, "{answer}");
    assert!(answer.get("key").is_none());
    let (status, answer) = app.call("GetTlsKey", json!({"not_before": 5, "not_after": 5})).await;
    assert_eq!(status, 400, "{answer}");
}

#[tokio::test]
async fn both_encodings_and_queries_are_understood() {
    let app = App::start().await;
    let in_json = app.ask("GetKey", json!({"path": "a"})).await;
    let get = b"GET /prpc/GetKey?path=a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let (status, body) = app.raw(get).await;
    assert_eq!((status, serde_json::from_slice::<Value>(&body).unwrap()), (200, in_json.clone()));
    // Field 1, one byte: the path.
    let head = "POST /GetKey HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\n\x0a\x01a";
    let (status, body) = app.raw(head.as_bytes()).await;
    assert_eq!(status, 200);
    assert_eq!(&body[..2], [0x0a, 32]);
    assert_eq!(body[2..34], hex_of(&in_json["key"]));
}

#[tokio::test]
async fn keys_are_fetched_again_when_the_app_asks() {
    let app = App::with(
        |_| {},
        |script| {
            let other = crate::app::other_keys(&crate::support::Authority::new(crate::app::KMS));
            script.first_app_key_answers.lock().unwrap().push(other);
            script
        },
    )
    .await
    .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(app.keys.current().app_keys().disk_crypt_key.expose(), &[9; 32]);
    assert_eq!(app.ask("RefreshKeys", json!({})).await, json!({"changed": true}));
    assert_ne!(app.keys.current().app_keys().disk_crypt_key.expose(), &[9; 32]);
    assert_eq!(app.ask("RefreshKeys", json!({})).await, json!({"changed": false}));
}
