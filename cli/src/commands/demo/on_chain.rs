//! The registry of the demo on a chain: anvil on this machine, the contracts, and the account that owns them.

use chain::local::{self, LocalChain, Seeded};
use chain::write::operations::{self, Danger};
use chain::write::{Operation, Outcome, run_unasked};
use chain::{B256, LOCAL_CHAIN_ID};
use command_line::{Exit, Failure};
use kms_protocol::AppId;
use rustls::pki_types::UnixTime;
use tempfile::TempDir;

use super::stage::internal;
use super::story::Story;

/// A chain with contracts and an application on it, which ends with this value.
pub(super) struct Registry {
    chain: LocalChain,
    owner: chain::write::Sender,
    seeded: Seeded,
    _journal: TempDir,
}

impl Registry {
    /// Starts the chain. The application may run on any device, and no image yet.
    pub(super) async fn start(story: &mut Story) -> Result<Self, Failure> {
        let variable = |name: &str| std::env::var_os(name);
        let anvil = local::find_anvil(variable).ok_or_else(local::not_found)?;
        let journal = tempfile::tempdir().map_err(internal)?;
        let chain = LocalChain::start(&anvil, 0, &[]).await?;
        let mut owner = local::owner(chain.url(), journal.path(), || UnixTime::now().as_secs()).await?;
        let seeded = local::seed(&mut owner, None).await?;
        story.said(
            "chain",
            &format!("anvil at {}; the KMS contract is {}", chain.url(), seeded.contracts.kms),
        );
        story.said("chain", &format!("knows the app {}, and no image", seeded.app));
        Ok(Self { chain, owner, seeded, _journal: journal })
    }

    /// The application: its id is the address of its contract.
    pub(super) fn app_id(&self) -> AppId {
        AppId::new(self.seeded.app.into_array())
    }

    /// The part of kms.toml that makes a KMS ask these contracts.
    pub(super) fn kms_settings(&self) -> String {
        format!(
            "[core.auth_api]\ntype = \"chain\"\n\
             [core.auth_api.chain]\nrpc_urls = [{:?}]\nchain_id = {LOCAL_CHAIN_ID}\nkms_contract = \"{}\"\n",
            self.chain.url(),
            self.seeded.contracts.kms,
        )
    }

    /// Allows an image, as CI does after a build: on the KMS contract, and as the application's compose hash.
    pub(super) async fn add(&mut self, image: [u8; 32], story: &mut Story) -> Result<(), Failure> {
        let Seeded { contracts, app, .. } = self.seeded;
        let image = B256::from(image);
        self.run(operations::add_image(contracts.kms, image, Danger::Refused)?, story).await?;
        self.run(operations::add_hash(app, image, Danger::Refused)?, story).await
    }

    /// Takes the image back from the KMS contract.
    pub(super) async fn remove(&mut self, image: [u8; 32], story: &mut Story) -> Result<(), Failure> {
        self.run(operations::remove_image(self.seeded.contracts.kms, image.into()), story).await
    }

    async fn run(&mut self, operation: Operation, story: &mut Story) -> Result<(), Failure> {
        let Outcome::Done { block, .. } = run_unasked(&mut self.owner, &operation).await? else {
            return Err(Failure::new(Exit::Internal, format!("{}: nothing had to be done", operation.what)));
        };
        story.said("chain", &format!("block {block}: {} {}", operation.name, operation.what));
        Ok(())
    }
}
