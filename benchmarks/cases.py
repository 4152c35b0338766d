"""The one table of cases: what the benchmarks time and the conformance tests check. Light to import.

The shapes are those of P3D ResNets on clips of 16 x 160 x 160 (Qiu, Yao, Mei, ICCV 2017): 8 x 40 x 40 after the stem,
then half of each after the temporal pool and the stride of the next stage.
"""

from __future__ import annotations

import dataclasses
import fnmatch

WHOLE = ("infer", "train")
NET = (*WHOLE, "finetune")
PASSES = ("infer", "train", "finetune", "fwd", "dgrad", "wgrad")
CONV = ("fwd", "dgrad", "wgrad")
CLIP = (16, 160, 160)
DEPTHS = {"p3d63": (3, 4, 6, 3), "p3d131": (3, 4, 23, 3), "p3d199": (3, 8, 36, 3)}
# stage: (middle channels, (T, H, W))
STAGES = {1: (64, (8, 40, 40)), 2: (128, (4, 20, 20)), 3: (256, (2, 10, 10)), 4: (512, (1, 5, 5))}


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time and to check, for any batch.

    Args:
        name: as written in summary.csv.
        op: a function of `p3d_kernels.ops`, or a model ("p3d63", "p3d131", "p3d199").
        passes: which of "infer", "train", "finetune" (whole steps; the last with every BN but the first frozen, as the
            paper fine-tunes) or "fwd", "dgrad", "wgrad" (one convolution) apply.
        channels: (in, out); of a bottleneck (in, middle, out); of a model (in, classes).
        size: (T, H, W) of the input.
        kind: "A", "B", "C" or "2d" of a block, else None.
        stride: spatial stride of the first convolution.
    """

    name: str
    op: str
    passes: tuple[str, ...]
    channels: tuple[int, ...]
    size: tuple[int, int, int]
    kind: str | None = None
    stride: int = 1

    def input_shape(self, batch: int) -> tuple[int, int, int, int, int]:
        """[N, C, T, H, W]."""
        return (batch, self.channels[0], *self.size)

    def toy(self) -> Case:
        """The same case small enough for a CPU: every path is walked, no time is worth anything."""
        if self.op in DEPTHS:
            return dataclasses.replace(self, channels=(self.channels[0], 8), size=(4, 64, 64))
        channels = tuple(c if c < 8 else max(c // 16, 4) for c in self.channels)
        t, h, w = self.size
        return dataclasses.replace(self, channels=channels, size=(min(t, 3), min(h, 7), min(w, 6)))


def _table() -> list[Case]:
    cases = [Case(net, net, NET, (3, 400), CLIP) for net in ("p3d63", "p3d199")]
    cases.append(Case("p3d63_224", "p3d63", ("infer",), (3, 400), (16, 224, 224)))
    cases.append(Case("stem", "stem", WHOLE, (3, 64), CLIP))
    for stage in (1, 2, 3):
        mid, size = STAGES[stage]
        where = f"stage{stage}"
        for kind in ("A", "B", "C"):
            letter, wide = kind.lower(), 4 * mid
            cases.append(Case(f"block_{letter}_{where}", "bottleneck", WHOLE, (wide, mid, wide), size, kind))
            cases.append(Case(f"pseudo3d_{letter}_{where}", "pseudo3d_conv", WHOLE, (mid, mid), size, kind))
        cases += [
            Case(f"spatial_{where}", "spatial_conv", CONV, (mid, mid), size),
            Case(f"temporal_{where}", "temporal_conv", CONV, (mid, mid), size),
            Case(f"pointwise_reduce_{where}", "pointwise_conv", CONV, (4 * mid, mid), size),
            Case(f"pointwise_expand_{where}", "pointwise_conv", CONV, (mid, 4 * mid), size),
        ]
    mid, size = STAGES[4]
    cases.append(Case("block_2d_stage4", "bottleneck", WHOLE, (4 * mid, mid, 4 * mid), size, "2d"))
    return cases


CASES: dict[str, Case] = {case.name: case for case in _table()}


def select(names: str) -> list[Case]:
    """The cases of a comma-separated list of names and patterns (block_*_stage1). ValueError for an unknown one."""
    chosen: dict[str, Case] = {}
    for name in filter(None, (n.strip() for n in names.split(","))):
        found = [case for case in CASES.values() if fnmatch.fnmatchcase(case.name, name)]
        if not found:
            raise ValueError(f"cases: expected names among {', '.join(CASES)}, got {name!r}")
        chosen.update((c.name, c) for c in found)
    return list(chosen.values())
