#!/usr/bin/env bash
# Lint, format and types.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | sort |
    xargs clang-format --dry-run --Werror
for script in .ci/run scripts/*.sh examples/*/*.sh; do bash -n "$script"; done
