//! What is registered: candidates from the events, verdicts from the state.

use std::collections::BTreeSet;

use alloy::primitives::{Address, B256, U64, keccak256};
use alloy::sol_types::{SolCall, SolEvent};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use crate::abi::{DstackApp, DstackKms, Governed};
use crate::contracts::Reader;
use crate::rpc::{Endpoints, Log, View};
use crate::{Error, Result};

/// Blocks asked for at once at first; halved when an endpoint finds that too many.
const RANGE: u64 = 50_000;
/// Events read at most. More would mean somebody floods the contract (registering applications is open to all).
const MAX_EVENTS: usize = 100_000;
/// State reads under way at the same time.
const AT_ONCE: usize = 8;

/// The state of a KMS contract at a block.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KmsStatus {
    /// Which chain.
    pub chain_id: u64,
    /// At which block.
    pub block: u64,
    /// First block whose events were read.
    pub from_block: u64,
    /// The contract.
    pub contract: Address,
    /// Who may change it.
    pub owner: Address,
    /// Who has been offered the ownership.
    pub pending_owner: Option<Address>,
    /// Its logic.
    pub implementation: Address,
    /// Keccak-256 of its code.
    pub implementation_code: B256,
    /// The logic of new applications.
    pub app_implementation: Address,
    /// Keccak-256 of its code.
    pub app_implementation_code: B256,
    /// Application id of the gateway.
    pub gateway_app_id: String,
    /// Images that may run.
    pub images: Vec<B256>,
    /// KMS nodes, by aggregated measurement.
    pub kms_nodes: Vec<B256>,
    /// Devices that may run a KMS node.
    pub kms_devices: Vec<B256>,
    /// Registered applications.
    pub apps: Vec<Address>,
}

/// The state of an application's contract at a block.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AppStatus {
    /// The contract, which is also the application's id.
    pub contract: Address,
    /// Who may change it.
    pub owner: Address,
    /// Who has been offered the ownership.
    pub pending_owner: Option<Address>,
    /// Its logic.
    pub implementation: Address,
    /// Whether any device will do.
    pub allow_any_device: bool,
    /// Whether the measurement status must be current; contracts of the first generation never ask.
    pub require_tcb_up_to_date: bool,
    /// Compose hashes that may run.
    pub compose_hashes: Vec<B256>,
    /// Devices it may run on.
    pub devices: Vec<B256>,
}

/// Reads a KMS contract. Without `from`, the block in which the contract appeared is searched for.
///
/// # Errors
/// See [`Endpoints::agree`].
pub async fn kms_status(
    endpoints: &Endpoints,
    view: &View,
    contract: Address,
    from: Option<u64>,
) -> Result<KmsStatus> {
    let from_block = start(endpoints, view, contract, from).await?;
    let logs = logs(endpoints, &[contract], from_block, view.block()).await?;
    let reader = Reader::new(endpoints, view, contract);
    let images = candidates(&logs, DstackKms::OsImageHashAdded::SIGNATURE_HASH);
    let nodes = candidates(&logs, DstackKms::KmsAggregatedMrAdded::SIGNATURE_HASH);
    let devices = candidates(&logs, DstackKms::KmsDeviceAdded::SIGNATURE_HASH);
    let apps = candidates(&logs, DstackKms::AppRegistered::SIGNATURE_HASH);
    let apps =
        standing(reader, apps, |it| DstackKms::registeredAppsCall { appId: Address::from_word(it) }).await?;
    let code =
        async |at| endpoints.agree("code", async |it| Ok(keccak256(it.code(at, view.block()).await?))).await;
    let (implementation, app_implementation) =
        (reader.implementation().await?, reader.app_implementation().await?);
    Ok(KmsStatus {
        chain_id: view.chain_id,
        block: view.block(),
        from_block,
        contract,
        owner: reader.owner().await?,
        pending_owner: reader.pending_owner().await?,
        implementation,
        implementation_code: code(implementation).await?,
        app_implementation,
        app_implementation_code: code(app_implementation).await?,
        gateway_app_id: reader.gateway_app_id().await?,
        images: standing(reader, images, |it| DstackKms::allowedOsImagesCall { osImageHash: it }).await?,
        kms_nodes: standing(reader, nodes, |it| DstackKms::kmsAllowedAggregatedMrsCall { mrAggregated: it })
            .await?,
        kms_devices: standing(reader, devices, |it| DstackKms::kmsAllowedDeviceIdsCall { deviceId: it })
            .await?,
        apps: apps.into_iter().map(Address::from_word).collect(),
    })
}

