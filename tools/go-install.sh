#!/bin/sh
# Installs a Go program of one version as one file:
#
#   tools/go-install.sh PACKAGE VERSION FILE
#
# `go install package@version` leaves go.mod alone and is checked against the checksum
# database. It goes to a directory of its own and is moved, so that FILE is always
# whole, also when two builds run at once.
set -eu
package=$1 version=$2 file=$3

dir=$(dirname "$file")
mkdir -p "$dir"
dir=$(cd "$dir" && pwd) # GOBIN must be absolute
tmp=$(mktemp -d "$dir/install.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM

# A tool runs here, whatever the build around it is for; without cgo it needs no C compiler.
unset GOOS GOARCH
echo "installing $package@$version" >&2
try=1
until GOBIN=$tmp CGO_ENABLED=0 go install "$package@$version"; do
	if [ "$try" = 3 ]; then
		echo "$package@$version could not be installed" >&2
		exit 1
	fi
	try=$((try + 1))
	sleep 3
done
mv -f "$tmp"/* "$file"
