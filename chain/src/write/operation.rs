use alloy::primitives::{Address, B256, Bytes, keccak256};
use alloy::sol_types::SolCall;

use crate::contracts::Reader;
use crate::rpc::{Endpoints, View};
use crate::{Error, Result};

/// Something to change on chain, and how to see that it is so.
#[derive(Clone, Debug)]
pub struct Operation {
    /// Name of the command, such as `add-image`.
    pub name: &'static str,
    /// What it does, in words.
    pub what: String,
    /// The contract called; none to create one.
    pub to: Option<Address>,
    /// Calldata, or the creation code with its arguments.
    pub data: Bytes,
    /// When it is done.
    pub goal: Goal,
    /// Tells apart operations that are otherwise equal and wanted more than once.
    pub label: String,
}

/// When an operation is done.
#[derive(Clone, Debug)]
pub enum Goal {
    /// When one of these holds.
    State(Vec<Check>),
    /// When this journal's account has created something with it that still has code.
    Created,
}

/// A call and the answer that shows the wanted state.
#[derive(Clone, Debug)]
pub struct Check {
    /// The condition, in words.
    pub what: String,
    at: Address,
    call: Bytes,
    expected: Bytes,
}

impl Check {
    /// `call` to the contract at `at` returns `expected`.
    pub fn new<C: SolCall>(what: impl Into<String>, at: Address, call: &C, expected: &C::Return) -> Self {
        Self {
            what: what.into(),
            at,
            call: call.abi_encode().into(),
            expected: C::abi_encode_returns(expected).into(),
        }
    }

