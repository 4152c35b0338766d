"""P3D nets against their plain PyTorch twin with the same weights."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from nets import MODES, assert_same_step, assert_same_step_float32, distance, randomise, set_mode, step
from p3d_kernels import models, ops, use_backend
from p3d_kernels.models import DEPTHS, P3D, PlainP3D
from p3d_kernels.reference import WIRINGS

SMALL = (2, 1, 1, 1)  # kinds A, B in stage 1, C, A
NETS = {"p3d63": models.p3d63, "p3d131": models.p3d131, "p3d199": models.p3d199}


@pytest.fixture(autouse=True)
def _aten(request):
    with use_backend(None if request.node.get_closest_marker("gpu") else "aten"):
        yield


def twins(depths, wiring, dtype=torch.float32, **options):
    """(ours, plain) with the same random weights and no dropout."""
    ours = randomise(P3D(depths, 9, wiring=wiring, dropout=0.0, **options)).to(dtype)
    plain = PlainP3D(depths, 9, wiring=wiring, dropout=0.0, **options).to(dtype)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("name, millions", [("p3d63", 25.75), ("p3d131", 48.09), ("p3d199", 66.49)])
def test_parameters_of_the_paper(name, millions):
    assert round(sum(p.numel() for p in NETS[name]().parameters()) / 1e6, 2) == millions


def test_kinds_cycle_down_the_net():
    net = models.p3d63(wiring="port")
    kinds = [[block.kind for block in getattr(net, f"layer{i}")] for i in (1, 2, 3, 4)]
    assert kinds == [list("ABC"), list("ABCA"), list("BCABCA"), ["2d"] * 3]
    assert {block.wiring for i in (1, 2, 3) for block in getattr(net, f"layer{i}")} == {"port"}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_names_are_those_of_the_port(wiring):
    ours, plain = models.p3d63(wiring=wiring).state_dict(), PlainP3D(wiring=wiring).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in plain.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_step_in_float64(wiring, mode):
    """The same function: what rounding a random net makes of a gradient does not hide a difference here."""
    ours, plain = (set_mode(net, mode) for net in twins(SMALL, wiring, torch.float64))
    assert_same_step(ours, plain, torch.randn(2, 3, 7, 75, 70).double(), 1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_step_of_p3d63_at_an_odd_size(wiring, mode):
    ours, plain = (set_mode(net, mode) for net in twins(DEPTHS["p3d63"], wiring))
    assert_same_step_float32(ours, plain, (2, 3, 5, 97, 80), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, wiring, mode",
    [("p3d63", wiring, mode) for wiring in ("port", "author") for mode in MODES] + [("p3d199", "port", "train")],
)
def test_step_at_the_published_size(name, wiring, mode):
    ours, plain = (set_mode(net, mode) for net in twins(DEPTHS[name], wiring))
    assert_same_step_float32(ours, plain, (1, 3, 16, 160, 160), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(16, 160, 160), (9, 112, 96)])
@pytest.mark.parametrize("name, wiring", [("p3d63", "port"), ("p3d63", "author"), ("p3d199", "port")])
def test_step_in_bfloat16(name, wiring, mode, size, device):
    """Rounding grows from layer to layer in any net: ours may be twice as far from float64 as PyTorch's bf16 is."""
    ours, plain = (set_mode(net, mode).to(device) for net in twins(DEPTHS[name], wiring))
    exact = copy.deepcopy(plain).double()
    x = torch.randn(4, 3, *size, device=device).bfloat16().float()
    want = step(exact, x.double())
    with torch.autocast("cuda", torch.bfloat16):
        got, vendor = step(ours, x), step(plain, x)
    for name, a, b, c in zip(("output", "dx"), got, vendor, want, strict=False):
        assert distance(a, c) <= 2 * distance(b, c) + 4e-3, name
    mine, theirs, true = (torch.cat([g.double() for _, g in sorted(s[2].items())]) for s in (got, vendor, want))
    assert distance(mine, true) <= 2 * distance(theirs, true) + 4e-3


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("size", [(1, 32, 32), (2, 1, 1), (3, 5, 2), (32, 8, 40), (4, 224, 224)])
def test_any_size(wiring, size):
    ours, plain = (net.eval() for net in twins(SMALL, wiring))
    x = torch.randn(2, 3, *size)
    assert distance(ours(x), plain(x)) < 1e-5
    assert ours(x[:0]).shape == (0, 9)


