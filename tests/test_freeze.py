"""`freeze`: the engine gives the answers of the net it was made from and keeps weights of its own."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch

import p3d_kernels as p3d
from benchmarks.rivals import fold
from nets import batch_norms, distance, randomise
from p3d_kernels import _backends


@pytest.fixture
def net():
    torch.manual_seed(0)
    return randomise(p3d.p3d63(10, wiring="port")).eval()


@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("size", [(5, 33, 40), (1, 16, 16)])
def test_answers_as_the_net(wiring, size):
    torch.manual_seed(0)
    net = randomise(p3d.p3d63(10, wiring=wiring)).eval()
    x = torch.randn(2, 3, *size)
    engine = p3d.freeze(net)
    with torch.no_grad():
        assert distance(engine(x), net(x)) < 1e-5
        assert distance(engine.features(x), net.features(x)) < 1e-5


@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("frames", [1, 6, 10])  # 1, 3, 5 after the stem
def test_a_stage_pools_what_it_gives_unless_the_pool_is_hooked(wiring, frames, device):
    net = randomise(p3d.models.P3D((2, 1, 1, 1), 10, wiring=wiring)).eval().to(device)
    engine = p3d.freeze(net, torch.bfloat16 if device.type == "cuda" else torch.float32)
    x = torch.randn(2, 3, frames, 32, 40, device=device)
    inside, seen = engine.features(x), []
    engine.net.maxpool_2.register_forward_hook(lambda _, inputs, output: seen.append(output.size(2)))
    assert torch.equal(engine.features(x), inside)
    halves = {
        "author": {1: [1, 1, 1], 6: [2, 1, 1], 10: [3, 2, 1]},
        "port": {1: [1, 1, 1], 6: [1, 1, 1], 10: [2, 1, 1]},
    }
    assert seen == halves[wiring][frames]


def test_dtype_is_the_engine_s_own(net):
    x = torch.randn(1, 3, 4, 32, 32)
    engine = p3d.freeze(net, torch.bfloat16)
    with torch.no_grad():
        reference = net(x)
        assert (engine(x) - reference).norm() < 0.05 * reference.norm()
    assert net.conv1_custom.weight.dtype == torch.float32
    assert {b.dtype for name, b in engine.named_buffers() if "weight" in name} == {torch.bfloat16}
    assert {b.dtype for name, b in engine.named_buffers() if "record" in name} == {torch.float32}


@pytest.mark.parametrize("wiring, modality", [("author", "rgb"), ("port", "rgb"), ("author", "flow"), ("port", "flow")])
def test_decoded_frames(wiring, modality, device):
    net = randomise(p3d.models.P3D((1, 1, 1, 1), 10, wiring=wiring, modality=modality)).eval().to(device)
    engine = p3d.freeze(net, torch.bfloat16 if device.type == "cuda" else torch.float32)
    frames = torch.randint(0, 256, (2, 4, 32, 40, 3 if modality == "rgb" else 2), dtype=torch.uint8, device=device)
    want = engine(p3d.models.normalise(frames, wiring))
    assert distance(engine(frames), want) < (1e-2 if device.type == "cuda" else 1e-5)
    assert torch.equal(engine(frames[0]), engine(frames[:1]))


def test_frames_of_another_net():
    engine = p3d.freeze(p3d.models.P3D((1, 1, 1, 1), 10, in_channels=4).eval())
    with pytest.raises(TypeError, match="x: expected a floating-point dtype of a net with 4 input channels, got uint8"):
        engine(torch.zeros(1, 4, 32, 32, 4, dtype=torch.uint8))
    engine = p3d.freeze(torch.nn.Sequential(p3d.nn.Bottleneck(64, 16)).eval())
    with pytest.raises(TypeError, match=r"x: expected a floating-point dtype \(of a P3D also uint8 frames\)"):
        engine(torch.zeros(1, 64, 2, 8, 8, dtype=torch.uint8))


def test_the_engine_follows_the_net(net):
    x = torch.randn(1, 3, 2, 16, 16)
    engine = p3d.freeze(net)
    before = engine(x)
    addresses = {name: t.data_ptr() for name, t in engine.net.state_dict().items()}

    def moved():
        with torch.no_grad():
            now, want = engine(x), net.eval()(x)
        assert distance(now, want) < 1e-5
        held, fresh = engine.net.state_dict(), p3d.freeze(net).net.state_dict()
        assert all(torch.equal(held[name], fresh[name]) for name in fresh)  # without a call of any layer
        assert {name: t.data_ptr() for name, t in held.items()} == addresses  # where CUDA graphs look for them
        return now

    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter) * 1e-3
    optimizer.step()
    assert not torch.equal(moved(), before)
    before = moved()
    net.train()(torch.randn(2, 3, 4, 20, 20))  # running statistics
    before = moved()
    net.load_state_dict({k: v * 0.9 for k, v in net.state_dict().items()})
    before = moved()
    net.fc = torch.nn.Linear(2048, 10)
    before = moved()
    net.layer2[0].conv1.weight.data = net.layer2[0].conv1.weight.data * 2
    with torch.inference_mode():
        assert not torch.equal(engine(x), before)
    before = moved()
    net.fc = torch.nn.Linear(2048, 11)
    with pytest.raises(RuntimeError, match="freeze it again"):
        engine(x)


def test_a_copy_of_an_engine_stays_as_it_was(net):
    x = torch.randn(1, 3, 2, 16, 16)
    engine = p3d.freeze(net)
    before = engine(x)
    copied = copy.deepcopy(engine)
    with torch.no_grad():
        net.fc.bias += 1
    after = engine(x)
    assert not torch.equal(after, before) and torch.equal(copied(x), before)


def test_the_engine_does_not_keep_the_net():
    net = p3d.models.P3D((1, 1, 1, 1), 10).eval()
    engine, alive = p3d.freeze(net), [weakref.ref(net), weakref.ref(net.fc.weight)]
    x = torch.randn(1, 3, 2, 16, 16)
    before = engine(x)
    del net
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert torch.equal(engine(x), before)


def test_the_net_stays_as_it_is(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    p3d.freeze(net, torch.float16)
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.requires_grad for p in net.parameters())


def test_an_accelerated_net_can_be_frozen(net):
    plain = randomise(p3d.models.PlainP3D(p3d.models.DEPTHS["p3d63"], 10, wiring="port")).eval()
    x = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        reference = plain(x)
    engine = p3d.freeze(p3d.accelerate(plain))
    assert distance(engine(x), reference) < 1e-5


def test_refusals(net):
    with pytest.raises(ValueError, match="eval mode"):
        p3d.freeze(net.train())
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        p3d.freeze("net")
    with pytest.raises(TypeError, match="dtype"):
        p3d.freeze(net.eval(), torch.int8)
    with pytest.raises(ValueError, match="none of their blocks"):
        p3d.freeze(torch.nn.Linear(2, 2).eval())
    engine = p3d.freeze(net)
    with pytest.raises(ValueError, match="Engine"):
        p3d.freeze(engine)
    with pytest.raises(RuntimeError, match="inference only"):
        engine.train()
    net.layer2[1].bn2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layer2\.1 cannot be frozen \(bn2 has hooks"):
        p3d.freeze(net)


@pytest.mark.parametrize("name, who", [("", "it"), ("layer2", "layer2"), ("layer2.1", "it"), ("bn1", "bn1")])
def test_a_hook_is_not_passed_over(net, name, who):
    net.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=rf"cannot be frozen \({who} has hooks"):
        p3d.freeze(net)


def test_save_and_load(net, tmp_path):
    x = torch.randn(1, 3, 2, 16, 16)
    engine = p3d.freeze(net, torch.bfloat16)
    with torch.no_grad():
        net.fc.bias += 1  # the newest weights are saved
    engine.save(tmp_path / "net.p3d")
    loaded = p3d.load_engine(tmp_path / "net.p3d")
    assert loaded.dtype == torch.bfloat16 and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(x), engine(x)) and torch.equal(loaded.features(x), engine.features(x))
    with torch.no_grad():
        net.fc.bias += 1
    assert not torch.equal(loaded(x), engine(x))
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(x), loaded(x))
    with pytest.raises(FileNotFoundError, match="path: no file"):
        p3d.load_engine(tmp_path / "none")
    whole = (tmp_path / "net.p3d").read_bytes()
    (tmp_path / "half.p3d").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="path: .* is truncated"):
        p3d.load_engine(tmp_path / "half.p3d")
    torch.save(net.state_dict(), tmp_path / "other.p3d")
    with pytest.raises(ValueError, match="path: expected an engine"):
        p3d.load_engine(tmp_path / "other.p3d")
    foreign = p3d.freeze(torch.nn.Sequential(net.layer1[0]).eval())
    with pytest.raises(TypeError, match="engine: expected one made from a P3D"):
        foreign.save(io.BytesIO())


BAD_CLIPS = [
    ([1.0], TypeError, "x: expected a Tensor, got list"),
    (torch.zeros(1, 3, 2, 16, 16, requires_grad=True), ValueError, "x: expected a tensor that requires no grad"),
    (torch.zeros(1, 3, 2, 16, 16, dtype=torch.int8), TypeError, "x: expected a floating-point dtype .* got torch.int8"),
    (torch.zeros(1, 3, 2, 16, 16, dtype=torch.uint8), ValueError, r"x: expected uint8 frames \[N, T, H, W, 3\]"),
    (torch.zeros(1, 3, 0, 16, 16), ValueError, "x: expected at least one frame, row and column"),
    (torch.zeros(1, 3, 2, 16, 16, device="meta"), ValueError, "x: expected device cpu"),
    (torch.zeros(1, 2, 2, 16, 16), ValueError, "x: expected 3 channels, got 2"),
    (torch.zeros(3, 2, 16, 16), ValueError, "x: expected 5 dimensions"),
]


@pytest.mark.parametrize("x, error, message", BAD_CLIPS)
def test_bad_clips(net, x, error, message):
    with pytest.raises(error, match=message):
        p3d.freeze(net)(x)


def test_bad_options(net):
    with pytest.raises(ValueError, match="max_graphs: expected a positive int, got 0"):
        p3d.freeze(net, cuda_graph=True, max_graphs=0)
    with pytest.raises(ValueError, match="model: expected a CUDA device for cuda_graph, got cpu"):
        p3d.freeze(net, cuda_graph=True)
    with pytest.raises(ValueError, match="device: expected a CUDA device for cuda_graph, got cpu"):
        p3d.load_engine("x", cuda_graph=True)
    engine = p3d.freeze(net, torch.float16)
    with pytest.raises(TypeError, match=r"stays in its dtype \(torch.float16\)"):
        engine.float().bfloat16()


@pytest.mark.gpu
def test_cuda_graphs(net, device):
    net = net.to(device)
    plain, engine = p3d.freeze(net, torch.float16), p3d.freeze(net, torch.float16, cuda_graph=True, max_graphs=2)
    clips = [torch.randn(n, 3, 4, 32, 40, device=device) for n in (1, 2, 3)]
    for _ in range(3):
        for x in clips:
            x.normal_()
            assert torch.equal(engine(x), plain(x)) and torch.equal(engine.features(x), plain.features(x))
            assert len(engine._captured) <= 2
    kept = engine(clips[0])
    before = kept.clone()
    engine(torch.randn_like(clips[0]))
    assert torch.equal(kept, before)  # an answer is the caller's own
    with torch.no_grad():
        net.fc.bias += 1
        net.conv1_custom.weight *= 0.5
        net.layer1[0].conv2.weight *= 0.5
    assert torch.equal(engine(clips[0]), plain(clips[0])) and not torch.equal(engine(clips[0]), before)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_one_engine_on_many_streams_and_threads(net, device, cuda_graph):
    engine = p3d.freeze(net.to(device), torch.float16, cuda_graph=cuda_graph)
    clips = [torch.randn(2, 3, 4, 32, 40, device=device) for _ in range(6)]
    want = [engine(x) for x in clips]
    torch.cuda.synchronize()
    wrong = []

    def serve(first):
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(30):
                k = (first + i) % len(clips)
                if not torch.equal(engine(clips[k]), want[k]):
                    wrong.append((first, i))

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("seed", range(3))
def test_as_exact_as_plain_pytorch(seed, wiring, dtype):
    """Of nets with random weights and the statistics that these have on random clips: at most 1.5 times the error of
    plain PyTorch in the same dtype, its BN folded, against float64."""
    torch.manual_seed(seed)
    net = randomise(p3d.models.PlainP3D(p3d.models.DEPTHS["p3d63"], 10, wiring=wiring, dropout=0.0)).cuda().double()
    for norm in batch_norms(net):
        norm.momentum = None
    with torch.no_grad():
        for _ in range(4):
            net.train()(torch.randn(8, 3, 8, 80, 80, device="cuda", dtype=torch.float64))
    x = torch.randn(8, 3, 8, 80, 80, device="cuda").to(dtype)
    net.eval()
    folded = fold(copy.deepcopy(net)).to(dtype)
    mine = p3d.models.P3D(p3d.models.DEPTHS["p3d63"], 10, wiring=wiring)
    mine.load_state_dict(net.state_dict())
    engine = p3d.freeze(mine.cuda().eval(), dtype)
    with torch.no_grad():
        want = net.features(x.double())
        assert distance(engine.features(x), want) <= 1.5 * distance(folded.features(x), want)


@pytest.mark.gpu
@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("clips, frames, size", [(1, 16, 160), (9, 16, 160), (2, 10, 112), (3, 6, 97), (32, 4, 64)])
def test_pools_inside_the_kernels_before_them_change_no_bit(clips, frames, size, wiring):
    engine = p3d.freeze(randomise(p3d.p3d63(10, wiring=wiring)).eval().cuda(), torch.bfloat16)
    x = torch.randn(clips, 3, frames, size, size, device="cuda", dtype=torch.bfloat16)
    inside = engine.features(x)
    engine.net.maxpool_2.register_forward_hook(lambda *_: None)
    assert torch.equal(engine.features(x), inside)


@pytest.mark.gpu
def test_memory_of_a_large_batch():
    engine = p3d.freeze(p3d.p3d63().eval().cuda(), torch.bfloat16)
    x = torch.randn(32, 3, 16, 160, 160, device="cuda", dtype=torch.bfloat16)
    if why := _backends.why_not("cuda", x):
        pytest.skip(why)
    engine(x)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine(x)
    assert torch.cuda.max_memory_allocated() - before <= 300 << 20
