#!/usr/bin/env bash
# Runs the project's checks: format, lint, types, tests. Without arguments, all of them:
#     tools/check.sh
#     tools/check.sh format lint types
# Run tools/check.sh fix to reformat and to apply the lint fixes that are safe.
set -euo pipefail
cd "$(dirname "$0")/.."
places=(pytorch_quant tests tools examples setup.py)
ruff_config=(--config tools/ruff.toml)
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(format lint types tests)
for step in "${steps[@]}"; do
    echo "== $step"
    case "$step" in
        format) python -m ruff format "${ruff_config[@]}" --check "${places[@]}" ;;
        lint) python -m ruff check "${ruff_config[@]}" "${places[@]}" ;;
        types) python -m mypy ;;
        tests) python -m pytest ;;
        fix)
            python -m ruff check "${ruff_config[@]}" --fix "${places[@]}"
            python -m ruff format "${ruff_config[@]}" "${places[@]}"
            ;;
        *)
            echo "unknown step '$step'; use format, lint, types, tests or fix" >&2
            exit 2
            ;;
    esac
done
