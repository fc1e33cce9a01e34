#!/usr/bin/env bash
# Runs every command of this folder's README, from the repository's root.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
trap 'torchserve --stop >/dev/null 2>&1 || true' EXIT
python scripts/run_doc.py "$here/README.md"
