//! The mapping of §1.4, the method table of §1.2, the encodings of §1.3 and the error bodies of §1.5.

use super::webhook::{AuthInfo, BootResponse, MAX_REASON, bounded_reason};
use super::*;
use proptest::prelude::*;

fn json<M: WireMessage>(text: &str) -> Result<M, Error> {
    M::decode_body(Encoding::Json, text.as_bytes())
}

/// Messages that are wiped on drop cannot be made with `..`.
fn with_disk_key(key: Vec<u8>) -> AppKeyResponse {
    let mut keys = AppKeyResponse::default();
    keys.disk_crypt_key = key;
    keys
}

fn text<M: WireMessage>(message: &M) -> String {
    String::from_utf8(message.encode_body(Encoding::Json)).unwrap()
}

#[test]
fn every_field_is_written_in_field_number_order() {
    assert_eq!(
        text(&GetMetaResponse::default()),
        r#"{"ca_cert":"","allow_any_upgrade":false,"k256_pubkey":"","bootstrap_info":null,"is_dev":false,"gateway_app_id":null,"kms_contract_address":null,"chain_id":null,"app_auth_implementation":null}"#
    );
    assert_eq!(
        text(&with_disk_key(vec![0xAB, 0x01])),
        r#"{"ca_cert":"","disk_crypt_key":"ab01","env_crypt_key":"","k256_key":"","k256_signature":"","tproxy_app_id":"","gateway_app_id":"","os_image_hash":""}"#
    );
    assert_eq!(
        text(&GetAppKeyRequest { api_version: 1, vm_config: String::new() }),
        r#"{"api_version":1,"vm_config":""}"#
    );
    assert_eq!(text(&OnboardResponse::default()), r#"{"k256_pubkey":""}"#);
    let meta = GetMetaResponse {
        bootstrap_info: Some(BootstrapResponse { ca_pubkey: vec![1], ..Default::default() }),
        chain_id: Some(u64::MAX),
        ..Default::default()
    };
    let written = text(&meta);
    assert!(
        written.contains(r#""bootstrap_info":{"ca_pubkey":"01","k256_pubkey":"","attestation":""}"#),
        "{written}"
    );
    assert!(written.contains(r#""chain_id":18446744073709551615"#), "{written}");
    assert_eq!(json::<GetMetaResponse>(&written).unwrap(), meta);
}

#[test]
fn hex_is_read_with_any_number_of_prefixes_and_in_either_case() {
    for digits in ["aB01", "0xab01", "0x0x0xAB01"] {
        let request: AppId = json(&format!(r#"{{"app_id":"{digits}"}}"#)).unwrap();
        assert_eq!(request.app_id, [0xAB, 0x01], "{digits}");
    }
    for digits in ["abc", "q83v", "0xabq1"] {
        let error = json::<AppId>(&format!(r#"{{"app_id":"{digits}"}}"#)).unwrap_err();
        assert!(matches!(&error, Error::Json(_)), "{digits}: {error}");
    }
}

#[test]
fn missing_is_default_unknown_is_ignored_and_camel_case_is_unknown() {
    assert_eq!(json::<GetAppKeyRequest>("{}").unwrap(), GetAppKeyRequest::default());
    assert_eq!(json::<GetAppKeyRequest>("").unwrap(), GetAppKeyRequest::default());
    assert_eq!(json::<GetAppKeyRequest>(" \n").unwrap(), GetAppKeyRequest::default());
    assert_eq!(
        json::<GetAppKeyRequest>(r#"{"apiVersion":1,"x":[null]}"#).unwrap(),
        GetAppKeyRequest::default()
    );
    // The messages with secrets are decoded field by field, since they are wiped on drop.
    assert_eq!(json::<AppKeyResponse>("{}").unwrap(), AppKeyResponse::default());
    assert_eq!(json::<KmsKeyResponse>(r#"{"keys":[{}]}"#).unwrap().keys, [KmsKeys::default()]);
}

#[test]
fn null_is_for_optionals_only() {
    assert_eq!(
        json::<GetMetaResponse>(r#"{"chain_id":null,"bootstrap_info":null}"#).unwrap(),
        GetMetaResponse::default()
    );
    for body in [
        r#"{"api_version":null}"#,
        r#"{"vm_config":null}"#,
        r#"{"api_version":"1"}"#,
        r#"{"api_version":-1}"#,
    ] {
        let error = json::<GetAppKeyRequest>(body).unwrap_err();
        assert!(matches!(&error, Error::Json(_)), "{body}: {error}");
    }
    for body in ["null", "[1,\"\"]", "1", "\"x\""] {
        let error = json::<GetAppKeyRequest>(body).unwrap_err();
        assert!(matches!(&error, Error::JsonNotAnObject), "{body}: {error}");
    }
    let twice = json::<GetAppKeyRequest>(r#"{"api_version":1,"api_version":1}"#).unwrap_err();
    assert!(matches!(twice, Error::Json(_)));
}

#[test]
fn query_strings_are_messages() {
    let request = AppId::decode_query("json&app_id=0x1122&json=1").unwrap();
    assert_eq!(request.app_id, [0x11, 0x22]);
    let request = GetAppKeyRequest::decode_query("api_version=1&vm_config=%7B%7D+").unwrap();
    assert_eq!((request.api_version, request.vm_config.as_str()), (1, "{} "));
    assert_eq!(GetAppKeyRequest::decode_query("").unwrap(), GetAppKeyRequest::default());
    let error = GetAppKeyRequest::decode_query("api_version=x").unwrap_err();
    assert!(matches!(error, Error::Query(_)), "{error}");
}

#[test]
fn protobuf_uses_the_field_numbers() {
    let response =
        PublicKeyResponse { public_key: vec![1], signature: vec![2], timestamp: 300, signature_v1: vec![4] };
    assert_eq!(response.encode_body(Encoding::Protobuf), [0x0A, 1, 1, 0x12, 1, 2, 0x18, 0xAC, 2, 0x22, 1, 4]);
    let mut keys = AppKeyResponse::default();
    keys.os_image_hash = vec![9];
    keys.tproxy_app_id = "t".into();
    assert_eq!(keys.encode_body(Encoding::Protobuf), [0x32, 1, b't', 0x42, 1, 9]);
    assert_eq!(AppKeyResponse::decode_body(Encoding::Protobuf, &[]).unwrap(), AppKeyResponse::default());
    let error = AppKeyResponse::decode_body(Encoding::Protobuf, &[0x0A, 5, b'x']).unwrap_err();
    assert!(matches!(error, Error::Protobuf(_)), "{error}");
}

#[test]
fn secrets_are_not_printed() {
    let response = with_disk_key(vec![0xAB; 32]);
    assert_eq!(format!("{response:?}"), r#"AppKeyResponse { gateway_app_id: "", .. }"#);
    let keys = KmsKeyResponse {
        temp_ca_key: "t".into(),
        keys: vec![KmsKeys { ca_key: "c".into(), k256_key: vec![1] }],
    };
    assert_eq!(format!("{keys:?}"), "KmsKeyResponse { keys: 1, .. }");
    assert_eq!(format!("{:?}", keys.keys[0]), "KmsKeys");
}

#[test]
fn prefixes_are_stripped_repeatedly_and_case_matters() {
    for segment in ["GetMeta", "KMS.GetMeta", "KMS.KMS.GetMeta"] {
        assert_eq!(Service::Kms.method(segment), Some(Method::GetMeta), "{segment}");
    }
    for segment in ["Kms.GetMeta", "Onboard.GetMeta", "GetMeta/", "getmeta", "", "KMS.", "Bootstrap"] {
        assert_eq!(Service::Kms.method(segment), None, "{segment}");
    }
    assert_eq!(Service::Onboard.method("Onboard"), Some(Method::Onboard));
    assert_eq!(Service::Onboard.method("Onboard.Onboard"), Some(Method::Onboard));
    assert_eq!(Service::Onboard.method("Onboard.Bootstrap"), Some(Method::Bootstrap));
    assert_eq!(Service::Admin.method("Admin.ClearImageCache"), Some(Method::ClearImageCache));
    assert_eq!(Service::Kms.method("ClearImageCache"), Some(Method::LegacyClearImageCache));
    for method in Method::ALL {
        assert_eq!(method.service().method(method.name()), Some(method));
    }
}

#[test]
fn the_encoding_follows_query_and_content_type() {
    let json = RequestForm::Body(Encoding::Json);
    let protobuf = RequestForm::Body(Encoding::Protobuf);
    let cases = [
        ("json", None, json),
        ("json=true", None, json),
        ("a=b&json=1", Some("application/x-www-form-urlencoded"), json),
        ("json=0", None, protobuf),
        ("json=false", None, protobuf),
        ("jsonx", None, protobuf),
        ("", Some("application/json"), json),
        ("", Some("Application/JSON; charset=utf-8"), json),
        ("", Some("application/jsonx"), protobuf),
        ("", None, protobuf),
    ];
    for (query, content_type, expected) in cases {
        assert_eq!(RequestForm::of_post(query, content_type), expected, "{query:?} {content_type:?}");
    }
    assert_eq!(RequestForm::of_get().response(), Encoding::Json);
    assert_eq!(RequestForm::of_early_error(false, ""), Encoding::Protobuf);
    assert_eq!(RequestForm::of_early_error(false, "json"), Encoding::Json);
    assert_eq!(RequestForm::of_early_error(true, ""), Encoding::Json);
}

#[test]
fn error_bodies_are_upstreams() {
    let body = ErrorBody::new("Service not found: X");
    let pretty = body.encode_as(Encoding::Json);
    assert_eq!(std::str::from_utf8(&pretty).unwrap(), "{\n  \"error\": \"Service not found: X\"\n}");
    let protobuf = body.encode_as(Encoding::Protobuf);
    assert_eq!(protobuf[..2], [0x0A, 20]);
    for encoded in [pretty, protobuf] {
        assert_eq!(ErrorBody::sniff(&encoded).as_deref(), Some("Service not found: X"));
    }
    let of_the_web_server =
        br#"{"error":{"code":404,"reason":"Not Found","description":"No such resource."}}"#;
    assert_eq!(ErrorBody::sniff(of_the_web_server).as_deref(), Some("No such resource."));
    for other in [b"".as_slice(), b"<html>", b"{\"error\":7}", b"null", &[0x0A, 9, 1]] {
        assert_eq!(ErrorBody::sniff(other), None, "{other:?}");
    }
}

#[test]
fn webhook_answers_need_all_their_keys() {
    let answer: BootResponse =
        serde_json::from_str(r#"{"isAllowed":false,"gatewayAppId":"g","reason":"r","more":1}"#).unwrap();
    assert_eq!(answer, BootResponse { is_allowed: false, gateway_app_id: "g".into(), reason: "r".into() });
    for incomplete in [r#"{"isAllowed":true,"reason":""}"#, r#"{"gatewayAppId":"","reason":""}"#] {
        let error = serde_json::from_str::<BootResponse>(incomplete).unwrap_err();
        assert!(error.to_string().starts_with("missing field"), "{error}");
    }
    let info = r#"{"status":"ok","kmsContractAddr":"0x1","gatewayAppId":"g","chainId":1,"appAuthImplementation":"x","appImplementation":"i"}"#;
    let info: AuthInfo = serde_json::from_str(info).unwrap();
    assert_eq!((info.chain_id, info.app_implementation.as_str(), info.eth_rpc_url), (1, "i", None));
}

/// Upstream dies of the character that its cut falls into.
#[test]
fn reasons_are_cut_between_characters() {
    let reason = format!("{}é", "x".repeat(MAX_REASON - 1));
    assert_eq!(bounded_reason(&reason), "x".repeat(MAX_REASON - 1));
    assert_eq!(bounded_reason("a\nb\u{1b}c"), "a b c");
}

proptest! {
    #[test]
    fn both_encodings_round_trip(
        ca_cert in ".{0,40}",
        allow_any_upgrade: bool,
        k256_pubkey: Vec<u8>,
        bootstrap in proptest::option::of((any::<Vec<u8>>(), any::<Vec<u8>>(), any::<Vec<u8>>())),
        gateway_app_id in proptest::option::of(".{0,10}"),
        chain_id: Option<u64>,
    ) {
        let message = GetMetaResponse {
            ca_cert,
            allow_any_upgrade,
            k256_pubkey,
            bootstrap_info: bootstrap.map(|(ca_pubkey, k256_pubkey, attestation)| BootstrapResponse {
                ca_pubkey,
                k256_pubkey,
                attestation,
            }),
            gateway_app_id,
            chain_id,
            ..Default::default()
        };
        for encoding in [Encoding::Json, Encoding::Protobuf] {
            let body = message.encode_body(encoding);
            prop_assert_eq!(&GetMetaResponse::decode_body(encoding, &body).unwrap(), &message);
        }
    }
}
