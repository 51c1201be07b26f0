//! The contracts on a chain, asked directly.
//!
//! What an endpoint says counts when enough others say the same about the same block; with the hashes of the known code
//! it is proven from the block's state root. Whatever is not a clear answer is silence, and silence refuses. A light
//! client is one more endpoint: until it follows the chain it answers with an error or an old block, and both refuse.

use std::time::Duration;

use ::chain::proof::KnownCode;
use ::chain::rpc::{Endpoints, Limits};
use ::chain::{Address, Authorizer, Decision, Error};
use kms_protocol::wire::webhook::AuthInfo;

use super::{Authoriser, Grant, Pending, Purpose, Question, Refusal};
use crate::server::system_clock;

/// Which contract decides, and who is believed about it.
#[derive(Debug, Clone)]
pub struct ChainConfig {
    /// JSON-RPC endpoints.
    pub rpc_urls: RpcUrls,
    /// How many of them must agree on every answer.
    pub agree: usize,
    /// The chain; endpoints of any other are not heard.
    pub chain_id: u64,
    /// Address of the KMS contract.
    pub kms_contract: Address,
    /// How long one decision may take.
    pub timeout: Duration,
    /// How old an endpoint's newest block may be.
    pub max_head_age: Duration,
    /// So many blocks behind the newest the contracts are read.
    pub behind_head: u64,
    /// The contracts' code, to decide from proven storage.
    pub proven_by: Option<KnownCode>,
}

/// Addresses of endpoints. The access keys in them are not shown.
#[derive(Clone)]
pub struct RpcUrls(Vec<String>);

impl RpcUrls {
    /// These addresses; they are looked at when the server starts.
    #[must_use]
    pub fn new(urls: Vec<String>) -> Self {
        Self(urls)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl std::fmt::Debug for RpcUrls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} endpoints", self.count())
    }
}

/// Asks the contracts.
pub struct OnChain {
    authorizer: Authorizer,
}

impl OnChain {
    /// Asks as configured. No connection is made yet.
    ///
    /// # Errors
    ///
    /// When an endpoint's address is not one.
    pub fn new(config: &ChainConfig) -> Result<Self, Error> {
        let limits = Limits { deadline: config.timeout, ..Limits::default() };
        let endpoints = Endpoints::new(&config.rpc_urls.0, config.agree, limits, seconds)?
            .on_chain(config.chain_id)
            .with_max_head_age(config.max_head_age)
            .behind_head(config.behind_head);
        let authorizer = Authorizer::new(endpoints, config.kms_contract, config.timeout);
        Ok(Self {
            authorizer: match config.proven_by {
                Some(code) => authorizer.with_proofs(code),
                None => authorizer,
            },
        })
    }
}

impl Authoriser for OnChain {
    fn kind(&self) -> &'static str {
        "chain"
    }

    fn authorise<'a>(&'a self, question: &'a Question) -> Pending<'a, Result<Grant, Refusal>> {
        Box::pin(async move {
            let answer = match question.purpose {
                Purpose::App => self.authorizer.is_app_allowed(&question.boot_info).await,
                Purpose::Kms => self.authorizer.is_kms_allowed(&question.boot_info).await,
            };
            let Decision { is_allowed, reason, gateway_app_id, block } =
                answer.map_err(|error| refusal(&error))?;
            tracing::debug!(is_allowed, reason, block, "the contracts decided");
            match is_allowed {
                true => Ok(Grant { gateway_app_id }),
                false => Err(Refusal::denied(&reason)),
            }
        })
    }

    fn describe(&self) -> Pending<'_, Result<Option<AuthInfo>, Refusal>> {
        Box::pin(async move {
            let info = self.authorizer.contract_info().await.map_err(|error| refusal(&error))?;
            Ok(Some(AuthInfo {
                status: "ok".to_owned(),
                kms_contract_addr: info.kms_contract.to_string(),
                gateway_app_id: info.gateway_app_id,
                chain_id: info.chain_id,
                app_implementation: info.app_implementation.to_string(),
                eth_rpc_url: None, // often holds an access key
            }))
        })
    }
}

/// A boot info that no contract can be asked about is the client's fault and a no; everything else is silence.
fn refusal(error: &Error) -> Refusal {
    match error {
        Error::BootInfo { .. } => Refusal::denied(&error.to_string()),
        _ => Refusal::unavailable(&command_line::chain(error)),
    }
}

/// Seconds since 1970, to tell how old a block is.
fn seconds() -> u64 {
    system_clock().0 / 1000
}
