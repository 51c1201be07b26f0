#!/usr/bin/env bash
# Builds the static enclave-agent that becomes the init of an image, and prints its path. With --fast it is built in
# less time, and is larger.
#
#   scripts/static-agent.sh [--fast]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

profile=enclave
case "${1:-}" in
  "") ;;
  --fast) profile=dev ;;
  *)
    echo "usage: $0 [--fast]" >&2
    exit 2
    ;;
esac

need_rust
triple=x86_64-unknown-linux-gnu
# With --target the flags are for the program alone, not for what runs while it is built.
RUSTFLAGS='-C target-feature=+crt-static -C strip=symbols' \
  cargo build --quiet --locked --package enclave-agent --bin enclave-agent --profile "$profile" --target "$triple" >&2
target=$(realpath "${CARGO_TARGET_DIR:-target}")
echo "$target/$triple/${profile/#dev/debug}/enclave-agent"
