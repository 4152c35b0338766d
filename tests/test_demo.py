"""`demo`, `bench` and `features` from the command line, at tiny sizes; a wrong kernel must not pass for a fast one."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from p3d_kernels import bench, models, ops
from p3d_kernels.__main__ import main
from p3d_kernels.engine import Engine
from videos import needs_decoder, write_video

pytestmark = needs_decoder
TINY = ["--frames", "4", "--size", "48", "--batch", "4", "--repeats", "1", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """One block a stage, and on a CPU plain PyTorch: Triton's interpreter takes minutes for a net."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("P3D_BACKEND", "aten")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setitem(models.DEPTHS, "p3d63", (1, 1, 1, 1))
    monkeypatch.setattr(models, "p3d63", lambda classes=400, **options: models.P3D((1, 1, 1, 1), classes, **options))


@pytest.fixture
def path(tmp_path):
    return write_video(tmp_path / "noise.avi", noise=True, size=(64, 80))


@pytest.mark.parametrize("wiring", ["port", "author"])
def test_demo(path, tmp_path, capsys, wiring):
    out = tmp_path / "out"
    assert main(["demo", "--video", str(path), "--out", str(out), "--wiring", wiring, *TINY]) == 0
    said, bar = capsys.readouterr()
    assert "the answers agree" in said and "4 clips of 4 x 48 x 48" in said
    assert "6/7 train: p3d_kernels" in bar
    facts = json.loads((out / "demo.json").read_text())
    assert facts["agree"] and facts["video"] == "noise.avi" and facts["clips"] == [4, 4, 48, 48, 3]
    rows = {(row["pass"], row["implementation"]): row for row in facts["rows"]}
    assert list(rows) == [(p, i) for p in ("infer", "train") for i in (bench.PLAIN, bench.OURS)]
    for (pass_, _), row in rows.items():
        assert row["median_ms"] > 0 and row["peak_mib"] > 0
        assert row["clips_per_s"] == pytest.approx(4e3 / row["median_ms"])
        assert row["output_error"] < 1e-4
        assert row["gradient_error"] is None if pass_ == "infer" else row["gradient_error"] < 1e-2
    if torch.cuda.is_available():
        assert "no GPU" not in said
    else:
        assert "no GPU: small size, CPU times say nothing about the kernels" in said
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "no demo.png: matplotlib is not installed" in said
    else:
        assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_without_matplotlib(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--video", str(path), "--out", str(tmp_path), *TINY]) == 0
    assert "no demo.png: matplotlib is not installed" in capsys.readouterr().out
    assert (tmp_path / "demo.json").exists() and not (tmp_path / "demo.png").exists()


def test_a_wrong_kernel_fails_and_is_not_timed(path, tmp_path, capsys, monkeypatch):
    right, served = models.P3D.classify, Engine.forward  # ours alone: a plain net has its own
    monkeypatch.setattr(models.P3D, "classify", lambda net, features: right(net, features * 1.01))
    monkeypatch.setattr(Engine, "forward", lambda engine, x: served(engine, x) * 1.01)
    assert main(["demo", "--video", str(path), "--out", str(tmp_path), *TINY]) == 1
    said = capsys.readouterr().out
    assert "the answers DISAGREE" in said and "output is 1.00e-02 off" in said
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert all(("median_ms" in row) == (row["implementation"] == bench.PLAIN) for row in rows)


def test_wrong_gradients_alone_fail(monkeypatch):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.tensor([0.5, 1.0]).repeat(gradient.size(1) // 2).view(1, -1, 1, 1, 1).to(gradient)

    right = ops.stem
    monkeypatch.setattr(ops, "stem", lambda x, *rest: Halved.apply(right(x, *rest)))
    rows = bench.versus("p3d63", torch.randn(4, 3, 4, 64, 64), torch.arange(4), classes=8, repeats=1)
    assert ["wrong" in row for row in rows] == [False, False, False, True]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("nothing.mp4", "which is no file"), ("text.mp4", "expected a video"), ("short.avi", "at least 4")],
)
def test_demo_says_what_is_wrong_with_the_video(tmp_path, capsys, name, expected):
    (tmp_path / "text.mp4").write_text("no video\n" * 300)
    write_video(tmp_path / "short.avi", frames=3)
    assert main(["demo", "--video", str(tmp_path / name), "--out", str(tmp_path / "out"), *TINY]) == 1
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bench(capsys):
    arguments = [
        "--batch",
        "4",
        "--clip",
        "4",
        "64",
        "64",
        "--classes",
        "8",
        "--flow",
        "--repeats",
        "1",
        "--passes",
        "infer",
    ]
    assert main(["bench", "p3d63", *arguments, "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "p3d63 (author), 4 clips of 4 x 64 x 64, float32" in said
    assert len([line for line in said.splitlines() if line.startswith("infer")]) == 2


def test_features(path, tmp_path, capsys):
    torch.manual_seed(0)
    model = models.P3D((1, 1, 1, 1), 7, wiring="port").eval()  # another number of classes: fc does not matter
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    out = tmp_path / "pool5.npy"
    options = ["--checkpoint", str(tmp_path / "weights.pth"), "--net", "p3d63", "--wiring", "port", "--out", str(out)]
    sizes = ["--clips", "3", "--frames", "4", "--size", "32", "--device", "cpu"]
    assert main(["features", str(path), str(path), *options, *sizes, "--batch", "2"]) == 0
    assert "float32 [2, 2048]" in capsys.readouterr().out
    found = np.load(out)
    assert found.shape == (2, 2048) and found.dtype == np.float32
    np.testing.assert_array_equal(found[0], found[1])

    from p3d_kernels.video import read_video, spread_clips

    frames = read_video(path, size=36)[:, 2:34, 2:34]
    x = models.normalise(torch.from_numpy(spread_clips(frames, 3, 4)), "port")
    with torch.no_grad():
        want = model.features(x).mean(0)
    np.testing.assert_allclose(found[0], want, rtol=1e-4, atol=1e-5)


def test_features_of_a_bad_checkpoint(path, tmp_path, capsys):
    (tmp_path / "weights.pth").write_bytes(b"no checkpoint")
    out = tmp_path / "pool5.npy"
    options = ["--checkpoint", str(tmp_path / "weights.pth"), "--out", str(out)]
    assert main(["features", str(path), *options, "--net", "p3d63"]) == 1
    assert capsys.readouterr().err.startswith("features: ") and not out.exists()
