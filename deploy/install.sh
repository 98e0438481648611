#!/bin/sh
# Installs the `grokmesh` command and what it needs to run into a new virtual environment: deploy/install.sh DIR
# EXTRA=gpu or EXTRA=tpu is for hosts with accelerators: JAX's plugin too, from a lock that holds everything.
set -eu
cd "$(dirname "$0")/.."
target=${1:?usage: [EXTRA=cpu|gpu|tpu] deploy/install.sh DIR}
case ${EXTRA:-cpu} in
    cpu) lock=requirements.lock ;;
    gpu | tpu) lock=requirements-$EXTRA.lock ;;
    *) echo "EXTRA=$EXTRA is unknown; use cpu, gpu or tpu" >&2; exit 2 ;;
esac
"${PYTHON:-python3}" -m venv "$target"
pip="$target/bin/python -m pip install --quiet --disable-pip-version-check --no-cache-dir"
$pip --require-hashes -r "$lock"
$pip --no-deps --no-build-isolation .
