"""Metadata, the build without and with nvcc, and the reader of ptxas's output."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import p3d_kernels

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import check_spills  # noqa: E402

# ---- metadata ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_version_is_one_literal_and_in_the_changelog(project):
    tree = ast.parse((ROOT / "p3d_kernels" / "__init__.py").read_text())
    literals = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__" and isinstance(node.value, ast.Constant)
    ]
    assert literals == [p3d_kernels.__version__]
    assert "version" in project["project"]["dynamic"]
    assert f"[{literals[0]}]" in (ROOT / "CHANGELOG.md").read_text()


def test_nothing_of_the_build_needs_torch(project):
    assert not [name for name in project["build-system"]["requires"] if re.match(r"torch|numpy|triton", name)]
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"setuptools"}
    for source in (ROOT / "csrc").iterdir():
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()), source


def test_linters_are_pinned(project):
    dev = project["project"]["optional-dependencies"]["dev"]
    for tool in ("ruff", "clang-format"):
        assert [name for name in dev if re.fullmatch(tool + r"==[\d.]+", name)], f"{tool} is not pinned"


def test_every_folder_of_modules_is_packaged(project):
    setuptools = pytest.importorskip("setuptools")
    found = setuptools.find_packages(str(ROOT), **project["tool"]["setuptools"]["packages"]["find"])
    assert {ROOT.joinpath(*name.split(".")) for name in found} == {
        path.parent for path in (ROOT / "p3d_kernels").rglob("*.py")
    }


def test_cmake_lists_every_source():
    listed = set(re.findall(r"csrc/\w+\.(?:cu|cpp)", (ROOT / "CMakeLists.txt").read_text()))
    there = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.suffix in (".cu", ".cpp")}
    assert listed == there


# ---- setup.py ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A source tree with a package of one file and no CUDA sources."""
    pytest.importorskip("setuptools")
    for name in ("setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "p3d_kernels"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0"\n')
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "p3d-kernels"\nversion = "0"\n[tool.setuptools]\npackages = ["p3d_kernels"]\n'
    )
    return tmp_path


def build(tree: Path, *command: str, **environment: str) -> tuple[int, str]:
    """Run setup.py with a torch in the way that raises on import; exit status and output."""
    poison = tree / "poison"
    poison.mkdir(exist_ok=True)
    (poison / "torch.py").write_text("raise ImportError('torch was imported at build time')\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("P3D_", "CUDA"))}
    environment = {**kept, "PYTHONPATH": str(poison), **environment}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=tree, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def record(package: Path) -> dict:
    return json.loads((package / "_build.json").read_text())


def fake_nvcc(folder: Path, says: str) -> str:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


def test_without_nvcc_the_build_records_why(tree):
    status, output = build(tree, "build", "--build-base", "out", CUDACXX="/nowhere/nvcc")
    assert status == 0, output
    found = record(tree / "out" / "lib" / "p3d_kernels")  # not lib.linux-x86_64-...: the wheel fits any platform
    assert found["built"] is False
    assert "no nvcc found" in found["reason"] and "/nowhere/nvcc" in found["reason"]
    assert found["reason"] in output


def test_in_place_build_without_nvcc_leaves_no_old_extension(tree):
    stale = tree / "p3d_kernels" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    stale.write_bytes(b"")
    status, output = build(tree, "build_ext", "--inplace", P3D_BUILD_CUDA="0")
    assert status == 0, output
    assert record(tree / "p3d_kernels") == {"built": False, "reason": "skipped by P3D_BUILD_CUDA=0"}
    assert not stale.exists()


@pytest.mark.parametrize("command", [("build",), ("build_ext", "--inplace")], ids=" ".join)
def test_a_demanded_build_without_nvcc_fails(tree, command):
    status, output = build(tree, *command, P3D_BUILD_CUDA="1", CUDACXX="/nowhere/nvcc")
    assert status != 0
    assert "P3D_BUILD_CUDA=1" in output and "no nvcc found" in output


def test_unknown_wish_fails(tree):
    status, output = build(tree, "build", P3D_BUILD_CUDA="yes")
    assert status != 0
    assert "P3D_BUILD_CUDA: expected 0, 1 or nothing, got 'yes'" in output


def test_old_nvcc_is_named(tree):
    status, output = build(tree, "build_ext", "--inplace", CUDACXX=fake_nvcc(tree, "release 11.8, V11.8.89"))
    assert status == 0, output
    assert "release 11.8, expected release 12.3 or later" in record(tree / "p3d_kernels")["reason"]


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="no cmake and ninja on PATH")
def test_compilers_that_do_not_work_are_recorded(tree):
    pytest.importorskip("pybind11")
    nvcc = fake_nvcc(tree, "release 99.0, V99.0.0")  # says so, and compiles nothing
    status, output = build(tree, "build_ext", "--inplace", CUDACXX=nvcc)
    assert status == 0, output
    assert "no working set of compilers" in record(tree / "p3d_kernels")["reason"]
    status, output = build(tree, "build_ext", "--inplace", CUDACXX=nvcc, P3D_BUILD_CUDA="1")
    assert status != 0
    assert "no working set of compilers" in output


