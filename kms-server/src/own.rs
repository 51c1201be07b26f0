//! This KMS's own evidence, and whether it may be a KMS at all (reference §6.5).

use std::sync::Arc;

use kms_protocol::report_data;
use kms_protocol::runtime_events::Moment;
use tokio::sync::OnceCell;

use crate::agent::{AgentError, GuestAgent};
use crate::attest::{self, AttestedClient, Attester, ClientEvidence};
use crate::authorise::decider::Decider;
use crate::authorise::{Purpose, Question, Refusal};
use crate::rpc::Clock;

/// Why this KMS cannot speak for itself, or may not serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent gives no evidence.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The evidence does not verify here, so it would nowhere.
    #[error("this machine's own evidence is refused: {0}")]
    Evidence(#[from] attest::Error),
    /// The authoriser refuses this KMS, or is silent.
    #[error("{}", refusal(.0))]
    Refused(Refusal),
}

/// In upstream's words.
fn refusal(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Denied { reason } => format!("KMS is not allowed: {reason}"),
        Refusal::Unavailable(text) => format!("Failed to call self KMS auth check: {text}"),
    }
}

/// What this KMS can say about itself.
pub(crate) struct Own {
    pub(crate) agent: GuestAgent,
    pub(crate) attester: Arc<Attester>,
    pub(crate) clock: Clock,
    /// Whether the authoriser has to agree before anything is released.
    pub(crate) enforce: bool,
    identity: OnceCell<Question>,
}

impl Own {
    pub(crate) fn new(agent: GuestAgent, attester: Arc<Attester>, clock: Clock, enforce: bool) -> Self {
        Self { agent, attester, clock, enforce, identity: OnceCell::new() }
    }

    /// Evidence of this machine over `report_data`, verified as a client's would be.
    pub(crate) async fn evidence(&self, report_data: [u8; 64]) -> Result<(Vec<u8>, ClientEvidence), Error> {
        let own = self.agent.attest(&report_data).await?;
        let evidence = self.attester.evidence(own.attestation, report_data, (self.clock)()).await?;
        Ok((own.encoded, evidence))
    }

    /// Evidence for the certificate of the key in `spki_der`, encoded.
    pub(crate) async fn for_certificate(&self, spki_der: &[u8]) -> Result<Vec<u8>, Error> {
        self.evidence(report_data::ratls_cert(spki_der)).await.map(|(encoded, _)| encoded)
    }

    /// Asks the authoriser about this KMS, unless the settings say not to. What it is is found out once; a
    /// remote authoriser's yes holds for a few seconds.
    pub(crate) async fn ensure_allowed(&self, decider: &Decider) -> Result<(), Error> {
        if !self.enforce {
            return Ok(());
        }
        let question = self
            .identity
            .get_or_try_init(|| async {
                let (_, evidence) = self.evidence(report_data::LOCAL).await?;
                Ok::<_, Error>(question(Purpose::Kms, &evidence.into_client("", Moment::Now)?))
            })
            .await?;
        decider.decide_about_self(question.clone()).await.map(|_| ()).map_err(Error::Refused)
    }
}

/// What an authoriser is asked about that client.
pub(crate) fn question(purpose: Purpose, client: &AttestedClient) -> Question {
    Question {
        purpose,
        boot_info: client.boot_info.clone(),
        registers: client.registers.clone(),
        evidence: Some(client.evidence),
    }
}
