// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

import {AppBootInfo, IAppAuth, Tcb} from "./AppAuth.sol";
import {ERC1967Proxy} from "./ERC1967Proxy.sol";
import {Governed} from "./Governed.sol";

/// The registry of images, KMS nodes and applications. A stand-in with the ABI of the dstack KMS contract.
contract DstackKms is Governed, IAppAuth {
    struct KmsInfo {
        bytes k256Pubkey;
        bytes caPubkey;
        bytes quote;
        bytes eventlog;
    }

    KmsInfo public kmsInfo; // slots 0 to 3
    string public gatewayAppId; // slot 4
    mapping(address => bool) public registeredApps; // slot 5
    mapping(bytes32 => bool) public kmsAllowedAggregatedMrs; // slot 6
    mapping(bytes32 => bool) public kmsAllowedDeviceIds; // slot 7
    mapping(bytes32 => bool) public allowedOsImages; // slot 8
    address public appImplementation; // slot 9

    event AppDeployedViaFactory(address indexed appId, address indexed deployer);
    event AppImplementationSet(address implementation);
    event AppRegistered(address appId);
    event GatewayAppIdSet(string gatewayAppId);
    event KmsAggregatedMrAdded(bytes32 mrAggregated);
    event KmsAggregatedMrRemoved(bytes32 mrAggregated);
    event KmsDeviceAdded(bytes32 deviceId);
    event KmsDeviceRemoved(bytes32 deviceId);
    event KmsInfoSet(bytes k256Pubkey);
    event OsImageHashAdded(bytes32 osImageHash);
    event OsImageHashRemoved(bytes32 osImageHash);

    function initialize(address first, address implementation) external once {
        if (first == address(0)) revert OwnableInvalidOwner(first);
        giveTo(first);
        if (implementation != address(0)) useForApps(implementation);
    }

    function isAppAllowed(AppBootInfo calldata who) external view returns (bool, string memory) {
        if (!registeredApps[who.appId]) return (false, "App not registered");
        if (!allowedOsImages[who.osImageHash]) return (false, "OS image is not allowed");
        if (who.appId.code.length == 0) return (false, "App not deployed or invalid address");
        return IAppAuth(who.appId).isAppAllowed(who);
    }

    function isKmsAllowed(AppBootInfo calldata who) external view returns (bool isAllowed, string memory reason) {
        if (!Tcb.isCurrent(who.tcbStatus)) return (false, "TCB status is not up to date");
        if (!allowedOsImages[who.osImageHash]) return (false, "OS image is not allowed");
        if (!kmsAllowedAggregatedMrs[who.mrAggregated]) return (false, "Aggregated MR not allowed");
        if (!kmsAllowedDeviceIds[who.deviceId]) return (false, "KMS is not allowed to boot on this device");
        return (true, "");
    }

    function registerApp(address appId) public {
        require(appId != address(0), "Invalid app ID");
        registeredApps[appId] = true;
        emit AppRegistered(appId);
        policy("registered-app", appId, true);
    }

    function deployAndRegisterApp(
        address first,
        bool freeze,
        bool requireTcb,
        bool anyDevice,
        bytes32 device,
        bytes32 compose
    ) public returns (address appId) {
        require(appImplementation != address(0), "DstackApp implementation not set");
        require(first != address(0), "Invalid owner address");
        bytes memory setUp = abi.encodeWithSignature(
            "initialize(address,bool,bool,bool,bytes32,bytes32)", first, freeze, requireTcb, anyDevice, device, compose
        );
        appId = address(new ERC1967Proxy(appImplementation, setUp));
        registerApp(appId);
        emit AppDeployedViaFactory(appId, msg.sender);
    }

    function deployAndRegisterApp(address first, bool freeze, bool anyDevice, bytes32 device, bytes32 compose)
        external
        returns (address)
    {
        return deployAndRegisterApp(first, freeze, false, anyDevice, device, compose);
    }

    function addOsImageHash(bytes32 osImageHash) external onlyOwner {
        allowedOsImages[osImageHash] = true;
        emit OsImageHashAdded(osImageHash);
        policy("os-image", osImageHash, true);
    }

    function removeOsImageHash(bytes32 osImageHash) external onlyOwner {
        delete allowedOsImages[osImageHash];
        emit OsImageHashRemoved(osImageHash);
        policy("os-image", osImageHash, false);
    }

    function addKmsAggregatedMr(bytes32 mrAggregated) external onlyOwner {
        kmsAllowedAggregatedMrs[mrAggregated] = true;
        emit KmsAggregatedMrAdded(mrAggregated);
        policy("kms-aggregated-mr", mrAggregated, true);
    }

    function removeKmsAggregatedMr(bytes32 mrAggregated) external onlyOwner {
        delete kmsAllowedAggregatedMrs[mrAggregated];
        emit KmsAggregatedMrRemoved(mrAggregated);
        policy("kms-aggregated-mr", mrAggregated, false);
    }

    function addKmsDevice(bytes32 deviceId) external onlyOwner {
        kmsAllowedDeviceIds[deviceId] = true;
        emit KmsDeviceAdded(deviceId);
        policy("kms-device", deviceId, true);
    }

    function removeKmsDevice(bytes32 deviceId) external onlyOwner {
        delete kmsAllowedDeviceIds[deviceId];
        emit KmsDeviceRemoved(deviceId);
        policy("kms-device", deviceId, false);
    }

    function setGatewayAppId(string calldata appId) external onlyOwner {
        gatewayAppId = appId;
        emit GatewayAppIdSet(appId);
        policy("gateway-app-id", keccak256(bytes(appId)), true);
    }

    function setAppImplementation(address implementation) external onlyOwner {
        require(implementation != address(0), "Invalid implementation address");
        useForApps(implementation);
    }

    function setKmsInfo(KmsInfo calldata info) external onlyOwner {
        kmsInfo = info;
        emit KmsInfoSet(info.k256Pubkey);
        policy("kms-info", keccak256(info.k256Pubkey), true);
    }

    function setKmsQuote(bytes calldata quote) external onlyOwner {
        kmsInfo.quote = quote;
    }

    function setKmsEventlog(bytes calldata eventlog) external onlyOwner {
        kmsInfo.eventlog = eventlog;
    }

    function supportsInterface(bytes4 id) external pure override returns (bool) {
        return id == 0x01ffc9a7 || id == type(IAppAuth).interfaceId;
    }

    function useForApps(address implementation) private {
        appImplementation = implementation;
        emit AppImplementationSet(implementation);
        policy("app-implementation", implementation, true);
    }
}
