#!/usr/bin/env bash
# Compiles the CUDA kernels, warnings as errors, and loads the result on this torch; needs nvcc, no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" >/dev/null; then
    echo "no nvcc: the CUDA sources are not compiled"
    exit 0
fi
wheels=build/cuda-wheel
rm -rf "$wheels" && mkdir -p "$wheels"
# The build's own requirements bring the cuBLASLt header that a toolkit may lack.
FT_HANDLER_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0" \
    python -m pip --disable-pip-version-check wheel --quiet . --no-deps --wheel-dir "$wheels"
# One binary for both: what was built with CUDA must load where there is none.
python -m zipfile -e "$wheels"/*.whl "$wheels/unpacked"
cd "$wheels/unpacked"
python - <<'PYTHON'
import ft_handler

path = ft_handler.load_library()
assert "cuda-wheel" in str(path), path
build = ft_handler.build_info()
assert build.get("cuda_archs"), build
print("loaded", path, build)
PYTHON
