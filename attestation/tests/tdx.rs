//! Real TDX quotes with their collateral, from `../shared/fixtures/tdx`; skipped where that folder is absent.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a set-up that fails is a failed test"
)]

use std::fs;
use std::path::{Path, PathBuf};

use attestation::UnixMillis;
use attestation::tdx::{
    Collateral, Error, Measurement, Policy, ReportData, TcbStatus, VerifiedQuote, Verifier,
};
use serde_json::Value;

const DAY_SECS: u64 = 86_400;

struct Fixture {
    name: String,
    quote: Vec<u8>,
    collateral: Option<Collateral>,
    /// The platform model that the collateral is for.
    fmspc: Value,
    now: UnixMillis,
    row: Value,
}

impl Fixture {
    fn verify(&self) -> Result<VerifiedQuote, Error> {
        self.verify_quote(&self.quote)
    }

    fn verify_quote(&self, quote: &[u8]) -> Result<VerifiedQuote, Error> {
        Verifier::new().verify(quote, self.collateral.as_ref().unwrap(), self.now)
    }

    fn accepted(&self) -> bool {
        self.row["expect"].as_str().is_some_and(|expect| expect.starts_with("accept"))
    }
}

fn fixtures() -> Vec<Fixture> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/fixtures/tdx"));
    let Ok(manifest) = fs::read(folder.join("manifest.json")) else {
        eprintln!("skipped: no {}", folder.display());
        return Vec::new();
    };
    let rows: Vec<Value> = serde_json::from_slice(&manifest).unwrap();
    let read = |name: &Value| fs::read(folder.join(PathBuf::from(name.as_str()?))).ok();
    let fixture = |row: Value| Fixture {
        name: row["name"].to_string(),
        quote: read(&row["quote"]).unwrap(),
        fmspc: read(&row["collateral"]).map_or(Value::Null, |json| fmspc(&json)),
        collateral: read(&row["collateral"]).map(|json| Collateral::from_json(&json).unwrap()),
        now: UnixMillis::from_secs(row["now"].as_u64().unwrap_or(0)),
        row,
    };
    rows.into_iter().map(fixture).collect()
}

fn fmspc(collateral: &[u8]) -> Value {
    let collateral: Value = serde_json::from_slice(collateral).unwrap();
    let tcb_info: Value = serde_json::from_str(collateral["tcb_info"].as_str().unwrap()).unwrap();
    tcb_info["fmspc"].clone()
}

fn measurement(value: &Value) -> Measurement {
    Measurement(hex::decode(value.as_str().unwrap()).unwrap().try_into().unwrap())
}

