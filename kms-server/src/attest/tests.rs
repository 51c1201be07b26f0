//! Real TDX quotes with a stand-in PCCS that serves the collateral recorded beside them; skipped without the fixtures.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use kms_protocol::attestation_encoding::{RuntimeEvent, TdxEvidence};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

struct Fixture {
    quote: Vec<u8>,
    collateral: Value,
    now: UnixMillis,
}

/// The fixtures that verify, of guests that recorded no events.
fn fixtures() -> Vec<Fixture> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/fixtures/tdx"));
    let Ok(manifest) = std::fs::read(folder.join("manifest.json")) else {
        println!("skipped: no {}", folder.display());
        return Vec::new();
    };
    let rows: Vec<Value> = serde_json::from_slice(&manifest).unwrap();
    let accepted = rows.iter().filter(|row| {
        row["expect"].as_str().unwrap_or_default().starts_with("accept") && row["rtmr"][3] == "0".repeat(96)
    });
    accepted
        .map(|row| {
            let read = |key: &str| std::fs::read(folder.join(row[key].as_str().unwrap())).unwrap();
            Fixture {
                quote: read("quote"),
                collateral: serde_json::from_slice(&read("collateral")).unwrap(),
                now: UnixMillis::from_secs(row["now"].as_u64().unwrap()),
            }
        })
        .collect()
}

/// Answers like a PCCS for one platform model, and counts.
struct StandIn {
    url: String,
    asked: Arc<Mutex<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl StandIn {
    async fn start(collateral: &Value) -> Self {
        let text = |key: &str| collateral[key].as_str().unwrap().to_owned();
        let escaped = |pem: String| pem.replace('%', "%25").replace('\n', "%0A").replace(' ', "%20");
        let chain = |header: &str, key: &str| format!("{header}: {}\r\n", escaped(text(key)));
        let body = |name: &str, key: &str| {
            format!("{{\"{name}\":{},\"signature\":\"{}\"}}", text(key), text(&format!("{key}_signature")))
                .into_bytes()
        };
        let answers: BTreeMap<&str, (String, Vec<u8>)> = BTreeMap::from([
            (
                "/sgx/certification/v4/pckcrl",
                (
                    chain("SGX-PCK-CRL-Issuer-Chain", "pck_crl_issuer_chain"),
                    hex::decode(text("pck_crl")).unwrap(),
                ),
            ),
            (
                "/tdx/certification/v4/tcb",
                (chain("TCB-Info-Issuer-Chain", "tcb_info_issuer_chain"), body("tcbInfo", "tcb_info")),
            ),
            (
                "/tdx/certification/v4/qe/identity",
                (
                    chain("SGX-Enclave-Identity-Issuer-Chain", "qe_identity_issuer_chain"),
                    body("enclaveIdentity", "qe_identity"),
                ),
            ),
            ("/sgx/certification/v4/rootcacrl", (String::new(), text("root_ca_crl").into_bytes())),
        ]);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = Arc::clone(&asked);
        let task = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 8192];
                let length = stream.read(&mut request).await.unwrap();
                let head = String::from_utf8_lossy(&request[..length]).into_owned();
                let target = head.split(' ').nth(1).unwrap_or_default().to_owned();
                let path = target.split('?').next().unwrap_or_default();
                let (headers, body) = answers.get(path).cloned().unwrap_or_default();
                log.lock().unwrap().push(target.clone());
                let head = format!("HTTP/1.1 200 OK\r\n{headers}content-length: {}\r\n\r\n", body.len());
                stream.write_all(&[head.as_bytes(), &body].concat()).await.unwrap();
            }
        });
        Self { url, asked, task }
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn attester(pccs: &str, references: References) -> Arc<Attester> {
    let trust = Trust {
        nitro_root: None,
        tdx_root: None,
        gcp_tpm_root: None,
        pccs: Url::parse(pccs).unwrap(),
        gcp_places: Vec::new(),
        fetch_timeout: Duration::from_secs(10),
        references,
    };
    Arc::new(Attester::new(trust, Arc::new(Offload::new(2, 16))).unwrap())
}

fn attestation(fixture: &Fixture) -> Attestation {
    Attestation {
        platform: PlatformEvidence::Tdx(TdxEvidence { quote: fixture.quote.clone(), event_log: Vec::new() }),
        runtime_events: Vec::new(),
        report_data: attestation::tdx::report_data(&fixture.quote).unwrap().0,
        config: String::new(),
        stack: Stack::Dstack,
    }
}

async fn verify(
    attester: &Arc<Attester>,
    attestation: Attestation,
    now: UnixMillis,
) -> Result<ClientEvidence, Error> {
    let report_data = attestation.report_data;
    attester.evidence(attestation, report_data, now).await
}

