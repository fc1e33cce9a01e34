#!/usr/bin/env bash
# Prometheus and promtool, for tests: Debian's package, unpacked into build/prometheus/ and not
# installed, so that no service starts. Nothing is done where both are on PATH, or there already.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v prometheus > /dev/null && command -v promtool > /dev/null && exit
[ -x build/prometheus/usr/bin/promtool ] && exit
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
fetch() { (cd "$scratch" && apt-get download -qq prometheus); }
# Lists of packages are read by root alone, and a fresh image has none.
if ! { fetch || { apt-get update -qq && fetch; }; } 2> "$scratch/why"; then
    echo "Debian's prometheus is not to be had here; its tests will be skipped"
    cat "$scratch/why"
    # Elsewhere that is no failure.
    [ -z "${CI:-}" ] || exit 1
    exit 0
fi
dpkg-deb -x "$scratch"/prometheus_*.deb "$scratch/unpacked"
rm -rf build/prometheus
mkdir -p build
mv "$scratch/unpacked" build/prometheus
