"""Writes, as JSON, what Triton's compiler knows of Hopper's layouts: a source that owes nothing to ``csrc/cuda``.

A script of its own, as Triton must not interpret here: ``TRITON_INTERPRET=0 python triton_layouts.py``.
"""

from __future__ import annotations

import json
import re
import sys
from itertools import product
from typing import Any

import triton
import triton.language as tl
from triton._C.libtriton import gluon_ir, ir, nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(a_ptr, b_ptr, out_ptr, TRANSPOSE_A: tl.constexpr, TRANSPOSE_B: tl.constexpr):  # type: ignore[no-untyped-def]
    m, n, k = tl.arange(0, 128), tl.arange(0, 128), tl.arange(0, 64)
    acc = tl.zeros((128, 128), tl.float32)
    for _ in range(8):
        if TRANSPOSE_A:
            a = tl.trans(tl.load(a_ptr + k[:, None] * 128 + m[None, :]))
        else:
            a = tl.load(a_ptr + m[:, None] * 64 + k[None, :])
        if TRANSPOSE_B:
            b = tl.load(b_ptr + k[:, None] * 128 + n[None, :])
        else:
            b = tl.trans(tl.load(b_ptr + n[:, None] * 64 + k[None, :]))
        acc = tl.dot(a, b, acc)
        a_ptr += 8192
        b_ptr += 8192
    tl.store(out_ptr + m[:, None] * 128 + n[None, :], acc)


def descriptors(transpose_a: bool, transpose_b: bool) -> list[int]:
    """What the compiled product adds to the address of a tile: the descriptors of tiles at address 0."""
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32"}
    signature |= {"TRANSPOSE_A": "constexpr", "TRANSPOSE_B": "constexpr"}
    flags = {"TRANSPOSE_A": transpose_a, "TRANSPOSE_B": transpose_b}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(product_kernel, signature, flags, attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    return sorted({number for number in map(int, re.findall(r"\b\d{17,}\b", ptx)) if number >> 62 == 1})


def layouts() -> dict[str, Any]:
    """Of a (64, 128) accumulator, a (64, 16) first operand in registers and (128, 64) in shared memory, by bits."""
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    acc = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    operand = gl.DotOperandLayout(operand_index=0, parent=acc, k_width=2)
    shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

    def bits(layout: Any, shape: list[int]) -> Any:
        return builder.to_linear_layout(layout._to_ir(builder), shape)

    registers = {"acc": bits(acc, [64, 128]), "operand": bits(operand, [64, 16])}
    return {
        **{name: [*x.reg_bases, *x.lane_bases, *x.warp_bases] for name, x in registers.items()},
        "shared": bits(shared, [128, 64]).offset_bases,
    }


if __name__ == "__main__":
    found = {f"{a:d}{b:d}": descriptors(a, b) for a, b in product((False, True), repeat=2)}
    sys.stdout.write(json.dumps({"layouts": layouts(), "descriptors": found}))