def test_one_frame_trains_in_both_wirings():
    for wiring in WIRINGS:
        ours, plain = twins(SMALL, wiring, torch.float64)
        assert_same_step(ours, plain, torch.randn(2, 3, 1, 65, 70).double(), 1e-9)


def test_features_and_classify():
    net, plain = (net.eval() for net in twins(SMALL, "author"))
    x = torch.randn(3, 3, 4, 40, 48)
    features = net.features(x)
    assert features.shape == (3, 2048) and features.dtype == torch.float32
    assert distance(features, plain.features(x)) < 1e-5
    assert torch.equal(net.classify(features), net(x))
    with torch.autocast("cpu", torch.bfloat16):
        features = net.features(x)
        assert features.dtype == torch.float32 and net.classify(features).dtype == torch.bfloat16
    assert net.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("net", [P3D, PlainP3D])
def test_another_classifier(net):
    net, x = net(SMALL, 9).eval(), torch.randn(1, 3, 2, 16, 16)
    net.fc = nn.Identity()
    assert torch.equal(net(x), net.features(x))
    net.fc = nn.Sequential(nn.Linear(2048, 5), nn.ReLU()).double()
    assert net(x).dtype == torch.float64


def test_modality_and_channels():
    assert models.p3d63(modality="flow").conv1_custom.weight.shape == (64, 2, 1, 7, 7)
    assert P3D(SMALL, in_channels=5).conv1_custom.in_channels == 5
    ours, plain = (net.eval() for net in twins(SMALL, "port", modality="flow"))
    x = torch.randn(1, 2, 4, 33, 34)
    assert distance(ours(x), plain(x)) < 1e-5


def test_dropout_is_before_fc():
    net = P3D(SMALL, 9, dropout=0.9)
    features = torch.ones(4, 2048)
    assert not torch.equal(net.classify(features), net.classify(features))
    assert torch.equal(net.eval().classify(features), net.fc(features))


@pytest.mark.parametrize("layer", ["conv1_custom", "bn1", "relu"])
def test_hooks_in_the_stem_run(layer, monkeypatch):
    ours, plain = twins(SMALL, "author", torch.float64)
    seen, fused, op = [], [], ops.stem
    monkeypatch.setattr(ops, "stem", lambda *a: (fused.append(1), op(*a))[1])
    x = torch.randn(2, 3, 4, 40, 48).double()
    ours(x)
    assert fused
    getattr(ours, layer).register_forward_hook(lambda m, a, y: seen.append(y.shape))
    ours.load_state_dict(plain.state_dict())
    assert_same_step(ours, plain, x, 1e-9)
    assert seen and len(fused) == 1


def test_sync_batch_norm_conversion():
    ours, plain = (net.eval() for net in twins(SMALL, "author"))
    keys = list(ours.state_dict())
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    x = torch.randn(2, 3, 4, 40, 48)
    assert distance(ours(x), plain(x)) < 1e-5
    assert list(ours.state_dict()) == keys


