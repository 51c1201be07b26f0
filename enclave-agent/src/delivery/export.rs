//! The one way in which keys leave the enclave, in messages of [`transport::delivery`].

use std::sync::Arc;
use std::time::Duration;

use kms_protocol::report_data;
use tokio::time::{Instant, sleep, timeout_at};
use transport::{Endpoint, delivery};
use zeroize::Zeroizing;

use super::Error;
use super::age::{self, Recipient};
use crate::evidence::OwnDocument;
use crate::nsm::{AttestFields, Nsm};
use crate::{Keys, Retry};

/// Tag of the report data that binds a document to an export.
pub const EXPORT_TAG: &str = "keyferry-export";

/// Where the keys are sent, and in which form.
#[derive(Clone, Debug)]
pub struct Export {
    /// The receiver: the parent's vsock port.
    pub to: Endpoint,
    /// In which form.
    pub form: Form,
    /// For the whole export, attempts and pauses included.
    pub deadline: Duration,
    /// For one document of the NSM.
    pub nsm_deadline: Duration,
}

/// In which form the keys leave.
#[derive(Clone, Debug)]
pub enum Form {
    /// Encrypted to these, at least one, with this enclave's evidence beside it.
    Sealed(Vec<Recipient>),
    /// `app_keys.json` in plain, as the upstream demo does. The parent, and whoever reads its memory or files, has the
    /// keys then.
    DangerPlaintext,
}

impl Export {
    /// Sends the keys and waits until the receiver has them on disk. Tries again while the receiver is away, and
    /// not when it refuses.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn send(&self, keys: &Keys, nsm: &Arc<dyn Nsm>) -> Result<(), Error> {
        let end = Instant::now() + self.deadline;
        let message = self.message(keys, nsm).await?;
        let mut attempt = 1;
        loop {
            let error = match timeout_at(end, self.attempt(&message)).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => error,
                Err(_elapsed) => return Err(self.timed_out()),
            };
            if !matches!(error, Error::Connect(_) | Error::Exchange { .. }) {
                return Err(error);
            }
            attempt += 1;
            let pause = Retry::default().pause(attempt, None, crate::trip::random());
            if Instant::now() + pause >= end {
                return Err(error);
            }
            sleep(pause).await;
        }
    }

    async fn message(&self, keys: &Keys, nsm: &Arc<dyn Nsm>) -> Result<Zeroizing<Vec<u8>>, Error> {
        let json = keys.to_json().map_err(Error::Encode)?;
        let recipients = match &self.form {
            Form::Sealed(recipients) => recipients,
            Form::DangerPlaintext => return Ok(json),
        };
        let report_data = report_data::tagged(EXPORT_TAG, &json);
        let fields = AttestFields { user_data: Some(report_data.to_vec()), ..AttestFields::default() };
        let document = OwnDocument::ask(nsm, fields, self.nsm_deadline).await?;
        Ok(age::seal(recipients, Some(document.as_bytes()), &json)?.into())
    }

    async fn attempt(&self, message: &[u8]) -> Result<(), Error> {
        let mut stream = self.to.connect(self.deadline).await?;
        delivery::send(&mut stream, message).await.map_err(|error| match error {
            delivery::Error::Io(source) => Error::Exchange { to: self.to.clone(), source },
            source => Error::NotTaken { to: self.to.clone(), source },
        })
    }

    fn timed_out(&self) -> Error {
        Error::TimedOut { to: self.to.clone(), after: self.deadline }
    }
}
