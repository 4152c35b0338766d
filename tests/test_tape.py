"""Tapes: a replay gives what the recorded pass gives, on other data, and never on a tensor it missed."""

from __future__ import annotations

import copy
import threading
import types

import pytest
import torch

import p3d_kernels as p3d
from nets import batch_norms, randomise
from p3d_kernels import _backends
from p3d_kernels.nn import Bottleneck, BottleneckRow
from p3d_kernels.ops import _tape
from p3d_kernels.ops._tape import NativePlan, Plan, Tape, alloc, taped

CPU = torch.device("cpu")


class Add:
    """Stands for a plan: the third tensor becomes the sum of the others."""

    launches = 0

    def __call__(self, a, b, out):
        if _tape._recording.recorder is not None:
            _tape._recording.recorder.step(self, (a, b, out))
        Add.launches += 1
        n = 4
        out.flatten()[:n] = (0 if a is None else a.flatten()[:n]) + b.flatten()[:n]


def chain(a, b, c):
    """((a + b) + c) + b, by way of two temporaries, and a + b as a second output."""

    def pass_():
        add = Add()
        first, second, third, last = (alloc((4,), CPU) for _ in range(4))
        add(a, b, first)
        add(first, c, second)
        add(second, b, third)
        add(None, third, last)
        return [last, first, None], []

    return pass_


def inputs():
    return [torch.randn(4) for _ in range(3)]


def test_replay_on_other_data():
    Add.launches = 0
    a, b, c = inputs()
    tape = Tape(chain(a, b, c), [a, b, c])
    assert torch.equal(tape.first[0][0], a + b + c + b)
    for _ in range(2):
        a, b, c = inputs()
        (last, first, none), _ = tape.run([a, b, c])
        assert none is None
        assert torch.equal(first, a + b)
        assert torch.equal(last, a + b + c + b)
    assert Add.launches == 12


def test_outputs_of_two_replays_do_not_share_memory():
    a, b, c = inputs()
    tape = Tape(chain(a, b, c), [a, b, c])
    one = tape.run([a, b, c])[0][0].clone()
    kept = tape.run([a, b, c])[0][0]
    tape.run(inputs())
    assert torch.equal(kept, one)


def test_temporaries_share_room_when_their_uses_do_not_overlap():
    a = torch.randn(4)

    def pass_():
        add, source = Add(), a
        for _ in range(6):
            out = alloc((4,), CPU)
            add(source, a, out)
            source = out
        return [source], []

    tape = Tape(pass_, [a])
    assert torch.allclose(tape.run([a])[0][0], 7 * a)
    assert tape.size == 2 * 512  # five temporaries, two alive at a time, 512 bytes each


def test_large_temporaries_find_room_around_small_ones():
    one = torch.ones(4)

    def pass_():
        add = Add()
        small, first, large, out = (alloc((n,), CPU) for n in (128, 256, 512, 4))
        add(one, one, first)
        add(first, one, small)  # small outlives first, whose room the large one takes
        add(small, one, large)
        add(large, small, out)
        return [out], []

    tape = Tape(pass_, [one])
    assert tape.size == 5 * 512
    assert torch.equal(tape.run([one])[0][0], torch.full((4,), 7.0))


def test_what_is_kept_lies_in_one_buffer():
    wide, narrow = (2, 8, 1, 1, 2), (2, 3)

    def pass_of(a, b):
        def pass_():
            add, out, left, right = Add(), alloc((4,), CPU), alloc(narrow, CPU), alloc(wide, CPU)
            add(a, b, left)
            add(left, b, right.permute(0, 2, 3, 4, 1).flatten())
            add(a, left, out)
            return [out], [left, right]

        return pass_

    def pieces():
        return [(0, 1, 2), (1, 3, 1)]

    for _ in range(3):
        a, b = torch.randn(4), torch.randn(4)
        (out,), kept, layout = taped(("kept", CPU), pass_of(a, b), [a, b])
        left, right = layout.views(kept)
        assert left.shape == narrow and right.shape == wide and right.stride() == (16, 1, 16, 16, 8)
        assert torch.equal(out, a + (a + b))
        assert torch.equal(left.flatten()[:4], a + b)
        assert torch.equal(right.permute(0, 2, 3, 4, 1).flatten()[:4], (a + b) + b)
        second, fourth = layout.cut(kept, pieces)
        assert layout.addresses(kept, pieces) == [second.data_ptr(), fourth.data_ptr()]
        assert torch.equal(second, (a + b)[1:3]) and torch.equal(fourth, (a + b + b)[3:4])


