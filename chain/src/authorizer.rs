//! The question a KMS asks before it releases keys.

use std::time::Duration;

use alloy::primitives::Address;
use kms_protocol::wire::webhook::{BootInfo, bounded_reason};
use tokio::time::timeout;

use crate::abi::AppBootInfo;
use crate::boot_info::app_boot_info;
use crate::contracts::Reader;
use crate::proof::{KnownCode, ProvenReader};
use crate::rpc::{Endpoints, View};
use crate::{Error, Result};

/// What the contracts decided, at one block that enough endpoints agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The decision.
    pub is_allowed: bool,
    /// The contract's words, bounded and free of control characters; empty when allowed.
    pub reason: String,
    /// Application id of the gateway, may be empty.
    pub gateway_app_id: String,
    /// Number of the block it holds for.
    pub block: u64,
}

/// What a KMS tells about its contract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContractInfo {
    /// Chain id.
    pub chain_id: u64,
    /// Address of the KMS contract.
    pub kms_contract: Address,
    /// The logic contract that new applications get.
    pub app_implementation: Address,
    /// Application id of the gateway, may be empty.
    pub gateway_app_id: String,
}

/// Asks the KMS contract. Everything that is not a clear yes is an error or a decision with `is_allowed` false.
pub struct Authorizer {
    endpoints: Endpoints,
    kms_contract: Address,
    deadline: Duration,
    proven_by: Option<KnownCode>,
}

impl Authorizer {
    /// Asks the contract at `kms_contract`; every method answers within `deadline`.
    pub fn new(endpoints: Endpoints, kms_contract: Address, deadline: Duration) -> Self {
        Self { endpoints, kms_contract, deadline, proven_by: None }
    }

    /// Decides from storage that is proven against the agreed block instead of asking the contracts. Contracts with
    /// other code than this one decide nothing then, which is an error.
    #[must_use]
    pub fn with_proofs(mut self, code: KnownCode) -> Self {
        self.proven_by = Some(code);
        self
    }

    /// Whether this application may have its keys. Cancel safe.
    ///
    /// # Errors
    /// When no decision can be had; the caller denies.
    pub async fn is_app_allowed(&self, info: &BootInfo) -> Result<Decision> {
        self.decide(info, Question::App).await
    }

    /// Whether this KMS may have the root keys. Cancel safe.
    ///
    /// # Errors
    /// When no decision can be had; the caller denies.
    pub async fn is_kms_allowed(&self, info: &BootInfo) -> Result<Decision> {
        self.decide(info, Question::Kms).await
    }

    /// What the KMS publishes about its contract. Cancel safe.
    ///
    /// # Errors
    /// See [`Reader::read`].
    pub async fn contract_info(&self) -> Result<ContractInfo> {
        self.in_time("contract info", async {
            let view = self.endpoints.view().await?;
            let (app_implementation, gateway_app_id) = match self.proven_by {
                Some(code) => {
                    let prove = async |it| {
                        let kms = ProvenReader::new(it, &view.head, self.kms_contract, code);
                        tokio::try_join!(kms.app_implementation(), kms.gateway_app_id())
                    };
                    self.endpoints.first_success(prove).await?
                }
                None => {
                    let kms = Reader::new(&self.endpoints, &view, self.kms_contract);
                    tokio::try_join!(kms.app_implementation(), kms.gateway_app_id())?
                }
            };
            Ok(ContractInfo {
                chain_id: view.chain_id,
                kms_contract: self.kms_contract,
                app_implementation,
                gateway_app_id: bounded_reason(&gateway_app_id),
            })
        })
        .await
    }

    async fn decide(&self, info: &BootInfo, question: Question) -> Result<Decision> {
        let who = app_boot_info(info)?;
        self.in_time("authorisation", async {
            let view = self.endpoints.view().await?;
            let ((is_allowed, reason), gateway_app_id) = match self.proven_by {
                Some(code) => self.prove(&view, code, &who, question).await?,
                None => self.ask(&view, who, question).await?,
            };
            Ok(Decision {
                is_allowed,
                reason: bounded_reason(&reason),
                gateway_app_id: bounded_reason(&gateway_app_id),
                block: view.block(),
            })
        })
        .await
    }

    async fn ask(&self, view: &View, who: AppBootInfo, question: Question) -> Result<(Answer, String)> {
        let kms = Reader::new(&self.endpoints, view, self.kms_contract);
        let decision = async {
            match question {
                Question::App => kms.is_app_allowed(who).await,
                Question::Kms => kms.is_kms_allowed(who).await,
            }
        };
        tokio::try_join!(decision, kms.gateway_app_id())
    }

    async fn prove(
        &self,
        view: &View,
        code: KnownCode,
        who: &AppBootInfo,
        question: Question,
    ) -> Result<(Answer, String)> {
        let prove = async |endpoint| {
            let kms = ProvenReader::new(endpoint, &view.head, self.kms_contract, code);
            let decision = async {
                match question {
                    Question::App => kms.is_app_allowed(who).await,
                    Question::Kms => kms.is_kms_allowed(who).await,
                }
            };
            tokio::try_join!(decision, kms.gateway_app_id())
        };
        let ((is_allowed, reason), gateway) = self.endpoints.first_success(prove).await?;
        Ok(((is_allowed, reason.to_owned()), gateway))
    }

    async fn in_time<T>(&self, what: &'static str, work: impl Future<Output = Result<T>>) -> Result<T> {
        timeout(self.deadline, work).await.map_err(|_| Error::NoAnswer {
            endpoint: format!("{} endpoint(s)", self.endpoints.each().len()),
            method: what,
            after: self.deadline,
        })?
    }
}

/// Whether, and if not, in which words.
type Answer = (bool, String);

#[derive(Clone, Copy)]
enum Question {
    App,
    Kms,
}
