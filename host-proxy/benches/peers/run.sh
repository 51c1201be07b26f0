#!/usr/bin/env bash
# Measures the proxy beside socat, tinyproxy and a reference relay, all in one run: one core, a network namespace of
# its own, Unix sockets in place of vsock, policy and log on; then new connections once more on two cores. Needs root,
# cargo, socat and tinyproxy, and the load generator in ../shared/tools/proxy-bench. limits.py beside this file times
# what it does not.
#
#   host-proxy/benches/peers/run.sh PATH/TO/host-proxy [ROUNDS] [SETS]
#
# SETS: bulk,short,check,idle,two-cores. BENCH_TARGET names a directory where the built load generator is kept.
set -euo pipefail

program=$(realpath "${1:?usage: run.sh PATH/TO/host-proxy [ROUNDS] [SETS]}")
rounds=${2:-3}
sets=${3:-bulk,short,check,idle,two-cores}
here=$(cd "$(dirname "$0")" && pwd)
bench=$here/../../../../shared/tools/proxy-bench
if [[ ! -d $bench ]]; then
    echo "skipped: no load generator in $bench" >&2
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -m 777 "$work/run"
chmod 755 "$work"
cp -r "$bench" "$work/bench"
chmod -R u+w "$work/bench"
target=${BENCH_TARGET:-$work/target}
CARGO_TARGET_DIR=$target cargo build --release --quiet --manifest-path "$work/bench/Cargo.toml"
cc -O2 -shared -fPIC -o "$work/shim.so" "$work/bench/shim/vsock_shim.c" -ldl

peers=()
# name, role, where clients connect to
peer() {
    local connect=false
    [[ $2 == connect ]] && connect=true
    peers+=("{\"name\": \"$1\", \"role\": \"$2\", \"connect\": $connect, \"proxy\": \"$3\",
        \"cmd\": [\"$program --config $work/$1.toml\"]}")
}
for path in splice copy; do
    switch=$([[ $path == splice ]] && echo true || echo false)
    socket=$work/run/connect-$path.sock
    printf '[limits]\nsplice = %s\n[[egress]]\nlisten = ["unix:%s"]\nallow = ["127.0.0.1:12001", "127.0.0.1:443"]\n' \
        "$switch" "$socket" >"$work/ours-connect-$path.toml"
    peer "ours-connect-$path" connect "unix:$socket"
    socket=$work/run/forward-$path.sock
    printf '[limits]\nsplice = %s\n[[forward]]\nlisten = "unix:%s"\ntarget = "tcp:127.0.0.1:12001"\n' \
        "$switch" "$socket" >"$work/ours-forward-$path.toml"
    peer "ours-forward-$path" forward "unix:$socket"
done
printf '[[forward]]\nlisten = "tcp:127.0.0.1:18029"\ntarget = "unix:%s"\n' "$work/run/be.sock" >"$work/ours-ingress.toml"
peer ours-ingress ingress tcp:127.0.0.1:18029
(IFS=,; echo "{\"peers\": [${peers[*]}]}") >"$work/ours.json"

names=direct-tcp,socat-unix,seed-debian,ref-connect-splice-unix,ref-connect-copy-unix,socat-ingress
names+=,ours-connect-splice,ours-connect-copy,ours-forward-splice,ours-forward-copy,ours-ingress

# The set's rows, on these cores.
measure() {
    local cores=$1 sets=$2
    unshare -n sh -c 'ip link set lo up; sysctl -qw net.ipv4.tcp_congestion_control=reno; exec "$@"' sh \
        taskset -c "$cores" python3 "$work/bench/suite.py" --bin "$target/release/proxy-bench" --shim "$work/shim.so" \
        --run "$work/run" --rounds "$rounds" --sets "$sets" --only "$names" --extra "$work/ours.json" \
        --seconds "${SECONDS_EACH:-2.5}" --out "$work/results-$cores.jsonl" >&2
    echo "## Cores $cores"
    echo
    python3 "$work/bench/report.py" "$work/results-$cores.jsonl"
}

one=$(tr ',' '\n' <<<"$sets" | grep -vx two-cores | paste -sd, -) || one=
[[ -z $one ]] || measure 0 "$one"
[[ ,$sets, != *,two-cores,* ]] || measure 0,1 short
