#!/bin/sh
# Renews the golden descriptor of the public interface. Run it when something was added; never to take something away.
set -eu
cd "$(dirname "$0")/.."
.venv/bin/python -m grpc_tools.protoc -Iproto --descriptor_set_out=tests/golden/serving_v1.binpb proto/grok/serving/v1/*.proto
