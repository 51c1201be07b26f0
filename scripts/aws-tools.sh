#!/usr/bin/env bash
# Installs moto, an implementation of AWS's interfaces that the tests run on this machine, and the AWS CLI from PyPI into a
# cache directory, and prints it. Asking again is cheap: what is there stays.
#
# Where PyPI cannot be reached, the script says so and ends well; the tests then say that they were skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

moto=moto==5.2.1
cli=awscli==1.45.11
# Its server's own requirements bring tools for services that no test uses.
server=(flask==3.1.3 flask-cors==6.0.2)
cache="${XDG_CACHE_HOME:-$HOME/.cache}/keyferry/aws"

need pip3 python3-pip
python=python-$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
keep "$cache" "moto-${moto##*=}-$python" \
  python3 -m pip install --quiet --disable-pip-version-check "$moto" "${server[@]}" --target
keep "$cache" "awscli-${cli##*=}-$python" python3 -m pip install --quiet --disable-pip-version-check "$cli" --target

echo "$cache"
