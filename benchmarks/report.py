"""summary.csv and the results table of README.md, made from it: `python -m benchmarks.report [--check]`.

`write` appends the rows of a run to benchmarks/results/<card>/summary.csv, and its ceilings to ceilings.csv beside it.
The tables show, for each case, pass, launch and batch, the latest run that timed this package, and nothing from others:
a ratio is made of rows of one run only. The floor is what bytes and flops allow at the ceilings of that run.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import torch

from .cases import CASES, PASSES

OURS = "p3d_kernels"
COLUMNS = (
    "case,pass,launch,batch,dtype,implementation,median_ms,iqr_ms,peak_mib,clips_per_s,floor_ms,rel_error,"
    "run,commit,torch,triton,cudnn,driver,date"
).split(",")
CEILINGS = ["run", "card", "copy_tb_s", "matmul_tflop_s"]
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
START, END = "<!-- results:start -->", "<!-- results:end -->"


def new_run() -> str:
    """An id for the rows of one process."""
    return f"{datetime.datetime.now(datetime.timezone.utc):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:4]}"


def card(device: torch.device) -> str:
    """The name of the card, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def folder(device: torch.device) -> Path:
    """Where the results of a card are: benchmarks/results/nvidia-h200."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", card(device).lower()).strip("-")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd=HERE).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def versions(device: torch.device) -> dict[str, str]:
    """The columns that say what was measured with. P3D_COMMIT names the commit where there is no git."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    commit = os.environ.get("P3D_COMMIT", "")
    if not commit:
        changed = _output("git", "status", "--porcelain", "--", "..", ":!results", ":!../README.md")
        commit = _output("git", "rev-parse", "--short=10", "HEAD")
        commit = f"{commit}+changes" if commit and changed else commit or "unknown"
    on_gpu = device.type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines() if on_gpu else []
    return {
        "commit": commit,
        "torch": torch.__version__,
        "triton": triton,
        "cudnn": str(torch.backends.cudnn.version()) if on_gpu else "none",
        "driver": driver[0] if driver else "none",
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
    }


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a csv; none where there is no file. ValueError for columns other than ours in a summary."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if path.name == "summary.csv" and list(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected columns {','.join(COLUMNS)}, got {','.join(reader.fieldnames or ())}")
        return list(reader)


