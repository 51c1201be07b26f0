//! A TDX host in software: quotes under a root of its own, and the collateral service that vouches for them.
//!
//! Only the root differs from Intel's: quotes, certificates, revocation lists and signed statements are of the real form and
//! pass the real verifier, which is told of the root. Source of the forms: Intel's "TDX DCAP Quoting Library API", appendix A
//! (quotes, version 4), and "SGX PCK Certificate and Certificate Revocation List Profile Specification".

use std::fmt::Write as _;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use kms_protocol::attestation_encoding::{Attestation, PlatformEvidence, RuntimeEvent, Stack, TdxEvidence};
use kms_protocol::runtime_events::{Moment, rtmr3};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, CustomExtension,
    DnType, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SerialNumber, date_time_ymd,
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::serve::{Answer, Question, Server};

/// The image that the host's guests run.
const IMAGE: [u8; 32] = [9; 32];
/// MRTD and RTMR0 to RTMR2 of a guest of that image.
const REGISTERS: [[u8; 48]; 4] = [[1; 48], [2; 48], [3; 48], [4; 48]];
const FMSPC: [u8; 6] = [0x50, 0x80, 0x6f, 0, 0, 0];
const INTEL_QE_VENDOR_ID: [u8; 16] =
    [0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07];
/// 1.2.840.113741.1.13.1, Intel's extension of a PCK certificate.
const SGX_EXTENSION: [u8; 9] = [0x2a, 0x86, 0x48, 0x86, 0xf8, 0x4d, 1, 0x0d, 1];

/// A host with its collateral service. Both end when dropped.
pub struct TdxHost {
    root_pem: String,
    /// Leaf, intermediate and root of the host's own certificate.
    pck_chain: String,
    pck_key: EcdsaKeyPair,
    pccs: Server,
}

