#!/usr/bin/env bash
# A source distribution and, built from it, a wheel whose platform tag an index accepts.
#
#   scripts/wheel.sh [FOLDER]    default dist; needs what the `dev` extra brings
#
# auditwheel reads the tag (manylinux_2_N) off the symbol versions that the library needs, so an
# older system makes a wheel for more systems.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-dist}
unpacked=build/sdist
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' ft_handler/version.py)

python -m build --sdist --no-isolation --outdir "$folder" .
# What was compiled here before stays: sources keep their times in the archive.
mkdir -p "$unpacked"
find "$unpacked" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
tar -xzf "$folder/ft_handler-$version.tar.gz" --strip-components=1 -C "$unpacked"
python -m build --wheel --no-isolation --outdir "$unpacked/dist" "$unpacked"
# torch's own libraries are already in the process that loads this one.
auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir "$folder" \
    "$unpacked"/dist/*.whl
