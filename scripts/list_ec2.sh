#!/usr/bin/env bash
# Lists every EC2 instance of the account in REGION, us-east-1 when not set: id, name, type, state, addresses. KEYFERRY
# names the program.
set -euo pipefail

keyferry=${KEYFERRY:-keyferry}
if ! command -v "$keyferry" >/dev/null; then
  echo "error: $keyferry is not on the PATH" >&2
  echo "hint: run \`cargo build --release\` and add target/release to the PATH, or set KEYFERRY" >&2
  exit 2
fi

"$keyferry" host list --all --region "${REGION:-us-east-1}"
