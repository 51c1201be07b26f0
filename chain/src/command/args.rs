use std::path::PathBuf;

use alloy::primitives::{Address, B256};
use clap::{Args, Subcommand};

use crate::keys::KeySource;

const EXAMPLES: &str = "\
Examples:
  export RPC_URL=https://… KMS_CONTRACT_ADDR=0x…         the key: PRIVATE_KEY, --keystore, --aws-kms, …
  keyferry chain doctor                                  what the endpoint can do
  keyferry chain create-app --hash $OS_IMAGE_HASH --device $DEVICE_ID
  keyferry chain add-image $OS_IMAGE_HASH                on the KMS contract
  keyferry chain add-hash --app-id $APP_ID $OS_IMAGE_HASH  on the app; for Nitro the same value
  keyferry chain status --app-id $APP_ID
  keyferry chain explain --image $OS_IMAGE_HASH --app-id $APP_ID
  keyferry chain add-image $OS_IMAGE_HASH --calldata     for a multisig";

/// Registration and authorisation on the dstack contracts.
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub enum Command {
    /// Deploy a KMS contract behind its proxy, and the logic of its applications.
    Deploy(Deploy),
    /// Create and register an application; prints its id.
    CreateApp(CreateApp),
    /// Register an application contract that was deployed by itself.
    RegisterApp(OnKms<AppAddress>),
    /// Allow an image (OS_IMAGE_HASH) on the KMS contract.
    AddImage(OnKms<Hash>),
    /// Take an image back.
    RemoveImage(OnKms<Hash>),
    /// Allow a compose hash on an application; for Nitro it is OS_IMAGE_HASH again.
    AddHash(OnApp<Hash>),
    /// Take a compose hash back.
    RemoveHash(OnApp<Hash>),
    /// Allow a KMS node by its aggregated measurement.
    AddKms(OnKms<Hash>),
    /// Take a KMS node back.
    RemoveKms(OnKms<Hash>),
    /// Allow a device: of an application with --app-id, else of KMS nodes.
    AddDevice(OnEither<Hash>),
    /// Take a device back.
    RemoveDevice(OnEither<Hash>),
    /// Name the gateway's application.
    SetGateway(OnKms<GatewayAppId>),
    /// Publish what a KMS says about itself, from a JSON file with k256_pubkey, ca_pubkey, quote and eventlog.
    SetKmsInfo(OnKms<InfoFile>),
    /// Name the logic contract that new applications get.
    SetAppImplementation(OnKms<AppAddress>),
    /// Let an application run on any device (needs --danger), or with --off on listed ones only.
    AllowAnyDevice(OnApp<Switch>),
    /// Ask for a current TCB status, or not with --off. A Nitro enclave has none: it would never be allowed.
    RequireTcb(OnApp<Switch>),
    /// Offer the ownership of the KMS contract, or of an application with --app-id.
    TransferOwner(OnEither<NewOwner>),
    /// Take an ownership that was offered to the signer.
    AcceptOwner(OnEither<Nothing>),
    /// Wait for transactions that an earlier run left open; with --raise-fees, offer more for them.
    Settle(Settle),
    /// Show what is registered.
    Status(Status),
    /// Explain which rule allows or denies a boot info or an attestation document.
    Explain(Explain),
    /// Print changes as they happen.
    Watch(Watch),
    /// Check what the endpoints can do, and what it costs when they cannot.
    Doctor(Doctor),
    /// Run a chain on this machine, with contracts and a registered application.
    Local(Local),
}

/// Which chain, through whom.
#[derive(Args, Debug, Clone)]
pub struct Network {
    /// JSON-RPC endpoint; several are asked at the same time, and all are given a transaction. Needed for everything but
    /// --calldata.
    #[arg(long, value_name = "URL", env = "RPC_URL", hide_env_values = true, value_delimiter = ',')]
    pub rpc_url: Vec<String>,
    /// How many endpoints must agree on every answer; without it, more than half of them.
    #[arg(long, value_name = "COUNT")]
    pub agree: Option<usize>,
    /// Refuse endpoints of any other chain.
    #[arg(long, value_name = "ID", env = "CHAIN_ID")]
    pub chain_id: Option<u64>,
    /// Seconds for one request.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub timeout: u64,
    /// Seconds the newest block may be old.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub max_head_age: u64,
}