impl TdxHost {
    /// Starts one.
    ///
    /// # Panics
    /// When a certificate cannot be made.
    #[must_use]
    pub fn start() -> Self {
        let root = CertifiedIssuer::self_signed(ca("SGX Root CA of a test"), key()).expect("a root");
        let platform = CertifiedIssuer::signed_by(ca("SGX PCK Platform CA of a test"), key(), &root);
        let platform = platform.expect("an intermediate");
        let mut pck = named("SGX PCK Certificate");
        let mut extension =
            CustomExtension::from_oid_content(&[1, 2, 840, 113_741, 1, 13, 1], sgx_extension());
        extension.set_criticality(false);
        pck.custom_extensions = vec![extension];
        let pck_key = key();
        let pck = pck.signed_by(&pck_key, &platform).expect("a leaf");
        let signer_key = key();
        let signer = named("SGX TCB Signing").signed_by(&signer_key, &root).expect("a signer");

        let root_pem = root.as_ref().pem();
        let signers = signer.pem() + &root_pem;
        let platform_pem = platform.as_ref().pem();
        let crl = |issuer: &CertifiedIssuer<'_, KeyPair>| {
            let list = CertificateRevocationListParams {
                this_update: date_time_ymd(2020, 1, 1),
                next_update: date_time_ymd(2099, 1, 1),
                crl_number: SerialNumber::from(1_u64),
                issuing_distribution_point: None,
                revoked_certs: Vec::new(),
                key_identifier_method: KeyIdMethod::Sha256,
            };
            list.signed_by(issuer).expect("a revocation list").der().to_vec()
        };
        let signer_key = signing(&signer_key);
        let answers = Answers {
            pck_crl: crl(&platform),
            pck_crl_chain: platform_pem.clone() + &root_pem,
            root_crl: crl(&root),
            tcb_info: signed("tcbInfo", &tcb_info(), &signer_key),
            qe_identity: signed("enclaveIdentity", &qe_identity(), &signer_key),
            signers,
        };
        Self {
            pck_chain: pck.pem() + &platform_pem + &root_pem,
            root_pem,
            pck_key: signing(&pck_key),
            pccs: Server::start(move |question| Some(answers.to(question))),
        }
    }

    /// The root, PEM.
    #[must_use]
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// Address of the collateral service.
    #[must_use]
    pub fn pccs(&self) -> String {
        self.pccs.url() + "/"
    }

    /// The registers of the image, as `core.image.tdx_measurements` has them.
    #[must_use]
    pub fn measurements(&self) -> String {
        let [mrtd, rtmr0, rtmr1, rtmr2] = REGISTERS.map(hex::encode);
        json!({ hex::encode(IMAGE): [{"mrtd": mrtd, "rtmr0": rtmr0, "rtmr1": rtmr1, "rtmr2": rtmr2}] })
            .to_string()
    }

    /// Hash of the image, hex.
    #[must_use]
    pub fn image_hash(&self) -> String {
        hex::encode(IMAGE)
    }

    /// Evidence of a guest with this compose, over `report_data`.
    ///
    /// # Panics
    /// When it cannot sign.
    #[must_use]
    pub fn attestation(&self, compose_hash: &[u8; 32], report_data: [u8; 64]) -> Attestation {
        let runtime_events = vec![
            RuntimeEvent::new("app-id", &compose_hash[..20]),
            RuntimeEvent::new("compose-hash", compose_hash.as_slice()),
            RuntimeEvent::new("instance-id", [6_u8; 20]),
            RuntimeEvent::new("boot-mr-done", Vec::new()),
            RuntimeEvent::new("key-provider", br#"{"name":"local-sgx","id":"00"}"#.as_slice()),
            RuntimeEvent::new("system-ready", Vec::new()),
        ];
        let quote = self.quote(&rtmr3(&runtime_events, Moment::Now), &report_data);
        Attestation {
            platform: PlatformEvidence::Tdx(TdxEvidence { quote, event_log: Vec::new() }),
            runtime_events,
            report_data,
            config: json!({ "os_image_hash": self.image_hash() }).to_string(),
            stack: Stack::Dstack,
        }
    }

    fn quote(&self, rtmr3: &[u8; 48], report_data: &[u8; 64]) -> Vec<u8> {
        // Version, kind of key (ECDSA P-256), TEE (TDX), SVNs of QE and PCE, vendor, user data.
        let mut quote =
            [&[4, 0, 2, 0, 0x81, 0, 0, 0, 0, 0, 0, 0][..], &INTEL_QE_VENDOR_ID, &[0; 20]].concat();
        let [mrtd, registers @ ..] = REGISTERS;
        quote.extend([1, 0].into_iter().chain([1; 14])); // TEE_TCB_SVN
        quote.extend([0; 48 + 48 + 8]); // MRSEAM, MRSIGNERSEAM, SEAMATTRIBUTES
        quote.extend([0, 0, 0, 0x10, 0, 0, 0, 0]); // TDATTRIBUTES: SEPT_VE_DISABLE
        quote.extend([0xe7, 0, 6, 0, 0, 0, 0, 0]); // XFAM
        quote.extend(mrtd);
        quote.extend([0; 3 * 48]); // MRCONFIGID, MROWNER, MROWNERCONFIG
        quote.extend(registers.concat());
        quote.extend(rtmr3);
        quote.extend(report_data);

        let attestation_key = signing(&key());
        let public = &attestation_key.public_key().as_ref()[1..];
        let qe_auth_data = [7; 32];
        let mut qe_report = [0; 384];
        qe_report[..16].copy_from_slice(&[1; 16]);
        qe_report[258] = 1; // ISVSVN
        let binding = Sha256::new().chain_update(public).chain_update(qe_auth_data).finalize();
        qe_report[320..352].copy_from_slice(&binding);

        let chain = self.pck_chain.as_bytes();
        let mut certification = [&qe_report[..], &sign(&self.pck_key, &qe_report)].concat();
        certification.extend(32_u16.to_le_bytes());
        certification.extend(qe_auth_data);
        certification.extend(5_u16.to_le_bytes());
        certification.extend(length(chain).to_le_bytes());
        certification.extend(chain);

        let mut authentication = [&sign(&attestation_key, &quote)[..], public].concat();
        authentication.extend(6_u16.to_le_bytes());
        authentication.extend(length(&certification).to_le_bytes());
        authentication.extend(certification);
        quote.extend(length(&authentication).to_le_bytes());
        quote.extend(authentication);
        quote
    }
}

/// What the collateral service answers.
struct Answers {
    pck_crl: Vec<u8>,
    pck_crl_chain: String,
    root_crl: Vec<u8>,
    tcb_info: String,
    qe_identity: String,
    signers: String,
}

