//! Fields of issued certificates, as §3.3, §3.4 and §7.5 list them.

use kms_protocol::cert::CertificateContents;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::*;
use crate::evidence::PeerEvidence;

const NOW: u64 = 1_800_000_000;

fn now() -> UnixTime {
    UnixTime::since_unix_epoch(std::time::Duration::from_secs(NOW))
}

fn root() -> Ca {
    let key = KeyPair::generate().unwrap();
    let certificate = root_ca(&key, now()).unwrap();
    Ca::from_pem("root CA", &certificate.pem(), &key.to_pem()).unwrap()
}

/// (critical, OID, value) of each extension, in order.
fn extensions(certificate: &X509Certificate<'_>) -> Vec<(bool, String)> {
    certificate
        .extensions()
        .iter()
        .map(|extension| (extension.critical, extension.oid.to_id_string()))
        .collect()
}

fn check_common(certificate: &X509Certificate<'_>) {
    assert_eq!(certificate.version().0, 2);
    assert_eq!(certificate.signature_algorithm.algorithm.to_id_string(), "1.2.840.10045.4.3.2");
    assert_eq!(certificate.validity().not_before.timestamp(), NOT_BEFORE);
    assert_eq!(certificate.validity().not_after.timestamp(), i64::try_from(NOW).unwrap() + 3650 * 86_400);
    let mut serial = Sha256::digest(&certificate.public_key().subject_public_key.data)[..20].to_vec();
    serial[0] &= 0x7F;
    // A number has no zeros in front, a hash may.
    let serial: Vec<u8> = serial.into_iter().skip_while(|byte| *byte == 0).collect();
    assert_eq!(certificate.tbs_certificate.serial.to_bytes_be(), serial);
    assert_eq!(certificate.public_key().raw.len(), 91);
}

#[test]
fn not_before_is_the_start_of_1975() {
    assert_eq!(
        OffsetDateTime::from_unix_timestamp(NOT_BEFORE).unwrap().to_string(),
        "1975-01-01 0:00:00.0 +00:00:00"
    );
}

#[test]
fn cas_are_upstreams() {
    let key = KeyPair::generate().unwrap();
    let cases = [
        (root_ca(&key, now()).unwrap(), "O=Dstack, CN=Dstack KMS CA", 1),
        (temp_ca(&key, now()).unwrap(), "O=Dstack, CN=Dstack Client Temp CA", 0),
    ];
    for (issued, name, path_len) in cases {
        let (_, certificate) = X509Certificate::from_der(issued.der()).unwrap();
        check_common(&certificate);
        assert_eq!(
            (certificate.subject().to_string(), certificate.issuer().to_string()),
            (name.into(), name.into())
        );
        // UTF8String, by the tag in front of the text.
        assert!(certificate.subject().as_raw().windows(8).any(|window| window == b"\x0C\x06Dstack"));
        let constraints = certificate.basic_constraints().unwrap().unwrap();
        assert!(constraints.critical && constraints.value.ca);
        assert_eq!(constraints.value.path_len_constraint, Some(path_len));
        let usage = certificate.key_usage().unwrap().unwrap();
        // digitalSignature, keyCertSign, cRLSign.
        assert_eq!((usage.critical, usage.value.flags), (true, 0b110_0001));
        let identifier = &certificate
            .get_extension_unique(&x509_parser::oid_registry::OID_X509_EXT_SUBJECT_KEY_IDENTIFIER);
        let value = identifier.as_ref().unwrap().unwrap().value;
        assert_eq!(value[2..], Sha256::digest(key.spki_der())[..20]);
        assert_eq!(certificate.extensions().len(), 3, "{:?}", extensions(&certificate));
    }
}