/// Reads an application's contract.
///
/// # Errors
/// See [`Endpoints::agree`].
pub async fn app_status(
    endpoints: &Endpoints,
    view: &View,
    contract: Address,
    from: Option<u64>,
) -> Result<AppStatus> {
    let from = start(endpoints, view, contract, from).await?;
    let logs = logs(endpoints, &[contract], from, view.block()).await?;
    let reader = Reader::new(endpoints, view, contract);
    let hashes = candidates(&logs, DstackApp::ComposeHashAdded::SIGNATURE_HASH);
    let devices = candidates(&logs, DstackApp::DeviceAdded::SIGNATURE_HASH);
    Ok(AppStatus {
        contract,
        owner: reader.owner().await?,
        pending_owner: reader.pending_owner().await?,
        implementation: reader.implementation().await?,
        allow_any_device: reader.read(DstackApp::allowAnyDeviceCall {}).await?,
        require_tcb_up_to_date: requires_tcb(reader).await?,
        compose_hashes: standing(reader, hashes, |it| DstackApp::allowedComposeHashesCall {
            composeHash: it,
        })
        .await?,
        devices: standing(reader, devices, |it| DstackApp::allowedDeviceIdsCall { deviceId: it }).await?,
    })
}

/// Whether an application asks for a current measurement status.
pub(crate) async fn requires_tcb(app: Reader<'_>) -> Result<bool> {
    match app.read(DstackApp::requireTcbUpToDateCall {}).await {
        Err(Error::Reverted { .. }) => Ok(false),
        answer => answer,
    }
}

/// The only value of events like `OsImageHashAdded(bytes32)`, which are not indexed.
fn candidates(logs: &[Log], topic: B256) -> BTreeSet<B256> {
    let of_kind = logs.iter().filter(|it| it.topics.first() == Some(&topic) && it.data.len() == 32);
    of_kind.map(|it| B256::from_slice(&it.data)).collect()
}

/// Those that the state confirms: events tell what once was, the state what is.
async fn standing<C: SolCall<Return = bool>>(
    reader: Reader<'_>,
    candidates: BTreeSet<B256>,
    call: impl Fn(B256) -> C,
) -> Result<Vec<B256>> {
    let reads = stream::iter(candidates).map(|it| {
        let call = call(it);
        async move { reader.read(call).await.map(|holds| holds.then_some(it)) }
    });
    let mut standing: Vec<B256> =
        reads.buffer_unordered(AT_ONCE).try_filter_map(async |it| Ok(it)).try_collect().await?;
    standing.sort_unstable();
    Ok(standing)
}

/// The block in which a contract appeared, by bisection. Where old state is gone, the oldest that answers.
async fn start(endpoints: &Endpoints, view: &View, contract: Address, from: Option<u64>) -> Result<u64> {
    endpoints.require_code(view, contract).await?;
    if let Some(from) = from {
        return Ok(from);
    }
    let (mut without, mut with) = (0, view.block());
    while without < with {
        let middle = without + (with - without) / 2;
        let code = endpoints.agree("code", async |it| Ok(!it.code(contract, middle).await?.is_empty())).await;
        match code {
            Ok(true) => with = middle,
            Ok(false) | Err(Error::StateMissing { .. } | Error::Rpc { .. }) => without = middle + 1,
            Err(error) => return Err(error),
        }
    }
    Ok(with)
}

/// The events of some contracts, both ends included. Ranges that an endpoint finds too wide are halved.
///
/// # Errors
/// See [`Endpoints::agree`]; [`Error::Usage`] when there are more events than anybody reads.
pub async fn logs(endpoints: &Endpoints, contracts: &[Address], from: u64, to: u64) -> Result<Vec<Log>> {
    let (mut next, mut range) = (from, RANGE);
    let mut all = Vec::new();
    while next <= to {
        let end = next.saturating_add(range - 1).min(to);
        match endpoints.agree("events", |it| it.logs(contracts, next, end)).await {
            Ok(logs) => {
                all.extend(logs.into_iter().filter(|it| !it.removed && contracts.contains(&it.address)));
                next = end + 1;
            }
            Err(
                Error::Rpc { .. }
                | Error::HttpStatus { .. }
                | Error::TooLarge { .. }
                | Error::TooFewAnswers { .. },
            ) if range > 100 => {
                range /= 2;
            }
            Err(error) => return Err(error),
        }
        if all.len() > MAX_EVENTS {
            return Err(Error::Usage(format!("more than {MAX_EVENTS} events; give a later --from-block")));
        }
    }
    Ok(all)
}