# ---- spills -----------------------------------------------------------------------------------------------------


def ptxas(function: str, stack: int = 0, stores: int = 0, loads: int = 0, registers: int = 90) -> str:
    """What ptxas -v says of one kernel."""
    return (
        f"ptxas info    : Compiling entry function '{function}' for 'sm_90a'\n"
        f"ptxas info    : Function properties for {function}\n"
        f"    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers\n"
    )


COMPILING = "[1/3] Building CUDA object CMakeFiles/_C.dir/csrc/a.cu.o\n"
CLEAN = COMPILING + ptxas("_Z4goodPfi") + ptxas("_Z4finePfi")
SPILLING = COMPILING + ptxas("_Z4goodPfi") + ptxas("_Z3badPfi", stack=8, stores=4, loads=12)
LOSS = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...\n"


def test_clean_log_passes():
    assert check_spills.check(CLEAN, []) == []
    usage, losses = check_spills.parse(CLEAN)
    assert usage == {name: check_spills.Usage(0, 0, 0, 90) for name in ("_Z4goodPfi", "_Z4finePfi")}
    assert losses == []


def test_spill_is_named_with_its_bytes():
    (line,) = check_spills.check(SPILLING, [])
    assert "bad" in line and "4 bytes spill stores, 12 spill loads, 8 stack frame" in line


@pytest.mark.parametrize("bytes_", [(8, 0, 0), (0, 4, 0), (0, 0, 4)], ids=["stack", "stores", "loads"])
def test_each_kind_counts(bytes_):
    assert len(check_spills.check(ptxas("_Z3badPfi", *bytes_), [])) == 1


def test_listed_kernel_may_spill():
    assert check_spills.check(SPILLING, ["bad"]) == []
    assert len(check_spills.check(SPILLING, ["good"])) == 1


def test_serialised_wgmma_fails():
    (line,) = check_spills.check(CLEAN + LOSS, [])
    assert "serialized" in line


def test_the_last_build_of_a_source_counts():
    assert check_spills.check(SPILLING + LOSS + CLEAN, []) == []
    assert len(check_spills.check(CLEAN + SPILLING, [])) == 1
    other = CLEAN.replace("a.cu", "b.cu")
    assert len(check_spills.check(SPILLING + other, [])) == 1


def test_log_without_ptxas_output_fails():
    with pytest.raises(ValueError, match="no ptxas output"):
        check_spills.check("ninja: no work to do.\n", [])


@pytest.mark.parametrize(("log", "status"), [(CLEAN, 0), (SPILLING, 1), ("", 1)], ids=["clean", "spilling", "empty"])
def test_exit_status(tmp_path, log, status):
    (tmp_path / "log").write_text(log)
    command = [sys.executable, str(ROOT / "scripts" / "check_spills.py"), str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("bad" in done.stderr) == (log == SPILLING)