#[test]
fn the_rpc_leaf_is_upstreams() {
    let root = root();
    let key = KeyPair::generate().unwrap();
    for (domain, name) in
        [("kms.example", &b"\x82\x0Bkms.example"[..]), ("10.0.0.1", &[0x87, 4, 10, 0, 0, 1])]
    {
        let issued = rpc_leaf(&root, &key, domain, Some(b"evidence"), now()).unwrap();
        let (_, certificate) = X509Certificate::from_der(issued.der()).unwrap();
        check_common(&certificate);
        assert_eq!(certificate.subject().to_string(), format!("CN={domain}"));
        assert_eq!(certificate.issuer().to_string(), "O=Dstack, CN=Dstack KMS CA");
        let arc = "1.3.6.1.4.1.62397.1";
        assert_eq!(
            extensions(&certificate),
            [
                (false, "2.5.29.17".into()),
                (true, "2.5.29.15".into()),
                (false, format!("{arc}.4")),
                (false, format!("{arc}.8")),
            ]
        );
        assert_eq!(certificate.extensions()[0].value[2..], *name);
        assert_eq!(certificate.key_usage().unwrap().unwrap().value.flags, 1);
        let contents = CertificateContents::decode(issued.der()).unwrap();
        assert_eq!((contents.usage, contents.attestation), (Some(Usage::KmsRpc), Some(b"evidence".to_vec())));
        assert_eq!(contents.spki_der, key.spki_der());
    }
    let bare = rpc_leaf(&root, &key, "kms.example", None, now()).unwrap();
    assert_eq!(CertificateContents::decode(bare.der()).unwrap().attestation, None);
}

