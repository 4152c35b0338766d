"""`load_checkpoint` on made files of exactly the key sets and shapes that exist."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from p3d_kernels import models, use_backend
from p3d_kernels.accelerate import accelerate
from p3d_kernels.checkpoints import LoadReport, load_checkpoint
from p3d_kernels.models import P3D, PlainP3D

BN = ("weight", "bias", "running_mean", "running_var")
TINY = (1, 1, 1, 1)


class Values:
    """Tensors of given shapes, each filled with a number of its own, that take no memory."""

    def __init__(self, dtype=torch.float32):
        self.count, self.dtype = 0, dtype

    def __call__(self, *shape):
        self.count += 1
        return torch.tensor(float(self.count), dtype=self.dtype).expand(shape)


def port_layout(depths, classes=400, channels=3):
    """The PyTorch port's state dict, without `num_batches_tracked`."""
    make, state = Values(), {}

    def conv(name, *shape):
        state[f"{name}.weight"] = make(*shape)

    def bn(name, c):
        state.update({f"{name}.{field}": make(c) for field in BN})

    conv("conv1_custom", 64, channels, 1, 7, 7), bn("bn1", 64)
    inputs = 64
    for stage, depth in enumerate(depths):
        m, one = 64 * 2**stage, (1, 1, 1) if stage < 3 else (1, 1)
        for i in range(depth):
            block = f"layer{stage + 1}.{i}"
            if i == 0:
                conv(f"{block}.downsample.0", 4 * m, inputs, *one), bn(f"{block}.downsample.1", 4 * m)
            conv(f"{block}.conv1", m, inputs, *one), bn(f"{block}.bn1", m)
            if stage < 3:
                conv(f"{block}.conv2", m, m, 1, 3, 3), bn(f"{block}.bn2", m)
                conv(f"{block}.conv3", m, m, 3, 1, 1), bn(f"{block}.bn3", m)
            else:
                conv(f"{block}.conv_normal", m, m, 3, 3), bn(f"{block}.bn_normal", m)
            conv(f"{block}.conv4", 4 * m, m, *one), bn(f"{block}.bn4", 4 * m)
            inputs = 4 * m
    state["fc.weight"], state["fc.bias"] = make(classes, 2048), make(classes)
    return state


def caffe_layout(depths, classes=400, channels=3, fc="fc_kinetics"):
    """The author's blobs by layer name, as Caffe shapes them, and the port's name of each."""
    make, blobs, names = Values(), {}, {}

    def conv(caffe, ours, *shape):
        blobs[caffe], names[caffe] = [make(*shape).numpy()], ours

    def bn(caffe, ours, c):
        blobs[caffe], names[caffe] = [make(1, c).numpy() for _ in BN], ours

    conv("conv1", "conv1_custom", 64, channels, 1, 7, 7), bn("bn_conv1", "bn1", 64)
    inputs = 64
    for stage, depth in enumerate(depths):
        m, one = 64 * 2**stage, (1, 1, 1) if stage < 3 else (1, 1)
        for i in range(depth):
            letters = "abc"[i] if stage in (0, 3) else f"b{i}" if i else "a"
            caffe, ours = f"{stage + 2}{letters}_branch", f"layer{stage + 1}.{i}"

            def pair(branch, number, *shape, caffe=caffe, ours=ours):
                conv(f"res{caffe}{branch}", f"{ours}.{number[0]}", *shape)
                bn(f"bn{caffe}{branch}", f"{ours}.{number[1]}", shape[0])

            if i == 0:
                pair("1", ("downsample.0", "downsample.1"), 4 * m, inputs, *one)
            pair("2a", ("conv1", "bn1"), m, inputs, *one)
            if stage < 3:
                pair("2b", ("conv2", "bn2"), m, m, 1, 3, 3)
                pair("2b_t", ("conv3", "bn3"), m, m, 3, 1, 1)
            else:
                pair("2b", ("conv_normal", "bn_normal"), m, m, 3, 3)
            pair("2c", ("conv4", "bn4"), 4 * m, m, *one)
            inputs = 4 * m
    blobs[fc], names[fc] = [make(classes, 2048).numpy(), make(classes).numpy()], "fc"
    return blobs, names


