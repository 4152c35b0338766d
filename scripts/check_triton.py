"""Fail if ptxas left a matrix product out of a Triton kernel, or if one spills or wants more shared memory than exists.

    python scripts/check_triton.py               the kernels of P3D-63, compiled for a Hopper card; no GPU is needed
    python scripts/check_triton.py --allow RE    kernels that RE matches may spill, beside those of ALLOWED

Training and inference of P3D-63 pass here at 32 clips of 16x160x160, in both wirings, in float16 in the author's, and
inference of 1 clip in bfloat16, but a launch only compiles: no kernel runs. In float16 and TF32 only those compile
whose constants differ from bfloat16's.
Compiled kernels stay in Triton's cache: a second run takes half the time or less.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CLIPS = 32, 3, 16, 160, 160
H200 = 132  # multiprocessors, which decide how sums are split
SHARED = 227 * 1024  # bytes a program may have

_OPEN = "open: seen by this check, not tuned yet"
# Kernels that may spill, by a pattern searched for in their description: how much with ptxas 12.8 at most, and why.
ALLOWED = {
    r"^conv_wgrad_kernel\(.* BLOCK_CO=128, BLOCK_K=128, num_warps=4,": "240 bytes; the fastest of a sweep on an H200",
    r"^conv_wgrad_kernel\(.* READ_G=join_port, READ_X=join_port,": "16 bytes; not what a Hopper card runs",
    r"^gram_dgrad_kernel\(.* READ=join_[bc],.* BLOCK_CI=128,": f"112 bytes, 472 in float16; {_OPEN}",
    r"^conv_kernel\(.* CI=256, CO=1024,.* READ=join_\w+, JOIN=add_relu,": f"48 bytes; {_OPEN}",
    r"^stem_(conv|wgrad|dz|dgrad)_kernel\(": f"240, 48, 8 and, in float32, 232 bytes; {_OPEN}",
}

_PRODUCT = "wgmma.mma_async"  # of PTX; HGMMA in SASS. Where ptxas leaves one out, its result goes to the zero register:
_RESULT = re.compile(r"\bHGMMA\S*\s+(\w+)")  # HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT
_USAGE = re.compile(r"\bREG:(\d+) STACK:(\d+)")


class Code(NamedTuple):
    """What ptxas made of one kernel."""

    products: int  # in PTX
    kept: int  # in SASS, where an unrolled loop has more
    dead: int  # left out, in SASS
    registers: int  # a thread
    stack: int  # bytes
    shared: int  # bytes a program


def parse(ptx: str, dump: str, shared: int = 0) -> Code:
    """Of a kernel's PTX and of what `disassemble` says of its cubin; ValueError if that is nothing."""
    usage = _USAGE.search(dump)
    if usage is None:
        raise ValueError("no registers and stack in what cuobjdump says")
    results = _RESULT.findall(dump)
    dead = results.count("RZ")
    return Code(ptx.count(_PRODUCT), len(results) - dead, dead, int(usage[1]), int(usage[2]), shared)


def check(kernels: Iterable[tuple[str, Code]], allow: Iterable[str]) -> list[str]:
    """What is wrong, one line each, from the descriptions of kernels and their code."""
    wrong = []
    for name, code in kernels:
        if code.dead or code.kept < code.products:
            wrong.append(f"{name}: ptxas kept {code.kept} of {code.products} products, {code.dead} are dead")
        if code.stack and not any(re.search(pattern, name) for pattern in allow):
            wrong.append(f"{name}: {code.stack} bytes of stack")
        if code.shared > SHARED:
            wrong.append(f"{name}: {code.shared} bytes of shared memory, {SHARED} at most")
    return sorted(wrong)


# --- compiling without a card ----------------------------------------------------------------------------------------


