use std::path::Path;
use std::time::Duration;

use alloy::consensus::{SignableTransaction, TxEip1559, TxEnvelope};
use alloy::eips::eip2718::{Decodable2718, Encodable2718};
use alloy::primitives::{Address, B256, Bytes, TxKind, U64, U256, hex};
use alloy::sol_types::SolEvent;
use futures_util::future::join_all;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::abi::DstackKms;
use crate::keys::AnySigner;
use crate::rpc::{Endpoint, Endpoints, Receipt, View, patiently};
use crate::write::fees::{self, FeeCaps, Fees};
use crate::write::journal::{End, Sent};
use crate::write::{Goal, Journal, Operation};
use crate::{Error, Result};

/// After so many looks in a row at a used-up nonce without a receipt, the transaction counts as replaced. Behind one
/// address there are often several nodes of different age, so a single look proves nothing.
const LOOKS_BEFORE_REPLACED: u32 = 5;
/// A transaction is offered again every so many looks: pools forget.
const LOOKS_BETWEEN_OFFERS: u32 = 8;

/// How a sender behaves.
#[derive(Clone, Copy, Debug)]
pub struct SenderConfig {
    /// What gas may cost.
    pub caps: FeeCaps,
    /// Blocks that must contain or follow the transaction, at least one.
    pub confirmations: u64,
    /// Time for one transaction from sending to the last confirmation.
    pub deadline: Duration,
    /// Time between two looks.
    pub poll: Duration,
}

impl Default for SenderConfig {
    /// 3 confirmations within 5 minutes, looked for every second.
    fn default() -> Self {
        Self {
            caps: FeeCaps::default(),
            confirmations: 3,
            deadline: Duration::from_secs(300),
            poll: Duration::from_secs(1),
        }
    }
}

/// What is about to be done.
#[derive(Clone, Debug)]
pub enum Plan {
    /// Nothing: the state is as wanted.
    AlreadyDone {
        /// What an earlier run created.
        created: Option<Address>,
    },
    /// One transaction.
    Send {
        /// In words.
        what: String,
        /// Which chain.
        chain_id: u64,
        /// Who pays.
        from: Address,
        /// The contract called.
        to: Option<Address>,
        /// Calldata or creation code.
        data: Bytes,
        /// Its nonce.
        nonce: u64,
        /// Gas it may use.
        gas_limit: u64,
        /// Wei per gas at most, tip included.
        max_fee: u128,
        /// Wei per gas of tip at most.
        tip: u128,
        /// Return value of the dry run.
        dry_run: Bytes,
    },
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing had to be done.
    AlreadyDone {
        /// What an earlier run created.
        created: Option<Address>,
    },
    /// A transaction did it.
    Done {
        /// Its hash.
        hash: B256,
        /// Its block.
        block: u64,
        /// What it created.
        created: Option<Address>,
    },
}

impl Outcome {
    /// What was created, now or earlier.
    pub fn created(&self) -> Option<Address> {
        match self {
            Self::AlreadyDone { created } | Self::Done { created, .. } => *created,
        }
    }
}

/// One account on one chain, and the journal of what it sends.
pub struct Sender {
    endpoints: Endpoints,
    signer: AnySigner,
    journal: Journal,
    config: SenderConfig,
    chain_id: u64,
    /// Reads before this block would not see what was done here.
    floor: u64,
}

enum Look {
    Ended(End),
    Waiting,
    NonceGone,
}

impl Sender {
    /// Opens the account's journal. Transactions that an earlier run left open are waited for by [`Sender::settle`].
    ///
    /// # Errors
    /// See [`Journal::open`] and [`Endpoints::view`].
    pub async fn open(
        endpoints: Endpoints,
        signer: AnySigner,
        folder: &Path,
        config: SenderConfig,
    ) -> Result<Self> {
        let view = endpoints.view().await?;
        let genesis = endpoints.agree("the first block", |it| it.block("0x0")).await?.hash;
        let journal = Journal::open(folder, view.chain_id, genesis, signer.address())?;
        let blocks = journal.sent().iter().filter_map(|it| match it.end {
            Some(End::Succeeded { block, .. } | End::Reverted { block }) => Some(block),
            _ => None,
        });
        let floor = blocks.max().unwrap_or_default();
        Ok(Self { chain_id: view.chain_id, endpoints, signer, journal, config, floor })
    }

    /// The account.
    pub fn address(&self) -> Address {
        self.signer.address()
    }

    /// The chain.
    pub fn chain_id(&self) -> u64 {
        self.chain_id
    }

    /// The endpoints it asks.
    pub fn endpoints(&self) -> &Endpoints {
        &self.endpoints
    }