def resnet_layout(depths, classes=1000):
    """torchvision's state dict of a 2-D bottleneck ResNet."""
    make, state = Values(), {}

    def pair(conv, bn, *shape):
        state[f"{conv}.weight"] = make(*shape)
        state.update({f"{bn}.{field}": make(shape[0]) for field in BN})
        state[f"{bn}.num_batches_tracked"] = torch.tensor(7)

    pair("conv1", "bn1", 64, 3, 7, 7)
    inputs = 64
    for stage, depth in enumerate(depths):
        m = 64 * 2**stage
        for i in range(depth):
            block = f"layer{stage + 1}.{i}"
            pair(f"{block}.conv1", f"{block}.bn1", m, inputs, 1, 1)
            pair(f"{block}.conv2", f"{block}.bn2", m, m, 3, 3)
            pair(f"{block}.conv3", f"{block}.bn3", 4 * m, m, 1, 1)
            if i == 0:
                pair(f"{block}.downsample.0", f"{block}.downsample.1", 4 * m, inputs, 1, 1)
            inputs = 4 * m
    state["fc.weight"], state["fc.bias"] = make(classes, 2048), make(classes)
    return state


def same(net, expected):
    """Every entry of `expected` is in the net, value for value."""
    state = net.state_dict()
    for key, value in expected.items():
        assert torch.equal(state[key], torch.as_tensor(value).reshape(state[key].shape)), key


