#!/usr/bin/env bash
# Installs the published dstack SDKs that the tests run against the guest API, unmodified, into a cache directory, and
# prints it. Asking again is cheap: what is there stays.
#
# Where a registry cannot be reached, the script says so and ends well; the tests then say that they were skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

python_sdk=dstack-sdk==0.5.4
node_sdk=@phala/dstack-sdk@0.5.8
# What that one imports without installing it: an optional peer, by its manifest.
node_peer=@noble/curves@^1.8.1
cache="${XDG_CACHE_HOME:-$HOME/.cache}/keyferry/sdk"
mkdir -p "$cache"

# install NAME COMMAND…: runs COMMAND with a new directory as its last argument, and keeps the directory if it succeeds.
install() {
  local name=$1 unfinished
  shift
  if [ -d "$cache/$name" ]; then return; fi
  unfinished=$(mktemp -d "$cache/unfinished.XXXXXX")
  if timeout 300 "$@" "$unfinished" >&2; then
    mv "$unfinished" "$cache/$name"
  else
    rm -rf "$unfinished"
    echo "skipped: $name, because its registry cannot be reached from here" >&2
  fi
}

need pip3 python3-pip
install "python-$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')-$python_sdk" \
  python3 -m pip install --quiet --disable-pip-version-check "$python_sdk" --target

need npm nodejs npm
install "node-${node_sdk##*@}" \
  npm install --silent --ignore-scripts --no-audit --no-fund "$node_sdk" "$node_peer" --prefix

echo "$cache"
