"""What a compiled kernel came to, read from its machine code: a cubin's SASS, or the assembly of AMD's compiler."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

TENSOR_CORES = {  # by what the machine code calls them
    "HGMMA": r"\bHGMMA\b",  # Hopper: asynchronous, of a warp group
    "UTCMMA": r"\bUTC\w*MMA\b",  # Blackwell: of a thread block, results in tensor memory
    "HMMA": r"\bHMMA\b",  # synchronous, of a warp
    "MFMA": r"\bv_mfma_",  # AMD's matrix cores
}
TMA_LOADS = r"\bUTMALDG\b"
EXP2 = r"\b(MUFU\.EX2|v_exp_f32)"
STORES = r"\b(STG|UTMASTG|(global|buffer|flat)_store_\w+)\b(?!.*Folded)"


@dataclass(frozen=True)
class MachineCode:
    """One kernel.

    Attributes:
        registers: of a thread, those of AMD's matrix cores included.
        spilled: bytes of a thread's registers that the compiler keeps in memory; its other use of the stack is not
            counted.
        spills_in_loops: instructions that move them, inside the innermost loops. A value that waits in memory from
            before a loop until after it costs next to nothing; one that moves at every step does.
        tensor_cores: instructions by kind, a key of ``TENSOR_CORES``.
        tma_loads: instructions that load a tile through a tensor descriptor.
        exp2: instructions.
        stores: instructions that write to global memory.
    """

    registers: int
    spilled: int
    spills_in_loops: int
    tensor_cores: dict[str, int]
    tma_loads: int
    exp2: int
    stores: int


def from_cubin(cubin: bytes) -> MachineCode:
    """Read with the disassembler that Triton brings."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _output_of(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _output_of(knobs.nvidia.nvdisasm.path, "--print-code", file.name)
    return from_sass(sass, resources)


def from_sass(sass: str, resources: str) -> MachineCode:
    """From the output of ``nvdisasm --print-code`` and of ``cuobjdump --dump-resource-usage``."""
    code = sass.splitlines()
    spills = r"\b(STL|LDL)\b"
    spilled = _number(r"STACK:(\d+)", resources) if _count(spills, code) else 0
    return _machine_code(code, _number(r"REG:(\d+)", resources), spilled, spills, r"\bBRA\b.*?(\.L_\w+)")


def from_amdgcn(assembly: str) -> MachineCode:
    code = assembly.splitlines()
    spills = r"\b(scratch|buffer)_\w+ .*Folded (Spill|Reload)"
    spilled = _number(r"\.private_segment_fixed_size: +(\d+)", assembly) if _count(spills, code) else 0
    registers = _number(r"\.vgpr_count: +(\d+)", assembly)  # accumulation registers included
    return _machine_code(code, registers, spilled, spills, r"\bs_c?branch\w* +(\.L\w+)")


def _machine_code(code: Sequence[str], registers: int, spilled: int, spills: str, branch: str) -> MachineCode:
    tensor_cores = {kind: _count(pattern, code) for kind, pattern in TENSOR_CORES.items()}
    return MachineCode(
        registers,
        spilled,
        sum(_count(spills, loop) for loop in innermost_loops(code, branch)),
        {kind: count for kind, count in tensor_cores.items() if count},
        _count(TMA_LOADS, code),
        _count(EXP2, code),
        _count(STORES, code),
    )


def innermost_loops(code: Sequence[str], branch: str) -> list[Sequence[str]]:
    """The stretches of code that a branch leads back over and that hold no other such stretch."""
    labels = {line.split(":")[0].strip(): number for number, line in enumerate(code) if re.match(r"\s*\.L\w+:", line)}
    loops = []
    for number, line in enumerate(code):
        found = re.search(branch, line)
        if found and found[1] in labels and labels[found[1]] <= number:
            loops.append((labels[found[1]], number))
    return [
        code[first : last + 1]
        for first, last in loops
        if not any(first <= other[0] and other[1] <= last and other != (first, last) for other in loops)
    ]


def _count(pattern: str, code: Sequence[str]) -> int:
    return sum(re.search(pattern, line) is not None for line in code)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has nothing like {pattern!r}")
    return int(found[1])


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
