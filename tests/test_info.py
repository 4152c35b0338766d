"""`python -m p3d_kernels`: the commands, and what `info` says on machines with and without each part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import p3d_kernels
from p3d_kernels import __main__, _backends, info

ROOT = Path(p3d_kernels.__file__).parent.parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_info_json_matches_this_machine():
    done = run("-m", "p3d_kernels", "info", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"] == p3d_kernels.__version__
    assert found["torch"] == torch.__version__
    assert len(found["cards"]) == torch.cuda.device_count()
    assert bool(found["no_card"]) == (torch.cuda.device_count() == 0)
    assert (found["extension"]["import_error"] is None) == (not isinstance(_backends.native(), str))
    if found["extension"]["built"]:
        assert found["extension"]["architectures"] == ["sm_90a"]
    else:
        assert found["extension"]["reason"]


def test_without_triton_the_package_works_and_says_so(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('No module named triton')\n")
    code = (
        "import torch, p3d_kernels as p3d; from p3d_kernels import __main__\n"
        "y = p3d.ops.spatial_conv(torch.ones(1, 2, 1, 3, 3), torch.ones(4, 2, 1, 3, 3))\n"
        "assert y[0, 0, 0, 1, 1] == 18, y\n"
        "raise SystemExit(__main__.main(['info']))\n"
    )
    done = run("-c", code, PYTHONPATH=str(tmp_path), TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed" in done.stdout
    assert "aten      available" in done.stdout


def test_text_report(capsys):
    assert __main__.main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"p3d_kernels {p3d_kernels.__version__}")
    for name in ("python", "torch", "triton", "driver", "extension", *_backends.BACKENDS):
        assert f"\n  {name}" in text or f"\n    {name}" in text, f"{name} is not in\n{text}"


def test_build_record(tmp_path):
    path = tmp_path / "_build.json"
    assert info.build_record(path)["built"] is False
    assert "never built" in info.build_record(path)["reason"]
    path.write_text('{"built": false, "reason": "no nvcc found"}')
    assert info.build_record(path) == {"built": False, "reason": "no nvcc found"}


def found_on(**changes) -> str:
    """The report of this machine with some findings changed."""
    return info.report({**info.collect(), **changes})


def test_report_says_why_the_extension_is_missing():
    text = found_on(extension={"built": False, "reason": "no nvcc found (PATH)", "import_error": "gone"})
    assert "not built: no nvcc found (PATH)" in text


def test_report_of_an_extension_that_does_not_import():
    extension = {"built": True, "nvcc": "13.0.88", "architectures": ["sm_90a"], "import_error": "undefined symbol: x"}
    text = found_on(extension=extension)
    assert "nvcc 13.0.88, sm_90a" in text
    assert "does not import: undefined symbol: x" in text


def test_report_of_a_card():
    lacks = {"cuda": "compute capability (8, 0) (compiled for 9.0)", "triton": None, "aten": None}
    card = {"name": "NVIDIA A100", "capability": "8.0", "memory_gib": 79.3, "multiprocessors": 108, "backends": lacks}
    text = found_on(cards=[card], no_card=None)
    assert "card 0      NVIDIA A100, 79.3 GiB, capability 8.0" in text
    assert "cuda      no: compute capability (8, 0) (compiled for 9.0)" in text
    assert "triton    available" in text
    assert "card        none" not in text


@pytest.mark.gpu
def test_card_backends():
    (card, *_) = info.collect()["cards"]
    assert card["name"] == torch.cuda.get_device_name(0)
    assert card["backends"]["aten"] is None
    for backend in _backends.BACKENDS:
        why = _backends.why_not(backend, torch.empty(0, dtype=torch.bfloat16, device="cuda:0"))
        assert (card["backends"][backend] is None) == (why is None)


def test_help_lists_the_commands_and_imports_none(monkeypatch, capsys):
    monkeypatch.setattr(__main__.importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for command in __main__.COMMANDS:
        assert command in text


@pytest.mark.parametrize("argv", [[], ["nope"]], ids=["none", "unknown"])
def test_no_such_command(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(argv)
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo", "bench", "features"])
def test_commands_are_passed_their_arguments(monkeypatch, name):
    seen = {}
    module = types.ModuleType(name)
    module.add_arguments = lambda parser: parser.add_argument("--size", type=int)
    module.main = lambda args: seen.update(size=args.size) or 3
    monkeypatch.setitem(sys.modules, f"p3d_kernels.{name}", module)
    assert __main__.main([name, "--size", "7"]) == 3
    assert seen == {"size": 7}
