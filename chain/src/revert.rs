//! Why a contract call reverted, in words.

use std::fmt::{self, Display, Formatter};

use alloy::primitives::Bytes;
use alloy::sol_types::{ContractError, SolInterface};
use kms_protocol::wire::webhook::bounded_reason;

use crate::abi::Governed::GovernedErrors;

/// What a call left behind when it reverted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Revert {
    /// `require` or `revert` with a text.
    Reason(String),
    /// One of the errors the contracts declare.
    Declared(GovernedErrors),
    /// A panic code of the compiler, such as 0x11 for an overflow.
    Panic(u64),
    /// Anything else, often nothing at all.
    Data(Bytes),
}

impl Revert {
    /// From the data of a revert.
    pub fn decode(data: Bytes) -> Self {
        match ContractError::<GovernedErrors>::abi_decode_validate(&data) {
            Ok(ContractError::CustomError(error)) => Self::Declared(error),
            Ok(ContractError::Revert(revert)) => Self::Reason(bounded_reason(&revert.reason)),
            Ok(ContractError::Panic(panic)) => Self::Panic(panic.code.saturating_to()),
            Err(_) => Self::Data(data),
        }
    }

    /// The next step, when one is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Declared(GovernedErrors::OwnableUnauthorizedAccount(_)) => {
                Some("sign with the owner's key, or print the transaction for the owner with --calldata")
            }
            Self::Data(data) if data.is_empty() => {
                Some("the contract may not have this function: check its address and generation")
            }
            _ => None,
        }
    }
}

impl Display for Revert {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reason(reason) => write!(f, "{reason:?}"),
            Self::Panic(code) => write!(f, "panic {code:#x}"),
            Self::Declared(GovernedErrors::OwnableUnauthorizedAccount(error)) => {
                write!(f, "{} is not the owner", error.account)
            }
            Self::Declared(GovernedErrors::OwnableInvalidOwner(error)) => {
                write!(f, "{} cannot be an owner", error.owner)
            }
            Self::Declared(GovernedErrors::InvalidInitialization(_)) => {
                f.write_str("it is already initialised")
            }
            Self::Declared(GovernedErrors::ERC1967InvalidImplementation(error)) => {
                write!(f, "there is no contract at the implementation {}", error.implementation)
            }
            Self::Declared(error) => write!(f, "error {}", hex::encode(error.selector())),
            Self::Data(data) if data.is_empty() => f.write_str("without a reason"),
            Self::Data(data) => write!(f, "data 0x{}", hex::encode(&data[..data.len().min(64)])),
        }
    }
}

#[cfg(test)]
mod tests {
    use alloy::sol_types::{Revert as Text, SolError};

    use super::*;
    use crate::abi::Governed;

    #[test]
    fn reverts_are_told_in_words() {
        let owner = Governed::OwnableUnauthorizedAccount { account: [0x22; 20].into() };
        let cases = [
            (owner.abi_encode(), "0x2222222222222222222222222222222222222222 is not the owner"),
            (Text::from("Invalid app ID").abi_encode(), "\"Invalid app ID\""),
            (Vec::new(), "without a reason"),
            (vec![1, 2, 3, 4], "data 0x01020304"),
        ];
        for (data, expected) in cases {
            assert_eq!(Revert::decode(data.into()).to_string(), expected);
        }
    }

    #[test]
    fn a_contracts_reason_cannot_forge_log_lines_or_flood() {
        let text = format!("a\nlevel=error {}", "é".repeat(4000));
        let Revert::Reason(reason) = Revert::decode(Text::from(text).abi_encode().into()) else {
            panic!("not a reason");
        };
        assert!(!reason.contains('\n') && reason.len() <= 512);
    }
}
