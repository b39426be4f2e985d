"""The CUDA kernels as nvcc compiles them, without a GPU: registers, spills and instructions from the machine code.

How much shared memory a kernel asks for is decided at its launch; the emulator refuses there what a GPU would.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from benchmarks.machine_code import MachineCode, from_sass
from fusedformer.kernels.common.device import TRITON_INSTALLED

CUDA = Path(__file__).parents[3] / "csrc" / "cuda"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
FLAGS = ["-std=c++20", "-O3", "-Xptxas=-v", "-cubin"]
COMPLAINTS = r"serializ|warning|ignored"  # of ptxas: products that wait for each other, setmaxnreg that has no effect
PRODUCT, EXP2, WAIT_FOR_ALL = r"\bHGMMA\b", r"\bMUFU\.EX2\b", r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b"
HOPPER = (PRODUCT, r"\bUTMALDG\b", r"\bUSETMAXREG\b")
SUMS, TRANSPOSED = (r"\bUBLKCP\b", r"\bUBLKRED\.G\.S\.ADD\.F32\b"), r"\bHGMMA\b.*\.tnspA\.tnspB\b"
WIDE_LOAD = r"\bLDG\.E\.128\b"
AMPERE = (
    r"\bHMMA\.16816\.F32\b",
    r"\bLDGSTS\.E\.BYPASS\.\S*\b128\b",
    r"\bLDSM\.16\.M88\.4\b",
    r"\bLDSM\.16\.MT88\.4\b",
)

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc"),
    pytest.mark.skipif(not TRITON_INSTALLED, reason="there is no Triton, whose disassembler reads the machine code"),
]


@dataclass(frozen=True)
class Kernel:
    """What a kernel's every instance must have.

    Attributes:
        architecture: as nvcc names it.
        instances: how many there are.
        registers: of a thread at launch, at most; before setmaxnreg.
        instructions: patterns that occur.
    """

    source: str
    name: str
    architecture: str
    instances: int
    registers: int
    instructions: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}-sm_{self.architecture}"


# A block of n threads has 65536 / n registers for each: 168 of 384, 128 of 512; two of 128, 255.
KERNELS = (
    Kernel("attention_forward.cu", "attention_forward_kernel", "90a", 6, 168, (*HOPPER, EXP2)),
    Kernel("attention_backward.cu", "attention_backward_kernel", "90a", 4, 168, (*HOPPER, EXP2, *SUMS, TRANSPOSED)),
    Kernel("attention_backward.cu", "attention_backward_rows_kernel", "90a", 4, 48, (WIDE_LOAD,)),
    Kernel("attention_backward.cu", "attention_backward_round_kernel", "90a", 4, 48, (WIDE_LOAD, r"\bUTMASTG\b")),
    *(Kernel("attention_decode.cu", "attention_decode_kernel", arch, 6, 255, (*AMPERE, EXP2)) for arch in ("80", "90")),
    *(Kernel("attention_decode.cu", "attention_combine_kernel", arch, 6, 64, (WIDE_LOAD,)) for arch in ("80", "90")),
)  # fmt: skip


@cache
def compiled(source: str, architecture: str, folder: Path) -> tuple[str, dict[str, tuple[str, str]]]:
    """What ptxas says, and of each kernel, by its mangled name, the code and its resources."""
    from triton import knobs

    assert NVCC is not None
    cubin, said = (folder / f"{source}.{architecture}.{suffix}" for suffix in ("cubin", "txt"))
    with cubin.with_suffix(".lock").open("w") as lock:  # the first of several processes that test compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
            command = [NVCC, *FLAGS, target, str(CUDA / source), "-o", str(cubin)]
            process = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            assert process.returncode == 0, process.stdout
            said.write_text(process.stdout)
    code = output(knobs.nvidia.nvdisasm.path, "--print-code", cubin)
    resources = output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    sections = re.split(r"^\t\.section\t\.text\.([^,]*),.*$", code, flags=re.MULTILINE)
    of_function = dict(re.findall(r" Function (\S+):\n(.*)", resources))
    kernels = zip(sections[1::2], sections[2::2], strict=True)
    return said.read_text(), {name: (sass, of_function[name]) for name, sass in kernels}


def output(tool: str, option: str, file: Path) -> str:
    return subprocess.run([tool, option, str(file)], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the whole run, whose processes each have a folder in one."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cubins"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_machine_code(kernel: Kernel, folder: Path) -> None:
    said, functions = compiled(kernel.source, kernel.architecture, folder)
    assert re.search(COMPLAINTS, said) is None, said
    instances = {name: code for name, code in functions.items() if kernel.name in name}
    assert len(instances) == kernel.instances, list(functions)
    for name, (sass, resources) in instances.items():
        code: MachineCode = from_sass(sass, resources)
        assert code.spilled == 0, f"{name}: {resources}"
        assert "STACK:0 " in resources, f"{name}: {resources}"
        assert code.registers <= kernel.registers, f"{name}: {resources}"
        for pattern in kernel.instructions:
            assert re.search(pattern, sass), f"{name}: nothing like {pattern}"


def test_forward_takes_exponentials_under_products(folder: Path) -> None:
    """In the loop over keys no wait for all products stands between the last one's start and the last exponential.

    The compiler may move such a wait, and has: what is to run side by side then runs one after the other.
    """
    _, functions = compiled("attention_forward.cu", "90a", folder)
    for name, (sass, _) in functions.items():
        loops = [loop for loop in loops_of(sass.splitlines()) if re.search(EXP2, loop) and re.search(PRODUCT, loop)]
        assert loops, f"{name}: no loop has products and exponentials"
        over_keys = min(loops, key=len)
        after = re.split(PRODUCT, over_keys)[-1]
        under = re.split(WAIT_FOR_ALL, after)[0]
        assert len(re.findall(EXP2, under)) == len(re.findall(EXP2, over_keys)) >= 64, name


def test_backward_takes_exponentials_under_a_product(folder: Path) -> None:
    """In the loop over queries they stand before the first wait for all products, that for dP."""
    _, functions = compiled("attention_backward.cu", "90a", folder)
    kernels = {name: sass for name, (sass, _) in functions.items() if "attention_backward_kernel" in name}
    for name, sass in kernels.items():
        loops = [loop for loop in loops_of(sass.splitlines()) if re.search(EXP2, loop) and re.search(PRODUCT, loop)]
        inner = min(loops, key=len)
        started, waited = re.split(EXP2, inner)[0], re.split(WAIT_FOR_ALL, inner)[0]
        assert len(re.findall(PRODUCT, started)) >= 8, name
        assert len(re.findall(EXP2, waited)) == len(re.findall(EXP2, inner)) >= 32, name


def loops_of(code: list[str]) -> list[str]:
    """The stretches of code that a branch leads back over."""
    labels = {line.split(":")[0].strip(): number for number, line in enumerate(code) if re.match(r"\.L\w+:", line)}
    jumps = [(number, re.search(r"\bBRA\b.*?(\.L_\w+)", line)) for number, line in enumerate(code)]
    backward = [(labels[jump[1]], number) for number, jump in jumps if jump and labels[jump[1]] <= number]
    return ["\n".join(code[first : last + 1]) for first, last in backward]
