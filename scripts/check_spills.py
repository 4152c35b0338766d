"""Fail if ptxas spilled registers, used a stack frame or warned of a performance loss in any kernel.

    python scripts/check_spills.py              the newest build/*/ninja.log, if the last build made the extension
    python scripts/check_spills.py LOG          that log
    python scripts/check_spills.py --allow RE   kernels (demangled names) that RE matches may spill

A log may hold several incremental builds: the last word on each source counts.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

_OBJECT = re.compile(r"Building CUDA object (\S+)")
_FUNCTION = re.compile(r"Function properties for (\S+)")
_BYTES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_LOSS = re.compile(r"Potential Performance Loss: .*")


class Usage(NamedTuple):
    """What ptxas said of one function."""

    stack: int  # bytes
    stores: int  # bytes spilled
    loads: int  # bytes reloaded
    registers: int | None = None  # a thread; None for a device function that is called rather than inlined


def parse(log: str) -> tuple[dict[str, Usage], list[str]]:
    """Mangled function name -> usage, and the lines that warn of a performance loss."""
    usage: dict[str, dict[str, Usage]] = {}  # object file -> function -> usage
    losses: dict[str, list[str]] = {}
    source, function = "", ""
    for line in log.splitlines():
        if found := _OBJECT.search(line):
            source = found[1]
            usage[source], losses[source] = {}, []
        elif found := _FUNCTION.search(line):
            function = found[1]
        elif found := _BYTES.search(line):
            usage.setdefault(source, {})[function] = Usage(*map(int, found.groups()))
        elif (found := _REGISTERS.search(line)) and function in usage.get(source, {}):
            usage[source][function] = usage[source][function]._replace(registers=int(found[1]))
        elif found := _LOSS.search(line):
            losses.setdefault(source, []).append(found[0])
    merged = {name: use for functions in usage.values() for name, use in functions.items()}
    return merged, [line for lines in losses.values() for line in lines]


def demangle(names: list[str]) -> list[str]:
    """Readable names where c++filt is installed, the names as they are elsewhere."""
    if not names or shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def check(log: str, allow: list[str]) -> list[str]:
    """What is wrong, one line each; ValueError if ptxas said nothing at all."""
    usage, losses = parse(log)
    if not usage:
        raise ValueError("no ptxas output in the log: nothing was compiled, or not with -Xptxas -v")
    wrong = []
    for name, use in sorted(zip(demangle(list(usage)), usage.values(), strict=True)):
        if (use.stack or use.stores or use.loads) and not any(re.search(pattern, name) for pattern in allow):
            wrong.append(f"{name}: {use.stores} bytes spill stores, {use.loads} spill loads, {use.stack} stack frame")
    return wrong + losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", nargs="?", type=Path, help="a log of ninja's output (default: the newest in build/)")
    parser.add_argument("--allow", action="append", default=[], metavar="RE", help="kernels that may spill")
    args = parser.parse_args()
    if args.log is None:
        record = json.loads((ROOT / "p3d_kernels" / "_build.json").read_text())
        if not record["built"]:
            print(f"spills: nothing to check, the extension was not built: {record['reason']}")
            return 0
        logs = sorted(ROOT.glob("build/*/ninja.log"), key=lambda path: path.stat().st_mtime)
        if not logs:
            print("spills: no build/*/ninja.log; build with `make build`", file=sys.stderr)
            return 1
        args.log = logs[-1]
    log = args.log.read_text()
    try:
        wrong = check(log, args.allow)
    except ValueError as error:
        print(f"spills: {args.log}: {error}", file=sys.stderr)
        return 1
    for line in wrong:
        print(f"spills: {line}", file=sys.stderr)
    registers = [use.registers for use in parse(log)[0].values() if use.registers is not None]
    if not wrong:
        print(f"spills: none in {len(registers)} kernels (at most {max(registers, default=0)} registers a thread)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
