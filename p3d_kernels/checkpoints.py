"""Load the weights that exist for P3D: the port's files, the author's Caffe blobs, a 2-D ResNet to inflate."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import check_choice

SOURCES = ("port", "author", "resnet2d")
TEMPORAL_INITS = ("gaussian", "zero", "dirac")


@dataclasses.dataclass
class LoadReport:
    """What `load_checkpoint` did, by parameter and buffer name of the model.

    Args:
        source: the layout found: "port", "author" or "resnet2d".
        reads: the input the weights were made for, "author" (BGR) or "port" (RGB): `models.normalise(frames, reads)`.
        loaded: filled from the checkpoint.
        initialised: not in a 2-D checkpoint, given a start (T and its normalisation).
        kept: left as they were: fc under `skip_fc`, `num_batches_tracked`, and what `strict=False` let be missing.
        unused: entries of the checkpoint that have no place in the model.
    """

    source: str
    reads: str
    loaded: list[str] = dataclasses.field(default_factory=list)
    initialised: list[str] = dataclasses.field(default_factory=list)
    kept: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{len(getattr(self, f))} {f}" for f in ("loaded", "initialised", "kept", "unused"))
        return f"{self.source} checkpoint: {counts}; feed it models.normalise(frames, {self.reads!r})"


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike | Mapping,
    source: str | None = None,
    temporal_init: str = "gaussian",
    strict: bool = True,
    skip_fc: bool = False,
) -> LoadReport:
    """Fill a P3D net with a checkpoint. Everything is checked before anything is copied: on an error nothing changed.

    Layouts, told apart by their keys:

    - "port": a state dict with the PyTorch port's names, which are ours too; bare, or under `state_dict`, or with the
      prefix `module.`; may lack `num_batches_tracked`.
    - "author": the author's Caffe blobs by layer name, {"conv1": [w], "bn_conv1": [slope, bias, mean, var], ...,
      "fc_kinetics": [w, b]}. In an .npz file the blobs of a layer are `name/0`, `name/1`, ... A layer of one blob may
      stand bare. Its conv1 reads BGR, as `wiring="author"` nets do, and is copied as it is; the weights mean
      what they should in that wiring only, and another one is warned of.
    - "resnet2d": torchvision's names of a 2-D ResNet-50, 101 or 152, inflated: S and the 1x1x1 get a frame axis, and T,
      which has no source, `temporal_init`, its normalisation weight 1 and bias 0. conv1 is copied as it is, so the
      net reads RGB with ImageNet mean and std, whatever its wiring (`LoadReport.reads`). For another number of input
      channels (flow), each gets the mean of conv1 over RGB. torchvision strides on conv2 and P3D on conv1.

    Args:
        model: a `P3D`, `PlainP3D`, the port's net, or one of them wrapped (`module.`).
        checkpoint: a file that `torch.load(weights_only=True)` reads, an .npz file of blobs, or the dict itself.
        source: the layout, where it should not be guessed.
        temporal_init: of T when inflating: "gaussian" (std 0.001), "zero" or "dirac" (identity).
        strict: raise for missing and unexpected keys; if False report them. Shapes must fit either way.
        skip_fc: leave fc as it is, for another number of classes.

    Returns:
        LoadReport: what was loaded, initialised, kept and unused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or no checkpoint; the layout is unknown; keys are missing or unexpected;
            shapes differ (key, expected, got); the checkpoint is of another net.
        TypeError: `model` is no P3D net, or `checkpoint` neither path nor mapping.
    """
    if source is not None:
        check_choice("source", source, SOURCES)
    check_choice("temporal_init", temporal_init, TEMPORAL_INITS)
    target = _target(model)
    entries = _flat(_read(checkpoint))
    source = source or _detect(entries)
    report = LoadReport(source, "author" if source == "author" else "port")

    if source == "port":
        found = entries
    elif source == "author":
        found = _from_blobs(entries, target)
    else:
        found = _from_resnet2d(entries, target)
    if skip_fc:
        found = {key: value for key, value in found.items() if not key.startswith("fc.")}

    problems, copies = _match(found, target, report, strict, skip_fc, inflating=source == "resnet2d")
    if problems:
        raise ValueError(_explain(problems, found, target, source))
    wirings = {m.wiring for m in model.modules() if getattr(m, "kind", None) in ("B", "C") and hasattr(m, "wiring")}
    if source == "author" and "port" in wirings:
        warnings.warn(
            'the author\'s weights are for wiring="author": in wiring="port" blocks B and C compute something else, '
            "and the input is another",
            stacklevel=2,
        )
    with torch.no_grad():
        for key, value in copies.items():
            target[key].copy_(value)
        for key in report.initialised:
            _initialise(key, target[key], temporal_init)
    return report


def _target(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers by the port's names; the tensors share the model's storage."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    target = {_bare(key): value for key, value in model.state_dict().items()}
    if "conv1_custom.weight" not in target or "layer1.0.conv1.weight" not in target:
        raise TypeError(f"model: expected a P3D net (with a layer conv1_custom, ...), got {type(model).__name__}")
    return target


def _bare(key: str) -> str:
    """A name without the prefixes of DataParallel and torch.compile."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", key)


