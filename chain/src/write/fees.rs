use alloy::primitives::U256;
use serde_json::json;

use crate::rpc::{Endpoint, View};
use crate::{Error, Result};

/// What a unit of gas may cost at most, in wei.
#[derive(Clone, Copy, Debug)]
pub struct FeeCaps {
    /// Base fee and tip together.
    pub total: u128,
    /// The tip alone.
    pub tip: u128,
}

impl Default for FeeCaps {
    /// 100 and 3 gwei.
    fn default() -> Self {
        Self { total: 100_000_000_000, tip: 3_000_000_000 }
    }
}

/// The fees of one transaction, in wei per unit of gas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fees {
    pub(crate) max_fee: u128,
    pub(crate) tip: u128,
}

/// Fees that survive six full blocks in a row (the base fee grows by at most 12.5 % per block, EIP-1559), but never
/// more than the caps.
pub(crate) fn fees(base_fee: u128, suggested_tip: u128, caps: FeeCaps) -> Result<Fees> {
    let tip = suggested_tip.min(caps.tip);
    let needed = base_fee.saturating_add(tip);
    if needed > caps.total {
        return Err(Error::FeeCap { needed, cap: caps.total });
    }
    let max_fee = base_fee.saturating_mul(2).saturating_add(tip).min(caps.total);
    Ok(Fees { max_fee, tip })
}

/// The fees for the next block, from what the agreed header and one endpoint say. The tip is only a suggestion, and
/// capped, so one endpoint may make it; where it has none, a tip of nothing is tried.
pub(crate) async fn suggest(endpoint: &Endpoint, view: &View, caps: FeeCaps) -> Result<Fees> {
    let Some(base_fee) = view.head.base_fee_per_gas else {
        return Err(Error::NoBaseFee { chain_id: view.chain_id });
    };
    let tip = match endpoint.request::<U256>("eth_maxPriorityFeePerGas", json!([])).await {
        Ok(tip) => tip,
        Err(Error::MethodMissing { .. }) => U256::ZERO,
        Err(error) => return Err(error),
    };
    fees(base_fee.saturating_to(), tip.saturating_to(), caps)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPS: FeeCaps = FeeCaps { total: 100, tip: 10 };

    #[test]
    fn caps_hold() {
        assert_eq!(fees(20, 5, CAPS).unwrap(), Fees { max_fee: 45, tip: 5 });
        assert_eq!(fees(60, 5, CAPS).unwrap(), Fees { max_fee: 100, tip: 5 });
        assert_eq!(fees(20, u128::MAX, CAPS).unwrap(), Fees { max_fee: 50, tip: 10 });
        assert!(matches!(fees(91, 10, CAPS), Err(Error::FeeCap { needed: 101, cap: 100 })));
        assert!(matches!(fees(u128::MAX, 10, CAPS), Err(Error::FeeCap { .. })));
    }
}
