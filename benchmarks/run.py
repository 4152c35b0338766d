"""Check, then time: `python -m benchmarks.run --cases p3d63 --passes infer,train --batch 32`.

Every implementation of a case answers first and is judged by a float32 reference (without TF32); a wrong answer is
never timed. Rows are appended to benchmarks/results/<card>/summary.csv. `benchmarks/test_bench.py` runs the same code
under pytest-benchmark. `--toy` walks every path at sizes for a CPU and writes nowhere unless told.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import p3d_kernels as p3d
from p3d_kernels._judge import LIMITS, Step, errors, exact_float32, judge, layout, season
from p3d_kernels._timing import Progress, captured, measure, table

from . import report, rivals
from .cases import CASES, CONV, DEPTHS, PASSES, Case, select
from .floor import floor_ms
from .rivals import IMPLEMENTATIONS, LESS_MEMORY, OURS


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and how everything of one run is measured."""

    device: torch.device
    dtype: torch.dtype
    toy: bool = False
    repeats: int = 20
    run: str = dataclasses.field(default_factory=report.new_run)

    @functools.cached_property
    def ceilings(self) -> tuple[float, float]:
        """(copy TB/s, bytes read and written; matrix product TFLOP/s in the dtype) of this device in this run."""
        elements, n = (1 << 20, 256) if self.toy else (1 << 29, 8192)
        make = {"device": self.device, "dtype": self.dtype}
        source, target = torch.randn(elements, **make), torch.empty(elements, **make)
        a, b = torch.randn(n, n, **make), torch.randn(n, n, **make)
        copied = measure(lambda: target.copy_(source), self.device, 10)
        multiplied = measure(lambda: a @ b, self.device, 10)
        moved = 2 * elements * self.dtype.itemsize
        return moved / copied.median_ms / 1e9, 2 * n**3 / multiplied.median_ms / 1e9


class Problem:
    """One case, pass and batch: input, masters and their float32 references, and how far off plain PyTorch is.

    A clip arrives as float32 and autocast rounds it; between layers, and in inference, tensors have the run's dtype.
    """

    def __init__(self, case: Case, pass_: str, batch: int, setting: Setting):
        self.case, self.pass_, self.batch, self.setting = case.toy() if setting.toy else case, pass_, batch, setting
        self.single = pass_ in CONV
        self.tuning = pass_ == "finetune"  # a training step of another net
        self.step_pass = "train" if self.tuning else pass_
        torch.manual_seed(0)
        self.x = torch.randn(self.case.input_shape(batch), device=setting.device).to(setting.dtype)
        self.masters, self.references, self.plain = {}, {}, {}

    def master(self, full: bool) -> torch.nn.Module:
        if full not in self.masters:
            model = rivals.master(self.case, full).to(self.setting.device)
            self.masters[full] = season(model, self.x.float(), self.setting.dtype)
        return self.masters[full]

    def target(self, model: torch.nn.Module) -> Tensor | None:
        """Labels of a model, the gradient of the output of a part, None without a backward."""
        if self.pass_ in ("infer", "fwd"):
            return None
        generator = torch.Generator().manual_seed(2)
        if self.case.op in DEPTHS:
            labels = torch.randint(self.case.channels[1], (self.batch,), generator=generator)
            return labels.to(self.setting.device)
        with torch.no_grad():
            shape = copy.deepcopy(model)(self.x.float()).shape
        return torch.randn(shape, generator=generator).to(self.setting.device, self.setting.dtype)

    def step(self, implementation: str) -> Step:
        """One implementation of this problem; "reference" and "reference_full" are the masters in float32."""
        full, infer, dtype = implementation.endswith("_full"), self.pass_ == "infer", self.setting.dtype
        master = self.master(full).train(not infer)
        clip = self.case.channels[0] == 3 and self.step_pass == "train"
        x, target = self.x, self.target(master)
        autocast = dtype if self.step_pass == "train" and dtype != torch.float32 else None
        how = rivals.RIVALS.get(implementation, rivals.Rival())
        if implementation.startswith("reference"):
            model, x, autocast = copy.deepcopy(master), x.float(), None
            target = target.float() if target is not None and target.is_floating_point() else target
        elif implementation in (OURS, LESS_MEMORY):
            memory = "less" if implementation == LESS_MEMORY else "default"
            model = rivals.ours(self.case, master, memory).train(not infer)
            if self.single:
                model = model.to(dtype)
            elif infer and self.case.op in DEPTHS:
                model = p3d.freeze(model, dtype)
            elif infer and self.case.op in ("bottleneck", "pseudo3d_conv"):
                model = p3d.freeze(model, dtype)
            elif infer and self.case.op == "stem":
                model = rivals.frozen_stem(model, dtype)
            elif infer and dtype != torch.float32:  # a part of a block: no `freeze` for it
                autocast = dtype
        else:
            model = rivals.rival(implementation, master, infer, dtype, self.single)
        x = layout(x.float() if clip else x, how.channels_last)
        target = target if target is None else layout(target, how.channels_last)
        step = Step(model, x, target, self.step_pass, autocast, input_gradient=not clip)
        if self.tuning:
            p3d.models.frozen_bn(model)
        return step

    def _answers(self, implementation: str) -> dict[str, Tensor]:
        step = self.step(implementation)
        step.prepare()
        step()
        return step.answers()

    def check(self, implementation: str, answers: dict[str, Tensor]) -> float:
        """`judge` the answers of an implementation: the relative error, or WrongAnswer."""
        full = implementation == "conv3d_full"
        if full not in self.references:
            with exact_float32():
                self.references[full] = self._answers("reference_full" if full else "reference")
            self.plain[full] = errors(self._answers("conv3d_full" if full else "eager"), self.references[full])
        found = errors(answers, self.references[full])
        return judge(f"{self}, {implementation}", found, self.plain[full], self.setting.dtype, self.single)

    def __str__(self) -> str:
        return f"{self.case.name} {self.pass_} N={self.batch}"


