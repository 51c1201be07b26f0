// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

/// Logic behind an ERC-1967 proxy: set up once, owned with a two-step hand-over, upgraded by its owner (UUPS).
/// Its own state lives in one hashed slot, so that the contracts built on it start their variables at slot 0, which
/// is where the published layout of the dstack contracts has them.
abstract contract Governed {
    struct Roles {
        address owner;
        address next;
        bool ready;
    }

    string public constant UPGRADE_INTERFACE_VERSION = "5.0.0";
    bytes32 private constant ROLES = keccak256("keyferry.contracts.roles");
    /// ERC-1967: keccak256("eip1967.proxy.implementation") - 1.
    bytes32 private constant IMPLEMENTATION = 0x360894a13ba1a3210667c828492db98dca3e2076cc3735a920a3ca505d382bbc;
    address private immutable logic = address(this);

    event Initialized(uint64 version);
    event OwnershipTransferStarted(address indexed previousOwner, address indexed newOwner);
    event OwnershipTransferred(address indexed previousOwner, address indexed newOwner);
    event PolicyChanged(address indexed actor, bytes32 indexed policy, bytes32 indexed value, bool enabled);
    event Upgraded(address indexed implementation);

    error InvalidInitialization();
    error OwnableInvalidOwner(address owner);
    error OwnableUnauthorizedAccount(address account);
    error UUPSUnauthorizedCallContext();
    error UUPSUnsupportedProxiableUUID(bytes32 slot);

    constructor() {
        roles().ready = true; // the logic itself is never set up, only its proxies
    }

    modifier once() {
        Roles storage it = roles();
        if (it.ready) revert InvalidInitialization();
        it.ready = true;
        _;
        emit Initialized(1);
    }

    modifier onlyOwner() {
        if (msg.sender != roles().owner) revert OwnableUnauthorizedAccount(msg.sender);
        _;
    }

    function owner() external view returns (address) {
        return roles().owner;
    }

    function pendingOwner() external view returns (address) {
        return roles().next;
    }

    function transferOwnership(address newOwner) external onlyOwner {
        roles().next = newOwner;
        emit OwnershipTransferStarted(roles().owner, newOwner);
    }

    function acceptOwnership() external {
        if (msg.sender != roles().next) revert OwnableUnauthorizedAccount(msg.sender);
        giveTo(msg.sender);
    }

    function renounceOwnership() external onlyOwner {
        giveTo(address(0));
    }

    function proxiableUUID() external view returns (bytes32) {
        if (address(this) != logic) revert UUPSUnauthorizedCallContext();
        return IMPLEMENTATION;
    }

    function upgradeToAndCall(address implementation, bytes calldata data) external payable onlyOwner {
        if (address(this) == logic) revert UUPSUnauthorizedCallContext();
        beforeUpgrade();
        bytes32 slot = Governed(implementation).proxiableUUID();
        if (slot != IMPLEMENTATION) revert UUPSUnsupportedProxiableUUID(slot);
        policy("implementation-upgrade", implementation, true);
        assembly {
            sstore(IMPLEMENTATION, implementation)
        }
        emit Upgraded(implementation);
        if (data.length > 0) {
            (bool done, bytes memory answer) = implementation.delegatecall(data);
            if (!done) {
                assembly {
                    revert(add(answer, 32), mload(answer))
                }
            }
        }
    }

    function supportsInterface(bytes4 id) external pure virtual returns (bool);

    /// Throws when this contract must stay as it is.
    function beforeUpgrade() internal view virtual {}

    function giveTo(address newOwner) internal {
        Roles storage it = roles();
        emit OwnershipTransferred(it.owner, newOwner);
        it.owner = newOwner;
        it.next = address(0);
    }

    function policy(string memory name, bytes32 value, bool enabled) internal {
        emit PolicyChanged(msg.sender, keccak256(bytes(name)), value, enabled);
    }

    function policy(string memory name, address value, bool enabled) internal {
        policy(name, bytes32(uint256(uint160(value))), enabled);
    }

    function roles() private pure returns (Roles storage it) {
        bytes32 slot = ROLES;
        assembly {
            it.slot := slot
        }
    }
}
