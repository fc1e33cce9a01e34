#!/usr/bin/env bash
# Builds the source distribution and a wheel from it, installs that into an environment of its own
# and loads the library. For CPUs alone: scripts/compile_cuda.sh compiles the CUDA sources.
set -euo pipefail
cd "$(dirname "$0")/.."
packages=build/packages

rm -rf "$packages" && mkdir -p "$packages"
if ! FT_HANDLER_CUDA=0 scripts/wheel.sh "$packages" >"$packages/log" 2>&1; then
    cat "$packages/log"
    exit 1
fi
python -m venv --without-pip "$packages/venv"
python -m pip --disable-pip-version-check --python "$packages/venv/bin/python" install --quiet \
    --no-index --no-deps "$packages"/*-manylinux*.whl
# torch and the rest come from the environment at hand, after the package itself.
python - "$packages" <<'PYTHON'
import sysconfig, sys
from pathlib import Path

for site in Path(sys.argv[1], "venv").glob("lib/python*/site-packages"):
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
PYTHON
"$packages/venv/bin/python" -I - <<'PYTHON'
import sys
from pathlib import Path

import ft_handler


def files(package):
    found = (path.relative_to(package) for path in package.rglob("*") if path.is_file())
    return {str(path) for path in found if path.suffix not in (".pyc", ".so")}


path = ft_handler.load_library()
assert path.is_relative_to(sys.prefix), path
installed, tree = files(Path(ft_handler.__file__).parent), files(Path("ft_handler"))
assert installed == tree, f"missing {tree - installed}, too many {installed - tree}"
print("loaded", path, ft_handler.build_info())
PYTHON
ls "$packages"/*.tar.gz "$packages"/*.whl
