"""Tapes: a replay gives what the recorded pass gives, on other data, and never on a tensor it missed."""

import pytest
import torch

from p3d_kernels.ops import _tape
from p3d_kernels.ops._tape import Tape, alloc, taped

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

    for _ in range(3):
        a, b = torch.randn(4), torch.randn(4)
        (out,), kept, layout = taped(("kept", CPU), pass_of(a, b), [a, b])
        left, right = layout.views(kept)
        assert left.shape == narrow and right.shape == wide and right.stride() == (16, 1, 16, 16, 8)
        assert torch.equal(out, a + (a + b))
        assert torch.equal(left.flatten()[:4], a + b)
        assert torch.equal(right.permute(0, 2, 3, 4, 1).flatten()[:4], (a + b) + b)
        second, fourth = layout.cut(kept, lambda: [(0, 1, 2), (1, 3, 1)])
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
