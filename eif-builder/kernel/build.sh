#!/usr/bin/env bash
# Builds the enclave kernel from the distribution's kernel source, reproducibly.
#
#   build.sh OUTPUT_FOLDER [SOURCE.tar.xz]
#
# Without a source archive, that of Debian's linux-source package is used (apt-get install linux-source-6.12).
# The same source, compiler and fragment give the same bytes: user, host, time and path are fixed.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 OUTPUT_FOLDER [SOURCE.tar.xz]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
output=$(cd "$1" && pwd)
source=${2:-/usr/src/linux-source-6.12.tar.xz}
if [ ! -r "$source" ]; then
    echo "error: no kernel source at $source" >&2
    echo "hint: apt-get install linux-source-6.12 build-essential flex bison bc libelf-dev, or name an archive" >&2
    exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar --extract --file "$source" --directory "$work" --strip-components=1

# What would otherwise come from the machine. The time has to be one that `date -d` understands: a bare number is
# not, and the built-in ramdisk would get the time of the build.
export KBUILD_BUILD_TIMESTAMP=@1 KBUILD_BUILD_USER=keyferry KBUILD_BUILD_HOST=keyferry KBUILD_BUILD_VERSION=1
export LC_ALL=C TZ=UTC SOURCE_DATE_EPOCH=1
export KCFLAGS="-ffile-prefix-map=$work=/kernel"

# A comment behind a value is ours, not Kconfig's.
sed 's/[[:space:]]*#.*//' "$here/enclave.config" >"$work/enclave.fragment"
cd "$work"
make --quiet tinyconfig
scripts/kconfig/merge_config.sh -m .config enclave.fragment >/dev/null
make --quiet olddefconfig

# An option that its dependencies switched off would be missed only when the enclave does not boot.
missing=0
while IFS= read -r line; do
    case $line in
        '') continue ;;
        *=n) grep -q "^${line%=n}=" .config && { echo "error: ${line%=n} is on" >&2; missing=1; } ;;
        *) grep -qxF "$line" .config || { echo "error: $line did not survive olddefconfig" >&2; missing=1; } ;;
    esac
done <enclave.fragment
[ "$missing" -eq 0 ]

make --quiet -j"$(nproc)" bzImage
install -m 0644 arch/x86/boot/bzImage "$output/bzImage"
install -m 0644 .config "$output/bzImage.config"
(cd "$output" && sha256sum bzImage bzImage.config)
