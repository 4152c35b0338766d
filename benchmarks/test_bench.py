"""Every measurement as a test of pytest-benchmark: red, and not timed, when the answer is wrong.

    pytest benchmarks --cases p3d63,spatial_* --passes infer,train --batch 32

The rows of summary.csv, which are timed by CUDA events, stand in `extra_info`; pytest-benchmark's own figures are of
the first launch, by the wall clock around a synchronised step.
"""

from __future__ import annotations

import pytest
import torch

from . import run
from .conftest import PLAN, ROWS


def pytest_generate_tests(metafunc):
    plan = metafunc.config.stash[PLAN]
    if isinstance(plan, str):
        metafunc.parametrize("measurement", [pytest.param(None, marks=pytest.mark.skip(reason=plan))])
        return
    names = ["-".join((c.name, pass_, f"N{batch}", implementation)) for c, pass_, batch, implementation in plan.todo]
    metafunc.parametrize("measurement", plan.todo, ids=names)


@pytest.fixture(scope="module")
def problems():
    """The last problem, which its implementations share; it is freed before the next is made."""
    return {}


def test_bench(measurement, problems, request, benchmark):
    plan = request.config.stash[PLAN]
    case, pass_, batch, implementation = measurement
    key = (case, pass_, batch)
    if key not in problems:
        problems.clear()
        problems[key] = run.Problem(case, pass_, batch, plan.setting)
    for row, call in run.timed(problems[key], implementation, plan.launches):
        request.config.stash[ROWS].append(row)
        if row["launch"] == plan.launches[0]:
            benchmark.group = f"{case.name} {pass_} N={batch} {row['launch']}"
            benchmark.extra_info["rows"] = []
            benchmark.pedantic(_synchronised(call), rounds=plan.setting.repeats, warmup_rounds=1)
        benchmark.extra_info["rows"].append(row)


def _synchronised(call):
    def step():
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step
