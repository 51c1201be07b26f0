// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

/// Forwards everything to the logic contract named in the ERC-1967 slot.
contract ERC1967Proxy {
    event Upgraded(address indexed implementation);

    error ERC1967InvalidImplementation(address implementation);

    constructor(address implementation, bytes memory data) payable {
        if (implementation.code.length == 0) revert ERC1967InvalidImplementation(implementation);
        assembly {
            sstore(0x360894a13ba1a3210667c828492db98dca3e2076cc3735a920a3ca505d382bbc, implementation)
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

    fallback() external payable {
        assembly {
            let logic := sload(0x360894a13ba1a3210667c828492db98dca3e2076cc3735a920a3ca505d382bbc)
            calldatacopy(0, 0, calldatasize())
            let done := delegatecall(gas(), logic, 0, calldatasize(), 0, 0)
            returndatacopy(0, 0, returndatasize())
            switch done
            case 0 { revert(0, returndatasize()) }
            default { return(0, returndatasize()) }
        }
    }
}
