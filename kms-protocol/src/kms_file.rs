//! `kms.json`: where a KMS is and by which keys it is recognised. Written by whoever stood the KMS up and verified it;
//! read by whoever builds an image that is to get its keys there. Nothing in it is secret.

use serde::{Deserialize, Serialize};

use crate::cert::spki_der;
use crate::derive::K256PublicKey;

/// The version written and read.
pub const VERSION: u32 = 1;
/// Largest file that is read, in bytes.
pub const MAX_LEN: usize = 64 * 1024;

/// Why a file is no `kms.json`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// More than [`MAX_LEN`] bytes.
    #[error("{0} bytes, at most {MAX_LEN} are read")]
    TooLong(usize),
    /// Not the JSON it should be.
    #[error("not a kms.json")]
    Json(#[source] serde_json::Error),
    /// Of a later version.
    #[error("version {0}, this program reads {VERSION}")]
    Version(u32),
    /// A value is not what its name asks for.
    #[error("{name}: expected {expected}")]
    Value {
        /// The name.
        name: &'static str,
        /// What it should be.
        expected: &'static str,
    },
}

/// A KMS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KmsFile {
    /// [`VERSION`].
    pub version: u32,
    /// `https://HOST:PORT`, without a path.
    pub url: String,
    /// More nodes with the same root keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replicas: Vec<String>,
    /// SubjectPublicKeyInfo of the root CA, DER in hex: what is pinned. The certificate may be renewed.
    pub ca_pubkey: String,
    /// The root CA's certificate as the node showed it, PEM.
    pub ca_cert: String,
    /// The K256 root, compressed, hex.
    pub k256_pubkey: String,
    /// What the node at `url` runs on.
    pub node: Node,
}

/// What a node runs on, from verified evidence; hex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Kind of TEE.
    pub tee_variant: String,
    /// Image hash.
    pub os_image_hash: String,
    /// Aggregated measurement.
    pub mr_aggregated: String,
    /// Hash of the device id.
    pub device_id: String,
    /// Hash of what the guest runs.
    pub compose_hash: String,
}

impl KmsFile {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// [`Error`] names what is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() > MAX_LEN {
            return Err(Error::TooLong(bytes.len()));
        }
        // First the version alone: a later one may have other keys.
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let head: Head = serde_json::from_slice(bytes).map_err(Error::Json)?;
        if head.version != VERSION {
            return Err(Error::Version(head.version));
        }
        let file: Self = serde_json::from_slice(bytes).map_err(Error::Json)?;
        file.check()?;
        Ok(file)
    }

    /// The file's bytes: indented, with a line feed at the end.
    ///
    /// # Errors
    ///
    /// As [`decode`](Self::decode): what could not be read back is not written.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        self.check()?;
        let mut bytes = serde_json::to_vec_pretty(self).map_err(Error::Json)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// The pinned key of the root CA, DER.
    ///
    /// # Errors
    ///
    /// [`Error::Value`].
    pub fn ca_spki(&self) -> Result<Vec<u8>, Error> {
        hex::decode(&self.ca_pubkey).map_err(|_| Error::Value { name: "ca_pubkey", expected: "hex" })
    }

    /// The pinned K256 root.
    ///
    /// # Errors
    ///
    /// [`Error::Value`].
    pub fn k256(&self) -> Result<K256PublicKey, Error> {
        let expected = "a compressed secp256k1 public key in hex";
        self.k256_pubkey.parse().map_err(|_| Error::Value { name: "k256_pubkey", expected })
    }

    fn check(&self) -> Result<(), Error> {
        let Self { version, url, replicas, ca_pubkey: _, ca_cert, k256_pubkey: _, node } = self;
        if *version != VERSION {
            return Err(Error::Version(*version));
        }
        if !is_origin(url) {
            return Err(Error::Value { name: "url", expected: "https://HOST or https://HOST:PORT" });
        }
        if !replicas.iter().all(|url| is_origin(url)) {
            return Err(Error::Value { name: "replicas", expected: "https://HOST or https://HOST:PORT" });
        }
        self.k256()?;
        let spki = certificate_spki(ca_cert)
            .ok_or(Error::Value { name: "ca_cert", expected: "one certificate in PEM" })?;
        if spki != self.ca_spki()? {
            let expected = "the key of the certificate in ca_cert";
            return Err(Error::Value { name: "ca_pubkey", expected });
        }
        let Node { tee_variant, os_image_hash, mr_aggregated, device_id, compose_hash } = node;
        if tee_variant.is_empty() {
            return Err(Error::Value { name: "node.tee_variant", expected: "the name of a platform" });
        }
        for (name, text) in [
            ("node.os_image_hash", os_image_hash),
            ("node.mr_aggregated", mr_aggregated),
            ("node.device_id", device_id),
            ("node.compose_hash", compose_hash),
        ] {
            if hex::decode(text).is_err() {
                return Err(Error::Value { name, expected: "hex" });
            }
        }
        Ok(())
    }
}

