use alloy::primitives::Address;

use crate::contracts::Reader;
use crate::write::{Artifacts, Operation, Outcome, Plan, Sender, operations};
use crate::{Error, Result};

/// What to deploy.
pub struct Deployment {
    /// Compiled contracts: `DstackApp`, `DstackKms` and `ERC1967Proxy`.
    pub artifacts: Artifacts,
    /// Who may change the KMS contract.
    pub owner: Address,
    /// An application logic that exists already; one is created without it.
    pub app_implementation: Option<Address>,
    /// Tells apart deployments that are otherwise equal.
    pub label: String,
}

/// A KMS contract and what it stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deployed {
    /// The KMS contract: its proxy.
    pub kms: Address,
    /// Its logic.
    pub kms_implementation: Address,
    /// The logic of new applications.
    pub app_implementation: Address,
}

/// Deploys the application logic, the KMS logic and the KMS proxy, one transaction each, and reads back owner, logic and
/// application logic. `run` does one operation: it shows the plan, asks, and executes.
///
/// # Errors
/// See [`Sender::plan`] and [`Sender::execute`]; [`Error::NotVisible`] when the result is not what was asked for.
pub async fn deploy<E: From<Error>>(
    sender: &mut Sender,
    deployment: &Deployment,
    run: &mut impl AsyncFnMut(&mut Sender, &Operation) -> Result<Outcome, E>,
) -> Result<Deployed, E> {
    let label = &deployment.label;
    let mut create = async |sender: &mut Sender, operation: Operation| {
        let outcome = run(sender, &operation).await?;
        outcome.created().ok_or_else(|| E::from(Error::Usage(format!("{} was not done", operation.what))))
    };
    let app_implementation = match deployment.app_implementation {
        Some(address) => address,
        None => {
            let artifact = deployment.artifacts.contract("DstackApp")?;
            create(sender, operations::deploy(&artifact, label.clone())).await?
        }
    };
    let artifact = deployment.artifacts.contract("DstackKms")?;
    let kms_implementation = create(sender, operations::deploy(&artifact, label.clone())).await?;
    let artifact = deployment.artifacts.contract("ERC1967Proxy")?;
    let proxy = operations::deploy_kms_proxy(
        &artifact,
        kms_implementation,
        deployment.owner,
        app_implementation,
        label.clone(),
    );
    let kms = create(sender, proxy).await?;
    let deployed = Deployed { kms, kms_implementation, app_implementation };
    check(sender, deployed).await?;
    Ok(deployed)
}

async fn check(sender: &Sender, deployed: Deployed) -> Result<()> {
    let view = sender.view().await?;
    let kms = Reader::new(sender.endpoints(), &view, deployed.kms);
    let (owner, logic, app_logic) =
        tokio::try_join!(kms.owner(), kms.implementation(), kms.app_implementation())?;
    // A deployment repeated after the owner changed is still the same deployment, so only the logic must be ours.
    let expected = (deployed.kms_implementation, deployed.app_implementation);
    if (logic, app_logic) != expected || owner.is_zero() {
        return Err(Error::Usage(format!(
            "{} has the logic {logic} for itself and {app_logic} for applications and the owner {owner}, expected {} and {}",
            deployed.kms, expected.0, expected.1
        )));
    }
    Ok(())
}

/// Plans and executes without asking: for local chains and tests.
///
/// # Errors
/// See [`Sender::plan`] and [`Sender::execute`].
pub async fn run_unasked(sender: &mut Sender, operation: &Operation) -> Result<Outcome> {
    sender.settle().await?;
    let plan: Plan = sender.plan(operation).await?;
    sender.execute(operation, plan).await
}
