//! One arm a method: decode, do, encode.

use kms_protocol::wire::guest::{GpuInfoResponse, GuestMethod, RefreshKeysResponse, VerifyResponse};
use zeroize::Zeroizing;

use super::GuestApi;
use super::http::{Failure, Message};
use super::keys;
use crate::delivery::RefreshError;

impl GuestApi {
    pub(super) async fn call(
        &self,
        method: GuestMethod,
        message: &Message<'_>,
    ) -> Result<Zeroizing<Vec<u8>>, Failure> {
        use GuestMethod as M;
        Ok(match method {
            M::GetKey => message.encode(&keys::by_path(&self.keys.current(), &message.decode()?)?),
            M::DeriveK256Key => {
                message.encode(&keys::by_path_k256(&self.keys.current(), &message.decode()?)?)
            }
            M::Sign => message.encode(&keys::sign(&self.keys.current(), &message.decode()?)?),
            M::Verify => message.encode(&VerifyResponse { valid: keys::verify(&message.decode()?)? }),
            M::GetTlsKey => message.encode(&self.tls_key(message.decode()?).await?),
            M::DeriveKey => message.encode(&self.derive_key(message.decode()?).await?),
            M::GetQuote => message.encode(&self.quote(&message.decode()?).await?),
            M::Attest => message.encode(&self.attest(&message.decode()?).await?),
            M::TdxQuote => message.encode(&self.hashed_quote(&message.decode()?).await?),
            M::RawQuote => message.encode(&self.raw_quote(message.decode()?).await?),
            M::EmitEvent => {
                self.emit_event(message.decode()?).await?;
                message.empty()
            }
            M::Info => message.encode(&self.info().await),
            M::Version => message.encode(&super::info::version()),
            // No Nitro Enclave has a GPU; upstream answers so without one.
            M::GpuInfo => message.encode(&GpuInfoResponse::default()),
            M::RefreshKeys => {
                let changed = self.refresher.refresh().await.map_err(|error| match error {
                    RefreshError::Busy => Failure::conflict(error.to_string()),
                    RefreshError::Failed(_) => Failure::upstream(&error),
                })?;
                message.encode(&RefreshKeysResponse { changed })
            }
        })
    }
}