def test_frozen_bn():
    ours, plain = twins(SMALL, "author", torch.float64)
    keys = list(ours.state_dict())
    assert models.frozen_bn(ours) is ours
    models.frozen_bn(plain)
    for net in (ours, plain):
        norms = [m for m in net.train().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert [m.training for m in norms] == [True] + [False] * (len(norms) - 1)
        assert [m.weight.requires_grad for m in norms] == [True] + [False] * (len(norms) - 1)
    before = {k: v.clone() for k, v in ours.named_buffers()}
    assert_same_step(ours, plain, torch.randn(2, 3, 4, 40, 48).double(), 1e-9)
    moved = {k.rpartition(".")[0] for k, v in ours.named_buffers() if not torch.equal(v, before[k])}
    assert moved == {"bn1"} and list(ours.state_dict()) == keys
    assert not copy.deepcopy(ours).train().layer1[0].bn1.training
    with pytest.raises(ValueError, match="model: expected a net with BatchNorm2d"):
        models.frozen_bn(nn.Linear(2, 2))


def test_compiles_without_a_graph_break():
    net = P3D(SMALL, 9, dropout=0.0)
    x = torch.randn(2, 3, 4, 40, 48)
    want = net(x)
    torch._dynamo.reset()
    assert distance(torch.compile(net, fullgraph=True, backend="eager")(x), want) < 1e-5


def test_full_3d_rival():
    net = PlainP3D(SMALL, 9, conv3d_full=True)
    assert net.layer1[0].conv2.kernel_size == (3, 3, 3) and not hasattr(net.layer1[0], "conv3")
    assert net(torch.randn(2, 3, 4, 40, 48)).shape == (2, 9)


BAD_INPUTS = [
    (torch.zeros(3, 4, 32, 32), ValueError, "x: expected 5 dimensions [N, C, T, H, W], got 4"),
    (torch.zeros(1, 2, 4, 32, 32), ValueError, "x: expected 3 channels, got 2"),
    (torch.zeros(1, 3, 0, 32, 32), ValueError, "x: expected at least one frame, row and column, got shape (1, 3, 0,"),
    (torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8), TypeError, "got torch.uint8"),
    ([1, 2], TypeError, "x: expected a Tensor, got list"),
]


@pytest.mark.parametrize("x, error, message", BAD_INPUTS)
def test_bad_input_changes_nothing(x, error, message):
    net = P3D(SMALL)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(error, match=re.escape(message)):
        net(x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"wiring": "caffe"}, "wiring: expected one of ('author', 'port'), got 'caffe'"),
        ({"modality": "depth"}, "modality: expected one of ('rgb', 'flow'), got 'depth'"),
        ({"num_classes": 0}, "num_classes: expected a positive int, got 0"),
        ({"in_channels": 2.5}, "in_channels: expected a positive int, got 2.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.p3d63(**options)


def test_normalise():
    frames = torch.randint(0, 256, (2, 3, 4, 5, 3), dtype=torch.uint8)
    author = models.normalise(frames)
    assert author.shape == (2, 3, 3, 4, 5) and author.dtype == torch.float32
    assert author.is_contiguous(memory_format=torch.channels_last_3d)
    blue = frames[..., 2].float() - 104
    assert torch.equal(author[:, 0], blue) and torch.equal(author[:, 2], frames[..., 0].float() - 123)
    port = models.normalise(frames, "port")
    torch.testing.assert_close(port[:, 0], (frames[..., 0].float() / 255 - 0.485) / 0.229)
    torch.testing.assert_close(port[:, 2], (frames[..., 2].float() / 255 - 0.406) / 0.225)
    flow = frames[..., :2]
    assert torch.equal(models.normalise(flow)[:, 1], flow[..., 1].float() - 128)
    torch.testing.assert_close(models.normalise(flow[0], "port")[0, 1], (flow[0, ..., 1].float() / 255 - 0.5) / 0.226)
    assert models.p3d63(wiring="port").input_spec == models.input_spec("port", "rgb")
    with pytest.raises(TypeError, match="frames: expected a uint8 Tensor, got torch.float32"):
        models.normalise(frames.float())
    with pytest.raises(ValueError, match=r"frames: expected shape .*, got \(3, 4, 5\)"):
        models.normalise(frames[0, ..., 0])
    with pytest.raises(ValueError, match="wiring: expected one of"):
        models.normalise(frames, "rgb")
