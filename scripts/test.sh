#!/usr/bin/env bash
# Everything CI checks. Runs every step, then fails if any failed, so that one run tells all.
set -uo pipefail
cd "$(dirname "$0")/.."

failed=()
# step NAME COMMAND...
step() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    if "$@"; then
        echo "== $name: passed in $((SECONDS - start)) s"
    else
        echo "== $name: FAILED after $((SECONDS - start)) s"
        failed+=("$name")
    fi
}

# From here the installed package is found before the tree: pytest, unlike `python -m pytest`,
# does not put the current folder on the path.
unset PYTHONPATH

step "lint, format, types" scripts/check.sh
step "other servers and their clients" scripts/environments.sh
step "Prometheus" scripts/prometheus.sh
step "browser" scripts/browser.sh
step "tests" pytest "$@"
step "address sanitizer" scripts/asan.sh
step "source distribution, wheel" scripts/check_wheel.sh
step "CUDA compile" scripts/compile_cuda.sh

if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "all steps passed"
