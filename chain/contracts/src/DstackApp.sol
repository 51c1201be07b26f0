// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

import {AppBootInfo, IAppAuth, Tcb} from "./AppAuth.sol";
import {Governed} from "./Governed.sol";

/// One application: which images, on which devices. A stand-in with the ABI of the dstack application contract.
contract DstackApp is Governed, IAppAuth {
    mapping(bytes32 => bool) public allowedComposeHashes; // slot 0
    bool private frozen; // slot 1, first byte
    bool public allowAnyDevice; // slot 1, second byte
    mapping(bytes32 => bool) public allowedDeviceIds; // slot 2
    bool public requireTcbUpToDate; // slot 3

    uint256 public constant version = 2;

    event AllowAnyDeviceSet(bool allowAny);
    event ComposeHashAdded(bytes32 composeHash);
    event ComposeHashRemoved(bytes32 composeHash);
    event DeviceAdded(bytes32 deviceId);
    event DeviceRemoved(bytes32 deviceId);
    event RequireTcbUpToDateSet(bool requireUpToDate);
    event UpgradesDisabled();

    function initialize(address first, bool freeze, bool anyDevice, bytes32 device, bytes32 compose) external once {
        setUp(first, freeze, anyDevice, device, compose);
    }

    function initialize(address first, bool freeze, bool tcb, bool anyDevice, bytes32 device, bytes32 compose)
        external
        once
    {
        requireTcbUpToDate = tcb;
        setUp(first, freeze, anyDevice, device, compose);
    }

    function isAppAllowed(AppBootInfo calldata who) external view returns (bool, string memory) {
        if (requireTcbUpToDate && !Tcb.isCurrent(who.tcbStatus)) return (false, "TCB status is not up to date");
        if (!allowedComposeHashes[who.composeHash]) return (false, "Compose hash not allowed");
        if (!allowAnyDevice && !allowedDeviceIds[who.deviceId]) return (false, "Device not allowed");
        return (true, "");
    }

    function addComposeHash(bytes32 composeHash) external onlyOwner {
        setComposeHash(composeHash, true);
    }

    function removeComposeHash(bytes32 composeHash) external onlyOwner {
        setComposeHash(composeHash, false);
    }

    function addDevice(bytes32 deviceId) external onlyOwner {
        setDevice(deviceId, true);
    }

    function removeDevice(bytes32 deviceId) external onlyOwner {
        setDevice(deviceId, false);
    }

    function setAllowAnyDevice(bool allow) external onlyOwner {
        allowAnyDevice = allow;
        emit AllowAnyDeviceSet(allow);
        policy("allow-any-device", bytes32(0), allow);
    }

    function setRequireTcbUpToDate(bool required) external onlyOwner {
        requireTcbUpToDate = required;
        emit RequireTcbUpToDateSet(required);
        policy("require-tcb-up-to-date", bytes32(0), required);
    }

    function disableUpgrades() external onlyOwner {
        frozen = true;
        emit UpgradesDisabled();
        policy("upgrades-disabled", bytes32(0), true);
    }

    function supportsInterface(bytes4 id) external pure override returns (bool) {
        return id == 0x01ffc9a7 || id == type(IAppAuth).interfaceId || id == 0x8fd37527;
    }

    function beforeUpgrade() internal view override {
        require(!frozen, "Upgrades are permanently disabled");
    }

    function setUp(address first, bool freeze, bool anyDevice, bytes32 device, bytes32 compose) private {
        require(first != address(0), "invalid owner address");
        (frozen, allowAnyDevice) = (freeze, anyDevice);
        if (device != 0) setDevice(device, true);
        if (compose != 0) setComposeHash(compose, true);
        giveTo(first);
    }

    function setComposeHash(bytes32 composeHash, bool allowed) private {
        allowedComposeHashes[composeHash] = allowed;
        if (allowed) emit ComposeHashAdded(composeHash);
        else emit ComposeHashRemoved(composeHash);
        policy("compose-hash", composeHash, allowed);
    }

    function setDevice(bytes32 deviceId, bool allowed) private {
        allowedDeviceIds[deviceId] = allowed;
        if (allowed) emit DeviceAdded(deviceId);
        else emit DeviceRemoved(deviceId);
        policy("device", deviceId, allowed);
    }
}
