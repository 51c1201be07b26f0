//! Reads that need no trust in the endpoint: every value is proven against the state root of a block.
//!
//! `eth_getProof` (EIP-1186) leads from the block's state root to an account and from there to its storage. A proof
//! says what a slot holds, not what a contract does with it, so the decision is made here, by the rules of the
//! published contracts, and only when the code behind both proxies is the code these rules were read from. The proxies'
//! own code is not looked at: the KMS contract's address is configured by who trusts it, and whoever registers a proxy of
//! their own as an application decides about their own application's keys only.

use alloy::consensus::constants::KECCAK_EMPTY;
use alloy::primitives::{Address, B256, Bytes, U64, U256, keccak256};
use alloy::rlp;
use alloy::rpc::types::EIP1186AccountProofResponse;
use alloy::trie::{EMPTY_ROOT_HASH, Nibbles, TrieAccount, proof::verify_proof};
use serde_json::json;

use crate::abi::{AppBootInfo, IMPLEMENTATION_SLOT};
use crate::rpc::{Endpoint, Head};
use crate::status::{AppStatus, KmsStatus};
use crate::{Error, Result};

/// Longest gateway id that is proven, in bytes. It is an address, or a name.
const MAX_GATEWAY: usize = 256;
/// Slots asked for at once; geth answers at most 1024.
const SLOTS_AT_ONCE: usize = 128;
/// What both contracts compare a measurement status with.
const UP_TO_DATE: &str = "UpToDate";

/// Storage of the published contracts: the slot of each variable.
mod slot {
    pub(super) const KMS_GATEWAY: u64 = 4;
    pub(super) const KMS_APPS: u64 = 5;
    pub(super) const KMS_NODES: u64 = 6;
    pub(super) const KMS_DEVICES: u64 = 7;
    pub(super) const KMS_IMAGES: u64 = 8;
    pub(super) const KMS_APP_LOGIC: u64 = 9;
    pub(super) const APP_HASHES: u64 = 0;
    /// Lowest byte: upgrades are disabled. Second byte: any device will do.
    pub(super) const APP_FLAGS: u64 = 1;
    pub(super) const APP_DEVICES: u64 = 2;
    pub(super) const APP_NEEDS_TCB: u64 = 3;
}

/// The code whose rules and storage layout are known: Keccak-256 of the deployed logic contracts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownCode {
    /// Behind the KMS contract's proxy.
    pub kms: B256,
    /// Behind the applications' proxies.
    pub app: B256,
}

/// An account and some of its storage, proven.
struct Proven {
    code_hash: B256,
    values: Vec<U256>,
}

/// Reads at one block whose header is trusted: agreed on, or given.
pub struct ProvenReader<'a> {
    endpoint: &'a Endpoint,
    head: &'a Head,
    kms: Address,
    code: KnownCode,
}

impl<'a> ProvenReader<'a> {
    /// Reads the contract at `kms`. `head` is what everything is proven against, so it must not come from `endpoint`
    /// alone.
    pub fn new(endpoint: &'a Endpoint, head: &'a Head, kms: Address, code: KnownCode) -> Self {
        Self { endpoint, head, kms, code }
    }

    /// What the KMS contract decides about an application, and in which words.
    ///
    /// # Errors
    /// [`Error::Proof`] when a proof is wrong or the code is not the known one, and see [`Endpoint::request`].
    pub async fn is_app_allowed(&self, who: &AppBootInfo) -> Result<(bool, &'static str)> {
        let app = who.appId.into_word();
        let slots = [mapping(app, slot::KMS_APPS), mapping(who.osImageHash, slot::KMS_IMAGES)];
        let kms = self.governed("the KMS contract", self.kms, self.code.kms, &slots).await?;
        if kms[0].is_zero() {
            return Ok((false, "App not registered"));
        }
        if kms[1].is_zero() {
            return Ok((false, "OS image is not allowed"));
        }
        let slots = [
            mapping(who.composeHash, slot::APP_HASHES),
            fixed(slot::APP_FLAGS),
            mapping(who.deviceId, slot::APP_DEVICES),
            fixed(slot::APP_NEEDS_TCB),
        ];
        let app = match self.proven("the app", who.appId, &[]).await? {
            Proven { code_hash: KECCAK_EMPTY, .. } => {
                return Ok((false, "App not deployed or invalid address"));
            }
            _ => self.governed("the app", who.appId, self.code.app, &slots).await?,
        };
        let needs_tcb = app[3].byte(0) != 0;
        let any_device = app[1].byte(1) != 0;
        Ok(match () {
            () if needs_tcb && who.tcbStatus != UP_TO_DATE => (false, "TCB status is not up to date"),
            () if app[0].is_zero() => (false, "Compose hash not allowed"),
            () if !any_device && app[2].is_zero() => (false, "Device not allowed"),
            () => (true, ""),
        })
    }

