#!/usr/bin/env bash
# Installs what a fresh Debian or Ubuntu with Rust lacks for building and testing. Sourced by the other scripts.
#
#   need COMMAND PACKAGE…   installs the Debian packages unless COMMAND is there
#   keep CACHE NAME COMMAND…   runs COMMAND with a new directory as its last argument, and keeps it as CACHE/NAME
set -euo pipefail

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

need() {
  local command=$1
  shift
  command -v "$command" >/dev/null && return
  if ! command -v apt-get >/dev/null; then
    echo "error: $command is missing, and this system has no apt-get to install it with" >&2
    echo "hint: install it by hand: $*" >&2
    return 1
  fi
  echo "installing $*" >&2
  as_root apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive as_root apt-get install -y -qq "$@" >&2
}

# What is there stays. Where the command fails, a registry cannot be reached: this says so and ends well.
keep() {
  local cache=$1 name=$2 unfinished
  shift 2
  if [ -d "$cache/$name" ]; then return; fi
  mkdir -p "$cache"
  unfinished=$(mktemp -d "$cache/unfinished.XXXXXX")
  if timeout 300 "$@" "$unfinished" >&2; then
    mv "$unfinished" "$cache/$name"
  else
    rm -rf "$unfinished"
    echo "skipped: $name, because its registry cannot be reached from here" >&2
  fi
}

need_rust() {
  if ! command -v cargo >/dev/null; then
    echo "error: cargo is missing" >&2
    echo "hint: install Rust from https://rustup.rs and run this again" >&2
    return 1
  fi
  # aws-lc-rs builds C and assembly.
  need cc build-essential
}

# anvil and the Solidity compiler, for what runs a chain; only from what chain/contracts names.
need_anvil() {
  need npm nodejs npm
  (cd chain/contracts && npm install --ignore-scripts --no-save --no-package-lock --no-audit --no-fund >&2)
  local anvil=("$PWD"/chain/contracts/node_modules/@foundry-rs/anvil-*/bin/anvil)
  export KEYFERRY_ANVIL=${anvil[0]}
}