# --- reading -------------------------------------------------------------------------------------------------------


def _read(checkpoint: str | os.PathLike | Mapping) -> Mapping:
    if isinstance(checkpoint, Mapping):
        return checkpoint
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"checkpoint: expected a path or a mapping, got {type(checkpoint).__name__}")
    return read_file("checkpoint", checkpoint)


def read_file(name: str, path: str | os.PathLike) -> Mapping:
    """The dict of tensors in a file of torch.save or numpy.savez; `name` is the argument that errors speak of."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no file {str(path)!r}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        data = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can fail anywhere inside the readers
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{name}: {str(path)!r} is truncated or no checkpoint of tensors ({reason})") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"{name}: expected {str(path)!r} to hold a dict, got {type(data).__name__}")
    return data


def _flat(data: Mapping) -> dict[str, object]:
    """The entries by bare name: out of `state_dict`, without `module.`, blobs as `name/0`, `name/1`, ..."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(data.get(key), Mapping):
            data = data[key]
            break
    flat = {}
    for key, value in data.items():
        key = _bare(str(key))
        if isinstance(value, (list, tuple)):
            flat |= {f"{key}/{i}": blob for i, blob in enumerate(value)}
        else:
            flat[key] = value
    return flat


def _detect(entries: dict[str, object]) -> str:
    if "conv1_custom.weight" in entries:
        return "port"
    if any(_BLOB.fullmatch(key.partition("/")[0]) for key in entries):
        return "author"
    if "conv1.weight" in entries and "layer1.0.conv1.weight" in entries:
        return "resnet2d"
    names = ", ".join(list(entries)[:4]) or "nothing"
    raise ValueError(
        "checkpoint: expected the port's names (conv1_custom.weight), the author's (res2a_branch2a) or a 2-D ResNet's "
        f"(conv1.weight, layer1.0.conv1.weight), got {names}{', ...' if len(entries) > 4 else ''}"
    )


# --- layouts to the port's names -----------------------------------------------------------------------------------

_BLOB = re.compile(r"(res|bn)(\d)([a-z])(\d*)_branch(1|2a|2b_t|2b|2c)")
_BRANCHES = {  # branch: (convolution, normalisation)
    "1": ("downsample.0", "downsample.1"),
    "2a": ("conv1", "bn1"),
    "2b": ("conv2", "bn2"),
    "2b_t": ("conv3", "bn3"),
    "2c": ("conv4", "bn4"),
}


def _caffe_layer(name: str) -> str | None:
    """A Caffe layer's name in ours: `res3b1_branch2a` to `layer2.1.conv1`; None if there is no such layer."""
    if name in ("conv1", "bn_conv1"):
        return {"conv1": "conv1_custom", "bn_conv1": "bn1"}[name]
    if re.fullmatch(r"fc(_\w+)?", name):
        return "fc"
    match = _BLOB.fullmatch(name)
    if match is None:
        return None
    role, stage, letter, number, branch = match.groups()
    layer = _BRANCHES[branch][role == "bn"]
    if (stage, branch) == ("5", "2b"):
        layer = "bn_normal" if role == "bn" else "conv_normal"
    block = int(number) if number else ord(letter) - ord("a")  # 3a, 3b1, 3b2, ... or 3a, 3b, 3c, ...
    return f"layer{int(stage) - 1}.{block}.{layer}"


def _from_blobs(entries: dict[str, object], target: dict[str, Tensor]) -> dict[str, object]:
    """Caffe blobs by our names. Names that are not the author's stay as they are: unexpected keys."""
    found = {}
    for key, value in entries.items():
        name, _, blob = key.partition("/")
        layer = _caffe_layer(name)
        is_bn = name.startswith("bn")
        fields = ("weight", "bias", "running_mean", "running_var") if is_bn else ("weight", "bias")
        if is_bn and not blob and getattr(value, "shape", ())[:1] == (4,):  # the four of them in one array [4, C]
            blobs = dict(enumerate(value))
        else:
            blobs = {int(blob) if blob.isdecimal() else 0: value}
        for i, array in blobs.items():
            if layer is None or i >= len(fields):
                found[key] = array
            else:
                field = f"{layer}.{fields[i]}"
                found[field] = _without_ones(array, target.get(field))
    return found