def disassemble(ptx: str, cubin: str) -> str:
    """Resources of a cubin, and its SASS if its PTX has products."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "-res-usage", *["-sass"] * (_PRODUCT in ptx), cubin]
    path = f"{Path(knobs.nvidia.nvdisasm.path).parent}{os.pathsep}{os.environ['PATH']}"  # cuobjdump calls nvdisasm
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}).stdout


def describe(source, metadata: dict) -> str:
    """A kernel that Triton has compiled: name(dtype, constants; no <arguments that are None>)."""
    constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    constants |= {option: metadata[option] for option in ("num_warps", "num_stages")}
    dtype = next((t.lstrip("*") for t in source.signature.values() if t in ("*bf16", "*fp16")), "fp32")
    given = ", ".join([dtype, *(f"{name}={value}" for name, value in constants.items() if value is not None)])
    absent = ", ".join(name for name, value in constants.items() if value is None)
    return f"{source.fn.__name__}({given}{absent and f'; no {absent}'})"


def compile_all() -> list[tuple[str, Code]]:
    """Description and code of every kernel that P3D-63 launches. Leaves Triton and the package unfit to launch any."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
    import torch
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    import p3d_kernels as p3d
    from p3d_kernels import _backends
    from p3d_kernels.ops import _apply, _conv, _fused, _gram, _head, _stem, _tape, _triton

    class Card:
        """All that Triton asks a driver before it compiles."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    kernels: list[tuple[str, Code]] = []
    bfloat16 = set()

    def skip(*, fn, compile, **_) -> bool:
        """Before a kernel compiles: whether it need not, since one with its constants has, in bfloat16."""
        kernel = fn.name, str(compile["constants"]), compile["num_warps"], compile["num_stages"]
        if dtype == torch.bfloat16:
            bfloat16.add(kernel)
        return dtype != torch.bfloat16 and kernel in bfloat16

    def inspect(*, src, metadata, metadata_group, **_) -> None:
        """Once it has compiled, now or in an earlier run."""
        files = {Path(name).suffix: path for name, path in metadata_group.items()}
        ptx = Path(files[".ptx"]).read_text()
        code = parse(ptx, disassemble(ptx, files[".cubin"]), metadata["shared"])
        kernels.append((describe(src, metadata), code))

    driver.set_active(Card())
    knobs.runtime.jit_cache_hook, knobs.compilation.listener = skip, inspect
    _backends.interpreting = lambda: True  # so the kernels take tensors on the CPU
    for module in (_conv, _stem):
        module.sm_count = lambda device: H200
    pools = sys.modules["p3d_kernels.ops.max_pool"]  # ops.max_pool is the op
    for module in (_apply, _conv, _gram, _head, _triton, pools):
        module.dependent_launch = lambda device: {"PDL": True, "launch_pdl": True}
    for module in (_conv, _gram, _stem, _fused, _triton):
        module.input_precision = lambda dtype, device: "tf32" if dtype == torch.float32 else "ieee"
    with p3d.use_backend("triton"), _tape._compiling_ahead():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            layouts = {"author": torch.channels_last_3d, "port": torch.contiguous_format}
            for wiring, layout in layouts.items():
                if wiring == "port" and dtype == torch.float16:  # to compile less: the reads are in bfloat16
                    continue
                net = p3d.p3d63(wiring=wiring)
                clips = torch.empty(CLIPS, memory_format=layout).requires_grad_()
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    net(clips).sum().backward()
                engine = p3d.freeze(net.eval(), dtype)
                for batch in (clips, clips[:1])[: 2 if dtype == torch.bfloat16 and wiring == "author" else 1]:
                    engine(batch.detach())
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--allow", action="append", default=[], metavar="RE", help="kernels that may spill")
    args = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("kernels: nothing to check, Triton is not installed")
        return 0
    begun = time.perf_counter()
    kernels = compile_all()
    wrong = check(kernels, [*ALLOWED, *args.allow]) if kernels else ["nothing was compiled"]
    for line in wrong:
        print(f"kernels: {line}", file=sys.stderr)
    if not wrong:
        products, spills = sum(code.products for _, code in kernels), [code.stack for _, code in kernels if code.stack]
        print(
            f"kernels: {len(kernels)} compiled for sm_90, all {products} products kept; {len(spills)} spill and may "
            f"(at most {max(spills, default=0)} bytes); {time.perf_counter() - begun:.0f} s"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # a checkout need not be installed
    sys.exit(main())
