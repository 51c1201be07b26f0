use std::io;
use std::path::PathBuf;
use std::time::Duration;

use alloy::primitives::{Address, B256};

use crate::revert::Revert;

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be read from or written to a chain. Endpoints are named by scheme and host only: the rest
/// of such an address is often an access key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An address that is not `http://` or `https://`.
    #[error("endpoint address {name:?} is not an http or https URL")]
    EndpointAddress {
        /// What was given, without path and query.
        name: String,
    },
    /// The HTTP client could not be built.
    #[error("no HTTP client can be made")]
    HttpClient(#[source] reqwest::Error),
    /// The set of endpoints contradicts itself.
    #[error("agreement of {wanted} among {endpoints} endpoints is not possible")]
    Agreement {
        /// How many must agree.
        wanted: usize,
        /// How many there are.
        endpoints: usize,
    },
    /// No connection, or it broke.
    #[error("{endpoint} cannot be reached for {method}")]
    Unreachable {
        /// Who.
        endpoint: String,
        /// What was asked.
        method: &'static str,
        /// Why.
        source: reqwest::Error,
    },
    /// The deadline passed.
    #[error("{endpoint} gave no answer to {method} within {}", seconds(.after))]
    NoAnswer {
        /// Who.
        endpoint: String,
        /// What was asked.
        method: &'static str,
        /// How long it was given.
        after: Duration,
    },
    /// Too many requests.
    #[error("{endpoint} limits the rate of requests ({method})")]
    RateLimited {
        /// Who.
        endpoint: String,
        /// What was asked.
        method: &'static str,
    },
    /// An HTTP status that is not a success.
    #[error("{endpoint} answered {method} with HTTP status {status}: {excerpt}")]
    HttpStatus {
        /// Who.
        endpoint: String,
        /// What was asked.
        method: &'static str,
        /// Status code.
        status: u16,
        /// Beginning of the body.
        excerpt: String,
    },
    /// An answer longer than we read.
    #[error("{endpoint} answered {method} with more than {limit} bytes")]
    TooLarge {
        /// Who.
        endpoint: String,
        /// What was asked.
        method: &'static str,
        /// Bytes read at most.
        limit: usize,
    },
    /// An answer that is not what the method returns.
    #[error("{endpoint} answered {method} with something else than expected: {problem}")]
    Malformed {
        /// Who.
        endpoint: String,
        /// What was asked.
        method: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// The method does not exist there.
    #[error("{endpoint} does not offer {method}")]
    MethodMissing {
        /// Who.
        endpoint: String,
        /// What was asked.
        method: &'static str,
    },
    /// The endpoint does not have the block or state asked for (yet, or any more).
    #[error("{endpoint} has no state for {method}: {message}")]
    StateMissing {
        /// Who.
        endpoint: String,
        /// What was asked.
        method: &'static str,
        /// Its words.
        message: String,
    },
    /// Any other JSON-RPC error.
    #[error("{endpoint} refused {method}: {message} (code {code})")]
    Rpc {
        /// Who.
        endpoint: String,
        /// What was asked.
        method: &'static str,
        /// JSON-RPC error code.
        code: i64,
        /// Its words.
        message: String,
    },
    /// The contract itself said no.
    #[error("{what} reverts: {revert}")]
    Reverted {
        /// The call.
        what: String,
        /// Its reason.
        revert: Revert,
    },
    /// Another chain than the configured one.
    #[error("{endpoint} is on chain {actual}, expected chain {expected}")]
    WrongChain {
        /// Who.
        endpoint: String,
        /// Configured chain id.
        expected: u64,
        /// Its chain id.
        actual: u64,
    },
    /// Its newest block is old: it stopped following the chain.
    #[error("{endpoint} is stale: its newest block {block} is {age} s old, at most {limit} s are accepted")]
    Stale {
        /// Who.
        endpoint: String,
        /// Number of that block.
        block: u64,
        /// Its age, seconds.
        age: u64,
        /// Configured limit, seconds.
        limit: u64,
    },
    /// Nothing lives at a contract's address.
    #[error("no contract at {address} on chain {chain_id}")]
    NoContract {
        /// Where.
        address: Address,
        /// On which chain.
        chain_id: u64,
    },
    /// Endpoints contradict each other.
    #[error("endpoints disagree on {what}: {answers}")]
    Disagreement {
        /// The question.
        what: String,
        /// `endpoint: answer`, separated by `; `.
        answers: String,
    },
    /// Fewer endpoints answered than must agree.
    #[error("{what}: {answered} of the {wanted} needed endpoints answered; {failures}")]
    TooFewAnswers {
        /// The question.
        what: String,
        /// How many must agree.
        wanted: usize,
        /// How many answered.
        answered: usize,
        /// The others' errors, separated by `; `.
        failures: String,
        /// The first of them, which decides the hint.
        first: Box<Error>,
    },
    /// A boot info that does not fit the contracts' tuple.
    #[error("boot info field {field}: {problem}")]
    BootInfo {
        /// Name of the field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A return value that does not decode.
    #[error("{what} returned {length} bytes that do not decode")]
    ReturnValue {
        /// The call.
        what: String,
        /// Length of the return value.
        length: usize,
    },
    /// A proof that does not lead to the block's state root.
    #[error("{what} is not proven by {endpoint}: {problem}")]
    Proof {
        /// The value.
        what: String,
        /// Who offered the proof.
        endpoint: String,
        /// What is wrong.
        problem: String,
    },
    /// A key that could not be loaded.
    #[error("{from}: {problem}")]
    Key {
        /// Where it was looked for.
        from: String,
        /// What is wrong. Never the key.
        problem: String,
    },
    /// The signer failed.
    #[cfg(feature = "write")]
    #[error("the transaction cannot be signed")]
    Sign(#[source] alloy::signers::Error),
    /// A key service did not do what it was asked.
    #[cfg(any(feature = "aws-kms", feature = "gcp-kms"))]
    #[error(transparent)]
    KeyService(#[from] crate::keys::KeyServiceError),
    /// The chain is dearer than allowed.
    #[error("the chain asks {needed} wei per gas, the cap is {cap} wei")]
    FeeCap {
        /// Base fee and tip, wei.
        needed: u128,
        /// Configured cap, wei.
        cap: u128,
    },
    /// The chain has no base fee.
    #[error("chain {chain_id} has no base fee: transactions with fee caps (EIP-1559) are not possible")]
    NoBaseFee {
        /// Which chain.
        chain_id: u64,
    },
    /// The account cannot pay.
    #[error("{account} has {balance} wei, the transaction may cost {needed} wei")]
    Funds {
        /// The sender.
        account: Address,
        /// What it has.
        balance: alloy::primitives::U256,
        /// What may be needed.
        needed: alloy::primitives::U256,
    },
    /// Transactions of the account that are not ours wait to be mined.
    #[error(
        "{account} has transactions in flight that this journal did not send: nonce {mined} is next, {pending} is announced"
    )]
    ForeignPending {
        /// The sender.
        account: Address,
        /// Next nonce of the mined state.
        mined: u64,
        /// Next nonce according to the pool.
        pending: u64,
    },
    /// A transaction is out, but was not mined in time.
    #[error("transaction {hash} (nonce {nonce}) was not confirmed within {}", seconds(.after))]
    NotConfirmed {
        /// Its hash.
        hash: B256,
        /// Its nonce.
        nonce: u64,
        /// How long we waited.
        after: Duration,
    },
    /// The transaction was mined and failed.
    #[error("transaction {hash} was mined in block {block} and reverted")]
    Failed {
        /// Its hash.
        hash: B256,
        /// Where.
        block: u64,
    },
    /// Another transaction took the nonce.
    #[error("transaction {hash} lost its nonce {nonce} to another transaction of {account}")]
    Replaced {
        /// Its hash.
        hash: B256,
        /// Its nonce.
        nonce: u64,
        /// The sender.
        account: Address,
    },
    /// The state does not show what a mined transaction should have done.
    #[error("{what} does not hold at block {block} although transaction {hash} succeeded")]
    NotVisible {
        /// The condition.
        what: String,
        /// Where it was read.
        block: u64,
        /// The transaction.
        hash: B256,
    },
    /// The journal could not be read or written.
    #[error("journal {}", path.display())]
    Journal {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The journal is not one of ours.
    #[error("journal {}: line {line} is not a record: {problem}", path.display())]
    JournalRecord {
        /// Where.
        path: PathBuf,
        /// Counted from one.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// Another process works with the same account.
    #[error("journal {} is in use by another process", path.display())]
    JournalBusy {
        /// Where.
        path: PathBuf,
    },
    /// A compiled contract could not be used.
    #[error("compiled contract {name} in {}: {problem}", path.display())]
    Artifact {
        /// Contract.
        name: String,
        /// Folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Something that needs to be asked for with `--danger`.
    #[error("{what} needs --danger: {why}")]
    Danger {
        /// The wish.
        what: String,
        /// What it would mean.
        why: &'static str,
    },
    /// A command that cannot work with these arguments.
    #[error("{0}")]
    Usage(String),
    /// The local chain could not be started.
    #[error("local chain: {problem}")]
    LocalChain {
        /// What is wrong.
        problem: String,
    },
}

impl Error {
    /// The next step, when one is known.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::RateLimited { .. } => "wait and run again, or use an endpoint with an access key",
            Self::MethodMissing { method: "eth_getProof", .. } => {
                "use an endpoint that serves eth_getProof, or leave out verified reads"
            }
            Self::MethodMissing { .. } => "run `keyferry chain doctor` to see what the endpoint offers",
            Self::WrongChain { .. } => "check --rpc-url and --chain-id",
            Self::Stale { .. } => "use another endpoint, or several with --agree",
            Self::StateMissing { .. } => {
                "the endpoint is behind or pruned: run again, or use another endpoint"
            }
            Self::Unreachable { .. } | Self::NoAnswer { .. } | Self::HttpStatus { .. } => {
                "run `keyferry chain doctor`, or give another --rpc-url"
            }
            Self::Disagreement { .. } => "find the one that is wrong with `keyferry chain doctor`",
            Self::TooFewAnswers { first, .. } => return first.hint(),
            Self::NoContract { .. } => "check the contract's address and the chain",
            Self::Reverted { revert, .. } => return revert.hint(),
            Self::Proof { .. } => {
                "the endpoint lies, or the contract's code is not the known one: compare with `keyferry chain status`"
            }
            Self::FeeCap { .. } => "wait for lower fees, or raise --max-fee-gwei",
            Self::Funds { .. } => "send it funds for gas",
            Self::ForeignPending { .. } => "let them be mined or cancel them, then run again",
            Self::NotConfirmed { .. } => {
                "run the same command again: it waits for this transaction and sends no other"
            }
            Self::Replaced { .. } => "run the same command again: it decides anew on the current state",
            Self::JournalBusy { .. } => "wait for the other command to end",
            #[cfg(any(feature = "aws-kms", feature = "gcp-kms"))]
            Self::KeyService(error) => return error.hint(),
            Self::Key { .. } => "give --keystore FILE, or set the environment variable named by --key-env",
            _ => return None,
        })
    }

    /// Why a transaction was not signed: the key service's own error, when it was one.
    #[cfg(feature = "write")]
    pub(crate) fn signing(error: alloy::signers::Error) -> Self {
        match error {
            #[cfg(any(feature = "aws-kms", feature = "gcp-kms"))]
            alloy::signers::Error::Other(other) => match other.downcast() {
                Ok(error) => Self::KeyService(*error),
                Err(other) => Self::Sign(alloy::signers::Error::Other(other)),
            },
            error => Self::Sign(error),
        }
    }

    /// Whether asking again may help: the endpoint's trouble, not an answer.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::NoAnswer { .. }
            | Self::RateLimited { .. }
            | Self::StateMissing { .. } => true,
            Self::HttpStatus { status, .. } => *status >= 500,
            Self::TooFewAnswers { first, .. } => first.is_transient(),
            _ => false,
        }
    }
}

fn seconds(duration: &Duration) -> String {
    format!("{} s", duration.as_secs_f32())
}
