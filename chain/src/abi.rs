//! The contracts' interface: functions, events and errors, as the reference lists them.
//!
//! Nothing here is taken from a compiler run. The selectors and topics are computed from these declarations and
//! compared with the published values in the tests, so a slip of the hand cannot reach a chain.

use alloy::sol;

sol! {
    /// Who asks: the tuple both contracts are given, in the order the ABI fixes.
    #[derive(Debug, PartialEq, Eq)]
    struct AppBootInfo {
        address appId;
        bytes32 composeHash;
        address instanceId;
        bytes32 deviceId;
        bytes32 mrAggregated;
        bytes32 mrSystem;
        bytes32 osImageHash;
        string tcbStatus;
        string[] advisoryIds;
    }

    /// What a KMS publishes about itself.
    #[derive(Debug, PartialEq, Eq)]
    struct KmsInfo {
        bytes k256Pubkey;
        bytes caPubkey;
        bytes quote;
        bytes eventlog;
    }

    /// The KMS contract, behind its UUPS proxy.
    #[derive(Debug, PartialEq, Eq)]
    interface DstackKms {
        function initialize(address initialOwner, address appImplementation) external;
        function isAppAllowed(AppBootInfo calldata bootInfo) external view returns (bool isAllowed, string memory reason);
        function isKmsAllowed(AppBootInfo calldata bootInfo) external view returns (bool isAllowed, string memory reason);
        function registerApp(address appId) external;
        function deployAndRegisterApp(address initialOwner, bool disableUpgrades, bool requireTcbUpToDate, bool allowAnyDevice, bytes32 initialDeviceId, bytes32 initialComposeHash) external returns (address appId);
        function deployAndRegisterApp(address initialOwner, bool disableUpgrades, bool allowAnyDevice, bytes32 initialDeviceId, bytes32 initialComposeHash) external returns (address appId);
        function addOsImageHash(bytes32 osImageHash) external;
        function removeOsImageHash(bytes32 osImageHash) external;
        function addKmsAggregatedMr(bytes32 mrAggregated) external;
        function removeKmsAggregatedMr(bytes32 mrAggregated) external;
        function addKmsDevice(bytes32 deviceId) external;
        function removeKmsDevice(bytes32 deviceId) external;
        function setGatewayAppId(string calldata appId) external;
        function setAppImplementation(address implementation) external;
        function setKmsInfo(KmsInfo calldata info) external;
        function setKmsQuote(bytes calldata quote) external;
        function setKmsEventlog(bytes calldata eventlog) external;
        function kmsInfo() external view returns (bytes memory k256Pubkey, bytes memory caPubkey, bytes memory quote, bytes memory eventlog);
        function gatewayAppId() external view returns (string memory);
        function registeredApps(address appId) external view returns (bool);
        function kmsAllowedAggregatedMrs(bytes32 mrAggregated) external view returns (bool);
        function kmsAllowedDeviceIds(bytes32 deviceId) external view returns (bool);
        function allowedOsImages(bytes32 osImageHash) external view returns (bool);
        function appImplementation() external view returns (address);

        event AppRegistered(address appId);
        event AppDeployedViaFactory(address indexed appId, address indexed deployer);
        event AppImplementationSet(address implementation);
        event OsImageHashAdded(bytes32 osImageHash);
        event OsImageHashRemoved(bytes32 osImageHash);
        event KmsAggregatedMrAdded(bytes32 mrAggregated);
        event KmsAggregatedMrRemoved(bytes32 mrAggregated);
        event KmsDeviceAdded(bytes32 deviceId);
        event KmsDeviceRemoved(bytes32 deviceId);
        event GatewayAppIdSet(string gatewayAppId);
        event KmsInfoSet(bytes k256Pubkey);
    }

    /// An application's contract, behind its UUPS proxy; the proxy's address is the application id.
    #[derive(Debug, PartialEq, Eq)]
    interface DstackApp {
        function initialize(address initialOwner, bool disableUpgrades, bool allowAnyDevice, bytes32 initialDeviceId, bytes32 initialComposeHash) external;
        function initialize(address initialOwner, bool disableUpgrades, bool requireTcbUpToDate, bool allowAnyDevice, bytes32 initialDeviceId, bytes32 initialComposeHash) external;
        function isAppAllowed(AppBootInfo calldata bootInfo) external view returns (bool isAllowed, string memory reason);
        function addComposeHash(bytes32 composeHash) external;
        function removeComposeHash(bytes32 composeHash) external;
        function addDevice(bytes32 deviceId) external;
        function removeDevice(bytes32 deviceId) external;
        function setAllowAnyDevice(bool allowAnyDevice) external;
        function setRequireTcbUpToDate(bool requireUpToDate) external;
        function disableUpgrades() external;
        function version() external view returns (uint256);
        function allowedComposeHashes(bytes32 composeHash) external view returns (bool);
        function allowAnyDevice() external view returns (bool);
        function allowedDeviceIds(bytes32 deviceId) external view returns (bool);
        function requireTcbUpToDate() external view returns (bool);

        event ComposeHashAdded(bytes32 composeHash);
        event ComposeHashRemoved(bytes32 composeHash);
        event DeviceAdded(bytes32 deviceId);
        event DeviceRemoved(bytes32 deviceId);
        event AllowAnyDeviceSet(bool allowAny);
        event RequireTcbUpToDateSet(bool requireUpToDate);
        event UpgradesDisabled();
    }

    /// What both contracts share: ownership, upgrades, interface detection, and what they revert with.
    #[derive(Debug, PartialEq, Eq)]
    interface Governed {
        function owner() external view returns (address);
        function transferOwnership(address newOwner) external;
        function renounceOwnership() external;
        function pendingOwner() external view returns (address);
        function acceptOwnership() external;
        function supportsInterface(bytes4 interfaceId) external view returns (bool);
        function upgradeToAndCall(address implementation, bytes calldata data) external payable;
        function proxiableUUID() external view returns (bytes32);
        function UPGRADE_INTERFACE_VERSION() external view returns (string memory);

        event OwnershipTransferStarted(address indexed previousOwner, address indexed newOwner);
        event OwnershipTransferred(address indexed previousOwner, address indexed newOwner);
        event PolicyChanged(address indexed actor, bytes32 indexed policy, bytes32 indexed value, bool enabled);
        event Upgraded(address indexed implementation);

        error InvalidInitialization();
        error OwnableInvalidOwner(address owner);
        error OwnableUnauthorizedAccount(address account);
        error ERC1967InvalidImplementation(address implementation);
        error UUPSUnauthorizedCallContext();
        error UUPSUnsupportedProxiableUUID(bytes32 slot);
    }
}

