"""The machinery of `benchmarks/` at toy sizes: cases, floors, rivals, judging, summary.csv and the README table."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import cases, floor, report, rivals, run
from benchmarks import conftest as front
from benchmarks.cases import CASES, CONV, DEPTHS, NET, WHOLE
from p3d_kernels import _judge, _timing, models, ops
from p3d_kernels.models.plain import PlainP3D

COLUMNS = (
    "case,pass,launch,batch,dtype,implementation,median_ms,iqr_ms,peak_mib,clips_per_s,floor_ms,rel_error,run,commit,"
    "torch,triton,cudnn,driver,date"
)
NO_COMPILE = "p3d_kernels,eager,eager_ncdhw,conv2d,conv3d_full"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Nets of one block a stage, and on a CPU plain PyTorch: Triton's interpreter takes minutes for a net."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("P3D_BACKEND", "aten")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setitem(cases.DEPTHS, "p3d63", (1, 1, 1, 1))
    monkeypatch.setattr(models, "p3d63", lambda classes, **options: models.P3D((1, 1, 1, 1), classes, **options))


def toy(tmp_path, *arguments) -> tuple[int, list[dict]]:
    """`benchmarks.run --toy`: (exit code, rows)."""
    code = run.main(["--toy", "--results", str(tmp_path / "results" / "cpu"), *arguments])
    return code, report.read(tmp_path / "results" / "cpu" / "summary.csv")


# The case table


def test_the_table_covers_nets_blocks_and_ops():
    expected = {"p3d63", "p3d63_224", "p3d199", "stem", "block_2d_stage4"}
    for stage in (1, 2, 3):
        expected |= {f"{part}_{kind}_stage{stage}" for part in ("block", "pseudo3d") for kind in "abc"}
        parts = ("spatial", "temporal", "pointwise_reduce", "pointwise_expand")
        expected |= {f"{part}_stage{stage}" for part in parts}
    assert set(CASES) == expected
    for case in CASES.values():
        assert case.op in models.DEPTHS or callable(getattr(ops, case.op))
        single = case.op.endswith("_conv") and case.kind is None
        net = NET if case.name in DEPTHS else WHOLE
        assert case.passes == (CONV if single else ("infer",) if case.name == "p3d63_224" else net)
        assert case.input_shape(5) == (5, case.channels[0], *case.size)


def test_select():
    assert [c.name for c in cases.select("stem,block_a_*")] == ["stem", *(f"block_a_stage{i}" for i in (1, 2, 3))]
    for wrong in ("stemm", "nothing*"):
        with pytest.raises(ValueError, match=f"expected names among p3d63, .*, got '{wrong[:-1]}"):
            cases.select(wrong)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("depths", [(1, 1, 1, 1), (3, 4, 6, 3)])
def test_flops_of_a_net_are_those_of_its_convolutions(monkeypatch, depths, full):
    """Counted with hooks on the plain net, at the real size (nothing is computed on the meta device)."""
    monkeypatch.setitem(cases.DEPTHS, "p3d63", depths)
    counted = []
    with torch.device("meta"):
        net = PlainP3D(depths, 400, wiring="port", conv3d_full=full)
        for module in net.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
                module.register_forward_hook(
                    lambda m, _, y: counted.append(2 * m.weight[0].numel() * y.numel())  # products and sums
                )
        net(torch.empty(CASES["p3d63"].input_shape(2)))
    flops = sum(floor.work(part, "infer", 2, pooled)[1] for part, pooled in floor.parts(CASES["p3d63"]))
    assert (flops == sum(counted)) == (not full)


def test_floor_by_hand():
    """S at stage 1, N=32: 64 channels in and out at 409600 positions."""
    positions = 32 * 8 * 40 * 40
    moved, flops = floor.work(CASES["spatial_stage1"], "fwd", 32)
    assert moved == 2 * (2 * 64 * positions + 9 * 64 * 64) and flops == 2 * 9 * 64 * 64 * positions
    assert floor.floor_ms(CASES["spatial_stage1"], "fwd", 32, 4.2, 750) == pytest.approx(flops / 750e12 * 1e3)
    assert floor.floor_ms(CASES["spatial_stage1"], "fwd", 32, 1.0, 750) == pytest.approx(moved / 1e12 * 1e3)
    for case in CASES.values():
        times = [floor.floor_ms(case, pass_, 4, 4.2, 750) for pass_ in case.passes]
        assert all(t > 0 for t in times)
        assert case.passes[:2] != WHOLE or times[1] > 1.9 * times[0]


# Rivals and judging


def test_every_rival_answers_right(tmp_path):
    names = "p3d63,stem,block_?_stage1,block_2d_stage4,pseudo3d_b_stage2,spatial_stage3,temporal_stage1"
    passes = ("infer", "train", *CONV)
    chosen = "--cases", names, "--passes", ",".join(passes), "--implementations", NO_COMPILE, "--launches", "eager"
    code, rows = toy(tmp_path, *chosen)
    assert code == 0
    chosen = cases.select(names)
    expected = sum(rivals.applies(i, c) * len(set(passes) & {*c.passes}) for c in chosen for i in NO_COMPILE.split(","))
    assert len(rows) == expected and {row["case"] for row in rows} == {c.name for c in chosen}
    assert {row["implementation"] for row in rows} == set(NO_COMPILE.split(","))
    assert max(float(row["rel_error"]) for row in rows) < 1e-3
    for row in rows:
        assert float(row["median_ms"]) > 0 and float(row["floor_ms"]) > 0
        assert float(row["clips_per_s"]) == pytest.approx(4e3 / float(row["median_ms"]), rel=0.02)


def test_finetuning_leaves_every_norm_but_the_first_alone():
    problem = run.Problem(CASES["p3d63"], "finetune", 2, run.Setting(torch.device("cpu"), torch.float32, toy=True))
    answers = {}
    for name in ("p3d_kernels", "eager", "reference"):
        step = problem.step(name)
        before = {k: v.clone() for k, v in step.model.named_buffers() if v.is_floating_point()}
        step()
        changed = {k for k, v in step.model.named_buffers() if k in before and not torch.equal(v, before[k])}
        answers[name] = step.answers()
        assert changed == {"bn1.running_mean", "bn1.running_var"}
        assert {k for k in answers[name] if "bn" in k or "downsample.1" in k} == {"bn1.weight", "bn1.bias"}
    for name in ("p3d_kernels", "eager"):
        assert problem.check(name, answers[name]) < 1e-4


def test_less_memory_is_for_the_steps_of_nets():
    problem = run.Problem(CASES["p3d63"], "train", 2, run.Setting(torch.device("cpu"), torch.float32, toy=True))
    nets = [problem.step(name).model for name in (rivals.OURS, rivals.LESS_MEMORY)]
    assert [net.memory for net in nets] == ["default", "less"]
    wanted = [("p3d63", "train"), ("p3d199", "finetune"), ("p3d63", "infer"), ("stem", "train")]
    assert [rivals.applies(rivals.LESS_MEMORY, CASES[c], p) for c, p in wanted] == [True, True, False, False]


def test_views_2d_has_no_3d_layer_left():
    net = rivals.views_2d(rivals.master(CASES["p3d63"]))
    kinds = {type(m).__name__ for m in net.modules()}
    assert not kinds & {"Conv3d", "BatchNorm3d", "MaxPool3d"} and "_Conv2d" in kinds
    assert {n for n, _ in net.named_parameters()} == {n for n, _ in rivals.master(CASES["p3d63"]).named_parameters()}


def test_fold_leaves_no_batch_norm():
    for name in ("p3d63", "stem", "block_a_stage1", "pseudo3d_c_stage1", "block_2d_stage4"):
        folded = rivals.fold(rivals.master(CASES[name].toy()).eval())
        assert not [m for m in folded.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("case, passes", [("temporal_stage1", CONV), ("stem", ("train",))])
def test_a_wrong_answer_is_not_timed(tmp_path, monkeypatch, capsys, case, passes):
    op = CASES[case].op
    right = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda x, *rest: right(x, *rest) * 1.001)
    timed, measure = [], run.measure
    monkeypatch.setattr(run, "measure", lambda call, *rest, **how: timed.append(call) or measure(call, *rest, **how))
    chosen = "--cases", case, "--passes", ",".join(passes), "--implementations", "p3d_kernels,eager"
    code, rows = toy(tmp_path, *chosen, "--launches", "eager")
    assert code == 1
    assert {row["implementation"] for row in rows} == {"eager"}
    assert len(timed) == len(rows) + 2  # and the two ceilings
    said = capsys.readouterr().err
    assert said.count("WrongAnswer") == len(passes) and "1.00e-03 off the reference, allowed" in said


def test_judge():
    reference = {"output": torch.ones(4), "a": torch.ones(3), "b": torch.full((5,), 1e-3)}
    exact = _judge.errors(reference, reference)
    assert exact == {"output": 0.0, "a": 0.0, "b": 0.0, "gradients": 0.0}

    def judged(plain=exact, **changed):
        return _judge.judge("it", _judge.errors(reference | changed, reference), plain, torch.float32)

    assert judged() == 0.0
    assert judged(output=torch.ones(4) * (1 + 5e-5)) == pytest.approx(5e-5, rel=1e-2)
    for wrong in (
        {"output": torch.ones(4) * 1.001},
        {"output": torch.tensor([1.0, 1.0, 1.0, float("nan")])},
        {"output": torch.ones(5)},
        {"a": torch.ones(3) * 1.001},
        {"b": torch.zeros(5)},  # too small to show in the gradients as one vector
    ):
        with pytest.raises(_judge.WrongAnswer, match="off the reference"):
            judged(**wrong)
    loose = dict.fromkeys(exact, 1e-3)
    assert judged(loose, output=torch.ones(4) * 1.0015) > 1e-3  # twice as far off as plain PyTorch passes
    with pytest.raises(_judge.WrongAnswer):
        judged(loose, output=torch.ones(4) * 1.0025)
    with pytest.raises(_judge.WrongAnswer):  # however far off plain PyTorch is
        judged(dict.fromkeys(exact, 9.0), output=torch.zeros(4))
    with pytest.raises(_judge.WrongAnswer, match="expected answers"):
        _judge.errors({"output": torch.ones(4)}, reference)


def test_peak_memory_counts_what_lives_at_one_time():
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")

    def step():
        a = torch.empty(1 << 20, dtype=torch.float32, device=device)  # 4 MiB
        b = a + 1
        del a
        b.view(2, -1).add_(1)
        return b * 2

    assert _timing.peak_mib(step, device) == pytest.approx(8, abs=0.1)


# summary.csv


def test_summary_has_the_columns_and_grows_by_runs(tmp_path):
    arguments = [
        "--cases",
        "stem",
        "--passes",
        "infer",
        "--implementations",
        "p3d_kernels,eager",
        "--launches",
        "eager",
    ]
    assert toy(tmp_path, *arguments)[0] == 0
    code, rows = toy(tmp_path, *arguments)
    assert code == 0
    where = tmp_path / "results" / "cpu"
    lines = (where / "summary.csv").read_text().splitlines()
    assert lines[0] == COLUMNS and len(lines) == 5 and COLUMNS not in lines[1:]
    runs = [row["run"] for row in rows]
    assert runs[0] == runs[1] != runs[2] == runs[3]
    assert all(value for row in rows for value in row.values())
    with (where / "ceilings.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == [runs[0], runs[2]]


def test_a_summary_of_other_columns_is_left_alone(tmp_path):
    (tmp_path / "summary.csv").write_text("case,ms\n")
    with pytest.raises(ValueError, match="expected columns case,pass"):
        report.write(tmp_path, [], "run", (1.0, 1.0))
    assert (tmp_path / "summary.csv").read_text() == "case,ms\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cases", "p3d64"], "cases: expected names among"),
        (["--passes", "backward"], "passes: expected names among infer, train, finetune"),
        (["--implementations", "tensorflow"], "implementations: expected names among"),
        (["--launches", "lazy"], "launches: expected names among eager, graph"),
        (["--dtype", "int8"], "dtype: expected names among"),
        (["--cases", "stem", "--passes", "wgrad"], "nothing to run"),
    ],
)
def test_bad_arguments(capsys, arguments, expected):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--toy", *arguments])
    assert expected in capsys.readouterr().err


def test_few_repeats_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--cases", "stem", "--repeats", "9"])
    assert "repeats: expected at least 10, got 9" in capsys.readouterr().err


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        run.main(["--cases", "stem"])
    assert "no GPU: expected --toy" in capsys.readouterr().err


# The table


def row(implementation: str, ms: float, run_id: str, **changed) -> dict:
    values = dict.fromkeys(report.COLUMNS, "1") | {"case": "p3d63", "pass": "train", "launch": "graph", "batch": "32"}
    values |= {"dtype": "bfloat16", "implementation": implementation, "median_ms": str(ms), "run": run_id}
    return values | changed


def test_a_ratio_is_made_of_one_run(tmp_path):
    old = [row("p3d_kernels", 9.0, "old"), row("eager", 900.0, "old"), row("compile", 90.0, "old")]
    new = [row("p3d_kernels", 4.0, "new"), row("eager", 10.0, "new")]
    report.write(tmp_path / "card", old, "old", (1.0, 1.0), "A Card")
    report.write(tmp_path / "card", new, "new", (1.0, 1.0), "A Card")
    text = report.markdown(tmp_path)
    assert "x2.50" in text and "run `new`" in text and "A Card" in text
    assert "old" not in text and "900" not in text and "compile" not in text  # `compile` was not measured in that run
    assert report.match(old + new, new[0], "compile") is None
    assert report.match(old + new, old[0], "compile")["median_ms"] == "90.0"


def test_rows_name_their_runs(tmp_path):
    report.write(tmp_path / "card", [row("p3d_kernels", 9.0, "a", case="stem")], "a", (1.0, 1.0))
    mine = [row("p3d_kernels", 4.0, "b"), row("eager", 8.0, "b"), row("p3d_kernels", 2.0, "b", **{"pass": "infer"})]
    report.write(tmp_path / "card", mine, "b", (1.0, 1.0))
    lines = report.markdown(tmp_path).splitlines()
    infer, train, stem = (line for line in lines if line.startswith(("| p3d63", "| stem")))  # in the order of cases.py
    assert infer.startswith("| p3d63 |") and infer.endswith("(1) | 1 |")
    assert train.startswith("| p3d63 |") and "(25 %)" in train and "x2.00" in train and train.endswith("| 1 |")
    assert stem.startswith("| stem |") and stem.endswith(" |  | 2 |")
    assert [line[:2] for line in lines if "run `" in line] == ["1.", "2."] and "run `b`" in "".join(lines)


def test_readme_table_is_made_and_checked(tmp_path, capsys):
    report.write(tmp_path / "results" / "card", [row("p3d_kernels", 4.0, "new")], "new", (1.0, 1.0))
    readme = tmp_path / "README.md"
    arguments = ["--readme", str(readme), "--results", str(tmp_path / "results")]
    readme.write_text(f"# Title\n{report.START}\nby hand\n{report.END}\nrest\n")
    assert report.main([*arguments, "--check"]) == 1 and "stale" in capsys.readouterr().err
    assert report.main(arguments) == 0 and report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("\nrest\n") and "by hand" not in text and "| p3d63 |" in text
    readme.write_text(text.replace("**4**", "**3**"))
    assert report.main([*arguments, "--check"]) == 1
    readme.write_text("# no markers\n")
    assert report.main(arguments) == 1 and "expected the markers" in capsys.readouterr().err
    assert readme.read_text() == "# no markers\n"


def test_the_readme_is_up_to_date():
    assert report.main(["--check"]) == 0


def test_committed_results_are_complete():
    for path in report.RESULTS.glob("*/summary.csv"):
        rows = report.read(path)
        ceilings = {r["run"] for r in report.read(path.parent / "ceilings.csv")}
        for r in rows:
            assert r["case"] in CASES and r["pass"] in CASES[r["case"]].passes and r["run"] in ceilings
            assert r["implementation"] in rivals.IMPLEMENTATIONS
            assert r["commit"] and r["date"]


def pytest_benchmarks(*arguments: str) -> tuple[int, str]:
    """`pytest benchmarks ...` in a process of its own: (exit code, what it printed)."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "-v", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_pytest_front():
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    arguments = ["--cases", "stem", "--passes", "infer", "--implementations", "p3d_kernels,eager", "--dtype", dtype]
    code, said = pytest_benchmarks("--toy", *arguments)
    assert code == 0, said
    assert "stem-infer-N4-p3d_kernels" in said and "2 passed" in said and "ours/it ms" in said


def test_pytest_front_refuses_an_unknown_case():
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    config = types.SimpleNamespace(option=parser.parse_args(["--toy", "--cases", "stemm"]), stash=pytest.Stash())
    with pytest.raises(pytest.UsageError, match="expected names among"):
        front.pytest_configure(config)


def test_setting_is_of_one_process():
    cpu = torch.device("cpu")
    one, two = run.Setting(cpu, torch.float32, toy=True), run.Setting(cpu, torch.float32, toy=True)
    assert one.run != two.run and one.ceilings is one.ceilings
    assert all(c > 0 for c in one.ceilings)
    assert dataclasses.replace(one, repeats=3).run == one.run
