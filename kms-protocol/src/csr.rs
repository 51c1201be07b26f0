//! The signing request of `SignCert` (kms-protocol §7.5), SCALE.

use crate::attestation_encoding::{Error, ScaleReader, ScaleWriter};

/// The text every request starts with, so that a signature over it cannot be meant otherwise.
const CONFIRM: &str = "please sign cert:";

/// A request for a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateRequest {
    /// SubjectPublicKeyInfo of the key to certify, DER.
    pub pubkey: Vec<u8>,
    /// `O` of the subject.
    pub org_name: Option<String>,
    /// `CN` of the subject.
    pub subject: String,
    /// Names; IP addresses are written as text.
    pub subject_alt_names: Vec<String>,
    /// Whether a server may use it.
    pub usage_server_auth: bool,
    /// Whether a client may use it.
    pub usage_client_auth: bool,
    /// Whether to put the attestation into it.
    pub ext_quote: bool,
    /// What depends on the version.
    pub version: RequestVersion,
}

/// The part of a request that differs between the versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestVersion {
    /// `api_version` 1: TDX only.
    V1 {
        /// TDX quote.
        quote: Vec<u8>,
        /// JSON event log.
        event_log: Vec<u8>,
    },
    /// `api_version` 2.
    V2 {
        /// Whether to put app info into the certificate.
        ext_app_info: bool,
        /// Start of its validity, seconds since the epoch.
        not_before: Option<u64>,
        /// End of its validity, seconds since the epoch.
        not_after: Option<u64>,
        /// Encoded attestation, to the end of the request.
        attestation: Vec<u8>,
    },
}

impl CertificateRequest {
    /// Decodes the request of that `api_version`. The attestation inside is not decoded.
    ///
    /// # Errors
    /// See [`Error`]; `api_version` other than 1 and 2 is [`Error::UnsupportedVersion`].
    pub fn decode(api_version: u32, bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = ScaleReader::new(bytes);
        if reader.string("confirm")? != CONFIRM {
            return Err(Error::UnknownName { what: "confirm" });
        }
        let pubkey = reader.bytes("pubkey")?;
        let org_name = reader.option("org_name", |reader| reader.string("org_name"))?;
        let subject = reader.string("subject")?;
        let subject_alt_names =
            reader.list("subject_alt_names", 1, |reader| reader.string("subject_alt_names"))?;
        let usage_server_auth = reader.bool("usage_server_auth")?;
        let usage_client_auth = reader.bool("usage_client_auth")?;
        let ext_quote = reader.bool("ext_quote")?;
        let version = match api_version {
            1 => {
                let version = RequestVersion::V1 {
                    quote: reader.bytes("quote")?,
                    event_log: reader.bytes("event_log")?,
                };
                reader.end()?;
                version
            }
            2 => RequestVersion::V2 {
                ext_app_info: reader.bool("ext_app_info")?,
                not_before: reader.option("not_before", |reader| reader.u64("not_before"))?,
                not_after: reader.option("not_after", |reader| reader.u64("not_after"))?,
                attestation: reader.into_rest().to_vec(),
            },
            other => return Err(Error::UnsupportedVersion { what: "api_version", actual: u64::from(other) }),
        };
        Ok(Self {
            pubkey,
            org_name,
            subject,
            subject_alt_names,
            usage_server_auth,
            usage_client_auth,
            ext_quote,
            version,
        })
    }

    /// Encodes the request: what the key to certify signs.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = ScaleWriter::default();
        writer.string(CONFIRM);
        writer.bytes(&self.pubkey);
        writer.option(self.org_name.as_deref(), |writer, name| writer.string(name));
        writer.string(&self.subject);
        writer.list(&self.subject_alt_names, |writer, name| writer.string(name));
        writer.bool(self.usage_server_auth);
        writer.bool(self.usage_client_auth);
        writer.bool(self.ext_quote);
        match &self.version {
            RequestVersion::V1 { quote, event_log } => {
                writer.bytes(quote);
                writer.bytes(event_log);
            }
            RequestVersion::V2 { ext_app_info, not_before, not_after, attestation } => {
                writer.bool(*ext_app_info);
                writer.option(*not_before, |writer, seconds| writer.raw(&seconds.to_le_bytes()));
                writer.option(*not_after, |writer, seconds| writer.raw(&seconds.to_le_bytes()));
                writer.raw(attestation);
            }
        }
        writer.out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attestation_encoding::VersionedAttestation;
    use crate::vectors::{NITRO_V0, ROOT_SPKI, bytes};