/// ERC-165 id of the decision function; equal to its selector.
pub const APP_AUTH_INTERFACE: [u8; 4] = [0x1e, 0x07, 0x91, 0x98];
/// ERC-165 id of the four management functions of an application contract.
pub const APP_MANAGEMENT_INTERFACE: [u8; 4] = [0x8f, 0xd3, 0x75, 0x27];
/// The proxy's slot that names its logic contract (ERC-1967).
pub const IMPLEMENTATION_SLOT: alloy::primitives::B256 =
    alloy::primitives::b256!("0x360894a13ba1a3210667c828492db98dca3e2076cc3735a920a3ca505d382bbc");

#[cfg(test)]
mod tests {
    use alloy::primitives::{B256, b256};
    use alloy::sol_types::{SolCall, SolEvent};

    use super::*;
    use DstackApp as App;
    use DstackKms as Kms;

    #[test]
    fn selectors_are_the_published_ones() {
        let published: &[(&str, [u8; 4])] = &[
            ("485cc955", Kms::initializeCall::SELECTOR),
            ("1e079198", Kms::isAppAllowedCall::SELECTOR),
            ("e067ec9d", Kms::isKmsAllowedCall::SELECTOR),
            ("17a1d80f", Kms::registerAppCall::SELECTOR),
            ("9cb9c31f", Kms::deployAndRegisterApp_0Call::SELECTOR),
            ("8618169d", Kms::deployAndRegisterApp_1Call::SELECTOR),
            ("06a3ae96", Kms::addOsImageHashCall::SELECTOR),
            ("9425bac6", Kms::removeOsImageHashCall::SELECTOR),
            ("3e32d346", Kms::addKmsAggregatedMrCall::SELECTOR),
            ("2adee48d", Kms::removeKmsAggregatedMrCall::SELECTOR),
            ("4d5922a1", Kms::addKmsDeviceCall::SELECTOR),
            ("9e6f3114", Kms::removeKmsDeviceCall::SELECTOR),
            ("3971db27", Kms::setGatewayAppIdCall::SELECTOR),
            ("3ceaaa11", Kms::setAppImplementationCall::SELECTOR),
            ("7d025352", Kms::setKmsInfoCall::SELECTOR),
            ("18c1ecb2", Kms::setKmsQuoteCall::SELECTOR),
            ("736ede7a", Kms::setKmsEventlogCall::SELECTOR),
            ("09177063", Kms::kmsInfoCall::SELECTOR),
            ("95f51931", Kms::gatewayAppIdCall::SELECTOR),
            ("a6c4cce9", Kms::registeredAppsCall::SELECTOR),
            ("f6fe4f40", Kms::kmsAllowedAggregatedMrsCall::SELECTOR),
            ("13eb9770", Kms::kmsAllowedDeviceIdsCall::SELECTOR),
            ("9a4e1d18", Kms::allowedOsImagesCall::SELECTOR),
            ("25a992da", Kms::appImplementationCall::SELECTOR),
            ("187515ca", App::initialize_0Call::SELECTOR),
            ("9ed28193", App::initialize_1Call::SELECTOR),
            ("1e079198", App::isAppAllowedCall::SELECTOR),
            ("dfc77223", App::addComposeHashCall::SELECTOR),
            ("67b3f22c", App::removeComposeHashCall::SELECTOR),
            ("2a819728", App::addDeviceCall::SELECTOR),
            ("1d266200", App::removeDeviceCall::SELECTOR),
            ("7c4beeb8", App::setAllowAnyDeviceCall::SELECTOR),
            ("6e4c7422", App::setRequireTcbUpToDateCall::SELECTOR),
            ("ec669036", App::disableUpgradesCall::SELECTOR),
            ("54fd4d50", App::versionCall::SELECTOR),
            ("2f6622e5", App::allowedComposeHashesCall::SELECTOR),
            ("3440a16a", App::allowAnyDeviceCall::SELECTOR),
            ("bf8b211b", App::allowedDeviceIdsCall::SELECTOR),
            ("0aa58c83", App::requireTcbUpToDateCall::SELECTOR),
            ("8da5cb5b", Governed::ownerCall::SELECTOR),
            ("f2fde38b", Governed::transferOwnershipCall::SELECTOR),
            ("715018a6", Governed::renounceOwnershipCall::SELECTOR),
            ("e30c3978", Governed::pendingOwnerCall::SELECTOR),
            ("79ba5097", Governed::acceptOwnershipCall::SELECTOR),
            ("01ffc9a7", Governed::supportsInterfaceCall::SELECTOR),
            ("4f1ef286", Governed::upgradeToAndCallCall::SELECTOR),
            ("52d1902d", Governed::proxiableUUIDCall::SELECTOR),
            ("ad3cb1cc", Governed::UPGRADE_INTERFACE_VERSIONCall::SELECTOR),
        ];
        for (expected, ours) in published {
            assert_eq!(hex::encode(ours), *expected);
        }
    }

