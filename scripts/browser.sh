#!/usr/bin/env bash
# What the tests of the playground page need beside Python: Debian's Chromium with its driver, and
# axe-core, which looks for what keeps people from using a page, under build/axe/. What is there
# already is kept; without them the tests skip with a reason. With CI set it fails instead.
set -uo pipefail
cd "$(dirname "$0")/.."
axe=4.14.1
failed=0

if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq &&
            apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null ||
            failed=1
    else
        echo "chromium and chromium-driver are not here; tests of the page will be skipped"
        failed=1
    fi
fi

if [ ! -e "build/axe/axe.min.js" ]; then
    mkdir -p build/axe
    if (cd build/axe && npm pack --silent "axe-core@$axe" >/dev/null &&
        tar -xzf "axe-core-$axe.tgz" --strip-components=1 package/axe.min.js package/LICENSE &&
        rm "axe-core-$axe.tgz"); then
        echo "axe-core $axe in build/axe/"
    else
        echo "axe-core does not install here; the page is tested without it"
        failed=1
    fi
fi
[ -z "${CI:-}" ] || exit "$failed"
