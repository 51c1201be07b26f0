#!/usr/bin/env bash
# Fetches an app's keys through an enclave on a Nitro host, with the variables and the command line of the script of this
# name in dstack's deployment guide. What differs is in the README; `keyferry get-keys --help` has the rest.
#
#   HOST=<address> KMS_URL=https://kms.example.com:12001 APP_ID=<40 hex digits> KEY_PATH=key.pem scripts/get_keys.sh
#   KMS_URL=… APP_ID=… scripts/get_keys.sh --show-mrs
#
# What follows -- are more arguments of `keyferry get-keys`.
# HOST is the public_ip of ./deployment.json unless given. The host's SSH key is that of ./keyferry-host.json, HOST_KEY or
# ~/.ssh/known_hosts. KMS_ROOT_CA is the KMS's root CA (PEM). DEBUG_ENCLAVE=1 fetches the console instead of keys. For a
# KMS and an NSM that are not out there: PROXY_OPENS (HOST:PORT) and NSM_ROOT (`keyferry enclave root`).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/setup.sh
. "$root/scripts/setup.sh"

arguments=()
while [ $# -gt 0 ]; do
  argument=$1
  shift
  case $argument in
    --show-mrs) arguments+=(--show-mrs) ;;
    --) break ;;
    -*)
      echo "usage: HOST=<address> KMS_URL=<https://kms> APP_ID=<hex> $0 [--show-mrs] [-- more]" >&2
      exit 2
      ;;
    *) HOST=${HOST:-$argument} ;;
  esac
done
if [ -z "${KMS_URL:-}" ]; then
  echo "error: KMS_URL is required: the image holds it, and so its measurements depend on it" >&2
  exit 2
fi
if [ -z "${APP_ID:-}" ]; then
  APP_ID=$(od -An -N20 -tx1 /dev/urandom | tr -d ' \n')
  echo "APP_ID=$APP_ID" >&2
fi
if [ "${#arguments[@]}" -eq 0 ]; then
  if [ -z "${HOST:-}" ] && [ -f deployment.json ]; then
    HOST=$(sed -n 's/.*"public_ip": *"\([^"]*\)".*/\1/p' deployment.json)
  fi
  if [ -z "${HOST:-}" ]; then
    echo "error: no host: neither HOST nor deployment.json" >&2
    exit 2
  fi
  output=${LOCAL_JSON:-$PWD/app_keys.json}
  arguments=(--host "$HOST" --ssh-key "${KEY_PATH:-$PWD/nitro-enclave-key.pem}" --ssh-user "${SSH_USER:-ec2-user}"
    --output "$output" --force --console-log "${LOCAL_ENCLAVE_LOG:-$PWD/enclave_console.log}"
    --proxy-log "${LOCAL_NCAT_LOG:-$PWD/ncat_keys.log}")
  [ -z "${HOST_KEY:-}" ] || arguments+=(--host-key "$HOST_KEY")
  [ -z "${SSH_PORT:-}" ] || arguments+=(--ssh-port "$SSH_PORT")
  [ -z "${PROXY_OPENS:-}" ] || arguments+=(--open "$PROXY_OPENS")
  [ -z "${NSM_ROOT:-}" ] || arguments+=(--nsm-root "$NSM_ROOT")
  [ "${DEBUG_ENCLAVE:-0}" = 0 ] || arguments+=(--debug-console)
  for name in REMOTE_JSON REMOTE_EIF REMOTE_BIN; do
    [ -z "${!name:-}" ] || echo "note: $name is not used: files on the host have names of their own" >&2
  done
fi
[ -z "${KMS_ROOT_CA:-}" ] || arguments+=(--root-ca "$KMS_ROOT_CA")

if [ -z "${KEYFERRY_AGENT:-}" ]; then KEYFERRY_AGENT=$("$root/scripts/static-agent.sh"); fi
if [ -z "${KEYFERRY_HOST_PROXY:-}" ]; then KEYFERRY_HOST_PROXY=$("$root/scripts/static-agent.sh" host-proxy); fi
if [ -z "${KEYFERRY_KERNEL:-}" ]; then
  KEYFERRY_KERNEL=$("$root/scripts/enclave-vm-tools.sh" --without-install)/bzImage
fi
export KEYFERRY_AGENT KEYFERRY_HOST_PROXY KEYFERRY_KERNEL
if [ -z "${KEYFERRY:-}" ]; then
  need_rust
  (cd "$root" && cargo build --quiet --locked --release --package cli)
  KEYFERRY=$(realpath "${CARGO_TARGET_DIR:-$root/target}")/release/keyferry
fi
exec "$KEYFERRY" get-keys --kms-url "$KMS_URL" --app-id "$APP_ID" "${arguments[@]}" "$@"
