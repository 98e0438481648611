#!/bin/sh
# Makes the Python modules of proto/ into DIR (default: proto itself, where they are committed).
#   tools/generate_proto.sh [DIR]
set -eu
cd "$(dirname "$0")/.."
out=${1:-proto}
PATH="$PWD/.venv/bin:$PATH"
python -m grpc_tools.protoc -Iproto --python_out="$out" --mypy_out="quiet:$out" proto/grok/serving/v1/*.proto
python -m grpc_tools.protoc -Iproto --grpc_python_out="$out" --mypy_grpc_out="quiet:$out" proto/grok/serving/v1/*.proto
