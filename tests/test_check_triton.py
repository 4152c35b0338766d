"""The reader of what ptxas made of the Triton kernels."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import check_triton  # noqa: E402

PTX = "\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1,%r2}, {%r3,%r4}, %rd49, %p22, 1, 1, 1;\n"
FENCE = "\twgmma.fence.sync.aligned;\n\twgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;\n"
FIRST = "    /*3810*/      HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;        /* 0x01e00000081879f0 */\n"
NEXT = "    /*38a0*/      HGMMA.64x128x16.F32.BF16 R24, R92, gdesc[UR8].tnspB, R24, gsb0 ; /* 0x41e000085c187df0 */\n"
DEAD = "    /*2910*/      HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0 ;         /* 0x000000003fff79f0 */\n"
NAME = "gram_dgrad_kernel(bf16, CI=256, CO=512)"


def dump(sass: str, stack: int = 0) -> str:
    """What cuobjdump says of a kernel with these instructions."""
    usage = f"  REG:141 STACK:{stack} SHARED:1024 LOCAL:0 CONSTANT[0]:688 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    return f"Resource usage:\n Common:\n  GLOBAL:0\n Function gram_dgrad_kernel:\n{usage}\n\tcode for sm_90a\n{sass}"


def check(ptx: str, sass: str, stack: int = 0, allow: tuple[str, ...] = ()) -> list[str]:
    return check_triton.check([(NAME, check_triton.parse(ptx, dump(sass, stack)))], allow)


def test_kept_products_pass():
    assert check_triton.parse(FENCE + 2 * PTX, dump(FIRST + NEXT)) == check_triton.Code(2, 2, 0, 141, 0, 0)
    assert check(FENCE + 2 * PTX, FIRST + NEXT) == []
    assert check(FENCE + 2 * PTX, 4 * NEXT) == []  # an unrolled loop
    assert check("", "") == []


def test_dead_product_is_named():
    (line,) = check(FENCE + 2 * PTX, DEAD + NEXT)
    assert line == f"{NAME}: ptxas kept 1 of 2 products, 1 are dead"


def test_dead_product_beside_an_unrolled_loop():
    (line,) = check(2 * PTX, DEAD + 4 * NEXT)
    assert "1 are dead" in line


def test_product_without_a_trace():
    (line,) = check(2 * PTX, NEXT)
    assert "kept 1 of 2" in line


def test_too_much_shared_memory_is_named():
    code = check_triton.parse(PTX, dump(NEXT), 401408)
    assert check_triton.check([(NAME, code)], ()) == [f"{NAME}: 401408 bytes of shared memory, 232448 at most"]
    assert check_triton.check([(NAME, code._replace(shared=check_triton.SHARED))], ()) == []


def test_stack_frame_is_named_unless_allowed():
    (line,) = check(PTX, NEXT, stack=48)
    assert line == f"{NAME}: 48 bytes of stack"
    assert check(PTX, NEXT, stack=48, allow=(r"^gram_dgrad_kernel\(",)) == []
    assert len(check(PTX, NEXT, stack=48, allow=("conv_kernel",))) == 1


def test_no_kernel_may_lose_a_product():
    assert len(check(PTX, DEAD, allow=(".",))) == 1


def test_silent_cuobjdump_fails():
    with pytest.raises(ValueError, match="registers"):
        check_triton.parse(PTX, "")


def test_the_list_of_what_may_spill_tells_tiles_apart():
    (pattern,) = (p for p in check_triton.ALLOWED if "conv_wgrad" in p and "num_warps" in p)
    kernel = "conv_wgrad_kernel(bf16, CI=128, BLOCK_P=64, BLOCK_CO=128, BLOCK_K=128, {}, num_stages=2; no g_b)"
    assert re.search(pattern, kernel.format("num_warps=4"))
    assert not re.search(pattern, kernel.format("num_warps=8"))


def test_without_triton_there_is_nothing_to_check(monkeypatch, capsys):
    monkeypatch.setattr(check_triton.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["check_triton.py"])
    assert check_triton.main() == 0
    assert "Triton is not installed" in capsys.readouterr().out


def test_exit_status(monkeypatch, capsys):
    code = check_triton.parse(PTX, dump(DEAD))
    monkeypatch.setattr(sys, "argv", ["check_triton.py"])
    monkeypatch.setattr(check_triton.importlib.util, "find_spec", lambda name: name)
    for kernels, status in (([(NAME, code)], 1), ([(NAME, code._replace(kept=1, dead=0))], 0), ([], 1)):
        monkeypatch.setattr(check_triton, "compile_all", lambda kernels=kernels: kernels)
        assert check_triton.main() == status
    captured = capsys.readouterr()
    assert NAME in captured.err and "1 compiled for sm_90, all 1 products kept" in captured.out