def test_views_of_inputs_and_buffers_keep_their_offset():
    a = torch.randn(12)

    def pass_():
        add, out = Add(), alloc((8,), CPU)
        add(a[4:8], a[8:], out[4:])
        add(out[4:], a[:4], out[:4])
        return [out], []

    tape = Tape(pass_, [a])
    b = torch.randn(12)
    out = tape.run([b])[0][0]
    assert torch.equal(out[4:], b[4:8] + b[8:])
    assert torch.equal(out[:4], b[4:8] + b[8:] + b[:4])


def test_outputs_go_where_the_caller_says(monkeypatch):
    monkeypatch.setattr(_tape, "_tapes", {})
    whole = torch.zeros(3, 4)
    for i in range(3):  # recorded, then replayed
        a, b, c = inputs()
        (last, first, none), *_ = taped(("into", CPU), chain(a, b, c), [a, b, c], [whole[i], torch.empty(4), None])
        assert none is None and last.data_ptr() == whole[i].data_ptr()
        assert torch.equal(whole[i], a + b + c + b) and torch.equal(first, a + b)


def test_an_input_that_was_not_named_is_refused():
    a, b, c = inputs()
    with pytest.raises(RuntimeError, match="neither an input nor allocated"):
        Tape(chain(a, b, c), [a, b])
    assert _tape._recording.recorder is None


def test_an_unnamed_input_below_every_buffer_is_refused():
    base = torch.randn(12)
    missed, out, named = base[:4], base[4:8], base[8:]
    with pytest.raises(RuntimeError, match="neither an input nor allocated"):
        Tape(lambda: ([Add()(missed, named, out)], []), [named, out])


def test_an_output_must_be_a_buffer_of_the_pass():
    a = torch.randn(4)
    with pytest.raises(RuntimeError, match="buffers of its own"):
        Tape(lambda: ([a], []), [a])


def test_taped_records_once_a_key(monkeypatch):
    monkeypatch.setattr(_tape, "_tapes", {})
    calls = []

    def pass_of(a, b, c):
        def pass_():
            calls.append(1)
            return chain(a, b, c)()

        return pass_

    for _ in range(3):
        a, b, c = inputs()
        assert torch.equal(taped(("key",), pass_of(a, b, c), [a, b, c])[0][0], a + b + c + b)
    assert len(calls) == 1


def test_many_shapes_do_not_grow_without_bound(monkeypatch):
    monkeypatch.setattr(_tape, "_tapes", {})
    monkeypatch.setattr(_tape, "_LIMIT", 3)
    for i in range(7):
        a, b, c = inputs()
        taped((i,), chain(a, b, c), [a, b, c])
    assert len(_tape._tapes) <= 3


# --- replay by the extension -----------------------------------------------------------------------------------------


class ExtensionTape:
    """Stands for the extension's: a step is (launch, numbers)."""

    def __init__(self, bases, addresses):
        self.bases, self.addresses, self.steps = bases, addresses, []

    def add(self, launch, *numbers):
        self.steps.append((launch, numbers))

    def run(self, bases, device, stream):
        assert len(bases) == self.bases
        addresses = [0 if base < 0 else bases[base] + offset for base, offset in self.addresses]
        for launch, numbers in self.steps:
            launch(stream, *[addresses[n] for n in numbers])


