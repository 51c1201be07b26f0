#!/usr/bin/env bash
# Stands up the EC2 host of a Nitro Enclave in the current directory, with the variables of the dstack guides:
#
#   REGION INSTANCE_TYPE KEY_NAME KEY_PATH INSTANCE_NAME EBS_SIZE_GB
#
# Writes deployment.json. `keyferry host down` removes everything again. KEYFERRY names the program.
set -euo pipefail

keyferry=${KEYFERRY:-keyferry}
if ! command -v "$keyferry" >/dev/null; then
  echo "error: $keyferry is not on the PATH" >&2
  echo "hint: run \`cargo build --release\` and add target/release to the PATH, or set KEYFERRY" >&2
  exit 2
fi

"$keyferry" host up --yes \
  --region "${REGION:-us-east-1}" \
  --instance-type "${INSTANCE_TYPE:-c5.xlarge}" \
  --key-name "${KEY_NAME:-nitro-enclave-key}" \
  --key "${KEY_PATH:-$PWD/nitro-enclave-key.pem}" \
  --name "${INSTANCE_NAME:-nitro-enclave-host}" \
  --volume "${EBS_SIZE_GB:-20}"
"$keyferry" host setup
