#!/bin/sh
# Fails when the committed modules in proto/ are not what the .proto files generate.
set -eu
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
tools/generate_proto.sh "$fresh"
status=0
for module in $(cd "$fresh" && find . -type f); do
    if ! cmp -s "$fresh/$module" "proto/$module"; then
        echo "proto/${module#./} is not what its .proto generates; run tools/generate_proto.sh" >&2
        status=1
    fi
done
exit $status
