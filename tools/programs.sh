#!/bin/sh
# Provides the real Prometheus and Pushgateway that the end-to-end tests and the
# benchmarks run:
#
#   tools/programs.sh DIR        (the Makefile passes .tools)
#
# A program that is named by its variable (PROMETHEUS_BIN, PROMTOOL_BIN,
# PUSHGATEWAY_BIN), is in DIR/bin or on the PATH already is left as it is. What is
# missing comes out of Debian's (or Ubuntu's) packages: downloaded and unpacked below
# DIR, never installed. So nothing needs root, no service is started, and
# `rm -r DIR` undoes it. apt verifies what it downloads as it always does.
#
# node_exporter is a Go module, which the Makefile installs; `tools/programs.sh DIR
# node_exporter` fetches Debian's instead, for a machine that cannot build it.
# `tools/programs.sh DIR shellcheck` is for lint, nginx for tests and benchmarks, and chromium for
# the tests that look at the web pages. A browser comes with the libraries that the machine
# has not and with a font, below DIR/chromium: some 100 MB.
set -eu
dir=$1
shift
[ $# -gt 0 ] || set -- prometheus promtool pushgateway

mkdir -p "$dir/bin"
dir=$(cd "$dir" && pwd)

fail() {
	echo "$*" >&2
	exit 1
}

# variable NAME: the environment variable that names program NAME.
variable() {
	echo "$1_BIN" | tr '[:lower:]' '[:upper:]'
}

# have NAME: it is there already.
have() {
	eval "named=\${$(variable "$1"):-}"
	if [ -n "$named" ]; then
		[ -x "$named" ] || fail "$(variable "$1")=$named is not a program"
		return 0
	fi
	[ -x "$dir/bin/$1" ] || command -v "$1" >/dev/null || command -v "prometheus-$(echo "$1" | tr _ -)" >/dev/null
}

# package NAME: the Debian package that holds it.
package() {
	case $1 in
	prometheus | promtool) echo prometheus ;;
	pushgateway) echo prometheus-pushgateway ;;
	node_exporter) echo prometheus-node-exporter ;;
	shellcheck | nginx) echo "$1" ;;
	chromium) echo chromium-headless-shell ;;
	*) fail "unknown program $1" ;;
	esac
}

missing="" packages=""
for name; do
	have "$name" && continue
	missing="$missing $name"
	p=$(package "$name")
	case " $packages " in *" $p "*) ;; *) packages="$packages $p" ;; esac
done
[ -n "$missing" ] || exit 0

for tool in apt-get dpkg-deb; do
	command -v "$tool" >/dev/null && continue
	echo "missing:$missing" >&2
	echo "They are taken from Debian's packages, and this machine has no $tool. Install them and" >&2
	echo "put them on the PATH, or name them:" >&2
	for name in $missing; do
		echo "  $(variable "$name")=/path/to/$name" >&2
	done
	exit 1
done

tmp=$(mktemp -d "$dir/programs.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM

# apt with lists, caches and lock of its own: any user may run it, and the machine's
# own state stays as it is. The machine's sources, keys and proxy settings still hold.
mkdir -p "$tmp/state/lists/partial" "$tmp/cache/archives/partial" "$tmp/download" "$tmp/root"
apt() {
	apt-get -q -o Dir::State="$tmp/state" -o Dir::State::status=/var/lib/dpkg/status \
		-o Dir::Cache="$tmp/cache" -o APT::Sandbox::User=root \
		-o Acquire::Languages=none -o Acquire::Retries=3 -o Acquire::http::Timeout=30 "$@"
}

echo "fetching$packages from Debian's packages" >&2
# A source that cannot be reached costs the rest nothing: what counts is the download.
apt update >"$tmp/log" 2>&1 || true
# fetch puts the packages into $tmp/download, for the browser with what they depend on.
fetch() {
	case $missing in
	*chromium*)
		# shellcheck disable=SC2086 # one word for each package
		apt -o Debug::NoLocking=1 -o Dir::Cache::archives="$tmp/download" install -y --download-only \
			--no-install-recommends $packages fonts-dejavu-core fontconfig-config
		;;
	*)
		# shellcheck disable=SC2086 # as above
		(cd "$tmp/download" && apt download $packages)
		;;
	esac
}
if ! fetch >>"$tmp/log" 2>&1; then
	cat "$tmp/log" >&2
	echo "could not download$packages; instead, name the programs:" >&2
	for name in $missing; do
		echo "  $(variable "$name")=/path/to/$name" >&2
	done
	exit 1
fi
for deb in "$tmp"/download/*.deb; do
	dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$tmp/root"
done

# browser makes bin/chromium, which starts the unpacked browser with the libraries and the
# fonts that were unpacked with it, and the system's for the rest.
browser() {
	rm -rf "$dir/chromium"
	mv "$tmp/root" "$dir/chromium"
	mkdir -p "$tmp/root/usr/bin"
	cat >"$dir/chromium/fonts.conf" <<-EOF
		<?xml version="1.0"?>
		<fontconfig>
		  <dir>$dir/chromium/usr/share/fonts</dir>
		  <dir>/usr/share/fonts</dir>
		  <cachedir>$dir/chromium/var/cache/fontconfig</cachedir>
		</fontconfig>
	EOF
	cat >"$tmp/root/usr/bin/chromium" <<-EOF
		#!/bin/sh
		root='$dir/chromium'
		for libs in "\$root"/lib/*-linux-gnu* "\$root"/usr/lib/*-linux-gnu* "\$root"/usr/lib/*-linux-gnu*/*/; do
			LD_LIBRARY_PATH=\${LD_LIBRARY_PATH:+\$LD_LIBRARY_PATH:}\$libs
		done
		export LD_LIBRARY_PATH FONTCONFIG_FILE="\$root/fonts.conf"
		exec "\$root/usr/lib/chromium/chromium-headless-shell" "\$@"
	EOF
	chmod +x "$tmp/root/usr/bin/chromium"
}

for name in $missing; do
	[ "$name" != chromium ] || browser
	case $name in nginx) version=-v ;; *) version=--version ;; esac
	for file in "bin/$name" "bin/prometheus-$(echo "$name" | tr _ -)" "sbin/$name"; do
		[ -f "$tmp/root/usr/$file" ] || continue
		"$tmp/root/usr/$file" "$version" >"$tmp/version" 2>&1 ||
			fail "$name does not run here: $(cat "$tmp/version")"
		mv -f "$tmp/root/usr/$file" "$dir/bin/$name"
		sed -n '1s/ (.*//; 1p' "$tmp/version" >&2
		continue 2
	done
	fail "no $name in$packages"
done