    /// A view that shows everything this account has done so far: endpoints that lag behind are waited for.
    ///
    /// # Errors
    /// [`Error::StateMissing`] when they do not catch up in time, and see [`Endpoints::view`].
    pub async fn view(&self) -> Result<View> {
        let deadline = Instant::now() + self.config.deadline;
        loop {
            let view = self.endpoints.view().await?;
            if view.block() >= self.floor {
                return Ok(view);
            }
            if Instant::now() > deadline {
                return Err(Error::StateMissing {
                    endpoint: "the agreed endpoints".to_owned(),
                    method: "eth_getBlockByNumber",
                    message: format!("their block is {}, we need {}", view.block(), self.floor),
                });
            }
            sleep(self.config.poll).await;
        }
    }

    /// Decides what an operation needs: nothing, or one transaction that a dry run has passed. Sends nothing.
    ///
    /// # Errors
    /// [`Error::Reverted`] when the dry run fails, [`Error::FeeCap`], [`Error::Funds`], [`Error::ForeignPending`], and
    /// whatever the endpoints do.
    pub async fn plan(&self, operation: &Operation) -> Result<Plan> {
        let view = self.view().await?;
        if let Some(created) = self.already_done(operation, &view).await? {
            return Ok(Plan::AlreadyDone { created });
        }
        let (from, to, data) = (self.address(), operation.to, &operation.data);
        if let Some(contract) = to {
            self.endpoints.require_code(&view, contract).await?;
        }
        let dry_run = self.endpoints.call(&operation.what, &view, to, Some(from), data).await?;
        let nonce = self.next_nonce(&view).await?;
        let gas = self.first_answer(async |it| estimate(it, &view, from, operation).await).await?;
        let gas_limit = gas.saturating_add(gas / 4);
        let Fees { max_fee, tip } =
            self.first_answer(async |it| fees::suggest(it, &view, self.config.caps).await).await?;
        self.require_funds(&view, U256::from(gas_limit) * U256::from(max_fee)).await?;
        Ok(Plan::Send {
            what: operation.what.clone(),
            chain_id: self.chain_id,
            from,
            to,
            data: data.clone(),
            nonce,
            gas_limit,
            max_fee,
            tip,
            dry_run,
        })
    }

    async fn already_done(&self, operation: &Operation, view: &View) -> Result<Option<Option<Address>>> {
        match operation.goal {
            Goal::State(_) => Ok(operation.state_holds(&self.endpoints, view).await?.then_some(None)),
            Goal::Created => {
                let id = operation.id(self.chain_id, self.address());
                let Some((created, _)) = self.journal.created_by(id) else {
                    return Ok(None);
                };
                let exists = Operation::exists(&self.endpoints, view, created).await?;
                Ok(exists.then_some(Some(created)))
            }
        }
    }

    /// The next nonce: what enough endpoints see mined, or what we know better. Somebody else's transaction in flight
    /// is an error, since ours would fight with it or wait behind it.
    async fn next_nonce(&self, view: &View) -> Result<u64> {
        let account = self.address();
        let block = format!("{:#x}", view.block());
        let agreed = self.endpoints.agree("the account's nonce", |it| it.nonce(account, &block)).await?;
        let mined = agreed.max(self.journal.next_nonce());
        let announced = join_all(self.endpoints.each().iter().map(|it| it.nonce(account, "pending"))).await;
        match announced.into_iter().flatten().max() {
            Some(pending) if pending > mined => Err(Error::ForeignPending { account, mined, pending }),
            _ => Ok(mined),
        }
    }

    async fn require_funds(&self, view: &View, needed: U256) -> Result<()> {
        let account = self.address();
        let block = U64::from(view.block());
        let balance: U256 = self
            .endpoints
            .agree("the account's balance", |it| it.request("eth_getBalance", json!([account, block])))
            .await?;
        match balance >= needed {
            true => Ok(()),
            false => Err(Error::Funds { account, balance, needed }),
        }
    }

    /// The answer of the first endpoint that has one: for estimates, on which honest endpoints differ.
    async fn first_answer<T>(&self, ask: impl AsyncFn(&Endpoint) -> Result<T>) -> Result<T> {
        let mut last = None;
        for endpoint in self.endpoints.each() {
            match patiently(|| ask(endpoint)).await {
                Err(error) if !matches!(error, Error::Reverted { .. } | Error::FeeCap { .. }) => {
                    last = Some(error)
                }
                answer => return answer,
            }
        }
        Err(last.unwrap_or(Error::Agreement { wanted: 1, endpoints: 0 }))
    }

