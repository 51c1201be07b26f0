#!/usr/bin/env bash
# Checks the Ansible playbooks: their syntax, and ansible-lint with its strictest profile. Installs both into a cache
# directory where they are missing, and prints that directory.
#
# Where PyPI cannot be reached, the script says so and ends well; the tests then say that they were skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

core=ansible-core==2.19.14
lint=ansible-lint==26.10.1
need python3 python3
version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
tools="${XDG_CACHE_HOME:-$HOME/.cache}/keyferry/ansible/$core-$lint-$version"

if [ ! -d "$tools" ]; then
  need pip3 python3-pip
  mkdir -p "$(dirname "$tools")"
  unfinished=$(mktemp -d "$(dirname "$tools")/unfinished.XXXXXX")
  if timeout 300 python3 -m pip install --quiet --disable-pip-version-check --target "$unfinished" "$core" "$lint" >&2; then
    mv "$unfinished" "$tools"
  else
    rm -rf "$unfinished"
    echo "skipped: the playbooks, because PyPI cannot be reached from here" >&2
    exit 0
  fi
fi

export PYTHONPATH="$tools" PATH="$tools/bin:$PATH" ANSIBLE_LOCALHOST_WARNING=false ANSIBLE_INVENTORY_UNPARSED_WARNING=false
ansible-playbook --syntax-check -i deploy/ansible/hosts.example.yml deploy/ansible/kms.yml >&2
ansible-lint --offline --profile production --strict deploy/ansible >&2
echo "$tools"
