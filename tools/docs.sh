#!/usr/bin/env bash
# Builds the documentation into docs/_build/html; any warning is an error:
#     pip install -e ".[docs]"
#     tools/docs.sh
set -euo pipefail
cd "$(dirname "$0")/.."
out=docs/_build/html
rm -rf "$out"
python -m sphinx -b html -n -W --keep-going -q -d docs/_build/doctrees docs "$out"
# What is published must not tell where it was built.
if grep -rlF "$PWD" "$out"; then
    echo "the pages above hold the path $PWD" >&2
    exit 1
fi
echo "$out/index.html"
