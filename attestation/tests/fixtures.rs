//! Real documents of 2021 to 2025, from `../shared/fixtures/nitro`; skipped where that folder is absent.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a set-up that fails is a failed test"
)]

use std::fs;
use std::path::{Path, PathBuf};

use attestation::{AttestationDocument, Error, Policy, TrustAnchor, UnixMillis, Verifier};
use serde_json::Value;

const DAY_MS: u64 = 86_400_000;

/// The folder and the rows of its manifest.
fn fixtures() -> Option<(PathBuf, Vec<Value>)> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/fixtures/nitro"));
    let Ok(manifest) = fs::read(folder.join("manifest.json")) else {
        eprintln!("skipped: no {}", folder.display());
        return None;
    };
    Some((folder.into(), serde_json::from_slice(&manifest).unwrap()))
}

fn positive(row: &Value) -> bool {
    row["negative"].is_null()
}

fn hex_or_null(value: Option<&[u8]>) -> Value {
    value.map_or(Value::Null, |bytes| hex::encode(bytes).into())
}

#[test]
fn every_real_document_verifies_at_its_own_time_and_none_a_day_later() {
    let Some((folder, rows)) = fixtures() else { return };
    let plain = Verifier::new(TrustAnchor::aws_nitro_g1());
    let cached = Verifier::new(TrustAnchor::aws_nitro_g1()).with_chain_cache(100.try_into().unwrap());
    let mut accepted = 0;
    for row in rows.iter().filter(|row| positive(row)) {
        let name = row["file"].as_str().unwrap();
        let evidence = fs::read(folder.join(name)).unwrap();
        let now = UnixMillis(row["timestamp_ms"].as_u64().unwrap());

        let document = plain.verify(&evidence, now).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(document, cached.verify(&evidence, now).unwrap(), "{name}, first time");
        assert_eq!(document, cached.verify(&evidence, now).unwrap(), "{name}, from the cache");
        assert_eq!(*document, AttestationDocument::decode(&evidence).unwrap(), "{name}");

        assert_eq!(document.module_id(), row["module_id"], "{name}");
        assert_eq!(document.timestamp(), now, "{name}");
        assert_eq!(hex_or_null(document.user_data()), row["user_data"], "{name}");
        assert_eq!(hex_or_null(document.nonce()), row["nonce"], "{name}");
        assert_eq!(hex_or_null(document.public_key()), row["public_key"], "{name}");
        let pcrs: Value =
            document.pcrs().map(|(i, pcr)| (i.get().to_string(), Value::from(pcr.to_string()))).collect();
        assert_eq!(pcrs, row["pcrs"], "{name}");
        let debug = document.clone().appraise(&Policy::any_image_that_caller_authorises());
        assert_eq!(matches!(debug, Err(Error::Debug { .. })), row["debug"].as_bool().unwrap(), "{name}");

        let later = UnixMillis(now.0 + DAY_MS);
        for verifier in [&plain, &cached] {
            assert_eq!(verifier.verify(&evidence, later).unwrap_err().name(), "stale", "{name}");
        }
        accepted += 1;
    }
    assert!(accepted >= 56, "{accepted} documents");
}

#[test]
fn a_document_that_is_fresh_enough_still_needs_a_valid_chain() {
    let Some((folder, rows)) = fixtures() else { return };
    let freshness = attestation::Freshness { max_age: DAYS_10, max_skew: DAYS_10 };
    let verifier = Verifier::new(TrustAnchor::aws_nitro_g1())
        .with_freshness(freshness)
        .with_chain_cache(100.try_into().unwrap());
    for row in rows.iter().filter(|row| positive(row)) {
        let evidence = fs::read(folder.join(row["file"].as_str().unwrap())).unwrap();
        let now = row["timestamp_ms"].as_u64().unwrap();
        verifier.verify(&evidence, UnixMillis(now)).unwrap();
        let later = verifier.verify(&evidence, UnixMillis(now + DAY_MS)).unwrap_err();
        assert_eq!(later.name(), "certificate-expired", "{row}");
        let earlier = verifier.verify(&evidence, UnixMillis(now - 3 * DAY_MS)).unwrap_err();
        assert_eq!(earlier.name(), "certificate-not-yet-valid", "{row}");
    }
}

const DAYS_10: std::time::Duration = std::time::Duration::from_secs(10 * 86_400);

#[test]
fn every_negative_document_is_refused_for_its_reason() {
    let Some((folder, rows)) = fixtures() else { return };
    let verifier = Verifier::new(TrustAnchor::aws_nitro_g1());
    let mut refused = Vec::new();
    for row in rows.iter().filter(|row| !positive(row)) {
        let evidence = fs::read(folder.join(row["file"].as_str().unwrap())).unwrap();
        let now = UnixMillis(row["timestamp_ms"].as_u64().unwrap());
        refused.push(verifier.verify(&evidence, now).unwrap_err().name());
    }
    refused.sort_unstable();
    assert_eq!(refused, ["document-signature", "document-signature", "untrusted-root"]);
}