fn is_origin(url: &str) -> bool {
    let Some(authority) = url.strip_prefix("https://") else { return false };
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte);
    !host.is_empty()
        && host.bytes().all(plain)
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port != 0))
}

fn certificate_spki(pem: &str) -> Option<Vec<u8>> {
    let (rest, parsed) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).ok()?;
    let alone = parsed.label == "CERTIFICATE" && rest.iter().all(u8::is_ascii_whitespace);
    alone.then(|| spki_der(&parsed.contents).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::{K256_ROOT_PUBLIC, ROOT_CERT_PEM};

    fn good() -> KmsFile {
        let hash = |byte: &str| byte.repeat(32);
        KmsFile {
            version: VERSION,
            url: "https://kms.example.com:12001".into(),
            replicas: vec!["https://kms-b.example.com:12001".into()],
            ca_pubkey: hex::encode(certificate_spki(ROOT_CERT_PEM).unwrap()),
            ca_cert: ROOT_CERT_PEM.into(),
            k256_pubkey: K256_ROOT_PUBLIC.into(),
            node: Node {
                tee_variant: "dstack-gcp-tdx".into(),
                os_image_hash: hash("01"),
                mr_aggregated: hash("02"),
                device_id: hash("03"),
                compose_hash: hash("04"),
            },
        }
    }

    #[test]
    fn what_was_written_is_read_again() {
        let bytes = good().encode().unwrap();
        assert_eq!(KmsFile::decode(&bytes).unwrap(), good());
        for len in 0..bytes.len() - 1 {
            assert!(KmsFile::decode(&bytes[..len]).is_err(), "a prefix of {len} bytes");
        }
    }

    #[test]
    fn files_with_mistakes_are_refused() {
        type Change = fn(&mut serde_json::Value);
        let cases: [(&str, Change, &str); 10] = [
            ("a later version", |file| file["version"] = 2.into(), "version 2, this program reads 1"),
            ("an unknown key", |file| file["x"] = 1.into(), "not a kms.json"),
            ("no TLS", |file| file["url"] = "http://a:1".into(), "url: expected https://HOST"),
            ("a path", |file| file["url"] = "https://a:1/prpc".into(), "url: expected https://HOST"),
            ("a user", |file| file["url"] = "https://u@a:1".into(), "url: expected https://HOST"),
            ("no port number", |file| file["replicas"][0] = "https://a:0".into(), "replicas: expected"),
            ("no point", |file| file["k256_pubkey"] = "02".into(), "k256_pubkey: expected"),
            ("no certificate", |file| file["ca_cert"] = "".into(), "ca_cert: expected"),
            ("another key", |file| file["ca_pubkey"] = "00".into(), "ca_pubkey: expected the key of"),
            ("no hex", |file| file["node"]["device_id"] = "x".into(), "node.device_id: expected hex"),
        ];
        for (name, change, expected) in cases {
            let mut file = serde_json::to_value(good()).unwrap();
            change(&mut file);
            let error = KmsFile::decode(file.to_string().as_bytes()).expect_err(name).to_string();
            assert!(error.starts_with(expected), "{name}: {error}");
        }
        assert!(matches!(KmsFile::decode(&[b' '; MAX_LEN + 1]), Err(Error::TooLong(_))));
    }
}
