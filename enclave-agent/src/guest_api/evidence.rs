//! Evidence for report data.
//!
//! The app's report data, up to 64 bytes and filled up with zeros, is the document's `user_data`; `nonce` and
//! `public_key` stay empty. `TdxQuote` hashes first, as upstream does.

use aws_lc_rs::digest;
use kms_protocol::attestation_encoding::Attestation;
use kms_protocol::report_data::LEN;
use kms_protocol::wire::guest::{
    AttestResponse, GetQuoteResponse, RawQuoteArgs, TdxQuoteArgs, TdxQuoteResponse,
};
use sha3::Digest;

use super::GuestApi;
use super::http::Failure;
use crate::evidence::OwnDocument;
use crate::nsm::AttestFields;

/// What upstream hashes with unless told otherwise, and the tag it then puts in front.
const DEFAULT_HASH: &str = "sha512";
const DEFAULT_PREFIX: &str = "app-data";

impl GuestApi {
    pub(super) async fn quote(&self, args: &RawQuoteArgs) -> Result<GetQuoteResponse, Failure> {
        let report_data = padded(&args.report_data)?;
        let document = self.document(report_data).await?;
        let event_log = self.events.lock().await.to_json();
        let vm_config = self.vm_config();
        let attestation = self.versioned(&document, report_data).await?;
        let quote = document.into_bytes();
        Ok(GetQuoteResponse { quote, event_log, report_data: report_data.to_vec(), vm_config, attestation })
    }

    pub(super) async fn attest(&self, args: &RawQuoteArgs) -> Result<AttestResponse, Failure> {
        let report_data = padded(&args.report_data)?;
        let document = self.document(report_data).await?;
        Ok(AttestResponse { attestation: self.versioned(&document, report_data).await? })
    }

    pub(super) async fn hashed_quote(&self, args: &TdxQuoteArgs) -> Result<TdxQuoteResponse, Failure> {
        let algorithm = if args.hash_algorithm.is_empty() { DEFAULT_HASH } else { &args.hash_algorithm };
        let (report_data, prefix) = if algorithm == "raw" {
            let exact = <[u8; LEN]>::try_from(args.report_data.as_slice()).map_err(|_| {
                Failure::bad(format!("report data has {} bytes, expected {LEN}", args.report_data.len()))
            })?;
            (exact, String::new())
        } else {
            let prefix = if args.prefix.is_empty() { DEFAULT_PREFIX } else { &args.prefix };
            (hashed(algorithm, prefix, &args.report_data)?, prefix.to_owned())
        };
        let document = self.document(report_data).await?;
        Ok(TdxQuoteResponse {
            quote: document.into_bytes(),
            event_log: self.events.lock().await.to_json(),
            hash_algorithm: algorithm.to_owned(),
            prefix,
        })
    }

    pub(super) async fn raw_quote(&self, args: RawQuoteArgs) -> Result<TdxQuoteResponse, Failure> {
        let RawQuoteArgs { report_data } = args;
        self.hashed_quote(&TdxQuoteArgs { report_data, hash_algorithm: "raw".into(), prefix: String::new() })
            .await
    }

    /// A document of this enclave that binds report data.
    pub(super) async fn document(&self, report_data: [u8; LEN]) -> Result<OwnDocument, Failure> {
        let fields = AttestFields { user_data: Some(report_data.to_vec()), ..AttestFields::default() };
        OwnDocument::ask(&self.nsm, fields, self.nsm_deadline())
            .await
            .map_err(|error| Failure::upstream(&error))
    }

    /// The document as dstack's versioned attestation, with the app's events behind its app id.
    async fn versioned(&self, document: &OwnDocument, report_data: [u8; LEN]) -> Result<Vec<u8>, Failure> {
        let mut attestation = self.attestation(document, report_data);
        attestation.runtime_events.extend(self.events.lock().await.runtime_events());
        attestation.encode_v0().map_err(|error| Failure::internal(&error))
    }

    /// The document as dstack's versioned attestation.
    pub(super) fn attestation(&self, document: &OwnDocument, report_data: [u8; LEN]) -> Attestation {
        let keys = self.keys.current();
        let hash = document.os_image_hash();
        Attestation::nitro(document.as_bytes().to_vec(), Some(keys.app_id()), report_data, hash.as_bytes())
    }
}

fn padded(data: &[u8]) -> Result<[u8; LEN], Failure> {
    let mut padded = [0; LEN];
    let target = padded.get_mut(..data.len()).ok_or_else(|| {
        Failure::bad(format!("Report data is too long: {} bytes, expected at most {LEN}", data.len()))
    })?;
    target.copy_from_slice(data);
    Ok(padded)
}

/// `H(prefix ":" data)`, filled up with zeros.
fn hashed(algorithm: &str, prefix: &str, data: &[u8]) -> Result<[u8; LEN], Failure> {
    let input = [prefix.as_bytes(), b":", data].concat();
    let lc = |algorithm| digest::digest(algorithm, &input).as_ref().to_vec();
    let hash = match algorithm {
        "sha256" => lc(&digest::SHA256),
        "sha384" => lc(&digest::SHA384),
        "sha512" => lc(&digest::SHA512),
        "sha3-256" => lc(&digest::SHA3_256),
        "sha3-384" => lc(&digest::SHA3_384),
        "sha3-512" => lc(&digest::SHA3_512),
        "keccak256" => sha3::Keccak256::digest(&input).to_vec(),
        "keccak384" => sha3::Keccak384::digest(&input).to_vec(),
        "keccak512" => sha3::Keccak512::digest(&input).to_vec(),
        other => {
            let name: String = other.chars().take(40).collect();
            return Err(Failure::bad(format!("Unsupported hash algorithm {name:?}")));
        }
    };
    padded(&hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_data_is_hashed_as_upstream_does() {
        // kms-protocol §13.2
        let expected = kms_protocol::report_data::app_data(b"hello");
        assert_eq!(hashed("sha512", "app-data", b"hello").unwrap(), expected);
        let sha256 = hashed("sha256", "ratls-cert", b"hello").unwrap();
        assert!(
            hex::encode(sha256)
                .starts_with("f892ff126c453f07c1fa94b280ba98641b1bf1ca1bbca3dbc59ad5450d0c9593")
        );
        assert_eq!(sha256[32..], [0; 32]);
        for name in ["sha384", "sha3-256", "sha3-384", "sha3-512", "keccak256", "keccak384", "keccak512"] {
            hashed(name, "app-data", b"").unwrap();
        }
        assert!(hashed("md5", "app-data", b"").is_err());
    }

    #[test]
    fn report_data_is_filled_up_and_never_cut() {
        assert_eq!(padded(&[7; LEN]).unwrap(), [7; LEN]);
        assert_eq!(padded(b"").unwrap(), [0; LEN]);
        assert!(padded(&[7; LEN + 1]).is_err());
    }
}
