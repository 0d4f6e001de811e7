#!/bin/sh
# Builds promferry as it was at a commit of this repository:
#
#   tools/previous.sh COMMIT FILE
set -eu
commit=$1 file=$2

[ ! -x "$file" ] || exit 0
git cat-file -e "$commit^{commit}" 2>/dev/null || {
	echo "this checkout has no commit $commit: get all of its history, by git fetch --unshallow" >&2
	exit 1
}
mkdir -p "$(dirname "$file")"
tmp=$(mktemp -d "$file.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM

git archive "$commit" | tar -x -C "$tmp"
(cd "$tmp" && CGO_ENABLED=0 go build -buildvcs=false -trimpath -o promferry ./cmd/promferry)
mv "$tmp/promferry" "$file"
