"""`python -m p3d_kernels bench`: one's own shapes through a P3D net, plain PyTorch beside these kernels.

For the installed package. The repository's `benchmarks/` has the stronger rivals, single ops and CUDA graphs.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from . import models
from ._judge import Step, WrongAnswer, arranged, errors, exact_float32, judge, season
from ._timing import Progress, measure, table
from .freeze import freeze

PLAIN, OURS = "plain PyTorch", "p3d_kernels"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def versus(
    net: str,
    x: Tensor,  # [N, C, T, H, W], float32
    labels: Tensor,  # [N], int64
    *,
    wiring: str = "port",
    passes: tuple[str, ...] = ("infer", "train"),
    dtype: torch.dtype = torch.float32,
    classes: int = 400,
    repeats: int = 20,
    progress: Callable[[str], None] = lambda what: None,
) -> list[dict]:
    """Judge and time a plain P3D net and ours with the same weights: one dict for each pass and implementation.

    The reference is the plain net in float32 without TF32 (on a CPU in float64). Both nets read channels_last_3d and,
    for another dtype than float32, run under autocast; for inference, ours is frozen. An answer that is off is not
    timed: its dict has the reason under "wrong". `progress` is called before each of 3 * len(passes) parts.
    """
    cuda = x.device.type == "cuda"
    modality = {3: "rgb", 2: "flow"}[x.size(1)]
    plain = models.PlainP3D(models.DEPTHS[net], classes, wiring=wiring, modality=modality, dropout=0.0).to(x.device)
    season(plain, x, dtype)
    autocast = None if dtype == torch.float32 else dtype
    x = x.contiguous(memory_format=torch.channels_last_3d)
    rows = []
    for pass_ in passes:
        target = labels if pass_ == "train" else None
        exact = torch.float32 if cuda else torch.float64

        def stepper(model: torch.nn.Module, x=x, target=target, pass_=pass_, autocast=autocast) -> Step:
            return Step(model, x, target, pass_, autocast)

        progress(f"{pass_}: reference ({str(exact).removeprefix('torch.')})")
        reference = stepper(copy.deepcopy(plain).to(exact).train(pass_ == "train"), x.to(exact), autocast=None)
        with exact_float32():
            reference()
        reference = reference.answers()
        yardstick = None
        for name in (PLAIN, OURS):
            progress(f"{pass_}: {name}")
            if name == PLAIN:
                model = arranged(copy.deepcopy(plain)).train(pass_ == "train")
            else:
                model = getattr(models, net)(classes, wiring=wiring, modality=modality, dropout=0.0).to(x.device)
                model.load_state_dict(plain.state_dict())
                model = freeze(model.eval(), dtype) if pass_ == "infer" else model.train()
            step = stepper(model)
            step()
            row = {"pass": pass_, "implementation": name}
            try:
                found = errors(step.answers(), reference)
                yardstick = yardstick or found
                row["output_error"], row["gradient_error"] = found["output"], found.get("gradients")
                judge(f"{pass_}, {name}", found, yardstick, dtype)
            except WrongAnswer as wrong:
                rows.append(row | {"wrong": str(wrong)})
                continue
            timed = measure(step, x.device, repeats, before=step.clear)
            rows.append(
                row
                | {"median_ms": timed.median_ms, "iqr_ms": timed.iqr_ms, "peak_mib": timed.peak_mib}
                | {"clips_per_s": len(x) / timed.median_ms * 1e3}
            )
            step.clear()
            del model, step
    return rows


def render(rows: list[dict]) -> str:
    """The rows of `versus` as a table, and the reasons of those that were not timed."""
    lines = []
    for row in rows:
        other = next((r for r in rows if r["pass"] == row["pass"] and r["implementation"] == PLAIN), row)
        cells = [row["pass"], row["implementation"]]
        if "wrong" in row:
            lines.append([*cells, "WRONG", *[""] * 6])
            continue
        ratios = [f"{row[k] / other[k]:.2f}" if other.get(k) else "" for k in ("median_ms", "peak_mib")]
        gradient = row["gradient_error"]
        lines.append(
            [*cells, f"{row['median_ms']:.2f}", ratios[0], f"{row['clips_per_s']:.1f}"]
            + [f"{row['peak_mib']:.0f}", ratios[1], f"{row['output_error']:.1e}"]
            + ["" if gradient is None else f"{gradient:.1e}"]
        )
    header = ["pass", "", "ms", "ratio", "clips/s", "peak MiB", "ratio", "logits off", "gradients off"]
    return "\n".join([table(header, lines), *(f"WRONG: {row['wrong']}" for row in rows if "wrong" in row)])


def device_and_dtype(dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """The GPU and bfloat16 where there is one, else the CPU and float32; `dtype` by name overrides."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return device, DTYPES[dtype or ("bfloat16" if cuda else "float32")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("net", nargs="?", default="p3d63", choices=tuple(models.DEPTHS))
    parser.add_argument("--batch", type=int, default=16 if cuda else 2)
    parser.add_argument(
        "--clip", type=int, nargs=3, metavar=("T", "H", "W"), default=(16, 160, 160) if cuda else (4, 64, 64)
    )
    parser.add_argument("--passes", nargs="+", choices=("infer", "train"), default=("infer", "train"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--wiring", choices=("author", "port"), default="author")
    parser.add_argument("--flow", action="store_true", help="2 input channels instead of 3")
    parser.add_argument("--classes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=20 if cuda else 3)


def main(args: argparse.Namespace) -> int:
    device, dtype = device_and_dtype(args.dtype)
    if device.type != "cuda":
        print("no GPU: CPU times say nothing about the kernels")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    x = torch.randn(args.batch, 2 if args.flow else 3, *args.clip, device=device)
    labels = torch.randint(args.classes, (args.batch,), device=device)
    with Progress(3 * len(args.passes)) as bar:
        rows = versus(
            args.net,
            x,
            labels,
            wiring=args.wiring,
            passes=tuple(args.passes),
            dtype=dtype,
            classes=args.classes,
            repeats=args.repeats,
            progress=bar,
        )
    t, h, w = args.clip
    print(f"{args.net} ({args.wiring}), {args.batch} clips of {t} x {h} x {w}, {str(dtype).removeprefix('torch.')}\n")
    print(render(rows))
    wrong = any("wrong" in row for row in rows)
    if wrong:
        print("bench: answers disagree", file=sys.stderr)
    return int(wrong)