    /// Does what the plan says: signs, writes the journal, sends, waits, reads back.
    ///
    /// Dropping the future after the journal is written loses nothing: the next [`Sender::settle`] takes over.
    ///
    /// # Errors
    /// [`Error::NotConfirmed`] when it takes too long, [`Error::Failed`], [`Error::Replaced`], [`Error::NotVisible`].
    pub async fn execute(&mut self, operation: &Operation, plan: Plan) -> Result<Outcome> {
        let (nonce, gas_limit, fees) = match plan {
            Plan::AlreadyDone { created } => return Ok(Outcome::AlreadyDone { created }),
            Plan::Send { nonce, gas_limit, max_fee, tip, .. } => (nonce, gas_limit, Fees { max_fee, tip }),
        };
        let transaction = TxEip1559 {
            chain_id: self.chain_id,
            nonce,
            gas_limit,
            max_fee_per_gas: fees.max_fee,
            max_priority_fee_per_gas: fees.tip,
            to: operation.to.map_or(TxKind::Create, TxKind::Call),
            input: operation.data.clone(),
            ..TxEip1559::default()
        };
        let id = operation.id(self.chain_id, self.address());
        let hash = self.sign(id, &operation.what, transaction).await?;
        self.settle().await?;
        self.read_back(operation, hash).await
    }

    async fn sign(&mut self, operation: B256, what: &str, mut transaction: TxEip1559) -> Result<B256> {
        let signature = self.signer.sign_transaction(&mut transaction).await.map_err(Error::signing)?;
        let nonce = transaction.nonce;
        let signed = transaction.into_signed(signature);
        let hash = *signed.hash();
        self.journal.signed(Sent {
            operation,
            what: what.to_owned(),
            nonce,
            hash,
            raw: signed.encoded_2718().into(),
            end: None,
        })?;
        tracing::info!(%hash, nonce, what, "transaction signed");
        Ok(hash)
    }

    /// Signs the open transactions again with higher fees, for when the first fees were too low. Both versions have the
    /// same nonce, so the chain mines one.
    ///
    /// # Errors
    /// [`Error::FeeCap`], and see [`Sender::execute`].
    pub async fn raise_fees(&mut self) -> Result<()> {
        let view = self.view().await?;
        for sent in self.journal.open_ones() {
            let Ok(TxEnvelope::Eip1559(old)) = TxEnvelope::decode_2718_exact(&sent.raw) else {
                continue; // not written by this version; it stays open and is offered as it is
            };
            let mut transaction = old.into_parts().0;
            let caps = self.config.caps;
            let Fees { max_fee, tip } =
                self.first_answer(async |it| fees::suggest(it, &view, caps).await).await?;
            // Pools take a replacement only when both fees grow by a tenth (geth's price bump).
            let bump = |fee: u128| fee + fee / 8 + 1;
            transaction.max_fee_per_gas = max_fee.max(bump(transaction.max_fee_per_gas));
            transaction.max_priority_fee_per_gas = tip.max(bump(transaction.max_priority_fee_per_gas));
            if transaction.max_fee_per_gas > caps.total {
                return Err(Error::FeeCap { needed: transaction.max_fee_per_gas, cap: caps.total });
            }
            self.sign(sent.operation, &sent.what, transaction).await?;
        }
        Ok(())
    }

    /// Waits until every open transaction of the journal has ended, offering the same bytes again meanwhile. Says
    /// which ended.
    ///
    /// # Errors
    /// [`Error::NotConfirmed`], and whatever the endpoints do all the time.
    pub async fn settle(&mut self) -> Result<Vec<B256>> {
        let deadline = Instant::now() + self.config.deadline;
        let mut gone = 0;
        let mut looks = 0;
        let mut ended = Vec::new();
        loop {
            let open = self.journal.open_ones();
            let Some(first) = open.iter().min_by_key(|it| it.nonce).cloned() else {
                return Ok(ended);
            };
            let rivals: Vec<Sent> = open.into_iter().filter(|it| it.nonce == first.nonce).collect();
            if looks % LOOKS_BETWEEN_OFFERS == 0 {
                self.offer(&rivals).await;
            }
            looks += 1;
            let looked = self.look(&rivals).await;
            match looked {
                Ok((hash, Look::Ended(end))) => {
                    ended.push(hash);
                    self.end(hash, end, &rivals)?;
                    (gone, looks) = (0, 0);
                    continue;
                }
                Ok((_, Look::NonceGone)) => gone += 1,
                Ok((_, Look::Waiting)) => gone = 0,
                Err(error) if error.is_transient() || matches!(error, Error::Disagreement { .. }) => {
                    tracing::debug!(%error, "cannot look at the transaction now");
                }
                Err(error) => return Err(error),
            }
            if gone >= LOOKS_BEFORE_REPLACED {
                for rival in &rivals {
                    self.journal.ended(rival.hash, End::Replaced)?;
                    ended.push(rival.hash);
                }
                gone = 0;
                continue;
            }
            if Instant::now() > deadline {
                return Err(Error::NotConfirmed {
                    hash: first.hash,
                    nonce: first.nonce,
                    after: self.config.deadline,
                });
            }
            sleep(self.config.poll).await;
        }
    }

