"""The search for operands of matrix products that are written too late."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import check_operands  # noqa: E402

ARRIVE, WAIT = "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
FROM_REGISTERS = "HGMMA.64x64x16.F32 R64, R152, gdesc[UR8], R64, gsb0"
FROM_MEMORY = "HGMMA.64x112x16.F32.BF16 R24, gdesc[UR20], R24"


def sass(*instructions: str) -> list[str]:
    """Instructions as cuobjdump prints them."""
    lines = [f"        /*{16 * i:04x}*/                   {text} ;   /* 0x0 */" for i, text in enumerate(instructions)]
    return ["\t\tFunction : _Z4stem", *lines, "\t\t..........", "                /* 0x000fe400078e0000 */"]


def late(*instructions: str) -> list[str]:
    return [found.instruction for found in check_operands.late_writes(sass(*instructions))]


def test_operands_written_before_the_product_pass():
    assert late("MOV R152, RZ", "CS2R R154, SRZ", ARRIVE, FROM_REGISTERS, WAIT, "MOV R152, R3") == []


@pytest.mark.parametrize(
    "write",
    [
        "IMAD.MOV.U32 R155, RZ, RZ, RZ",
        "@!P0 MOV R152, RZ",
        "CS2R R154, SRZ",
        "CS2R R151, SRZ",
        "LDS.128 R152, [R8]",
        "LDSM.16.M88.4 R152, [R8+UR4]",
        "IMAD.WIDE R154, R2, R3, R4",
    ],
)
def test_written_while_it_is_read(write):
    text = write.removeprefix("@!P0 ")
    assert late(ARRIVE, FROM_REGISTERS, write, WAIT) == [text]
    assert late(ARRIVE, write, FROM_REGISTERS, WAIT) == [text]  # past the fence
    assert late(ARRIVE, write, FROM_REGISTERS) == [text]  # at the end of a kernel


@pytest.mark.parametrize(
    "other",
    [
        "MOV R156, RZ",
        "CS2R.32 R151, SRZ",
        "STS.128 [R152], R4",
        "STG.E.128 desc[UR4][R152.64], R4",
        "R2UR UR4, R152",
        "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R152+URZ], RZ",
        "HGMMA.64x64x16.F32 R152, gdesc[UR8], R152",
    ],
)
def test_what_writes_no_operand_passes(other):
    assert late(ARRIVE, FROM_REGISTERS, other, WAIT) == []


def test_products_of_shared_memory_read_no_registers():
    assert late(ARRIVE, FROM_MEMORY, "MOV R20, RZ", "MOV R24, RZ", WAIT) == []


def test_each_group_is_its_own():
    assert late(ARRIVE, FROM_REGISTERS, ARRIVE, "MOV R152, RZ", FROM_MEMORY, WAIT) == []


def test_exit_status(tmp_path, monkeypatch, capsys):
    path = tmp_path / "sass"
    monkeypatch.setattr(sys, "argv", ["check_operands.py", str(path)])
    for instructions, status in (
        ((ARRIVE, FROM_REGISTERS, WAIT), 0),
        ((ARRIVE, FROM_REGISTERS, "MOV R153, RZ"), 1),
        ((), 1),
    ):
        path.write_text("\n".join(sass(*instructions)))
        assert check_operands.main() == status
    captured = capsys.readouterr()
    assert "none written late in 1 kernels" in captured.out
    assert "_Z4stem: written while a product may read it: MOV R153, RZ" in captured.err
    assert "no matrix products" in captured.err


def test_without_cuobjdump_there_is_nothing_to_check_with(tmp_path, monkeypatch, capsys):
    path = tmp_path / "_C.so"
    path.write_bytes(b"\x7fELF")
    monkeypatch.setattr(sys, "argv", ["check_operands.py", str(path)])
    monkeypatch.setattr(check_operands.shutil, "which", lambda name: None)
    monkeypatch.setattr(check_operands.importlib.util, "find_spec", lambda name: None)
    assert check_operands.main() == 0
    assert "nothing to check with" in capsys.readouterr().out
