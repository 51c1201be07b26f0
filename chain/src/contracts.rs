//! Typed reads of the two contracts.

use alloy::primitives::{Address, B256, Bytes};
use alloy::sol_types::SolCall;

use crate::abi::{AppBootInfo, DstackApp, DstackKms, Governed, IMPLEMENTATION_SLOT};
use crate::rpc::{Endpoints, View};
use crate::{Error, Result};

/// A contract at an address, read at one block.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    endpoints: &'a Endpoints,
    view: &'a View,
    address: Address,
}

impl<'a> Reader<'a> {
    /// Reads `address` at the block of `view`.
    pub fn new(endpoints: &'a Endpoints, view: &'a View, address: Address) -> Self {
        Self { endpoints, view, address }
    }

    /// Calls a view function.
    ///
    /// # Errors
    /// [`Error::ReturnValue`] when the answer does not decode, and see [`Endpoints::call`].
    pub async fn read<C: SolCall>(&self, call: C) -> Result<C::Return> {
        let data = Bytes::from(call.abi_encode());
        let answer = self.endpoints.call(C::SIGNATURE, self.view, Some(self.address), None, &data).await?;
        if answer.is_empty() {
            // No code answers every call with nothing. Say so instead of "does not decode".
            self.endpoints.require_code(self.view, self.address).await?;
        }
        C::abi_decode_returns_validate(&answer)
            .map_err(|_| Error::ReturnValue { what: C::SIGNATURE.to_owned(), length: answer.len() })
    }

    /// The KMS contract's answer about an application.
    ///
    /// # Errors
    /// See [`Reader::read`].
    pub async fn is_app_allowed(&self, who: AppBootInfo) -> Result<(bool, String)> {
        let answer = self.read(DstackKms::isAppAllowedCall { bootInfo: who }).await?;
        Ok((answer.isAllowed, answer.reason))
    }

    /// The KMS contract's answer about a KMS.
    ///
    /// # Errors
    /// See [`Reader::read`].
    pub async fn is_kms_allowed(&self, who: AppBootInfo) -> Result<(bool, String)> {
        let answer = self.read(DstackKms::isKmsAllowedCall { bootInfo: who }).await?;
        Ok((answer.isAllowed, answer.reason))
    }

    /// The gateway's application id.
    ///
    /// # Errors
    /// See [`Reader::read`].
    pub async fn gateway_app_id(&self) -> Result<String> {
        self.read(DstackKms::gatewayAppIdCall {}).await
    }

    /// The logic contract that new applications get.
    ///
    /// # Errors
    /// See [`Reader::read`].
    pub async fn app_implementation(&self) -> Result<Address> {
        self.read(DstackKms::appImplementationCall {}).await
    }

    /// Whether an image may run.
    ///
    /// # Errors
    /// See [`Reader::read`].
    pub async fn image_allowed(&self, hash: B256) -> Result<bool> {
        self.read(DstackKms::allowedOsImagesCall { osImageHash: hash }).await
    }

    /// Whether an application is known to the KMS.
    ///
    /// # Errors
    /// See [`Reader::read`].
    pub async fn app_registered(&self, app: Address) -> Result<bool> {
        self.read(DstackKms::registeredAppsCall { appId: app }).await
    }

    /// Whether an application may run this compose hash.
    ///
    /// # Errors
    /// See [`Reader::read`].
    pub async fn compose_hash_allowed(&self, hash: B256) -> Result<bool> {
        self.read(DstackApp::allowedComposeHashesCall { composeHash: hash }).await
    }

    /// Who may change the contract.
    ///
    /// # Errors
    /// See [`Reader::read`].
    pub async fn owner(&self) -> Result<Address> {
        self.read(Governed::ownerCall {}).await
    }

    /// Who has been offered the ownership; `None` for contracts that hand it over in one step.
    ///
    /// # Errors
    /// See [`Reader::read`].
    pub async fn pending_owner(&self) -> Result<Option<Address>> {
        match self.read(Governed::pendingOwnerCall {}).await {
            Ok(owner) => Ok(Some(owner).filter(|it| !it.is_zero())),
            Err(Error::Reverted { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The logic contract behind the proxy; zero when there is no proxy.
    ///
    /// # Errors
    /// See [`Endpoints::storage`].
    pub async fn implementation(&self) -> Result<Address> {
        let slot =
            self.endpoints.storage("implementation slot", self.view, self.address, IMPLEMENTATION_SLOT);
        Ok(Address::from_word(slot.await?))
    }

    /// Whether there is code at the address.
    ///
    /// # Errors
    /// See [`Endpoints::require_code`].
    pub async fn exists(&self) -> Result<bool> {
        match self.endpoints.require_code(self.view, self.address).await {
            Ok(()) => Ok(true),
            Err(Error::NoContract { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