    fn end(&mut self, hash: B256, end: End, rivals: &[Sent]) -> Result<()> {
        if let End::Succeeded { block, .. } | End::Reverted { block } = end {
            self.floor = self.floor.max(block);
        }
        self.journal.ended(hash, end)?;
        for rival in rivals.iter().filter(|it| it.hash != hash) {
            self.journal.ended(rival.hash, End::Replaced)?;
        }
        Ok(())
    }

    /// Gives the signed bytes to every endpoint. What they say is not an answer: the receipt is.
    async fn offer(&self, transactions: &[Sent]) {
        for sent in transactions {
            let raw = format!("0x{}", hex::encode(&sent.raw));
            let offers = self.endpoints.each().iter().map(|it| {
                let raw = &raw;
                async move { (it.name(), it.request::<B256>("eth_sendRawTransaction", json!([raw])).await) }
            });
            for (endpoint, answer) in join_all(offers).await {
                match answer {
                    Ok(_) => tracing::debug!(endpoint, hash = %sent.hash, "transaction offered"),
                    Err(error) => {
                        tracing::debug!(endpoint, hash = %sent.hash, %error, "transaction not taken")
                    }
                }
            }
        }
    }

    /// Looks at transactions that share a nonce.
    async fn look(&self, rivals: &[Sent]) -> Result<(B256, Look)> {
        let view = self.endpoints.view().await?;
        let first = rivals[0].hash;
        for sent in rivals {
            let receipt = self.endpoints.agree("the receipt", |it| it.receipt(sent.hash)).await?;
            if let Some(receipt) = receipt {
                let block: u64 = receipt.block_number.to();
                let confirmed = view.block() + 1 >= block + self.config.confirmations.max(1);
                return Ok((
                    sent.hash,
                    if confirmed { Look::Ended(end_of(&receipt)) } else { Look::Waiting },
                ));
            }
        }
        let account = self.address();
        let settled = view.block().saturating_sub(self.config.confirmations.saturating_sub(1));
        let block = format!("{settled:#x}");
        let nonce = self.endpoints.agree("the account's nonce", |it| it.nonce(account, &block)).await?;
        Ok((first, if nonce > rivals[0].nonce { Look::NonceGone } else { Look::Waiting }))
    }

    async fn read_back(&self, operation: &Operation, hash: B256) -> Result<Outcome> {
        // A version with higher fees may have been mined in place of the first one.
        let id = operation.id(self.chain_id, self.address());
        let of_operation = self.journal.sent().iter().rev().filter(|it| it.operation == id);
        let mut ends = of_operation.filter_map(|it| it.end.clone().map(|end| (it.hash, end)));
        let Some((hash, end)) = ends.find(|(_, end)| *end != End::Replaced) else {
            let nonce = self.journal.sent().iter().find(|it| it.hash == hash).map_or(0, |it| it.nonce);
            return Err(Error::Replaced { hash, nonce, account: self.address() });
        };
        let (block, created) = match end {
            End::Succeeded { block, created } => (block, created),
            End::Reverted { block } => return Err(Error::Failed { hash, block }),
            End::Replaced => unreachable!("filtered out above"),
        };
        let view = self.view().await?;
        if self.already_done(operation, &view).await?.is_none() {
            let what = operation.what.clone();
            return Err(Error::NotVisible { what, block: view.block(), hash });
        }
        Ok(Outcome::Done { hash, block, created })
    }
}

fn end_of(receipt: &Receipt) -> End {
    let block = receipt.block_number.to();
    if !receipt.succeeded() {
        return End::Reverted { block };
    }
    let deployed = |log: &crate::rpc::Log| {
        DstackKms::AppDeployedViaFactory::decode_raw_log(log.topics.iter().copied(), &log.data).ok()
    };
    let app = receipt.logs.iter().find_map(deployed).map(|event| event.appId);
    End::Succeeded { block, created: receipt.contract_address.or(app) }
}

async fn estimate(endpoint: &Endpoint, view: &View, from: Address, operation: &Operation) -> Result<u64> {
    let mut call = json!({ "from": from, "data": operation.data });
    if let Some(to) = operation.to {
        call["to"] = json!(to);
    }
    let gas: U64 = endpoint.request("eth_estimateGas", json!([call, U64::from(view.block())])).await?;
    Ok(gas.to())
}
