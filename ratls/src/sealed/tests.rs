//! HPKE as the specification has it: round trips, an answer frozen in the documentation, everything changed or cut.

use std::sync::Arc;

use kms_protocol::derive::K256PublicKey;
use kms_protocol::sealed::Binding;
use kms_protocol::{AppId, InstanceId};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConnection, ServerConnection};
use rustls_pki_types::ServerName;

use super::*;
use crate::UnixTime;
use crate::issue::{Ca, KeyPair, root_ca, rpc_leaf, temp_ca};
use crate::server::ServerConfigBuilder;

/// The private key of the vectors.
const PRIVATE_KEY: [u8; 32] = [0x77; 32];
const PUBLIC_KEY: &str = "1cf579aba45a10ba1d1ef06d91fca2aa9ed0a1150515653155405d0b18cb9a67";
const ENC: &str = "38ab664bd86f77d7e66bdd9ae0792913a94fd8b33a1260027e4b46c1f4884c67";
const CIPHERTEXT: &str =
    "318a552e4e66becf65ec2189c58491d47a458856dba3b8cd4db6ecd9e98296910abe217c5f086927610ce0ea3c";
/// The public root keys of the vectors.
const ROOT_SPKI: &str = "3059301306072a8648ce3d020106082a8648ce3d0301070342000491f50522407ce29dce3ed7d31a15d80c1c42f13a23552d2b33a0ce09ee11e47bce95936f3e7f80d195f879e28e1b144ef37ac9ab8e36a690cbf930b775897b27";
const ROOT_K256: &str = "0324653eac434488002cc06bbfb7f10fe18991e35f9fe4302dbea6d2353dc0ab1c";
const PLAINTEXT: &[u8] = b"an AppKeyResponse in protobuf";

fn commitment(nonce: [u8; 32], public_key: &[u8; 32]) -> Commitment {
    let bytes = |text| hex::decode(text).unwrap();
    let root_k256 = K256PublicKey::from_sec1(&bytes(ROOT_K256)).unwrap();
    Binding {
        nonce: &nonce,
        public_key,
        app_id: &AppId::new([0x11; 20]),
        instance_id: &InstanceId::NONE,
        root_ca_spki: &bytes(ROOT_SPKI),
        root_k256: &root_k256,
        exporter: &Exporter([0xee; 32]),
    }
    .commitment()
}

fn vector_key() -> RecipientKey {
    let mut public = [0; 32];
    hex::decode_to_slice(PUBLIC_KEY, &mut public).unwrap();
    RecipientKey { public, private: HpkePrivateKey::from(PRIVATE_KEY.to_vec()) }
}

#[test]
fn only_the_key_that_was_sealed_to_opens() {
    let key = RecipientKey::generate().unwrap();
    let commitment = commitment([1; 32], key.public_key());
    let sealed = seal(key.public_key(), &commitment, PLAINTEXT).unwrap();
    assert_eq!(sealed.ciphertext.len(), PLAINTEXT.len() + 16);
    let other = RecipientKey::generate().unwrap();
    assert!(matches!(other.open(&commitment, &sealed), Err(Error::Hpke(_))));
    assert_eq!(key.open(&commitment, &sealed).unwrap().as_slice(), PLAINTEXT);
}

/// Frozen, and sealed by an independent program: fix the code, not the vector.
#[test]
fn an_answer_that_another_program_sealed_opens() {
    let mut sealed = Sealed { enc: [0; 32], ciphertext: hex::decode(CIPHERTEXT).unwrap() };
    hex::decode_to_slice(ENC, &mut sealed.enc).unwrap();
    let key = vector_key();
    let commitment = commitment([0xa1; 32], key.public_key());
    assert_eq!(
        hex::encode(commitment.as_bytes()),
        "f4694e755cebc2c23b2425a3ff341e12369881bacf5a626794240fe07e6bfb35"
    );
    assert_eq!(key.open(&commitment, &sealed).unwrap().as_slice(), PLAINTEXT);
}

#[test]
fn every_change_and_every_truncation_is_refused() {
    let public = *vector_key().public_key();
    let commitment_ = commitment([1; 32], &public);
    let sealed = seal(&public, &commitment_, PLAINTEXT).unwrap();
    let refused = |commitment: &Commitment, sealed: &Sealed| {
        assert!(matches!(vector_key().open(commitment, sealed), Err(Error::Hpke(_))), "{sealed:?}");
    };
    refused(&commitment([2; 32], &public), &sealed);
    for at in 0..32 {
        let mut changed = sealed.clone();
        // The top bit of an X25519 key is ignored by everybody; HPKE hashes it, so it counts all the same.
        changed.enc[at] ^= 0x80;
        refused(&commitment_, &changed);
    }
    for at in 0..sealed.ciphertext.len() {
        let mut changed = sealed.clone();
        changed.ciphertext[at] ^= 1;
        refused(&commitment_, &changed);
        changed.ciphertext.truncate(at);
        refused(&commitment_, &changed);
    }
    let mut longer = sealed.clone();
    longer.ciphertext.push(0);
    refused(&commitment_, &longer);
}

#[test]
fn a_public_key_of_small_order_is_refused() {
    let commitment = commitment([1; 32], &[0; 32]);
    let mut one = [0; 32];
    one[0] = 1;
    for public_key in [[0; 32], one] {
        assert!(matches!(seal(&public_key, &commitment, PLAINTEXT), Err(Error::Hpke(_))));
    }
}

/// Both ends of a handshake done in memory.
fn connect(versions: &[&'static rustls::SupportedProtocolVersion]) -> (ClientConnection, ServerConnection) {
    let now = UnixTime::now();
    let root_key = KeyPair::generate().unwrap();
    let root = root_ca(&root_key, now).unwrap();
    let root = Ca::new("root", root.der().clone(), root_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = rpc_leaf(&root, &key, "localhost", None, now).unwrap();
    let temp = temp_ca(&KeyPair::generate().unwrap(), now).unwrap();
    let server = ServerConfigBuilder::new(temp.der().clone()).unwrap().build(&leaf, &key).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(root.certificate().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(crate::provider())
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut wire.as_slice()).unwrap();
        server.process_new_packets().unwrap();
        let mut wire = Vec::new();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut wire.as_slice()).unwrap();
        client.process_new_packets().unwrap();
    }
    (client, server)
}

#[test]
fn an_exporter_is_equal_at_both_ends_of_one_connection_only() {
    let (client, server) = connect(&[&TLS12, &TLS13]);
    let (other_client, other_server) = connect(&[&TLS13]);
    assert_eq!(exporter(&client).unwrap(), exporter(&server).unwrap());
    assert_eq!(exporter(&other_client).unwrap(), exporter(&other_server).unwrap());
    assert_ne!(exporter(&client).unwrap(), exporter(&other_client).unwrap());
}

#[test]
fn a_connection_of_tls_1_2_has_no_exporter() {
    let (client, server) = connect(&[&TLS12]);
    assert!(matches!(exporter(&client), Err(Error::ExporterVersion)));
    assert!(matches!(exporter(&server), Err(Error::ExporterVersion)));
}
