"""`pytest benchmarks`: the options of benchmarks.run, and its table after pytest-benchmark's."""

from __future__ import annotations

import pytest

from . import run

PLAN, ROWS = pytest.StashKey(), pytest.StashKey()


def pytest_addoption(parser):
    run.add_arguments(parser.getgroup("p3d_kernels"))


def pytest_configure(config):
    try:
        config.stash[PLAN] = run.plan(config.option)
    except run.NoGpu as error:
        config.stash[PLAN] = str(error)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[ROWS] = []


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ROWS]:
        terminalreporter.write_line(run.finish(config.stash[PLAN], config.stash[ROWS]))