impl Answers {
    fn to(&self, question: &Question) -> Answer {
        let body = |text: &str| Answer::bytes(200, text.as_bytes().to_vec());
        match question.line.as_str() {
            "GET /sgx/certification/v4/pckcrl" => Answer::bytes(200, self.pck_crl.clone())
                .with("sgx-pck-crl-issuer-chain", escaped(&self.pck_crl_chain)),
            "GET /tdx/certification/v4/tcb" => {
                body(&self.tcb_info).with("tcb-info-issuer-chain", escaped(&self.signers))
            }
            "GET /tdx/certification/v4/qe/identity" => {
                body(&self.qe_identity).with("sgx-enclave-identity-issuer-chain", escaped(&self.signers))
            }
            "GET /sgx/certification/v4/rootcacrl" => body(&hex::encode(&self.root_crl)),
            _ => Answer::bytes(404, Vec::new()),
        }
    }
}

fn tcb_info() -> Value {
    let components = vec![json!({"svn": 1}); 16];
    let tdx: Vec<Value> = [1, 0].into_iter().chain([1; 14]).map(|svn| json!({ "svn": svn })).collect();
    json!({
        "id": "TDX", "version": 3, "issueDate": "2020-01-01T00:00:00Z", "nextUpdate": "2099-01-01T00:00:00Z",
        "fmspc": hex::encode(FMSPC), "pceId": "0000", "tcbType": 0, "tcbEvaluationDataNumber": 17,
        "tdxModule": {"mrsigner": "00".repeat(48), "attributes": "00".repeat(8), "attributesMask": "FF".repeat(8)},
        "tcbLevels": [{
            "tcb": {"sgxtcbcomponents": components, "pcesvn": 1, "tdxtcbcomponents": tdx},
            "tcbDate": "2020-01-01T00:00:00Z", "tcbStatus": "UpToDate",
        }],
    })
}

fn qe_identity() -> Value {
    json!({
        "id": "TD_QE", "version": 2, "issueDate": "2020-01-01T00:00:00Z", "nextUpdate": "2099-01-01T00:00:00Z",
        "tcbEvaluationDataNumber": 17, "miscselect": "00000000", "miscselectMask": "FFFFFFFF",
        "attributes": "00".repeat(16), "attributesMask": "FF".repeat(16), "mrsigner": "00".repeat(32), "isvprodid": 0,
        "tcbLevels": [{"tcb": {"isvsvn": 1}, "tcbDate": "2020-01-01T00:00:00Z", "tcbStatus": "UpToDate"}],
    })
}

/// A statement beside the signature over its own bytes.
fn signed(name: &str, statement: &Value, key: &EcdsaKeyPair) -> String {
    let text = statement.to_string();
    let signature = hex::encode(sign(key, text.as_bytes()));
    format!("{{\"{name}\":{text},\"signature\":\"{signature}\"}}")
}

/// PPID, TCB (SVNs of processor and PCE), PCE id, FMSPC and kind of SGX.
fn sgx_extension() -> Vec<u8> {
    let entry = |path: &[u8], value: Vec<u8>| {
        let name = der(0x06, &[&SGX_EXTENSION[..], path].concat());
        der(0x30, &[name, value].concat())
    };
    let tcb = [entry(&[2, 17], der(0x02, &[1])), entry(&[2, 18], der(0x04, &[1; 16]))].concat();
    let entries = [
        entry(&[1], der(0x04, &[0xaa; 16])),
        entry(&[2], der(0x30, &tcb)),
        entry(&[3], der(0x04, &[0; 2])),
        entry(&[4], der(0x04, &FMSPC)),
        entry(&[5], der(0x0a, &[1])),
    ];
    der(0x30, &entries.concat())
}

fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).expect("short values only");
    let head = if length < 128 { vec![tag, length] } else { vec![tag, 0x81, length] };
    [&head, content].concat()
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key")
}

fn signing(key: &KeyPair) -> EcdsaKeyPair {
    EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.serialize_der()).expect("a key of ours")
}

fn sign(key: &EcdsaKeyPair, message: &[u8]) -> Vec<u8> {
    key.sign(&SystemRandom::new(), message).expect("a signature").as_ref().to_vec()
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn ca(name: &str) -> CertificateParams {
    let mut params = named(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("a quote is short")
}

/// As headers carry PEM.
fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |mut escaped, byte| {
        match byte {
            b'\n' | b'%' | b' ' | b'+' => write!(escaped, "%{byte:02X}").expect("a string takes all"),
            b'\r' => {}
            byte => escaped.push(char::from(byte)),
        }
        escaped
    })
}
