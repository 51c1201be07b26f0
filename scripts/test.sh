#!/usr/bin/env bash
# Builds the project and runs every test. With --all also what continuous integration asks for: formatting, lints,
# documentation, dependency policy and shell scripts.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

all=false
case "${1:-}" in
  "") ;;
  --all) all=true ;;
  *)
    echo "usage: $0 [--all]" >&2
    exit 2
    ;;
esac

need_rust

step() { printf '\n== %s\n' "$*" >&2; }

if $all; then
  need shellcheck shellcheck
  step "shell scripts"
  git ls-files -z '.ci/run' '*.sh' | xargs -0 shellcheck -x
  step "formatting"
  cargo fmt --all --check
  step "lints"
  cargo clippy --workspace --all-targets --locked -- -D warnings
  cargo clippy --package cli --features ledger --locked -- -D warnings
  step "documentation"
  RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
  step "dependency policy"
  command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
  cargo deny --locked check bans licenses sources
  # The advisory database is a git repository on another host. Where that host cannot be reached, say so and go on:
  # the other checks do not depend on it.
  if GIT_TERMINAL_PROMPT=0 timeout 20 git ls-remote -q https://github.com/RustSec/advisory-db HEAD >/dev/null 2>&1; then
    cargo deny --locked check advisories
  else
    echo "skipped: advisories, because the advisory database cannot be reached from here" >&2
  fi
fi

if $all; then
  step "tools of the tests that boot images"
  scripts/enclave-vm-tools.sh
  step "tools of the tests that look at disks"
  need fsck.fat dosfstools
  need sgdisk gdisk
  need mtype mtools
  step "SSH server of the tests of hosts"
  need /usr/sbin/sshd openssh-server
  need jq jq
  step "SDKs of the tests that are apps"
  scripts/sdk-tools.sh
  step "tools of the tests that ask AWS"
  scripts/aws-tools.sh
  step "playbooks"
  scripts/ansible-tools.sh
  step "tools of the tests that run a chain"
  need_anvil
fi

if $all; then
  step "browser of the tests of the setup page"
  need chromium chromium
  need chromedriver chromium-driver
fi

step "tests"
if command -v cargo-nextest >/dev/null; then
  cargo nextest run --workspace --locked
  cargo test --workspace --locked --doc
else
  cargo test --workspace --locked
fi

if $all; then
  step "clean tree"
  if [ -n "$(git status --porcelain)" ]; then
    git status --short >&2
    echo "error: the tests left files behind" >&2
    exit 1
  fi
fi
