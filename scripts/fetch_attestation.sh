#!/usr/bin/env bash
# Fetches an attestation document from an enclave on a Nitro host, with the variables and the command line of upstream's
# script of this name. The image is the one of the project that scripts/get_keys.sh made in this directory: the document
# comes with the keys that it exports, and is verified before it is written.
#
#   HOST=<address> KEY_PATH=key.pem scripts/fetch_attestation.sh
#
# LOCAL_BIN is the file for the document (./nitro_attestation.bin), LOCAL_HEX one for its hex form. PROJECT is another
# project's folder, and IDENTITY what opens its export.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

HOST=${HOST:-${1:-}}
if [ -z "$HOST" ] && [ -f deployment.json ]; then
  HOST=$(sed -n 's/.*"public_ip": *"\([^"]*\)".*/\1/p' deployment.json)
fi
if [ -z "$HOST" ]; then
  echo "usage: HOST=<address> $0" >&2
  exit 2
fi
if [ -z "${PROJECT:-}" ]; then
  projects=(.keyferry/get-keys/*/)
  PROJECT=${projects[0]%/}
  if [ "${#projects[@]}" -ne 1 ] || [ ! -f "$PROJECT/keyferry.toml" ]; then
    echo "error: no project, or several, in .keyferry/get-keys" >&2
    echo "hint: scripts/get_keys.sh makes one; PROJECT=<folder> chooses one" >&2
    exit 2
  fi
fi
binary=${LOCAL_BIN:-$PWD/nitro_attestation.bin}
arguments=(--project "$PROJECT" --identity "${IDENTITY:-$PROJECT/operator.txt}" --host "$HOST"
  --ssh-key "${KEY_PATH:-$PWD/nitro-enclave-key.pem}" --ssh-user "${SSH_USER:-ec2-user}" --evidence "$binary")
[ -z "${HOST_KEY:-}" ] || arguments+=(--host-key "$HOST_KEY")
[ -z "${SSH_PORT:-}" ] || arguments+=(--ssh-port "$SSH_PORT")
[ -z "${PROXY_OPENS:-}" ] || arguments+=(--open "$PROXY_OPENS")
[ -z "${NSM_ROOT:-}" ] || arguments+=(--nsm-root "$NSM_ROOT")

if [ -z "${KEYFERRY_HOST_PROXY:-}" ]; then KEYFERRY_HOST_PROXY=$("$root/scripts/static-agent.sh" host-proxy); fi
export KEYFERRY_HOST_PROXY
if [ -z "${KEYFERRY:-}" ]; then
  (cd "$root" && cargo build --quiet --locked --release --package cli)
  KEYFERRY=$(realpath "${CARGO_TARGET_DIR:-$root/target}")/release/keyferry
fi
"$KEYFERRY" get-keys "${arguments[@]}"
if [ -n "${LOCAL_HEX:-}" ]; then od -An -v -tx1 "$binary" | tr -d ' \n' >"$LOCAL_HEX"; fi
echo "Saved attestation to $binary (size: $(stat -c%s "$binary") bytes)"
