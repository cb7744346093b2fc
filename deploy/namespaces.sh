#!/bin/sh
# What the chart and the compose file do, on one machine without containers: two schedulers that share a cluster by an etcd,
# three nodes and a client, each in a network namespace of its own, on one bridge. As root:
#
#     deploy/namespaces.sh [WEIR]        the program; target/release/weir where none is named
#
# It leaves nothing behind. Where there is no etcd (apt-get install etcd-server), there is one scheduler, and that is said.
set -eu

weir=$(realpath "${1:-target/release/weir}")
[ -x "$weir" ] || { echo "there is no $weir: cargo build --release" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "namespaces need root" >&2; exit 1; }
folder=$(mktemp -d)
bridge=weir$$
pids=""
names="s a b c client t e"

leave() {
    code=$?
    for pid in $pids; do kill "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    for name in $names; do ip netns delete "$bridge-$name" 2>/dev/null || true; done
    ip link delete "$bridge" 2>/dev/null || true
    [ "$code" = 0 ] || tail -n 20 "$folder"/*.log >&2
    rm -rf "$folder"
}
trap leave EXIT
trap 'exit 1' INT TERM

within() { name=$1; shift; ip netns exec "$bridge-$name" "$@"; }

start() {
    name=$1; shift
    mkdir -p "$folder/$name"
    # exec: so that the program is the child, and can be killed.
    (cd "$folder/$name" && exec ip netns exec "$bridge-$name" env XDG_CONFIG_HOME="$folder/$name" "$@") >"$folder/$name.out" 2>"$folder/$name.log" &
    pids="$pids $!"
    eval "pid_$name=$!"
}

check() {
    what=$1; shift
    if "$@"; then echo "ok: $what"; else echo "not so: $what" >&2; exit 1; fi
}

until_true() {
    what=$1; shift
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ "$tries" -lt 200 ] || { echo "$what did not come" >&2; exit 1; }
        sleep 0.2
    done
    echo "ok: $what"
}

ip link add "$bridge" type bridge
ip addr add 10.99.7.254/24 dev "$bridge"
ip link set "$bridge" up
at=1
for name in $names; do
    ip netns add "$bridge-$name"
    ip link add "v$at$bridge" type veth peer name eth0 netns "$bridge-$name"
    ip link set "v$at$bridge" master "$bridge" up
    within "$name" ip addr add "10.99.7.$at/24" dev eth0
    within "$name" ip link set eth0 up
    within "$name" ip link set lo up
    at=$((at + 1))
done

key=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
schedulers=10.99.7.1
etcd=""
if command -v etcd >/dev/null; then
    etcd=http://10.99.7.7:2379
    schedulers="10.99.7.1 10.99.7.6"
    start e etcd --name e --log-level error --data-dir "$folder/etcd" --listen-client-urls "$etcd" \
        --advertise-client-urls "$etcd" --listen-peer-urls http://127.0.0.1:2380 \
        --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster e=http://127.0.0.1:2380
    etcd_is_up() { within client curl -sf "$etcd/health" | grep -q true; }
    until_true "etcd is healthy" etcd_is_up
else
    echo "SKIPPED: no etcd (apt-get install etcd-server): one scheduler instead of two" >&2
fi
scheduler() {
    start "$1" env WEIR_API_KEY="$key" WEIR_ETCD="$etcd" "$weir" --log-format json serve --no-node --no-lan \
        --http "$2:8484" --insecure-http --listen "$2:8484" --metrics "$2:9464" --state "$folder/state-$1"
}
scheduler s 10.99.7.1
[ -z "$etcd" ] || scheduler t 10.99.7.6
metrics() { within client curl -sf "http://$1:9464/metrics"; }
schedulers_are_up() { for at in $schedulers; do metrics "$at" >/dev/null || return 1; done; }
until_true "$(echo "$schedulers" | wc -w) scheduler(s) tell /metrics" schedulers_are_up

link=$(within s env XDG_CONFIG_HOME="$folder" "$weir" link --state "$folder/state-s" --uses 3)
at=2
for name in a b c; do
    start "$name" "$weir" --log-format json join "$link" --name "$name" --model null:step_us=10000,vocab=1000 \
        --metrics "10.99.7.$at:9464" --state "$folder/node-$name"
    at=$((at + 1))
done
three_nodes() { for at in $schedulers; do metrics "$at" | grep -q '^weir_nodes 3$' || return 1; done; }
until_true "three nodes are connected to each" three_nodes

serving=10.99.7.1
ask() {
    within client curl -sf -m 60 -H "authorization: Bearer $key" -H 'content-type: application/json' \
        -d "{\"model\":\"null\",\"prompt\":\"x\",\"max_tokens\":$1}" "http://$serving:8484/v1/completions"
}
answered() { ask 5 | grep -q '"completion_tokens":5[,}]'; }
check "the client is answered" answered
refused() { [ "$(within client curl -s -o /dev/null -w '%{http_code}' http://10.99.7.1:8484/v1/models)" = 401 ]; }
check "not without a key" refused

ask 300 >"$folder/long" &
long=$!
busy() {
    node=$(metrics 10.99.7.1 | sed -n 's/^weir_node_running{node="\([abc]\)".*} 1$/\1/p' | head -n 1)
    [ -n "$node" ]
}
until_true "a node is at work" busy
eval "kill -KILL \$pid_$node"
wait "$long"
check "node $node was killed, another went on" grep -q '"completion_tokens":300[,}]' "$folder/long"
failed_over() { metrics 10.99.7.1 | grep -q "^weir_failovers_total{node=\"$node\""; }
until_true "the metrics say so" failed_over
if [ -n "$etcd" ]; then
    weir_s() { within s env XDG_CONFIG_HOME="$folder" "$weir" "$@" --state "$folder/state-s"; }
    owner=$key
    key=$(weir_s key add client --budget 100000tokens/day 2>/dev/null)
    serving=10.99.7.6
    until_true "a key made at the first scheduler opens the second" answered
    kill -KILL "$pid_s"
    check "the first scheduler was killed, the second answers" answered
    key=$owner
    two_nodes() { metrics 10.99.7.6 | grep -q '^weir_nodes 2$'; }
    until_true "and has the nodes that are left" two_nodes
fi
echo "all is well"
