"""`python -m p3d_kernels info`: versions, card, each backend or why it cannot run, and how the extension was built."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

import p3d_kernels

from . import _backends

ENVIRONMENT = ("P3D_BACKEND", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


def build_record(path: Path | None = None) -> dict:
    """How `_C` was built, as the build wrote it: `built`, `reason`, and after a build `nvcc` and `architectures`."""
    path = path or Path(__file__).with_name("_build.json")
    if not path.is_file():
        return {"built": False, "reason": "never built in this checkout; `python setup.py build_ext --inplace` does"}
    return json.loads(path.read_text())


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None where there is none."""
    kernel_module = Path("/proc/driver/nvidia/version")
    if kernel_module.is_file() and (found := re.search(r"\s(\d+\.\d+(\.\d+)?)\s", kernel_module.read_text())):
        return found[1]
    if smi := shutil.which("nvidia-smi"):
        done = subprocess.run(
            [smi, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return None


def no_card() -> str | None:
    """Why PyTorch sees no NVIDIA card, or None."""
    if torch.version.hip is not None:
        return "this PyTorch is built for AMD cards"
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU" + ("" if driver_version() else " and there is no NVIDIA driver")
    return None


def backend_lacks(device: torch.device) -> dict[str, str | None]:
    """Backend -> why it cannot run bfloat16 tensors on `device`, or None."""
    lacks = {}
    for backend in _backends.BACKENDS:
        why = _backends.why_not(backend, torch.empty(0, dtype=torch.bfloat16, device=device))
        lacks[backend] = why and why.removeprefix(f"{backend}: ")
    if device.type == "cpu":  # say what is missing on this machine rather than that a made-up tensor is on the CPU
        native = _backends.native()
        lacks["cuda"] = "; ".join(filter(None, [no_card(), native if isinstance(native, str) else None]))
        if lacks["triton"]:
            on_cpu = "on a CPU it runs in Triton's interpreter only (TRITON_INTERPRET=1)"
            lacks["triton"] = _backends.triton_missing() or f"{no_card()}; {on_cpu}"
    return lacks


def collect() -> dict:
    """Everything that `info` says, as plain values."""
    cards = []
    for index in range(0 if no_card() else torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        cards.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
                "backends": backend_lacks(torch.device("cuda", index)),
            }
        )
    native = _backends.native()
    triton = None if _backends.triton_missing() else importlib.import_module("triton").__version__
    return {
        "version": p3d_kernels.__version__,
        "path": str(Path(p3d_kernels.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "triton": triton,
        "driver": driver_version(),
        "cards": cards,
        "no_card": no_card(),
        "cpu_backends": backend_lacks(torch.device("cpu")),
        "extension": {**build_record(), "import_error": native if isinstance(native, str) else None},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def report(found: dict) -> str:
    """`collect()`'s answer for people."""
    lines = [f"p3d_kernels {found['version']}  {found['path']}"]

    def say(name: str, value: object) -> None:
        lines.append(f"  {name:<11} {value}")

    def say_backends(lacks: dict[str, str | None]) -> None:
        for backend, why in lacks.items():
            say("  " + backend, "available" if why is None else f"no: {why}")

    say("python", f"{found['python']} on {found['platform']}")
    say("torch", f"{found['torch']}, CUDA {found['torch_cuda'] or 'none'}, cuDNN {found['cudnn'] or 'none'}")
    say("triton", found["triton"] or "none")
    say("driver", found["driver"] or "none")
    extension = found["extension"]
    if extension["built"]:
        say("extension", f"nvcc {extension['nvcc']}, {', '.join(extension['architectures'])}")
        if extension["import_error"]:
            say("", f"but it does not import: {extension['import_error']}")
    else:
        say("extension", f"not built: {extension['reason']}")
    for name, value in found["environment"].items():
        say("environment", f"{name}={value}")
    for index, card in enumerate(found["cards"]):
        say(f"card {index}", f"{card['name']}, {card['memory_gib']} GiB, capability {card['capability']}")
        say_backends(card["backends"])
    if found["no_card"]:
        say("card", f"none: {found['no_card']}")
        say_backends(found["cpu_backends"])
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON, for a bug report or a script")


def main(args: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=2) if args.json else report(found))
    return 0