def _append(path: Path, columns: list[str], rows: list[dict]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def write(where: Path, rows: list[dict], run: str, ceilings: tuple[float, float], name: str = "") -> None:
    """Append the rows of one run to `where`/summary.csv and its ceilings to `where`/ceilings.csv."""
    where.mkdir(parents=True, exist_ok=True)
    read(where / "summary.csv")  # raises before anything is written
    _append(where / "summary.csv", COLUMNS, rows)
    if run not in {row["run"] for row in read(where / "ceilings.csv")}:
        values = [run, name or where.name, f"{ceilings[0]:.3f}", f"{ceilings[1]:.1f}"]
        _append(where / "ceilings.csv", CEILINGS, [dict(zip(CEILINGS, values))])


def match(rows: list[dict], row: dict, implementation: str) -> dict | None:
    """The row of `implementation` measured in the same run, on the same case, pass, launch, batch and dtype."""
    same = ("case", "pass", "launch", "batch", "dtype", "run")
    for other in reversed(rows):
        if other["implementation"] == implementation and all(str(other[k]) == str(row[k]) for k in same):
            return other
    return None


def markdown(results: Path = RESULTS) -> str:
    """The results of every card as Markdown: a table for each pass, then the runs that they are of."""
    blocks = []
    for path in sorted(results.glob("*/summary.csv")):
        rows = read(path)
        names = {r["run"]: r["card"] for r in read(path.parent / "ceilings.csv")}
        latest = {}
        for row in rows:  # later rows replace earlier ones
            if row["implementation"] == OURS:
                latest[tuple(row[k] for k in ("case", "pass", "launch", "batch", "dtype"))] = row
        mine = sorted(latest.values(), key=_place)
        runs = sorted({r["run"] for r in mine}, reverse=True)
        name = names.get(runs[0], path.parent.name) if runs else path.parent.name
        blocks.append(
            f"{name}. Milliseconds (peak MiB), of others also how many times ours. The floor is what bytes and flops "
            "allow, in percent of our time."
        )
        for pass_ in dict.fromkeys(r["pass"] for r in mine):
            blocks.append(_table(rows, [r for r in mine if r["pass"] == pass_], runs))
        blocks.append(_notes([[r for r in mine if r["run"] == run] for run in runs]))
    return "\n\n".join(blocks) if blocks else "Nothing has been measured yet."


def _place(row: dict) -> tuple:
    """Where a row stands: passes and cases in the order that `cases.py` has them."""
    orders = [(list(PASSES), row["pass"]), (list(CASES), row["case"])]
    at = [order.index(name) if name in order else len(order) for order, name in orders]
    return at[0], row["launch"] != "graph", at[1], -int(row["batch"]), row["dtype"]


def _table(rows: list[dict], mine: list[dict], runs: list[str]) -> str:
    matched = {r["implementation"] for row in mine for r in rows if match([r], row, r["implementation"])} - {OURS}
    rivals = list(dict.fromkeys(r["implementation"] for r in rows if r["implementation"] in matched))
    lines = [
        f"| {mine[0]['pass']} | launch | N | clips/s | floor | **{OURS}** | " + " | ".join([*rivals, "run"]) + " |",
        "| --- | --- | --- | --- | --- | --- |" + " --- |" * (len(rivals) + 1),
    ]
    for r in mine:
        share = 100 * float(r["floor_ms"]) / float(r["median_ms"])
        cells = [r["case"], r["launch"], r["batch"], f"{float(r['clips_per_s']):.0f}"]
        cells += [f"{_ms(r['floor_ms'])} ({share:.0f} %)", f"**{_ms(r['median_ms'])}** ({float(r['peak_mib']):.0f})"]
        for rival in rivals:
            other = match(rows, r, rival)
            ratio = f" x{float(other['median_ms']) / float(r['median_ms']):.2f}" if other else ""
            cells.append(f"{_ms(other['median_ms'])} ({float(other['peak_mib']):.0f}){ratio}" if other else "")
        lines.append("| " + " | ".join([*cells, str(runs.index(r["run"]) + 1)]) + " |")
    return "\n".join(lines)


def _notes(runs: list[list[dict]]) -> str:
    lines = []
    for number, mine in enumerate(runs, 1):
        row = mine[0]
        chosen = (
            f"--{option} {','.join(dict.fromkeys(r[column] for r in mine))}"
            for option, column in (("cases", "case"), ("passes", "pass"), ("launches", "launch"), ("batch", "batch"))
        )
        lines += [
            f"{number}. {row['date']}, commit `{row['commit']}`, driver {row['driver']}, torch {row['torch']}, triton "
            f"{row['triton']}, cuDNN {row['cudnn']}, run `{row['run']}`:",
            f"   `python -m benchmarks.run {' '.join(chosen)} --dtype {row['dtype']}`",
        ]
    return "\n".join(["<details><summary>The runs</summary>", "", *lines, "", "</details>"])


def _ms(value: str) -> str:
    return f"{float(value):.3g}"


def updated(text: str, results: Path = RESULTS) -> str:
    """README `text` with the table between its markers. ValueError without both markers, in order."""
    start, end = text.find(START), text.find(END)
    if start < 0 or end < start:
        raise ValueError(f"README: expected the markers {START} and {END}, in this order, found them missing")
    return text[: start + len(START)] + "\n" + markdown(results) + "\n" + text[end:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="the results table of README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the table is stale")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        text = args.readme.read_text()
        new = updated(text, args.results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if args.check:
        if new != text:
            print(f"{args.readme} is stale: run `python -m benchmarks.report`", file=sys.stderr)
        return int(new != text)
    args.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