    const CONFIRM_HEX: &str = "44706c65617365207369676e20636572743a";

    fn request(version: RequestVersion) -> CertificateRequest {
        CertificateRequest {
            pubkey: bytes(ROOT_SPKI),
            org_name: None,
            subject: "cn".into(),
            subject_alt_names: vec!["a.b".into()],
            usage_server_auth: true,
            usage_client_auth: true,
            ext_quote: false,
            version,
        }
    }

    /// Frozen (§13.4): fix the code, not the vector.
    #[test]
    fn requests_are_frozen() {
        let v1 = CertificateRequest {
            org_name: Some("Org".into()),
            subject_alt_names: vec!["a.b".into(), "1.2.3.4".into()],
            usage_client_auth: false,
            ext_quote: true,
            ..request(RequestVersion::V1 { quote: vec![9, 8], event_log: b"[]".to_vec() })
        };
        let vector = format!(
            "{CONFIRM_HEX}6d01{ROOT_SPKI}010c4f726708636e080c612e621c312e322e332e3401000108090808 5b5d"
        );
        assert_eq!(v1.encode(), bytes(&vector));
        assert_eq!(CertificateRequest::decode(1, &bytes(&vector)).unwrap(), v1);

        let v2 = request(RequestVersion::V2 {
            ext_app_info: false,
            not_before: Some(1),
            not_after: Some(0x11_2233_4455),
            attestation: bytes(NITRO_V0),
        });
        let vector = format!(
            "{CONFIRM_HEX}6d01{ROOT_SPKI}0008636e040c612e6201010000 01 0100000000000000 01 5544332211000000 {NITRO_V0}"
        );
        assert_eq!(v2.encode(), bytes(&vector));
        assert_eq!(CertificateRequest::decode(2, &bytes(&vector)).unwrap(), v2);
    }

    /// Frozen (§13.4, upstream's own): fix the code, not the vector.
    #[test]
    fn upstream_requests_decode() {
        let zeros = "00".repeat(64);
        let cases = [
            (
                false,
                0,
                format!(
                    "{CONFIRM_HEX}0c0102030040746573742e6578616d706c652e636f6d000100000000000000000000{zeros}00"
                ),
            ),
            (
                true,
                1,
                format!(
                    "{CONFIRM_HEX}0c0102030040746573742e6578616d706c652e636f6d00010001000000000004090000{zeros}00"
                ),
            ),
        ];
        for (ext_quote, quote_len, vector) in cases {
            let request = CertificateRequest::decode(2, &bytes(&vector)).unwrap();
            assert_eq!((request.ext_quote, request.subject.as_str()), (ext_quote, "test.example.com"));
            assert_eq!(request.encode(), bytes(&vector));
            let RequestVersion::V2 { attestation, .. } = request.version else { panic!("decoded as V1") };
            let attestation = VersionedAttestation::decode(&attestation).unwrap().into_attestation();
            assert_eq!(attestation.platform.tdx().unwrap().quote.len(), quote_len);
        }
    }

    #[test]
    fn every_truncation_of_a_v1_request_is_rejected() {
        let whole = request(RequestVersion::V1 { quote: vec![9, 8], event_log: b"[]".to_vec() }).encode();
        for len in 0..whole.len() {
            let error = CertificateRequest::decode(1, &whole[..len]).unwrap_err();
            assert!(matches!(error, Error::Truncated { .. }), "a prefix of {len} bytes: {error}");
        }
        let trailing = [whole.as_slice(), &[0]].concat();
        assert_eq!(CertificateRequest::decode(1, &trailing), Err(Error::TrailingBytes { left: 1 }));
    }

    #[test]
    fn other_versions_and_other_texts_are_refused() {
        let whole = request(RequestVersion::V1 { quote: vec![], event_log: vec![] }).encode();
        assert_eq!(
            CertificateRequest::decode(3, &whole),
            Err(Error::UnsupportedVersion { what: "api_version", actual: 3 })
        );
        let mut other_text = whole;
        other_text[1] = b'P';
        assert_eq!(CertificateRequest::decode(1, &other_text), Err(Error::UnknownName { what: "confirm" }));
    }
}