    #[test]
    fn topics_are_the_published_ones() {
        #[rustfmt::skip]
        let published: &[(&str, B256)] = &[
            ("0d540ad8f39e07d19909687352b9fa017405d93c91a6760981fbae9cf28bfef7", Kms::AppRegistered::SIGNATURE_HASH),
            ("fd86d7f6962eba3b7a3bf9129c06c0b2f885e1c61ef2c9f0dbb856be0deefdee", Kms::AppDeployedViaFactory::SIGNATURE_HASH),
            ("08bb433f12b5fd81d2d5e0deeb3b4d28371781ddbd80e9d053e7468d2b1aa82d", Kms::AppImplementationSet::SIGNATURE_HASH),
            ("4911843506849c85a5ca6e6e2c01eed2d3ab86baba619517a2aad9d5ab2aeff2", Kms::OsImageHashAdded::SIGNATURE_HASH),
            ("99b3cee95daf3138d0c982299cd0264f5b7a61aa629b42b92f3ec8966aa7f6fe", Kms::OsImageHashRemoved::SIGNATURE_HASH),
            ("68615a0b92795750b3d180ff73429e1291d225e449eee954a567b91104fd9837", Kms::KmsAggregatedMrAdded::SIGNATURE_HASH),
            ("54cd662e41eec7ddf0f32f034b2533e481b471dd3ea978222d609ec8fffb1bb0", Kms::KmsAggregatedMrRemoved::SIGNATURE_HASH),
            ("f2b290637b1193e12eb38ab32b986303639b1687cc2cd1e25f993e6eae2f4041", Kms::KmsDeviceAdded::SIGNATURE_HASH),
            ("1a9888a45e3df8b7e6bb3090747d598d2a0d78e61388161a90799f54df8f4434", Kms::KmsDeviceRemoved::SIGNATURE_HASH),
            ("5b2b64f770ea5266055ebd3ebf205ef06cbfa738e62684edf0e28356e34acf06", Kms::GatewayAppIdSet::SIGNATURE_HASH),
            ("77cdad119a452bbd96c45635758fc4af8a6bde3deaccf3fada634ddf9a162706", Kms::KmsInfoSet::SIGNATURE_HASH),
            ("fecb34306dd9d8b785b54d65489d06afc8822a0893ddacedff40c50a4942d0af", App::ComposeHashAdded::SIGNATURE_HASH),
            ("755b79bd4b0eeab344d032284a99003b2ddc018b646752ac72d681593a6e8947", App::ComposeHashRemoved::SIGNATURE_HASH),
            ("67fc71ab96fe3fa3c6f78e9a00e635d591b7333ce611c0380bc577aac702243b", App::DeviceAdded::SIGNATURE_HASH),
            ("e0862975ac517b0478d308012afabc4bc37c23874a18144d7f2dfb852ff95c2c", App::DeviceRemoved::SIGNATURE_HASH),
            ("bb2cdb6c7b362202d40373f87bc4788301cca658f91711ac1662e1ad2cba4a20", App::AllowAnyDeviceSet::SIGNATURE_HASH),
            ("afae60561b2481a349b45b3a47357f70eef6ae67e5b6e1749d74de7f19a25aa1", App::RequireTcbUpToDateSet::SIGNATURE_HASH),
            ("0e5daa943fcd7e7182d0e893d180695c2ea9f6f1b4a1c5432faf14cf17b774e8", App::UpgradesDisabled::SIGNATURE_HASH),
            ("341d3bc64e32172fc5bcf27b0f7f69dc5adc19af64b7aa1dee361e5883c32375", Governed::PolicyChanged::SIGNATURE_HASH),
        ];
        for (expected, ours) in published {
            assert_eq!(hex::encode(ours), *expected);
        }
    }

