#!/usr/bin/env bash
# Shows the whole trip on this machine: a KMS, an emulated NSM, a proxy and the agent. Arguments go to `keyferry demo`;
# with --chain, contracts on a local chain decide.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

need_rust
case " $* " in *" --chain "*) need_anvil ;; esac
cargo build --locked --package cli
exec "${CARGO_TARGET_DIR:-target}/debug/keyferry" demo "$@"