/// Which block, and whom to believe about it.
#[derive(Args, Debug, Clone)]
pub struct Reading {
    /// Read so many blocks behind the newest, which a short reorganisation does not take back.
    #[arg(long, value_name = "BLOCKS", default_value_t = 0)]
    pub behind_head: u64,
    /// Prove what is shown from storage (eth_getProof) instead of believing the endpoints about it; needs the hashes
    /// of the known code, which `status` shows.
    #[arg(long, requires_all = ["kms_code", "app_code"])]
    pub prove: bool,
    /// Keccak-256 of the code behind the KMS contract, from a source you trust.
    #[arg(long, value_name = "HASH", env = "KMS_CODE_HASH")]
    pub kms_code: Option<B256>,
    /// Keccak-256 of the code behind the applications, from a source you trust.
    #[arg(long, value_name = "HASH", env = "APP_CODE_HASH")]
    pub app_code: Option<B256>,
    /// Read at the block with this hash, for example from a light client; its header is proven too.
    #[arg(long, value_name = "HASH", requires = "prove", conflicts_with = "behind_head")]
    pub block_hash: Option<B256>,
}

/// The KMS contract.
#[derive(Args, Debug, Clone)]
pub struct Kms {
    /// Address of the KMS contract.
    #[arg(long, value_name = "ADDRESS", env = "KMS_CONTRACT_ADDR")]
    pub kms: Address,
}

/// An application's contract.
#[derive(Args, Debug, Clone)]
pub struct App {
    /// Application id: the address of its contract.
    #[arg(long, value_name = "ADDRESS", env = "APP_CONTRACT_ADDR")]
    pub app_id: Address,
}

