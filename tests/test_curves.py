"""The training curves: what a label means, and when they agree."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks import curves
from p3d_kernels import models
from videos import needs_decoder, write_video


def test_a_label_is_a_speed_and_a_direction():
    steps = torch.arange(64, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3)
    seen = set()
    for x, labels in curves.batches(steps, 12, 4, 3, 8, seed=0):
        frames = x * torch.tensor(models.input_spec(curves.WIRING).std).view(1, 3, 1, 1, 1)
        for clip, label in zip(frames[:, 0, :, 0, 0], labels.tolist(), strict=True):
            sign = -1 if label % 2 else 1
            assert clip.diff().round().tolist() == [sign * curves.SPEEDS[label // 2]] * 2
            seen.add(label)
    assert seen == set(range(curves.CLASSES))
    again = [next(curves.batches(steps, 1, 4, 3, 8, seed=s))[0] for s in (0, 0, 1)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_verdict():
    fall = torch.linspace(2, 1, 100)
    plain = [(fall + shift).tolist() for shift in (0.0, 0.1, -0.1)]
    found = curves.verdict(plain, (fall + 0.05).tolist())
    assert found["apart"] == pytest.approx((0.05 + 0.05 + 0.15) / 3)
    assert found["spread"] == pytest.approx((0.1 + 0.1 + 0.2) / 3)
    assert found["last"] < found["first"]
    assert curves.verdict(plain, (fall + 0.15).tolist())["apart"] > found["spread"]


@needs_decoder
def test_a_toy_run(tmp_path, capsys):
    video = write_video(tmp_path / "v.avi", frames=20, noise=True)
    arguments = f"--video {video} --depths 1 1 1 1 --steps 2 --batch 2 --frames 2 --size 16 --out {tmp_path}"
    curves.main(arguments.split())
    assert "from plain's seeds" in capsys.readouterr().out
    with open(tmp_path / "curves.csv") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 3 and len(rows[0]) == 9 and (tmp_path / "curves.png").stat().st_size > 1000
