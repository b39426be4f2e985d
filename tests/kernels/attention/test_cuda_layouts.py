"""The layouts that the CUDA kernels and their emulator assume of Hopper, against those that Triton's compiler knows."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from ctypes import c_int, c_uint64
from pathlib import Path
from typing import Any

import pytest

from fusedformer.kernels.common.device import TRITON_INSTALLED
from tests.lanes import emulated

pytestmark = [emulated, pytest.mark.skipif(not TRITON_INSTALLED, reason="there is no Triton to compare with")]
LEADING_OFFSET = 0x3FFF << 16  # bits of a descriptor that mean nothing for a tile of one panel


@pytest.fixture(scope="module")
def triton() -> Any:
    script = Path(__file__).with_name("triton_layouts.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    process = subprocess.run([sys.executable, str(script)], env=environment, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def at(bases: list[list[int]], index: int) -> tuple[int, int]:
    """Of a layout in which each bit of the index moves the place by one of ``bases``."""
    row = column = 0
    for bit, (rows, columns) in enumerate(bases):
        if index >> bit & 1:
            row, column = row ^ rows, column ^ columns
    return row, column


@pytest.mark.parametrize(("name", "registers"), [("acc", 64), ("operand", 8)])
def test_fragments(name: str, registers: int, triton: Any, emulator: ctypes.CDLL) -> None:
    place = (c_int * 2)()
    for thread in range(128):
        for i in range(registers):
            if name == "operand":  # a register holds two numbers
                emulator.check_place(True, thread, i // 2, place)
                place[1] += i % 2
            else:
                emulator.check_place(False, thread, i, place)
            assert tuple(place) == at(triton["layouts"][name], thread * registers + i)


def test_swizzle(triton: Any, emulator: ctypes.CDLL) -> None:
    for offset in range(128 * 64):
        row, feature = at(triton["layouts"]["shared"], offset)
        assert emulator.check_swizzled(row, feature, 128) == 2 * offset


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
def test_descriptors(transpose_a: bool, transpose_b: bool, triton: Any, emulator: ctypes.CDLL) -> None:
    """Of a (128, 64) by (64, 128) product: A in two halves of one panel's breadth, B whole; 16 contracted at a time."""
    emulator.check_descriptor.restype = c_uint64
    steps = range(0, 64, 16)
    if transpose_a:
        a = {emulator.check_descriptor(True, 64, k, m) & ~LEADING_OFFSET for k in steps for m in (0, 64)}
    else:
        a = {emulator.check_descriptor(False, 128, m, k) for k in steps for m in (0, 64)}
    if transpose_b:
        b = {emulator.check_descriptor(True, 64, k, 0) for k in steps}
    else:
        b = {emulator.check_descriptor(False, 128, 0, k) for k in steps}
    assert set(triton["descriptors"][f"{transpose_a:d}{transpose_b:d}"]) == a | b
