//! Certificates under an app's own CA, and the services beside the main one.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

mod common;

use common::{APP, Ask, Told, World, ask_plain, ask_plain_with};
use kms_protocol::app_info::AppInfo;
use kms_protocol::attestation_encoding::Attestation;
use kms_protocol::cert::{CertificateContents, Usage};
use kms_protocol::csr::{CertificateRequest, RequestVersion};
use kms_protocol::report_data;
use p256::ecdsa::signature::Signer as _;
use p256::ecdsa::{DerSignature, SigningKey};
use p256::pkcs8::DecodePrivateKey as _;
use ratls::issue::KeyPair;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

/// A request for a key, with evidence of the world's emulator.
struct Csr {
    key: SigningKey,
    request: CertificateRequest,
}

impl Csr {
    fn new(world: &World) -> Self {
        let pair = KeyPair::generate().unwrap();
        let (key, pubkey) = (SigningKey::from_pkcs8_pem(&pair.to_pem()).unwrap(), pair.spki_der());
        let report_data = report_data::ratls_cert(&pubkey);
        let document = common::document(&world.emulator, &report_data);
        let attestation = Attestation::nitro(document, Some(&APP), report_data, &common::image());
        let request = CertificateRequest {
            pubkey,
            org_name: Some("Example".into()),
            subject: "app".into(),
            subject_alt_names: vec!["app.example.com".into(), "10.1.2.3".into()],
            usage_server_auth: true,
            usage_client_auth: false,
            ext_quote: true,
            version: RequestVersion::V2 {
                ext_app_info: true,
                not_before: None,
                not_after: Some(4_102_444_800),
                attestation: attestation.encode_v0().unwrap(),
            },
        };
        Self { key, request }
    }

    fn encoded(&self) -> Vec<u8> {
        self.request.encode()
    }

    async fn send(&self, world: &World) -> Told {
        let csr = self.encoded();
        let signature: DerSignature = self.key.sign(&csr);
        send(world, 2, &csr, signature.as_bytes()).await
    }
}

async fn send(world: &World, api_version: u32, csr: &[u8], signature: &[u8]) -> Told {
    let body = serde_json::json!({
        "api_version": api_version, "csr": hex::encode(csr), "signature": hex::encode(signature), "vm_config": "",
    });
    world.post("/prpc/SignCert?json", body.to_string().as_bytes()).await
}

fn chain(told: &Told) -> Vec<CertificateDer<'static>> {
    let told = told.json();
    let chain = told["certificate_chain"].as_array().unwrap();
    chain
        .iter()
        .map(|pem| CertificateDer::from_pem_slice(pem.as_str().unwrap().as_bytes()).unwrap())
        .collect()
}

#[tokio::test]
async fn the_chain_of_a_v2_request_verifies() {
    let world = World::with_policy("").await;
    let csr = Csr::new(&world);
    let told = csr.send(&world).await;
    assert_eq!(told.status, 200, "{told:?}");
    let [leaf, app_ca, root]: [_; 3] = chain(&told).try_into().unwrap();
    let anchor = webpki::anchor_from_trusted_cert(&root).unwrap();
    let end_entity = EndEntityCert::try_from(&leaf).unwrap();
    let verify = |usage| {
        let now = UnixTime::now();
        let algorithms = webpki::ALL_VERIFICATION_ALGS;
        end_entity
            .verify_for_usage(
                algorithms,
                std::slice::from_ref(&anchor),
                std::slice::from_ref(&app_ca),
                now,
                usage,
                None,
                None,
            )
            .map(|_| ())
    };
    verify(KeyUsage::server_auth()).unwrap();
    assert!(verify(KeyUsage::client_auth()).is_err());
    for name in ["app.example.com", "10.1.2.3"] {
        end_entity.verify_is_valid_for_subject_name(&ServerName::try_from(name).unwrap()).unwrap();
    }
    let contents = CertificateContents::decode(&leaf).unwrap();
    assert_eq!((contents.usage, contents.app_id), (Some(Usage::AppCustom), Some(APP)));
    assert_eq!(contents.spki_der, csr.request.pubkey);
    let RequestVersion::V2 { attestation, .. } = &csr.request.version else { panic!("made as V2") };
    assert_eq!(contents.attestation.as_ref(), Some(attestation));
    let info = AppInfo::decode(&contents.app_info.unwrap()).unwrap();
    assert_eq!(info.os_image_hash, common::image());
    let ca = CertificateContents::decode(&app_ca).unwrap();
    assert_eq!((ca.usage, ca.app_id), (Some(Usage::AppCa), Some(APP)));
    // The app's CA is the same key each time.
    let again = chain(&Csr::new(&world).send(&world).await);
    assert_eq!(CertificateContents::decode(&again[1]).unwrap().spki_der, ca.spki_der);
}

