#!/bin/sh
# Installs the `grokmesh` command and what it needs to run into a new virtual environment: scripts/install.sh DIR
# EXTRA=gpu or EXTRA=tpu adds JAX's plugin for the accelerator, of the JAX version that is locked.
set -eu
cd "$(dirname "$0")/.."
target=${1:?usage: [EXTRA=cpu|gpu|tpu] scripts/install.sh DIR}
"${PYTHON:-python3}" -m venv "$target"
pip="$target/bin/python -m pip install --quiet --disable-pip-version-check --no-cache-dir"
$pip --require-hashes -r requirements.lock
case ${EXTRA:-cpu} in
    cpu) ;;
    gpu) $pip --constraint requirements.lock "jax[cuda13]" ;;
    tpu) $pip --constraint requirements.lock "jax[tpu]" ;;
    *) echo "EXTRA=$EXTRA is unknown; use cpu, gpu or tpu" >&2; exit 2 ;;
esac
$pip --no-deps --no-build-isolation .