/// An event in words.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// Contract that spoke.
    pub contract: Address,
    /// Its block.
    pub block: Option<U64>,
    /// Its transaction.
    pub transaction: Option<B256>,
    /// Name of the event.
    pub name: &'static str,
    /// Its values.
    pub values: String,
}

/// Reads an event; `None` for one that is not of these contracts.
pub fn event(log: &Log) -> Option<Event> {
    let topics = || log.topics.iter().copied();
    let (name, values) =
        kms_event(topics, log).or_else(|| app_event(topics, log)).or_else(|| shared_event(topics, log))?;
    Some(Event {
        contract: log.address,
        block: log.block_number,
        transaction: log.transaction_hash,
        name,
        values,
    })
}

fn kms_event<I: Iterator<Item = B256>>(topics: impl Fn() -> I, log: &Log) -> Option<(&'static str, String)> {
    use DstackKms::DstackKmsEvents as E;
    let event =
        <E as alloy::sol_types::SolEventInterface>::decode_raw_log(&topics().collect::<Vec<_>>(), &log.data)
            .ok()?;
    Some(match event {
        E::AppRegistered(it) => ("AppRegistered", it.appId.to_string()),
        E::AppDeployedViaFactory(it) => ("AppDeployedViaFactory", format!("{} by {}", it.appId, it.deployer)),
        E::AppImplementationSet(it) => ("AppImplementationSet", it.implementation.to_string()),
        E::OsImageHashAdded(it) => ("OsImageHashAdded", it.osImageHash.to_string()),
        E::OsImageHashRemoved(it) => ("OsImageHashRemoved", it.osImageHash.to_string()),
        E::KmsAggregatedMrAdded(it) => ("KmsAggregatedMrAdded", it.mrAggregated.to_string()),
        E::KmsAggregatedMrRemoved(it) => ("KmsAggregatedMrRemoved", it.mrAggregated.to_string()),
        E::KmsDeviceAdded(it) => ("KmsDeviceAdded", it.deviceId.to_string()),
        E::KmsDeviceRemoved(it) => ("KmsDeviceRemoved", it.deviceId.to_string()),
        E::GatewayAppIdSet(it) => {
            ("GatewayAppIdSet", kms_protocol::wire::webhook::bounded_reason(&it.gatewayAppId))
        }
        E::KmsInfoSet(it) => {
            ("KmsInfoSet", format!("0x{}", hex::encode(&it.k256Pubkey[..it.k256Pubkey.len().min(64)])))
        }
    })
}

fn app_event<I: Iterator<Item = B256>>(topics: impl Fn() -> I, log: &Log) -> Option<(&'static str, String)> {
    use DstackApp::DstackAppEvents as E;
    let event =
        <E as alloy::sol_types::SolEventInterface>::decode_raw_log(&topics().collect::<Vec<_>>(), &log.data)
            .ok()?;
    Some(match event {
        E::ComposeHashAdded(it) => ("ComposeHashAdded", it.composeHash.to_string()),
        E::ComposeHashRemoved(it) => ("ComposeHashRemoved", it.composeHash.to_string()),
        E::DeviceAdded(it) => ("DeviceAdded", it.deviceId.to_string()),
        E::DeviceRemoved(it) => ("DeviceRemoved", it.deviceId.to_string()),
        E::AllowAnyDeviceSet(it) => ("AllowAnyDeviceSet", it.allowAny.to_string()),
        E::RequireTcbUpToDateSet(it) => ("RequireTcbUpToDateSet", it.requireUpToDate.to_string()),
        E::UpgradesDisabled(_) => ("UpgradesDisabled", String::new()),
    })
}

fn shared_event<I: Iterator<Item = B256>>(
    topics: impl Fn() -> I,
    log: &Log,
) -> Option<(&'static str, String)> {
    use Governed::GovernedEvents as E;
    let event =
        <E as alloy::sol_types::SolEventInterface>::decode_raw_log(&topics().collect::<Vec<_>>(), &log.data)
            .ok()?;
    Some(match event {
        E::OwnershipTransferStarted(it) => {
            ("OwnershipTransferStarted", format!("{} to {}", it.previousOwner, it.newOwner))
        }
        E::OwnershipTransferred(it) => {
            ("OwnershipTransferred", format!("{} to {}", it.previousOwner, it.newOwner))
        }
        E::Upgraded(it) => ("Upgraded", it.implementation.to_string()),
        // Says again what the other events said, for auditors; printing both would double every line.
        E::PolicyChanged(_) => return None,
    })
}
