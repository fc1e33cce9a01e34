#!/usr/bin/env bash
# Environments of their own, which tests/serve and tests/servers use: under build/clients/ other
# servers' clients, under build/servers/ other servers, which see this environment's packages as
# well. What is there already is kept. With CI set it fails when one cannot be installed.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(command -v python || command -v python3)

# make FOLDER REQUIREMENTS [SEES]: SEES is a folder of packages that the environment sees beside its
# own.
make() {
    local folder=build/$1 mark
    mark=$folder/${2//[\/ ]/_}
    [ -e "$mark" ] && return
    rm -rf "$folder"
    "$python" -m venv "$folder"
    if [ -n "${3:-}" ]; then
        echo "$3" > "$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')/seen.pth"
    fi
    # shellcheck disable=SC2086 # several requirements
    if ! "$folder/bin/python" -m pip --disable-pip-version-check install --quiet $2; then
        echo "$1 does not install here; its tests will be skipped"
        rm -rf "$folder"
        return 1
    fi
    touch "$mark"
}

packages=$("$python" -c 'import site; print(site.getsitepackages()[0])')
running=()
make clients/kserve "kserve==0.21.0" & running+=($!)
make clients/tritonclient "tritonclient[http,grpc]==2.73.0" & running+=($!)
make clients/mlserver "mlserver==1.7.1" & running+=($!)
make clients/openai "openai==3.57.0" & running+=($!)
make servers/ray "ray[serve]>=2.53 python-multipart>=0.0.34" "$packages" & running+=($!)
make servers/kserve "kserve>=0.15" "$packages" & running+=($!)
failed=0
for job in "${running[@]}"; do
    wait "$job" || failed=1
done
# Elsewhere a package that has no release for this Python is no failure.
[ -z "${CI:-}" ] || exit "$failed"
