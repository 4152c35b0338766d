"""Builds the CUDA extension `p3d_kernels._C` with CMake where it can, and says why where it cannot.

P3D_BUILD_CUDA=1 turns a lack (no nvcc, no C++ compiler, ...) into an error, 0 skips the extension; unset, a lack is
recorded in `p3d_kernels/_build.json`, which `python -m p3d_kernels info` reads. A source that does not compile is
always an error. nvcc is $CUDACXX, or the first found in $CUDA_HOME, $CUDA_PATH, PATH and /usr/local/cuda.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
PACKAGE = "p3d_kernels"
MIN_NVCC = (12, 3)


def find_tool(name: str) -> str | None:
    """An executable by name or path: beside this Python first (a virtual environment need not be active), then PATH."""
    return shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))


def find_nvcc() -> str | None:
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [*(os.path.join(home, "bin", "nvcc") for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


@functools.cache
def lack() -> str | None:
    """Why the extension is not to be built, or None."""
    wish = os.environ.get("P3D_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SetupError(f"P3D_BUILD_CUDA: expected 0, 1 or nothing, got {wish!r}")
    if wish == "0":
        return "skipped by P3D_BUILD_CUDA=0"
    if sys.platform != "linux":
        return f"built on Linux only, this is {sys.platform}"
    nvcc = find_nvcc()
    if nvcc is None:
        looked = "CUDACXX=" + os.environ["CUDACXX"] if os.environ.get("CUDACXX") else "CUDA_HOME, PATH, /usr/local/cuda"
        return f"no nvcc found ({looked})"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or (int(release[1]), int(release[2])) < MIN_NVCC:
        return (
            f"{nvcc} is {release[0] if release else 'no nvcc'}, expected release {MIN_NVCC[0]}.{MIN_NVCC[1]} or later"
        )
    for tool in ("cmake", "ninja"):
        if find_tool(tool) is None:
            return f"no {tool} found"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed for " + sys.executable
    return None


def record_lack(package: Path, reason: str) -> None:
    """Write the record of a build without the extension, or raise if the extension was demanded."""
    if os.environ.get("P3D_BUILD_CUDA") == "1":
        raise SetupError(f"P3D_BUILD_CUDA=1, but {PACKAGE}._C cannot be built: {reason}")
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)  # of an earlier build in place
    record = {"built": False, "reason": reason}
    (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{PACKAGE}._C is left out: {reason}", file=sys.stderr)


def run_logged(command: list[str], log: Path) -> None:
    """Run a command, its output shown and appended to `log`; CalledProcessError carries the output's end."""
    tail: list[str] = []
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            tail = [*tail[-30:], line]
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command, output="".join(tail))


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        if lack() is not None:
            record_lack(ROOT / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE), lack())


class BuildExtension(build_ext):
    def run(self) -> None:
        package = ROOT / PACKAGE if self.inplace else Path(self.build_lib, PACKAGE)
        package.mkdir(parents=True, exist_ok=True)
        if lack() is not None:
            return record_lack(package, lack())
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *(find_tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_CUDA_COMPILER={find_nvcc()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={importlib.import_module('pybind11').get_cmake_dir()}",
        ]
        try:
            run_logged(configure, build / "configure.log")
        except subprocess.CalledProcessError as error:
            if os.environ.get("P3D_BUILD_CUDA") == "1":
                raise CompileError("CMake found no working set of compilers, see above") from error
            said = next((line.strip() for line in error.output.splitlines() if "error" in line.lower()), "")
            return record_lack(package, f"CMake found no working set of compilers: {said}")
        try:
            run_logged([find_tool("cmake"), "--build", str(build)], build / "ninja.log")
        except subprocess.CalledProcessError as error:
            raise CompileError(f"{PACKAGE}._C failed to compile, see above; P3D_BUILD_CUDA=0 leaves it out") from error
        module = Path(self.get_ext_filename("_C")).name
        shutil.copy2(build / module, package / module)
        shutil.copy2(build / "_build.json", package / "_build.json")


class P3DDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return lack() is None  # without the extension the wheel fits any platform


setup(
    distclass=P3DDistribution,
    ext_modules=[Extension(f"{PACKAGE}._C", sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
)