def _without_ones(array: object, wanted: Tensor | None) -> object:
    """Caffe pads shapes with leading ones ([1, C]); take them off where the model has none."""
    shape = getattr(array, "shape", ())
    if wanted is not None and len(shape) > wanted.dim() and set(shape[: len(shape) - wanted.dim()]) == {1}:
        return array.reshape(tuple(shape[len(shape) - wanted.dim() :]))
    return array


def _from_resnet2d(entries: dict[str, object], target: dict[str, Tensor]) -> dict[str, object]:
    """torchvision names to ours, kernels with a frame axis where ours have one."""
    found = {}
    for key, value in entries.items():
        name = re.sub(r"^conv1\.", "conv1_custom.", key)
        name = re.sub(r"^(layer\d\.\d+)\.(conv|bn)3\.", r"\1.\g<2>4.", name)
        name = re.sub(r"^(layer4\.\d+)\.(conv|bn)2\.", r"\1.\2_normal.", name)
        wanted = target.get(name)
        if isinstance(value, Tensor) and wanted is not None and value.dim() == 4 and wanted.dim() == 5:
            value = value.unsqueeze(2)
            if name == "conv1_custom.weight" and value.size(1) == 3 != wanted.size(1):
                value = value.mean(1, keepdim=True).expand(-1, wanted.size(1), -1, -1, -1)
        found[name] = value
    return found


# --- checking and copying ------------------------------------------------------------------------------------------


def _match(
    found: dict[str, object],
    target: dict[str, Tensor],
    report: LoadReport,
    strict: bool,
    skip_fc: bool,
    inflating: bool,
) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
    """(problems by kind, values to copy); fills the report."""
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "shape": [], "type": []}
    copies = {}
    for key, wanted in target.items():
        if key not in found:
            if inflating and re.match(r"layer[1-3]\.\d+\.(conv|bn)3\.", key):
                report.initialised.append(key)
                continue
            report.kept.append(key)
            if not key.endswith("num_batches_tracked") and not (skip_fc and key.startswith("fc.")):
                problems["missing"].append(key)
            continue
        value = found[key]
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiu":
            value = torch.from_numpy(np.array(value))
        if not isinstance(value, Tensor):
            problems["type"].append(f"{key}: expected a tensor, got {type(value).__name__}")
        elif value.shape != wanted.shape:
            problems["shape"].append(f"{key}: expected {list(wanted.shape)}, got {list(value.shape)}")
        else:
            copies[key] = value
            report.loaded.append(key)
    report.unused = [key for key in found if key not in target]
    problems["unexpected"] = list(report.unused)
    if not strict:
        problems["missing"], problems["unexpected"] = [], []
    return {kind: lines for kind, lines in problems.items() if lines}, copies


def _initialise(key: str, tensor: Tensor, temporal_init: str) -> None:
    """The start of T (`conv3`) and its normalisation (`bn3`), which a 2-D net lacks."""
    field = key.rpartition(".")[2]
    if ".bn3." in key:
        tensor.fill_(1.0 if field in ("weight", "running_var") else 0)
    elif temporal_init == "gaussian":
        nn.init.normal_(tensor, std=0.001)
    elif temporal_init == "zero":
        nn.init.zeros_(tensor)
    else:
        nn.init.dirac_(tensor)


def _depths(keys: Mapping) -> tuple[int, ...]:
    """Blocks of stages 1 to 4, read off the names."""
    seen = {m.groups() for key in keys if (m := re.match(r"layer([1-4])\.(\d+)\.", key))}
    return tuple(sum(stage == str(s) for stage, _ in seen) for s in (1, 2, 3, 4))


def _explain(problems: dict[str, list[str]], found: Mapping, target: Mapping, source: str) -> str:
    lines = [f"checkpoint: a {source} checkpoint that does not fit the model; nothing was changed"]
    theirs, ours = _depths(found), _depths(target)
    if theirs != ours:
        lines.append(f"  it is of another net: expected stages of {ours} blocks, got {theirs}")
    titles = {"missing": "missing keys", "unexpected": "unexpected keys", "shape": "other shapes", "type": "no tensors"}
    for kind, entries in problems.items():
        rest = [f"and {len(entries) - 6} more"] if len(entries) > 6 else []
        lines.append(f"  {len(entries)} {titles[kind]}: " + "; ".join(entries[:6] + rest))
    if any(entry.startswith("fc.") for entries in problems.values() for entry in entries):
        lines.append("  pass skip_fc=True to keep the model's own fc (another number of classes)")
    return "\n".join(lines)
