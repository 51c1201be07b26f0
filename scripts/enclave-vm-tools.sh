#!/usr/bin/env bash
# Prepares what `keyferry enclave run` and the boot tests need: QEMU, its firmware, vhost-device-vsock, and a kernel for
# images (bzImage) where one lies beside the project; otherwise eif-builder/kernel/build.sh makes one. Prints the
# directory that they are found in. Asking again is cheap: what is there stays.
#
#   scripts/enclave-vm-tools.sh [--without-install]
#
# With --without-install no package is installed and nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

install=true
case "${1:-}" in
  "") ;;
  --without-install) install=false ;;
  *)
    echo "usage: $0 [--without-install]" >&2
    exit 2
    ;;
esac

vsock_version=0.3.0
cache="${XDG_CACHE_HOME:-$HOME/.cache}/keyferry/enclave-vm"
packed=../shared/tools/enclave-vm/qemu-system-x86_64.xz
kernel=../shared/tools/enclave-vm/bzImage
mkdir -p "$cache/bin"

# Moves the finished file into place, so that a run that is cut short leaves nothing half done.
unpack_qemu() {
  local unfinished="$cache/qemu-system-x86_64.$$"
  xz --decompress --stdout "$packed" >"$unfinished"
  chmod +x "$unfinished"
  mv "$unfinished" "$cache/qemu-system-x86_64"
}

# What the unpacked QEMU is linked with, and its firmware.
install_libraries() {
  local package missing=()
  for package in libcbor0.8 libfdt1 libgnutls30 libglib2.0-0 zlib1g qemu-system-data seabios; do
    if ! dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed'; then
      missing+=("$package")
    fi
  done
  if [ "${#missing[@]}" -gt 0 ]; then
    as_root apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive as_root apt-get install -y -qq "${missing[@]}" >&2
  fi
}

if [ -f "$packed" ]; then
  if $install; then
    need xz xz-utils
    install_libraries
  fi
  if [ ! -x "$cache/qemu-system-x86_64" ] || [ "$packed" -nt "$cache/qemu-system-x86_64" ]; then
    echo "unpacking QEMU" >&2
    unpack_qemu
  fi
  "$cache/qemu-system-x86_64" -version >&2
elif $install; then
  # Whether the distribution's QEMU is able to do it is for `keyferry enclave run` to say.
  need qemu-system-x86_64 qemu-system-x86
fi

if [ ! -x "$cache/bin/vhost-device-vsock" ] && ! command -v vhost-device-vsock >/dev/null && $install; then
  need_rust
  echo "building vhost-device-vsock $vsock_version" >&2
  cargo install --locked --quiet --root "$cache" vhost-device-vsock --version "$vsock_version" >&2
fi

if [ -f "$kernel" ] && { [ ! -f "$cache/bzImage" ] || [ "$kernel" -nt "$cache/bzImage" ]; }; then
  cp "$kernel" "$cache/bzImage.$$"
  mv "$cache/bzImage.$$" "$cache/bzImage"
fi

echo "$cache"