#[test]
fn real_quotes_verify_at_their_time_and_not_200_days_later() {
    for mut fixture in fixtures().into_iter().filter(Fixture::accepted) {
        let quote = fixture.verify().unwrap_or_else(|error| panic!("{}: {error}", fixture.name));
        assert_eq!(quote.tcb_status(), TcbStatus::UpToDate, "{}", fixture.name);
        assert_eq!(quote.report().mrtd, measurement(&fixture.row["mrtd"]), "{}", fixture.name);
        assert_eq!(quote.report().rtmrs.map(|rtmr| rtmr.to_string()).to_vec(), strings(&fixture.row["rtmr"]));
        assert_eq!(quote.report().report_data.to_string(), fixture.row["report_data"], "{}", fixture.name);
        assert_eq!(quote.report().mr_signer_seam, Measurement([0; 48]), "{}", fixture.name);

        fixture.now = UnixMillis::from_secs(fixture.now.as_secs() + 200 * DAY_SECS);
        assert_eq!(fixture.verify().unwrap_err().name(), "tdx-quote-unverified", "{}", fixture.name);
    }
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_platform_without_a_matching_tcb_level_is_refused() {
    for fixture in
        fixtures().into_iter().filter(|fixture| fixture.collateral.is_some() && !fixture.accepted())
    {
        let error = fixture.verify().unwrap_err();
        assert_eq!(error.name(), "tdx-quote-unverified", "{}: {error}", fixture.name);
    }
}

/// Collateral is made for a platform model, so two machines of one model share it.
#[test]
fn another_platforms_collateral_is_refused() {
    let fixtures: Vec<_> = fixtures().into_iter().filter(Fixture::accepted).collect();
    let mut pairs = 0;
    for quote in &fixtures {
        for other in fixtures.iter().filter(|other| other.fmspc != quote.fmspc) {
            assert!(other.verify_quote(&quote.quote).is_err(), "{} with {}", quote.name, other.name);
            pairs += 1;
        }
    }
    assert!(pairs > 0 || fixtures.is_empty());
}

/// In the header, the TD report and the authentication data, one bit in every 61 bytes.
#[test]
fn a_flipped_bit_is_refused() {
    for fixture in fixtures().into_iter().filter(Fixture::accepted) {
        for at in (0..632 + 4 + 64 + 64 + 384 + 64).step_by(61) {
            let mut quote = fixture.quote.clone();
            quote[at] ^= 1 << (at % 8);
            assert!(fixture.verify_quote(&quote).is_err(), "{}: byte {at}", fixture.name);
        }
    }
}

#[test]
fn every_debug_bit_is_refused() {
    const TD_ATTRIBUTES: usize = 48 + 120;
    for fixture in fixtures().into_iter().filter(|fixture| fixture.accepted()) {
        for bit in 0..8 {
            let mut quote = fixture.quote.clone();
            quote[TD_ATTRIBUTES] |= 1 << bit;
            assert_eq!(fixture.verify_quote(&quote).unwrap_err(), Error::Debug { bits: 1 << bit });
        }
    }
}

#[test]
fn only_zeros_may_follow_a_quote() {
    for fixture in fixtures().into_iter().filter(Fixture::accepted) {
        let mut quote = fixture.quote.clone();
        quote.resize(10_000, 0);
        fixture.verify_quote(&quote).unwrap();
        *quote.last_mut().unwrap() = 1;
        assert_eq!(fixture.verify_quote(&quote).unwrap_err().name(), "tdx-quote-trailing-bytes");
        quote.resize(16 * 1024 + 1, 0);
        assert_eq!(fixture.verify_quote(&quote).unwrap_err().name(), "tdx-quote-too-large");
    }
}

#[test]
fn every_truncation_is_refused() {
    for fixture in fixtures().into_iter().filter(Fixture::accepted) {
        let whole = fixture.quote.iter().rposition(|byte| *byte != 0).unwrap();
        for len in (0..whole).step_by(97).chain([whole]) {
            assert!(fixture.verify_quote(&fixture.quote[..len]).is_err(), "{}: {len} bytes", fixture.name);
        }
    }
}

#[test]
fn the_policy_judges_measurements_report_data_and_tcb_status() {
    for fixture in fixtures().into_iter().filter(Fixture::accepted) {
        let quote = fixture.verify().unwrap();
        let report = *quote.report();
        let policy = Policy::for_mrtd(report.mrtd)
            .with_rtmrs(report.rtmrs.map(Some))
            .with_report_data(report.report_data);
        assert_eq!(*quote.clone().appraise(&policy).unwrap(), quote);

        let wrong = Measurement([7; 48]);
        let name = |policy: Policy| quote.clone().appraise(&policy).unwrap_err().name();
        assert_eq!(name(Policy::for_mrtd(wrong)), "tdx-measurement-mismatch");
        for index in 0..4 {
            let mut rtmrs = [None; 4];
            rtmrs[index] = Some(wrong);
            assert_eq!(name(policy.clone().with_rtmrs(rtmrs)), "tdx-measurement-mismatch");
        }
        assert_eq!(name(policy.with_report_data(ReportData([7; 64]))), "tdx-report-data-mismatch");
    }
}

#[test]
fn collateral_is_bounded_and_must_be_json() {
    assert_eq!(Collateral::from_json(b"{}").unwrap_err().name(), "tdx-collateral-unreadable");
    let large = vec![b' '; attestation::tdx::MAX_COLLATERAL_LEN + 1];
    assert_eq!(Collateral::from_json(&large).unwrap_err().name(), "tdx-collateral-too-large");
}

#[test]
fn tcb_statuses_are_spelt_as_intel_does() {
    for name in
        ["UpToDate", "SWHardeningNeeded", "OutOfDateConfigurationNeeded", "TDRelaunchAdvised", "Revoked"]
    {
        assert_eq!(name.parse::<TcbStatus>().unwrap().to_string(), name);
    }
    assert!("uptodate".parse::<TcbStatus>().is_err());
}