class LoggedAdd(Add):
    """With a launch that notes the addresses it is given."""

    def __init__(self, log):
        self.log = log

    def launch(self, stream, *addresses):
        self.log.append((stream, *addresses))

    def record(self, tape, numbers):
        tape.add(self.launch, *numbers)


def test_both_replays_launch_with_the_same_addresses(monkeypatch):
    monkeypatch.setattr(_backends, "native", lambda: types.SimpleNamespace(Tape=ExtensionTape))
    monkeypatch.setattr(_tape, "current_stream", lambda index: 7)
    a, log = torch.randn(12), []

    def pass_():
        add, out, left, inner = LoggedAdd(log), alloc((4,), CPU), alloc((8,), CPU), alloc((8,), CPU)
        add(a[4:8], a[8:], left[4:])
        add(None, left[4:], inner[:4])
        add(left[4:], inner[:4], out)
        return [out, None], [left]

    tape = Tape(pass_, [a, None])
    bases = [1000, 0, 2000, 0, 3000, 4000]  # inputs, outputs, what is kept, workspace
    tape._launch(bases)
    from_python, log[:] = list(log), []
    assert from_python == [(7, 1016, 1032, 3016), (7, 0, 3016, 4000), (7, 3016, 4000, 2000)]
    tape.native = tape._compiled()
    tape._launch(bases)
    assert log == from_python


def test_a_launch_that_the_extension_does_not_know_is_made_from_python(monkeypatch):
    monkeypatch.setattr(_backends, "native", lambda: types.SimpleNamespace(Tape=ExtensionTape))
    run = types.SimpleNamespace(launch=None, launch_cooperative_grid=False, launch_pdl=True)
    plan = Plan(None, (1,), ())
    plan.compiled = types.SimpleNamespace(run=run, packed_metadata=(4, 1, 0))  # no word of scratch memory
    monkeypatch.setattr(LoggedAdd, "record", lambda self, tape, numbers: plan.record(tape, numbers))
    a = torch.randn(4)

    def pass_():
        out = alloc((4,), CPU)
        LoggedAdd([])(a, a, out)
        return [out], []

    tape = Tape(pass_, [a])
    with pytest.warns(RuntimeWarning, match="launched from Python.*Triton's launcher"):
        assert tape._compiled() is None


def test_the_parameters_of_a_triton_launch():
    """Pointers by number, scalars as bytes of the type that Triton settled on; None and constants are no parameters."""
    added = []
    tape = types.SimpleNamespace(add_triton=lambda *args: added.append(args))
    run = types.SimpleNamespace(
        launch=None, launch_cooperative_grid=0, launch_pdl=True, global_scratch_size=0, profile_scratch_size=0
    )
    kinds = ["*bf16", "constexpr", "*fp32", "i32", "fp32", "i64", "constexpr"]
    plan = Plan(None, (5, 2), ())
    plan.compiled = types.SimpleNamespace(
        run=run, packed_metadata=(4, 1, 1024), function=99, src=types.SimpleNamespace(signature=dict(enumerate(kinds)))
    )
    plan.tail = (-2, 1.0, 1 << 40, 64)
    plan.record(tape, [3, 0, 8])
    words = [(8, 3, True), (8, 8, True), (4, 0xFFFFFFFE, False), (4, 0x3F800000, False), (8, 1 << 40, False)]
    assert added == [(99, (5, 2, 1), (128, 1024, False, True), words + [(8, 0, False)] * 2)]


def extension():
    native = _backends.native()
    if isinstance(native, str):
        pytest.skip(native)
    return native


def refused(native):
    """A launch that its kernel's host code refuses."""
    shape = 1, 1, 1, 64, 64, "bfloat16"
    return NativePlan(lambda stream, address: native.spatial_conv(*[address] * 6, *shape, stream))


def test_a_launch_that_fails_raises_from_the_extension():
    native = extension()
    tape = native.Tape(1, [(-1, 0), (0, 0)])
    refused(native).record(tape, [1])
    with pytest.raises(RuntimeError, match="expected partials or out_affine, got both"):
        tape.run([16], 0, 0)
    with pytest.raises(IndexError, match="other bases"):
        tape.run([16, 32], 0, 0)
    with pytest.raises(IndexError, match="does not have"):
        refused(native).record(tape, [2])
    with pytest.raises(RuntimeError, match="other than one kernel"):
        NativePlan(lambda stream, address: None).record(tape, [1])


