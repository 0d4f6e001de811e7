#!/bin/bash
# Builds the container image and runs it for real: `agent` in a container forwards
# from a node_exporter to `gateway` in another, and says goodbye when it is stopped;
# then it is scraped through `proxy`. Leaves the image in dist/promferry-image.tar, for
# `podman load` or `docker load`.
#
# Needs root and Debian's podman, which it installs. Containers, images and networks
# of this machine are neither used nor touched: all of it happens in namespaces and a
# directory of its own, which end with it. As another user, see docker/Dockerfile.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "image.sh: $*" >&2
  exit 1
}

# program VARIABLE NAME...: the path of a real program, as the Go tests find it.
program() {
  local name
  if [ -n "${!1:-}" ]; then
    echo "${!1}"
    return
  fi
  for name in ".tools/bin/$2" "${@:2}"; do
    command -v "$name" && return
  done
  fail "no $2 found: run make tools, or set $1 to its path"
}

# Outside: build, prepare, enter the namespaces, clean up.
if [ "${1:-}" != --inside ]; then
  [ "$(id -u)" = 0 ] || fail "needs root; to build an image as another user, see docker/Dockerfile"
  missing=()
  for need in podman:podman runc:runc netavark:/usr/lib/podman/netavark iproute2:ip \
    ca-certificates:/etc/ssl/certs/ca-certificates.crt; do
    [ -e "${need#*:}" ] || command -v "${need#*:}" >/dev/null || missing+=("${need%%:*}")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || fail "missing: ${missing[*]}"
    echo "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  fi
  env -u MAKEFLAGS -u MAKELEVEL make --silent build tools

  work=$(mktemp -d "${TMPDIR:-/tmp}/promferry-image.XXXXXX")
  cgroup=$(basename "$work")
  # shellcheck disable=SC2317 # reached by the trap
  cleanup() {
    [ -z "${inside:-}" ] || kill -KILL "$inside" 2>/dev/null || true
    { wait; } 2>/dev/null
    find /sys/fs/cgroup -depth -type d -path "*/$cgroup*" -exec rmdir {} + 2>/dev/null || true
    rm -rf "$work"
  }
  trap cleanup EXIT
  trap 'exit 1' HUP INT TERM
  # With the namespace of processes all of them end, whatever happens inside.
  unshare --net --pid --fork --kill-child --mount-proc \
    bash docker/image.sh --inside "$work" "$cgroup" \
    "$(program NODE_EXPORTER_BIN node_exporter prometheus-node-exporter)" &
  inside=$!
  status=0
  wait "$inside" || status=$?
  inside=
  exit "$status"
fi

work=$2 cgroup=$3 node_exporter=$4
image=localhost/promferry

# What podman keeps outside of the directories that it is told.
for d in /var/lib/containers /run/containers; do
  mkdir -p "$d"
  mount -t tmpfs tmpfs "$d"
done
# Not the machine's own settings. vfs works on every file system; the limits and the
# runtime also where podman is itself in a container.
mkdir "$work/tmp"
cat >"$work/containers.conf" <<C
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
pids_limit = 0
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "$work/tmp"
[network]
network_backend = "netavark"
network_config_dir = "$work/networks"
C
cat >"$work/storage.conf" <<C
[storage]
driver = "vfs"
graphroot = "$work/storage"
runroot = "$work/run"
C
export CONTAINERS_CONF=$work/containers.conf CONTAINERS_STORAGE_CONF=$work/storage.conf TMPDIR=$work/tmp

check() { # check WHAT GOT WANT
  [ "$2" = "$3" ] || fail "$1 is '$2', want '$3'"
  echo "ok: $1 is '$2'"
}

eventually() { # eventually SECONDS COMMAND...
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$deadline" ] || return 1
    sleep 0.1
  done
}

series() { # series NAME: the value of the node's series in the gateway, if it is there
  {
    exec 3<>/dev/tcp/127.0.0.1/9091 || return
    printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3
    sed -n "s/^$1{instance=\"box-1\",job=\"node\"} //p" <&3
    exec 3>&-
  } 2>/dev/null
}

forwards() { [ "$(series up)" = 1 ] && [ -n "$(series node_load1)" ]; }