#[test]
fn the_client_certificate_is_upstreams() {
    let ca_key = KeyPair::generate().unwrap();
    let ca = Ca::new("temp CA", temp_ca(&ca_key, now()).unwrap().der().clone(), ca_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let cases = [(Some(&ca), "O=Dstack, CN=Dstack Client Temp CA"), (None, "CN=RA-TLS TEMP Cert")];
    for (issuer, name) in cases {
        let issued = client_certificate(&key, &[0; 2130], issuer, now()).unwrap();
        let (_, certificate) = X509Certificate::from_der(issued.der()).unwrap();
        check_common(&certificate);
        assert_eq!(certificate.subject().to_string(), "CN=RA-TLS TEMP Cert");
        assert_eq!(certificate.issuer().to_string(), name);
        assert_eq!(
            extensions(&certificate),
            [(true, "2.5.29.15".into()), (false, "1.3.6.1.4.1.62397.1.8".into())]
        );
        // The example of §3.5: double wrapping of 2130 bytes.
        let head = [
            0x30, 0x82, 0x08, 0x66, 6, 10, 0x2B, 6, 1, 4, 1, 0x83, 0xE7, 0x3D, 1, 8, 4, 0x82, 8, 0x56, 4,
            0x82, 8, 0x52,
        ];
        assert!(issued.der().windows(head.len()).any(|window| window == head));
    }
}

#[test]
fn app_certificates_are_upstreams() {
    let root = root();
    let app = AppId::new([0x11; 20]);
    let ca_key = KeyPair::generate().unwrap();
    let ca = app_ca(&root, &ca_key, &app, now()).unwrap();
    let contents = CertificateContents::decode(ca.der()).unwrap();
    assert_eq!((contents.app_id, contents.usage), (Some(app), Some(Usage::AppCa)));
    let ca = Ca::new("App CA", ca.der().clone(), ca_key).unwrap();

    let key = KeyPair::generate().unwrap();
    let leaf = AppLeaf {
        spki_der: key.spki_der(),
        organisation: Some("Org".into()),
        subject: "app".into(),
        names: vec!["a.b".into(), "1.2.3.4".into()],
        server_auth: true,
        app_info: Some(vec![9]),
        attestation: Some(vec![8]),
        not_before: Some(NOW),
        not_after: Some(NOW + 60),
        ..AppLeaf::default()
    };
    let issued = app_leaf(&ca, &app, &leaf, now()).unwrap();
    let (_, certificate) = X509Certificate::from_der(issued.der()).unwrap();
    assert_eq!(certificate.subject().to_string(), "O=Org, CN=app");
    assert_eq!(certificate.validity().not_after.timestamp(), i64::try_from(NOW).unwrap() + 60);
    let usages = certificate.extended_key_usage().unwrap().unwrap().value;
    assert_eq!((usages.server_auth, usages.client_auth), (true, false));
    let ours: Vec<_> =
        extensions(&certificate).into_iter().filter(|(_, oid)| oid.contains("62397")).collect();
    let oid = |suffix| (false, format!("1.3.6.1.4.1.62397.1.{suffix}"));
    assert_eq!(ours, [oid(3), oid(9), oid(4), oid(8)]);
    let contents = CertificateContents::decode(issued.der()).unwrap();
    assert_eq!((contents.app_id, contents.usage), (Some(app), Some(Usage::AppCustom)));
    assert_eq!(contents.spki_der, key.spki_der());

    let bad = AppLeaf { spki_der: vec![1, 2], ..leaf };
    assert_eq!(app_leaf(&ca, &app, &bad, now()).unwrap_err().name(), "public-key-invalid");
}

#[test]
fn a_ca_needs_its_own_key() {
    let key = KeyPair::generate().unwrap();
    let certificate = root_ca(&key, now()).unwrap();
    let other = KeyPair::generate().unwrap();
    let error = Ca::new("root CA", certificate.der().clone(), other).unwrap_err();
    assert_eq!(error.name(), "ca-key-mismatch");
    let twice = certificate.pem().repeat(2);
    assert_eq!(Ca::from_pem("root CA", &twice, &key.to_pem()).unwrap_err().name(), "pem-count");
    assert_eq!(Ca::from_pem("root CA", "", &key.to_pem()).unwrap_err().name(), "pem-count");
    assert_eq!(Ca::from_pem("root CA", &certificate.pem(), "nonsense").unwrap_err().name(), "key-invalid");
}

#[test]
fn a_scalar_gives_its_key_pair() {
    let scalar = P256Scalar::from_slice(&[7; 32]).unwrap();
    let key = KeyPair::from_scalar("root CA", &scalar).unwrap();
    assert_eq!(key.spki_der(), scalar.spki_der().unwrap());
    let der = key.private_key_der();
    assert_eq!(P256Scalar::from_pkcs8(der.secret_der()).ok().unwrap().expose(), scalar.expose());
}

#[test]
fn extension_payloads_have_to_be_wrapped_and_unique() {
    let key = KeyPair::generate().unwrap();
    let with = |extensions: Vec<CustomExtension>| {
        let mut params = leaf_params(&key.0, &[(DnType::CommonName, "x")], now()).unwrap();
        params.custom_extensions = extensions;
        let issued = self_signed("test", &params, &key).unwrap();
        PeerEvidence::from_certificate(issued.der()).map_err(|error| error.name())
    };
    let oid = Extension::Attestation.oid();
    let attestation = || extension(Extension::Attestation, &[0, 2]);
    assert_eq!(with(vec![]), Ok(None));
    assert_eq!(with(vec![attestation()]), Err("attestation-truncated"));
    assert_eq!(with(vec![attestation(), attestation()]), Err("certificate-duplicate-extension"));
    let bare = CustomExtension::from_oid_content(&oid, vec![0, 2]);
    assert_eq!(with(vec![bare]), Err("certificate-extension-not-wrapped"));
    assert_eq!(with(vec![extension(Extension::TdxQuote, &[1])]), Err("legacy-quote"));
    assert_eq!(with(vec![extension(Extension::AppId, &[1; 19])]), Err("certificate-extension-malformed"));
    assert_eq!(with(vec![extension(Extension::Usage, &[0xFF])]), Err("certificate-extension-malformed"));
}

#[test]
fn every_truncated_certificate_is_rejected() {
    let key = KeyPair::generate().unwrap();
    let whole = client_certificate(&key, b"evidence", None, now()).unwrap();
    for len in 0..whole.der().len() {
        let error = CertificateContents::decode(&whole.der()[..len]).unwrap_err();
        assert_eq!(error.name(), "certificate-not-der", "a prefix of {len} bytes");
    }
    let trailing = [whole.der().as_ref(), &[0]].concat();
    assert_eq!(CertificateContents::decode(&trailing).unwrap_err().name(), "certificate-trailing-bytes");
}