# --- rows of blocks --------------------------------------------------------------------------------------------------


def row(kinds="ABC", channels=16) -> BottleneckRow:
    torch.manual_seed(0)
    blocks = [Bottleneck(24, channels, kinds[0], stride=2)]
    blocks += [Bottleneck(4 * channels, channels, kind) for kind in kinds[1:]]
    return randomise(BottleneckRow(*blocks))


def step(net, x):
    """Output, gradients and running statistics after a step."""
    x = x.detach().requires_grad_()
    for p in net.parameters():
        p.grad = None
    with torch.autocast(x.device.type, torch.bfloat16):
        y = net(x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]


@pytest.fixture
def own_tapes(monkeypatch):
    monkeypatch.setattr(_tape, "_tapes", {})
    with p3d.use_backend("triton"):
        if why := _backends.why_not("triton", torch.empty(1)):
            pytest.skip(why)
        yield


def test_running_statistics_stay_where_a_launch_in_the_middle_fails(own_tapes):
    net, x = row("A"), torch.randn(1, 24, 2, 5, 5)
    net(x)
    before = [b.clone() for b in net.buffers()]
    (tape,) = _tape._tapes.values()

    class Fails:
        def __call__(self, *tensors):
            raise RuntimeError("no launch")

    tape.steps.insert(len(tape.steps) // 2, (Fails(), []))
    with pytest.raises(RuntimeError, match="no launch"):
        net(x)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before))
    assert all(norm.num_batches_tracked == 1 for norm in batch_norms(net))


gpu = pytest.mark.gpu
CASES = [("ABC", 16), ("BC", 64), (("2d", "2d"), 64)]  # Triton alone, and with CUDA kernels


def steps_of(kinds, channels, monkeypatch, native: bool):
    """Three steps: the first records, the others replay; and a fourth under capture."""
    monkeypatch.setattr(_tape, "_tapes", {})
    net = row(kinds, channels).cuda()
    clips = [torch.randn(2, 24, 4, 9, 10, generator=torch.Generator().manual_seed(i)).cuda() for i in range(4)]
    seen = []
    with monkeypatch.context() as context:
        if not native:
            context.setattr(Tape, "_compiled", lambda self: None)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            seen += [step(net, x) for x in clips[:3]]
        torch.cuda.synchronize()
        x = clips[3].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(net, x)
        graph.replay()
        graph.replay()
    torch.cuda.synchronize()
    assert _tape._tapes and all((tape.native is not None) == native for tape in _tape._tapes.values())
    return [t.clone() for results in (*seen, captured) for t in results]


@gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kinds, channels", CASES)
def test_the_extension_replays_bit_for_bit_as_python_does(kinds, channels, monkeypatch):
    with_extension = steps_of(kinds, channels, monkeypatch, True)
    from_python = steps_of(kinds, channels, monkeypatch, False)
    for a, b in zip(with_extension, from_python, strict=True):
        assert torch.equal(a, b)


@gpu
@pytest.mark.usefixtures("hopper")
def test_a_failure_in_the_middle_of_a_replay_by_the_extension(monkeypatch):
    monkeypatch.setattr(_tape, "_tapes", {})
    net, x = row("ABC", 64).cuda(), torch.randn(2, 24, 4, 9, 10).cuda()
    twin = copy.deepcopy(net)
    step(net, x), step(twin, x)
    before = [b.clone() for b in net.buffers()]
    tape = next(iter(_tape._tapes.values()))  # of the forward
    whole, at = tape.native, len(tape.steps) // 2
    tape.steps.insert(at, (refused(extension()), [(0, 0, x.dtype)]))
    tape.native = tape._compiled()
    with pytest.raises(RuntimeError, match="got both"):
        step(net, x)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before))
    del tape.steps[at]
    tape.native = whole
    for a, b in zip(step(net, x), step(twin, x), strict=True):
        assert torch.equal(a, b)