def snapshot(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


# --- port ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
def test_port_p3d199_file(prefix, tmp_path):
    state = port_layout((3, 8, 36, 3))
    path = tmp_path / "p3d_rgb_199.checkpoint.pth.tar"
    torch.save({"epoch": 3, "arch": "p3d", "state_dict": {prefix + k: v for k, v in state.items()}}, path)
    net = models.p3d199(wiring="port")
    counters = [k for k in net.state_dict() if k.endswith("num_batches_tracked")]
    assert set(net.state_dict()) == {*state, *counters}
    report = load_checkpoint(net, path)
    same(net, state)
    assert report == LoadReport("port", "port", loaded=report.loaded, kept=counters)
    assert set(report.loaded) == set(state) and "port checkpoint" in str(report)


@pytest.mark.parametrize("legacy", [False, True])
def test_bare_state_dict_of_ours_and_legacy_files(legacy, tmp_path):
    source, net = P3D(TINY, 7), PlainP3D(TINY, 7)
    torch.save(source.state_dict(), tmp_path / "net.pt", _use_new_zipfile_serialization=not legacy)
    assert not load_checkpoint(net, tmp_path / "net.pt").kept
    same(net, source.state_dict())


def test_into_a_wrapped_net_and_in_half():
    state = port_layout(TINY)
    net = P3D(TINY).half()
    load_checkpoint(nn.DataParallel(net), state)
    assert net.conv1_custom.weight.dtype == torch.float16 and net.conv1_custom.weight.flatten()[0] == 1


# --- author ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lists", "arrays", "npz"])
def test_author_blobs(form, tmp_path):
    blobs, names = caffe_layout((3, 8, 36, 3))
    if form == "arrays":  # a bare array a convolution, one [4, C] a normalisation
        data = {k: v[0] if len(v) == 1 else np.concatenate(v) if len(v) == 4 else v for k, v in blobs.items()}
    elif form == "npz":
        blobs, names = caffe_layout(TINY)  # npz holds every value
        data = tmp_path / "p3d.npz"
        np.savez(data, **{f"{name}/{i}": blob for name, value in blobs.items() for i, blob in enumerate(value)})
    else:
        data = blobs
    net = P3D(TINY) if form == "npz" else models.p3d199()
    report = load_checkpoint(net, data)
    assert (report.source, report.reads, report.unused) == ("author", "author", [])
    assert all(key.endswith("num_batches_tracked") for key in report.kept)
    for name, value in blobs.items():
        fields = BN if name.startswith("bn") else ("weight", "bias")
        same(net, {f"{names[name]}.{field}": blob for field, blob in zip(fields, value, strict=False)})


def test_author_flow_and_sports1m():
    blobs, _ = caffe_layout(TINY, classes=487, channels=2, fc="fc_sports1m")
    net = P3D(TINY, 487, modality="flow")
    assert load_checkpoint(net, blobs).source == "author"
    assert net.fc.weight.shape == (487, 2048)


def test_author_blobs_in_the_other_wiring_are_warned_of():
    with pytest.warns(UserWarning, match='wiring="author"'):
        load_checkpoint(P3D(TINY, wiring="port"), caffe_layout(TINY)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(accelerate(PlainP3D(TINY)), caffe_layout(TINY)[0])


# --- 2-D ResNet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "resnet, name", [((3, 4, 6, 3), "p3d63"), ((3, 4, 23, 3), "p3d131"), ((3, 8, 36, 3), "p3d199")]
)
def test_inflate(resnet, name):
    state, net = resnet_layout(resnet), getattr(models, name)(1000)
    report = load_checkpoint(net, state)
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^conv1\.", "conv1_custom.", key)
        key = key.replace(".conv3.", ".conv4.").replace(".bn3.", ".bn4.")
        if key.startswith("layer4"):
            key = key.replace(".conv2.", ".conv_normal.").replace(".bn2.", ".bn_normal.")
        renamed[key] = value
    same(net, renamed)
    blocks = sum(resnet[:3])
    assert (report.source, report.reads, report.unused) == ("resnet2d", "port", [])
    assert len(report.initialised) == 6 * blocks and set(report.loaded) == set(renamed)
    t = torch.cat([p.flatten() for k, p in net.named_parameters() if k.endswith("conv3.weight")])
    assert abs(t.mean()) < 1e-5 and abs(t.std() - 1e-3) < 1e-5


def test_temporal_starts():
    state = resnet_layout(TINY)
    for start in ("zero", "dirac"):
        net = P3D(TINY, 1000)
        nn.init.constant_(net.layer1[0].bn3.running_var, 5.0)
        load_checkpoint(net, state, temporal_init=start)
        conv, x = net.layer1[0].conv3, torch.randn(1, 64, 4, 3, 3)
        with use_backend("aten"):
            torch.testing.assert_close(conv(x), x if start == "dirac" else 0 * x)
        bn = net.layer1[0].bn3
        assert [bn.weight.mean(), bn.bias.mean(), bn.running_mean.mean(), bn.running_var.mean()] == [1, 0, 0, 1]


def test_inflated_net_computes_what_the_2d_net_computes():
    """With T an identity and normalisations that pass non-negative values, a block of kind A is the 2-D block."""
    state = {k: torch.randn(v.shape) * 0.05 if v.dim() == 4 else v for k, v in resnet_layout(TINY).items()}
    for key in state:
        if "bn" in key or "downsample.1" in key:
            state[key] = torch.full_like(state[key], 0 if key.endswith(("bias", "mean")) else 1)
    net = P3D(TINY, 1000).eval()
    load_checkpoint(net, state, temporal_init="dirac")
    x = torch.randn(2, 64, 3, 6, 5)
    frames = x.transpose(1, 2).flatten(0, 1)

    def conv(name, value, **how):
        return nn.functional.conv2d(value, state[f"layer1.0.{name}.weight"], **how) / (1 + 1e-5) ** 0.5

    y = conv("conv2", conv("conv1", frames).relu(), padding=1).relu() / (1 + 1e-5) ** 0.5
    want = (conv("conv3", y) + conv("downsample.0", frames)).relu()
    with use_backend("aten"):
        torch.testing.assert_close(net.layer1[0](x).transpose(1, 2).flatten(0, 1), want, atol=1e-5, rtol=1e-5)


def test_flow_conv1_is_the_mean_over_rgb():
    state = resnet_layout(TINY)
    state["conv1.weight"] = torch.randn(64, 3, 7, 7)
    net = P3D(TINY, 1000, modality="flow")
    load_checkpoint(net, state)
    for channel in range(2):
        torch.testing.assert_close(net.conv1_custom.weight[:, channel, 0], state["conv1.weight"].mean(1))


# --- errors ----------------------------------------------------------------------------------------------------------


def _drop(state):
    del state["layer2.0.conv3.weight"]


def _add(state):
    state["layer2.0.conv9.weight"] = torch.zeros(1)


def _reshape(state):
    state["layer2.0.conv3.weight"] = torch.zeros(128, 128, 1, 3, 3)


def _no_tensor(state):
    state["bn1.bias"] = "zeros"


@pytest.mark.parametrize(
    "change, message",
    [
        (_drop, "1 missing keys: layer2.0.conv3.weight"),
        (_add, "1 unexpected keys: layer2.0.conv9.weight"),
        (_reshape, "layer2.0.conv3.weight: expected [128, 128, 3, 1, 1], got [128, 128, 1, 3, 3]"),
        (_no_tensor, "bn1.bias: expected a tensor, got str"),
    ],
)
def test_a_misfit_changes_nothing(change, message):
    net, state = P3D(TINY), port_layout(TINY)
    before = snapshot(net)
    change(state)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_checkpoint(net, state)
    assert "nothing was changed" in str(error.value)
    same(net, before)


def test_not_strict():
    net, state = P3D(TINY), port_layout(TINY)
    _drop(state), _add(state)
    before = snapshot(net)
    report = load_checkpoint(net, state, strict=False)
    assert "layer2.0.conv3.weight" in report.kept and report.unused == ["layer2.0.conv9.weight"]
    same(net, {"layer2.0.conv3.weight": before["layer2.0.conv3.weight"], "bn1.bias": state["bn1.bias"]})
    _reshape(state)
    with pytest.raises(ValueError, match="other shapes"):
        load_checkpoint(net, state, strict=False)


def test_another_net():
    net = models.p3d63()
    before = snapshot(net)
    with pytest.raises(ValueError, match=re.escape("expected stages of (3, 4, 6, 3) blocks, got (3, 8, 36, 3)")):
        load_checkpoint(net, port_layout((3, 8, 36, 3)))
    with pytest.raises(ValueError, match=re.escape("expected stages of (3, 4, 6, 3) blocks, got (3, 8, 36, 3)")):
        load_checkpoint(net, caffe_layout((3, 8, 36, 3))[0])
    with pytest.raises(ValueError, match="got stem.0.weight, stem.1.weight"):
        load_checkpoint(net, {"stem.0.weight": torch.zeros(45, 3, 1, 7, 7), "stem.1.weight": torch.zeros(45)})
    with pytest.raises(ValueError, match="expected the port's names .* got nothing"):
        load_checkpoint(net, {})
    basic = {k: v for k, v in resnet_layout((3, 4, 6, 3)).items() if "conv3" not in k and "bn3" not in k}
    with pytest.raises(ValueError, match="missing keys: layer1.0.conv4.weight"):
        load_checkpoint(net, basic, skip_fc=True)
    with pytest.raises(ValueError, match=re.escape("conv1_custom.weight: expected [64, 2, 1, 7, 7], got [64, 3,")):
        load_checkpoint(P3D(TINY, modality="flow"), port_layout(TINY))
    same(net, before)


@pytest.mark.parametrize("make", [port_layout, resnet_layout, lambda *a: caffe_layout(*a)[0]])
def test_another_number_of_classes(make):
    net = P3D(TINY, 101)
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"fc.weight: expected \[101, 2048\], got \[\d+, 2048\](.|\n)*skip_fc=True"):
        load_checkpoint(net, make(TINY))
    same(net, before)
    report = load_checkpoint(net, make(TINY), skip_fc=True)
    same(net, {key: before[key] for key in ("fc.weight", "fc.bias")})
    assert {"fc.weight", "fc.bias"} <= set(report.kept) and "bn1.weight" in report.loaded


