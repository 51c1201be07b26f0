use alloy::primitives::{Address, B256, Bytes, U64, U256};
use serde::Deserialize;

/// The part of a block header we use.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Head {
    /// Number of the block.
    pub number: U64,
    /// Its hash.
    pub hash: B256,
    /// Root of the state after it.
    pub state_root: B256,
    /// Seconds since 1970.
    pub timestamp: U64,
    /// Wei per gas, on chains with EIP-1559.
    pub base_fee_per_gas: Option<U256>,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Log {
    /// Contract that spoke.
    pub address: Address,
    /// Signature hash, then the indexed values.
    pub topics: Vec<B256>,
    /// The other values.
    pub data: Bytes,
    /// Block it is in.
    pub block_number: Option<U64>,
    /// Transaction it is from.
    pub transaction_hash: Option<B256>,
    /// Position in the block.
    pub log_index: Option<U64>,
    /// Whether a reorganisation took it back.
    #[serde(default)]
    pub removed: bool,
}

/// What became of a transaction.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Receipt {
    /// The transaction.
    pub transaction_hash: B256,
    /// Its block.
    pub block_number: U64,
    /// Hash of that block.
    pub block_hash: B256,
    /// One for success.
    pub status: U64,
    /// The contract a creation made.
    pub contract_address: Option<Address>,
    /// Gas used.
    pub gas_used: U64,
    /// Its events.
    #[serde(default)]
    pub logs: Vec<Log>,
}

impl Receipt {
    /// Whether the transaction did not revert.
    pub fn succeeded(&self) -> bool {
        self.status == U64::from(1)
    }
}