    #[test]
    fn interface_ids_follow_from_the_selectors() {
        let management = [
            App::addComposeHashCall::SELECTOR,
            App::removeComposeHashCall::SELECTOR,
            App::addDeviceCall::SELECTOR,
            App::removeDeviceCall::SELECTOR,
        ];
        let xor = management.into_iter().fold(0, |all, it| all ^ u32::from_be_bytes(it));
        assert_eq!(xor.to_be_bytes(), APP_MANAGEMENT_INTERFACE);
        assert_eq!(App::isAppAllowedCall::SELECTOR, APP_AUTH_INTERFACE);
    }

    /// The published words for a captured Nitro boot info; 388 bytes.
    #[test]
    fn calldata_is_the_captured_one() {
        let image = b256!("0x7f985dffdbbe255e104a483961a9e2344bf9476bca077727eeb0ad88fbcd3326");
        let who = AppBootInfo {
            appId: [0x11; 20].into(),
            composeHash: image,
            instanceId: [0; 20].into(),
            deviceId: b256!("0xde7d1b721a1e0632b7cf04edf5032c8ecffa9f9a08492152b926f1a5a7e765d7"),
            mrAggregated: image,
            mrSystem: image,
            osImageHash: image,
            tcbStatus: String::new(),
            advisoryIds: Vec::new(),
        };
        let calldata = Kms::isAppAllowedCall { bootInfo: who }.abi_encode();
        let hash = "7f985dffdbbe255e104a483961a9e2344bf9476bca077727eeb0ad88fbcd3326";
        let expected = [
            "1e079198",
            &word("20"),
            &word(&"11".repeat(20)),
            hash,
            &word("0"),
            "de7d1b721a1e0632b7cf04edf5032c8ecffa9f9a08492152b926f1a5a7e765d7",
            hash,
            hash,
            hash,
            &word("120"),
            &word("140"),
            &word("0"),
            &word("0"),
        ]
        .concat();
        assert_eq!(hex::encode(&calldata), expected);
        assert_eq!(calldata.len(), 388);

        let answer =
            [word("0"), word("40"), word("12"), format!("{:0<64}", "417070206e6f742072656769737465726564")]
                .concat();
        let answer =
            Kms::isAppAllowedCall::abi_decode_returns_validate(&hex::decode(answer).unwrap()).unwrap();
        assert_eq!((answer.isAllowed, answer.reason.as_str()), (false, "App not registered"));
    }

    fn word(hex: &str) -> String {
        format!("{hex:0>64}")
    }
}