@gpu
@pytest.mark.usefixtures("hopper")
def test_a_replay_in_a_thread_that_has_launched_nothing(monkeypatch):
    monkeypatch.setattr(_tape, "_tapes", {})
    net, x = row("AB", 64).cuda(), torch.randn(2, 24, 4, 9, 10).cuda()
    twin = copy.deepcopy(net)
    step(twin, x)
    want, got = step(copy.deepcopy(net), x), []
    thread = threading.Thread(target=lambda: got.extend(step(net, x)))
    thread.start()
    thread.join()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def loop_of(net, monkeypatch, native: bool, held=lambda: None):
    """Steps on other data in the same memory, as a training loop makes them; and its tapes."""
    monkeypatch.setattr(_tape, "_tapes", {})
    net, x = copy.deepcopy(net), torch.empty(2, 24, 4, 9, 10, device="cuda")
    seen, hold = [], []
    with monkeypatch.context() as context:
        if not native:
            context.setattr(Tape, "_compiled", lambda self: None)
        for i in range(12):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(i)))
            seen.append([t.cpu() for t in step(net, x)])
            hold.append(held())
    return [t for results in seen for t in results], [tape.native for tape in _tape._tapes.values()]


@gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kinds, channels", CASES)
def test_runs_with_equal_addresses_become_a_graph(kinds, channels, monkeypatch):
    net = row(kinds, channels).cuda()
    want, _ = loop_of(net, monkeypatch, False)
    got, tapes = loop_of(net, monkeypatch, True)
    assert len(tapes) == 2 and all(tape.graph_runs >= 6 for tape in tapes)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@gpu
@pytest.mark.usefixtures("hopper")
def test_runs_with_other_addresses_each_time_do_not(monkeypatch):
    net = row("ABC", 64).cuda()
    want, _ = loop_of(net, monkeypatch, False)
    got, tapes = loop_of(net, monkeypatch, True, lambda: [torch.empty(n << 9, device="cuda") for n in range(1, 64)])
    assert not any(tape.graph_runs for tape in tapes)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@gpu
@pytest.mark.usefixtures("hopper")
def test_graphs_are_made_for_few_addresses_and_again_for_others():
    native, launches = extension(), 8

    def place():  # batch mean and var, running mean and var, count of one channel
        one, zero = (torch.full((1,), v, device="cuda") for v in (1.0, 0.0))
        return [one, one, zero, zero.clone(), torch.zeros(1, dtype=torch.int64, device="cuda")]

    places = [place() for _ in range(6)]
    torch.cuda.synchronize()
    tape = native.Tape(5, [(i, 0) for i in range(5)])
    moves = NativePlan(lambda stream, *addresses: native.running_stats(list(addresses), [(1, 0.5)], stream))
    for _ in range(launches):
        moves.record(tape, range(5))
    runs, stream = [0] * 6, torch.cuda.current_stream().cuda_stream

    def run(turn, times):
        before = tape.graph_runs
        for i in range(times):
            tape.run([t.data_ptr() for t in places[turn[i % len(turn)]]], 0, stream)
            runs[turn[i % len(turn)]] += 1
        return tape.graph_runs - before

    assert run([0, 1], 20) == 2 * (10 - 2)  # the third with equal addresses is the first of a graph
    assert run([0, 1, 2, 3], 20) == 5 + 5 + 3 + 3
    assert run(range(6), 30) == 4  # more than it remembers: after the first turn none is found
    assert run([4], 10) == 9 and run([5], 10) == 9
    assert run([0], 3) == 1
    assert run([1], 10) == 0  # of seven graphs, each has run less than eight times
    assert runs == [int(p[4]) // launches for p in places]
    for p, n in zip(places, runs):
        assert p[2].item() == p[3].item() == (1 - 0.5 ** (launches * n) if n < 4 else 1.0)
