"""The checker itself: each kind of damage is caught, honest rounding passes."""

from __future__ import annotations

import pytest
import torch

from tolerance import NORM_LIMIT, WORST_LIMIT, check

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPE = (2, 20, 3, 7, 9)


def reference(shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["output", "wgrad", "bn_sum"])
def test_rounding_passes(dtype, kind):
    ref = reference()
    check(ref.to(dtype), ref, dtype, vendor=ref.to(dtype), kind=kind)
    check(ref.to(dtype), ref, dtype, vendor=ref, kind=kind)  # a perfect vendor still leaves two roundings


def test_tf32_rounding_passes_and_float32_does_not_allow_it():
    ref = reference()
    rounded = ref.half().float()  # TF32 keeps float16's fraction
    check(rounded, ref, torch.float32, tf32=True)
    with pytest.raises(AssertionError, match="relative error"):
        check(rounded, ref, torch.float32)


def shifted(y):
    return y.roll(1, -1)


def scaled(y):
    return y * 1.01


def lost_row(y):
    y[:, :, :, -1] = 0
    return y


def lost_channel(y):
    y[:, -1] = 0
    return y


def bad_element(y):
    y[1, 3, 1, 2, 4] += 0.2
    return y


def bad_border_element(y):
    y[1, 3, 1, 2, -1] += 0.2
    return y


def nan(y):
    y[0, 0, 0, 0, 0] = float("nan")
    return y


def infinite(y):
    y[-1, -1, -1, -1, -1] = float("inf")
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["output", "wgrad", "bn_sum"])
@pytest.mark.parametrize(
    "damage", [shifted, scaled, lost_row, lost_channel, bad_element, bad_border_element, nan, infinite]
)
def test_damage_is_caught(damage, kind, dtype):
    ref = reference()
    with pytest.raises(AssertionError):
        check(damage(ref.to(dtype)), ref, dtype, kind=kind)


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_a_wrong_border_cannot_hide_behind_a_large_interior(dim):
    ref = reference()
    for end in (0, -1):
        ref.select(dim, end).mul_(1e-3)
    y = ref.float()
    y.select(dim, -1).mul_(1.001)  # far below every limit of the whole tensor
    check(y, ref, torch.float32, kind="wgrad")  # a weight has no borders
    with pytest.raises(AssertionError, match=f"border along {'THW'[dim - 2]}"):
        check(y, ref, torch.float32)


def test_worse_than_the_vendor_is_caught():
    ref = reference()
    y, poor = ref.clone(), ref.clone()
    y[0, 0, 1, 3, 4] += 0.9 * WORST_LIMIT["float32"] * ref.abs().max()  # allowed by the absolute criteria
    check(y.float(), ref, torch.float32)
    poor[0, 0, 1, 3, 4] += 0.5 * WORST_LIMIT["float32"] * ref.abs().max()
    check(y.float(), ref, torch.float32, vendor=poor)
    with pytest.raises(AssertionError, match="2 x the vendor's"):
        check(y.float(), ref, torch.float32, vendor=ref)


def test_wgrad_may_be_three_times_the_vendor():
    ref = reference((40, 20, 1, 3, 3)).clamp(-1, 1)
    y, vendor = ref.clone(), ref.clone()
    y[0, 0, 0, 0, 0] += 5e-6
    vendor[0, 0, 0, 0, 0] += 1.8e-6
    check(y.float(), ref, torch.float32, vendor=vendor, kind="wgrad")
    with pytest.raises(AssertionError, match="2 x the vendor's"):
        check(y.float(), ref, torch.float32, vendor=vendor, kind="bn_sum")


def test_sums_in_float32_are_given_more():
    ref = reference((64,))
    y = (ref * (1 + 5e-6)).float()
    check(y, ref, torch.float32, kind="bn_sum")
    with pytest.raises(AssertionError, match="relative error"):
        check(y, ref, torch.float32)


def test_a_chain_in_half_precision_is_given_more():
    ref = reference()
    y = (ref * (1 + 7e-4)).half()
    check(y, ref, torch.float16, chain=True)
    with pytest.raises(AssertionError, match="relative error"):
        check(y, ref, torch.float16)
    with pytest.raises(AssertionError, match="relative error"):
        check((ref * (1 + 3e-6)).float(), ref, torch.float32, chain=True)


def test_dtype_and_shape():
    ref = reference()
    with pytest.raises(AssertionError, match="expected dtype torch.bfloat16, got torch.float32"):
        check(ref.float(), ref, torch.bfloat16)
    with pytest.raises(AssertionError, match="reference must be float64"):
        check(ref.float(), ref.float(), torch.float32)
    with pytest.raises(AssertionError, match="expected shape"):
        check(ref.float()[:, :1], ref, torch.float32)  # would broadcast
    with pytest.raises(AssertionError, match="vendor's shape"):
        check(ref.float(), ref, torch.float32, vendor=ref[:1])


def test_zero_reference_allows_only_zero():
    ref = torch.zeros(SHAPE, dtype=torch.float64)
    check(ref.float(), ref, torch.float32)
    with pytest.raises(AssertionError):
        check(ref.float() + 1e-30, ref, torch.float32)


def test_empty_passes():
    ref = reference((0, 3, 2, 5, 5))
    check(ref.float(), ref, torch.float32)


def test_limits_are_those_of_the_documentation():
    assert NORM_LIMIT == {"bfloat16": 4e-3, "float16": 5e-4, "tf32": 1e-3, "float32": 2e-6}
    assert WORST_LIMIT == {"bfloat16": 8e-3, "float16": 1e-3, "tf32": 1e-3, "float32": 1e-5}


def test_the_message_names_tensor_place_and_size():
    ref = reference().fill_(1.0)
    y = ref.float()
    y[1, 3, 1, 2, 4] += 1e-4
    with pytest.raises(AssertionError, match=r"dx \(float32\): worst element .* at \(1, 3, 1, 2, 4\) of the tensor"):
        check(y, ref, torch.float32, name="dx")


def test_uninitialised_memory_is_nan_in_tests(device):
    x = torch.ones(2, 3, 1, 2, 2, device=device, dtype=torch.bfloat16)
    assert torch.empty_like(x).isnan().all()
    assert torch.empty(x.shape, device=device, memory_format=torch.channels_last_3d).isnan().all()
    assert x.new_empty(3).isnan().all()


def test_where_something_is_selected_the_vendor_is_the_measure():
    ref = reference((2, 3, 4, 5, 6))
    off, twice, more = (ref.clone() for _ in range(3))
    off[0, 0, 0, 0, 0] += 1
    twice[1, 0, 0, 0, 0] += 1.9
    more[1, 0, 0, 0, 0] += 2.2
    check(twice.half(), ref, torch.float16, vendor=off.half(), selects=True)
    with pytest.raises(AssertionError, match="relative error"):
        check(twice.half(), ref, torch.float16, vendor=off.half())
    with pytest.raises(AssertionError, match="relative error"):
        check(more.half(), ref, torch.float16, vendor=off.half(), selects=True)
    many = ref.clone()
    many[0] += 0.03  # none as large as the vendor's one, all together larger
    with pytest.raises(AssertionError, match="relative error"):
        check(many.half(), ref, torch.float16, vendor=(ref + 0.01).half(), selects=True)
    with pytest.raises(AssertionError, match="selects needs the vendor"):
        check(ref.half(), ref, torch.float16, selects=True)
