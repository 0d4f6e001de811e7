#!/bin/bash
# Writes the state directories that cmd/promferry/testdata/previous.txtar reads, with the
# promferry of the previous version:
#
#   tools/previous-state.sh .tools/bin/promferry-COMMIT cmd/promferry/testdata/previous
#
# It needs root: all of it happens in namespaces of its own, in which the host has the machine
# ID of the tests and gateway.example is this host.
set -euo pipefail
if [ "${1:-}" != --inside ]; then
  exec unshare --mount --net --pid --fork --kill-child --mount-proc bash "$0" --inside "$(realpath "$1")" "$(realpath "$2")"
fi
bin=$2 out=$3

tmp=$(mktemp -d)
echo 0123456789abcdef0123456789abcdef >"$tmp/machine-id"
echo "127.0.0.1 localhost gateway.example" >"$tmp/hosts"
mount --bind "$tmp/machine-id" /etc/machine-id
mount --bind "$tmp/hosts" /etc/hosts
ip link set lo up
cd "$tmp"
rm -rf "$out"/{agent,gateway,proxy}
mkdir -p "$out"/{agent,gateway,proxy}

url=http://gateway.example:9091
export PROMFERRY_PUSH_URLS=$url
start() { # start PORT COMMAND...: a daemon, until its port takes connections
  local port=$1
  shift
  "$@" &
  daemon=$!
  until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do sleep 0.1; done
}
stop() {
  kill "$1"
  wait "$1"
}
# In a daemon's environment only what it knows.
gateway() { start 9091 env -u PROMFERRY_PUSH_URLS "$bin" gateway --web.listen-address=127.0.0.1:9091 "$@"; }
put() { # put JOB BODY STATUS: as a stranger does, and what it is answered
  exec 3<>/dev/tcp/127.0.0.1/9091
  printf 'PUT /metrics/job/%s/instance/web-1 HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s' "$1" "${#2}" "$2" >&3
  grep -q " $3 " <&3
  exec 3>&-
}
job() { "$bin" "$@" --instance=web-1 --state.dir="$out/agent"; }

# A push that a gateway refuses for good, and is set aside.
echo "refused 1" | job push --job=refused || true
gateway --state.dir="$tmp/strict" --limit.body-bytes=1B
"$bin" flush --state.dir="$out/agent" || true
stop $daemon

# Groups: what lasts, what expires, is silent, is down, and what was refused last.
gateway --state.dir="$out/gateway"
hub=$daemon
printf '# HELP lasting Lasts.\n# TYPE lasting histogram\nlasting_bucket{le="1"} 2\nlasting_bucket{le="+Inf"} 3\nlasting_sum 4.5\nlasting_count 3\n' | job push --job=lasting --label='path=/a b'
for what in "living 1 31536000" "silent 1 0.5" "down 0 31536000"; do
  read -r name up seconds <<<"$what"
  put "$name" "$(printf '%s 1\nup %s\npromferry_expires_after_seconds %s' "$name" "$up" "$seconds")"$'\n' 200
done
printf 'kept 1\n' | job push --job=kept
put kept $'not text\n' 400
# The groups that the agent put.
"$bin" agent --once --instance=web-1 --state.dir="$out/agent" --push.target=node=http://127.0.0.1:9091/-/healthy || true
"$bin" agent --once --instance=web-1 --state.dir="$out/agent" --push.target=app=http://127.0.0.1:9091/groups/job/lasting/path@base64/L2EgYg/instance/web-1/metrics
sleep 3 # The silent group is noted.
stop $hub

# What waits: in this order.
echo "first 1" | job push --job=waiting || true
echo "second 2" | job push --job=waiting --add || true
job delete --job=gone || true
"$bin" run --job=backup --instance=web-1 --state.dir="$out/agent" --push.timeout=1s -- true
"$bin" run --job=backup --instance=web-1 --state.dir="$out/agent" --push.timeout=1s -- false || true

# Clients: one that was there to the end, and one that had left.
unset PROMFERRY_PUSH_URLS
start 8080 "$bin" proxy --state.dir="$out/proxy" --web.listen-address=127.0.0.1:8080
hub=$daemon
pull() { # pull NAME PORT FLAG...
  local name=$1 port=$2
  shift 2
  start "$port" "$bin" agent --proxy-url=http://127.0.0.1:8080 --fqdn="$name.example" --instance="$name" --state.dir="$tmp/$name" \
    --web.listen-address="127.0.0.1:$port" "$@"
}
pull web-1 9101 --pull.target=node=http://127.0.0.1:9100/metrics --pull.target='app=https://127.0.0.1:8443/probe?module=x' --push.label=env=prod
one=$daemon
pull web-2 9102 --pull.target=node=http://127.0.0.1:9100/metrics
sleep 1
stop $daemon
sleep 1
stop $hub
stop $one
rm -f "$out"/*/*.pid "$out"/agent/outbox/lock "$out"/agent/jobs/lock
chmod -R go+rX "$out"
