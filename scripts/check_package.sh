#!/usr/bin/env bash
# Build an sdist, from it a wheel without the extension, and a wheel with it; install each wheel in a fresh environment
# and import it from there. A torch that raises on import stands in the builds' way: they must not need one. The extension
# is compiled in the checkout, where `make build` finds its objects; the sdist must have the same sources.
#   scripts/check_package.sh PYTHON        an interpreter with `build` and the package's dependencies
set -euo pipefail

cd "$(dirname "$0")/.."
python=$1
work=$PWD/build/package
rm -rf "$work"
mkdir -p "$work/no-torch"
echo 'raise ImportError("torch was imported at build time")' >"$work/no-torch/torch.py"

# build NAME ARGUMENTS...: python -m build without torch; what it says goes to NAME.log, shown if it fails
build() {
    PYTHONPATH=$work/no-torch "$python" -m build "${@:2}" >"$work/$1.log" 2>&1 || { tail -50 "$work/$1.log"; exit 1; }
}
build sdist --sdist --outdir "$work/dist" .
mkdir "$work/sdist"
tar xzf "$work"/dist/*.tar.gz -C "$work/sdist" --strip-components=1
for source in csrc CMakeLists.txt setup.py pyproject.toml; do
    diff -r "$source" "$work/sdist/$source"
done
P3D_BUILD_CUDA=0 build pure --wheel --no-isolation --outdir "$work/pure" "$work/sdist"
build wheel --wheel --no-isolation --outdir "$work/dist" .
ls "$work"/pure/*-py3-none-any.whl >/dev/null # without the extension the wheel fits any platform

for wheel in "$work"/dist/*.whl "$work"/pure/*.whl; do
    rm -rf "$work/venv"
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps "$wheel"
    # torch and numpy are borrowed rather than installed twice; the fresh environment's own folder comes first
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
    echo "== $(basename "$wheel")"
    (cd "$work/venv" && bin/python -m p3d_kernels info && bin/python - "$wheel" <<'PYTHON'
import json, sys
from pathlib import Path

import torch

import p3d_kernels as p3d
from p3d_kernels import _backends, info

assert Path(p3d.__file__).is_relative_to(sys.prefix), f"imported the checkout, not the wheel: {p3d.__file__}"
native = not sys.argv[1].endswith("-any.whl")
assert info.build_record()["built"] == native, info.build_record()
assert isinstance(_backends.native(), str) != native, _backends.native()
x = torch.randn(1, 4, 3, 5, 5)
y = p3d.ops.spatial_conv(x, torch.randn(6, 4, 1, 3, 3))
assert y.shape == (1, 6, 3, 5, 5), y.shape
PYTHON
    )
done
