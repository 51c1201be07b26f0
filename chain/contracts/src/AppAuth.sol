// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

/// What a KMS knows about who asks, in the order the ABI fixes.
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

/// The one question every application contract answers. ERC-165 id 0x1e079198.
interface IAppAuth {
    function isAppAllowed(AppBootInfo calldata who) external view returns (bool isAllowed, string memory reason);
}

/// What both contracts ask of a measurement status.
library Tcb {
    bytes32 private constant UP_TO_DATE = keccak256("UpToDate");

    function isCurrent(string calldata status) internal pure returns (bool) {
        return keccak256(bytes(status)) == UP_TO_DATE;
    }
}