/// Who signs, and how transactions are sent.
#[derive(Args, Debug, Clone)]
pub struct Writing {
    #[command(flatten)]
    pub network: Network,
    #[command(flatten)]
    pub key: Key,
    /// Do not ask; needed without a terminal.
    #[arg(long, short)]
    pub yes: bool,
    /// Print the transaction for a multisig instead of sending it; asks no endpoint and needs no key.
    #[arg(long)]
    pub calldata: bool,
    /// Do what is refused otherwise, such as allowing a measurement of zeros.
    #[arg(long)]
    pub danger: bool,
    /// Gwei per gas at most, tip included.
    #[arg(long, value_name = "GWEI", default_value_t = 100)]
    pub max_fee_gwei: u32,
    /// Gwei per gas of tip at most.
    #[arg(long, value_name = "GWEI", default_value_t = 3)]
    pub max_tip_gwei: u32,
    /// Blocks that must contain or follow the transaction; 3, or 1 on the local chain 31337, without it.
    #[arg(long, value_name = "BLOCKS", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub confirmations: Option<u64>,
    /// Seconds to wait for one transaction.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub deadline: u64,
    /// Folder of the journal of sent transactions [default: $XDG_STATE_HOME/keyferry/chain].
    #[arg(long, value_name = "FOLDER")]
    pub journal: Option<PathBuf>,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// Where the signing key is. Without any of these it is in the environment variable PRIVATE_KEY.
#[derive(Args, Debug, Clone)]
pub struct Key {
    /// Encrypted JSON keystore with the signing key.
    #[arg(long, value_name = "FILE", env = "KEYSTORE", group = "signer")]
    pub keystore: Option<PathBuf>,
    /// File whose first line is the keystore's password; asked for on the terminal without it.
    #[arg(long, value_name = "FILE", requires = "keystore")]
    pub password_file: Option<PathBuf>,
    /// Sign with this key of AWS KMS (id, ARN or alias; kind ECC_SECG_P256K1).
    #[arg(long, value_name = "KEY", group = "signer")]
    pub aws_kms: Option<String>,
    /// Sign with this key version of Google's Cloud KMS (projects/…/cryptoKeyVersions/N; EC_SIGN_SECP256K1_SHA256).
    #[arg(long, value_name = "NAME", group = "signer")]
    pub gcp_kms: Option<String>,
    /// Sign with this account of a Ledger at this machine; needs a build with the feature `ledger`.
    #[arg(long, value_name = "ACCOUNT", group = "signer", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub ledger: Option<usize>,
    /// Environment variable with the signing key in hex, for when it is nowhere else.
    #[arg(long, value_name = "NAME", default_value = "PRIVATE_KEY")]
    pub key_env: String,
}

impl Key {
    /// The one place that was named.
    pub fn source(&self) -> KeySource {
        let Self { keystore, password_file, aws_kms, gcp_kms, ledger, key_env } = self.clone();
        match (keystore, aws_kms, gcp_kms, ledger) {
            (Some(file), ..) => KeySource::Keystore { file, password: password_file },
            (_, Some(id), ..) => KeySource::AwsKms { id },
            (_, _, Some(name), _) => KeySource::GcpKms { name },
            (.., Some(account)) => KeySource::Ledger { account },
            _ => KeySource::Environment { name: key_env },
        }
    }
}

/// A write to the KMS contract.
#[derive(Args, Debug)]
pub struct OnKms<A: Args> {
    #[command(flatten)]
    pub value: A,
    #[command(flatten)]
    pub kms: Kms,
    #[command(flatten)]
    pub writing: Writing,
}

/// A write to an application's contract.
#[derive(Args, Debug)]
pub struct OnApp<A: Args> {
    #[command(flatten)]
    pub value: A,
    #[command(flatten)]
    pub app: App,
    #[command(flatten)]
    pub writing: Writing,
}

/// A write to either contract.
#[derive(Args, Debug)]
pub struct OnEither<A: Args> {
    #[command(flatten)]
    pub value: A,
    /// Address of the KMS contract.
    #[arg(long, value_name = "ADDRESS", env = "KMS_CONTRACT_ADDR", required_unless_present = "app_id")]
    pub kms: Option<Address>,
    /// Application id: then its contract is meant.
    #[arg(long, value_name = "ADDRESS")]
    pub app_id: Option<Address>,
    #[command(flatten)]
    pub writing: Writing,
}

/// A measurement.
#[derive(Args, Debug)]
pub struct Hash {
    /// 64 hex digits, with or without 0x.
    #[arg(value_name = "HASH")]
    pub hash: B256,
}

/// A contract.
#[derive(Args, Debug)]
pub struct AppAddress {
    /// Address of the contract.
    #[arg(value_name = "ADDRESS")]
    pub address: Address,
}

/// The gateway.
#[derive(Args, Debug)]
pub struct GatewayAppId {
    /// Application id of the gateway.
    #[arg(value_name = "APP_ID")]
    pub gateway: String,
}

/// A KMS's own words.
#[derive(Args, Debug)]
pub struct InfoFile {
    /// JSON with hex fields k256_pubkey, ca_pubkey, quote and eventlog (camelCase is understood too).
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// On or off.
#[derive(Args, Debug)]
pub struct Switch {
    /// Turn it off.
    #[arg(long)]
    pub off: bool,
}

/// The next owner.
#[derive(Args, Debug)]
pub struct NewOwner {
    /// Address of the next owner.
    #[arg(value_name = "ADDRESS")]
    pub to: Address,
}

/// No value.
#[derive(Args, Debug)]
pub struct Nothing {}

/// `deploy`.
#[derive(Args, Debug)]
pub struct Deploy {
    /// Folder of compiled contracts: Hardhat's `artifacts` or Foundry's `out`.
    #[arg(long, value_name = "FOLDER", required_unless_present = "stand_ins")]
    pub artifacts: Option<PathBuf>,
    /// Deploy this project's stand-ins, which are for tests and local chains only.
    #[arg(long, conflicts_with = "artifacts")]
    pub stand_ins: bool,
    /// Owner of the KMS contract; the signer without it.
    #[arg(long, value_name = "ADDRESS")]
    pub owner: Option<Address>,
    /// Logic of applications that exists already.
    #[arg(long, value_name = "ADDRESS")]
    pub app_implementation: Option<Address>,
    /// Deploy once more under this name, although it was done before.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub label: String,
    #[command(flatten)]
    pub writing: Writing,
}

/// `create-app`.
#[derive(Args, Debug)]
pub struct CreateApp {
    /// First compose hash; for Nitro it is OS_IMAGE_HASH.
    #[arg(long, value_name = "HASH")]
    pub hash: Option<B256>,
    /// First device. A KMS derives the same one for every Nitro enclave:
    /// 0xde7d1b721a1e0632b7cf04edf5032c8ecffa9f9a08492152b926f1a5a7e765d7.
    #[arg(long, value_name = "ID")]
    pub device: Option<B256>,
    /// Any device may run it (needs --danger).
    #[arg(long)]
    pub allow_any_device: bool,
    /// Ask for a current TCB status. A Nitro enclave has none.
    #[arg(long)]
    pub require_tcb_up_to_date: bool,
    /// Its code can never be changed.
    #[arg(long)]
    pub disable_upgrades: bool,
    /// Owner of the application; the signer without it.
    #[arg(long, value_name = "ADDRESS")]
    pub owner: Option<Address>,
    /// For KMS contracts of the first generation, whose factory has five arguments.
    #[arg(long, conflicts_with = "require_tcb_up_to_date")]
    pub first_generation: bool,
    /// Create another one under this name, although an equal one exists.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub label: String,
    #[command(flatten)]
    pub kms: Kms,
    #[command(flatten)]
    pub writing: Writing,
}

/// `settle`.
#[derive(Args, Debug)]
pub struct Settle {
    /// Sign open transactions again with higher fees, within the caps; the chain mines one of the two.
    #[arg(long)]
    pub raise_fees: bool,
    #[command(flatten)]
    pub writing: Writing,
}

/// `status`.
#[derive(Args, Debug)]
pub struct Status {
    #[command(flatten)]
    pub network: Network,
    #[command(flatten)]
    pub reading: Reading,
    #[command(flatten)]
    pub kms: Kms,
    /// Show this application too.
    #[arg(long, value_name = "ADDRESS")]
    pub app_id: Vec<Address>,
    /// First block whose events are read; searched for without it.
    #[arg(long, value_name = "BLOCK")]
    pub from_block: Option<u64>,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// `explain`.
#[derive(Args, Debug)]
pub struct Explain {
    /// Boot info as JSON (the body of the authorisation webhook), or an NSM attestation document. `-` for standard
    /// input.
    #[arg(value_name = "FILE", required_unless_present = "image")]
    pub file: Option<PathBuf>,
    /// Ask about a Nitro enclave with this OS_IMAGE_HASH instead of a file.
    #[arg(long, value_name = "HASH", conflicts_with = "file", requires = "app_id")]
    pub image: Option<B256>,
    /// Application id; an image and an attestation document name none.
    #[arg(long, value_name = "ADDRESS")]
    pub app_id: Option<Address>,
    /// Ask as a KMS instead of an application.
    #[arg(long)]
    pub as_kms: bool,
    #[command(flatten)]
    pub network: Network,
    #[command(flatten)]
    pub reading: Reading,
    #[command(flatten)]
    pub kms: Kms,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// `watch`.
#[derive(Args, Debug)]
pub struct Watch {
    #[command(flatten)]
    pub network: Network,
    #[command(flatten)]
    pub kms: Kms,
    /// Watch this application too.
    #[arg(long, value_name = "ADDRESS")]
    pub app_id: Vec<Address>,
    /// First block whose events are printed; the next one without it.
    #[arg(long, value_name = "BLOCK")]
    pub from_block: Option<u64>,
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub every: u64,
    /// End after so many events.
    #[arg(long, value_name = "COUNT")]
    pub count: Option<u64>,
    /// Print one JSON document per line.
    #[arg(long)]
    pub json: bool,
}

/// `doctor`.
#[derive(Args, Debug)]
pub struct Doctor {
    #[command(flatten)]
    pub network: Network,
    /// Address of the KMS contract, to check that it is there.
    #[arg(long, value_name = "ADDRESS", env = "KMS_CONTRACT_ADDR")]
    pub kms: Option<Address>,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// `local`.
#[derive(Args, Debug)]
pub struct Local {
    /// Port on 127.0.0.1; 0 for a free one.
    #[arg(long, default_value_t = 8545)]
    pub port: u16,
    /// The anvil program; looked for without it.
    #[arg(long, value_name = "FILE", env = "KEYFERRY_ANVIL")]
    pub anvil: Option<PathBuf>,
    /// Allow this image on both contracts.
    #[arg(long, value_name = "HASH")]
    pub image: Option<B256>,
    /// Write the description of the chain to this file too, once it is ready.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}
