"""Every Triton kernel compiled for GPUs that are not there, with the arguments that its own launcher would pass.

A :class:`Combination` names a kernel, an architecture, a precision and a problem, here of attention, in
``ahead_of_time_decode.py`` of attention over a cache, in ``ahead_of_time_gemm.py`` of the operations around a matrix
product, in ``ahead_of_time_norm.py`` of those around a norm; ``compile_all`` turns each into a :class:`Compiled`, which
``violations`` holds against the rules. ``python -m benchmarks inspect`` prints them, the test suite compiles the
covering ones. Compilation needs processes in which Triton does not interpret, so it has its own.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fusedformer.functional import attention
from fusedformer.kernels.attention.config import padded_head_dim
from fusedformer.kernels.attention.problem import canonical
from fusedformer.kernels.common.library import gradient_like
from tests.cases import Case, make_inputs

from .covering import Assignment, covering
from .machine_code import MachineCode, from_amdgcn, from_cubin

if TYPE_CHECKING:
    from fusedformer.kernels.common.triton_launch import Launch, Tile

# KiB of shared memory that one thread block may use. sm_86 has no table of its own and stands for all that have none.
SHARED_MEMORY = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
ARCHITECTURES = tuple(SHARED_MEMORY)
KERNELS = ("forward", "backward_delta", "backward_dkdv", "backward_dq", "backward_bias", "weights")
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = HALF_DTYPES | dict.fromkeys(("ieee", "tf32", "tf32x3"), torch.float32)
HEAD_DIMS = {"64": (64, 64), "128": (128, 128), "256": (256, 256), "72:40": (72, 40)}
ODD_HEAD_DIMS = {"8": (8, 8), "192:128": (192, 128)}

# What a problem may have, by feature; the first of each is without it. The words make a case's name.
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "band": {"": {}, "causal": {"is_causal": True}, "window": {"window": (9, 3)}},
    "attn_mask": {
        "": {},
        "mask": {"mask": "bool BHLS"},
        "bias": {"mask": "float 1HLS"},
        "row bias": {"mask": "float32 BHL1"},
    },
    "key_mask": {"": {}, "key mask": {"key_mask": "bool"}, "key bias": {"key_mask": "float"}},
    "dropout": {"": {}, "dropout": {"dropout_p": 0.1}},
    "softcap": {"": {}, "softcap": {"softcap": 3.0}},
    "alibi": {"": {}, "alibi": {"alibi": "H"}},
    "sinks": {"": {}, "sinks": {"sinks": True}},
    "heads": {"": {}, "grouped": {"heads_kv": 2}},
    "layout": {"": {}, "odd": {"len_q": 65, "len_k": 63, "layout": "packed"}},
}
WITHOUT = dict.fromkeys(FEATURES, "")
PROBLEMS: tuple[Assignment, ...] = (
    WITHOUT,
    {**WITHOUT, "band": "window", "heads": "grouped"},
    {**WITHOUT, "band": "causal", "key_mask": "key mask", "dropout": "dropout"},
    {name: list(values)[-1] for name, values in FEATURES.items()} | {"attn_mask": "bias", "layout": ""},
)
SPILLS = Path(__file__).parent / "spills.json"


class Compilable(Protocol):
    """A kernel on an architecture, whose ``str`` is a name of its own."""

    @property
    def kernel(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def case(self) -> object: ...
    @property
    def has_products(self) -> bool: ...
    @property
    def must_not_spill_in_loops(self) -> bool: ...
    def launch(self) -> Launch:
        """What the launcher would run on a GPU of this architecture."""


@dataclass(frozen=True)
class Combination:
    """What is compiled: ``kernel`` for ``architecture`` in ``precision`` (a key of ``DTYPES``) on a problem."""

    kernel: str
    architecture: str
    precision: str
    case: Case

    def __str__(self) -> str:
        return f"{self.kernel}-{self.architecture}-{self.precision}-{self.case}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def head_dim(self) -> int:
        return padded_head_dim(max(self.case.head_dim, self.case.value_dim or self.case.head_dim))

    @property
    def has_products(self) -> bool:
        return self.kernel != "backward_delta"

    @property
    def must_not_spill_in_loops(self) -> bool:
        # Rows that are no multiple of 16 elements are loaded one element at a time, which takes registers of its own.
        aligned = self.case.head_dim % 16 == 0 and (self.case.value_dim or 0) % 16 == 0
        return aligned and self.dtype != torch.float32 and self.head_dim <= 128

    def launch(self) -> Launch:
        return launch_of(self)


@dataclass(frozen=True)
class Compiled:
    """What came of a combination.

    Attributes:
        asks_for_tma: the tile wants tensor descriptors and the problem allows them.
        narrow_strides: uses of a stride in 32 bits, where offsets could overflow.
        shared: bytes of shared memory.
        code: None when the compiler refused.
        error: why it did.
    """

    combination: Compilable
    tile: Tile
    asks_for_tma: bool
    seconds: float
    narrow_strides: int = 0
    shared: int = 0
    code: MachineCode | None = None
    error: str = ""


def covering_combinations() -> list[Combination]:
    """Few that hold every pair of kernel, architecture, precision, head dim and features."""
    factors: dict[str, Sequence[str]] = {
        "kernel": KERNELS,
        "architecture": ARCHITECTURES,
        "precision": tuple(DTYPES),
        "head_dim": tuple(HEAD_DIMS | ODD_HEAD_DIMS),
        **{name: tuple(values) for name, values in FEATURES.items()},
    }
    return [_combination(assignment) for assignment in covering(factors, _exists)]


def all_combinations() -> list[Combination]:
    """Every kernel, architecture, precision and common head dim on each of ``PROBLEMS``; and the covering ones."""
    factors = {"kernel": KERNELS, "architecture": ARCHITECTURES, "precision": DTYPES, "head_dim": HEAD_DIMS}
    assignments = (
        {**dict(zip(factors, values, strict=True)), **problem}
        for problem in PROBLEMS
        for values in product(*factors.values())
    )
    return [*dict.fromkeys([*map(_combination, filter(_exists, assignments)), *covering_combinations()])]


def _exists(assignment: Assignment) -> bool:
    """Whether there is such a launch; of some factors, whether there can be."""
    has = assignment.get
    if has("kernel") == "backward_bias" and has("attn_mask", "bias") in ("", "mask"):
        return False  # no floating mask, no gradient of it
    return not (has("architecture") == "gfx942" and has("precision") == "tf32x3")  # triton_support refuses it


def _combination(assignment: Assignment) -> Combination:
    head_dim, value_dim = (HEAD_DIMS | ODD_HEAD_DIMS)[assignment["head_dim"]]
    present = {feature: assignment[feature] for feature in FEATURES if assignment[feature]}
    if assignment["kernel"] == "backward_delta":
        present = {}  # it reads no scores
    options: dict[str, Any] = {"batch": 2, "heads": 4, "len_q": 64, "head_dim": head_dim, "value_dim": value_dim}
    for feature, value in present.items():
        options |= FEATURES[feature][value]
    case = Case("+".join(present.values()) or "plain", **options)
    return Combination(assignment["kernel"], assignment["architecture"], assignment["precision"], case)


def launch_of(combination: Combination) -> Launch:
    """What the launcher would run for ``combination`` on a GPU of its architecture."""
    from fusedformer.kernels.attention.triton_launch import backward_launches, forward_launch, weights_launch

    c = combination
    case = replace(c.case, precision=c.precision) if c.dtype == torch.float32 else c.case
    inputs = make_inputs(case, c.dtype, "cpu", seed=0)
    call = inspect.signature(attention).bind(inputs.query, inputs.key, inputs.value, **inputs.options)
    call.apply_defaults()
    del call.arguments["backend"]
    problem = canonical(**call.arguments)
    out, grad_lse = torch.empty_like(inputs.grad_out), inputs.grad_lse.float()
    lse = torch.empty_like(grad_lse)
    if c.kernel == "forward":
        return forward_launch(problem, out, lse, lse, c.architecture)
    if c.kernel == "weights":
        weights = inputs.query.new_empty(problem.query.size(0), problem.query.size(2), problem.key.size(2))
        return weights_launch(problem, lse, weights, True, c.architecture)

    def gradient(x: Tensor | None) -> Tensor | None:
        return gradient_like(x) if x is not None and x.is_floating_point() else None

    grads = tuple(map(gradient, (problem.query, problem.key, problem.value, problem.attn_mask, problem.key_mask)))
    launches = backward_launches(problem, inputs.grad_out, grad_lse, out, lse, lse, lse, grads, c.architecture)
    (found,) = (launch for launch in launches if launch.kernel.fn.__name__ == f"attention_{c.kernel}_kernel")
    return found


class _AbsentGpu:
    """All that Triton asks of a driver to compile. Each architecture is a device: kernels are kept by device."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        self._device = ARCHITECTURES.index(architecture)
        is_cuda = architecture.startswith("sm_")
        self._target = GPUTarget("cuda", int(architecture[3:]), 32) if is_cuda else GPUTarget("hip", architecture, 64)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def compile_one(combination: Compilable) -> Compiled:
    """Compiles as the launch would, specialisation included, in this process."""
    from triton import TritonError
    from triton.runtime import driver

    launch = combination.launch()
    driver.set_active(_AbsentGpu(combination.architecture))
    compiled = Compiled(combination, launch.tile, bool(launch.arguments.get("USE_TMA")), 0.0)
    start = time.perf_counter()
    try:
        kernel = launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options)
    except (TritonError, RuntimeError) as error:  # a failed pass is a RuntimeError
        return replace(compiled, seconds=time.perf_counter() - start, error=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    code = from_cubin(kernel.asm["cubin"]) if "cubin" in kernel.asm else from_amdgcn(kernel.asm["amdgcn"])
    narrow = narrow_strides(kernel.asm["ttir"])
    return replace(compiled, seconds=seconds, narrow_strides=narrow, shared=kernel.metadata.shared, code=code)


def narrow_strides(ttir: str) -> int:
    """How often Triton's intermediate code does anything with a 32-bit stride but widen it."""
    signature, body = ttir.split("tt.func public", 1)[1].split("\n", 1)
    strides = re.findall(r"%\w+_strides?\w*(?=: i32)", signature)
    if not strides:
        raise ValueError("no stride among the kernel's parameters")
    used = re.compile("(" + "|".join(map(re.escape, strides)) + r")\b")
    return sum(used.search(line) is not None and "arith.extsi" not in line for line in body.splitlines())


def compile_all(
    combinations: Iterable[Compilable], jobs: int, cache: Path, step: Callable[[str], None] = lambda description: None
) -> Iterator[Compiled]:
    """Each as it gets ready, in ``jobs`` processes; what was compiled before is taken from ``cache``, Triton's."""
    todo = iter(combinations)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=_prepare, initargs=(str(cache),)) as pool:
        running: set[Future[Compiled]] = set()
        while True:
            for combination in islice(todo, jobs - len(running)):
                step(str(combination))
                running.add(pool.submit(compile_one, combination))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def _prepare(cache: str) -> None:
    """In a new process, before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)


def allowed_spills() -> dict[str, int]:
    """Bytes by combination, as committed; 0 for those not named."""
    table: dict[str, int] = json.loads(SPILLS.read_text())
    return table


def violations(compiled: Compiled, allowed: dict[str, int]) -> list[str]:
    """What breaks a rule."""
    c, code = compiled.combination, compiled.code
    if code is None:
        return [f"does not compile: {compiled.error}"]
    broken = []
    if compiled.shared > 1024 * SHARED_MEMORY[c.architecture]:
        broken.append(f"shared memory {compiled.shared} bytes, the limit is {SHARED_MEMORY[c.architecture]} KiB")
    if code.spilled > allowed.get(str(c), 0):
        broken.append(f"spills {code.spilled} bytes, the table allows {allowed.get(str(c), 0)}")
    if code.spills_in_loops and c.must_not_spill_in_loops:
        broken.append(f"{code.spills_in_loops} instructions spill inside a loop, none may of this type and shape")
    if not code.stores:
        broken.append("stores nothing")
    if compiled.narrow_strides:
        broken.append(f"{compiled.narrow_strides} uses of a stride in 32 bits")
    if c.has_products and c.precision != "ieee" and not code.tensor_cores:
        broken.append("no tensor-core instruction")
    if c.precision == "ieee" and code.tensor_cores and c.architecture.startswith("sm_"):
        broken.append(f"products of float32 at full precision on tensor cores: {code.tensor_cores}")
    if compiled.asks_for_tma and c.architecture in ("sm_90", "sm_100") and not code.tma_loads:
        broken.append("the tile asks for TMA, no such instruction")
    return broken