    /// What the KMS contract decides about a KMS, and in which words.
    ///
    /// # Errors
    /// See [`ProvenReader::is_app_allowed`].
    pub async fn is_kms_allowed(&self, who: &AppBootInfo) -> Result<(bool, &'static str)> {
        let slots = [
            mapping(who.osImageHash, slot::KMS_IMAGES),
            mapping(who.mrAggregated, slot::KMS_NODES),
            mapping(who.deviceId, slot::KMS_DEVICES),
        ];
        let kms = self.governed("the KMS contract", self.kms, self.code.kms, &slots).await?;
        Ok(match () {
            () if who.tcbStatus != UP_TO_DATE => (false, "TCB status is not up to date"),
            () if kms[0].is_zero() => (false, "OS image is not allowed"),
            () if kms[1].is_zero() => (false, "Aggregated MR not allowed"),
            () if kms[2].is_zero() => (false, "KMS is not allowed to boot on this device"),
            () => (true, ""),
        })
    }

    /// The gateway's application id.
    ///
    /// # Errors
    /// See [`ProvenReader::is_app_allowed`].
    pub async fn gateway_app_id(&self) -> Result<String> {
        let at = fixed(slot::KMS_GATEWAY);
        let word = self.governed("the KMS contract", self.kms, self.code.kms, &[at]).await?[0];
        let bytes = match word.bit(0) {
            // Up to 31 bytes live in the slot itself, with twice their number in the last byte.
            false => {
                let length = usize::from(word.byte(0) / 2).min(31);
                word.to_be_bytes::<32>()[..length].to_vec()
            }
            true => {
                let length: usize = (word / U256::from(2)).saturating_to();
                if length > MAX_GATEWAY {
                    return Err(
                        self.wrong("the gateway's id", format!("{length} bytes, at most {MAX_GATEWAY}"))
                    );
                }
                let first = U256::from_be_bytes(keccak256(at).0);
                let slots: Vec<B256> =
                    (0..length.div_ceil(32)).map(|it| B256::from(first + U256::from(it))).collect();
                let words = self.proven("the gateway's id", self.kms, &slots).await?.values;
                let bytes: Vec<u8> = words.iter().flat_map(|it| it.to_be_bytes::<32>()).collect();
                bytes[..length].to_vec()
            }
        };
        String::from_utf8(bytes).map_err(|_| self.wrong("the gateway's id", "not UTF-8"))
    }

    /// The logic contract that new applications get.
    ///
    /// # Errors
    /// See [`ProvenReader::is_app_allowed`].
    pub async fn app_implementation(&self) -> Result<Address> {
        let at = [fixed(slot::KMS_APP_LOGIC)];
        let word = self.governed("the KMS contract", self.kms, self.code.kms, &at).await?[0];
        Ok(Address::from_word(word.into()))
    }

    /// Proves everything that `status` says is registered, and says how many entries that were. What a status leaves
    /// out is not proven: entries are found by events, and events can be withheld.
    ///
    /// # Errors
    /// [`Error::Proof`] when the storage does not hold an entry, and see [`ProvenReader::is_app_allowed`].
    pub async fn confirm_kms(&self, status: &KmsStatus) -> Result<usize> {
        let what = "the KMS contract";
        let (gateway, logic) = (self.gateway_app_id().await?, self.app_implementation().await?);
        if (&gateway, logic) != (&status.gateway_app_id, status.app_implementation) {
            let problem = format!(
                "its storage holds the gateway {gateway:?} and the application logic {logic}, not {:?} and {}",
                status.gateway_app_id, status.app_implementation
            );
            return Err(self.wrong(what, problem));
        }
        let apps: Vec<B256> = status.apps.iter().map(|it| it.into_word()).collect();
        let entries = [
            (slot::KMS_APPS, &apps),
            (slot::KMS_NODES, &status.kms_nodes),
            (slot::KMS_DEVICES, &status.kms_devices),
            (slot::KMS_IMAGES, &status.images),
        ];
        Ok(self.confirm(what, self.kms, self.code.kms, &entries).await? + 2)
    }

