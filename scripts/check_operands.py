"""Fail if ptxas writes a register that a matrix product reads after the product may have read it.

    python scripts/check_operands.py               the extension that was built last
    python scripts/check_operands.py FILE          that module, cubin or output of `cuobjdump -sass`

ptxas 13.0 does so with registers that it knows to be zero (docs/measured.md): a product whose operand A lies in
registers may read them from the WARPGROUP.ARRIVE before it on, until WARPGROUP.DEPBAR waits for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

_FUNCTION = re.compile(r"\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S+)(?: (.*?))? ?;")
_OPERAND = re.compile(r"R\d+, R(\d+), u?gdesc")  # of HGMMA D, A, B where A lies in four registers
_TARGET = re.compile(r"R(\d+)(?:,|$)")
_STORES = ("ST", "RED", "SYNCS", "BAR", "UR", "R2UR")  # their first register is read


class Late(NamedTuple):
    function: str
    instruction: str


def written(name: str, operands: str) -> range:
    """The registers that an instruction writes; those of HGMMA are sums, not operands."""
    target = _TARGET.match(operands)
    if target is None or name.startswith(("HGMMA", *_STORES)):
        return range(0)
    wide = name.startswith("CS2R") and ".32" not in name
    count = 4 if ".128" in name or name.endswith(".4") else 2 if wide or ".64" in name or ".WIDE" in name else 1
    return range(int(target[1]), int(target[1]) + count)


def late_writes(lines: Iterable[str]) -> Iterator[Late]:
    """Each write, in the SASS that cuobjdump prints, to an operand of a product that is on its way."""
    function, group = "", []  # since the last WARPGROUP.ARRIVE, if it has not been waited for

    def found() -> Iterator[Late]:
        read = {
            int(a[1]) + i
            for name, rest in group
            if name.startswith("HGMMA") and (a := _OPERAND.match(rest))
            for i in range(4)
        }
        for name, rest in group:
            if not read.isdisjoint(written(name, rest)):
                yield Late(function, f"{name} {rest}")

    for line in lines:
        if title := _FUNCTION.match(line):
            yield from found()
            function, group = title[1], []
        elif instruction := _INSTRUCTION.match(line):
            name, rest = instruction[1], instruction[2] or ""
            if name.startswith(("WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR")):
                yield from found()
                group = [(name, rest)] if "ARRIVE" in name else []
            elif group:
                group.append((name, rest))
    yield from found()


def disassemble(path: Path) -> str | None:
    """The SASS of a module, by the cuobjdump of the toolkit or Triton's; None if there is neither."""
    tool = shutil.which("cuobjdump")
    if tool is None and importlib.util.find_spec("triton") is not None:
        from triton import knobs

        tool = knobs.nvidia.cuobjdump.path
    if tool is None:
        return None
    search = f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"  # cuobjdump calls nvdisasm
    command = [tool, "-sass", str(path)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": search}
    ).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="a module, a cubin or SASS as text")
    path = parser.parse_args().file
    if path is None:
        record = json.loads((ROOT / "p3d_kernels" / "_build.json").read_text())
        if not record["built"]:
            print(f"operands: nothing to check, the extension was not built: {record['reason']}")
            return 0
        path = max((ROOT / "p3d_kernels").glob("_C.*.so"), key=lambda file: file.stat().st_mtime)
    binary = path.read_bytes()[:4] == b"\x7fELF"
    sass = disassemble(path) if binary else path.read_text()
    if sass is None:
        print("operands: nothing to check with, neither CUDA's cuobjdump nor Triton's is here")
        return 0
    functions = len(re.findall(_FUNCTION, sass))
    if "HGMMA" not in sass:
        print(f"operands: {path}: no matrix products in {functions} kernels", file=sys.stderr)
        return 1
    wrong = list(late_writes(sass.splitlines()))
    for late in wrong:
        print(f"operands: {late.function}: written while a product may read it: {late.instruction}", file=sys.stderr)
    if not wrong:
        print(f"operands: none written late in {functions} kernels")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
