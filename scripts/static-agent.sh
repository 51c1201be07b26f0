#!/usr/bin/env bash
# Builds the static enclave-agent that becomes the init of an image, or another program that has to run anywhere, and
# prints its path. With --fast it is built in less time, and is larger.
#
#   scripts/static-agent.sh [--fast] [enclave-agent|host-proxy]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

profile=enclave
program=enclave-agent
for argument in "$@"; do
  case $argument in
    --fast) profile=dev ;;
    enclave-agent | host-proxy) program=$argument ;;
    *)
      echo "usage: $0 [--fast] [enclave-agent|host-proxy]" >&2
      exit 2
      ;;
  esac
done
if [ "$program" = host-proxy ] && [ "$profile" = enclave ]; then profile=release; fi

need_rust
triple=x86_64-unknown-linux-gnu
# With --target the flags are for the program alone, not for what runs while it is built.
RUSTFLAGS='-C target-feature=+crt-static -C strip=symbols' \
  cargo build --quiet --locked --package "$program" --bin "$program" --profile "$profile" --target "$triple" >&2
target=$(realpath "${CARGO_TARGET_DIR:-target}")
echo "$target/$triple/${profile/#dev/debug}/$program"