    /// Whether it holds at the block of `view`. A contract without the function does not fulfil it.
    pub(crate) async fn holds(&self, endpoints: &Endpoints, view: &View) -> Result<bool> {
        match endpoints.call(&self.what, view, Some(self.at), None, &self.call).await {
            Ok(answer) => Ok(answer == self.expected),
            Err(Error::Reverted { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Operation {
    /// Identifies the operation among everything an account sends on a chain.
    pub(crate) fn id(&self, chain_id: u64, sender: Address) -> B256 {
        let to = self.to.unwrap_or_default();
        let label = keccak256(&self.label);
        let data = keccak256(&self.data);
        keccak256(
            [&chain_id.to_be_bytes()[..], sender.as_slice(), to.as_slice(), &label[..], &data[..]].concat(),
        )
    }

    /// Whether the wanted state is there already.
    pub(crate) async fn state_holds(&self, endpoints: &Endpoints, view: &View) -> Result<bool> {
        let Goal::State(checks) = &self.goal else {
            return Ok(false);
        };
        for check in checks {
            if check.holds(endpoints, view).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether what was created still exists.
    pub(crate) async fn exists(endpoints: &Endpoints, view: &View, created: Address) -> Result<bool> {
        Reader::new(endpoints, view, created).exists().await
    }
}

/// The operations there are. Each names the state in which it is done, so doing one twice sends nothing.
pub mod operations {
    use alloy::primitives::{Address, B256, Bytes};
    use alloy::sol_types::{SolCall, SolValue};

    use super::{Check, Goal, Operation};
    use crate::abi::{DstackApp, DstackKms, Governed, KmsInfo};
    use crate::write::Artifact;
    use crate::{Error, Result};

    /// Whether the caller said `--danger`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Danger {
        /// No: refuse what opens a door.
        Refused,
        /// Yes.
        Accepted,
    }

    /// What a new application starts with.
    #[derive(Clone, Copy, Debug)]
    pub struct NewApp {
        /// Who may change it.
        pub owner: Address,
        /// Its code can never be changed.
        pub disable_upgrades: bool,
        /// It needs a current measurement status; a Nitro enclave has none and would never be allowed.
        pub require_tcb: bool,
        /// It may run anywhere.
        pub allow_any_device: bool,
        /// First device, zero for none.
        pub device: B256,
        /// First compose hash, zero for none.
        pub compose_hash: B256,
        /// For KMS contracts of the first generation, whose factory does not know `require_tcb`.
        pub first_generation: bool,
    }

    fn set<C: SolCall, R: SolCall<Return = bool>>(
        name: &'static str,
        contract: Address,
        value: B256,
        call: &C,
        state: &R,
        wanted: bool,
    ) -> Operation {
        let what = format!("{} is {wanted} for {value}", R::SIGNATURE);
        Operation {
            name,
            what: format!("{} {value} on {contract}", C::SIGNATURE),
            to: Some(contract),
            data: call.abi_encode().into(),
            goal: Goal::State(vec![Check::new(what, contract, state, &wanted)]),
            label: String::new(),
        }
    }

    fn not_zero(what: &str, value: B256, danger: Danger) -> Result<()> {
        match value.is_zero() && danger == Danger::Refused {
            false => Ok(()),
            true => Err(Error::Danger {
                what: format!("{what} of zeros"),
                why: "an enclave in debug mode measures zero, and anybody can read its memory",
            }),
        }
    }

    /// Allows an image on a KMS contract.
    ///
    /// # Errors
    /// [`Error::Danger`] for a hash of zeros.
    pub fn add_image(kms: Address, hash: B256, danger: Danger) -> Result<Operation> {
        not_zero("an image hash", hash, danger)?;
        let state = DstackKms::allowedOsImagesCall { osImageHash: hash };
        Ok(set("add-image", kms, hash, &DstackKms::addOsImageHashCall { osImageHash: hash }, &state, true))
    }

    /// Takes an image back.
    pub fn remove_image(kms: Address, hash: B256) -> Operation {
        let state = DstackKms::allowedOsImagesCall { osImageHash: hash };
        set("remove-image", kms, hash, &DstackKms::removeOsImageHashCall { osImageHash: hash }, &state, false)
    }

    /// Allows a compose hash on an application.
    ///
    /// # Errors
    /// [`Error::Danger`] for a hash of zeros.
    pub fn add_hash(app: Address, hash: B256, danger: Danger) -> Result<Operation> {
        not_zero("a compose hash", hash, danger)?;
        let state = DstackApp::allowedComposeHashesCall { composeHash: hash };
        Ok(set("add-hash", app, hash, &DstackApp::addComposeHashCall { composeHash: hash }, &state, true))
    }

    /// Takes a compose hash back.
    pub fn remove_hash(app: Address, hash: B256) -> Operation {
        let state = DstackApp::allowedComposeHashesCall { composeHash: hash };
        set("remove-hash", app, hash, &DstackApp::removeComposeHashCall { composeHash: hash }, &state, false)
    }

    /// Allows a KMS node by its aggregated measurement.
    ///
    /// # Errors
    /// [`Error::Danger`] for a measurement of zeros.
    pub fn add_kms(kms: Address, mr: B256, danger: Danger) -> Result<Operation> {
        not_zero("a measurement", mr, danger)?;
        let state = DstackKms::kmsAllowedAggregatedMrsCall { mrAggregated: mr };
        Ok(set("add-kms", kms, mr, &DstackKms::addKmsAggregatedMrCall { mrAggregated: mr }, &state, true))
    }

    /// Takes a KMS node back.
    pub fn remove_kms(kms: Address, mr: B256) -> Operation {
        let state = DstackKms::kmsAllowedAggregatedMrsCall { mrAggregated: mr };
        set("remove-kms", kms, mr, &DstackKms::removeKmsAggregatedMrCall { mrAggregated: mr }, &state, false)
    }

    /// Allows a device to run a KMS node.
    ///
    /// # Errors
    /// [`Error::Danger`] for a device of zeros.
    pub fn add_kms_device(kms: Address, device: B256, danger: Danger) -> Result<Operation> {
        not_zero("a device id", device, danger)?;
        let state = DstackKms::kmsAllowedDeviceIdsCall { deviceId: device };
        Ok(set("add-device", kms, device, &DstackKms::addKmsDeviceCall { deviceId: device }, &state, true))
    }

    /// Takes a KMS node's device back.
    pub fn remove_kms_device(kms: Address, device: B256) -> Operation {
        let state = DstackKms::kmsAllowedDeviceIdsCall { deviceId: device };
        set("remove-device", kms, device, &DstackKms::removeKmsDeviceCall { deviceId: device }, &state, false)
    }

    /// Allows a device to run an application.
    ///
    /// # Errors
    /// [`Error::Danger`] for a device of zeros.
    pub fn add_app_device(app: Address, device: B256, danger: Danger) -> Result<Operation> {
        not_zero("a device id", device, danger)?;
        let state = DstackApp::allowedDeviceIdsCall { deviceId: device };
        Ok(set("add-device", app, device, &DstackApp::addDeviceCall { deviceId: device }, &state, true))
    }

    /// Takes an application's device back.
    pub fn remove_app_device(app: Address, device: B256) -> Operation {
        let state = DstackApp::allowedDeviceIdsCall { deviceId: device };
        set("remove-device", app, device, &DstackApp::removeDeviceCall { deviceId: device }, &state, false)
    }

    fn call<C: SolCall>(
        name: &'static str,
        what: String,
        contract: Address,
        call: &C,
        checks: Vec<Check>,
    ) -> Operation {
        Operation {
            name,
            what,
            to: Some(contract),
            data: call.abi_encode().into(),
            goal: Goal::State(checks),
            label: String::new(),
        }
    }

    /// Lets an application run on any device, or on listed ones only.
    ///
    /// # Errors
    /// [`Error::Danger`] for any device.
    pub fn allow_any_device(app: Address, allow: bool, danger: Danger) -> Result<Operation> {
        if allow && danger == Danger::Refused {
            return Err(Error::Danger {
                what: "allowing any device".to_owned(),
                why: "whoever has the image can then run the application on hardware of their own choice",
            });
        }
        let check =
            Check::new(format!("allowAnyDevice is {allow}"), app, &DstackApp::allowAnyDeviceCall {}, &allow);
        let data = DstackApp::setAllowAnyDeviceCall { allowAnyDevice: allow };
        Ok(call("allow-any-device", format!("setAllowAnyDevice({allow}) on {app}"), app, &data, vec![check]))
    }

    /// Asks for a current measurement status, or not.
    pub fn require_tcb(app: Address, required: bool) -> Operation {
        let state = DstackApp::requireTcbUpToDateCall {};
        let check = Check::new(format!("requireTcbUpToDate is {required}"), app, &state, &required);
        let data = DstackApp::setRequireTcbUpToDateCall { requireUpToDate: required };
        call("require-tcb", format!("setRequireTcbUpToDate({required}) on {app}"), app, &data, vec![check])
    }

    /// Names the gateway's application.
    pub fn set_gateway(kms: Address, app_id: &str) -> Operation {
        let state = DstackKms::gatewayAppIdCall {};
        let check = Check::new("gatewayAppId is the new one", kms, &state, &app_id.to_owned());
        let data = DstackKms::setGatewayAppIdCall { appId: app_id.to_owned() };
        call("set-gateway", format!("setGatewayAppId({app_id:?}) on {kms}"), kms, &data, vec![check])
    }

    /// Publishes what a KMS said about itself.
    pub fn set_kms_info(kms: Address, info: KmsInfo) -> Operation {
        let expected = DstackKms::kmsInfoReturn {
            k256Pubkey: info.k256Pubkey.clone(),
            caPubkey: info.caPubkey.clone(),
            quote: info.quote.clone(),
            eventlog: info.eventlog.clone(),
        };
        let check = Check::new("kmsInfo is the new one", kms, &DstackKms::kmsInfoCall {}, &expected);
        let what = format!("setKmsInfo(k256 public key {}, …) on {kms}", info.k256Pubkey);
        call("set-kms-info", what, kms, &DstackKms::setKmsInfoCall { info }, vec![check])
    }

    /// Names the logic contract that new applications get.
    pub fn set_app_implementation(kms: Address, implementation: Address) -> Operation {
        let state = DstackKms::appImplementationCall {};
        let check = Check::new("appImplementation is the new one", kms, &state, &implementation);
        let data = DstackKms::setAppImplementationCall { implementation };
        call(
            "set-app-implementation",
            format!("setAppImplementation({implementation}) on {kms}"),
            kms,
            &data,
            vec![check],
        )
    }

    /// Makes an application known that was deployed by itself.
    pub fn register_app(kms: Address, app: Address) -> Operation {
        let check =
            Check::new("the app is registered", kms, &DstackKms::registeredAppsCall { appId: app }, &true);
        let data = DstackKms::registerAppCall { appId: app };
        call("register-app", format!("registerApp({app}) on {kms}"), kms, &data, vec![check])
    }

    /// Offers the ownership of either contract to somebody; contracts of the first generations hand it over at once.
    pub fn transfer_owner(contract: Address, to: Address) -> Operation {
        let checks = vec![
            Check::new("owner is the new one", contract, &Governed::ownerCall {}, &to),
            Check::new("pendingOwner is the new one", contract, &Governed::pendingOwnerCall {}, &to),
        ];
        let data = Governed::transferOwnershipCall { newOwner: to };
        call("transfer-owner", format!("transferOwnership({to}) on {contract}"), contract, &data, checks)
    }

    /// Takes an ownership that was offered to `sender`.
    pub fn accept_owner(contract: Address, sender: Address) -> Operation {
        let check = Check::new("owner is the sender", contract, &Governed::ownerCall {}, &sender);
        let what = format!("acceptOwnership() of {contract} as {sender}");
        call("accept-owner", what, contract, &Governed::acceptOwnershipCall {}, vec![check])
    }

    /// Creates and registers an application.
    ///
    /// # Errors
    /// [`Error::Danger`] when any device may run it.
    pub fn create_app(kms: Address, app: NewApp, label: String, danger: Danger) -> Result<Operation> {
        if app.allow_any_device && danger == Danger::Refused {
            return Err(Error::Danger {
                what: "an application on any device".to_owned(),
                why: "whoever has the image can then run it on hardware of their own choice",
            });
        }
        let data = match app.first_generation {
            true => DstackKms::deployAndRegisterApp_1Call {
                initialOwner: app.owner,
                disableUpgrades: app.disable_upgrades,
                allowAnyDevice: app.allow_any_device,
                initialDeviceId: app.device,
                initialComposeHash: app.compose_hash,
            }
            .abi_encode(),
            false => DstackKms::deployAndRegisterApp_0Call {
                initialOwner: app.owner,
                disableUpgrades: app.disable_upgrades,
                requireTcbUpToDate: app.require_tcb,
                allowAnyDevice: app.allow_any_device,
                initialDeviceId: app.device,
                initialComposeHash: app.compose_hash,
            }
            .abi_encode(),
        };
        Ok(Operation {
            name: "create-app",
            what: format!("deployAndRegisterApp for owner {} on {kms}", app.owner),
            to: Some(kms),
            data: data.into(),
            goal: Goal::Created,
            label,
        })
    }

    /// Puts a logic contract on the chain.
    pub fn deploy(artifact: &Artifact, label: String) -> Operation {
        Operation {
            name: "deploy",
            what: format!("create {} ({} bytes)", artifact.name, artifact.bytecode.len()),
            to: None,
            data: artifact.bytecode.clone(),
            goal: Goal::Created,
            label,
        }
    }

    /// Puts the KMS contract's proxy on the chain and sets it up.
    pub fn deploy_kms_proxy(
        proxy: &Artifact,
        logic: Address,
        owner: Address,
        app_logic: Address,
        label: String,
    ) -> Operation {
        let set_up = DstackKms::initializeCall { initialOwner: owner, appImplementation: app_logic };
        let arguments = (logic, Bytes::from(set_up.abi_encode())).abi_encode_params();
        let data = [&proxy.bytecode[..], &arguments].concat();
        Operation {
            name: "deploy",
            what: format!("create {} for {logic}, owned by {owner}, apps by {app_logic}", proxy.name),
            to: None,
            data: data.into(),
            goal: Goal::Created,
            label,
        }
    }
}
