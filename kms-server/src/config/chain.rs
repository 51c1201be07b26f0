//! `[core.auth_api.chain]`, checked.

use std::str::FromStr;

use ::chain::proof::KnownCode;

use super::{ConfigError, duration, file};
use crate::authorise::chain::{ChainConfig, RpcUrls};

pub(super) fn check(settings: &file::Chain) -> Result<ChainConfig, ConfigError> {
    let file::Chain {
        rpc_urls,
        agree,
        chain_id,
        kms_contract,
        timeout,
        max_head_age,
        behind_head,
        kms_code,
        app_code,
    } = settings;
    let count = rpc_urls.len();
    let agree = agree.unwrap_or(count / 2 + 1);
    if agree == 0 || agree > count {
        return Err(ConfigError::Value {
            key: "core.auth_api.chain.agree",
            actual: format!("{agree} of {count} rpc_urls"),
            expected: "at least one endpoint, and not more agreeing ones than there are",
        });
    }
    let code_key = "core.auth_api.chain.kms_code, app_code";
    let proven_by = match (kms_code, app_code) {
        (None, None) => None,
        (Some(kms), Some(app)) => {
            let expected = "the Keccak-256 of the code, 64 hex digits";
            let kms = parsed("core.auth_api.chain.kms_code", kms, expected)?;
            Some(KnownCode { kms, app: parsed("core.auth_api.chain.app_code", app, expected)? })
        }
        // One alone would look like proofs and be none.
        _ => {
            let (actual, expected) = ("only one of them".to_owned(), "both or neither");
            return Err(ConfigError::Value { key: code_key, actual, expected });
        }
    };
    Ok(ChainConfig {
        rpc_urls: RpcUrls::new(rpc_urls.clone()),
        agree,
        chain_id: chain_id.ok_or(ConfigError::Value {
            key: "core.auth_api.chain.chain_id",
            actual: String::new(),
            expected: "the chain's id, such as 8453",
        })?,
        kms_contract: parsed(
            "core.auth_api.chain.kms_contract",
            kms_contract,
            "the address of the KMS contract",
        )?,
        timeout: duration("core.auth_api.chain.timeout", timeout)?,
        max_head_age: duration("core.auth_api.chain.max_head_age", max_head_age)?,
        behind_head: *behind_head,
        proven_by,
    })
}

fn parsed<T: FromStr>(key: &'static str, text: &str, expected: &'static str) -> Result<T, ConfigError> {
    text.parse().map_err(|_| ConfigError::Value { key, actual: text.to_owned(), expected })
}