#[tokio::test]
async fn requests_that_prove_nothing_get_nothing() {
    let world = World::with_policy("").await;
    let good = Csr::new(&world);
    let csr = good.encoded();
    let signature: DerSignature = good.key.sign(&csr);
    for (name, version, csr, signature, expected) in [
        ("another version", 3, csr.clone(), signature.as_bytes(), "Unsupported API version: 3"),
        ("no version", 0, csr.clone(), signature.as_bytes(), "Unsupported API version: 0"),
        ("no signature", 2, csr.clone(), b"".as_slice(), "Failed to verify csr signature"),
        ("a cut request", 2, csr[..csr.len() - 1].to_vec(), signature.as_bytes(), "Failed to "),
        ("an empty request", 2, Vec::new(), signature.as_bytes(), "Failed to parse csr"),
        ("V1 as V2", 1, csr.clone(), signature.as_bytes(), "Failed to "),
    ] {
        let told = send(&world, version, &csr, signature).await;
        assert_eq!(told.status, 400, "{name}");
        assert!(told.error().starts_with(expected), "{name}: {}", told.error());
    }

    let mut other_key = Csr::new(&world);
    other_key.request.version = good.request.version.clone();
    assert_eq!(
        other_key.send(&world).await.error(),
        "Quote verification failed: invalid quote: report data mismatch"
    );

    for name in ["localhost", "LOCALHOST", "localhost."] {
        let mut own = Csr::new(&world);
        own.request.subject_alt_names.push(name.into());
        let text = own.send(&world).await.error();
        assert_eq!(text, format!("the certificate would be valid for this KMS's own name, {name}"));
    }

    let stranger = World::with_policy("").await;
    assert!(Csr::new(&stranger).send(&world).await.error().starts_with("Quote verification failed: "));

    let policy = format!("[apps.{}]\nimages = [\"{}\"]\n", "22".repeat(20), hex::encode(common::image()));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("other.toml");
    std::fs::write(&file, policy).unwrap();
    let more =
        format!("core.auth_api.type = \"policy\"\ncore.auth_api.policy.file = \"{}\"\n", file.display());
    let world = World::with(directory, &more).await;
    assert_eq!(Csr::new(&world).send(&world).await.error(), "Boot denied: app not registered");
}

#[tokio::test]
async fn the_root_keys_go_only_to_a_kms() {
    let world = World::with_policy("").await;
    let ask = |certificate| Ask {
        verb: "POST",
        path: "/prpc/GetKmsKey?json",
        headers: &[],
        body: b"{}",
        certificate,
    };
    assert_eq!(world.ask(ask(None)).await.unwrap().error(), "No attestation provided");
    let certificate = world.certificate().await;
    let text = world.ask(ask(Some(&certificate))).await.unwrap().error();
    assert!(text.starts_with("Boot denied: "), "an app got further: {text}");
}

#[tokio::test]
async fn administration_is_behind_its_token() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("cache");
    std::fs::create_dir_all(cache.join("images/cafe")).unwrap();
    std::fs::create_dir_all(cache.join("measurements/beef")).unwrap();
    let more = common::policy(&directory)
        + &format!(
            "core.image.cache_dir = \"{}\"\ncore.admin.enabled = true\ncore.admin.port = 0\n\
             core.admin.auth_token = \"secret\"\ncore.admin_token_hash = \"{}\"\n",
            cache.display(),
            "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b",
        );
    let world = World::with(directory, &more).await;
    let admin = world.kms.admin_address().unwrap();
    let body = br#"{"image_hash":"cafe"}"#;
    let refused = ask_plain(admin, "POST", "/prpc/ClearImageCache?json", body).await;
    assert_eq!((refused.status, refused.body.as_slice()), (401, b"".as_slice()));
    assert_eq!(refused.headers["www-authenticate"], "Basic realm=\"dstack-kms admin\"");
    assert!(cache.join("images/cafe").exists());
    let headers = [("authorization", "Bearer secret")];
    let told = ask_plain_with(admin, "POST", "/prpc/Admin.ClearImageCache?json", &headers, body).await;
    assert_eq!((told.status, told.body.as_slice()), (200, b"null".as_slice()));
    assert!(!cache.join("images/cafe").exists());
    let bad = br#"{"image_hash":"../measurements"}"#;
    let told = ask_plain_with(admin, "POST", "/prpc/ClearImageCache?json", &headers, bad).await;
    assert_eq!(told.error(), "failed to clear image cache: invalid cache key");
    let told = ask_plain_with(admin, "POST", "/prpc/GetMeta?json", &headers, b"").await;
    assert_eq!(told.error(), "Service not found: GetMeta");

    // As generations A and B have it.
    let legacy = |token: &str| format!(r#"{{"token":"{token}","config_hash":"all"}}"#);
    let told = world.post("/prpc/ClearImageCache?json", legacy("wrong").as_bytes()).await;
    assert_eq!(told.error(), "Invalid token");
    assert!(cache.join("measurements").exists());
    let told = world.post("/prpc/KMS.ClearImageCache?json", legacy("secret").as_bytes()).await;
    assert_eq!(told.status, 200);
    assert!(!cache.join("measurements").exists());
    let without = World::with_policy("").await;
    let told = without.post("/prpc/ClearImageCache?json", legacy("secret").as_bytes()).await;
    assert_eq!(told.error(), "Service not found: ClearImageCache");
}

/// Generation D: certificates that clients sign themselves.
#[tokio::test]
async fn self_issued_certificates_are_behind_a_setting() {
    for (more, accepted) in [("", false), ("core.accept_self_issued_certs = true\n", true)] {
        let world = World::with_policy(more).await;
        let key = KeyPair::generate().unwrap();
        let report_data = report_data::ratls_cert(&key.spki_der());
        let document = common::document(&world.emulator, &report_data);
        let attestation = Attestation::nitro(document, Some(&APP), report_data, &common::image());
        let encoded = attestation.encode_v0().unwrap();
        let certificate = ratls::issue::client_certificate(&key, &encoded, None, common::now()).unwrap();
        let ask = Ask {
            verb: "POST",
            path: "/prpc/GetAppKey?json",
            headers: &[],
            body: br#"{"api_version":1,"vm_config":""}"#,
            certificate: Some(&(certificate, key)),
        };
        let answer = world.ask(ask).await;
        assert_eq!(answer.is_ok_and(|told| told.status == 200), accepted, "{more:?}");
    }
}
