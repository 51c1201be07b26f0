//! Keys by path and what they sign.
//!
//! The signature chain is upstream's: the app's key signs `purpose:hex(public key)`, and the KMS's root signed the
//! app's key when it released it.

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use kms_protocol::derive::{PathKey, verify_k256, verify_k256_prehashed};
use kms_protocol::wire::guest::{
    DeriveK256KeyResponse, GetKeyArgs, GetKeyResponse, SignRequest, SignResponse, VerifyRequest,
};

use super::http::Failure;
use crate::Keys;

/// Path and purpose of the key that `Sign` uses.
const SIGNING_PATH: &str = "vms";
const SIGNING_PURPOSE: &str = "signing";
/// Length of an Ed25519 public key and of a signature, in bytes.
const ED25519_PUBLIC: usize = 32;
const ED25519_SIGNATURE: usize = 64;

/// What a key or a signature is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Ed25519,
    Secp256k1,
    /// The same key as secp256k1; the caller hashed the message.
    Secp256k1Prehashed,
}

impl Algorithm {
    /// For keys: an empty name is secp256k1's.
    fn of_key(name: &str) -> Result<Self, Failure> {
        match Self::of_signature(if name.is_empty() { "secp256k1" } else { name })? {
            Self::Secp256k1Prehashed => Err(unsupported(name)),
            algorithm => Ok(algorithm),
        }
    }

    fn of_signature(name: &str) -> Result<Self, Failure> {
        match name {
            "ed25519" => Ok(Self::Ed25519),
            "secp256k1" | "k256" => Ok(Self::Secp256k1),
            "secp256k1_prehashed" => Ok(Self::Secp256k1Prehashed),
            other => Err(unsupported(other)),
        }
    }
}

fn unsupported(name: &str) -> Failure {
    Failure::bad(format!(
        "Unsupported algorithm {:?}, expected ed25519 or secp256k1",
        name.chars().take(40).collect::<String>()
    ))
}

pub(super) fn by_path(keys: &Keys, args: &GetKeyArgs) -> Result<GetKeyResponse, Failure> {
    let key = keys.app_keys().k256_key.path_key(&args.path);
    let public = public_key(&key, Algorithm::of_key(&args.algorithm)?)?;
    let signature_chain = chain(keys, &args.purpose, &public)?;
    Ok(GetKeyResponse { key: key.expose().to_vec(), signature_chain })
}

pub(super) fn by_path_k256(keys: &Keys, args: &GetKeyArgs) -> Result<DeriveK256KeyResponse, Failure> {
    let mut response = by_path(keys, args)?;
    Ok(DeriveK256KeyResponse {
        k256_key: std::mem::take(&mut response.key),
        k256_signature_chain: std::mem::take(&mut response.signature_chain),
    })
}

pub(super) fn sign(keys: &Keys, request: &SignRequest) -> Result<SignResponse, Failure> {
    let algorithm = Algorithm::of_signature(&request.algorithm)?;
    let key = keys.app_keys().k256_key.path_key(SIGNING_PATH);
    let public_key = public_key(&key, algorithm)?;
    let signature = match algorithm {
        Algorithm::Ed25519 => ed25519(&key)?.sign(&request.data).as_ref().to_vec(),
        Algorithm::Secp256k1 => {
            key.sign_k256(&request.data).map_err(|error| Failure::internal(&error))?.to_vec()
        }
        Algorithm::Secp256k1Prehashed => {
            let digest = request.data.as_slice().try_into().map_err(|_| not_a_digest(&request.data))?;
            key.sign_k256_prehashed(digest).map_err(|error| Failure::internal(&error))?.to_vec()
        }
    };
    let mut signature_chain = vec![signature.clone()];
    signature_chain.extend(chain(keys, SIGNING_PURPOSE, &public_key)?);
    Ok(SignResponse { signature, signature_chain, public_key })
}

pub(super) fn verify(request: &VerifyRequest) -> Result<bool, Failure> {
    let VerifyRequest { algorithm, data, signature, public_key } = request;
    let checked = match Algorithm::of_signature(algorithm)? {
        Algorithm::Ed25519 => {
            for (what, bytes, len) in
                [("public key", public_key, ED25519_PUBLIC), ("signature", signature, ED25519_SIGNATURE)]
            {
                if bytes.len() != len {
                    return Err(Failure::bad(format!("{what} has {} bytes, expected {len}", bytes.len())));
                }
            }
            return Ok(UnparsedPublicKey::new(&ED25519, public_key).verify(data, signature).is_ok());
        }
        Algorithm::Secp256k1 => verify_k256(public_key, data, signature),
        Algorithm::Secp256k1Prehashed if data.len() == 32 => {
            verify_k256_prehashed(public_key, data, signature)
        }
        Algorithm::Secp256k1Prehashed => return Err(not_a_digest(data)),
    };
    checked.map_err(|error| Failure::bad(command_line::chain(&error)))
}

fn not_a_digest(data: &[u8]) -> Failure {
    Failure::bad(format!("data has {} bytes, expected a digest of 32", data.len()))
}

fn public_key(key: &PathKey, algorithm: Algorithm) -> Result<Vec<u8>, Failure> {
    match algorithm {
        Algorithm::Ed25519 => Ok(ed25519(key)?.public_key().as_ref().to_vec()),
        Algorithm::Secp256k1 | Algorithm::Secp256k1Prehashed => {
            Ok(key.k256_public_key().map_err(|error| Failure::internal(&error))?.as_bytes().to_vec())
        }
    }
}

fn ed25519(key: &PathKey) -> Result<Ed25519KeyPair, Failure> {
    Ed25519KeyPair::from_seed_unchecked(key.expose()).map_err(|error| Failure::internal(&error))
}

fn chain(keys: &Keys, purpose: &str, public_key: &[u8]) -> Result<Vec<Vec<u8>>, Failure> {
    let keys = keys.app_keys();
    let signature =
        keys.k256_key.sign_path_key(purpose, public_key).map_err(|error| Failure::internal(&error))?;
    Ok(vec![signature.as_bytes().to_vec(), keys.k256_signature.as_bytes().to_vec()])
}
