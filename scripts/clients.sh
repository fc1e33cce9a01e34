#!/usr/bin/env bash
# Environments of their own for other servers' clients, under build/clients/, which
# tests/serve asks a running server with. What is there already is kept. With CI set
# it fails when one cannot be installed.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(command -v python || command -v python3)

# make NAME REQUIREMENT
make() {
    local folder=build/clients/$1
    [ -e "$folder/$2" ] && return
    rm -rf "$folder"
    "$python" -m venv "$folder"
    if ! "$folder/bin/python" -m pip --disable-pip-version-check install --quiet "$2"; then
        echo "$1 does not install here; its tests will be skipped"
        rm -rf "$folder"
        return 1
    fi
    touch "$folder/$2"
}

running=()
make kserve "kserve==0.21.0" & running+=($!)
make tritonclient "tritonclient[http]==2.73.0" & running+=($!)
make mlserver "mlserver==1.7.1" & running+=($!)
make openai "openai==3.57.0" & running+=($!)
failed=0
for job in "${running[@]}"; do
    wait "$job" || failed=1
done
# Elsewhere a client that has no release for this Python is no failure.
[ -z "${CI:-}" ] || exit "$failed"
