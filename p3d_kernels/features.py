"""`python -m p3d_kernels features`: videos to vectors. 20 clips a video, pool5 averaged (Qiu et al., section 4.4)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import models
from ._timing import Progress
from .video import read_video, spread_clips

MARGIN = 182 / 160  # the paper scales frames to 182 pixels and reads 160 of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("videos", nargs="+", metavar="VIDEO", type=Path)
    parser.add_argument("--checkpoint", required=True, type=Path, help="weights: port, author or 2-D ResNet layout")
    parser.add_argument("--out", required=True, type=Path, help="file for the float32 array [videos, 2048] (.npy)")
    parser.add_argument("--net", default="p3d199", choices=tuple(models.DEPTHS))
    parser.add_argument("--wiring", default="author", choices=("author", "port"), help="of the net the weights are for")
    parser.add_argument("--clips", type=int, default=20, help="clips a video, spread evenly (default 20)")
    parser.add_argument("--frames", type=int, default=16, help="frames a clip (default 16)")
    parser.add_argument("--size", type=int, default=160, help="pixels a side (default 160)")
    parser.add_argument("--batch", type=int, default=20, help="clips at a time (default 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def video_features(
    model: torch.nn.Module,
    frames: np.ndarray,  # [T, H, W, 3]
    *,
    clips: int = 20,
    length: int = 16,
    reads: str = "author",
    batch: int = 20,
) -> Tensor:
    """pool5 of one video: the mean of `model.features` over `clips` clips of `length` frames, spread evenly.

    Args:
        model: a P3D in eval mode; its device is used.
        frames: uint8 [T, H, W, 3], RGB, H and W as the net shall read them.
        reads: the preprocessing that the weights were made for (`models.normalise`, `LoadReport.reads`).
        batch: clips at a time.

    Returns: float32 [2048].
    """
    cut = spread_clips(frames, clips, length)
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, len(cut), batch):
        x = models.normalise(torch.from_numpy(cut[start : start + batch]).to(device), reads)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total = total + model.features(x).double().sum(0)
    return (total / len(cut)).float()


def main(args: argparse.Namespace) -> int:
    from .checkpoints import load_checkpoint

    try:
        model = getattr(models, args.net)(wiring=args.wiring)
        report = load_checkpoint(model, args.checkpoint, skip_fc=True)
        model = model.eval().to(args.device)
        scaled = round(args.size * MARGIN)
        edge = (scaled - args.size) // 2
        rows = []
        with Progress(len(args.videos)) as bar:
            for path in args.videos:
                bar(path.name)
                frames = read_video(path, size=scaled)[:, edge : edge + args.size, edge : edge + args.size]
                options = {"clips": args.clips, "length": args.frames, "reads": report.reads, "batch": args.batch}
                rows.append(video_features(model, frames, **options).cpu().numpy())
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"features: {error}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("wb") as file:  # np.save would append .npy to another name
        np.save(file, np.stack(rows))
    print(report)
    print(f"{args.out}: float32 [{len(rows)}, {rows[0].size}], {args.net} ({args.wiring}), {args.clips} clips a video")
    return 0