def timed(
    problem: Problem, implementation: str, launches: tuple[str, ...] = ("eager", "graph")
) -> Iterator[tuple[dict, Callable[[], object]]]:
    """Check and time one implementation: for each launch a row of summary.csv and what was timed."""
    setting, case = problem.setting, problem.case
    least = 0.0 if setting.toy else 1.0
    _free(setting.device)
    step = problem.step(implementation)
    for launch in launches:
        if launch == "graph" and setting.device.type != "cuda":
            continue
        if launch == "eager":
            step.prepare()
            step()
            error = problem.check(implementation, step.answers())
            call = step
            time = measure(call, setting.device, setting.repeats, before=step.clear, least_ms=least)
            peak = time.peak_mib
        else:
            call, peak = captured(step, prepare=step.prepare, before=step.clear)
            call()
            error = problem.check(implementation, step.answers())
            time = measure(call, setting.device, setting.repeats, least_ms=least)
        floor = floor_ms(case, problem.pass_, problem.batch, *setting.ceilings)
        row = {
            "case": case.name,
            "pass": problem.pass_,
            "launch": launch,
            "batch": problem.batch,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "implementation": implementation,
            "median_ms": f"{time.median_ms:.4f}",
            "iqr_ms": f"{time.iqr_ms:.4f}",
            "peak_mib": f"{peak:.1f}",
            "clips_per_s": f"{problem.batch / time.median_ms * 1e3:.1f}",
            "floor_ms": f"{floor:.4f}",
            "rel_error": f"{error:.2e}",
            "run": setting.run,
            **report.versions(setting.device),
        }
        yield row, call


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def add_arguments(parser) -> None:
    """The choice of what to run, for this command and for pytest (`addoption`)."""
    add = parser.addoption if hasattr(parser, "addoption") else parser.add_argument
    env = os.environ.get
    add("--cases", default=env("P3D_CASES", "p3d63"), help=f"comma-separated, * and ? allowed: {', '.join(CASES)}")
    add("--passes", default=env("P3D_PASSES", ""), help=f"{', '.join(PASSES)} (default: all of a case)")
    add("--batch", default=env("P3D_BATCH", "32"), help="comma-separated batch sizes")
    add("--implementations", default=env("P3D_IMPLEMENTATIONS", ""), help=f"default: {','.join(IMPLEMENTATIONS)}")
    add("--launches", default=env("P3D_LAUNCHES", "eager,graph"), help="eager, graph (CUDA graph replay)")
    add("--dtype", default=env("P3D_DTYPE", ""), help="bfloat16 (default), float16 or float32 (default of --toy)")
    add("--repeats", type=int, default=int(env("P3D_REPEATS", "20")), help="timings of each row, at least 10")
    add("--results", default=env("P3D_RESULTS", ""), help="folder for summary.csv (default: benchmarks/results/<card>)")
    add("--toy", action="store_true", help="tiny sizes, on a CPU if there is no GPU; nothing written unless --results")