    /// The same for an application's contract.
    ///
    /// # Errors
    /// See [`ProvenReader::confirm_kms`].
    pub async fn confirm_app(&self, status: &AppStatus) -> Result<usize> {
        let what = format!("the app {}", status.contract);
        let at = [fixed(slot::APP_FLAGS), fixed(slot::APP_NEEDS_TCB)];
        let flags = self.governed(&what, status.contract, self.code.app, &at).await?;
        let (any_device, needs_tcb) = (flags[0].byte(1) != 0, flags[1].byte(0) != 0);
        if (any_device, needs_tcb) != (status.allow_any_device, status.require_tcb_up_to_date) {
            let problem = format!("its storage says any device {any_device}, current TCB needed {needs_tcb}");
            return Err(self.wrong(&what, problem));
        }
        let entries = [(slot::APP_HASHES, &status.compose_hashes), (slot::APP_DEVICES, &status.devices)];
        Ok(self.confirm(&what, status.contract, self.code.app, &entries).await? + 2)
    }

    /// Proves that each value is true in its mapping.
    async fn confirm(
        &self,
        what: &str,
        at: Address,
        code: B256,
        entries: &[(u64, &Vec<B256>)],
    ) -> Result<usize> {
        let all =
            entries.iter().flat_map(|(slot, values)| values.iter().map(|it| (*it, mapping(*it, *slot))));
        let all: Vec<(B256, B256)> = all.collect();
        for chunk in all.chunks(SLOTS_AT_ONCE) {
            let slots: Vec<B256> = chunk.iter().map(|(_, slot)| *slot).collect();
            let held = self.governed(what, at, code, &slots).await?;
            if let Some(((value, _), _)) = chunk.iter().zip(&held).find(|(_, held)| held.is_zero()) {
                return Err(self.wrong(what, format!("its storage does not hold {value}")));
            }
        }
        Ok(all.len())
    }

    /// Storage of a contract whose logic is the known one.
    async fn governed(&self, what: &str, at: Address, code: B256, slots: &[B256]) -> Result<Vec<U256>> {
        let all = [&[IMPLEMENTATION_SLOT], slots].concat();
        let mut values = self.proven(what, at, &all).await?.values;
        let logic = Address::from_word(B256::from(values.remove(0)));
        let actual = self.proven(&format!("the logic of {what}"), logic, &[]).await?.code_hash;
        match actual == code {
            true => Ok(values),
            false => {
                Err(self.wrong(what, format!("its logic at {logic} has the code {actual}, expected {code}")))
            }
        }
    }

    async fn proven(&self, what: &str, at: Address, slots: &[B256]) -> Result<Proven> {
        let answer: EIP1186AccountProofResponse =
            self.endpoint.request("eth_getProof", json!([at, slots, U64::from(self.head.number)])).await?;
        check(self.head.state_root, at, slots, &answer).map_err(|problem| self.wrong(what, problem))
    }

    fn wrong(&self, what: &str, problem: impl Into<String>) -> Error {
        Error::Proof {
            what: what.to_owned(),
            endpoint: self.endpoint.name().to_owned(),
            problem: problem.into(),
        }
    }
}

/// Follows the proofs of an account and of exactly these slots. An absent account or slot is proven absent.
fn check(
    root: B256,
    at: Address,
    slots: &[B256],
    answer: &EIP1186AccountProofResponse,
) -> Result<Proven, String> {
    let account = TrieAccount {
        nonce: answer.nonce,
        balance: answer.balance,
        storage_root: answer.storage_hash,
        code_hash: answer.code_hash,
    };
    let absent = account == TrieAccount::default() || answer.code_hash.is_zero();
    let expected = (!absent).then(|| rlp::encode(account));
    follow(root, keccak256(at), expected, &answer.account_proof)?;
    let storage_root = if absent { EMPTY_ROOT_HASH } else { answer.storage_hash };
    if answer.storage_proof.len() != slots.len() {
        return Err(format!("{} storage proofs for {} slots", answer.storage_proof.len(), slots.len()));
    }
    let mut values = Vec::with_capacity(slots.len());
    for (slot, proof) in slots.iter().zip(&answer.storage_proof) {
        let written = follow(storage_root, keccak256(slot), Some(rlp::encode(proof.value)), &proof.proof);
        match written {
            // The protocol drops a slot that becomes zero; anvil keeps it in its trie, with the value zero.
            Err(_) if proof.value.is_zero() => follow(storage_root, keccak256(slot), None, &proof.proof)?,
            other => other?,
        }
        values.push(proof.value);
    }
    let code_hash = if absent { KECCAK_EMPTY } else { answer.code_hash };
    Ok(Proven { code_hash, values })
}

fn follow(root: B256, key: B256, expected: Option<Vec<u8>>, proof: &[Bytes]) -> Result<(), String> {
    verify_proof(root, Nibbles::unpack(key), expected, proof).map_err(|error| error.to_string())
}

/// Where Solidity keeps `mapping[key]` of the mapping at `slot`.
fn mapping(key: B256, slot: u64) -> B256 {
    keccak256([key, fixed(slot)].concat())
}

fn fixed(slot: u64) -> B256 {
    B256::from(U256::from(slot))
}