def test_damaged_files(tmp_path):
    net = P3D(TINY)
    before = snapshot(net)
    whole = tmp_path / "whole.pt"
    torch.save(net.state_dict(), whole)
    damaged = {
        "truncated.pt": whole.read_bytes()[: whole.stat().st_size // 2],
        "text.pt": b"not a checkpoint",
        "empty.pt": b"",
        "text.npz": b"not an archive",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}' is truncated or no checkpoint"):
            load_checkpoint(net, tmp_path / name)
    torch.save({"state_dict": Values}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="code.pt' is truncated or no checkpoint of tensors"):
        load_checkpoint(net, str(tmp_path / "code.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt' to hold a dict, got list"):
        load_checkpoint(net, tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="missing.pt"):
        load_checkpoint(net, tmp_path / "missing.pt")
    same(net, before)


def test_bad_arguments():
    state = port_layout(TINY)
    with pytest.raises(TypeError, match="model: expected a P3D net .* got Linear"):
        load_checkpoint(nn.Linear(2, 2), state)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        load_checkpoint(3, state)
    with pytest.raises(TypeError, match="checkpoint: expected a path or a mapping, got int"):
        load_checkpoint(P3D(TINY), 3)
    with pytest.raises(ValueError, match="source: expected one of .* got 'keras'"):
        load_checkpoint(P3D(TINY), state, source="keras")
    with pytest.raises(ValueError, match="temporal_init: expected one of .* got 'ones'"):
        load_checkpoint(P3D(TINY), state, temporal_init="ones")