class NoGpu(ValueError):
    """There is nothing to time on."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the arguments ask for."""

    todo: list[tuple[Case, str, int, str]]  # case, pass, batch, implementation
    launches: tuple[str, ...]
    setting: Setting
    results: Path | None


def plan(args: argparse.Namespace) -> Plan:
    """The measurements in order, implementations of one problem together. ValueError for an unknown name."""
    cases = select(args.cases)
    passes = _names("passes", args.passes, PASSES)
    implementations = _names("implementations", args.implementations, IMPLEMENTATIONS)
    launches = _names("launches", args.launches, ("eager", "graph"))
    name = args.dtype or ("float32" if args.toy else "bfloat16")
    dtypes = {str(d).removeprefix("torch."): d for d in LIMITS}
    _names("dtype", name, tuple(dtypes))
    batches = [4] if args.toy else [int(b) for b in args.batch.split(",")]
    if not args.toy and args.repeats < 10:
        raise ValueError(f"repeats: expected at least 10, got {args.repeats}")
    if not torch.cuda.is_available() and not args.toy:
        raise NoGpu("no GPU: expected --toy (tiny sizes; CPU times say nothing about the kernels)")
    todo = [
        (case, pass_, batch, implementation)
        for case in cases
        for pass_ in case.passes
        if pass_ in passes
        for batch in batches
        for implementation in implementations
        if rivals.applies(implementation, case, pass_)
    ]
    if not todo:
        raise ValueError(f"nothing to run: cases {args.cases} have none of the passes {args.passes}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.backends.cudnn.benchmark = True
    gc.freeze()  # what PyTorch's import left is no garbage: each collection would take half a second
    setting = Setting(device, dtypes[name], args.toy, 3 if args.toy else args.repeats)
    results = Path(args.results) if args.results else None if args.toy else report.folder(setting.device)
    return Plan(todo, launches, setting, results)


def _names(what: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(filter(None, (n.strip() for n in text.split(",")))) or known
    for name in chosen:
        if name not in known:
            raise ValueError(f"{what}: expected names among {', '.join(known)}, got {name!r}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        chosen = plan(args)
    except ValueError as error:
        parser.error(str(error))
    found, failures, problem, key = [], [], None, None
    with Progress(len(chosen.todo)) as bar:
        for case, pass_, batch, implementation in chosen.todo:
            bar(f"{case.name} {pass_} N={batch} {implementation}")
            try:
                if key != (case, pass_, batch):
                    key, problem = None, None  # free the last one before the next is made
                    _free(chosen.setting.device)
                    problem, key = Problem(case, pass_, batch, chosen.setting), (case, pass_, batch)
                for row, _ in timed(problem, implementation, chosen.launches):
                    found.append(row)
            except Exception as error:  # one that fails must not cost the rows of the others
                failures.append(f"{case.name} {pass_} N={batch} {implementation}: {type(error).__name__}: {error}")
            except KeyboardInterrupt:
                failures.append(f"interrupted at {case.name} {pass_} N={batch} {implementation}; the rest was not run")
                break
    print(finish(chosen, found))
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def finish(chosen: Plan, found: list[dict]) -> str:
    """Write the rows of a run; what to print last."""
    setting = chosen.setting
    if found and chosen.results:
        report.write(chosen.results, found, setting.run, setting.ceilings, report.card(setting.device))
    copied, multiplied = setting.ceilings
    where = f"rows in {chosen.results}" if found and chosen.results else "nothing written"
    last = f"run {setting.run}: copy {copied:.2f} TB/s, matrix product {multiplied:.0f} TFLOP/s; {where}"
    return f"{summary(found)}\n\n{last}"


def summary(found: list[dict]) -> str:
    """The rows of one run as a table, with the ratio of our time and memory to each."""
    columns = ["case", "pass", "launch", "batch", "implementation", "median_ms", "peak_mib", "clips_per_s", "rel_error"]
    lines = []
    for row in found:
        mine = report.match(found, row, OURS)
        ratios = ["", ""]
        if mine:
            pairs = [(float(mine[column]), float(row[column])) for column in ("median_ms", "peak_mib")]
            ratios = [f"{a / b:.2f}" if b else "" for a, b in pairs]
        lines.append([str(row[c]) for c in columns] + ratios)
    return table([*columns, "ours/it ms", "ours/it MiB"], lines)


if __name__ == "__main__":
    sys.exit(main())
