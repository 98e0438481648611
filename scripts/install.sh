#!/bin/sh
# Installs the `grokmesh` command and what it needs to run into a new virtual environment: scripts/install.sh DIR
set -eu
cd "$(dirname "$0")/.."
target=${1:?usage: scripts/install.sh DIR}
"${PYTHON:-python3}" -m venv "$target"
"$target/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --require-hashes -r requirements.lock
"$target/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps .
