#!/usr/bin/env bash
# Shows the whole trip on this machine: a KMS, an emulated NSM, a proxy and the agent. Arguments go to `keyferry demo`;
# with --chain, contracts on a local chain decide.
# With --vm the agent is in a real enclave image in a virtual machine, and what that needs is found or built first.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

need_rust
case " $* " in *" --chain "*) need_anvil ;; esac
for argument in "$@"; do
  if [ "$argument" = --vm ]; then
    tools=$(scripts/enclave-vm-tools.sh)
    if [ -z "${KEYFERRY_KERNEL:-}" ] && [ -f "$tools/bzImage" ]; then
      export KEYFERRY_KERNEL="$tools/bzImage"
    fi
    if [ -z "${KEYFERRY_AGENT:-}" ]; then
      KEYFERRY_AGENT=$(scripts/static-agent.sh --fast)
      export KEYFERRY_AGENT
    fi
  fi
done
cargo build --locked --package cli
exec "${CARGO_TARGET_DIR:-target}/debug/keyferry" demo "$@"
