#!/bin/bash
# A Ray cluster of several nodes on this machine, to try placement without a cloud:
#   cluster/local.sh start teacher reward trainer    # a head, and one node of each kind
#   RAY_AUTH_MODE=token rdpo run JOB.toml --set cluster.address=127.0.0.1:6379
#   cluster/local.sh stop                            # ends every Ray process of this user on this machine
# CPUS (default 2) is what each node offers, GPUS (default none) a list such as "0,1 2 3": the GPUs of each node.
set -euo pipefail

bin=${VENV:-.venv}/bin
port=6379
export RAY_AUTH_MODE=token
# The `python` of a submitted job is this environment's.
PATH=$(cd "$bin" && pwd):$PATH

start() {
    read -r -a gpus <<< "${GPUS:-}"
    (umask 077 && "$bin/ray" get-auth-token --generate > /dev/null)
    "$bin/ray" start --head --port="$port" --num-cpus=1 --num-gpus=0 --dashboard-host=127.0.0.1 \
        --node-ip-address=127.0.0.1 --disable-usage-stats
    local number=0 kind devices
    # Each in a folder of its own: every node unpacks a job's working directory anew, and removes what it finds there.
    for kind in "$@"; do
        devices=${gpus[number]:-}
        number=$((number + 1))
        CUDA_VISIBLE_DEVICES=$devices "$bin/ray" start --address="127.0.0.1:$port" --num-cpus="${CPUS:-2}" \
            --node-ip-address=127.0.0.1 --temp-dir="/tmp/ray-node-$number" --dashboard-agent-listen-port=$((52365 + number)) \
            --resources="{\"$kind\": 1}" --disable-usage-stats
    done
    "$bin/ray" status --address="127.0.0.1:$port"
}

case ${1:-} in
    start) start "${@:2}" ;;
    stop) "$bin/ray" stop ;;
    *) sed -n '2,6s/^# //p' "$0"; exit 2 ;;
esac
