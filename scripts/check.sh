#!/usr/bin/env bash
# Lint, format and types. Runs every check, then fails if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."
status=0
ruff check . || status=1
# The adapters' cards are not ours to reformat.
ruff format --check --exclude '*.md' . || status=1
mypy || status=1
find csrc benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | sort |
    xargs clang-format --dry-run --Werror || status=1
for script in .ci/run scripts/*.sh benchmarks/*.sh benchmarks/cuda/*.sh examples/*/*.sh; do
    bash -n "$script" || status=1
done
exit $status