# Build.
mkdir -p "$work"/context/state/promferry-{agent,gateway,proxy}
chmod 0700 "$work"/context/state/*
cp promferry /etc/ssl/certs/ca-certificates.crt "$work/context/"
podman build --quiet --tag "$image" --file docker/Dockerfile \
  --build-arg VERSION="$(git describe --tags --always --dirty 2>/dev/null || echo unknown)" \
  --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" "$work/context" >/dev/null
check "the entry point" "$(podman image inspect --format '{{.Config.Entrypoint}} {{.Config.Cmd}}' "$image")" \
  "[/usr/bin/promferry] [agent]"

# Run.
run=(podman run --cgroup-parent "/$cgroup" --network host --read-only --cap-drop all --security-opt no-new-privileges)
version=$("${run[@]}" --rm "$image" --version)
case $version in
promferry,*) echo "ok: --version: ${version%%$'\n'*}" ;;
*) fail "--version prints '$version'" ;;
esac

ip link set lo up
"$node_exporter" --web.listen-address=127.0.0.1:9100 2>"$work/node_exporter.log" &
"${run[@]}" --detach --name gateway --stop-timeout 30 -v promferry-gateway:/var/lib/promferry-gateway "$image" gateway >/dev/null
"${run[@]}" --detach --name agent --stop-timeout 30 -v promferry-state:/var/lib/promferry-agent \
  -e PROMFERRY_INSTANCE=box-1 -e PROMFERRY_PUSH_INTERVAL=1s "$image" >/dev/null
if ! eventually 20 forwards; then
  podman logs agent >&2
  podman logs gateway >&2
  fail "nothing arrives in the gateway"
fi
check "up" "$(series up)" 1
echo "ok: node_load1 is $(series node_load1)"

status() { awk -v name="$1:" '$1 == name { print $2 }' "/proc/$pid/status"; }
for role in agent gateway; do
  pid=$(podman inspect --format '{{.State.Pid}}' $role)
  check "the $role's user" "$(status Uid):$(status Gid)" 65532:65532
  check "its CapBnd" "$(status CapBnd)" 0000000000000000
  check "its state directory" "$(stat -c '%u:%g %a' "/proc/$pid/root/var/lib/promferry-$role")" "65532:65532 700"
  [ -s "/proc/$pid/root/var/lib/promferry-$role/$role.pid" ] || fail "no lock file in the $role's state directory"
done
cmp "/proc/$pid/root/etc/ssl/certs/ca-certificates.crt" /etc/ssl/certs/ca-certificates.crt
check "the CA bundle" "$(grep -c 'BEGIN CERTIFICATE' "/proc/$pid/root/etc/ssl/certs/ca-certificates.crt") certificates" \
  "$(grep -c 'BEGIN CERTIFICATE' /etc/ssl/certs/ca-certificates.crt) certificates"

# Stop.
podman stop agent >/dev/null
check "the exit status after SIGTERM" "$(podman inspect --format '{{.State.ExitCode}}' agent)" 0
check "up after it" "$(series up)" 0
check "node_load1 after it" "$(series node_load1)" ""
podman stop gateway >/dev/null
check "the gateway's exit status after SIGTERM" "$(podman inspect --format '{{.State.ExitCode}}' gateway)" 0
podman rm --volumes agent gateway >/dev/null

# The proxy, and an agent that it scrapes.
scraped() { # by way of the proxy
  exec 3<>/dev/tcp/127.0.0.1/8080 || return 1
  printf 'GET http://box-1:9100/metrics HTTP/1.1\r\nHost: box-1\r\nConnection: close\r\n\r\n' >&3
  grep -q node_exporter_build_info <&3
}
"${run[@]}" --detach --name proxy --stop-timeout 30 -v promferry-proxy:/var/lib/promferry-proxy "$image" proxy >/dev/null
"${run[@]}" --detach --name agent -v promferry-state:/var/lib/promferry-agent \
  -e PROMFERRY_PROXY_URLS=http://127.0.0.1:8080 -e PROMFERRY_FQDN=box-1 -e PROMFERRY_INSTANCE=box-1 "$image" >/dev/null
if ! eventually 20 scraped 2>/dev/null; then
  podman logs proxy >&2
  podman logs agent >&2
  fail "the proxy does not scrape the agent"
fi
echo "ok: node_exporter scraped through the proxy"
podman stop agent proxy >/dev/null
check "the proxy's exit status after SIGTERM" "$(podman inspect --format '{{.State.ExitCode}}' proxy)" 0
podman rm --volumes agent proxy >/dev/null

mkdir -p dist
rm -f dist/promferry-image.tar
podman save --quiet --output dist/promferry-image.tar "$image"
echo "image: dist/promferry-image.tar, $(($(stat -c %s dist/promferry-image.tar) / 1024)) KiB"
