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

need pip3 python3-pip
keep "$cache" "python-$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')-$python_sdk" \
  python3 -m pip install --quiet --disable-pip-version-check "$python_sdk" --target

need npm nodejs npm
keep "$cache" "node-${node_sdk##*@}" \
  npm install --silent --ignore-scripts --no-audit --no-fund "$node_sdk" "$node_peer" --prefix

echo "$cache"