#[tokio::test]
async fn real_quotes_verify_with_fetched_collateral_also_when_the_pccs_is_gone() {
    for fixture in fixtures() {
        let pccs = StandIn::start(&fixture.collateral).await;
        let attester = attester(&pccs.url, References::default());
        let evidence = verify(&attester, attestation(&fixture), fixture.now).await.unwrap();
        assert_eq!(evidence.tee_variant(), "dstack-tdx");
        assert_eq!(evidence.raw_device_id().len(), 16);
        assert_eq!(pccs.asked(), 4);
        drop(pccs);
        verify(&attester, attestation(&fixture), fixture.now).await.unwrap();
    }
}

#[tokio::test]
async fn without_collateral_nothing_verifies_and_the_service_is_left_alone_for_a_while() {
    let Some(fixture) = fixtures().into_iter().next() else { return };
    // A port that nobody listens on.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let attester = attester(&format!("http://{closed}"), References::default());
    let first = verify(&attester, attestation(&fixture), fixture.now).await.err().unwrap();
    assert!(matches!(first, Error::Collateral(CollateralError::Service)), "{first}");
    let second = verify(&attester, attestation(&fixture), fixture.now).await.err().unwrap();
    assert!(matches!(second, Error::Collateral(CollateralError::Pause(_))), "{second}");
}

#[tokio::test]
async fn what_the_quote_does_not_bear_out_is_refused() {
    let Some(fixture) = fixtures().into_iter().next() else { return };
    let pccs = StandIn::start(&fixture.collateral).await;
    let attester = attester(&pccs.url, References::default());
    let good = attestation(&fixture);
    let mut cases: Vec<(&str, Attestation, &str)> = Vec::new();
    let mut events = good.clone();
    events.runtime_events.push(RuntimeEvent::new("app-id", [0x11; 20]));
    cases.push(("an event that was not measured", events, "runtime-events-mismatch"));
    let mut report_data = good.clone();
    report_data.report_data[0] ^= 1;
    cases.push(("other report data", report_data, "report-data-mismatch"));
    let mut pod = good.clone();
    pod.stack = Stack::DstackPod { report_data_payload: "x".into() };
    cases.push(("a pod's", pod, "pod-report-data"));
    let mut flipped = good.clone();
    if let PlatformEvidence::Tdx(evidence) = &mut flipped.platform {
        evidence.quote[200] ^= 1;
    }
    cases.push(("a changed register", flipped, "tdx-quote-unverified"));
    let mut cut = good.clone();
    if let PlatformEvidence::Tdx(evidence) = &mut cut.platform {
        evidence.quote.truncate(600);
    }
    cases.push(("a cut quote", cut, "tdx-quote-malformed"));
    let mut snp = good.clone();
    snp.platform = PlatformEvidence::SevSnp { report: vec![], cert_chain: vec![], mr_config: String::new() };
    cases.push(("another platform", snp, "platform-not-supported"));
    for (name, attestation, expected) in cases {
        let error = verify(&attester, attestation, fixture.now).await.err().unwrap();
        assert_eq!(error.name(), expected, "{name}: {error}");
    }
    let late = UnixMillis::from_secs(fixture.now.as_secs() + 200 * 24 * 3600);
    let error = verify(&attester, good, late).await.err().unwrap();
    assert_eq!(error.name(), "tdx-quote-unverified", "{error}");
}

/// The image hash is the guest's word until its registers are known to be that image's.
#[tokio::test]
async fn an_image_hash_needs_the_registers_of_the_image() {
    let Some(fixture) = fixtures().into_iter().next() else { return };
    let pccs = StandIn::start(&fixture.collateral).await;
    let config = format!("{{\"os_image_hash\":\"{}\"}}", "09".repeat(32));
    let unknown = attester(&pccs.url, References::default());
    let evidence = verify(&unknown, attestation(&fixture), fixture.now).await.unwrap();
    let error = evidence.into_client(&config, Moment::Now).err().unwrap();
    assert!(matches!(&error, Error::Image(text) if text.contains("no measurements are known")), "{error}");

    let evidence = verify(&unknown, attestation(&fixture), fixture.now).await.unwrap();
    let Verified::Tdx(quote) = &evidence.platform else { panic!("it is TDX evidence") };
    let registers = registers(quote);
    let row = |mrtd: &[u8; 48]| {
        let [rtmr0, rtmr1, rtmr2] = registers.rtmrs.map(hex::encode);
        format!(
            r#"{{"{}":[{{"mrtd":"{}","rtmr0":"{rtmr0}","rtmr1":"{rtmr1}","rtmr2":"{rtmr2}"}}]}}"#,
            "09".repeat(32),
            hex::encode(mrtd)
        )
    };
    let known = attester(&pccs.url, References::from_json(&row(&registers.mrtd)).unwrap());
    let evidence = verify(&known, attestation(&fixture), fixture.now).await.unwrap();
    // The image is the right one; these guests belong to no app.
    assert!(matches!(evidence.into_client(&config, Moment::Now), Err(Error::AppId)));
    let other = attester(&pccs.url, References::from_json(&row(&[1; 48])).unwrap());
    let evidence = verify(&other, attestation(&fixture), fixture.now).await.unwrap();
    assert!(
        matches!(evidence.into_client(&config, Moment::Now), Err(Error::Image(text)) if text == "MRs do not match")
    );
}
